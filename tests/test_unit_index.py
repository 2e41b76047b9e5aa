"""Units as an index: all heads at once are reached as each of them is by its columns."""

from __future__ import annotations

import pytest
import torch

from intervenable.unit_index import UnitIndex
from model_maps import HeadColumns

LAYOUTS = {
    "side by side": HeadColumns(4, 8),
    "behind others": HeadColumns(4, 8, start=32),
    "fused by heads": HeadColumns(4, 8, start=8, stride=24),
    "one head": HeadColumns(1, 8, start=40),
    "groups with a key and a value behind": HeadColumns(6, 4, start=3, per_group=3, group_stride=20),
    "a group that is not full": HeadColumns(5, 4, per_group=3, group_stride=20),
    "heads that share columns": HeadColumns(4, 8, stride=4),
}


def all_units(columns: HeadColumns, examples: int, positions: int) -> UnitIndex:
    """All heads of all positions, with every column named."""
    each = [[columns.first_column(head) + i for i in range(columns.width)] for head in range(columns.heads)]
    named = torch.tensor(each)[None, :, None].expand(examples, -1, -1, -1)
    rows = torch.arange(examples)[:, None, None, None]
    return UnitIndex((rows, torch.arange(positions)[None, None, :, None], named), columns=columns)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "positions first in memory"])
def test_all_heads_are_read_and_written_column_by_column(layout: str, turned: bool) -> None:
    columns = LAYOUTS[layout]
    stream = torch.randn(5, 2, 100).transpose(0, 1) if turned else torch.randn(2, 5, 100)
    index = all_units(columns, 2, 5)
    units = torch.randn(2, columns.heads, 5, columns.width)

    found, written = index.read(stream), index.write(stream, units)

    assert written.stride() == stream.stride()
    changed = stream.clone()
    for head in range(columns.heads):
        first = columns.first_column(head)
        assert torch.equal(found[:, head], stream[:, :, first : first + columns.width])
        changed[:, :, first : first + columns.width] = units[:, head]
    if layout != "heads that share columns":  # there one of two is kept, and nothing says which
        assert torch.equal(written, changed)


def test_what_was_read_is_a_copy_and_gradients_reach_it() -> None:
    index = all_units(HeadColumns(4, 8), 2, 5)
    stream = torch.randn(2, 5, 32, requires_grad=True)

    found = index.read(stream)
    index.write(stream, 2 * found).sum().backward()

    assert torch.equal(stream.grad, torch.full_like(stream, 2.0))
    assert found.untyped_storage().data_ptr() != stream.untyped_storage().data_ptr()


def test_positions_beyond_those_of_the_run_stay_as_they_are() -> None:
    index = all_units(HeadColumns(4, 8), 2, 3)
    stream = torch.randn(2, 5, 32)

    written = index.write(stream, torch.zeros(2, 4, 3, 8))

    assert index.read(stream).shape == (2, 4, 3, 8)
    assert torch.equal(written[:, 3:], stream[:, 3:])
    assert not written[:, :3].any()
