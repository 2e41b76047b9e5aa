"""Whether what a hook does happens in a part of a model that backward will compute again, without the hook.

Layers of transformers' models that are checkpointed are looked after by `intervenable.hooks`. Models that call
`torch.utils.checkpoint` themselves give no handle on the second computation.
"""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import nn

from intervenable.errors import UnsupportedModelError


def check_not_computed_again(module: nn.Module) -> None:
    """That backward will not compute a module again without an edit that was just made in it.

    Called from a hook, in a run that was begun with gradients on.

    Raises:
        UnsupportedModelError: it will.
    """
    plain = torch.is_grad_enabled() and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    if not plain and _in_checkpoint(sys._getframe(1)):
        raise UnsupportedModelError(
            f"{type(module).__name__} is in a part of the model that torch.utils.checkpoint runs: backward would"
            " compute it again without the edit, and gradients would be wrong. Switch checkpointing off, or run under"
            " torch.no_grad()."
        )


def _in_checkpoint(frame: FrameType | None) -> bool:
    """Whether a frame of a run of ours is called by torch's checkpointing, inside that run."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "torch.utils.checkpoint":
            return True
        if name.startswith("intervenable.") and name not in ("intervenable.hooks", __name__):
            return False  # the run as a whole may be checkpointed, with its hooks
        frame = frame.f_back
    return False
