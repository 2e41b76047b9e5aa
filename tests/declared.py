"""Interventions on tiny models in one line each, for the tests of the laws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import intervenable as iv
from intervenable import maps
from model_maps import COMPONENTS, Sizes, columns_of, sizes_of
from tiny_models import RECURRENT

LAYER = 1
"""The block that tests intervene on, where there are several."""

RAGGED = ((1,), (0, 3, -1))
"""Positions of two examples, a different number in each, one of them negative."""

RAGGED_KEYS = ((-7, 1), (2,))
"""Keys of two examples of seven tokens, each of which a query of `RAGGED` reads."""


def map_of(model: nn.Module) -> Any:
    """The map of a model."""
    return maps.map_of(model)


def components_of(model: nn.Module) -> tuple[str, ...]:
    """Every component a model has where text passes."""
    names: tuple[str, ...] = map_of(model).components()
    return tuple(name for name in names if COMPONENTS[name].prefix not in ("vision", "audio"))


def units_of(component: str) -> tuple[str, ...]:
    """The units a component can be cut into."""
    return COMPONENTS[component].units


def is_inside(component: str) -> bool:
    """Whether a component is computed by functions inside an attention module, where no hook of a module sees it."""
    return COMPONENTS[component].inside is not None


def writable(model: nn.Module) -> tuple[str, ...]:
    """The components that can be written: all but the logits of routers, which no model reads back."""
    described = map_of(model)
    return tuple(name for name in components_of(model) if not described.site(name).read_only)


def everything(model: nn.Module) -> list[tuple[str, str]]:
    """Every `(component, unit)` of a model that can be written."""
    return [(component, unit) for component in writable(model) for unit in units_of(component)]


def stored(model: nn.Module) -> list[tuple[str, str]]:
    """Every `(component, unit)` of a model that goes into or comes out of a module, and can be written there."""
    return [place for place in everything(model) if not is_inside(place[0])]


def insides(model: nn.Module) -> list[tuple[str, str]]:
    """Every `(component, unit)` of a model that is computed inside an attention module."""
    return [place for place in everything(model) if is_inside(place[0])]


def exact(model: nn.Module) -> list[tuple[str, str]]:
    """Every `(component, unit)` where writing back what was read is exact to the bit.

    Under a fused kernel that is not so inside attention modules: an edit there has it redone by hand.
    """
    config = getattr(model, "config", None)
    eager = getattr(config, "_attn_implementation", None) in (None, "eager")
    return everything(model) if eager else stored(model)


def heads_of(model: nn.Module, component: str) -> int:
    """How many heads a component has; 0 if it has none."""
    if COMPONENTS[component].axes == "stream":
        return 0
    config = getattr(model, "config", None)
    sizes = sizes_of(config) if config is not None else Sizes()
    if is_inside(component):
        heads = sizes.key_value_heads if COMPONENTS[component].word == "rotary_key" else sizes.query_heads
        assert heads is not None
        return heads
    columns = columns_of(map_of(model).site(component), sizes)
    assert columns is not None
    return columns.heads


def layer_of(model: nn.Module, component: str, layer: int = LAYER) -> int | None:
    """The `layer` to declare for a component."""
    if COMPONENTS[component].scope == "model":
        return None
    return 0 if type(model).__name__.lower() in RECURRENT else layer


def at(model: nn.Module, component: str, unit: str | None = None, **fields: Any) -> iv.RepresentationConfig:
    """The representation of a component in the middle block, or in `layer`."""
    layer = layer_of(model, component, fields.pop("layer", LAYER))
    return iv.RepresentationConfig(layer, component, unit or units_of(component)[-1], **fields)


def wrapped(
    model: nn.Module, *representations: iv.RepresentationConfig, types: Any = iv.VanillaIntervention
) -> iv.IntervenableModel:
    """The model with these interventions."""
    return iv.IntervenableModel(iv.IntervenableConfig(list(representations), types), model)


def located(model: nn.Module, component: str, unit: str, form: str) -> Any:
    """Locations of one intervention for a batch of two, in the full form, or None for everything.

    Args:
        form: "whole", "located" (positions 1 and 2, as queries reading keys 0 and 2), "negative" or "ragged".
    """
    if form == "whole":
        return None
    positions = {"located": [[1, 2]] * 2, "negative": [[-1, -3]] * 2, "ragged": [list(row) for row in RAGGED]}
    keys = {"located": [[0, 2]] * 2, "negative": [[-2, -5]] * 2, "ragged": [list(row) for row in RAGGED_KEYS]}
    last = heads_of(model, component) - 1
    heads = {
        "located": [[last]] * 2,
        "negative": [[-1]] * 2,
        "ragged": [[last], list(range(last + 1))],
    }
    levels = {"h": heads, "pos": positions, "query": positions, "key": keys}
    found = [levels[level][form] for level in unit.split(".")]
    return found[0] if len(found) == 1 else found


def tensors_of(output: Any) -> dict[str, Tensor]:
    """Every tensor of a model's output, by where it is."""
    if isinstance(output, Tensor):
        return {"": output}
    items = output.items() if isinstance(output, Mapping) else enumerate(output)
    if not isinstance(output, (Mapping, tuple, list)):
        return {}
    return {
        f"{key}.{inner}": tensor
        for key, item in items
        if isinstance(item, (Tensor, Mapping, tuple, list))
        for inner, tensor in tensors_of(item).items()
    }


def same_bits(left: Any, right: Any) -> bool:
    """Whether two outputs hold the same tensors, bit for bit."""
    one, other = tensors_of(left), tensors_of(right)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def main_output(output: Any) -> Tensor:
    """Logits, last hidden state or whatever else comes first."""
    return next(iter(tensors_of(output).values()))


def hooks_of(model: nn.Module) -> dict[str, list[Any]]:
    """Every hook on every module, in order."""
    return {
        f"{path}{name}": list(value.items())
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name.endswith("hooks") and isinstance(value, Mapping) and value
    }


def identity(base: Tensor) -> Tensor:
    """Give back what was given."""
    return base
