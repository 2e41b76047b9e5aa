"""One block of a traced pass: its calls, their names, and how its tensors count examples and positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.map_attention_events import attentions
from intervenable.map_attention_probe import Leaf, Probe
from intervenable.map_attention_products import Product
from intervenable.map_trace import Call, paths_of


class BlockView:
    """A block, as it was called first.

    Args:
        probe: The pass.
        block: The block.
        batch: Examples in the pass.
    """

    def __init__(self, probe: Probe, block: nn.Module, batch: int) -> None:
        self.probe = probe
        called = next((call for call in probe.trace.calls if call.module is block), None)
        self.call = called
        self._names = paths_of(block)
        self.rows, self.positions = _counts(None if called is None else called.main_input, batch)
        found = [] if called is None else list(attentions(called, self.rows))
        # Where positions are what others have as heads, something else is attended to: the layers below, say.
        self.attentions = [
            one for one in found if one.queries == self.positions or one.heads != self.positions
        ]

    @property
    def block(self) -> Call:
        """The call of the block."""
        assert self.call is not None
        return self.call

    def name(self, call: Call) -> str | None:
        """A module's path from the block, of a product that of the module it is in; None if it is no part of it."""
        module = call.parent.module if isinstance(call, Product) and call.parent else call.module
        return self._names.get(module)

    def origins(self, leaves: Sequence[Leaf]) -> list[Leaf]:
        """The inputs of the block that tensors are made of, through however many linear maps."""
        found: list[Leaf] = []
        waiting, seen = list(leaves), set()
        while waiting:
            leaf = waiting.pop()
            if id(leaf) in seen:
                continue
            seen.add(id(leaf))
            if leaf.call is None:
                found.append(leaf)
            elif leaf.call.main_input is not None:
                waiting.extend(self.probe.feeding(leaf.call.main_input))
        return found


def _counts(stream: Tensor | None, batch: int) -> tuple[int, int | None]:
    """The examples and positions of what a block is given; of more than one stream no positions are known."""
    if stream is None or stream.dim() != 3:
        return batch, None
    if stream.shape[0] != batch == stream.shape[1]:
        return batch, stream.shape[0]
    return stream.shape[0], stream.shape[1]


def layout(tensor: Tensor | None, rows: int, positions: int) -> dict[str, Any] | None:
    """How a tensor has examples and positions, as fields of a site; None if it is not known how."""
    if tensor is None:
        return None
    shape = tensor.shape
    if tensor.dim() == 2 and shape[0] == rows * positions:
        return {"flat": True}
    if tensor.dim() == 3 and shape[:2] == (rows, positions):
        return {}
    if tensor.dim() == 4 and shape[1] == 1 and (shape[0], shape[2]) == (rows, positions):
        return {"axes": (0, 2)}
    if tensor.dim() == 3 and shape[:2] == (positions, rows):
        return {"axes": (1, 0)}
    return None


def place(view: BlockView, call: Call) -> dict[str, Any]:
    """The fields of a site at a call that say where it is: its path, and which call or which product of it.

    Args:
        view: The block.
        call: The call.
    """
    if isinstance(call, Product):
        fields = {"function": call.function, "weight": call.weight, "nth": call.nth}
        return {"path": view.name(call), **fields}
    same = [other for other in view.block.inside() if other.module is call.module]
    return {"path": view.name(call), **({"call": same.index(call)} if len(same) > 1 else {})}


def ancestors(call: Call, last: Call) -> Iterator[Call]:
    """A call and the calls around it, up to `last`."""
    here: Call | None = call
    while here is not None:
        yield here
        if here is last:
            return
        here = here.parent


def within(call: Call, other: Call) -> bool:
    """Whether a call was made inside another, or is it."""
    return any(one is other for one in ancestors(call, other))


def same_values(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers in the same order."""
    if one is None or other is None or one.numel() != other.numel():
        return False
    return one is other or torch.equal(one.detach().reshape(-1), other.detach().reshape(-1))
