"""From the name of a model class to its map."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from model_maps.perceptrons import PERCEPTRONS
from model_maps.recurrent import RECURRENT
from model_maps.schema import ModelMap
from model_maps.sites import Site
from model_maps.vocabulary import COMPONENTS, in_short


class UnknownNameError(LookupError):
    """A component that no table has; the message has the nearest name and those of the map at hand."""


class AbsentComponentError(LookupError):
    """A component that the architecture at hand does not have; the message says why."""


class UnmappedModelError(LookupError):
    """A model class that no map describes; the message says the ways out."""


def find_map(class_names: Iterable[str], config: object | None = None) -> ModelMap:
    """The map of the first of these classes that has one, as this config calls for it.

    Args:
        class_names: Names of a model's class and its bases, nearest first.
        config: The model's config, whose fields choose among the variants of a map.

    Raises:
        UnmappedModelError: none of the classes has a map.

    Example:
        >>> find_map(["MyGRU", "GRU"]).site("block_output").side
        'output'
    """
    names = tuple(class_names)
    for name in names:
        if name in _MAPS:
            return _MAPS[name].for_config(config)
    name = names[0] if names else "a model without a class name"
    near = get_close_matches(name, _MAPS, n=1)
    hint = f" The nearest class that has one is {near[0]!r}." if near else ""
    raise UnmappedModelError(
        f"No map describes {name}.{hint}"
        "\nWrite a ModelMap and register_map() it (classes with the same layout can share one), or name"
        " the place by its module path, such as 'model.layers[3].mlp.output', instead of a component."
    )


def register_map(model_map: ModelMap, *, replace: bool = False) -> None:
    """Make a map known for the classes it names.

    Args:
        model_map: The map.
        replace: Whether it may take the place of the map that a class already has.

    Raises:
        TypeError: it is no map.
        ValueError: a class already has another map and `replace` is False.
    """
    if not isinstance(model_map, ModelMap):
        raise TypeError(
            f"register_map takes a ModelMap, not a {type(model_map).__name__}. That of a model is"
            " iv.model_map(model).map."
        )
    taken = [name for name in model_map.classes if _MAPS.get(name, model_map) != model_map]
    if taken and not replace:
        raise ValueError(
            f"Another map already describes {', '.join(taken)}."
            "\nPass replace=True to put this one in its place, or give the class another name."
        )
    for name in model_map.classes:
        _MAPS[name] = model_map


def known_classes() -> tuple[str, ...]:
    """Names of all model classes that have a map, sorted."""
    return tuple(sorted(_MAPS))


def component_site(model_map: ModelMap, component: str, layer: int | None = None) -> Site:
    """The site to hook for a component, which for views and derived components is the one they are made from.

    Args:
        model_map: The map.
        component: The component's name.
        layer: The layer, where layers differ; None for the first that has the component.

    Raises:
        UnknownNameError: no component is called so.
        AbsentComponentError: the architecture has no such component.

    Example:
        >>> tiny = ModelMap(("Tiny",), "layers", {"query_output": Site("attn.q", heads="query")})
        >>> component_site(tiny, "head_query_output").path
        'attn.q'
    """
    name = model_map.classes[0]
    if component not in COMPONENTS:
        there = model_map.components()
        near = get_close_matches(component, there, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(
            f"Unknown component {component!r} in the map of {name}.{hint}\nAllowed: {in_short(there)}."
        )
    site = model_map.site(component, layer)
    if site is not None:
        return site
    if layer is not None and model_map.site(component) is not None:
        name = f"Layer {layer} of {name}"
    raise AbsentComponentError(
        f"{name} has no {component!r}: {model_map.reason(component, layer)}."
        f"\nIt has: {in_short(model_map.components())}."
    )


_MAPS: dict[str, ModelMap] = {}
for _row in (*RECURRENT, *PERCEPTRONS):
    register_map(_row)
