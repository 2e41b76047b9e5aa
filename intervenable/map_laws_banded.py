"""Laws about attention without a matrix of scores: what queries, keys and values do to what the heads have read.

Where there are scores, these tell queries from keys and heads from each other. Elsewhere what comes of them does:
every other column of some heads is changed at one position, and looked for in what all heads have read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from intervenable.map_laws import Finding, limit_of, named
from intervenable.map_laws_allowances import beside_the_band
from intervenable.map_laws_groups import Group
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import STILL, Judge, Swaps
from model_maps import COMPONENTS

READ = "head_attention_value_output"
"""What the heads have read."""

Part = Literal["query", "key", "value"]
PARTS: tuple[Part, ...] = ("query", "key", "value")


def roles(bench: Bench, swaps: Swaps) -> Judge:
    """Queries act at their own position alone, keys and values at others, values column by column."""
    made: list[tuple[Part, str, str, int, list[int | None], Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        read = named(READ, prefix)
        for part in PARTS:
            written = named(f"head_{part}_output", prefix)
            layers = [layer for layer in bench.layers(written) if _is_told_here(bench, prefix, layer)]
            if COMPONENTS[read].prefix != prefix or not layers:
                continue
            heads = max(bench.sites[written, layer].heads or 1 for layer in layers)
            for bit in range(heads.bit_length()):
                for source in swaps.sources(prefix, [written])[-1:]:
                    group = swaps.swap(
                        prefix,
                        [f"head_{part}_output"],
                        source,
                        [READ],
                        part=_some(bit),
                        tag=f"even columns of heads with bit {bit} at one position",
                    )
                    made.append((part, written, read, bit, layers, group))

    def judge() -> Iterator[Finding]:
        for part, written, read, bit, layers, group in made:
            for layer in layers:
                key = (read, layer)
                if not bench.has(written, layer) or key not in group.seen or key not in bench.base.seen:
                    continue
                new, old = group.seen[key], bench.base.seen[key]
                heads, limit = bench.sites[written, layer].heads or 0, limit_of(new.dtype)
                each = _read_by(bench, part, written, layer, new)
                due = [head * each + one for head in _chosen(heads, bit) for one in range(each)]
                if not due or old.dim() < 4 or old.shape[2] < 2:
                    continue  # of a layer with fewer heads than others; nothing is read at others than its own
                off, right, why = _told(part, new, old, due, limit)
                right &= heads * each == new.shape[1] and bench.covered(written, layer)
                for name in (written, named(f"{part}_output", COMPONENTS[written].prefix), read):
                    if bench.has(name, layer):
                        yield Finding(name, "roles", layer, right, off, limit, why)

    return judge


def _read_by(bench: Bench, part: Part, written: str, layer: int | None, read: Tensor) -> int:
    """How many heads of what is read share a head of this: several, if keys and values are of fewer heads as wide."""
    own = bench.plainly.get((written, layer))
    query = bench.plainly.get((written.replace("head_key", "head_query"), layer))
    beside = query if part == "key" else read
    if part == "query" or own is None or beside is None or own.shape[-1] != beside.shape[-1]:
        return 1
    return max(1, read.shape[1] // own.shape[1])


def _is_told_here(bench: Bench, prefix: str, layer: int | None) -> bool:
    """Whether a layer has heads of which something is read, and no matrix of all that they read."""
    whole = bench.has(named("attention_scores", prefix), layer) and not beside_the_band(bench, prefix, layer)
    return bench.has(named(READ, prefix), layer) and not whole


def _chosen(heads: int, bit: int) -> list[int]:
    return [head for head in range(heads) if (head + 1) >> bit & 1]


def _some(bit: int) -> Callable[[Tensor, Tensor], Tensor]:
    """A change of every other column of heads with a bit in their number, at the position in the middle."""

    def part(base: Tensor, source: Tensor) -> Tensor:
        result = base.clone()
        middle, chosen = base.shape[2] // 2, _chosen(base.shape[1], bit)
        result[:, chosen, middle, ::2] = source[:, chosen, middle, ::2]
        return result

    return part


def _told(part: Part, new: Tensor, old: Tensor, due: Sequence[int], limit: float) -> tuple[float, bool, str]:
    """How far off what should stay is, whether all that should change does, and what was compared."""
    if new.shape != old.shape or max(due) >= new.shape[1]:
        return float("inf"), False, "the heads that should change are not there"
    change = (new - old).abs().float() / float(old.abs().max().clamp(min=1e-12))
    stays = change.clone()
    middle = change.shape[2] // 2
    own = change[:, due]
    others = torch.cat([own[:, :, :middle], own[:, :, middle + 1 :]], 2)
    if part == "query":
        why = "queries at one position change all that their heads read there, and nothing else"
        stays[:, due, middle] = 0
        moves = own[:, :, middle, 1::2].amax((0, 2))
    elif part == "key":
        why = "keys at one position change all that their heads read at others, and nothing of other heads"
        stays[:, due] = 0
        moves = others[..., 1::2].amax((0, 2, 3))
    else:
        why = "values at one position change the same columns of what their heads read at others"
        stays[:, due, :, ::2] = 0
        moves = others[..., ::2].amax((0, 2, 3))
    off = float(stays.max())
    return off, off <= limit and bool((moves > STILL * limit).all()), why
