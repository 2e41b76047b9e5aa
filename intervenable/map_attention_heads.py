"""Which columns of a linear map belong to which head, told by gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_maps import HeadColumns

CLEAN = 2e-3
"""How far the gradients of one column may be from multiples of each other, of their size."""

NEAR = 0.1
"""How far from a whole number the number of a head may come out."""


@dataclass(frozen=True)
class Moments:
    """Gradients of one tensor, of sums in which heads count in several ways.

    Shape:
        each: that of the tensor.
    """

    ones: Tensor
    """Each head counts once."""

    first: Tensor
    """Head `h` counts `h + 1` times."""

    second: Tensor
    """Head `h` counts `(h + 1) ** 2` times."""

    channels: Tensor
    """Channel `d` of each head counts `d + 1` times."""

    last: Tensor
    """The last position alone counts."""


@dataclass(frozen=True)
class ColumnHeads:
    """In which heads the columns of one tensor end up."""

    fed: Tensor
    """Whether a column ends up in any, `[columns]`."""

    first: Tensor
    """The first head that a column ends up in."""

    count: Tensor
    """In how many heads, one beside the other, it ends up."""

    channel: Tensor
    """The channel that it ends up in; -1 if it is mixed with others (a rotation)."""

    mixed: int
    """How many columns end up in several heads in other ways than as a copy for each."""

    moved: bool
    """Whether positions are mixed on the way (a convolution)."""


def head_sums(operand: Tensor, heads: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The five numbers whose gradients `Moments` has.

    Shape:
        operand: `[b, heads, positions, width]`.
    """
    sizes = operand.shape
    weights = torch.rand(sizes[0], 1, *sizes[2:], generator=generator).to(operand) + 0.5
    ranks = torch.arange(1, heads + 1).to(operand)[None, :, None, None]
    channels = torch.arange(1, sizes[3] + 1).to(operand)
    weighted = operand * weights
    return (
        weighted.sum(),
        (weighted * ranks).sum(),
        (weighted * ranks**2).sum(),
        (weighted * channels).sum(),
        weighted[:, :, -1].sum(),
    )


def column_heads(moments: Moments, position_axis: int | None) -> ColumnHeads:
    """Read off the moments in which heads each column ends up.

    Args:
        moments: The gradients.
        position_axis: The axis of positions, to see whether these are mixed; None not to look.
    """
    ones, first, second, channels = (
        one.reshape(-1, one.shape[-1]).double()
        for one in (moments.ones, moments.first, moments.second, moments.channels)
    )
    size = ones.pow(2).sum(0)
    fed = size > 1e-10 * size.max().clamp_min(1e-30)
    mean, mean_off = _ratio(first, ones)
    square, square_off = _ratio(second, ones)
    channel, channel_off = _ratio(channels, ones)
    spread = (square - mean**2).clamp_min(0)
    count = (12 * spread + 1).sqrt()
    start = mean - (count - 1) / 2 - 1
    mixed = (mean_off > CLEAN) | (square_off > CLEAN)
    mixed |= ((start - start.round()).abs() > NEAR) | ((count - count.round()).abs() > NEAR)
    clean = (channel_off < CLEAN) & ((channel - channel.round()).abs() < NEAR)
    moved = False
    if position_axis is not None:
        before = moments.last.movedim(position_axis, 0)[:-1]
        moved = bool(before.abs().max() > 1e-6 * moments.last.abs().max()) if before.numel() else False
    return ColumnHeads(
        fed,
        start.round().long(),
        count.round().long(),
        torch.where(clean, channel.round().long() - 1, -1),
        int((mixed & fed).sum()),
        moved,
    )


def _ratio(numerator: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """By columns: what to multiply `denominator` with, and how far from `numerator` it is then, of its size."""
    square = denominator.pow(2).sum(0).clamp_min(1e-60)
    ratio = (numerator * denominator).sum(0) / square
    off = _length(numerator - ratio * denominator) / _length(numerator).clamp_min(1e-30)
    return ratio, off


def _length(columns: Tensor) -> Tensor:
    return columns.pow(2).sum(0).sqrt()  # in a third of the time that `norm` takes along this axis


def head_columns(columns_of_heads: Sequence[Sequence[int]]) -> HeadColumns | str:
    """The layout of heads whose columns are given, or why there is none.

    Example:
        >>> head_columns([[0, 1], [6, 7], [12, 13]])
        HeadColumns(heads=3, width=2, start=0, stride=6, per_group=1, group_stride=0)
        >>> head_columns([[0, 2], [1, 3]])
        'the columns of its heads are interleaved'
    """
    heads, width = len(columns_of_heads), len(columns_of_heads[0])
    if any(len(columns) != width for columns in columns_of_heads):
        return "its heads differ in width"
    if any(list(columns) != list(range(columns[0], columns[0] + width)) for columns in columns_of_heads):
        return "the columns of its heads are interleaved"
    starts = [columns[0] for columns in columns_of_heads]
    for per_group in (1, *(size for size in range(2, heads + 1) if heads % size == 0)):
        stride = starts[1] - starts[0] if per_group > 1 else 0
        beside = starts[per_group] - starts[0] if heads > per_group else 0
        if stride < 0 or beside < 0:
            continue
        found = HeadColumns(
            heads,
            width,
            starts[0],
            0 if stride == width else stride,
            per_group,
            0 if beside == per_group * (stride or width) else beside,
        )
        if [found.first_column(head) for head in range(heads)] == starts:
            return _plain(found)
    return "the columns of its heads follow no regular order"


def _plain(columns: HeadColumns) -> HeadColumns:
    """The same layout with the stride of heads instead of that of groups of one."""
    if columns.per_group > 1 or not columns.group_stride:
        return columns
    return HeadColumns(columns.heads, columns.width, columns.start, columns.group_stride)
