"""One map or several side by side on a page, all on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from intervenable.colour_scale import Scale
from intervenable.drawing import (
    HIDDEN,
    LETTER,
    MISSING,
    Cell,
    Picture,
    bare,
    draw_cells,
    evenly,
    frame,
    label_columns,
    label_height,
    label_rows,
    longest_line,
    slanted,
    text_options,
    write_values,
)
from intervenable.errors import InputError
from intervenable.optional_matplotlib import Axes, Figure, Rectangle
from intervenable.picture_labels import drawable, wrapped

PAGE = 9.0
"""Inches that the maps of a picture may take side by side."""


@dataclass(frozen=True)
class Map:
    """One of several maps of a picture."""

    name: str
    matrix: Tensor
    """`[rows, columns]`"""
    columns: Sequence[str]
    """A label for each column."""
    marks: Sequence[Cell] = ()
    """Cells to put a frame around."""


@dataclass(frozen=True)
class Grid:
    """How several maps are put on one page."""

    across: int
    cell: tuple[float, float]
    """Inches of a cell: width, height."""
    row_size: float = 7.5
    """Points of the letters beside the rows."""
    column_size: float | None = None
    row_step: int | None = None
    """Every how many rows there is a label."""
    column_step: int = 1
    top_down: bool = False
    """Whether the first row is at the top."""
    empty: str = MISSING
    """The colour of what is no number."""
    values: bool = False
    """Whether values are written into the cells."""


def draw_maps(
    maps: Sequence[Map],
    rows: Sequence[str],
    scale: Scale,
    grid: Grid,
    title: str = "",
    value_label: str = "",
    row_axis: str = "",
    column_axis: str = "",
) -> Picture:
    """Maps of equal rows side by side, on one scale. Columns may be of different numbers."""
    if grid.across < 1:
        raise InputError(f"across={grid.across}: give at least 1 map in a row.")
    across = min(grid.across, len(maps))
    down = -(-len(maps) // across)
    width_of_cell, height_of_cell = grid.cell
    widths = [max(len(panel.columns) for panel in maps[column::across]) for column in range(across)]
    slant = any(slanted(panel.columns, width_of_cell * grid.column_step) for panel in maps)
    beside = longest_line(rows) * LETTER
    below = max(label_height(panel.columns, slant) for panel in maps)
    names = 0.32 if any(panel.name for panel in maps) else 0.1
    figure = Picture(
        figsize=(
            max(4.0, width_of_cell * sum(widths) + across * 0.17 + beside + 1.3),
            down * (height_of_cell * len(rows) + names) + 0.55 + below,
        ),
        layout="constrained",
    )
    axes_of = figure.subplots(down, across, squeeze=False, sharey=True, width_ratios=widths)
    for index, axes in enumerate(axes_of.flat):
        if index >= len(maps):
            axes.set_visible(False)
            continue
        panel, widest = maps[index], widths[index % across]
        draw_cells(axes, panel.matrix, scale, min(grid.cell), grid.empty)
        if len(panel.columns) < widest:
            # Cells are as wide as those of the map above: what is left over is no part of this one.
            axes.set(xlim=(0, widest), facecolor="none")
            axes.patch.set_hatch(None)
            axes.add_patch(Rectangle((0, 0), len(panel.columns), len(rows), color=grid.empty, zorder=-1))
        if grid.top_down:
            axes.set_ylim(len(rows), 0)
        if panel.name:
            axes.set_title(drawable(panel.name), pad=3, **text_options([panel.name], 8))
        for row, column in panel.marks:
            frame(axes, row, column)
        if grid.values:
            write_values(axes, panel.matrix, scale)
        if index % across == 0:
            label_rows(axes, rows, row_axis, height_of_cell, grid.row_size, grid.row_step)
        lowest = index + across >= len(maps)
        if lowest or panel.columns != maps[index + across].columns:
            label_columns(
                axes, panel.columns, column_axis, slant, width_of_cell, grid.column_size, grid.column_step
            )
        else:
            axes.tick_params(axis="x", labelbottom=False)
        if lowest and index // across < down - 1:
            axes.xaxis.set_in_layout(False)  # its labels hang into the empty place below
    _draw_title(figure, title, scale, axes_of[0, 0] if len(maps) == 1 and not maps[0].name else None)
    scale.draw_bar(figure, list(axes_of.flat), value_label)
    return figure


def draw_overview(
    matrices: Sequence[Sequence[Tensor]],
    rows: Sequence[str],
    columns: Sequence[str],
    scale: Scale,
    title: str,
    value_label: str,
    axes_names: tuple[str, str],
    empty: str = HIDDEN,
) -> Picture:
    """Very many matrices `[queries, keys]` in rows and columns, the first row at the bottom, without tokens."""
    side = max(0.3, min(PAGE / len(columns), 12.0 / len(rows), 1.2))
    width, height = max(4.0, len(columns) * side + 1.6), max(2.4, len(rows) * side + 1.0)
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    colours = scale.colours.with_extremes(bad=empty)
    gap = 0.05
    # One set of axes for all: hundreds of them would take minutes.
    for row, line in enumerate(matrices):
        for column, matrix in enumerate(line):
            extent = (column + gap, column + 1 - gap, row + gap, row + 1 - gap)
            axes.imshow(matrix.numpy(), cmap=colours, norm=scale.norm, extent=extent, aspect="auto")
    axes.set(xlim=(0, len(columns)), ylim=(0, len(rows)))
    bare(axes)
    label_rows(axes, rows, axes_names[0], side)
    label_columns(axes, columns, axes_names[1], False, side)
    _draw_title(figure, title, scale, axes)
    scale.draw_bar(figure, axes, value_label)
    return figure


def _draw_title(figure: Figure, title: str, scale: Scale, axes: Axes | None) -> None:
    """Above the map if there is one, else above all of them."""
    room = figure.get_figwidth() - (1.3 if axes is not None and scale.is_noted_above else 0.4)
    text = wrapped(drawable(title), room, 10)
    if text and axes is not None:
        axes.set_title(text, loc="left", **text_options([text], 10))
    elif text:
        figure.suptitle(text, x=0.01, ha="left", **text_options([text], 10))


# --- sizes, in inches -------------------------------------------------------------------------------------


def large_grid(rows: int, columns: Sequence[str], values: bool) -> Grid:
    """One map: wide enough for words when there are few columns, narrow enough for a page when there are many."""
    widest = 0.62 if longest_line(columns) > 3 else 0.46 if values else 0.36
    width, height = min(widest, max(0.23, 7.0 / len(columns))), min(0.34, max(0.15, 4.6 / rows))
    return Grid(1, (width, height), values=values)


def medium_grid(maps: int, rows: int, columns: int, across: int | None = None) -> Grid:
    """A few maps side by side."""
    across = across or evenly(maps, most=max(1, int(PAGE / (0.16 * columns + 0.2))))
    width = min(0.5, max(0.14, (PAGE / across - 0.2) / columns))
    return Grid(across, (width, min(0.3, max(0.14, 4.4 / rows))))


def small_grid(maps: int, rows: int, columns: int, across: int | None = None) -> Grid:
    """Small maps, as many in a row as fit a page; of very many tokens not all are named."""
    least = 0.11 if maps <= 9 else 0.05
    width, height = min(0.3, max(least, 1.6 / columns)), min(0.24, max(0.07, 2.2 / rows))
    across = across or evenly(maps, most=max(1, int(PAGE / (width * columns + 0.2))))
    down = -(-maps // across)
    height = min(height, max(0.04, (14.0 / down - 0.35) / rows))
    return Grid(across, (width, height), column_step=max(1, round(0.1 / width)))


def square_grid(maps: int, queries: int, keys: int, across: int | None = None) -> Grid:
    """Maps of tokens by tokens, the first query at the top, with names for as many tokens as can be told apart."""
    cell = min(0.3, (PAGE / min(maps, across or 3) - 0.15) / max(queries, keys))
    size = min(7.5, 60 * cell) if cell >= 0.08 else 6.0
    step = max(1, round(0.09 / cell))
    across = across or evenly(maps, most=max(1, int(PAGE / (cell * keys + 0.15))))
    return Grid(across, (cell, cell), size, size, step, step, top_down=True, empty=HIDDEN)
