"""Units: which positions, heads, queries and keys of a tensor are meant, example by example."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Level = Literal["heads", "positions", "queries", "keys"]
LEVELS: Mapping[str, tuple[Level, ...]] = {
    "pos": ("positions",),
    "h": ("heads",),
    "h.pos": ("heads", "positions"),
    "h.query": ("heads", "queries"),
    "h.query.key": ("heads", "queries", "keys"),
}
"""The levels of each unit, in the order in which locations nest."""

RELATIONS = ("self", "others")
"""Keys told by the query: the query's own position, or every key but that."""


@dataclass(frozen=True)
class Whole:
    """All units of a tensor: no locations were given."""


@dataclass(frozen=True)
class Skipped:
    """An intervention that this call leaves out."""


@dataclass(frozen=True)
class Units:
    """The units of one intervention in one run, for each example; checked, and counted from 0.

    Each level has tensor indices along its axis for each example; None means all there are, or that the component
    has no such axis.
    """

    positions: tuple[tuple[int, ...], ...] | None = None
    heads: tuple[tuple[int, ...], ...] | None = None
    queries: tuple[tuple[int, ...], ...] | None = None
    keys: tuple[tuple[int, ...], ...] | None = None

    relation: str | None = None
    """Which of the entries are meant: those where the key is the query (`self`), or is not (`others`)."""

    @property
    def levels(self) -> dict[Level, tuple[tuple[int, ...], ...]]:
        """The levels that are located, in the order in which they nest."""
        named: list[tuple[Level, tuple[tuple[int, ...], ...] | None]] = [
            ("heads", self.heads),
            ("positions", self.positions),
            ("queries", self.queries),
            ("keys", self.keys),
        ]
        return {name: rows for name, rows in named if rows is not None}

    def __len__(self) -> int:
        return len(next(iter(self.levels.values()), ()))

    @cached_property
    def counts(self) -> tuple[tuple[int, ...], ...]:
        """For each example the number of its units, level by level."""
        levels = self.levels.values()
        return tuple(tuple(len(level[example]) for level in levels) for example in range(len(self)))

    @cached_property
    def ragged(self) -> bool:
        """Whether examples have different numbers of units."""
        return len(set(self.counts)) > 1

    @cached_property
    def last_position(self) -> int:
        """The largest tensor index along the position axis; -1 if every position is meant."""
        return -1 if self.positions is None else max(map(max, self.positions))

    @cached_property
    def spans(self) -> dict[Level, slice] | None:
        """Each located level as one slice, where all are neighbours in order and the same for every example."""
        if self.relation is not None:
            return None
        spans: dict[Level, slice] = {}
        for level, rows in self.levels.items():
            first, last = rows[0][0], rows[0][-1]
            if rows[0] != tuple(range(first, last + 1)) or any(row != rows[0] for row in rows):
                return None
            spans[level] = slice(first, last + 1)
        return spans

    @cached_property
    def filled(self) -> dict[Level, Tensor]:
        """For each located level `[batch, n]`, shorter examples filled up with their last unit."""
        return {name: torch.tensor(_filled(rows)) for name, rows in self.levels.items()}

    @cached_property
    def real(self) -> Tensor | None:
        """Which entries are units and which fill up: a mask with an axis for each level, `[batch, n, ...]`.

        None if all are units.
        """
        if not self.ragged and self.relation is None:
            return None
        levels = self.levels
        mask = torch.ones(len(self), *[max(map(len, rows)) for rows in levels.values()], dtype=torch.bool)
        for axis, rows in enumerate(levels.values(), 1):
            width = mask.shape[axis]
            there = torch.tensor([[i < len(row) for i in range(width)] for row in rows])
            mask &= there.view(len(rows), *[width if other == axis else 1 for other in range(1, mask.dim())])
        if self.relation is not None:
            own = self.filled["queries"][:, None, :, None] == self.filled["keys"][:, None, None, :]
            mask = mask & (own if self.relation == "self" else ~own)
        return mask


def _filled(rows: Sequence[tuple[int, ...]]) -> list[list[int]]:
    width = max(map(len, rows))
    return [[*row, *[row[-1]] * (width - len(row))] for row in rows]


@dataclass(frozen=True, eq=False)
class UnitRows:
    """Units as tensors already, with the row of the stream in which each of them is."""

    rows: Tensor
    """`[n]` rows of the stream, for each entry of the tensors below the one it is in."""

    filled: Mapping[Level, Tensor]
    """For each level that the place has `[n, units]` indices along its axis."""

    real: Tensor | None = None
    """Which of them are meant, with an axis for each level; None if all are."""

    indices: dict[Hashable, Any] = field(default_factory=dict)
    """Such units as indices into streams, once they are known; shared by those that are the same in other rows."""

    spans: None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def last_position(self) -> int:
        """The largest index along the position axis; -1 where there is no such level."""
        positions = self.filled.get("positions")
        return -1 if positions is None else int(positions.max())


Slot = Whole | Skipped | Units
"""What one intervention touches in one run."""
