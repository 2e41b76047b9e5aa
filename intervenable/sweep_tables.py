"""The values of a sweep cell by cell: in words, and as a table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import pandas as pd

Results = Mapping[tuple[str, str], Tensor]
Names = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class SweepCell:
    """One cell of a sweep: what was patched, and what came of it."""

    component: str
    metric: str

    entries: Mapping[str, Any]
    """What was patched on each axis: `{"layer": 3, "pos": 4}`."""

    labels: Mapping[str, str]
    """The names of the same: `{"layer": "3", "pos": " Spain"}`."""

    value: float
    """The metric; the mean of what it gave if that is several numbers."""

    change: float | None
    """The value less that of the run that was patched; None if that is not known."""

    @property
    def effect(self) -> float:
        """By how much the patch changed the metric, up or down; the value itself if that is not known."""
        return self.value if self.change is None else abs(self.change)

    def __str__(self) -> str:
        places = (
            f"{axis} {entry}" + ("" if self.labels[axis] == str(entry) else f" {self.labels[axis]!r}")
            for axis, entry in self.entries.items()
        )
        change = "" if self.change is None else f" ({self.change:+.4g})"
        return f"{', '.join((self.component, *places))}: {self.value:.4g}{change}"


def cells_of(
    axes: Sequence[str], entries: Names, labels: Names, results: Results, before: float | None
) -> Iterator[SweepCell]:
    """Each cell with a number in it; of metrics that give one number for each cell."""
    for (component, metric), values in results.items():
        for index, value in _numbered(values):
            if value == value:  # no NaN
                yield SweepCell(
                    component,
                    metric,
                    _at(entries, axes, index),
                    _at(labels, axes, index),
                    value,
                    None if before is None else value - before,
                )


def table_of(axes: Sequence[str], entries: Names, labels: Names, results: Results) -> pd.DataFrame:
    """A row for each cell, and for each number where a metric gives several for it."""
    import pandas as pd

    most = max(values.dim() for values in results.values()) - len(axes)
    items = item_names(most)
    rows = [
        [
            component,
            *_at(entries, axes, index).values(),
            *_at(labels, axes, index).values(),
            metric,
            *index[len(axes) :],
            *[None] * (most + len(axes) - len(index)),
            value,
        ]
        for (component, metric), values in results.items()
        for index, value in _numbered(values)
    ]
    columns = ["component", *axes, *(f"{axis}_label" for axis in axes), "metric", *items, "value"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(items, "Int64"))


def item_names(count: int) -> tuple[str, ...]:
    """Names for the axes of what a metric gives for one cell."""
    return ("item",) if count == 1 else tuple(f"item_{number}" for number in range(count))


def _at(names: Names, axes: Sequence[str], index: Sequence[int]) -> dict[str, Any]:
    return {axis: names[axis][number] for axis, number in zip(axes, index, strict=False)}


def _numbered(values: Tensor) -> Iterator[tuple[tuple[int, ...], float]]:
    places = product(*(range(size) for size in values.shape))
    return zip(places, values.flatten().tolist(), strict=True)
