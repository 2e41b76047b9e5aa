"""The history of a training as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from intervenable.drawing import FAINT, INK, Picture, text_options
from intervenable.optional_matplotlib import Axes

BATCHES, HELD_OUT = "#9db8d9", "#1f5fa8"
OTHER = ("kind", "step", "epoch", "lr", "temperature", "gradient_norm")


def plot_history(history: Sequence[dict[str, Any]], title: str | None = None) -> Picture:
    """A panel for the loss and each metric, over the steps: batches as they came, their mean in each epoch, and
    the evaluations.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    names = [name for name in history[0] if name not in OTHER]
    figure = Picture(figsize=(3.6 * len(names) + 0.4, 2.7), layout="constrained")
    steps = [row for row in history if row["kind"] == "step"]
    held_out = [row for row in history if row["kind"] == "evaluation"]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axes.plot(
            [row["step"] for row in steps],
            [row[name] for row in steps],
            color=BATCHES,
            lw=0.8,
            label="training, batches",
        )
        _means(axes, steps, name)
        if held_out:
            places, values = [row["step"] for row in held_out], [row[name] for row in held_out]
            axes.plot(places, values, color=INK, lw=1.2, marker="o", ms=3, label="evaluation")
        _dress(axes, name)
    figure.axes[0].legend(frameon=False, fontsize=7.5, labelcolor=INK)
    if title:
        figure.suptitle(title, **text_options([title], 9.5))
    return figure


def _means(axes: Axes, steps: Sequence[dict[str, Any]], name: str) -> None:
    epochs: dict[int, list[dict[str, Any]]] = {}
    for row in steps:
        epochs.setdefault(row["epoch"], []).append(row)
    middles = [sum(row["step"] for row in rows) / len(rows) for rows in epochs.values()]
    means = [sum(row[name] for row in rows) / len(rows) for rows in epochs.values()]
    axes.plot(middles, means, color=HELD_OUT, lw=1.6, label="training, mean of each epoch")


def _dress(axes: Axes, name: str) -> None:
    shown = name.upper() if name == "iia" else name.replace("_", " ")
    if name in ("iia", "accuracy", "probability"):
        axes.set_ylim(-0.03, 1.03)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("step", **text_options(["step"], 8.5))
    axes.set_title(shown, loc="left", **text_options([shown], 9))
    axes.tick_params(labelsize=7.5, labelcolor=INK, color=FAINT)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
