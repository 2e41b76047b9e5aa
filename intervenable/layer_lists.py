"""The layers that users name: a number, several, or all that have a component."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from intervenable.binding import Places
from intervenable.errors import ConfigError, UnknownNameError, UnsupportedModelError, unknown_name

Layers = int | Iterable[int] | Literal["all"]


def layers_with(model: nn.Module, component: str) -> tuple[int, ...]:
    """The layers of a model that have a component, in order.

    Raises:
        UnsupportedModelError: no map describes the model, or none of its layers has the component.
    """
    places = Places(model)
    if not places.map.blocks_of(component):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no blocks with {component!r} to count. Give the layers by their numbers."
        )
    return places.layers_with(component)


def layers_named(layers: Layers, component: str, model: nn.Module | None) -> int | list[int]:
    """The one layer, or the layers one by one.

    Args:
        layers: A number, several, or "all".
        component: What is done something to in them.
        model: The model, to know which there are of "all".

    Raises:
        ConfigError: none, one twice, or all of no model.
    """
    if isinstance(layers, str) and layers == "all":
        if model is None:
            raise ConfigError(
                "layers='all' needs the model to count them: give model=..., or the numbers, such as range(12)."
            )
        return list(layers_with(model, component))
    listed = whole_numbers(layers, "layers")
    if isinstance(listed, int):
        return listed
    if not listed:
        raise ConfigError("No layers were given. Give at least one, or 'all' and the model.")
    twice = sorted({layer for layer in listed if listed.count(layer) > 1})
    if twice:
        raise ConfigError(f"Layers {', '.join(map(str, twice))} were given more than once.")
    return listed


def whole_numbers(value: Any, name: str) -> int | list[int]:
    """A whole number, or a list of them."""
    if isinstance(value, str):
        raise UnknownNameError(unknown_name(name, value, ["all"]))
    try:
        if isinstance(value, bool) or not hasattr(value, "__iter__"):
            return _number(value)
        return [_number(item) for item in value]
    except TypeError:
        raise ConfigError(f"{name} are {value!r}; give a whole number, several of them, or 'all'.") from None


def _number(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)
