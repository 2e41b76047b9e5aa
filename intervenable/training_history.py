"""The history of a training as a tensor, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

KINDS = ("step", "evaluation")
OF_STEPS = ("lr", "temperature", "gradient_norm")


def history_tensor(history: Sequence[dict[str, Any]], measures: Sequence[str]) -> Tensor:
    """`[rows, columns]` the history in float64, nan for what a row does not have."""
    columns = ["step", "epoch", *measures, *OF_STEPS]
    rows = [
        [float(KINDS.index(row["kind"])), *(_number(row.get(name)) for name in columns)] for row in history
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 1 + len(columns))


def history_from(values: Tensor, measures: Sequence[str]) -> list[dict[str, Any]]:
    """The history that such a tensor is of.

    Raises:
        ValueError, IndexError: it is of another one.
    """
    history = []
    for kind, step, epoch, *rest in values.tolist():
        row: dict[str, Any] = {"kind": KINDS[int(kind)], "step": int(step), "epoch": int(epoch)}
        row |= dict(zip(measures, rest, strict=False))
        if row["kind"] == "step":
            row |= dict(zip(OF_STEPS, rest[len(measures) :], strict=True))
            if row["temperature"] != row["temperature"]:
                row["temperature"] = None
        history.append(row)
    return history


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
