"""The picture of a comparison of methods: dots with intervals, and controls as open marks beside them."""

from __future__ import annotations

from typing import Any

from intervenable.alignment_comparison_result import CONTROLS, MethodComparison, sizes_text
from intervenable.alignment_plots import style_values
from intervenable.alignment_statistics import Estimate
from intervenable.drawing import FAINT, INK, LETTER, Picture, longest_line, text_options
from intervenable.optional_matplotlib import Axes
from intervenable.picture_labels import drawable, wrapped
from intervenable.sweep_profiles import SERIES

MARKS = {"random": ("s", SERIES[1]), "shuffled": ("^", SERIES[2]), "untrained": ("D", SERIES[3])}
"""Shape and colour of each control."""
ROW = 0.5
"""Inches of a method."""
UNITS = {"dbm": "dims", "sae": "features", "full": "dims"}


def plot_comparison(
    comparison: MethodComparison,
    *,
    title: str | None = None,
    limits: tuple[float, float] | None = None,
) -> Picture:
    """Draw a comparison: a row for each method, the first at the top.

    A filled dot is a method and an open mark one of its controls, each with its interval; the dashed line is the
    accuracy without any intervention.

    Args:
        comparison: What `compare_methods` gave.
        title: What the picture shows; by default where the methods intervene. Empty for none.
        limits: Ends of the axis of values; by default 0 and 1, if these hold all.
    """
    names = [_name(comparison, index) for index in range(len(comparison))]
    heading = comparison.place.replace("_", " ") if title is None else title
    beside = longest_line(names) * LETTER
    figure = Picture(figsize=(beside + 4.6, ROW * len(comparison) + 1.35), layout="constrained")
    axes = figure.add_subplot()
    shown: dict[str, Any] = {}
    controls = comparison.controls
    step = min(0.17, 0.6 / (1 + len(controls)))
    for row, method in enumerate(comparison):
        top = row - step * len(controls) / 2
        line = _draw(axes, method.iia, top, "o", INK, filled=True)
        shown.setdefault("method", line)
        for index, name in enumerate(controls):
            if name in method.controls:
                mark, colour = MARKS.get(name, ("v", SERIES[0]))
                line = _draw(axes, method.control(name), top + step * (index + 1), mark, colour, filled=False)
                shown.setdefault(CONTROLS.get(name, name), line)
    floor = comparison.unpatched.value
    shown["no intervention"] = axes.axvline(
        floor, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0
    )
    for row in range(1, len(comparison)):
        axes.axhline(row - 0.5, color="#e8e8e8", linewidth=0.6, zorder=0)
    low, high = limits or _limits(comparison)
    axes.set(xlim=(low - 0.02 * (high - low), high + 0.02 * (high - low)), ylim=(len(comparison) - 0.5, -0.5))
    axes.set_yticks(range(len(names)), names, **text_options(names, 8.5))
    label = "IIA" if comparison.metric == "iia" else comparison.metric
    axes.set_xlabel(drawable(label), **text_options([label], 8.5))
    style_values(axes)
    axes.tick_params(axis="y", length=0, labelsize=8.5)
    if heading:
        axes.set_title(
            wrapped(drawable(heading), beside + 4.2, 10), loc="left", **text_options([heading], 10)
        )
    order = ("method", *(CONTROLS.get(name, name) for name in controls), "no intervention")
    figure.legend(
        [shown[name] for name in order if name in shown],
        [name for name in order if name in shown],
        loc="outside lower center",
        frameon=False,
        fontsize=7.5,
        labelcolor=INK,
        ncols=3,
        handletextpad=0.4,
        columnspacing=1.4,
    )
    return figure


def _name(comparison: MethodComparison, index: int) -> str:
    """The method, and below it how much it swaps."""
    method = comparison.methods[index]
    unit = UNITS.get(method.name)
    size = sizes_text(method.size)
    return drawable(f"{method.title}\n{f'{size} {unit}' if unit else f'rank {size}'}")


def _draw(axes: Axes, estimate: Estimate, row: float, mark: str, colour: str, *, filled: bool) -> Any:
    reach = [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
    return axes.errorbar(
        [estimate.value],
        [row],
        xerr=reach,
        fmt=mark,
        color=colour,
        markerfacecolor=colour if filled else "white",
        markersize=6 if filled else 4.2,
        markeredgewidth=1.0,
        elinewidth=1.5 if filled else 0.9,
        clip_on=False,
        zorder=3 if filled else 2,
    )


def _limits(comparison: MethodComparison) -> tuple[float, float]:
    """From 0 to 1 if that holds all values, and as far as they reach if not."""
    found = [comparison.unpatched]
    for method in comparison:
        found += [method.iia, *map(method.control, method.controls)]
    return min(0.0, *(each.low for each in found)), max(1.0, *(each.high for each in found))
