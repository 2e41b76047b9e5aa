"""Laws about heads: the columns of each move what that head computes, and nothing of another's.

Heads are told apart by number: in experiment `b` the heads whose number has the bit `b` are changed, so that few
experiments tell all of them. What is changed at one position is seen there alone, in a row or a column of scores, and
a column of values in that column of the result: so one experiment can change other heads at each of several positions
or columns. Columns are turned round within a head, which leaves its size, and so what a norm over all heads makes of
it, as it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from intervenable.attention_mode import SCORES
from intervenable.map_laws import Finding, deviation, limit_of, named, told
from intervenable.map_laws_groups import Change, Group, Key
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import MOVED, STILL, Judge
from intervenable.masked_scores import floor_of
from model_maps import COMPONENTS


@dataclass(frozen=True)
class Coded:
    """Heads of one component that are changed, and the matrix or vectors by heads in which that is seen."""

    written: str
    read: str
    at: Literal["row", "column", "channels"]
    """Where a change is seen: that of a position in its row or column, that of columns of a head in these."""


CODED = (
    Coded("query_output", "attention_scores", "row"),
    Coded("key_output", "attention_scores", "column"),
    Coded("head_query_output", "attention_scores", "row"),
    Coded("head_key_output", "attention_scores", "column"),
    Coded("rotary_query", "attention_scores", "row"),
    Coded("rotary_key", "attention_scores", "column"),
    Coded("expanded_head_key", "attention_scores", "column"),
    Coded("head_value_output", "head_attention_value_output", "channels"),
    Coded("expanded_head_value", "head_attention_value_output", "channels"),
    Coded("attention_scores", "attention_pattern", "row"),
    Coded("attention_pattern", "head_attention_value_output", "row"),
)


Place = int | slice
"""A position, or columns of a head."""

SHARED = ("head_key_output", "head_value_output", "rotary_key")
"""Views of which one head may be for several heads of queries."""


def heads(bench: Bench) -> Judge:
    """Which heads a change of some heads reaches."""
    made: list[tuple[str, str, Coded, range, dict[int | None, list[Place]], Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        for coded in CODED:
            written, read = named(coded.written, prefix), named(coded.read, prefix)
            if COMPONENTS[written].prefix != prefix:
                continue
            layers = [layer for layer in bench.layers(written) if bench.has(read, layer)]
            if not layers:
                continue
            count = max(bench.sites[written, layer].heads or 1 for layer in layers)
            places = {layer: _told_at(bench, coded, written, read, layer) for layer in layers}
            for bits in _bits(count, places.values()):
                stack = "decoder" if prefix == "cross" else prefix
                changes = {
                    (written, layer): _changed(bench, coded, bits, places[layer], layer) for layer in layers
                }
                writes = {**bench.held(stack), **changes}
                group = bench.experiment(
                    f"heads of {written}, {_numbers(bits)} at {coded.at}s {places}",
                    writes,
                    [(read, layer) for layer in layers],
                )
                made.append((written, read, coded, bits, places, group))

    def judge() -> Iterator[Finding]:
        for written, read, coded, bits, places, group in made:
            for layer in bench.layers(written):
                key = (read, layer)
                if not bench.has(*key) or key not in group.seen or key not in bench.base.seen:
                    continue
                count = bench.sites[written, layer].heads or 1
                why = f"{read} of heads with {_numbers(bits)} alone"
                limit = limit_of(group.seen[key].dtype)
                changed = list(zip(bits, places[layer], strict=False))
                off, right = _told(group.seen[key], bench.base.seen[key], coded, changed, count, limit)
                shared = COMPONENTS[written].word in SHARED
                if not shared and bench.sites[written, layer].heads not in (None, group.seen[key].shape[1]):
                    right, why = False, f"{count} heads, and {read} has {group.seen[key].shape[1]}"
                yield Finding(written, "heads", layer, right, off, limit, why)
                if coded.written in ("attention_pattern",):
                    yield Finding(read, "heads", layer, right, off, limit, why)
                    mixed = off > limit  # a head that hardly moves says nothing of what all are side by side
                    if (right or mixed) and (whole := _viewed_there(bench, read, layer)) is not None:
                        yield Finding(whole, "heads", layer, right, off, limit, why)
        yield from _as_wide(bench)
        yield from _as_many(bench)

    return judge


def _viewed_there(bench: Bench, name: str, layer: int | None) -> str | None:
    """The component of which this is the view by heads of the same tensor: it has them side by side, unmixed."""
    whole = COMPONENTS[name].heads_of
    site, other = bench.sites.get((name, layer)), bench.sites.get((whole or "", layer))
    same = site is not None and other is not None and site.module is other.module and site.side == other.side
    return whole if same else None


WHOLE = {
    "head_query_output": "rotary_query",
    "head_key_output": "expanded_head_key",
    "head_value_output": "expanded_head_value",
}
"""Views by heads, and what the model makes of one head of theirs."""

BESIDE = {
    "head_key_output": "head_query_output",
    "head_value_output": "head_attention_value_output",
}
"""Views by heads, and that of which a head is as wide: a key is multiplied with a query, values are summed."""


def _as_wide(bench: Bench) -> Iterator[Finding]:
    """A head is not wider than what the model multiplies for one head."""
    for (name, layer), site in bench.sites.items():
        known = COMPONENTS[name]
        words = [word for of in (WHOLE, BESIDE) if (word := of.get(known.word)) is not None]
        keys = [(named(word, known.prefix), layer) for word in words]
        other = next((bench.plainly[key] for key in keys if key in bench.plainly), None)
        if site.columns is None or other is None:
            continue
        width, limit = site.columns.width, other.shape[-1]
        why = f"{width} columns of the {limit} that one head has"
        yield Finding(name, "heads", layer, width <= limit, max(0.0, width - limit), 0.0, why)


def _as_many(bench: Bench) -> Iterator[Finding]:
    """Keys after a rotary embedding are as many as a projection gives: shared ones are not repeated yet."""
    for (name, layer), value in bench.plainly.items():
        keys = bench.plainly.get((named("head_key_output", COMPONENTS[name].prefix), layer))
        if COMPONENTS[name].word == "rotary_key" and keys is not None and keys.dim() == value.dim():
            found, expected = value.shape[1], keys.shape[1]
            why = f"{found} heads of keys where the projection gives {expected}"
            yield Finding(name, "heads", layer, found == expected, abs(found - expected), 0.0, why)


def _has_bit(head: int, bit: int) -> bool:
    return bool((head + 1) >> bit & 1)


def _bits(count: int, places: Iterable[Sequence[Place]]) -> list[range]:
    """The bits of the numbers of heads that each experiment tells, a place for each of those told together."""
    room, total = min(map(len, places)), count.bit_length()
    return [range(first, min(first + room, total)) for first in range(0, total, room)]


def _told_at(bench: Bench, coded: Coded, written: str, read: str, layer: int | None) -> list[Place]:
    """Where a change of heads can be seen in a layer: no query reads some keys of a sparse pattern, or one alone."""
    value, found = bench.plainly.get((written, layer)), bench.plainly.get((read, layer))
    if value is None or value.dim() != 4:
        return [0 if value is None else value.shape[1] // 2]
    if coded.at == "channels":
        width = value.shape[-1]
        pairs = [slice(first, first + 2) for first in range(0, width - 1, 2)]
        pattern = bench.plainly.get((named("attention_pattern", COMPONENTS[written].prefix), layer))
        apart = len(pairs) > 1 and _summed_by_columns(pattern, value, found)
        return [*pairs] if apart else [slice(None)]
    positions = _positions(value.shape[2])
    examples = bench.rows // bench.rows_of_example
    seen = None
    if coded.written in SCORES:
        seen = (told(value[:examples]).sum(-1) > 1).all(0).all(0)
    elif (
        coded.at == "column" and found is not None and found.dim() == 4 and found.shape[-1] == value.shape[2]
    ):
        seen = told(found[:examples]).any(-2).any(0).all(0)
    return [position for position in positions if seen is None or seen[position]] or [*positions]


def _summed_by_columns(pattern: Tensor | None, values: Tensor, found: Tensor | None) -> bool:
    """Whether views by heads are patterns times values and no more, so that no column of a head enters another."""
    if pattern is None or found is None or pattern.dim() != 4 or pattern.shape[-1] != values.shape[-2]:
        return False
    if pattern.shape[1] % values.shape[1]:
        return False
    each = pattern.shape[1] // values.shape[1]
    limit = limit_of(found.dtype)
    orders = (values.repeat_interleave(each, 1), values.repeat(1, each, 1, 1))
    return any(deviation(found, pattern @ order) <= limit for order in orders)


def _positions(length: int) -> list[int]:
    """Positions at which heads are changed, from the middle outwards: each fourth stays, to compare others with.

    The first is among those, as a causal pattern has nothing but ones there.

    Example:
        >>> _positions(7), _positions(1)
        ([3, 2, 1, 5, 6], [0])
    """
    changed = [index for index in range(length) if index % 4] or [0]
    return sorted(changed, key=lambda index: abs(index - length // 2))


def _numbers(bits: range) -> str:
    return f"bit {bits[0]}" if len(bits) == 1 else f"bits {bits[0]} to {bits[-1]}"


def _coded(bits: range, length: int) -> list[tuple[int, int]]:
    """Each bit of an experiment and the position at which heads with this bit are changed."""
    return list(zip(bits, _positions(length), strict=False))


def _changed(bench: Bench, coded: Coded, bits: range, places: Sequence[Place], layer: int | None) -> Change:
    banded = any(
        site.bands for (name, at), site in bench.sites.items() if at == layer and site.word == coded.written
    )

    def change(groups: Tensor) -> Tensor:
        value = groups[bench.base.index].clone()
        if value.dim() == 3:  # all heads at once
            value[:, places[0]] = value[:, places[0]].flip(-1)
            return value
        for bit, place in zip(bits, places, strict=False):
            chosen = [head for head in range(value.shape[1]) if _has_bit(head, bit)]
            where = (slice(None), chosen, *((slice(None), place) if coded.at == "channels" else (place,)))
            old = value[where]
            if coded.written == "attention_pattern" and banded:  # nothing can be where there is no band
                new = old * torch.linspace(0.2, 0.8, old.shape[-1]).to(old)
            elif coded.written == "attention_pattern":
                new = 0.5 * old.flip(-1)  # half alone is the same where a norm of each head follows
            elif coded.written == "attention_scores":  # half of large ones would give the same pattern
                new = torch.where(old.abs() < -floor_of(old.dtype), -old, old)
            else:
                new = old.flip(-1)
            value[where] = new
        return value

    return change


def _told(
    new: Tensor,
    old: Tensor,
    coded: Coded,
    places: Sequence[tuple[int, Place]],
    count: int,
    limit: float,
) -> tuple[float, bool]:
    """How far what should stay is off, and whether exactly the heads that should change do."""
    total = old.shape[1]
    if count == 0 or total % count or new.shape != old.shape:
        return float("inf"), False
    length = new.shape[-2 if coded.at == "row" else -1]
    if any(isinstance(place, int) and place >= length for _, place in places):
        return float("inf"), False  # what was changed has other positions, such as those of another stack
    visible = told(new) & told(old) if coded.read in SCORES else new.isfinite() & old.isfinite()
    new, old = (torch.where(visible, t, torch.zeros_like(t)).float() for t in (new, old))
    size = float(old.abs().max()) or 1.0
    difference = (new - old) / size
    if coded.at == "column" and length > 2:  # of one other column, its own is the median
        # Where a sink beside the keys is the largest of a row, the model takes it from all of the row.
        shift = torch.where(visible, difference, torch.nan)
        shift[..., [position for _, position in places]] = torch.nan
        shift = shift.nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
        difference = torch.where(visible, difference - shift, difference)
    # The largest of each head at each position, or in each column.
    within = (0, -1 if coded.at == "row" else -2)
    apart, own = difference.abs().amax(within), (old / size).abs().amax(within)
    heads_of = torch.arange(total, device=old.device) // (total // count) + 1
    due = torch.zeros_like(apart, dtype=torch.bool)
    for bit, place in places:
        due[:, place] = (heads_of >> bit & 1).bool().view(-1, *[1] * (due[:, place].dim() - 1))
    off = float(apart.masked_fill(due, 0.0).max())
    # A head may be small beside the largest of all, or at one position; what is not changed is the same in one pass.
    return off, off <= limit and bool((apart[due] > STILL * limit * own[due]).all())


def shares(bench: Bench) -> Judge:
    """Without some heads the attention's output lacks their shares, and nothing else changes."""
    made: list[tuple[str, str, str, range, Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        written, share, whole = (
            named(word, prefix)
            for word in ("head_attention_value_output", "head_attention_output", "attention_output")
        )
        if COMPONENTS[written].prefix != prefix:
            continue
        layers = [
            layer
            for layer in bench.layers(written)
            if bench.has(share, layer) and bench.has(whole, layer) and (written, layer) in bench.plainly
        ]
        if not layers:
            continue
        count = max(bench.sites[written, layer].heads or 0 for layer in layers)
        stack = "decoder" if prefix == "cross" else prefix
        lengths = [bench.plainly[written, layer].shape[2] for layer in layers]
        for bits in _bits(count, map(_positions, lengths)):
            writes = {**bench.held(stack), **{(written, layer): _without(bench, bits) for layer in layers}}
            keys: list[Key] = [(whole, layer) for layer in layers]
            group = bench.experiment(f"no heads of {written} with {_numbers(bits)}", writes, keys)
            bench.read_in(bench.base, [(share, layer) for layer in layers])
            made.append((written, share, whole, bits, group))

    def judge() -> Iterator[Finding]:
        for written, share, whole, bits, group in made:
            for layer in bench.layers(written):
                if not all(bench.has(name, layer) for name in (share, whole)):
                    continue
                if (whole, layer) not in group.seen or (share, layer) not in bench.base.seen:
                    continue
                before, parts = bench.base.seen[whole, layer], bench.base.seen[share, layer]
                if parts[:, 0].shape != before.shape:
                    continue
                expected = before.clone()
                for bit, position in _coded(bits, before.shape[1]):
                    chosen = [head for head in range(parts.shape[1]) if _has_bit(head, bit)]
                    expected[:, position] -= parts[:, chosen, position].sum(1)
                limit = MOVED * limit_of(before.dtype)
                off = deviation(group.seen[whole, layer], expected)
                why = f"{whole} less the shares of heads with {_numbers(bits)}"
                for name in (written, share):
                    yield Finding(name, "share", layer, off <= limit, off, limit, why)

    return judge


def _without(bench: Bench, bits: range) -> Change:
    def change(groups: Tensor) -> Tensor:
        value = groups[bench.base.index].clone()
        for bit, position in _coded(bits, value.shape[2]):
            value[:, [head for head in range(value.shape[1]) if _has_bit(head, bit)], position] = 0
        return value

    return change
