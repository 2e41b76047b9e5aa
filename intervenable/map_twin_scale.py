"""Activations of a random model brought to the size that they have in one that was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from intervenable.hooks import Hook, hooked
from intervenable.passage import Passage


def settle(model: nn.Module, run: Callable[[], Any]) -> Any:
    """Give batch norms the statistics of what they are given.

    With those that they are made with they norm nothing: a random model hands on more from block to block, until each
    softmax chooses one position and nothing that is written moves it.

    Args:
        model: The model, in evaluation mode.
        run: Runs it.

    Returns:
        What it returns with these statistics.
    """
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm) and part.track_running_stats]
    with torch.no_grad():
        if not norms:
            return run()
        with hooked([Hook(norm, "input", _take_statistics) for norm in norms], model):
            return run()


def _take_statistics(passage: Passage) -> None:
    """The statistics of what goes into a batch norm, which it then is normed with."""
    norm: Any = passage.module
    given = passage.take("input", None)
    others = [axis for axis in range(given.dim()) if axis != 1]
    if given.numel() > given.shape[1]:  # of one number there are none
        norm.running_mean.copy_(given.mean(others))
        norm.running_var.copy_(given.var(others, unbiased=False))
