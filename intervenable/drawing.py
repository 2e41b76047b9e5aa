"""What all pictures are made of: a figure, cells, labels, and how large they are."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from intervenable.errors import InputError
from intervenable.optional_matplotlib import Axes, Figure, Rectangle
from intervenable.picture_labels import drawable, families_of

if TYPE_CHECKING:
    from intervenable.colour_scale import Scale

Palette = Literal["auto", "sequential", "diverging"]
Cell = tuple[int, int]

INK, FAINT, MISSING, HIDDEN = "#222222", "#666666", "#e4e4e4", "#efefef"
LETTER = 0.075
"""Inches that a letter of a label takes."""


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
