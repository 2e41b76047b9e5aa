"""Metrics of the unpatched runs and of the cells, and the check of some cells against plain runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intervenable.errors import ConfigError, InexactError, MetricError
from intervenable.metric_reading import MetricReader, UnreadError
from intervenable.metrics import Metric, MetricRun
from intervenable.sweep_axes import real_tokens
from intervenable.sweep_cells import Cell
from intervenable.sweep_pairs import Pair
from intervenable.sweep_runs import PlainRuns, Unpatched
from intervenable.sweep_start import Start, last_tokens
from intervenable.wave_plan import Wave

CHECKED_CELLS = 16
"""How many cells `exact_check=True` runs again."""

TOLERANCE = 1e-4
"""How far a shortcut may be from the plain way, of the largest value; ten times what rounding was seen to do."""


def bound_metrics(
    metrics: Mapping[str, Any], pair: Pair, begun: Start, run: Unpatched
) -> dict[str, Callable[[Tensor], Any]]:
    """The metrics as functions of the logits of one run.

    Raises:
        MetricError: one of them reads a run that was not given.
    """
    runs = {"clean": begun.base, "corrupted": begun.other}
    if not pair.noising:
        runs = {"clean": begun.other, "corrupted": begun.base}

    def whole(name: str) -> Callable[[], Tensor]:
        def logits() -> Tensor:
            known = runs[name]
            if known is None:
                raise MetricError(f"The metric reads the {name} run, which was not given as inputs.")
            return known.logits()

        return logits

    inputs = {name: None if known is None else known.inputs for name, known in runs.items()}
    about = MetricRun(run.inputs, whole("clean"), whole("corrupted"), inputs["clean"], inputs["corrupted"])
    return {
        name: metric.bound(about) if isinstance(metric, Metric) else metric
        for name, metric in metrics.items()
    }


def make_reader(
    metrics: Mapping[str, Any], pair: Pair, begun: Start
) -> tuple[MetricReader, dict[str, Tensor]]:
    """What reads the metrics of cells, and their values on the other run (nothing if there is none).

    Raises:
        MetricError: a metric fails on an unpatched run.
    """
    base, other = begun.base, begun.other
    alike = (
        other is not None
        and base.shape == other.shape
        and real_tokens(base.inputs) == real_tokens(other.inputs)
    )
    reader = MetricReader(
        bound_metrics(metrics, pair, begun, base),
        base.shape,
        [base.logits],
        guess=last_tokens(base.inputs, base.shape[1]),
        narrow=True,
    )
    if other is None:
        return reader, {}
    if alike:
        try:
            return reader, reader.measure(_read(other, reader), "the other run")
        except UnreadError:  # there it looks elsewhere
            return reader, reader.measure_whole(other.logits(), "the other run")
    # Its tokens lie elsewhere, so that the metrics read other positions of it.
    its = MetricReader(
        bound_metrics(metrics, pair, begun, other),
        other.shape,
        [other.logits],
        guess=last_tokens(other.inputs, other.shape[1]),
        narrow=False,
    )
    return reader, its.measure(_read(other, its), "the other run")


def _read(run: Unpatched, reader: MetricReader) -> Tensor:
    found = run.logits(reader.positions)
    return found if reader.tokens is None else found[..., reader.tokens.to(found.device)]


def read_check(asked: Any) -> int:
    """How many cells are to be checked.

    Raises:
        ConfigError: not a number of cells.
    """
    if isinstance(asked, bool):
        return CHECKED_CELLS if asked else 0
    if not isinstance(asked, int) or asked < 0:
        raise ConfigError(
            f"exact_check={asked!r} is no number of cells. Give True, False, or how many to check."
        )
    return asked


def measured_wave(
    wave: Wave, logits: Tensor, reader: MetricReader, plain: PlainRuns, cells: Sequence[Cell]
) -> dict[str, Tensor]:
    """The metrics of the cells of a wave, stacked."""
    values: dict[str, list[Tensor]] = {name: [] for name in reader.shapes}
    for cell, one in zip(wave.cells, logits, strict=True):
        try:
            measured = reader.measure(one, cells[cell].label)
        except UnreadError:  # it looked where it had not before
            measured = reader.measure_whole(plain.logits(cell), cells[cell].label)
        for name, value in measured.items():
            values[name].append(value)
    return {name: torch.stack(items) for name, items in values.items()}


class Found:
    """The values of all cells, those that change nothing as in the run without a patch."""

    def __init__(self, cells: Sequence[Cell], baseline: Mapping[str, Tensor]) -> None:
        self._cells = cells
        self.values = {
            name: value.expand(len(cells), *value.shape).clone() for name, value in baseline.items()
        }

    def put(self, wave: Sequence[int], measured: Mapping[str, Tensor]) -> None:
        """Keep the values of some cells."""
        index = torch.tensor(wave)
        for name, values in measured.items():
            self.values[name][index] = values.to(self.values[name].dtype)

    def by_component(self) -> dict[tuple[str, str], Tensor]:
        """`[sizes of the axes..., shape of the metric]` for each component and metric."""
        found, at = {}, 0
        for grid in dict.fromkeys(cell.grid for cell in self._cells):
            for name, values in self.values.items():
                here = values[at : at + len(grid)]
                found[grid.component, name] = here.reshape((*grid.shape, *here.shape[1:])).clone()
            at += len(grid)
        return found


def check_cells(
    count: int, found: Found, plain: PlainRuns, reader: MetricReader, cells: Sequence[Cell], seed: int
) -> None:
    """Compute some cells again without any shortcut.

    Raises:
        InexactError: one differs.
    """
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))[:count]
    for cell in sorted(order.tolist()):
        exact = reader.measure_whole(plain.logits(cell), cells[cell].label)
        for name, value in exact.items():
            got = found.values[name][cell]
            scale = max(1.0, float(value.abs().max()) if value.numel() else 1.0)
            if not torch.allclose(got.double(), value.double(), rtol=0, atol=TOLERANCE * scale):
                raise InexactError(
                    f"{cells[cell].label}: {name} is {got.tolist()} with shortcuts and {value.tolist()} without."
                    " Please report the model and the call."
                )
