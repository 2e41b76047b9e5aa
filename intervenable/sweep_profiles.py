"""Pictures of a sweep over a single axis: curves or bars, with the unpatched runs as lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from intervenable.colour_scale import apart
from intervenable.drawing import FAINT, INK, Picture, label_height, slanted, text_options
from intervenable.optional_matplotlib import Axes
from intervenable.picture_labels import drawable, wrapped

SERIES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Colours that stay apart in every kind of colour vision: Wong (2011), https://doi.org/10.1038/nmeth.1618."""


def draw_profiles(
    series: Mapping[str, Tensor],
    labels: Sequence[str],
    axis: str,
    title: str,
    value_label: str,
    *,
    runs: Mapping[str, float],
    start: float,
    curves: bool,
    limits: tuple[float, float] | None,
) -> Picture:
    """Values along one axis.

    Args:
        series: `[entries]` by name; names are written only if there are several.
        labels: One for each entry; a series may end earlier.
        axis: What the entries are; empty for none.
        title: What the picture shows; empty for none.
        value_label: What the values are.
        runs: Values to draw a line at, by name.
        start: Where bars begin.
        curves: Whether entries follow each other and are joined by a line; bars otherwise.
        limits: Ends of the axis of values.
    """
    count = len(labels)
    step = min(0.55, max(0.14, 7.0 / count))
    slant = slanted(labels, step)
    width = max(3.6, step * count + 1.7)
    figure = Picture(figsize=(width, 2.9 + label_height(labels, slant)), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, tensor) in enumerate(series.items()):
        values = tensor.tolist()
        colour = SERIES[index % len(SERIES)]
        if curves:
            axes.plot(
                range(len(values)), values, color=colour, linewidth=1.4, marker="o", markersize=3, label=name
            )
        else:
            thick = 0.8 / len(series)
            left = [place - 0.4 + index * thick for place in range(len(values))]
            axes.bar(
                left,
                [value - start for value in values],
                thick,
                start,
                align="edge",
                color=colour,
                label=name,
            )
    axes.set_xlim(-0.6, count - 0.4)
    axes.margins(y=0.08)
    for value in runs.values():
        axes.axhline(value, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    if limits is not None:
        axes.set_ylim(*limits)
    _name_lines(axes, runs, 0.13 / 2.6)
    options = text_options(labels, 7.5)
    if slant:
        options |= {"rotation": 55, "ha": "right", "va": "top", "rotation_mode": "anchor"}
    axes.set_xticks(range(count), list(labels), **options)
    axes.set_xlabel(axis, **text_options([axis], 8.5))
    axes.set_ylabel(drawable(value_label), **text_options([value_label], 8.5))
    axes.tick_params(labelsize=7.5, length=2.5, width=0.6, color=FAINT, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=FAINT, linewidth=0.6)
    if title:
        axes.set_title(wrapped(drawable(title), width - 0.4, 10), loc="left", **text_options([title], 10))
    if len(series) > 1:
        above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": len(series)}
        legend = axes.legend(frameon=False, fontsize=7.5, labelcolor=INK, borderpad=0.2, **above)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _name_lines(axes: Axes, runs: Mapping[str, float], line: float) -> None:
    """The names of the lines to their right, none above another."""
    low, high = axes.get_ylim()
    within = sorted((value, name) for name, value in runs.items() if low <= value <= high)
    places = apart([value for value, _ in within], line * (high - low), low, high)
    for (_, name), place in zip(within, places, strict=True):
        axes.annotate(
            name,
            (1, place),
            (4, 0),
            xycoords=axes.get_yaxis_transform(),
            textcoords="offset points",
            va="center_baseline",
            annotation_clip=False,
            **text_options([name], 7.5),
        )
