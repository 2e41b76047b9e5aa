"""Pictures of sweeps of alignments: heat maps of the accuracy with its intervals, or curves over a single axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intervenable.alignment_sweep_result import AXES, AlignmentSweep
from intervenable.colour_scale import Scale
from intervenable.drawing import FAINT, INK, Cell, Picture, label_height, names_of, slanted, text_options
from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from intervenable.map_grids import PAGE, Grid, Map, draw_maps, large_grid, medium_grid, small_grid
from intervenable.optional_matplotlib import Axes
from intervenable.picture_labels import clipped, drawable, token_label, wrapped
from intervenable.sweep_profiles import SERIES

WITH_INTERVAL = (0.78, 0.4)
"""Inches of a cell that its value and the interval below it take."""
MOST_CELLS = 80
"""Cells of a map up to which values are written into them."""
TALLEST = 6.5
"""Inches of a map up to which its cells are made large enough for intervals."""


def plot_alignments(
    sweep: AlignmentSweep,
    *,
    title: str | None = None,
    limits: tuple[float, float] | None = None,
    marks: Iterable[Sequence[Any]] = (),
    show_values: bool | None = None,
    across: int | None = None,
) -> Picture:
    """Draw a sweep of alignments: layers upwards, positions to the right, a map for each rank.

    Where there is a single position (or a single layer) the accuracy is drawn as a curve for each rank instead, with
    a bar for each interval.

    Args:
        sweep: What `sweep_alignments` gave.
        title: What the picture shows; by default the component. Empty for none.
        limits: Values at the ends of the colour bar, or of the axis of values; by default 0 and 1, if these hold all.
        marks: Cells to put a frame around, each `(layer, position, rank)`; without a rank in every map.
        show_values: Whether to write values into the cells, and their intervals where these fit; by default in maps
            of up to 80 cells.
        across: How many maps stand in a row; by default as many as fit a page.

    Raises:
        UnknownNameError: a mark names a cell that is not there.
        ConfigError: a mark that does not say where a cell is, or marks where there are no maps.
    """
    heading = str(sweep.settings.get("component", "")).replace("_", " ") if title is None else title
    value_label = "IIA" if sweep.metric == "iia" else sweep.metric
    limits = limits or _limits(sweep)
    framed = [_place(sweep, mark) for mark in marks]
    labels = {axis: [clipped(token_label(name)) for name in names] for axis, names in sweep.labels.items()}
    if min(len(sweep.layers), len(sweep.positions)) == 1:
        if framed:
            raise ConfigError("Marks frame cells of maps, and over one axis there are none. Leave them out.")
        return _curves(sweep, labels, heading, value_label, limits)
    maps = [
        Map(
            labels["rank"][index] if len(sweep.ranks) > 1 else "",
            sweep.iia[:, :, index],
            names_of(labels["pos"], len(sweep.positions), "position"),
            [cell for cell, rank in framed if rank in (None, index)],
        )
        for index in range(len(sweep.ranks))
    ]
    scale = Scale(sweep.iia, "sequential", limits)
    grid, intervals = _grid(sweep, maps, show_values, across)
    figure = draw_maps(maps, labels["layer"], scale, grid, heading, value_label, "layer", "")
    if intervals:
        for index, axes in enumerate(figure.axes[: len(maps)]):
            ends = (sweep.low[:, :, index], sweep.high[:, :, index])
            _write_intervals(axes, sweep.iia[:, :, index], *ends, scale)
    return figure


def _limits(sweep: AlignmentSweep) -> tuple[float, float]:
    """From 0 to 1 if that holds all values, and as far as they reach if not."""
    return min(0.0, sweep.low.min().item()), max(1.0, sweep.high.max().item())


def _place(sweep: AlignmentSweep, mark: Sequence[Any]) -> tuple[Cell, int | None]:
    """Row and column of a cell to be framed, and the map it is in; None for every map."""
    if isinstance(mark, str) or len(mark) not in (2, 3):
        raise ConfigError(
            f"The mark {mark!r} does not say where a cell is. Give (layer, position) or with the rank."
        )
    found = []
    for axis, entries, wanted in zip(AXES, (sweep.layers, sweep.positions, sweep.ranks), mark, strict=False):
        if wanted not in entries:
            raise UnknownNameError(unknown_name(axis, wanted, map(str, entries)))
        found.append(entries.index(wanted))
    return (found[0], found[1]), found[2] if len(found) > 2 else None


def _grid(
    sweep: AlignmentSweep, maps: Sequence[Map], show_values: bool | None, across: int | None
) -> tuple[Grid, bool]:
    """Sizes of the cells, and whether intervals are written into them."""
    rows, columns = len(sweep.layers), len(sweep.positions)
    shown = rows * columns <= MOST_CELLS if show_values is None else show_values
    width, height = WITH_INTERVAL
    room = max(1, int(PAGE / (width * columns + 0.2)))
    if shown and width * columns <= PAGE and height * rows <= TALLEST:
        return Grid(min(across or room, len(maps)), WITH_INTERVAL), True
    if len(maps) == 1:
        return large_grid(rows, maps[0].columns, shown), False
    few = len(maps) <= 4
    grid = (medium_grid if few else small_grid)(len(maps), rows, columns, across)
    return replace(grid, values=shown and min(grid.cell) >= 0.22), False


def _write_intervals(axes: Axes, values: Tensor, low: Tensor, high: Tensor, scale: Scale) -> None:
    """Each value in its cell, and below it, smaller, where it lies."""
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            colour = scale.ink(value)
            ends = f"{low[row, column].item():.2f}–{high[row, column].item():.2f}".replace("-", "−")
            options: dict[str, Any] = {"ha": "center", "color": colour}
            axes.text(
                column + 0.5, row + 0.48, f"{value:.2f}".replace("-", "−"), va="bottom", fontsize=8, **options
            )
            axes.text(column + 0.5, row + 0.42, ends, va="top", fontsize=5.5, **options)


def _curves(
    sweep: AlignmentSweep,
    labels: dict[str, list[str]],
    title: str,
    value_label: str,
    limits: tuple[float, float],
) -> Picture:
    """A curve for each rank over layers, or dots over positions, with bars for the intervals."""
    along = "layer" if len(sweep.positions) == 1 else "pos"
    if len(sweep.layers) == len(sweep.positions) == 1 and len(sweep.ranks) > 1:
        along = "rank"
    order = [AXES.index(along), *(index for index, axis in enumerate(AXES) if axis != along)]
    values, low, high = (tensor.permute(order).flatten(1).T for tensor in (sweep.iia, sweep.low, sweep.high))
    series = labels["rank"] if along != "rank" else [""]
    names = labels[along]
    if along == "layer" and len(labels["pos"]) == 1 and labels["pos"][0]:
        title = ", ".join(filter(None, (title, labels["pos"][0])))
    elif along == "pos" and sweep.layers[0] is not None:
        title = ", ".join(filter(None, (title, f"layer {sweep.layers[0]}")))
    count = len(names)
    step = min(0.55, max(0.22, 7.0 / count))
    slant = slanted(names, step)
    width = max(3.6, step * count + 1.4)
    figure = Picture(figsize=(width, 2.9 + label_height(names, slant)), layout="constrained")
    axes = figure.add_subplot()
    apart = min(0.12, 0.5 / max(1, len(series)))
    for index, name in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * apart
        places = torch.arange(count) + shift
        colour = SERIES[index % len(SERIES)]
        reach = torch.stack([values[index] - low[index], high[index] - values[index]]).clamp(min=0)
        axes.errorbar(
            places.tolist(),
            values[index].tolist(),
            yerr=reach.numpy(),
            color=colour,
            linewidth=1.3 if along == "layer" else 0,
            elinewidth=1.1,
            marker="o",
            markersize=3.5,
            label=name,
        )
    axes.set(xlim=(-0.6, count - 0.4), ylim=(limits[0] - 0.02, limits[1] + 0.02))
    options = text_options(names, 7.5)
    if slant:
        options |= {"rotation": 55, "ha": "right", "va": "top", "rotation_mode": "anchor"}
    axes.set_xticks(range(count), list(names), **options)
    axes.set_xlabel("layer" if along == "layer" else "", **text_options(["layer"], 8.5))
    axes.set_ylabel(drawable(value_label), **text_options([value_label], 8.5))
    style_values(axes)
    if title:
        axes.set_title(wrapped(drawable(title), width - 0.4, 10), loc="left", **text_options([title], 10))
    if len(series) > 1:
        figure.legend(
            loc="outside lower center",
            frameon=False,
            fontsize=7.5,
            labelcolor=INK,
            ncols=min(len(series), max(2, int(width / 1.2))),
        )
    return figure


def style_values(axes: Axes) -> None:
    """Thin lines and small figures for axes of values."""
    axes.tick_params(labelsize=7.5, length=2.5, width=0.6, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=FAINT, linewidth=0.6)
