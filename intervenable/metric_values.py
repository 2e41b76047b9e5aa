"""What a metric may give back, as a tensor."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intervenable.errors import MetricError

ALLOWED = "a number (float, int or bool) or a tensor of numbers of any shape"


def as_value(given: Any, name: str) -> Tensor:
    """What a metric gave as a tensor of its own on the CPU, of float64 if it was that and float32 otherwise.

    Args:
        given: What it gave.
        name: The metric's name, for messages.

    Raises:
        MetricError: it is no number and no tensor of numbers.

    Example:
        >>> as_value(3, "three"), as_value(torch.tensor([True, False]), "truths")
        (tensor(3.), tensor([1., 0.]))
    """
    if isinstance(given, Tensor):
        value = given.detach()
    elif isinstance(given, (np.ndarray, np.generic)) and given.dtype.kind in "fiub":
        value = torch.from_numpy(np.array(given))
    elif isinstance(given, (numbers.Real, bool)):
        return torch.tensor(float(given))
    else:
        raise MetricError(f"The metric {name!r} gave {_described(given)}. It has to give {ALLOWED}.")
    if value.dtype.is_complex or value.is_sparse or value.is_quantized or value.numel() == 0:
        raise MetricError(
            f"The metric {name!r} gave a tensor of {value.dtype} and shape {tuple(value.shape)}. It has to give"
            f" {ALLOWED}, which are real and at least one."
        )
    kind = torch.float64 if value.dtype == torch.float64 else torch.float32
    return value.to(device="cpu", dtype=kind, copy=True)


def has_nan(value: Tensor) -> bool:
    """Whether a value, or any number of it, is NaN."""
    if value.numel() == 1:
        number = value.item()
        return number != number
    return bool(value.isnan().any())


def _described(given: Any) -> str:
    if given is None:
        return "nothing (None): it may lack a return"
    if isinstance(given, (list, tuple)):
        return f"a {type(given).__name__} of {len(given)}: torch.stack or torch.tensor makes it a tensor"
    if isinstance(given, dict):
        return "a dict: give sweep a mapping of metrics instead, one for each number"
    return f"{given!r:.60}, a {type(given).__name__}"
