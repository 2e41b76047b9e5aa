"""From values to colours: palettes, what is white, and the bar that says what they mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from torch import Tensor

from intervenable.drawing import FAINT, INK, Palette, text_options
from intervenable.errors import InputError
from intervenable.optional_matplotlib import (
    Axes,
    Colormap,
    Figure,
    Line2D,
    ListedColormap,
    Normalize,
    ScalarMappable,
    colormaps,
)
from intervenable.picture_labels import drawable, wrapped

COLOURS = {"sequential": "Blues", "diverging": "RdBu_r"}
WITHIN_REACH = 1.6
"""A landmark that lies this many times as far from the centre as the values do is still on the colour bar."""
ROUNDING = 1e-5
"""Share of a landmark below which values do not differ: colours are not for rounding errors."""
TALLEST_BAR = 6.0
"""Inches."""


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

    @property
    def is_noted_above(self) -> bool:
        """Whether there is a note above the bar, of a landmark that lies beyond it."""
        return any(value > self.limits[1] for value in self.landmarks.values())

    def ink(self, value: float) -> str:
        """Black or white, whichever can be read on the colour of a value."""
        red, green, blue, _ = ScalarMappable(self.norm, self.colours).to_rgba(value)  # type: ignore[arg-type]
        return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"

    def draw_bar(self, figure: Figure, beside: Axes | list[Axes], label: str) -> None:
        """The colour bar, with the landmarks between it and the maps."""
        height = max(0.4, figure.get_figheight() - 1.0)
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
        bar.set_label(wrapped(drawable(label), shown + 0.5, 8.5), **text_options([label], 8.5))
        self._draw_landmarks(bar.ax, shown)

    def _draw_landmarks(self, bar: Axes, height: float) -> None:
        low, high = self.limits
        least = 0.14 / height * (high - low)
        within = sorted((value, name) for name, value in self.landmarks.items() if low <= value <= high)
        places = apart([value for value, _ in within], least, low, high)
        for (value, name), place in zip(within, places, strict=True):
            line = Line2D([-0.35, 1], [value, value], color=INK, linewidth=0.9, clip_on=False)
            line.set_transform(bar.get_yaxis_transform())
            bar.add_line(line)
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
        said = {name: f"{name} {value:.3g}".replace("-", "−") for name, value in self.landmarks.items()}
        above = [f"{said[name]} ↑" for name, value in self.landmarks.items() if value > high]
        below = [f"{said[name]} ↓" for name, value in self.landmarks.items() if value < low]
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
