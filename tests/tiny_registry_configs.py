"""Tiny configs: the default one of a type walked, with the configs inside it, and made small field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiny_registry_exceptions import EXCEPTIONS, PerLayer
from tiny_registry_fields import (
    COUNTS_OF_LAYERS,
    FIRST_SPECIAL,
    HEADS,
    HIDDEN,
    IMAGE_TOWER_LAYERS,
    MLP,
    OF_EACH_STAGE,
    ROLE_OF,
    SPECIAL_TOKEN,
    TOWERS,
    VALUES,
    VOCABULARY,
)
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


@dataclass(frozen=True)
class Shape:
    """The sizes in which the models differ."""

    key_value_heads: int = 2
    head_width: int = 16
    window: int = 4
    layers: int = 4
    length: int = 64
    """Most positions that it has embeddings for."""


SHAPES = (
    Shape(),
    Shape(key_value_heads=4),
    Shape(key_value_heads=4, head_width=8),
    Shape(key_value_heads=1),
    Shape(window=64),
    Shape(key_value_heads=4, window=64),
)
"""What is tried, in this order."""


def tiny_config(model_type: str, cls: type[nn.Module], shape: Shape, *, causal: bool = False) -> Any:
    """The config of a type, made small.

    Args:
        model_type: The type, a key of `CONFIG_MAPPING`.
        cls: The class of the model, which may want a config inside the type's.
        shape: The sizes.
        causal: Whether it is to be a language model that reads from left to right.
    """
    kind = CONFIG_MAPPING[model_type]
    try:
        usual = kind()
    except Exception:
        # Some refuse their own defaults.
        plain = {
            name: value
            for name, value in EXCEPTIONS.get(model_type, {}).items()
            if not isinstance(value, PerLayer) and "." not in name
        }
        usual = kind(**plain)
    config = kind(**_shrunk(usual, shape, EXCEPTIONS.get(model_type, {})))
    for part in (config, config.get_text_config(decoder=True)) if causal else ():
        if getattr(part, "is_decoder", None) is False:
            part.is_decoder = True
        if hasattr(part, "use_cache"):
            part.use_cache = True
    wanted = getattr(cls, "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    parts.append(config.get_text_config(decoder=True))
    return next(
        (part for part in parts if isinstance(part, wanted)),
        parts[-1] if causal else config,
    )


def _shrunk(
    config: Any, shape: Shape, exceptions: Mapping[str, Any], *, tower: bool = False
) -> dict[str, Any]:
    """The fields with which the class of a config makes a small one.

    Args:
        config: The usual one.
        shape: The sizes.
        exceptions: Fields with values of their own; of a config inside by a path (`"text_config.head_dim"`).
        tower: Whether it is of a tower beside the main blocks, which has fewer.
    """
    cls = type(config)
    defaults = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
    }
    names = set(defaults) or set(vars(config))
    counts = [getattr(config, name, None) for name in COUNTS_OF_LAYERS]
    layers_before = next((count for count in counts if isinstance(count, int)), None)
    fields: dict[str, Any] = {}
    special = FIRST_SPECIAL
    for name in sorted(names):
        value = vars(config).get(name)
        if value is None:
            try:
                value = getattr(config, name, None)
            except Exception:  # some fields that differ between layers cannot be read
                value = defaults.get(name)
        given = defaults.get(name) is not None
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            inner = tower or any(word in name for word in TOWERS)
            own = {**EXCEPTIONS.get(value.model_type, {}), **_inside(exceptions, name)}
            fields[name] = type(value)(**_shrunk(value, shape, own, tower=inner))
        elif isinstance(value, dict):
            if name in ("rope_parameters", "rope_scaling"):
                width = shape.head_width if isinstance(defaults.get("head_dim"), int) else 8
                fields[name] = _rotation(value, width)
        elif value is None or isinstance(value, bool):
            continue
        elif ROLE_OF.get(name) == "of_each_layer" and isinstance(value, (list, tuple)):
            if not layers_before or len(value) == layers_before or name == "layer_types":
                fields[name] = type(value)(_cut(value, IMAGE_TOWER_LAYERS if tower else shape.layers))
        elif isinstance(value, int) and (name in ROLE_OF or name.endswith("vocab_size")):
            small = _small(ROLE_OF.get(name, "vocabulary"), value, shape, tower, given)
            if small is not None:
                fields[name] = small
        elif isinstance(value, int) and value >= FIRST_SPECIAL and SPECIAL_TOKEN.search(name):
            fields[name] = special
            special += 1
        elif name in OF_EACH_STAGE and isinstance(value, (list, tuple)) and value:
            fields[name] = type(value)([OF_EACH_STAGE[name]] * len(value))
        elif _fits(name, value) and (given or name == "image_size"):
            fields[name] = VALUES[name]
    for name, value in exceptions.items():
        if "." not in name:
            fields[name] = value.of(shape.layers) if isinstance(value, PerLayer) else value
    renamed = getattr(cls, "attribute_map", {})
    return {name: value for name, value in fields.items() if name not in renamed or name in names}


def _inside(exceptions: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The exceptions for a config inside, by their paths from there."""
    begin = f"{name}."
    return {path.removeprefix(begin): value for path, value in exceptions.items() if path.startswith(begin)}


def _fits(name: str, value: Any) -> bool:
    """Whether there is a value for a field, and of its kind."""
    return name in VALUES and isinstance(value, (list, tuple)) == isinstance(VALUES[name], (list, tuple))


def _small(role: str, value: int, shape: Shape, tower: bool, given: bool) -> int | None:
    """A small value for a number with this role; None to leave it as it is."""
    sizes = {
        "hidden": HIDDEN,
        "mlp": MLP if value else None,
        "heads": HEADS if value else None,
        "key_value_heads": shape.key_value_heads if value else None,
        "head_width": shape.head_width if given else None,  # the config works it out itself
        "layers": IMAGE_TOWER_LAYERS if tower else shape.layers,
        "encoder_layers": shape.layers,
        "tower_layers": IMAGE_TOWER_LAYERS,
        "experts": min(value, 4),
        "chosen_experts": min(value, 2),
        "groups": 1,
        "length": shape.length,
        "window": shape.window if value > 0 else None,
        "vocabulary": VOCABULARY if value > 50 else None,
    }
    return sizes.get(role)


def _cut(values: Sequence[Any], count: int) -> list[Any]:
    """So many entries of a list with one for each layer, in order, of each kind at least one if they suffice."""
    values = list(values)
    if len(values) <= count:
        return (values * count)[:count]
    kinds = list(dict.fromkeys(map(str, values)))
    for start in range(len(values) - count + 1):
        window = values[start : start + count]
        if len(set(map(str, window))) == len(kinds):
            return window
    firsts = [list(map(str, values)).index(kind) for kind in kinds][:count]
    rest = [index for index in range(len(values)) if index not in firsts]
    return [values[index] for index in sorted([*firsts, *rest[: count - len(firsts)]])]


def _rotation(value: Mapping[str, Any], head_width: int) -> dict[str, Any]:
    """The parameters of a rotation for narrow heads; where kinds of layers have their own, of each."""
    if any(isinstance(inner, dict) for inner in value.values()):
        return {
            key: _rotation(inner, head_width) if isinstance(inner, dict) else inner
            for key, inner in value.items()
        }
    found = {key: inner for key, inner in value.items() if key not in ("long_factor", "short_factor")}
    if found.get("mrope_section"):
        half = int(head_width * (found.get("partial_rotary_factor") or 1.0)) // 2
        parts = len(found["mrope_section"])
        found["mrope_section"] = [half - (parts - 1) * (half // parts)] + [half // parts] * (parts - 1)
    if "original_max_position_embeddings" in found:
        found["original_max_position_embeddings"] = 32
    if found.get("rope_type") in ("longrope", "su"):
        found["rope_type"] = "default"
    return found
