"""Tensors of a traced block compared by value: which module was given what another had returned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intervenable.map_trace import Call, Slot
from model_maps import Side

Key = tuple[int, int, int]
"""What equal tensors have in common, however their leading axes are folded."""


def key_of(tensor: Tensor) -> Key:
    """The same for tensors that are equal bit for bit, whether batch and positions are one axis or two."""
    plain = tensor.detach().contiguous()
    if plain.dtype == torch.bfloat16:
        plain = plain.float()
    last = plain.shape[-1] if plain.dim() else 1
    return last, plain.numel(), hash(plain.cpu().numpy().tobytes())


@dataclass(frozen=True, eq=False)
class Seen:
    """One tensor as it passed one side of one call."""

    call: Call
    side: Side
    slot: Slot
    """None: the usual place, as `Site.slot`."""

    tensor: Tensor
    key: Key


class BlockValues:
    """All tensors that passed the modules inside one call, and where.

    Args:
        call: The call, of a block or of the model.
        module: Its module, from which paths are counted.
    """

    def __init__(self, call: Call) -> None:
        self.call = call
        self.calls = [call, *call.inside()]
        self._paths = {part: path for path, part in reversed(list(call.module.named_modules()))}
        self.given = [
            Seen(part, "input", None if slot == part.main_input_slot else slot, tensor, key_of(tensor))
            for part in self.calls
            for slot, tensor in part.inputs.items()
        ]
        returned = [
            Seen(part, "output", output_slot(part.outputs, slot), tensor, key_of(tensor))
            for part in self.calls
            for slot, tensor in part.outputs.items()
        ]
        self.returned = sorted(returned, key=lambda seen: seen.call.left)
        self._givens = _by_key(self.given)
        self._returns = _by_key(self.returned)

    def path(self, call: Call) -> str:
        """Path of a call's module from the block."""
        path: str = self._paths[call.module]
        return path

    def given_like(self, key: Key) -> list[Seen]:
        """Where a value was given, in the order in which the modules were entered."""
        return self._givens.get(key, [])

    def returned_like(self, key: Key) -> list[Seen]:
        """Where a value was returned, in the order in which the modules were left."""
        return self._returns.get(key, [])


def output_slot(outputs: Mapping[Slot, Tensor], slot: Slot) -> Slot:
    """The slot of an output as a `Site` says it."""
    usual = slot in (None, 0) or (isinstance(slot, str) and slot == next(iter(outputs)))
    return None if usual else slot


def _by_key(seen: Iterable[Seen]) -> dict[Key, list[Seen]]:
    found: dict[Key, list[Seen]] = {}
    for one in seen:
        found.setdefault(one.key, []).append(one)
    return found


# --- what kind of module ----------------------------------------------------------------------------------


def has_matrix(module: nn.Module) -> bool:
    """Whether there is a weight matrix in a module or in its parts."""
    return any(parameter.dim() >= 2 for parameter in module.parameters())


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
    if "norm" in type(call.module).__name__.lower():
        return True
    gains = [parameter for parameter in call.module.parameters() if parameter.numel() > 1]
    return bool(gains) and all(gain.shape == given.shape[-1:] for gain in gains)


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
