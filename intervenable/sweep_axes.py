"""What a sweep varies: its axes, and the entries along each of them in one pair of runs.

An entry of an axis is what one cell patches there: a layer, a head or a token, or several of them at once (a window).
Tokens are counted as real tokens of the run that is patched, and each is paired with the token of the run that gives
the values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from intervenable.cache_layout import KEY, POSITION, QUERY
from intervenable.collect_requests import Where
from intervenable.errors import (
    ConfigError,
    LayerRangeError,
    LocationError,
    LocationRangeError,
    UnknownNameError,
)
from intervenable.inputs import RunInputs
from intervenable.locations import read_locations
from intervenable.sites import BoundSite
from intervenable.token_text import align
from intervenable.units import Level

Axis = Literal["layer", "pos", "head", "query", "key"]
AXES: tuple[Axis, ...] = ("layer", "pos", "head", "query", "key")
SPOKEN: Mapping[str, Axis] = {
    "layers": "layer",
    "position": "pos",
    "positions": "pos",
    "head_index": "head",
    "heads": "head",
    "dest_pos": "query",
    "queries": "query",
    "src_pos": "key",
    "keys": "key",
}
"""Other names of the axes, TransformerLens' among them."""
LEVEL_OF: Mapping[Axis, Level] = {"pos": "positions", "head": "heads", "query": "queries", "key": "keys"}
AXIS_OF: Mapping[Level, Axis] = {level: axis for axis, level in LEVEL_OF.items()}
_WHERE: Mapping[Axis, str] = {"pos": POSITION, "query": QUERY, "key": KEY}

Pairs = tuple[dict[int, int], ...]
"""For each example which token of the run that gives values belongs to a token of the run that is patched."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of one entry, example by example, as indices into tensors."""

    base: Tensor
    """`[b, n]` in the run that is patched; shorter examples filled up."""

    source: Tensor
    """`[b, n]` in the run that gives the values."""

    real: Tensor
    """`[b, n]`: False where an example has no such token, or it has no partner."""

    @classmethod
    def joined(cls, parts: Sequence[Tokens]) -> Tokens:
        """All tokens of several entries at once, each token once."""
        columns = ([getattr(part, name) for part in parts] for name in ("base", "source", "real"))
        base, source, real = (torch.cat(tensors, 1) for tensors in columns)
        before = (base[:, :, None] == base[:, None]) & real[:, None]
        return cls(base, source, real & ~before.tril(-1).any(-1))


@dataclass(frozen=True, eq=False)
class Entry:
    """One entry of an axis."""

    label: str
    stands_for: Any
    """What it is, as JSON has it: an int, a list of ints, or a name."""

    numbers: tuple[int, ...] = ()
    """Layers or heads."""

    tokens: Tokens | None = None
    """Tokens, for the axes that run over them."""


def read_axes(axes: Any) -> tuple[Axis, ...]:
    """Axes as users name them.

    Raises:
        UnknownNameError: no such axis; the message has the nearest name.
        ConfigError: one twice.
    """
    listed = [axes] if isinstance(axes, str) else list(axes)
    found: list[Axis] = []
    for name in listed:
        known = SPOKEN.get(name, name) if isinstance(name, str) else name
        if known not in AXES:
            near = get_close_matches(str(name), [*AXES, *SPOKEN], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise UnknownNameError(f"axes: {name!r} is no axis.{hint}\nAllowed: {', '.join(AXES)}.")
        if known in found:
            raise ConfigError(f"axes names {known!r} twice. Name each axis once.")
        found.append(known)
    return tuple(found)


def axes_of(site: BoundSite) -> tuple[Axis, ...]:
    """The axes a component can be swept along."""
    layers: tuple[Axis, ...] = ("layer",) if site.layer is not None else ()
    heads: tuple[Axis, ...] = ("head",) if site.heads is not None else ()
    tokens: tuple[Axis, ...] = ("query", "key") if site.matrix else ("pos",)
    return (*layers, *heads, *tokens)


def check_axes(axes: Sequence[Axis], given: Mapping[Axis, Any], site: BoundSite) -> None:
    """That a component has the axes that are asked for, and those of which a part is asked for.

    Raises:
        ConfigError: it has not; the message says which it has.
    """
    there = axes_of(site)
    words = {"layer": "layers", "pos": "positions", "head": "heads", "query": "queries", "key": "keys"}
    for axis in (*axes, *(axis for axis, entries in given.items() if entries is not None)):
        if axis not in there:
            instead = (
                " Its tokens are 'query' (rows) and 'key' (columns)." if site.matrix and axis == "pos" else ""
            )
            raise ConfigError(
                f"{site.component} has no axis {axis!r} ({words[axis]}).{instead}"
                f" It has: {', '.join(there) or 'none'}."
            )


# --- layers and heads -------------------------------------------------------------------------------------


def number_entries(
    axis: Axis, given: Any, count: int, window: int = 1, there: Sequence[int] | None = None
) -> tuple[Entry, ...]:
    """Entries of the layers or the heads: those that were given, or all there are.

    Args:
        axis: Which of the two.
        given: What was asked for; None for all.
        count: How many there are.
        window: How many neighbours go together.
        there: The layers that have the component, where not all do.

    Raises:
        ConfigError: something that is no number, or nothing.
        LayerRangeError, LocationRangeError: a layer or a head that is not there.
    """
    listed = _listed(given, range(count) if there is None else there, count, axis)
    entries = []
    for entry in listed:
        numbers = [
            _number(axis, one, count) for one in (entry if isinstance(entry, (tuple, list)) else [entry])
        ]
        if not numbers:
            raise ConfigError(f"{axis}s has an empty window. Name at least one {axis} in it.")
        numbers = list(dict.fromkeys(numbers))
        if len(numbers) == 1:
            around = _around(numbers[0], window, count)
            numbers = [number for number in around if window == 1 or there is None or number in there]
        entries.append(Entry(_spelled(numbers), numbers[0] if len(numbers) == 1 else numbers, tuple(numbers)))
    return tuple(entries)


def _listed(given: Any, there: Sequence[int], count: int, axis: Axis) -> list[Any]:
    if given is None or (isinstance(given, str) and given == "all"):
        return list(there)
    if isinstance(given, slice):
        given = [number for number in range(count)[given] if number in there]
    if isinstance(given, int):
        return [given]
    if isinstance(given, str) or not hasattr(given, "__iter__"):
        raise ConfigError(
            f"{axis}s={given!r} names none. Give an int, a list of ints and of tuples (windows), or None."
        )
    listed = given.tolist() if isinstance(given, Tensor) else list(given)
    if not listed:
        raise ConfigError(f"{axis}s is empty. Name at least one, or leave it out for all {count}.")
    return listed


def _number(axis: Axis, given: Any, count: int) -> int:
    if isinstance(given, bool) or not hasattr(given, "__index__"):
        raise ConfigError(f"{axis}s has {given!r}, which is no number of a {axis}.")
    number = given.__index__()
    if not -count <= number < count:
        error: Any = LayerRangeError if axis == "layer" else LocationRangeError
        raise error(f"{axis} {number} is not there: the component has {count}, from 0 to {count - 1}.")
    return int(number) % count


def _around(number: int, window: int, count: int) -> range:
    """The numbers of a window around one, as far as there are any."""
    first = number - window // 2
    return range(max(0, first), min(count, first + window))


def _spelled(numbers: Sequence[int]) -> str:
    if len(numbers) > 1 and list(numbers) == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]}-{numbers[-1]}"
    return "+".join(map(str, numbers))


# --- tokens -----------------------------------------------------------------------------------------------


def real_tokens(inputs: RunInputs) -> list[list[int]]:
    """For each example the tensor indices of its real tokens."""
    return inputs.real_positions or [list(range(inputs.length))] * inputs.batch


def with_ids(run: RunInputs, other: RunInputs | None) -> RunInputs:
    """A run that is given embeddings with the token ids of the other, of the same places, to tell its tokens by."""
    if run.input_ids is not None or other is None or other.input_ids is None:
        return run
    if tuple(other.input_ids.shape) != (run.batch, run.length) or real_tokens(run) != real_tokens(other):
        return run
    return replace(run, input_ids=other.input_ids)


def paired(base: RunInputs, source: RunInputs | None, given: Any, base_is_clean: bool) -> Pairs:
    """Which token of the source belongs to which of the base, counted in real tokens, for each example.

    Args:
        base: The run that is patched.
        source: The run that gives values; None if they come from no run.
        given: What the user said: None, `"auto"`, or pairs (clean, corrupted) for all examples or for each.
        base_is_clean: Whether the run that is patched is the clean one.

    Raises:
        ConfigError: examples of different length, and nothing was said.
        LocationError, LocationRangeError: pairs that make no sense.
    """
    tokens = real_tokens(base)
    if source is None:
        return tuple({j: j for j in range(len(row))} for row in tokens)
    others = real_tokens(source)
    others = others * len(tokens) if len(others) == 1 else others
    lengths = [(len(row), len(other)) for row, other in zip(tokens, others, strict=True)]
    if given is None:
        for example, (here, there) in enumerate(lengths):
            if here != there:
                raise ConfigError(
                    f"Example {example} has {here} tokens in the run that is patched and {there} in the one that"
                    " gives the values, so that it is not clear which belongs to which. Say so: align='auto' pairs"
                    " equal tokens in order, align=[(clean position, corrupted position), ...] is yours."
                )
        return tuple({j: j for j in range(here)} for here, _ in lengths)
    if isinstance(given, str):
        if given != "auto":
            raise UnknownNameError(f"align={given!r} is unknown. Allowed: 'auto', pairs of positions, None.")
        return _paired_by_ids(base, source, tokens, others)
    if isinstance(given, Mapping) or not hasattr(given, "__iter__"):
        raise LocationError(
            f"align={given!r}: give 'auto', or a list of pairs (clean position, corrupted position)."
        )
    listed = list(given)
    each = bool(listed) and all(
        isinstance(row, (list, tuple)) and row and isinstance(row[0], (list, tuple)) for row in listed
    )
    rows = listed if each else [listed] * len(tokens)
    if len(rows) != len(tokens):
        raise LocationError(f"align has pairs for {len(rows)} examples, and there are {len(tokens)}.")
    return tuple(
        _checked_pairs(row, *lengths[example], example, base_is_clean) for example, row in enumerate(rows)
    )


def _paired_by_ids(
    base: RunInputs, source: RunInputs, tokens: list[list[int]], others: list[list[int]]
) -> Pairs:
    if base.input_ids is None or source.input_ids is None:
        raise ConfigError("align='auto' pairs token ids, and the inputs have none. Give pairs of positions.")
    ids, there = base.input_ids.tolist(), source.input_ids.tolist()
    there = there * len(ids) if len(there) == 1 else there
    return tuple(
        dict(align([own[i] for i in row], [other[i] for i in other_row]))
        for own, row, other, other_row in zip(ids, tokens, there, others, strict=True)
    )


def _checked_pairs(pairs: Any, here: int, there: int, example: int, base_is_clean: bool) -> dict[int, int]:
    found: dict[int, int] = {}
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise LocationError(f"align has {pair!r}, which is no pair (clean position, corrupted position).")
        own, other = pair if base_is_clean else pair[::-1]
        for position, count, name in ((own, here, base_is_clean), (other, there, not base_is_clean)):
            if not -count <= position < count:
                run = "clean" if name else "corrupted"
                raise LocationRangeError(
                    f"align names position {position} of the {run} run, which has {count} in example {example}."
                )
        found[own % here] = other % there
    return found


def _plain_numbers(given: Any) -> list[int] | None:
    """Positions that are numbers from the front alone; None if they are anything else."""
    if isinstance(given, Tensor) and given.dtype != torch.bool and given.dim() == 1:
        given = given.tolist()
    if not isinstance(given, (list, range)) or not given:
        return None
    plain = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in given)
    return list(given) if plain else None


@dataclass(frozen=True)
class TokenReader:
    """Makes entries of tokens in one pair of runs."""

    base: RunInputs
    source: RunInputs | None
    pairs: Pairs
    tokenizer: Any = None

    def entries(self, axis: Axis, given: Any, window: int = 1) -> tuple[Entry, ...]:
        """Entries of an axis over tokens: those that were given, or one for each token there is.

        Raises:
            LocationError, LocationRangeError: positions that make no sense or are not there.
        """
        real = real_tokens(self.base)
        longest = max(map(len, real))
        # As for all tokens, an example that has no such token is left alone.
        numbers = range(longest) if given is None else _plain_numbers(given)
        if numbers is not None and all(j < longest for j in numbers):
            return tuple(
                self._entry(
                    self._label(j),
                    j,
                    [list(_around(j, window, len(row))) if j < len(row) else [] for row in real],
                )
                for j in numbers
            )
        read = partial(read_locations, tokenizer=self.tokenizer)
        located = Where({_WHERE[axis]: given}).located(_WHERE[axis], self.base, read)
        assert located is not None
        order = [{index: j for j, index in enumerate(row)} for row in real]
        entries = []
        for number, label in enumerate(located.labels):
            rows = [
                [
                    order[example][index]
                    for index, group in zip(row, located.groups[example], strict=True)
                    if group == number
                ]
                for example, row in enumerate(located.rows)
            ]
            if window > 1:
                rows = [
                    sorted({k for j in row for k in _around(j, window, len(real[example]))})
                    for example, row in enumerate(rows)
                ]
            named = isinstance(given, Mapping)
            entries.append(
                Entry(label, label, tokens=self._tokens(rows)) if named else self._named(label, rows)
            )
        return tuple(entries)

    def whole(self) -> Tokens:
        """All tokens at once."""
        return self._tokens([list(range(len(row))) for row in real_tokens(self.base)])

    def _named(self, label: str, rows: list[list[int]]) -> Entry:
        same = all(row == rows[0] for row in rows)
        number = same and label.lstrip("-").isdigit() and len(rows[0]) == 1
        if number:
            return self._entry(self._label(rows[0][0]), rows[0][0], rows)
        stands_for = list(rows[0]) if same and not any(char.isalpha() for char in label) else label
        return self._entry(_spelled(rows[0]) if isinstance(stands_for, list) else label, stands_for, rows)

    def _entry(self, label: str, stands_for: Any, rows: list[list[int]]) -> Entry:
        return Entry(label, stands_for, tokens=self._tokens(rows))

    def _tokens(self, rows: list[list[int]]) -> Tokens:
        real = real_tokens(self.base)
        there = real if self.source is None else real_tokens(self.source)
        there = there * len(real) if len(there) == 1 else there
        rows = [list(dict.fromkeys(row)) for row in rows]
        width = max(1, *map(len, rows))
        base, source, known = [], [], []
        for example, row in enumerate(rows):
            filled = row + [row[-1] if row else 0] * (width - len(row))
            partner = [self.pairs[example].get(j) for j in filled]
            base.append([real[example][j] for j in filled])
            source.append([there[example][j or 0] for j in partner])
            known.append([i < len(row) and j is not None for i, j in enumerate(partner)])
        return Tokens(torch.tensor(base), torch.tensor(source), torch.tensor(known))

    def _label(self, position: int) -> str:
        """A token's text, where all examples have one text there and a tokenizer tells it; else its number."""
        ids, real = self.base.input_ids, real_tokens(self.base)
        decode = getattr(self.tokenizer, "decode", None)
        if ids is None or decode is None:
            return str(position)
        texts = {
            decode([int(ids[example, row[position]])])
            for example, row in enumerate(real)
            if position < len(row)
        }
        text = texts.pop() if len(texts) == 1 else None
        if text is None:
            return str(position)
        return text.strip() or text.replace("\n", "↵").replace(" ", "␣") or str(position)
