"""What users write for positions and heads -> index tensors. The only file that reads unit locations.

The full form is a pair `(source locations, base locations)`, each `[interventions][batch][units]` (for `h.pos` and
`h.query`: `[interventions][2 levels][batch][units]`, heads first; for `h.query.key`: three levels). In the place of
an intervention a mapping may name its levels, with what holds for every example: `{"heads": 3, "keys": [0, 1]}`; a
level left out is all of it. Short forms: an int is one position in source and base, a **tuple** `(source, base)` is
a pair, a **list** of ints is a set of positions. With unit `h` they count heads, with `h.pos` they are positions of
every head, with `h.query` rows of every head. None in the place of an intervention skips it; None for all of a side
means whole tensors.

Wherever there is an int for a position, a query or a key there may be a name (`"last"`), a part of the text
(`"Spain"`), or another entry of `position_entries`, which is looked up in the text of each example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from intervenable.errors import LocationError, LocationRangeError, raise_listed
from intervenable.inputs import RunInputs
from intervenable.position_entries import Aligned, Regex, Words, is_entry
from intervenable.position_reading import GROUP_NAME, resolve
from intervenable.run_texts import Texts
from intervenable.token_text import Decodes, TokenView
from intervenable.units import LEVELS, RELATIONS, Level, Skipped, Slot, Units, Whole
from model_maps import Stack

RelativeTo = Literal["tokens", "tensor"]


@dataclass(frozen=True)
class Subject:
    """What the locations of one intervention are about; enough to read and to check them."""

    name: str
    unit: str
    heads: int | None
    writes: bool
    where: Any = None
    """Its own locations, for calls that give none."""

    causal: bool = False
    """Whether no query of it reads a key behind itself."""

    stack: Stack | None = None
    """The stack whose positions it has, in a model of two (a matrix: in its rows)."""

    key_stack: Stack | None = None
    """The stack whose positions its keys have."""

    def counted_in(self, level: Level, inputs: RunInputs) -> RunInputs:
        """The run, counted in the positions of one level."""
        return inputs.of(self.key_stack if level == "keys" else self.stack)

    @property
    def levels(self) -> tuple[Level, ...]:
        """What its locations say."""
        return LEVELS[self.unit]


def get_loc(location: int | tuple[Any, ...], batch_size: int = 1) -> list[Any]:
    """The base locations of one intervention in the full form, from one location for every example.

    Args:
        location: A position or a list of them; for `h.pos` a pair `(heads, positions)`, each an int or a list.
        batch_size: Number of examples.

    Example:
        >>> get_loc(4), get_loc((2, [0, 3]), batch_size=2)
        ([[[4]]], [[[[2], [2]], [[0, 3], [0, 3]]]])
    """
    levels = location if isinstance(location, tuple) else (location,)
    rows = [[list(level) if isinstance(level, (list, range)) else [level]] * batch_size for level in levels]
    return [rows if isinstance(location, tuple) else rows[0]]


def read_locations(
    unit_locations: object,
    subjects: Sequence[Subject],
    base: RunInputs,
    sources: Sequence[RunInputs | None],
    relative_to: RelativeTo = "tokens",
    tokenizer: Decodes | None = None,
) -> tuple[list[Slot], list[Slot]]:
    """Turn what a user wrote into checked units: for each intervention those of its source, and those of the base.

    Args:
        unit_locations: None, or a mapping with one of the keys `"sources->base"` and `"base"`.
        subjects: The interventions, in declared order.
        base: Inputs of the base run.
        sources: For each intervention the inputs of its source run, None if it has none.
        relative_to: `tokens` counts the real tokens of each example, `tensor` counts padding too.
        tokenizer: Finds words in the text of each example; a `PositionResolver` brings names too.

    Raises:
        LocationError: a form that says nothing sensible, or a number of examples other than the batch.
        LocationRangeError: a position or head that does not exist.
    """
    if relative_to not in ("tokens", "tensor"):
        raise LocationError(f"relative_to={relative_to!r} is unknown. Allowed: 'tokens', 'tensor'.")
    texts = Texts(tokenizer, padding_counts=relative_to == "tensor")
    faults: list[LocationError] = []
    found: tuple[list[Slot], list[Slot]] = ([], [])
    if unit_locations is None:
        spread = list(zip(*map(_declared, subjects), strict=True)) or [(), ()]
    else:
        sides = zip(_sides(unit_locations), ("source", "base"), strict=True)
        spread = [tuple(_spread(side, subjects, name)) for side, name in sides]
    for index, subject in enumerate(subjects):
        for side, (slots, inputs) in enumerate(zip(spread, (sources[index], base), strict=True)):
            slot: Slot = Skipped() if inputs is None else Whole()
            try:
                if slots[index] is None:
                    slot = Skipped()
                elif inputs is not None and not isinstance(slots[index], Whole):
                    place = _Place(subject, inputs, (base, sources[index])[side], side == 1, texts)
                    slot = _units(slots[index], place)
            except LocationError as error:
                faults.append(error)
            found[side].append(slot)
    raise_listed(faults, "the locations")
    return found


def _declared(subject: Subject) -> tuple[Any, Any]:
    """The locations that a representation brings itself, for its source and for the base."""
    where = subject.where
    if where is None:
        return _NOT_GIVEN, _NOT_GIVEN
    sides = where if isinstance(where, tuple) else (where, where)
    source, base = (_NOT_GIVEN if side is None else _declared_side(side, subject) for side in sides)
    return source, base


def _declared_side(side: Any, subject: Subject) -> Any:
    if isinstance(side, Mapping) or _is_mask(side):
        return side
    value = _plain(side)
    return value if _depth(value) > 1 else _short(value, f"declared ({subject.name!r})")


def level_faults(side: Mapping[Any, Any], unit: str) -> list[str]:
    """What is wrong with the names of the levels in a mapping, for the units it is to locate."""
    allowed = LEVELS.get(unit, ())
    wrong = [name for name in side if name not in allowed]
    if not wrong:
        return []
    names = ", ".join(map(repr, wrong))
    near = get_close_matches(str(wrong[0]), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return [f"The locations name {names}, and unit {unit!r} has {', '.join(allowed)}.{hint}"]


def lists_each_intervention(unit_locations: object) -> bool:
    """Whether base locations were given for each intervention by itself, so that None there skips one."""
    return _lists_each(_plain(_sides(unit_locations)[1]))


def _lists_each(value: Any) -> bool:
    """Whether a side, as plain lists, has an entry for each intervention and not positions for all."""
    if not isinstance(value, list):
        return False
    each = any(isinstance(item, Mapping) for item in value) or all(item is None for item in value)
    return _depth(value) > 2 or (bool(value) and each)


_NOT_GIVEN = Whole()


def _sides(unit_locations: object) -> tuple[Any, Any]:
    """The source side and the base side of what was given, still as the user wrote them."""
    if unit_locations is None:
        return _NOT_GIVEN, _NOT_GIVEN
    if not isinstance(unit_locations, Mapping):
        raise LocationError(
            f"unit_locations is a {type(unit_locations).__name__}. Give a mapping with the key 'sources->base'"
            " (a position, or a pair of source and base locations) or 'base' (base locations alone)."
        )
    keys = set(unit_locations)
    if keys == {"base"}:
        value = unit_locations["base"]
        if isinstance(value, tuple):
            raise LocationError(
                f"{{'base': {value!r}}} is a tuple, which means a (source, base) pair, but 'base' has no source"
                f" side. Write a list for a set of positions: {list(value)!r}."
            )
        return _NOT_GIVEN, _NOT_GIVEN if value is None else value
    if keys == {"sources->base"}:
        value = unit_locations["sources->base"]
        if value is None:
            return _NOT_GIVEN, _NOT_GIVEN
        if isinstance(value, tuple):
            if len(value) != 2:
                raise LocationError(
                    f"{value!r} is a tuple of {len(value)}, and a tuple is a (source, base) pair."
                    " Write a list for a set of positions."
                )
            return tuple(_NOT_GIVEN if side is None else side for side in value)  # type: ignore[return-value]
        return value, value
    named = ", ".join(sorted(map(repr, keys))) or "none"
    serial = (
        " Arrow keys between sources belong to the serial mode." if any("->" in str(k) for k in keys) else ""
    )
    raise LocationError(
        f"unit_locations has the keys {named}. Allowed: 'sources->base' or 'base', one of them.{serial}"
    )


def _plain(value: Any) -> Any:
    """Tensors, arrays and ranges as lists of ints; masks and everything else as they are."""
    if value is None or type(value) is int:  # nearly all there is, on every call
        return value
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if _is_mask(value):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, range):
        return list(value)
    return value


def _depth(value: Any) -> int:
    """How many lists are nested in each other; None does not count, and a mask is as deep as all examples are."""
    if isinstance(value, list):
        return 1 + max((_depth(item) for item in value if item is not None), default=0)
    return 2 if _is_mask(value) else 0


def _spread(side: Any, subjects: Sequence[Subject], name: str) -> list[Any]:
    """One side, an entry for each intervention: None skips, Whole is everything, a list is as deep as its unit."""
    if isinstance(side, Whole):
        return [side] * len(subjects)
    if _is_mask(side) or isinstance(side, Mapping):
        return [side] * len(subjects)
    value = _plain(side)
    if not _lists_each(value):
        if _depth(value) == 2:
            raise LocationError(
                f"The {name} locations {value!r} are lists in a list, which could mean interventions, examples or"
                " positions. Write positions for all as a flat list, or the full form"
                f" [interventions][examples][positions]: {[value]!r} if these are the examples of one intervention."
            )
        everywhere = _short(value, name)
        return [everywhere] * len(subjects)
    if len(value) != len(subjects):
        raise LocationError(
            f"The {name} locations have {len(value)} entries for {len(subjects)} interventions"
            f" ({', '.join(subject.name for subject in subjects)}). Give one for each, None to skip."
        )
    return list(value)


def _is_mask(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return bool(value.dtype == np.bool_)
    return isinstance(value, Tensor) and value.dtype == torch.bool


def _short(value: Any, name: str) -> _Everywhere:
    """A short form: the same units for every example of every intervention."""
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not is_entry(item):
            raise LocationError(
                f"{item!r} among the {name} locations is not a position: {_ENTRIES}.{_SKIP if item is None else ''}"
            )
    if not items:
        raise LocationError(
            f"The {name} locations are an empty list. Give at least one position, or None to skip."
        )
    return _Everywhere(tuple(items))


_SKIP = " To skip an intervention put None in its place in the full form: [None, [[4], [4]]]."


@dataclass(frozen=True)
class _Everywhere:
    """A short form: the same entries for every example."""

    entries: tuple[Any, ...]


@dataclass(frozen=True)
class _Place:
    """What the locations of one intervention in one run are read against."""

    subject: Subject
    inputs: RunInputs
    other: RunInputs | None
    """The run on the other side, source or base; None if there is none."""

    is_base: bool
    texts: Texts

    @property
    def where(self) -> str:
        return f"{'base' if self.is_base else 'source'} locations of {self.subject.name!r}"

    def counted_in(self, level: Level) -> _Place:
        """The same, with both runs counted in the positions of one level."""
        if not (self.subject.stack or self.subject.key_stack):  # one stack: nothing else to count in
            return self
        other = None if self.other is None else self.subject.counted_in(level, self.other)
        return replace(self, inputs=self.subject.counted_in(level, self.inputs), other=other)


def _units(slot: Any, place: _Place) -> Units:
    """The units of one intervention in one run: every example, normalised and checked."""
    subject, inputs, where = place.subject, place.inputs, place.where
    if _is_mask(slot):
        return _masked(slot, subject, inputs, where)
    relation = None
    batch = inputs.of(subject.stack).batch
    levels = _by_level(slot, subject, batch, where)
    if levels.get("keys") in RELATIONS:
        relation, levels["keys"] = levels["keys"], [[slice(None)]] * batch
        if subject.key_stack != subject.stack:
            raise LocationError(
                f"The {where} name the keys {relation!r} of each query, and in attention from one stack to another no"
                " key is the query itself. Name the keys, or leave them out for all."
            )
    found = {name: _level(level, name, place) for name, level in levels.items()}
    units = Units(**found, relation=relation)
    if place.is_base and subject.writes:
        for name, rows in found.items():
            _check_once(rows, name, where)
        if (
            subject.causal
            and relation is None
            and "keys" in found
            and _spelled_out(levels["keys"], place.texts)
        ):
            _check_reach(units, inputs.of(subject.stack), where)
    return units


def _by_level(slot: Any, subject: Subject, batch: int, where: str) -> dict[Level, Any]:
    """What a slot says of each level, as lists with one for each example (a relation of keys stays its name)."""
    names = subject.levels
    if isinstance(slot, _Everywhere):
        if len(names) > 2:
            raise LocationError(
                f"The {where} are {list(slot.entries)!r}, which could be rows or columns of an attention matrix. Name"
                f" the levels: {{'queries': ..., 'keys': ...}}, and 'heads' unless all of them are meant."
            )
        everywhere = [list(slot.entries)] * batch
        return (
            {names[0]: [[slice(None)]] * batch, names[1]: everywhere}
            if len(names) == 2
            else {names[0]: everywhere}
        )
    if isinstance(slot, Mapping):
        faults = level_faults(slot, subject.unit)
        if faults:
            raise LocationError(f"{faults[0]} ({where.capitalize()}.)")
        return {name: _for_each_example(slot.get(name), name, batch, where) for name in names}
    if len(names) == 1:
        return {names[0]: slot}
    if not isinstance(slot, list) or len(slot) != len(names):
        raise LocationError(
            f"The {where} must be {_NUMBERS[len(names)]} lists, {_and(names)} (unit {subject.unit!r}), not {slot!r}."
        )
    return dict(zip(names, slot, strict=True))


_NUMBERS = {2: "two", 3: "three"}


def _and(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


def _for_each_example(value: Any, name: Level, batch: int, where: str) -> Any:
    """What a mapping says of one level, the same for each example."""
    if value is None:
        return [[slice(None)]] * batch
    if name == "keys" and isinstance(value, str) and value in RELATIONS:
        return value
    entries = _plain(value)
    entries = entries if isinstance(entries, list) else [entries]
    if not entries:
        raise LocationError(f"The {where} name no {name}. Give at least one, or leave {name!r} out for all.")
    return [entries] * batch


def _check_once(rows: tuple[tuple[int, ...], ...], name: str, where: str) -> None:
    """That nothing is written twice."""
    for example, row in enumerate(rows):
        if len(set(row)) == len(row):
            continue
        twice = sorted({unit for unit in row if row.count(unit) > 1})
        if twice:
            raise LocationError(
                f"The {where} name {name} {', '.join(map(str, twice))} more than once for example {example}."
                " Each can be written once."
            )


def _spelled_out(level: list[list[Any]], texts: Texts) -> bool:
    """Whether units are named one by one: a slice or a class of keys may reach further than some query reads."""
    return all(_names_one(entry, texts) for row in level for entry in row)


def _names_one(entry: Any, texts: Texts) -> bool:
    if isinstance(entry, str):
        return not GROUP_NAME.match(entry) and entry not in texts.table.names
    return isinstance(entry, int) or (isinstance(entry, (Words, Regex)) and entry.occurrence != "all")


def _check_reach(units: Units, inputs: RunInputs, where: str) -> None:
    """That each key is read by one of the queries at least: none reads a key behind itself."""
    assert units.queries is not None
    assert units.keys is not None
    for example, (queries, keys) in enumerate(zip(units.queries, units.keys, strict=True)):
        unread = [key for key in keys if key > max(queries)]
        if not unread:
            continue
        counted = range(inputs.length) if inputs.real_positions is None else inputs.real_positions[example]
        named = [str(counted.index(key)) for key in unread if key in counted]
        last = max(queries, key=lambda query: (query in counted, query))
        until = f" (the last is {counted.index(last)})" if last in counted else ""
        raise LocationError(
            f"The {where} name keys {', '.join(named) or 'of padding'} for example {example}, which the causal mask"
            f" hides from all queries chosen{until}: nothing would change. Choose later queries, or earlier keys."
        )


def _level(level: Any, name: Level, place: _Place) -> tuple[tuple[int, ...], ...]:
    where, place = place.where, place.counted_in(name)
    if not isinstance(level, list) or not all(isinstance(row, list) for row in level):
        raise LocationError(f"The {where} must list the {name} of each example, [[...], ...], not {level!r}.")
    if len(level) != place.inputs.batch:
        raise LocationError(
            f"The {where} list {name} for {len(level)} examples, and the batch has {place.inputs.batch}."
        )
    rows = []
    real = None if place.texts.padding_counts else place.inputs.real_positions
    for example, row in enumerate(level):
        units = _counted(row, name, example, place)
        if name != "heads" and real is not None:
            units = tuple(real[example][unit] for unit in units)
        rows.append(units)
    return tuple(rows)


def _counted(row: list[Any], name: Level, example: int, place: _Place) -> tuple[int, ...]:
    """One example's entries as indices from 0 on, slices spelled out, words looked up, negatives from the end."""
    inputs, where = place.inputs, place.where
    size = inputs.length if place.texts.padding_counts else inputs.count(example)
    if name == "heads":
        size = place.subject.heads or 0
    units: list[int] = []
    for entry in row:
        if isinstance(entry, slice):
            units.extend(range(size)[entry])
            continue
        if isinstance(entry, bool) or not isinstance(entry, int):
            units.extend(_said(entry, name, size, example, place))
            continue
        if not -size <= entry < size:
            kind = {"heads": "Head", "queries": "Query", "keys": "Key"}.get(name, "Position")
            there = f"{name} 0 to {size - 1} (or -{size} to -1)" if size else f"no {name}"
            raise LocationRangeError(
                f"{kind} {entry} in the {where} is out of range for example {example}, which has {there}."
            )
        units.append(entry % size)
    if not units:
        raise LocationError(f"The {where} name no {name} for example {example}. Give at least one.")
    return tuple(units)


def _said(entry: Any, name: Level, size: int, example: int, place: _Place) -> tuple[int, ...]:
    """What an entry other than an index or a slice chooses in one example."""
    where = place.where
    if name == "heads":
        if not isinstance(entry, str) or entry not in ("all", "first", "last"):
            raise LocationError(f"{entry!r} in the {where} is not a head: give ints, slices or 'all'.")
        return resolve(entry, TokenView(None, example=example, length=size))
    if not is_entry(entry):
        raise LocationError(f"{entry!r} in the {where} is not an index: {_ENTRIES}.")
    if isinstance(entry, Aligned) and place.other is not None:
        base, source = (place.inputs, place.other) if place.is_base else (place.other, place.inputs)
        return place.texts.aligned(entry, base, source, example, where)[place.is_base]
    return place.texts.positions(entry, place.inputs, example, where)


_ENTRIES = "give ints (-1 is the last), slices, names such as 'last', or parts of the text"


def _masked(mask: Any, subject: Subject, inputs: RunInputs, where: str) -> Units:
    rows = torch.as_tensor(mask)
    inputs = inputs.of(subject.stack)
    if subject.unit != "pos" or tuple(rows.shape) != (inputs.batch, inputs.length):
        raise LocationError(
            f"The {where} are a mask of shape {tuple(rows.shape)}; a mask is for unit 'pos' and has the shape"
            f" {(inputs.batch, inputs.length)} of the tokens."
        )
    positions = tuple(tuple(row.nonzero().flatten().tolist()) for row in rows)
    empty = [example for example, row in enumerate(positions) if not row]
    if empty:
        raise LocationError(f"The {where} are a mask that names no position for example {empty[0]}.")
    return Units(positions)
