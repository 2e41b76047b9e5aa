"""Pictures of patching sweeps: which axis goes where, what is white, and what the colour bar says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from intervenable.colour_scale import Scale
from intervenable.drawing import MISSING, Palette, Picture, checked, names_of
from intervenable.errors import ConfigError, MetricError
from intervenable.map_grids import (
    Grid,
    Map,
    draw_maps,
    draw_overview,
    large_grid,
    medium_grid,
    small_grid,
    square_grid,
)
from intervenable.picture_labels import clipped, token_label
from intervenable.sweep_profiles import draw_profiles
from intervenable.sweep_result import SweepResult
from intervenable.token_text import Decodes

TOKENS = ("pos", "query", "key")
"""Axes whose entries are tokens."""
MOST_MAPS = 64
"""Maps in one picture that can still be told apart by their names."""
MOST_HEADS = 8
"""Heads of a layer that have a row of maps to themselves."""
FEW_MAPS = 4
"""Maps that are large enough for a label beside each row."""


def plot_sweep(
    result: SweepResult,
    tokenizer: Decodes | None = None,
    *,
    component: str | Sequence[str] | None = None,
    metric: str | None = None,
    normalized: bool = False,
    title: str | None = None,
    limits: tuple[float, float] | None = None,
    palette: Palette = "auto",
    marks: Iterable[Sequence[Any]] = (),
    show_values: bool | None = None,
    across: int | None = None,
    **select: Any,
) -> Picture:
    """Draw a sweep: layers upwards, tokens or heads to the right, a map for each head or component if there are more.

    What the patched run gives without a patch is white, and the colours say how far a patch moves it to either
    side; both unpatched runs are marked beside the colour bar. Over one axis it is a curve (layers) or bars, with a
    line for each unpatched run. What is no number stays grey.

    Args:
        result: What `sweep` gave.
        tokenizer: For the words below the columns, if the sweep had none.
        component: Which of several components; all by default, one map for each.
        metric: Which of several metrics.
        normalized: Draw `(v - corrupted) / (clean - corrupted)`: 0 is the corrupted run, 1 the clean one.
        title: What the picture shows; by default what was patched. Empty for none.
        limits: Values at the ends of the colour bar; by default those of the cells.
        palette: `diverging`, `sequential`, or `auto`: diverging where the value of the patched run is known.
        marks: Cells to put a frame around, each with an entry or label for each axis: `[(22, "is")]`.
        show_values: Whether to write the values into the cells; by default in one map of up to 80 cells.
        across: How many maps stand in a row; by default as many as fit a page.
        **select: Entries of axes as in `SweepResult.select`: `layer=3` draws the rest for that layer alone.

    Raises:
        MetricError: several metrics and none chosen, several numbers for each cell, or a baseline that is not known.
        ConfigError: an axis, entry, component or metric that is not there, or more maps than a picture can hold.

    Example:
        >>> import intervenable as iv
        >>> result = SweepResult(
        ...     axes=("layer", "pos"),
        ...     labels={"layer": ("0", "1"), "pos": ("of", "Spain")},
        ...     entries={"layer": (0, 1), "pos": (0, 1)},
        ...     results={("block_input", "logit"): torch.tensor([[0.0, 4.0], [1.0, 3.0]])},
        ...     clean={"logit": torch.tensor(4.0)},
        ...     corrupted={"logit": torch.tensor(0.0)},
        ... )
        >>> figure = result.plot(marks=[(0, "Spain")])
        >>> figure.axes[0].get_title(loc="left")
        'block input, clean into corrupted'
    """
    chosen = result.select(component=component, metric=metric, **select)
    name = _the_metric(chosen)
    if normalized:
        chosen = chosen.normalized()
    page = _Page.of(chosen, name, tokenizer, marks)
    runs = _unpatched(chosen, name)
    white = None if palette == "sequential" else runs.get(_patched_run(chosen))
    heading = _title(page.result) if title is None else title
    label = _value_label(name, chosen)

    if page.row is None:
        if page.marks:
            raise ConfigError("Marks frame cells of maps, and over one axis there are none. Leave them out.")
        return draw_profiles(
            {_spoken(part): values for part, values in page.values.items()},
            page.labels[page.column],
            page.name_of(page.column),
            heading,
            label,
            runs=runs,
            start=white or 0.0,
            curves=page.column == "layer",
            limits=limits,
        )
    everything = torch.cat([values.flatten() for values in page.values.values()])
    scale = Scale(everything, palette, limits, white, runs)
    maps = page.maps()
    if len(maps) > MOST_MAPS and page.facets == ("layer", "head") and len(page.values) == 1:
        return page.overview(maps, scale, heading, label)
    if len(maps) > MOST_MAPS:
        raise ConfigError(
            f"This would be {len(maps)} maps, and one picture holds {MOST_MAPS}. Choose some:"
            f" .plot({page.facets[0]}=[{', '.join(map(repr, chosen.entries[page.facets[0]][:2]))}])."
        )
    grid = page.grid(maps, show_values, across)
    rows, axes_names = page.labels[page.row], (page.name_of(page.row), page.name_of(page.column))
    return draw_maps(maps, rows, scale, grid, heading, label, *axes_names)


# --- what is said -----------------------------------------------------------------------------------------


def _the_metric(result: SweepResult) -> str:
    if len(result.metrics) > 1:
        names = ", ".join(map(repr, result.metrics))
        raise MetricError(
            f"A picture shows one metric, and there are several: {names}. Choose one: metric={result.metrics[0]!r}."
        )
    [name] = result.metrics
    shape = next(iter(result.results.values())).shape[len(result.axes) :]
    if shape:
        raise MetricError(
            f"{name!r} gave values of shape {tuple(shape)} for each cell, and a cell of a picture shows one number."
            " Draw their mean: result.mean().plot()."
        )
    return name


def _patched_run(result: SweepResult) -> str:
    return "clean" if result.settings.get("direction") == "noise" else "corrupted"


def _unpatched(result: SweepResult, metric: str) -> dict[str, float]:
    """The metric on the runs without a patch, as far as it is known and a number."""
    runs = {"clean": result.clean, "corrupted": result.corrupted}
    known = {name: values[metric].item() for name, values in runs.items() if metric in values}
    return {name: value for name, value in known.items() if isfinite(value)}


def _title(result: SweepResult) -> str:
    """What was patched, in which run, and where the rest was selected."""
    what = _spoken(result.components[0]) if len(result.components) == 1 else ""
    run, value = _patched_run(result), result.settings.get("value", "source")
    if value == "source":
        other = "corrupted" if run == "clean" else "clean"
        what = ", ".join(filter(None, (what, f"{other} into {run}")))
    else:
        done = {0: "set to zero", "mean": "set to its mean", "resample": "from other examples"}
        said = done.get(value, f"set to {value}" if isinstance(value, int | float) else "set to other values")
        what = f"{what} {said} in the {run} run".lstrip()
    selected = result.settings.get("selected", {})
    return ", ".join((what, *(f"{axis} {label}" for axis, label in selected.items())))


def _value_label(metric: str, result: SweepResult) -> str:
    return f"{_spoken(metric)}, normalized" if result.settings.get("normalized") else _spoken(metric)


def _spoken(name: str) -> str:
    """A name as words; what is no name but a path or a formula stays."""
    return name.replace("_", " ") if name.isidentifier() else name


# --- where it goes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Page:
    """Which axis goes where."""

    facets: tuple[str, ...]
    """Axes that have a map for each entry."""
    row: str | None
    column: str
    values: Mapping[str, Tensor]
    """`[*facets, row, column]` by component."""
    labels: Mapping[str, list[str]]
    marks: Sequence[Mapping[str, int]]
    """For each cell to be framed its index on each axis."""
    result: SweepResult
    """What is drawn."""

    @classmethod
    def of(
        cls,
        result: SweepResult,
        metric: str,
        tokenizer: Decodes | None,
        marks: Iterable[Sequence[Any]],
    ) -> _Page:
        if not result.axes:
            raise ConfigError("There is one value and no axis left to draw it over. Select less.")
        framed = [_indices(result, mark) for mark in marks]
        if len(result.axes) > 2:  # what is the same in all maps is no reason for another axis
            single = {axis: result.entries[axis][0] for axis in result.axes if len(result.entries[axis]) == 1}
            result = result.select(**dict(list(single.items())[: len(result.axes) - 1]))
        facets, row, column = _layout(result.axes)
        order = [result.axes.index(axis) for axis in (*facets, *([row] if row else []), column)]
        values = {part: result.results[part, metric].permute(order) for part in result.components}
        names = tuple("abcd"[: len(order)])
        return cls(
            facets,
            row,
            column,
            {part: checked(tensor, names) for part, tensor in values.items()},
            {axis: _labels(result, axis, tokenizer) for axis in result.axes},
            framed,
            result,
        )

    def name_of(self, axis: str) -> str:
        """What is written beside an axis: nothing beside words."""
        numbers = all(label.replace("-", "").isdigit() for label in self.labels[axis])
        if axis == "pos":
            return "position" if numbers else ""
        return axis

    def maps(self) -> list[Map]:
        """One map for each component and entry of the facets."""
        assert self.row is not None
        found = []
        for part, values in self.values.items():
            for index in product(*(range(size) for size in values.shape[:-2])):
                words = [f"{axis} {self.labels[axis][i]}" for axis, i in zip(self.facets, index, strict=True)]
                if len(self.values) > 1:
                    words.insert(0, _spoken(part))
                here = dict(zip(self.facets, index, strict=True))
                marks = [
                    (mark[self.row], mark[self.column])
                    for mark in self.marks
                    if all(mark[axis] == i for axis, i in here.items())
                ]
                columns = self.labels[self.column][: values.shape[-1]]
                found.append(Map(", ".join(words), values[index], columns, marks))
        return found

    def overview(self, maps: Sequence[Map], scale: Scale, title: str, value_label: str) -> Picture:
        """A row for each layer, without words."""
        layers, heads = (self.labels[axis] for axis in self.facets)
        table = [
            [maps[row * len(heads) + column].matrix for column in range(len(heads))]
            for row in range(len(layers))
        ]
        return draw_overview(table, layers, heads, scale, title, value_label, ("layer", "head"))

    def grid(self, maps: Sequence[Map], show_values: bool | None, across: int | None) -> Grid:
        """Sizes of the cells, and how many maps stand in a row."""
        assert self.row is not None
        count, rows, columns = len(maps), len(self.labels[self.row]), len(self.labels[self.column])
        if count == 1:
            shown = rows * columns <= 80 if show_values is None else show_values
            grid = large_grid(rows, maps[0].columns, shown)
        elif self.row == "query":
            heads = len(self.labels["head"]) if self.facets == ("layer", "head") else MOST_HEADS + 1
            grid = square_grid(count, rows, columns, across or (heads if heads <= MOST_HEADS else None))
        elif count <= FEW_MAPS:
            grid = medium_grid(count, rows, columns, across)
        else:
            grid = small_grid(count, rows, columns, across)
        return replace(
            grid, top_down=self.row != "layer", empty=MISSING, values=grid.values or bool(show_values)
        )


def _layout(axes: Sequence[str]) -> tuple[tuple[str, ...], str | None, str]:
    """Axes with a map for each entry, the axis of the rows, that of the columns."""
    if len(axes) == 1:
        return (), None, axes[0]
    tokens = [axis for axis in TOKENS if axis in axes]
    column = tokens[-1] if tokens else "head"
    row = tokens[-2] if len(tokens) > 1 else "layer" if "layer" in axes else "head"
    order = ("layer", "head", *TOKENS)
    return tuple(axis for axis in order if axis in axes and axis not in (row, column)), row, column


def _labels(result: SweepResult, axis: str, tokenizer: Decodes | None) -> list[str]:
    """What is written beside the entries of an axis."""
    labels: Sequence[str] = result.labels[axis]
    if axis in TOKENS:
        if tokenizer is not None:
            labels = _words(result, axis, tokenizer)
        labels = [clipped(token_label(label)) for label in labels]
    return names_of(labels, len(result.entries[axis]), axis)


def _words(result: SweepResult, axis: str, tokenizer: Decodes) -> list[str]:
    """The labels, with the text of a token in place of its number."""
    numbers = [
        label == str(entry) for label, entry in zip(result.labels[axis], result.entries[axis], strict=True)
    ]
    known = result.settings.get("tokens")
    if known is None and any(numbers):
        raise ConfigError(
            "The result does not know its tokens, so a tokenizer cannot name them. Give it to the sweep itself:"
            " sweep(..., tokenizer=tokenizer)."
        )
    labels = []
    for label, entry, number in zip(result.labels[axis], result.entries[axis], numbers, strict=True):
        token = known[entry] if known is not None and number and isinstance(entry, int) else None
        labels.append(label if token is None else tokenizer.decode([token]))
    return labels


def _indices(result: SweepResult, mark: Sequence[Any]) -> dict[str, int]:
    """Where a cell is, given by an entry or a label for each axis."""
    if isinstance(mark, str) or len(mark) != len(result.axes):
        raise ConfigError(
            f"The mark {mark!r} does not say where a cell is. Give an entry or a label for each of the axes"
            f" {', '.join(result.axes)}."
        )
    found = {}
    for axis, wanted in zip(result.axes, mark, strict=True):
        [entry] = result.select(**{axis: [wanted]}).entries[axis]
        found[axis] = result.entries[axis].index(entry)
    return found
