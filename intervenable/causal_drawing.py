"""Causal models as pictures: a box for each variable, a line from each parent to its child, inputs on the left."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from intervenable.causal_layout import Layout, laid_out
from intervenable.causal_values import Setting
from intervenable.drawing import INK, Picture, longest_line, names_of, text_options
from intervenable.optional_matplotlib import Axes, Rectangle
from intervenable.picture_labels import clipped

if TYPE_CHECKING:
    from intervenable.causal_model import CausalModel

KINDS = {"input": "#ffffff", "internal": "#d6e6f4", "output": "#8bb8dd"}
"""Colours of boxes, the further from the inputs the darker."""

LINE = "#8a8a8a"
ROW, COLUMN = 0.62, 0.75
"""Inches between boxes of a column, and from one column's boxes to the next."""

LETTER = 0.085
LONGEST = 24


def draw_model(model: CausalModel, setting: Setting | None, title: str) -> Picture:
    """See `CausalModel.draw`."""
    found = None if setting is None else model.run(setting)
    texts = dict(
        zip(model.variables, names_of(_texts(model, found), len(model.variables), "variable"), strict=True)
    )
    layout = laid_out(model)
    across = max(0.5, LETTER * longest_line(texts.values()) + 0.2)
    high = 0.26 + 0.16 * (found is not None)
    width, height = _size(layout, across, high)
    figure = Picture(figsize=(width, height + 0.3 * bool(title)))
    axes = figure.add_axes((0, 0, 1, height / (height + 0.3 * bool(title))))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    if title:
        figure.suptitle(title, y=0.98, va="top", **text_options([title], 9.5))
    left, bottom = layout.corner
    inches = {
        node: (
            0.1 + across / 2 + (x - left) * (across + COLUMN),
            0.1 + high / 2 + (y - bottom) * (high - 0.26 + ROW),
        )
        for node, (x, y) in layout.places.items()
    }
    for route in layout.routes:
        _line(axes, [inches[node] for node in route], across)
    forced = set() if setting is None else {name for name in setting if model.parents[name]}
    for name in model.variables:
        _box(axes, inches[name], texts[name], KINDS[_kind(model, name)], name in forced, (across, high))
    return figure


def _texts(model: CausalModel, found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return [clipped(name, LONGEST) for name in model.variables]
    return [f"{clipped(name, LONGEST)}\n{clipped(str(found[name]), LONGEST)}" for name in model.variables]


def _kind(model: CausalModel, name: str) -> str:
    if not model.parents[name]:
        return "input"
    return "internal" if model.children[name] else "output"


def _size(layout: Layout, across: float, high: float) -> tuple[float, float]:
    columns, rows = layout.extent
    return columns * (across + COLUMN) + across + 0.2, rows * (high - 0.26 + ROW) + high + 0.2


def _line(axes: Axes, points: list[tuple[float, float]], across: float) -> None:
    """A line from the right of one box, past what lies between, to the left of another, with a head."""
    bends: list[tuple[float, float]] = []
    for place, (x, y) in enumerate(points):
        bends += [(x - across / 2, y)] * (place > 0) + [(x + across / 2, y)] * (place < len(points) - 1)
    for start, end in pairwise(bends[:-1]):
        axes.plot(*zip(start, end, strict=True), color=LINE, linewidth=1.1, solid_capstyle="round", zorder=1)
    axes.annotate(
        "",
        bends[-1],
        bends[-2],
        arrowprops={
            "arrowstyle": "-|>",
            "color": LINE,
            "linewidth": 1.1,
            "shrinkA": 0,
            "shrinkB": 0,
            "mutation_scale": 9,
        },
        zorder=1,
    )


def _box(
    axes: Axes, place: tuple[float, float], text: str, colour: str, forced: bool, size: tuple[float, float]
) -> None:
    (x, y), (across, high) = place, size
    corner = (x - across / 2, y - high / 2)
    axes.add_patch(
        Rectangle(
            corner, across, high, facecolor=colour, edgecolor=INK, linewidth=2.2 if forced else 0.8, zorder=2
        )
    )
    lines = text.split("\n")
    for row, line in enumerate(lines):
        options = text_options([line], 9 if row == 0 else 8.5)
        shift = 0.085 * (len(lines) - 1) * (1 if row == 0 else -1)
        weight = "bold" if row == 0 and len(lines) > 1 else "normal"
        axes.text(x, y + shift, line, ha="center", va="center_baseline", weight=weight, zorder=3, **options)
