"""What a metric may give back, as a tensor."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intervenable.errors import IntervenableError, MetricError

Function = Callable[[Tensor], Any]
"""A function of logits `[b, s, V]`."""

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


def plain_value(metric: Function, logits: Tensor, name: str, place: str) -> Tensor:
    """What a metric gives for logits that are all known.

    Args:
        metric: The metric, which is given logits of its own.
        logits: `[b, s, V]`.
        name: The metric's name, for messages.
        place: What the logits are of, for messages.

    Raises:
        MetricError: it fails, or gives NaN or no number.

    Example:
        >>> plain_value(torch.mean, torch.ones(1, 2, 3), "mean", "a test")
        tensor(1.)
    """
    try:
        value = as_value(metric(logits.detach().clone()), name)
    except MetricError as error:
        raise MetricError(f"{error} (At {place}.)") from error
    except IntervenableError:
        raise
    except Exception as error:
        raise MetricError(f"The metric {name!r} failed at {place}: {said(error)}") from error
    if has_nan(value):
        shown = f" ({value.tolist()})" if 1 < value.numel() < 10 else ""
        why = (
            "some of the logits are NaN: the model gave them."
            if bool(logits.isnan().any())
            else "all logits are numbers. Look at what it divides by, and at infinities that it subtracts."
        )
        raise MetricError(f"The metric {name!r} is NaN at {place}{shown}, where {why}")
    return value


def said(error: Exception) -> str:
    """An error of someone else's, in a sentence."""
    return f"{type(error).__name__}: {error}".rstrip(".: ") + "."
