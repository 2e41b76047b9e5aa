"""Runs of some examples of a data set: their inputs, cut and picked, and which examples are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from intervenable.inputs import RunInputs
from intervenable.stack_lengths import check_divisible
from intervenable.units import UnitRows, Units, Whole


def picked_inputs(inputs: RunInputs, rows: Sequence[int]) -> RunInputs:
    """The run of some of the examples of a run."""
    index = torch.tensor(rows)
    check_divisible(inputs.kwargs, inputs.batch, inputs.length, "no examples can be picked out")

    def of(item: Any) -> Any:
        return item.index_select(_row_axis(inputs), index.to(item.device)) if _by_row(item, inputs) else item

    mask, ids = inputs.attention_mask, inputs.input_ids
    return replace(
        inputs,
        args=tuple(of(item) for item in inputs.args),
        kwargs={name: of(item) for name, item in inputs.kwargs.items()},
        given=None,
        batch=len(rows),
        attention_mask=None if mask is None else mask[index.to(mask.device)],
        input_ids=None if ids is None else ids[index.to(ids.device)],
        decoder=None if inputs.decoder is None else picked_inputs(inputs.decoder, rows),
    )


def _row_axis(inputs: RunInputs) -> int:
    return 1 if inputs.time_first else 0


def _by_row(item: Any, inputs: RunInputs) -> bool:
    axis = _row_axis(inputs)
    return isinstance(item, Tensor) and item.dim() > axis and item.shape[axis] == inputs.batch


def row_keys(tensors: Sequence[Tensor]) -> list[bytes]:
    """For each row what tells it from others: a digest of some tensors `[N, ...]`, all together."""
    count = len(tensors[0]) if tensors else 0
    flat = [tensor.detach().cpu().reshape(count, -1).contiguous() for tensor in tensors]
    parts = [tensor.view(torch.uint8).numpy() if tensor.numel() else tensor.numpy() for tensor in flat]
    keys = []
    for row in range(count):
        found = hashlib.blake2b(digest_size=16)
        for part in parts:
            found.update(part[row].tobytes())
        keys.append(found.digest())
    return keys


def row_tensors(inputs: RunInputs) -> list[Tensor]:
    """The inputs that are given example by example, each `[batch, ...]`."""
    axis = _row_axis(inputs)
    found = [*inputs.args, *inputs.kwargs.values()]
    return [item.movedim(axis, 0) for item in found if _by_row(item, inputs)]


def numbered(keys: Sequence[bytes]) -> Tensor:
    """For each key the number of the first like it, counted among those that differ."""
    numbers: dict[bytes, int] = {}
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def first_rows(numbers: Tensor) -> list[int]:
    """For each of the numbers that `numbered` gives the first row that has it."""
    found: dict[int, int] = {}
    for row, number in enumerate(numbers.tolist()):
        found.setdefault(number, row)
    return list(found.values())  # numbers count up in the order in which they first appear


def digest(keys: Sequence[bytes]) -> bytes:
    """What tells these keys, in their order, from others."""
    found = hashlib.sha256()
    for key in keys:
        found.update(len(key).to_bytes(8, "little"))
        found.update(key)
    return found.digest()


class EditRows:
    """Where an edit is in each example, as tensors, to be had for some of the examples.

    Args:
        units: The units of all examples.
        batch: How many examples there are.
    """

    def __init__(self, units: Units | Whole, batch: int) -> None:
        self._units = None if isinstance(units, Whole) else units
        positions = None if self._units is None else self._units.filled.get("positions")
        self.first = torch.zeros(batch, dtype=torch.long) if positions is None else positions.amin(1)
        """`[batch]` the first position that is edited."""

    @property
    def content(self) -> list[Tensor]:
        """What tells the examples apart, each `[batch, ...]`."""
        if self._units is None:
            return []
        real = self._units.real
        return [*self._units.filled.values(), *([] if real is None else [real])]

    def of(self, rows: Tensor, start: int = 0) -> UnitRows | Whole:
        """The units of some examples, positions counted from a token on."""
        if self._units is None:
            return Whole()
        filled = {
            level: where[rows] - (start if level == "positions" else 0)
            for level, where in self._units.filled.items()
        }
        real = self._units.real
        return UnitRows(torch.arange(len(rows)), filled, None if real is None else real[rows])


def picked_units(units: Units | Whole, rows: Sequence[int]) -> Units | Whole:
    """The units of some examples, as a run that keeps them wants them."""
    if isinstance(units, Whole):
        return units
    if len(units) == 1 and len(rows) != 1:
        return units
    levels: Mapping[str, Any] = {name: tuple(at[row] for row in rows) for name, at in units.levels.items()}
    return Units(**levels, relation=units.relation)


def picked_values(value: Any, rows: Tensor, batch: int) -> Any:
    """Of subspaces or constants those of some examples, where they are given example by example."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.dim() > 1 and value.shape[0] == batch > 1 else value
    if isinstance(value, (list, tuple)) and len(value) == batch and not isinstance(value[0], int):
        return [value[row] for row in rows.tolist()]
    return value
