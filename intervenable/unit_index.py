"""Units as an index into a stream: one that reads them and that writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from model_maps import HeadColumns

Index = tuple[Any, ...]


@dataclass(frozen=True)
class UnitIndex:
    """Where units are in a stream, as an index that reads them and that writes them."""

    index: Index
    """`stream[index]` is `[b, n, d]`, or `[b, heads, n, dh]` by heads."""

    real: Tensor | None = None
    """Which entries are units where examples differ in number; None if all are."""

    heads: Tensor | None = None
    """`[b, heads]`, for sites that need the heads themselves; None for all of them."""

    last_position: int = -1
    """The largest position among the units; -1 if every position is meant."""

    view: bool = False
    """Whether located units are reached by slices alone, which do not copy."""

    columns: HeadColumns | None = None
    """Where the heads lie, if all units of all heads are meant: then they are reached without the index."""

    def in_rows(self, rows: Tensor) -> UnitIndex:
        """The same units in other rows: `[n]`, one for each of those it has."""
        first = self.index[0]
        return replace(self, index=(rows.view(-1, *[1] * (first.dim() - 1)), *self.index[1:]), columns=None)

    def read(self, stream: Tensor) -> Tensor:
        """The units; a copy, unless every position is meant."""
        by_heads = self._all_heads(stream)
        if by_heads is not None:
            return by_heads.permute(0, 2, 3, 1, 4).flatten(1, 2).clone(memory_format=torch.contiguous_format)
        units = stream[self.index]
        return units.clone() if self.view else units

    def write(self, stream: Tensor, units: Tensor) -> Tensor:
        """A copy of the stream with other units in it."""
        result = _copy(stream)
        by_heads = self._all_heads(result)
        if by_heads is not None and units.dim() == 4 and units.dtype == stream.dtype:
            groups, heads = by_heads.shape[2:4]
            by_heads.copy_(units.reshape(-1, groups, heads, *units.shape[2:]).permute(0, 3, 1, 2, 4))
        elif self.real is None:
            result[self.index] = units
        else:
            result[self._of_real()] = units[self.real] if units.dim() else units
        return result

    def add(self, stream: Tensor, change: Tensor) -> Tensor:
        """A copy of the stream with a change added to its units; places that fill up get nothing."""
        if self.real is not None:
            change = torch.where(self.real[..., None], change, torch.zeros_like(change))
            return stream.index_put(self._tensors(stream), change, accumulate=True)
        return self.write(stream, stream[self.index] + change)

    def _all_heads(self, stream: Tensor) -> Tensor | None:
        """A view of a stream by heads, `[b, n, groups, heads of a group, dh]`; None if there is none."""
        columns = self.columns
        if columns is None or stream.shape[:2] != (self.index[0].shape[0], self.index[1].shape[2]):
            return None
        heads, step = min(columns.per_group, columns.heads), columns.stride or columns.width
        groups, left = divmod(columns.heads, heads)
        group_step = columns.group_stride or columns.per_group * step
        width = (heads - 1) * step + columns.width
        whole = (groups - 1) * group_step + width
        apart = step >= columns.width and (groups == 1 or group_step >= width)
        if left or not apart or stream.dim() != 3 or columns.start + whole > stream.shape[2]:
            return None
        by_groups = stream.narrow(2, columns.start, whole).unfold(2, width, group_step)
        return by_groups.unfold(3, columns.width, step)

    def _of_real(self) -> Index:
        assert self.real is not None
        tensors = [part for part in self.index if isinstance(part, Tensor)]
        if tensors[0].dim() == self.real.dim():  # indices of units: a slice takes the columns
            picked: list[Any] = [part.expand(self.real.shape)[self.real] for part in tensors]
        else:  # the last axis of the indices runs over columns
            picked = [part.expand(*self.real.shape, part.shape[-1])[self.real] for part in tensors]
        return (*picked, *(part for part in self.index if isinstance(part, slice)))

    def _tensors(self, stream: Tensor) -> tuple[Tensor, ...]:
        """The index with tensors alone, which `index_put` wants."""
        parts = list(self.index)
        if isinstance(parts[-1], slice):
            columns = torch.arange(stream.shape[-1], device=stream.device)[parts[-1]]
            parts = [part[..., None] for part in parts[:-1]] + [columns]
        return tuple(parts)


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape broadcasts to another, leading axes of size 1 aside."""
    while len(shape) > len(to) and shape[0] == 1:
        shape = shape[1:]
    return len(shape) <= len(to) and all(
        size in (1, other) for size, other in zip(reversed(shape), reversed(to), strict=False)
    )


def _copy(stream: Tensor) -> Tensor:
    """A copy laid out in memory as the original is, since kernels round differently for other layouts."""
    copy = stream.clone()
    if copy.stride() == stream.stride() or 0 in stream.stride():
        return copy
    return torch.empty_strided(stream.shape, stream.stride(), dtype=stream.dtype, device=stream.device).copy_(
        stream
    )
