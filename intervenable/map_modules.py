"""What kind of module a traced call is of, and tensors compared by value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.map_trace import Call, Slot

Key = tuple[int, int, int]
"""What equal tensors have in common, however their leading axes are folded."""


def key_of(tensor: Tensor) -> Key:
    """The same for tensors that are equal bit for bit, whether batch and positions are one axis or two."""
    plain = tensor.detach().contiguous()
    if plain.dtype == torch.bfloat16:
        plain = plain.float()
    last = plain.shape[-1] if plain.dim() else 1
    return last, plain.numel(), hash(plain.cpu().numpy().tobytes())


def output_slot(outputs: Mapping[Slot, Tensor], slot: Slot) -> Slot:
    """The slot of an output as a `Site` says it."""
    usual = slot in (None, 0) or (isinstance(slot, str) and slot == next(iter(outputs)))
    return None if usual else slot


# --- what kind of module ----------------------------------------------------------------------------------


def has_matrix(module: nn.Module) -> bool:
    """Whether there is a weight matrix in a module or in its parts."""
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def has_own_matrix(module: nn.Module) -> bool:
    """Whether there is a weight matrix in a module itself, packed ones included."""
    own: Any = module._parameters.values()
    return any(value is not None and value.dim() >= 2 for value in own) or hasattr(module, "in_features")


def is_linear(module: nn.Module) -> bool:
    """Whether a module is one linear map: a matrix of its own, of which it may be the quantised or adapted form."""
    weight = getattr(module, "weight", None)
    sized = isinstance(getattr(module, "in_features", None), int)
    return not isinstance(module, nn.Embedding) and (
        sized or (isinstance(weight, Tensor) and weight.dim() >= 2 and not any(module.children()))
    )


def is_norm(call: Call) -> bool:
    """Whether a module rescales vectors: it has no matrix, keeps the shape and is called a norm or has gains."""
    given, returned = call.main_input, call.main_output
    if given is None or returned is None or given.shape != returned.shape or not given.is_floating_point():
        return False
    name = type(call.module).__name__.lower()
    if has_matrix(call.module):
        return name.endswith("norm")
    if any(call.module.children()) or "norm" in name:
        return "norm" in name
    gains = [parameter for parameter in call.module.parameters() if parameter.numel() > 1]
    return bool(gains) and all(gain.shape == given.shape[-1:] for gain in gains)


def is_convolution(module: nn.Module) -> bool:
    """Whether a module is a convolution over positions: its own weights have three axes, the last a short one.

    One over a single position is a linear map.
    """
    weights = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    wide = all(weight.dim() == 3 and weight.shape[-1] > 1 for weight in weights)
    return "conv" in type(module).__name__.lower() and wide


def holds(call: Call, other: Call) -> bool:
    """Whether a call is another one, or that one was made inside it."""
    around: Call | None = other
    while around is not None:
        if around is call:
            return True
        around = around.parent
    return False


def is_elementwise(call: Call) -> bool:
    """Whether a module maps each number by itself: shuffling all numbers before or after is the same."""
    given, returned = call.main_input, call.main_output
    if given is None or returned is None or given.shape != returned.shape or has_matrix(call.module):
        return False
    if not given.is_floating_point() or key_of(given) == key_of(returned):
        return False
    order = torch.randperm(given.numel(), generator=torch.Generator().manual_seed(0)).to(given.device)
    shuffled = given.detach().flatten()[order].view_as(given)
    try:
        with torch.no_grad():
            result = call.module(shuffled)
    except (RuntimeError, TypeError, ValueError):
        return False
    if not isinstance(result, Tensor) or result.shape != returned.shape:
        return False
    return torch.allclose(result.flatten(), returned.detach().flatten()[order], rtol=1e-4, atol=1e-6)
