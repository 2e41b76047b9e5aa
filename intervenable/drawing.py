"""What all pictures are made of: a figure, a scale of colours, maps of cells and their labels."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from intervenable.errors import InputError, MissingExtraError

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingExtraError(
        f'Pictures need matplotlib, which is not installed ({error}). Run: pip install "intervenable[plots]"'
    ) from error

from intervenable.picture_labels import drawable, families_of

Palette = Literal["auto", "sequential", "diverging"]
Cell = tuple[int, int]

COLOURS = {"sequential": "Blues", "diverging": "RdBu_r"}
INK, FAINT, MISSING, HIDDEN = "#222222", "#666666", "#e4e4e4", "#efefef"
PAGE = 9.0
"""Inches that the maps of a picture may take side by side."""
TALLEST_BAR = 6.0
LETTER = 0.075
"""Inches that a letter of a label takes."""
WITHIN_REACH = 1.6
"""A landmark that lies this many times as far from the centre as the values do is still on the colour bar."""
ROUNDING = 1e-5
"""Share of a landmark below which values do not differ: colours are not for rounding errors."""


class Picture(Figure):
    """A figure that belongs to whoever asked for it: no global state, and a notebook shows it."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=110)
        return file.getvalue()


# --- what was given ---------------------------------------------------------------------------------------


def checked(values: Tensor, axes: tuple[str, ...]) -> Tensor:
    """The values as float32 with nan for what is not finite."""
    matrix = torch.as_tensor(values).detach().float().cpu()
    matrix = matrix.masked_fill(~matrix.isfinite(), torch.nan)
    if matrix.dim() != len(axes) or 0 in matrix.shape:
        raise InputError(
            f"The values have shape {tuple(matrix.shape)}; give [{', '.join(axes)}], none of them 0."
        )
    return matrix


def names_of(labels: Sequence[object] | None, count: int, kind: str, default: str = "{}") -> list[str]:
    """One text for each of so many things, in letters that can be drawn."""
    names = [default.format(index) for index in range(count)] if labels is None else list(map(str, labels))
    if len(names) != count:
        things = "queries" if kind == "query" else f"{kind}s"
        raise InputError(f"There are {len(names)} {kind} labels for {count} {things}. Give one for each.")
    return [drawable(name) for name in names]


# --- colours ----------------------------------------------------------------------------------------------


class Scale:
    """From values to colours.

    With a `centre`, that value is white and equally far to both sides is equally dark; the bar shows the part that
    there are values in. `landmarks` are values to find on the bar, by name.
    """

    def __init__(
        self,
        values: Tensor,
        palette: Palette = "auto",
        limits: tuple[float, float] | None = None,
        centre: float | None = None,
        landmarks: Mapping[str, float] | None = None,
    ) -> None:
        if palette not in ("auto", *COLOURS):
            raise InputError(f"palette={palette!r} is unknown. Allowed: auto, {', '.join(sorted(COLOURS))}.")
        if limits is not None and not limits[0] < limits[1]:
            raise InputError(f"limits={limits!r}: the first must be less than the second.")
        self.landmarks = dict(landmarks or {})
        finite = values[~values.isnan()]
        low = finite.min().item() if finite.numel() else centre or 0.0
        high = finite.max().item() if finite.numel() else centre or 0.0
        centred = palette != "sequential" and centre is not None
        diverging = (
            centred or palette == "diverging" or (palette == "auto" and min((low, *(limits or ()))) < 0)
        )
        colours = colormaps[COLOURS["diverging" if diverging else "sequential"]]
        self.colours: Colormap = colours
        if centred:
            assert centre is not None
            limits, self.colours = _around(centre, low, high, limits, self.landmarks.values(), colours)
        elif limits is None:
            reach = max(-low, high) or 1.0
            limits = (-reach, reach) if diverging else (min(low, 0.0), high if high > min(low, 0.0) else 1.0)
        self.limits = limits
        self.norm = Normalize(*limits)
        # Ends are marked by an arrow where values lie beyond them.
        slack = ROUNDING * (limits[1] - limits[0])
        self.extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[
            (low < limits[0] - slack, high > limits[1] + slack)
        ]

    def ink(self, value: float) -> str:
        """Black or white, whichever can be read on the colour of a value."""
        red, green, blue, _ = ScalarMappable(self.norm, self.colours).to_rgba(value)  # type: ignore[arg-type]
        return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"

    def draw_bar(self, figure: Figure, beside: Axes | list[Axes], label: str) -> None:
        """The colour bar, with the landmarks between it and the maps."""
        height = figure.get_figheight() - 1.0
        shown = min(height, TALLEST_BAR)
        bar = figure.colorbar(
            ScalarMappable(self.norm, self.colours),
            ax=beside,
            extend=self.extend,
            aspect=max(5.0, shown / 0.13),
            shrink=shown / height if height > shown else 1.0,
            anchor=(0.0, 1.0),
            pad=0.02,
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7.5, length=2, width=0.6, color=FAINT, labelcolor=INK)
        bar.set_label(drawable(label), **text_options([label], 8.5))
        self._draw_landmarks(bar.ax, shown)

    def _draw_landmarks(self, bar: Axes, height: float) -> None:
        low, high = self.limits
        least = 0.14 / height * (high - low)
        within = sorted((value, name) for name, value in self.landmarks.items() if low <= value <= high)
        places = apart([value for value, _ in within], least, low, high)
        for (value, name), place in zip(within, places, strict=True):
            line_at = {
                "color": INK,
                "linewidth": 0.9,
                "transform": bar.get_yaxis_transform(),
                "clip_on": False,
            }
            bar.plot([-0.35, 1], [value, value], **line_at)
            bar.annotate(
                name,
                (0, value),
                (-0.6, place),
                xycoords=bar.get_yaxis_transform(),
                ha="right",
                va="center_baseline",
                annotation_clip=False,
                **text_options([name], 7.5),
            )
        above = [f"{name} {value:.3g} ↑" for name, value in self.landmarks.items() if value > high]
        below = [f"{name} {value:.3g} ↓" for name, value in self.landmarks.items() if value < low]
        for texts, y, va in ((above, 1.0, "bottom"), (below, 0.0, "top")):
            if texts:
                bar.annotate(
                    "\n".join(texts),
                    (0.5, y),
                    (0, 9 if y else -9),
                    xycoords="axes fraction",
                    textcoords="offset points",
                    ha="center",
                    va=va,
                    annotation_clip=False,
                    **text_options(texts, 7.5),
                )


def _around(
    centre: float,
    low: float,
    high: float,
    limits: tuple[float, float] | None,
    landmarks: Iterable[float],
    colours: Colormap,
) -> tuple[tuple[float, float], Colormap]:
    """The range to show, and the part of a diverging palette that belongs to it."""
    marked = [value for value in landmarks if np.isfinite(value)]
    size = max(abs(value) for value in (centre, *marked))
    if limits is None:
        reach = max(high - centre, centre - low)
        if reach <= ROUNDING * size:
            reach = max((abs(value - centre) for value in marked), default=0.0) or size or 1.0
            low = high = centre
        near = [value for value in marked if abs(value - centre) <= WITHIN_REACH * reach]
        limits = (min(low, centre, *near), max(high, centre, *near))
        if limits[0] == limits[1]:
            limits = (centre - reach, centre + reach)
    reach = max(abs(limit - centre) for limit in limits)
    lowest, highest = ((limit - centre) / (2 * reach) + 0.5 for limit in limits)
    shares = np.linspace(lowest, highest, 512)
    return limits, ListedColormap(colours(shares))


def apart(values: Sequence[float], least: float, low: float, high: float) -> list[float]:
    """Places for labels near their sorted values, at least so far from each other, within the range."""
    places: list[float] = []
    for value in values:
        places.append(max(value, places[-1] + least) if places else max(value, low))
    if places and places[-1] > high:
        places[-1] = high
        for index in range(len(places) - 2, -1, -1):
            places[index] = min(places[index], places[index + 1] - least)
    return places


# --- sizes, in inches -------------------------------------------------------------------------------------


def slanted(names: Sequence[str], cell: float) -> bool:
    """Whether labels are too long to stand side by side."""
    return longest_line(names) * LETTER > cell * 1.05


def longest_line(names: Iterable[str]) -> int:
    """Letters of the longest line."""
    return max(len(line) for name in names for line in name.split("\n"))


def label_height(names: Sequence[str], slanted: bool) -> float:
    """What labels below a map take."""
    if slanted:
        return longest_line(names) * LETTER
    return max(name.count("\n") for name in names) * 0.15


def evenly(count: int, most: int) -> int:
    """How many of `count` things to put in a row, at most so many, that the rows are about equally full."""
    down = -(-count // most)
    return -(-count // down)


# --- ink --------------------------------------------------------------------------------------------------


def text_options(texts: Iterable[str], size: float) -> dict[str, Any]:
    """How a text is set: letters that its font has, and `$` as a letter."""
    return {"fontsize": size, "color": INK, "parse_math": False, "family": families_of(map(drawable, texts))}


def draw_cells(axes: Axes, matrix: Tensor, scale: Scale, cell: float, empty: str = MISSING) -> None:
    """A matrix in colours, the first row at the bottom. What is no number has the colour `empty`."""
    rows, columns = matrix.shape
    gap = min(1.0, 4 * cell) if cell >= 0.1 else 0.0
    axes.pcolormesh(matrix.numpy(), cmap=scale.colours, norm=scale.norm, edgecolors="white", linewidth=gap)
    axes.set_facecolor(empty)
    if empty == MISSING:  # no colour that a value may have
        axes.patch.set(hatch="/////", hatchcolor="white", hatch_linewidth=0.7)
    axes.set(xlim=(0, columns), ylim=(0, rows))
    bare(axes)


def bare(axes: Axes) -> None:
    """Axes without a frame and without ticks, but with labels."""
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=3, labelcolor=INK)


def label_rows(
    axes: Axes, names: Sequence[str], axis: str, cell: float, size: float = 7.5, step: int | None = None
) -> None:
    """Names beside the rows; of many low ones, some."""
    step = step or (1 if cell >= 0.13 else 5)
    places = [row + 0.5 for row in range(0, len(names), step)]
    axes.set_yticks(places, list(names)[::step], **text_options(names, size))
    axes.set_ylabel(axis, **text_options([axis], 8.5))


def label_columns(
    axes: Axes,
    names: Sequence[str],
    axis: str,
    slanted: bool,
    cell: float,
    size: float | None = None,
    step: int = 1,
) -> None:
    """Names below the columns, slanted if they are too long to stand side by side."""
    places = [column + 0.5 for column in range(0, len(names), step)]
    options = text_options(names, size or (8.5 if cell > 0.3 else 7.5))
    if slanted:
        options |= {"rotation": 55, "ha": "right", "va": "top", "rotation_mode": "anchor"}
    axes.set_xticks(places, list(names)[::step], **options)
    axes.set_xlabel(axis, **text_options([axis], 8.5))
    axes.tick_params(axis="x", labelbottom=True)


def frame(axes: Axes, row: int, column: int) -> None:
    """A frame around one cell."""
    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=INK, linewidth=1.4, clip_on=False))


def write_values(axes: Axes, matrix: Tensor, scale: Scale, size: float = 7) -> None:
    """The values in their cells."""
    reach = max(map(abs, scale.limits))
    digits = 2 if reach < 10 else 1 if reach < 100 else 0
    for row, line in enumerate(matrix.tolist()):
        for column, value in enumerate(line):
            if value == value:
                text = f"{value:.{digits}f}".replace("-", "−")
                text = text if text.strip("−0.") else text.lstrip("−")
                place = (column + 0.5, row + 0.5)
                axes.text(*place, text, ha="center", va="center", fontsize=size, color=scale.ink(value))


# --- several maps -----------------------------------------------------------------------------------------


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
    _draw_title(figure, title, axes_of[0, 0] if len(maps) == 1 and not maps[0].name else None)
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
    _draw_title(figure, title, axes)
    scale.draw_bar(figure, axes, value_label)
    return figure


def _draw_title(figure: Figure, title: str, axes: Axes | None) -> None:
    """Above the map if there is one, else above all of them."""
    if title and axes is not None:
        axes.set_title(drawable(title), loc="left", **text_options([title], 10))
    elif title:
        figure.suptitle(drawable(title), x=0.01, ha="left", **text_options([title], 10))
