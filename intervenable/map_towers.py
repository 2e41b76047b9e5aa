"""Towers beside the main stack, such as the one that reads images: each is looked at in runs of its own.

A model that reads text and images runs on text alone, and its tower then does nothing. The tower is a model itself,
so it is inferred and verified by itself, and joined to the map of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from intervenable.map_inputs import example_inputs
from intervenable.unwrapping import prefixed
from model_maps import COMPONENTS, LayerKind, ModelMap, Site, Stack

TOWERS: Mapping[str, Stack] = {
    "pixel_values": "vision",
    "pixel_values_videos": "vision",
    "input_features": "audio",
    "input_values": "audio",
}
"""Main input of a tower -> which it is."""

Prove = Callable[[nn.Module, Mapping[str, Any]], ModelMap]
"""Infers and verifies the map of a module on its inputs."""


def with_towers(model: nn.Module, model_map: ModelMap, prove: Prove) -> ModelMap:
    """A map joined with those of the towers that a run of the model did not reach.

    Args:
        model: The model, small enough to be run.
        model_map: What a run of it showed.
        prove: How to find out about a tower.
    """
    for path, tower, role in _towers(model, model_map):
        try:
            found = prove(tower, example_inputs(tower))
        except Exception:  # it cannot be run by itself, for whatever reason: its components stay absent
            continue
        model_map = _joined(model_map, found, path, role, model)
    return model_map


def _towers(model: nn.Module, model_map: ModelMap) -> Iterator[tuple[str, nn.Module, Stack]]:
    """The outermost models inside a model that read what is no text and that no stack of the map is in."""
    known = [path for path in (model_map.blocks, *model_map.stacks.values()) if path]
    taken = set(model_map.stacks)
    inside: list[str] = []
    for path, module in model.named_modules():
        role = TOWERS.get(str(getattr(module, "main_input_name", "")))
        if not path or role is None or getattr(module, "config", None) is None:
            continue
        if any(path.startswith(f"{outer}.") for outer in inside):
            continue
        if any(blocks.startswith(f"{path}.") for blocks in known):
            continue
        inside.append(path)
        if role not in taken:
            taken.add(role)
            yield path, module, role


def _joined(whole: ModelMap, tower: ModelMap, path: str, role: Stack, model: nn.Module) -> ModelMap:
    """The map of a model with that of one of its towers."""
    own = tower.blocks
    before = ""
    if own is None:  # it knows itself what it is
        before, own = next(((f"{stack}_", blocks) for stack, blocks in tower.stacks.items()), ("", None))
    if own is None:
        return whole
    moved = prefixed(replace(tower, blocks=own, stacks={}), f"{path}.")

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
        stacks={**whole.stacks, role: str(moved.blocks)},
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
