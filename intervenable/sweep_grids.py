"""The components of a sweep in the model at hand, and the cells that its axes make of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from intervenable.binding import Places
from intervenable.config_fields import is_module_path
from intervenable.errors import (
    ConfigError,
    IntervenableError,
    UnknownNameError,
    UnsupportedModelError,
    unknown_component,
)
from intervenable.inputs import RunInputs
from intervenable.site_binding import module_at
from intervenable.sites import BoundSite
from intervenable.sweep_axes import (
    AXES,
    Axis,
    Entry,
    TokenReader,
    Tokens,
    check_axes,
    number_entries,
    paired,
    read_axes,
    with_ids,
)
from intervenable.sweep_cells import Grid, levels_of
from intervenable.sweep_pairs import Pair
from intervenable.sweep_values import Place
from intervenable.transformer_lens_names import from_tl_name, get_act_name
from intervenable.units import Level
from intervenable.wave_plan import Blocks
from model_maps import ALIASES, COMPONENTS, Stack, are_beside

LAYER = "{layer}"
"""Stands for the layer in a module path."""


def is_path(component: str) -> bool:
    """Whether a component is a module path, with a place for the layer or without."""
    return is_module_path(component.replace(LAYER, "0"))


def read_components(component: Any, model: nn.Module) -> tuple[str, ...]:
    """Names of components and module paths, as users write them.

    Args:
        component: One name, or several.
        model: The model that is patched.

    Raises:
        UnknownNameError: no such component; the message has the nearest name.
        ConfigError: none, or one twice.
    """
    if not isinstance(component, (str, list, tuple)):
        hint = " A metric goes in as metric=..." if callable(component) or hasattr(component, "bound") else ""
        raise ConfigError(f"component is a {type(component).__name__}, not a name or a list of names.{hint}")
    listed = [component] if isinstance(component, str) else list(component)
    names = [ALIASES.get(name, name) for name in listed]
    for name in names:
        if name not in COMPONENTS and not (isinstance(name, str) and is_path(name)):
            places = Places(model)
            known = unknown_component(name, places.components, places.owner)
            raise UnknownNameError(f"{known}{_in_transformer_lens(name)}")
    if not names:
        raise ConfigError("component is empty. Name at least one, such as 'block_input'.")
    if len(set(names)) < len(names):
        raise ConfigError(f"component names one twice: {', '.join(names)}.")
    return tuple(names)


def _in_transformer_lens(name: Any) -> str:
    """What a name of TransformerLens' is here, for a message; nothing if it is none."""
    try:
        component, _ = from_tl_name(get_act_name(str(name), 0))
    except IntervenableError:
        return ""
    return f"\nTransformerLens' {name!r} is {component!r} here."


def count_layers(places: Places, component: str) -> int | None:
    """How many layers a component is in; None outside the blocks."""
    if is_path(component):
        if LAYER not in component:
            return None
        blocks = block_list(component)
        found = module_at(places.model, blocks, component)
        if not isinstance(found, (nn.ModuleList, nn.Sequential)):
            raise UnsupportedModelError(
                f"{component!r}: {blocks} is a {type(found).__name__}, not a list of blocks. Put {LAYER} where the"
                " number of the block stands."
            )
        return len(found)
    return places.layers_of(component) if COMPONENTS[component].scope == "block" else None


def block_list(path: str) -> str:
    """The path of the list of blocks in a module path with a place for the layer."""
    return path.partition(LAYER)[0].rstrip(".[")


def model_blocks(places: Places, components: Sequence[str]) -> Blocks:
    """The blocks of a model, list after list; none if it has no lists of blocks, or blocks that are no modules."""
    paths = [block_list(name) for name in components if is_path(name) and LAYER in name]
    if places.known:
        described = places.map
        one = [] if described.blocks is None else [described.blocks]
        paths += [path for path in (*one, *described.stacks.values()) if path and not are_beside(path)]
    found = [module_at(places.model, path, "the list of blocks") for path in dict.fromkeys(paths)]
    return Blocks(block for blocks in found for block in blocks)  # type: ignore[attr-defined]  # lists of modules


def site_at(places: Places, component: str, layer: int | None) -> BoundSite:
    """The place of a component in one layer.

    Raises:
        UnsupportedModelError: the model has no such component or module.
        ConfigError: it cannot be written.
    """
    site = places.at(component.replace(LAYER, str(layer)), layer)
    if is_path(component):
        site = replace(site, component=component, layer=layer)
    if site.read_only:
        raise ConfigError(
            f"{site.label} can be read and not written in {type(places.model).__name__}: {site.read_only}."
        )
    return site


@dataclass(frozen=True, eq=False)
class Subsets:
    """Which entries of each axis are asked for, and how many neighbours go with each."""

    given: Mapping[Axis, Any]
    windows: Mapping[Axis, int]

    @classmethod
    def of(cls, given: Mapping[Axis, Any], windows: Any, axes: Sequence[Axis]) -> Subsets:
        """What a user asked for.

        Raises:
            ConfigError: windows of something that is no axis of the sweep, or no widths.
        """
        if not isinstance(windows or {}, Mapping):
            raise ConfigError(
                f"window={windows!r} names no axis. Give how many per axis: window={{'layer': 3}}."
            )
        found = dict(zip(read_axes(list(windows or {})), (windows or {}).values(), strict=True))
        for axis, width in found.items():
            if axis not in axes or axis == "head":
                raise ConfigError(
                    f"window has {axis!r}, which is no axis of this sweep with neighbours. Axes: {', '.join(axes)}."
                )
            if isinstance(width, bool) or not isinstance(width, int) or width < 1:
                raise ConfigError(
                    f"window of {axis!r} is {width!r}. Give how many entries are patched together, 1 or more."
                )
        return cls(given, found)


@dataclass(frozen=True, eq=False)
class Grids:
    """All cells of a sweep, component by component."""

    grids: tuple[Grid, ...]
    sites: Mapping[Place, BoundSite]
    whole: Mapping[Place, Mapping[Level, Tokens]]
    """For each place all its tokens, along each level."""

    def along(self, of: Callable[[Entry], Any]) -> dict[str, tuple[Any, ...]]:
        """Something of each entry, by axis; of heads those of the component that has most."""
        found: dict[str, tuple[Any, ...]] = {}
        for grid in self.grids:
            for axis, entries in grid.entries.items():
                if len(entries) > len(found.get(axis, ())):
                    found[axis] = tuple(of(entry) for entry in entries)
        return found


def make_grids(
    places: Places,
    components: Sequence[str],
    axes: Sequence[Axis],
    subsets: Subsets,
    pair: Pair,
    source: RunInputs | None,
    align: Any,
    tokenizer: Any,
) -> Grids:
    """The cells that axes make of components.

    Raises:
        ConfigError: a component without one of the axes; prompts of different length; nothing to patch.
        UnsupportedModelError: no such component in this model.
        LocationError, LayerRangeError: entries that are not there.
    """
    readers: dict[Stack | None, TokenReader] = {}
    all_tokens: dict[Stack | None, Tokens] = {}
    named = tokenizer if tokenizer is not None else pair.tokenizer

    def reader(stack: Stack | None) -> TokenReader:
        if stack not in readers:
            beside = None if pair.other is None else pair.other.base.of(stack)
            run = with_ids(pair.base.base.of(stack), beside)
            other = None if source is None else source.of(stack)
            readers[stack] = TokenReader(run, other, paired(run, other, align, pair.noising), named)
        return readers[stack]

    def whole_of(stack: Stack | None) -> Tokens:
        if stack not in all_tokens:
            all_tokens[stack] = reader(stack).whole()
        return all_tokens[stack]

    grids: list[Grid] = []
    sites: dict[Place, BoundSite] = {}
    whole: dict[Place, dict[Level, Tokens]] = {}
    there = _layers_with(places, components)
    for component in components:
        count = count_layers(places, component)
        found: dict[Axis, tuple[Entry, ...]] = {}
        wanted = [axis for axis in AXES if axis in axes or subsets.given.get(axis) is not None]
        if count is not None and "layer" in wanted:
            given, window = subsets.given.get("layer"), subsets.windows.get("layer", 1)
            found["layer"] = number_entries("layer", given, count, window, there)
        # Of a layer that is asked for: another may not have the part that a module path names.
        example = site_at(places, component, _layers(found.get("layer"), count, there)[0])
        check_axes(axes, subsets.given, example)
        for axis in wanted:
            given, window = subsets.given.get(axis), subsets.windows.get(axis, 1)
            if axis == "layer":
                continue
            if axis == "head":
                found[axis] = number_entries(axis, given, example.heads or 0)
            else:
                stack = example.key_stack if axis == "key" else example.stack
                found[axis] = reader(stack).entries(axis, given, window)
        fixed = {axis: _joined(entries) for axis, entries in found.items() if axis not in axes}
        layers = _layers(found.get("layer"), count, there)
        own = {layer: site_at(places, component, layer) for layer in layers}
        grids.append(Grid(component, tuple(axes), {axis: found[axis] for axis in axes}, own, fixed))
        for layer, site in own.items():
            sites[component, layer] = site
            whole[component, layer] = {
                level: whole_of(site.key_stack if level == "keys" else site.stack)
                for level in levels_of(site)
                if level != "heads"
            }
    return Grids(tuple(grids), sites, whole)


def _layers_with(places: Places, components: Sequence[str]) -> tuple[int, ...] | None:
    """The layers that have all of the components, where some have not; None if all have.

    Raises:
        ConfigError: no layer has all of them.
        UnsupportedModelError: the model has no such component.
    """
    if not places.known or not places.map.kinds:
        return None
    named = [name for name in components if not is_path(name) and COMPONENTS[name].scope == "block"]
    found = [places.layers_with(name) for name in named]
    if not found:
        return None
    there = tuple(layer for layer in found[0] if all(layer in layers for layers in found))
    if not there:
        raise ConfigError(
            f"No layer of {type(places.model).__name__} has all of {', '.join(named)}. Sweep them one by one."
        )
    return there


def _layers(
    entries: Iterable[Entry] | None, count: int | None, there: tuple[int, ...] | None
) -> tuple[int | None, ...]:
    """All layers that are patched in some cell."""
    if count is None:
        return (None,)
    if entries is None:
        return tuple(range(count)) if there is None else there
    return tuple(sorted({number for entry in entries for number in entry.numbers}))


def _joined(entries: Sequence[Entry]) -> Entry:
    """What is patched of something that is no axis: all its entries at once."""
    if entries[0].tokens is None:
        numbers = tuple(dict.fromkeys(number for entry in entries for number in entry.numbers))
        return Entry(", ".join(entry.label for entry in entries), list(numbers), numbers)
    return Entry(
        ", ".join(entry.label for entry in entries),
        None,
        tokens=Tokens.joined([e.tokens for e in entries if e.tokens]),
    )
