"""What `collect` is asked for: which components of which layers, at which tokens and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from intervenable.binding import Places
from intervenable.cache_layout import FILLER, KEY, POSITION, QUERY, TokenAxis
from intervenable.config_fields import is_module_path
from intervenable.errors import (
    Fault,
    InputError,
    LayerRangeError,
    LocationError,
    UnknownNameError,
    UnsupportedModelError,
    raise_all,
    unknown_component,
)
from intervenable.inputs import RunInputs
from intervenable.locations import Subject, read_locations
from intervenable.position_entries import PerExample
from intervenable.sites import BoundSite
from intervenable.units import Units, Whole
from model_maps import ALIASES, COMPONENTS, Stack

INPUT_IDS = "input_ids"
"""Asked for like a component: the token ids themselves."""

Rows = tuple[tuple[int, ...], ...]
"""Tensor indices along one axis, for each example."""


@dataclass(frozen=True, eq=False)
class Reading:
    """One activation to collect."""

    key: tuple[str, int | None]
    site: BoundSite
    heads: tuple[int, ...] | None = None
    """Which heads; None for all, or if it has none."""


@dataclass(frozen=True)
class Located:
    """Tokens along one axis: where they are in tensors, and what they were asked for as."""

    rows: Rows
    groups: Rows
    labels: tuple[str, ...]

    def tokens(self, inputs: RunInputs) -> TokenAxis:
        """The same in real tokens, shorter examples filled up."""
        real = inputs.real_positions
        positions = self.rows
        if real is not None:
            order = [{index: position for position, index in enumerate(row)} for row in real]
            positions = tuple(
                tuple(order[example].get(index, FILLER) for index in row)
                for example, row in enumerate(self.rows)
            )
        return TokenAxis(_rectangle(positions), _rectangle(self.groups), self.labels)


def _rectangle(rows: Rows) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[FILLER] * (width - len(row))] for row in rows])


def whole_axis(inputs: RunInputs, size: int) -> TokenAxis:
    """All entries of an axis that is as long as the input, padding told apart; of another axis all that there are."""
    real = inputs.real_positions
    if real is None or size != inputs.length:
        return TokenAxis(torch.arange(size).repeat(inputs.batch, 1))
    positions = torch.full((inputs.batch, size), FILLER)
    for example, row in enumerate(real):
        positions[example, torch.tensor(row, dtype=torch.long)] = torch.arange(len(row))
    return TokenAxis(positions)


# --- components and layers --------------------------------------------------------------------------------


def readings(places: Places, components: Any, layers: Any, heads: Any) -> tuple[tuple[Reading, ...], bool]:
    """The activations that are asked for, in order, and whether the token ids are too.

    Raises:
        UnknownNameError: an unknown component; several are listed together.
        LayerRangeError: a layer that is not there.
        UnsupportedModelError: no such component in this model.
        LocationError: heads that are not there, or of which there are none.
    """
    listed = [components] if _is_one(components) else list(components)
    if not listed:
        raise InputError("components is empty. Name what to collect, such as ['block_output'].")
    layers, heads = _plain(layers), _plain(heads)
    found: dict[tuple[str, int | None], Reading] = {}
    faults: list[Fault] = []
    ids = False
    for entry in listed:
        try:
            component, its_layers = _component_of(entry, places), layers
            if isinstance(entry, tuple) and entry[1] is not None:
                its_layers = entry[1]
            if component == INPUT_IDS:
                ids = True
                continue
            for layer in _layers(places, component, its_layers):
                site = places.at(component, layer)
                key = (component, site.layer)
                found.setdefault(key, Reading(key, site, _heads(heads, component, site)))
        except (UnknownNameError, LayerRangeError, UnsupportedModelError) as error:
            faults.append(error)
    raise_all(faults)
    if heads is not None and not any(reading.site.heads for reading in found.values()):
        names = ", ".join(sorted({component for component, _ in found}))
        raise LocationError(
            f"heads={heads!r} says nothing here: {names or INPUT_IDS} has no heads. Leave it out."
        )
    return tuple(found.values()), ids


def _is_one(components: Any) -> bool:
    """Whether this is one entry: a name, or a name with its layer."""
    return isinstance(components, str) or (
        isinstance(components, tuple)
        and len(components) == 2
        and isinstance(components[0], str)
        and not isinstance(components[1], str)
        and not isinstance(components[1], tuple)
    )


def _component_of(entry: Any, places: Places) -> str:
    name = entry[0] if isinstance(entry, tuple) and len(entry) == 2 else entry
    if not isinstance(name, str):
        raise UnknownNameError(
            f"{entry!r} names nothing to collect: give a component, ('block_output', 3), or a module path."
        )
    name = ALIASES.get(name, name)
    if name in COMPONENTS or name == INPUT_IDS or is_module_path(name):
        return name
    raise UnknownNameError(unknown_component(name, (*places.components, INPUT_IDS), places.owner))


def _layers(places: Places, component: str, layers: Any) -> Sequence[int | None]:
    if is_module_path(component) or COMPONENTS[component].scope == "model":
        return (None,)
    if layers is None or layers == "all":
        return places.layers_with(component)
    if isinstance(layers, int) and not isinstance(layers, bool):
        return (layers,)
    listed = layers
    if isinstance(layers, slice):
        there = places.layers_with(component)
        listed = [layer for layer in range(places.layers_of(component))[layers] if layer in there]
    if not isinstance(listed, (list, tuple, range)) or not all(type(layer) is int for layer in listed):
        raise LayerRangeError(
            f"layers={layers!r} is no list of layers. Give ints, [0, 3], a range, or 'all'."
        )
    return tuple(listed)


def _heads(heads: Any, component: str, site: BoundSite) -> tuple[int, ...] | None:
    """The heads that are asked for at one site; None for all of them."""
    count = site.heads
    if count is None:
        return None
    if isinstance(heads, Mapping):
        heads = next(
            (heads[name] for name in ((component, site.layer), site.layer, component) if name in heads), None
        )
    if heads is None or (isinstance(heads, str) and heads == "all"):
        return None
    entries = list(heads) if isinstance(heads, (list, tuple, range)) else [heads]
    subject = Subject(site.label, "h", count, writes=False)
    units = read_locations({"base": [[entries]]}, [subject], _ONE, [None])[1][0]
    assert isinstance(units, Units)
    assert units.heads is not None
    return units.heads[0]


_ONE = RunInputs((), {}, None, 1, 1, None, None)
"""Stands for any run where only heads are counted, which are the same in all."""


# --- positions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Where:
    """Tokens along each axis, as they were asked for."""

    given: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, positions: Any, queries: Any, keys: Any) -> Where:
        """What was given of each; None means all."""
        named = {POSITION: positions, QUERY: queries, KEY: keys}
        return cls({axis: given for axis, given in named.items() if given is not None})

    def part(self, start: int, stop: int, total: int | None) -> Where:
        """The same for some of the examples, where it is given for each."""
        return Where({axis: _part(given, start, stop, total) for axis, given in self.given.items()})

    def located(self, axis: str, inputs: RunInputs, read: Any) -> Located | None:
        """The tokens along one axis of one run; None if all are meant."""
        given = self.given.get(axis)
        return None if given is None else _located(given, inputs, _SPOKEN[axis], read)


_SPOKEN = {POSITION: "positions", QUERY: "queries", KEY: "keys"}


def _for_each_example(given: Any) -> bool:
    """Whether positions are given for each example by itself: a list of lists."""
    return isinstance(given, list) and bool(given) and all(isinstance(row, list) for row in given)


def _part(given: Any, start: int, stop: int, total: int | None) -> Any:
    if isinstance(given, Mapping):
        return {label: _part(entry, start, stop, total) for label, entry in given.items()}
    if isinstance(given, Tensor) and given.dtype == torch.bool:
        return given[start:stop]
    if isinstance(given, PerExample):
        return PerExample(_part([[entry] for entry in given.entries], start, stop, total))
    if not _for_each_example(given):
        return given
    if len(given) < stop or len(given) != (total or len(given)):
        there = f"there are {total}" if total else f"there are {stop} at least"
        raise LocationError(f"Positions are given for {len(given)} examples, and {there}.")
    return given[start:stop]


def _located(given: Any, inputs: RunInputs, name: str, read: Any) -> Located:
    """Positions as users write them, group by group."""
    rows: list[list[int]] = [[] for _ in range(inputs.batch)]
    groups: list[list[int]] = [[] for _ in range(inputs.batch)]
    labels = []
    for number, (label, group) in enumerate(_groups(given, inputs, name)):
        labels.append(label)
        for example, found in enumerate(_resolved(group, inputs, name, read)):
            rows[example].extend(found)
            groups[example].extend([number] * len(found))
    empty = [example for example, row in enumerate(rows) if not row]
    if empty:
        raise LocationError(f"{name} names none for example {empty[0]}. Give at least one for each.")
    return Located(tuple(map(tuple, rows)), tuple(map(tuple, groups)), tuple(labels))


def _groups(given: Any, inputs: RunInputs, name: str) -> list[tuple[str, Any]]:
    """Each group with its label: entries that hold for all examples, or a list of entries for each."""
    if isinstance(given, Mapping):
        if not given:
            raise LocationError(f"{name} is empty. Give a position for each name.")
        return [(str(label), _group(entry, inputs, name)) for label, entry in given.items()]
    given = _plain(given)
    if _for_each_example(given):
        if len(given) != inputs.batch:
            raise LocationError(f"{name} is given for {len(given)} examples, and there are {inputs.batch}.")
        most = max(map(len, given))
        return [
            (str(number), _Each([_entries(row[number]) if number < len(row) else [] for row in given]))
            for number in range(most)
        ]
    listed = given if isinstance(given, list) else [given]
    if not listed:
        raise LocationError(f"{name} is an empty list. Give at least one, or leave it out for all.")
    return [(_label(entry), _group(entry, inputs, name)) for entry in listed]


def _label(entry: Any) -> str:
    if isinstance(entry, slice) and entry.step in (None, 1):
        return f"{'' if entry.start is None else entry.start}:{'' if entry.stop is None else entry.stop}"
    return "mask" if isinstance(entry, Tensor) else str(entry)


@dataclass(frozen=True)
class _Each:
    """Entries for each example; none where it has no such group."""

    entries: list[list[Any]]


def _group(entry: Any, inputs: RunInputs, name: str) -> Any:
    entry = _plain(entry)
    if _for_each_example(entry):
        if len(entry) != inputs.batch:
            raise LocationError(f"{name} is given for {len(entry)} examples, and there are {inputs.batch}.")
        return _Each(entry)
    return entry if isinstance(entry, Tensor) else _entries(entry)


def _entries(entry: Any) -> list[Any]:
    return list(entry) if isinstance(entry, (list, tuple, range)) else [entry]


def _plain(given: Any) -> Any:
    if isinstance(given, range):
        return list(given)
    if hasattr(given, "tolist") and not (isinstance(given, Tensor) and given.dtype == torch.bool):
        return given.tolist()
    return given


def _resolved(group: Any, inputs: RunInputs, name: str, read: Any) -> Rows:
    """The tensor indices of one group, for each example."""
    if not isinstance(group, _Each):
        return _read(group if isinstance(group, Tensor) else {"positions": group}, inputs, name, read)
    # An example without this group gets a place that every example has, which is left out again.
    full = [entries or [0] for entries in group.entries]
    found = _read(full, inputs, name, read)
    return tuple(row if entries else () for row, entries in zip(found, group.entries, strict=True))


def _read(slot: Any, inputs: RunInputs, name: str, read: Any) -> Rows:
    units = read({"base": [slot]}, [Subject(name, "pos", None, writes=False)], inputs, [None])[1][0]
    assert units.positions is not None
    rows: Rows = units.positions
    return rows


# --- units ------------------------------------------------------------------------------------------------


def axes_over_tokens(site: BoundSite) -> tuple[tuple[str, Stack | None], ...]:
    """The axes of a site that run over tokens, each with the stack that counts them."""
    if site.matrix:
        return (QUERY, site.stack), (KEY, site.key_stack)
    if site.kind == "state":
        return ()
    return ((POSITION, site.stack),)


def units_of(
    reading: Reading, located: Mapping[tuple[str, Stack | None], Located | None], inputs: RunInputs
) -> Units | Whole:
    """The units of one reading in one run.

    Args:
        reading: What is read.
        located: The tokens along each axis in each stack, None for all of them.
        inputs: The run.
    """
    site = reading.site
    heads = None
    if site.heads is not None:
        every = reading.heads if reading.heads is not None else tuple(range(site.heads))
        heads = (every,) * inputs.of(site.stack).batch
    axes = axes_over_tokens(site)
    found = [located[axis] for axis in axes]
    if (reading.heads is None and not any(found)) or site.kind == "state":
        return Whole()
    if not site.matrix:
        return Units(None if found[0] is None else found[0].rows, heads)
    sides = [
        (tuple(range(inputs.of(stack).length)),) * inputs.of(site.stack).batch if one is None else one.rows
        for one, (_, stack) in zip(found, axes, strict=True)
    ]
    return Units(heads=heads, queries=sides[0], keys=sides[1])
