"""Positions as people say them: the objects that users write, and their form in JSON.

Beside these, an entry is an int, a slice, a range, a name (`"last"`), a part of the text (`"Spain"`), a function of a
`TokenView`, or a list of entries. `position_reading` turns entries into positions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch

from intervenable.errors import ConfigError, LocationError
from intervenable.token_text import Unequal

Entry = Any
"""An int, slice, range, str, one of the objects below, a function of a `TokenView`, or a list of entries."""

Occurrence = int | Literal["all"] | None
Take = Literal["all", "first", "last"]


@dataclass(frozen=True)
class Span:
    """The positions from `start` up to `stop`, which is left out; both must exist, and negatives count from the end.

    Example:
        >>> from intervenable import positions
        >>> positions(None, torch.arange(10), Span(7, 10)), positions(None, torch.arange(10), Span(2, -1))
        ([7, 8, 9], [2, 3, 4, 5, 6, 7, 8])
    """

    start: int
    stop: int


@dataclass(frozen=True)
class Words:
    """The tokens that write a part of the text, such as a word or a phrase.

    Spaces at its ends help to find it, and do not count as a part of it.

    Example:
        >>> from intervenable import load_small_lm, positions
        >>> tokenizer, _ = load_small_lm()
        >>> positions(tokenizer, "The capital of Spain is", Words("capital of Spain", take="last"))
        [3]
    """

    text: str
    """What to look for, letter by letter."""

    occurrence: Occurrence = None
    """Which occurrence, counted from 0 (-1 is the last), or `"all"`. None: there must be just one."""

    take: Take = "all"
    """Which tokens of each occurrence."""

    def __post_init__(self) -> None:
        text: object = self.text
        if not isinstance(text, str) or not text:
            raise LocationError(f"Words({text!r}) looks for nothing. Give a part of the text.")
        _check_choice(self, self.occurrence, self.take)


@dataclass(frozen=True)
class Regex:
    r"""The tokens that write what a regular expression matches.

    Example:
        >>> from intervenable import load_small_lm, positions
        >>> tokenizer, _ = load_small_lm()
        >>> positions(tokenizer, "The capital of Spain is", Regex(r"of (\w+)", group=1))
        [3]
    """

    pattern: str
    """A regular expression, searched for in the whole text."""

    occurrence: Occurrence = None
    """Which match, counted from 0 (-1 is the last), or `"all"`. None: there must be just one."""

    take: Take = "all"
    """Which tokens of each match."""

    group: int | str = 0
    """Which group of the match; 0 is the whole of it."""

    def __post_init__(self) -> None:
        try:
            compiled = re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise LocationError(f"{self.pattern!r} is not a regular expression: {error}.") from error
        if self.group not in range(compiled.groups + 1) and self.group not in compiled.groupindex:
            named = "".join(f", {name!r}" for name in compiled.groupindex)
            raise LocationError(
                f"{self.pattern!r} has no group {self.group!r}. It has 0 to {compiled.groups}{named}."
            )
        _check_choice(self, self.occurrence, self.take)


@dataclass(frozen=True)
class Segment:
    """One of the parts into which pivots divide an example, counted from 0 (-1 is the last).

    A position as a pivot begins the next part. A token as a pivot belongs to no part.

    Example:
        >>> from intervenable import positions
        >>> positions(None, torch.arange(10), Segment(1, pivots=[4]))
        [4, 5, 6, 7, 8, 9]
    """

    index: int
    """Which part."""

    pivots: tuple[int | str, ...] | None = None
    """Positions or tokens (as text); None for those of the `PositionResolver`."""

    def __post_init__(self) -> None:
        if not _is_int(self.index):
            raise LocationError(f"Segment({self.index!r}) counts no part: give an int.")
        object.__setattr__(self, "pivots", None if self.pivots is None else checked_pivots(self.pivots))


@dataclass(frozen=True)
class Role:
    """What someone says in a chat, without the template around it, as the tokenizer's chat template lays it out."""

    role: Literal["user", "assistant", "system"]
    """Who speaks."""

    turn: int | None = None
    """Which of their messages, counted from 0 (-1 is the last); None for all of them."""

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise LocationError(f"Role {self.role!r} is unknown. Allowed: {', '.join(map(repr, ROLES))}.")
        if self.turn is not None and not _is_int(self.turn):
            raise LocationError(f"turn={self.turn!r} counts no message: give an int, or None for all.")


ROLES = ("user", "assistant", "system")


@dataclass(frozen=True)
class Sampled:
    """Some of the positions that another entry chooses, drawn without replacement, in order.

    Without a generator the draw depends on the seed, the example and the number of candidates alone, so that the
    same call chooses the same positions. The global generators are left alone.
    """

    of: Entry
    """What to draw from."""

    count: int = 1
    """How many."""

    seed: int | None = None
    """Another seed gives other draws; None for that of the `PositionResolver`, by default 0."""

    generator: torch.Generator | None = None
    """What to draw with instead: each draw moves it on."""

    def __post_init__(self) -> None:
        if not _is_int(self.count) or self.count < 1:
            raise LocationError(f"count={self.count!r} positions cannot be drawn: give an int from 1 on.")
        if self.seed is not None and self.generator is not None:
            raise LocationError("Both seed and generator were given; give one of the two.")


@dataclass(frozen=True)
class Except:
    """The positions of one entry without those of another.

    Example:
        >>> from intervenable import positions
        >>> positions(None, torch.arange(6), Except("all", ["first", 4]))
        [1, 2, 3, 5]
    """

    of: Entry
    """What to take from."""

    exclude: Entry
    """What to leave out; it need not be among them."""


@dataclass(frozen=True)
class PerExample:
    """An entry for each example of the batch."""

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        if isinstance(self.entries, (str, Mapping)) or not hasattr(self.entries, "__iter__"):
            raise LocationError(f"PerExample({self.entries!r}) is no list: give an entry for each example.")
        object.__setattr__(self, "entries", tuple(self.entries))


@dataclass(frozen=True)
class Aligned:
    """Base positions together with their counterparts in the source, for prompts of different lengths.

    The two token sequences are aligned (`align`); base positions without a counterpart are left out.
    """

    entry: Entry = "all"
    """Positions of the base."""

    unequal: Unequal = "last"
    """What becomes of runs of unequal length: `"last"`, `"skip"` or `"error"`; see `align`."""

    def __post_init__(self) -> None:
        if self.unequal not in ("last", "skip", "error"):
            raise LocationError(f"unequal={self.unequal!r} is unknown. Allowed: 'last', 'skip', 'error'.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_choice(entry: object, occurrence: object, take: object) -> None:
    if occurrence is not None and occurrence != "all" and not _is_int(occurrence):
        raise LocationError(
            f"occurrence={occurrence!r} of {type(entry).__name__} is unknown. Allowed: an int (-1 is the last),"
            " 'all', or None where there is just one."
        )
    if take not in ("all", "first", "last"):
        raise LocationError(f"take={take!r} is unknown. Allowed: 'all', 'first', 'last'.")


def checked_pivots(pivots: Any) -> tuple[int | str, ...]:
    """Pivots as a tuple of ints and token texts; a single one may stand for itself.

    Raises:
        LocationError: something else is among them.
    """
    items = (pivots,) if isinstance(pivots, (int, str)) else tuple(pivots)
    for item in items:
        if not _is_int(item) and not (isinstance(item, str) and item):
            raise LocationError(f"The pivot {item!r} is neither a position nor the text of a token.")
    return items


# --- JSON -------------------------------------------------------------------------------------------------

_OBJECTS: dict[str, type] = {
    "words": Words,
    "regex": Regex,
    "segment": Segment,
    "role": Role,
    "sampled": Sampled,
    "all_of": Except,
    "per_example": PerExample,
    "aligned": Aligned,
}
"""Each object by the key that stands for it in JSON, which holds its first field."""


def is_entry(value: object) -> bool:
    """Whether it is of a kind that can choose positions by itself; a list of such is none."""
    objects = (Span, *_OBJECTS.values())
    return _is_int(value) or isinstance(value, (str, slice, range, *objects)) or callable(value)


def entry_to_json(entry: Entry) -> Any:
    """An entry in terms of JSON: `{"words": "Spain", "take": "last"}`.

    Raises:
        ConfigError: it holds a function or a generator.

    Example:
        >>> entry_to_json(["last", Words("Spain", take="last"), slice(1, None)])
        ['last', {'words': 'Spain', 'take': 'last'}, {'slice': [1, None, None]}]
    """
    if entry is None or isinstance(entry, (bool, int, str)):
        return entry
    if hasattr(entry, "tolist") and str(entry.dtype).endswith(("int8", "int16", "int32", "int64")):
        return entry.tolist()
    if isinstance(entry, (list, tuple)):
        return [entry_to_json(item) for item in entry]
    if isinstance(entry, (slice, range)):
        return {type(entry).__name__: [entry.start, entry.stop, entry.step]}
    if isinstance(entry, Span):
        return {"span": [entry.start, entry.stop]}
    for key, kind in _OBJECTS.items():
        if type(entry) is kind:
            return _object_to_json(key, entry)
    kind_name = "function" if callable(entry) else type(entry).__name__
    raise ConfigError(
        f"The entry {entry!r} is a {kind_name}, which JSON cannot hold. Say it by name or object."
    )


def _object_to_json(key: str, entry: Any) -> dict[str, Any]:
    if getattr(entry, "generator", None) is not None:
        raise ConfigError(f"{entry!r} holds a generator, which JSON cannot hold. Give a seed.")
    first, *rest = fields(entry)
    changed = {field.name: getattr(entry, field.name) for field in rest}
    written = {
        field.name: entry_to_json(changed[field.name])
        for field in rest
        if changed[field.name] != field.default
    }
    return {key: entry_to_json(getattr(entry, first.name)), **written}


def is_json_of_entry(value: object) -> bool:
    """Whether it is in the form in which JSON has one of the objects."""
    return isinstance(value, Mapping) and next(iter(value), None) in (*_OBJECTS, "slice", "range", "span")


def entry_from_json(value: Any) -> Entry:
    """The entry that `entry_to_json` wrote; entries themselves pass unchanged.

    Raises:
        ConfigError: it stands for no entry.

    Example:
        >>> entry_from_json({"words": "Spain", "take": "last"})
        Words(text='Spain', occurrence=None, take='last')
    """
    if isinstance(value, list):
        return [entry_from_json(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    options = dict(value)
    key = next(iter(options), None)
    try:
        if key == "slice":
            return slice(*options["slice"])
        if key == "range":
            return range(*options["range"])
        if key == "span":
            return Span(*options["span"])
        if key in _OBJECTS:
            made = _OBJECTS[key]
            first = entry_from_json(options.pop(key))
            return made(first, **{name: entry_from_json(option) for name, option in options.items()})
    except (TypeError, LocationError) as error:
        raise ConfigError(f"{value!r} stands for no positions: {error}") from error
    known = ", ".join(map(repr, (*_OBJECTS, "slice", "range", "span")))
    raise ConfigError(f"{value!r} stands for no positions: its first key must be one of {known}.")
