"""Towers beside the main stack, such as the one that reads images: each is looked at in runs of its own.

A model that reads text and images runs on text alone, and its tower then does nothing. The tower is a model itself,
so it is inferred and verified by itself, and joined to the map of the whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from intervenable.map_inputs import example_inputs
from intervenable.map_media import tower_calls
from intervenable.unwrapping import prefixed
from model_maps import COMPONENTS, LayerKind, ModelMap, Site, Stack

TOWERS: Mapping[str, Stack] = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_features": "audio",
    "input_values": "audio",
}
"""Main input of a tower -> which it is."""

Prove = Callable[[nn.Module, Mapping[str, Any], Mapping[str, Any] | None], ModelMap]
"""Verifies the map of a module on inputs; it is inferred from the others, if there are such."""

PICTURES = 2
"""How many pictures or sounds are read at once, so that they can be told apart."""


def with_towers(model: nn.Module, model_map: ModelMap, prove: Prove) -> ModelMap:
    """A map joined with those of the towers that a run of the model did not reach.

    Args:
        model: The model, small enough to be run.
        model_map: What a run of it showed.
        prove: How to find out about a tower.
    """
    for role in dict.fromkeys(TOWERS.values()):
        if role in model_map.stacks:
            continue
        for path, tower, inputs, shown in _towers(model, model_map, role):
            try:
                found = prove(tower, inputs(), shown)
            except Exception:  # it cannot be run by itself, for whatever reason: its components stay absent
                continue
            joined = _joined(model_map, found, path, role, model)
            if joined is not model_map:
                model_map = joined
                break
    return model_map


_Tower = tuple[str, nn.Module, Callable[[], Mapping[str, Any]], Mapping[str, Any] | None]


def _towers(model: nn.Module, model_map: ModelMap, role: Stack) -> Iterator[_Tower]:
    """The modules that may be a tower, likeliest first, what each can be run on, and what shows its parts.

    What the model itself runs when it reads a picture comes first, if it runs it once; then the outermost models
    inside it that read what is no text. Where all pictures lie on one axis, a single one shows how many positions
    it has.
    """
    known = [path for path in (model_map.blocks, *model_map.stacks.values()) if path]

    def holds(path: str) -> bool:
        return any(blocks.startswith(f"{path}.") for blocks in known)

    calls = tower_calls(model, role, PICTURES)
    times = Counter(call.path for call in calls)
    for call in calls:
        if times[call.path] == 1 and not holds(call.path):
            single = tower_calls(model, role, 1) if call.rows != PICTURES else []
            shown = next((one.inputs for one in single if one.path == call.path), None)
            yield call.path, call.module, lambda call=call: call.inputs, shown  # type: ignore[misc]
    inside: list[str] = []
    for path, module in model.named_modules():
        reads = TOWERS.get(str(getattr(module, "main_input_name", "")))
        if not path or reads != role or getattr(module, "config", None) is None or path in times:
            continue
        if any(path.startswith(f"{outer}.") for outer in inside) or holds(path):
            continue
        inside.append(path)
        yield path, module, lambda module=module: example_inputs(module), None  # type: ignore[misc]


def _joined(whole: ModelMap, tower: ModelMap, path: str, role: Stack, model: nn.Module) -> ModelMap:
    """The map of a model with that of one of its towers."""
    moved = prefixed(tower, f"{path}.")
    before, own = "", moved.blocks
    if own is None:  # it knows itself what it is
        before, own = next(((f"{stack}_", blocks) for stack, blocks in moved.stacks.items()), ("", None))
    if own is None:
        return whole

    def renamed(named: Mapping[str, Any]) -> dict[str, Any]:
        result = {}
        for name, value in named.items():
            word = name.removeprefix(before)
            target = f"{role}_{word}"
            if (before and not name.startswith(before)) or target not in COMPONENTS:
                continue
            if isinstance(value, Site) and value.plus is not None:
                value = replace(value, plus=f"{role}_{value.plus.removeprefix(before)}")
            result[target] = value
        return result

    part = _part_of(model, moved, path)
    return replace(
        whole,
        sites={**whole.sites, **renamed(moved.sites)},
        absent={**whole.absent, **renamed(moved.absent)},
        stacks={**whole.stacks, role: own},
        kinds=(
            *whole.kinds,
            *(
                LayerKind(kind.layers, role, renamed(kind.sites), renamed(kind.absent))
                for kind in moved.kinds
            ),
        ),
        configs={**whole.configs, **({role: part} if part else {})},
    )


def _part_of(model: nn.Module, tower: ModelMap, path: str) -> str | None:
    """The name of the part of the model's config that is the tower's."""
    own = getattr(model.get_submodule(path), "config", None)
    for name in getattr(getattr(model, "config", None), "sub_configs", {}):
        if getattr(model.config, str(name), None) is own:
            return str(name)
    return None
