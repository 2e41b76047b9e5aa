"""Tensors of a traced block compared by value: which module was given what another had returned."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from intervenable.map_layout import Layout
from intervenable.map_modules import Key, key_of, output_slot
from intervenable.map_trace import Call, Slot, paths_of
from model_maps import Side


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
        call: The call, of a block.
        layout: The layout of its stack.
        repeated: Modules that the forward pass calls more than once.
    """

    def __init__(self, call: Call, layout: Layout, repeated: Collection[nn.Module] = ()) -> None:
        self.call = call
        self.layout = layout
        self.repeated = repeated
        self.calls = [call, *call.inside()]
        self._paths = paths_of(call.module)
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

    def nth(self, call: Call) -> int | None:
        """Which call of its module in the block it is; None if there is but one."""
        same = [other for other in self.calls if other.module is call.module]
        return same.index(call) if len(same) > 1 else None

    def given_like(self, key: Key) -> list[Seen]:
        """Where a value was given, in the order in which the modules were entered."""
        return self._givens.get(key, [])

    def returned_like(self, key: Key) -> list[Seen]:
        """Where a value was returned, in the order in which the modules were left."""
        return self._returns.get(key, [])


def _by_key(seen: Iterable[Seen]) -> dict[Key, list[Seen]]:
    found: dict[Key, list[Seen]] = {}
    for one in seen:
        found.setdefault(one.key, []).append(one)
    return found
