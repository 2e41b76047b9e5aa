"""The cells of a sweep: every combination of entries of its axes, and what each of them patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from intervenable.sites import BoundSite
from intervenable.sweep_axes import AXIS_OF, Axis, Entry, Tokens
from intervenable.units import Level


@dataclass(frozen=True, eq=False)
class Grid:
    """The cells of one component: one for each combination of the entries of its axes, the last axis fastest."""

    component: str
    axes: tuple[Axis, ...]
    entries: Mapping[Axis, tuple[Entry, ...]]
    """Along each axis."""

    sites: Mapping[int | None, BoundSite]
    """The component's place in each layer; under None outside the blocks."""

    fixed: Mapping[Axis, Entry]
    """For what is no axis and of which a part is patched: that part."""

    @property
    def shape(self) -> tuple[int, ...]:
        """How many entries each axis has."""
        return tuple(len(self.entries[axis]) for axis in self.axes)

    def __len__(self) -> int:
        return prod(self.shape)

    def cells(self) -> list[Cell]:
        """All cells in order."""
        return [Cell(self, index) for index in product(*(range(size) for size in self.shape))]


@dataclass(frozen=True, eq=False)
class Cell:
    """One cell: what is patched together in one run."""

    grid: Grid
    index: tuple[int, ...]
    """Its place along each axis."""

    def entry(self, axis: Axis) -> Entry | None:
        """Its entry of an axis, or of what is no axis; None if all there are."""
        along = self.grid.entries.get(axis)
        if along is not None:
            return along[self.index[self.grid.axes.index(axis)]]
        return self.grid.fixed.get(axis)

    @property
    def layers(self) -> tuple[int | None, ...]:
        """The layers in which it patches."""
        entry = self.entry("layer")
        return tuple(self.grid.sites) if entry is None else entry.numbers

    @property
    def heads(self) -> tuple[int, ...] | None:
        """The heads it patches; None for all, or where there are none."""
        entry = self.entry("head")
        return None if entry is None else entry.numbers

    def tokens(self, level: Level, whole: Tokens) -> Tokens:
        """The tokens it patches along one level."""
        entry = self.entry(AXIS_OF[level])
        return whole if entry is None or entry.tokens is None else entry.tokens

    @property
    def label(self) -> str:
        """What it is, for messages."""
        parts = [
            f"{axis} {self.grid.entries[axis][number].label!s}"
            for axis, number in zip(self.grid.axes, self.index, strict=True)
        ]
        return ", ".join([self.grid.component, *parts])


def levels_of(site: BoundSite) -> tuple[Level, ...]:
    """The levels of a place, in the order of its axes."""
    heads: tuple[Level, ...] = ("heads",) if site.heads is not None else ()
    tokens: tuple[Level, ...] = ("queries", "keys") if site.matrix else ("positions",)
    return (*heads, *tokens)


def all_cells(grids: Sequence[Grid]) -> list[Cell]:
    """The cells of all components, one component after the other."""
    return [cell for grid in grids for cell in grid.cells()]
