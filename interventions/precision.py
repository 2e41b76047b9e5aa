"""In which precision subspace arithmetic is done: float32 at least, whatever the model runs in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float64 for float64, else float32.

    Rotating in bfloat16 would leak the rounding of the basis out of the subspace.

    >>> working_dtype(torch.zeros(1, dtype=torch.bfloat16)), working_dtype(torch.zeros(1).double())
    (torch.float32, torch.float64)
    """
    return torch.promote_types(tensor.dtype, torch.float32)


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Run `function` with autocast switched off: it would turn the float32 products into bfloat16 ones.

    The device is that of the first tensor among the positional arguments.
    """

    @functools.wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> T:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        device = next(tensors).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return precise
