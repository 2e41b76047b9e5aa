"""Partitions, ids, and the coordinates they choose."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import interventions as iv
from interventions import IndexSet, SubspaceError, SubspaceIndexError, SubspacePerPosition
from interventions.subspaces import Part, parse_partition, partition_to_config, select

BASE, SOURCE = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
law = settings(deadline=None, max_examples=50)

parts = st.lists(st.integers(0, 9), min_size=1, unique=True).map(tuple)


def test_ids_are_dimensions_without_a_partition() -> None:
    assert iv.VanillaIntervention()(BASE, SOURCE, subspaces=[1, 3]).tolist() == [1, 20, 3, 40]


def test_ids_are_parts_with_a_partition() -> None:
    swap = iv.VanillaIntervention(subspace_partition=[[0, 1], [1, 4]])

    assert swap(BASE, SOURCE, subspaces=1).tolist() == [1, 20, 30, 40]
    assert swap(BASE, SOURCE, subspaces=[0]).tolist() == [10, 2, 3, 4]
    assert swap(BASE, SOURCE, subspaces=[1, 0]).tolist() == [10, 20, 30, 40]
    assert swap(BASE, SOURCE).tolist() == [10, 20, 30, 40]


def test_ids_for_each_example_belong_to_examples_not_positions() -> None:
    base = torch.ones(2, 1, 3)

    result = iv.ZeroIntervention()(base, subspaces=[[0], [1]])

    assert result.tolist() == [[[0, 1, 1]], [[1, 0, 1]]]


def test_examples_may_have_different_numbers_of_ids() -> None:
    result = iv.ZeroIntervention()(torch.ones(4, 2, 3), subspaces=[[0], [1, 2], [], None])

    assert result[:, 0].tolist() == [[0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]]
    assert torch.equal(result[:, 0], result[:, 1])


def test_ids_for_each_position_belong_to_the_axis_before_the_last() -> None:
    ids = SubspacePerPosition([[0], [1, 2], None])

    result = iv.ZeroIntervention()(torch.ones(2, 3, 3), subspaces=ids)

    assert result.tolist() == [[[0, 1, 1], [1, 0, 0], [0, 0, 0]]] * 2


def test_two_unlinked_edits_at_one_place_each_write_their_own_part() -> None:
    base, first, second = torch.tensor([[1.0, 2, 3], [10, 20, 30], [100, 200, 300]])
    one, two = (iv.VanillaIntervention(subspace_partition=[[0, 1], [1, 3]]) for _ in range(2))

    assert two(one(base, first, subspaces=0), second, subspaces=0).tolist() == [100, 2, 3]
    assert two(one(base, first, subspaces=0), second, subspaces=1).tolist() == [10, 200, 300]


def test_one_intervention_at_one_place_twice_with_its_partition_reversed() -> None:
    base, first, second = torch.tensor([[1.0, 2, 3], [10, 20, 30], [100, 200, 300]])
    swap = iv.VanillaIntervention(subspace_partition=[[1, 3], [0, 1]])

    assert swap(swap(base, first, subspaces=0), second, subspaces=1).tolist() == [100, 20, 30]
    assert swap(swap(base, first, subspaces=0), second, subspaces=0).tolist() == [1, 200, 300]


@pytest.mark.parametrize(
    "ids",
    [
        [[1], [0, 2]],
        ((1,), (0, 2)),
        [torch.tensor([1]), torch.tensor([0, 2])],
        [np.array([1]), np.array([0, 2])],
        torch.nested.nested_tensor([torch.tensor([1]), torch.tensor([0, 2])], layout=torch.jagged),
        [[np.int64(1)], [torch.tensor(0), 2]],
        [range(1, 2), range(0, 3, 2)],
    ],
    ids=["lists", "tuples", "tensors", "arrays", "nested tensor", "scalars", "ranges"],
)
def test_ids_may_come_as_anything_that_holds_whole_numbers(ids: object) -> None:
    result = iv.ZeroIntervention()(torch.ones(2, 3), subspaces=ids)  # type: ignore[arg-type]

    assert result.tolist() == [[1, 0, 1], [0, 1, 0]]


@pytest.mark.parametrize(
    "ids", [2, [2], (2,), np.int64(2), torch.tensor(2), torch.tensor([2]), np.array([2])]
)
def test_one_id_serves_all_examples_in_any_form(ids: object) -> None:
    result = iv.ZeroIntervention()(torch.ones(2, 2, 3), subspaces=ids)  # type: ignore[arg-type]

    assert result.tolist() == [[[1, 1, 0], [1, 1, 0]]] * 2


@law
@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    data=st.data(),
)
def test_the_mask_says_for_every_coordinate_whether_its_example_chose_it(
    shape: list[int], data: st.DataObject
) -> None:
    batch = shape[0] if len(shape) > 1 else 1
    size = data.draw(st.integers(1, 5))
    rows = [data.draw(st.lists(st.integers(0, size - 1), unique=True)) for _ in range(batch)]

    selection = select(rows, size=size, batch=batch)
    assert selection is not None
    mask = selection.mask(size, shape).expand(*shape[:-1], size)

    for index in np.ndindex(*shape[:-1], size):
        example = index[0] if len(shape) > 1 else 0
        assert bool(mask[index]) == (index[-1] in rows[example])


@law
@given(partition=st.lists(parts, min_size=1, max_size=4), data=st.data())
def test_parts_choose_the_same_as_their_dimensions_spelled_out(
    partition: list[tuple[int, ...]], data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, len(partition) - 1), min_size=1, unique=True))
    dimensions = sorted({dim for part in ids for dim in partition[part]})
    base, source = torch.randn(2, 3, 10)
    by_part = iv.VanillaIntervention(subspace_partition=[IndexSet(part) for part in partition])

    assert torch.equal(
        by_part(base[:, :10], source[:, :10], subspaces=ids),
        iv.VanillaIntervention()(base, source, dimensions),
    )


@pytest.mark.parametrize(
    ("part", "dimensions"),
    [
        ([1, 4], (1, 2, 3)),
        ((1, 2), (1,)),
        ([3], (3,)),
        ([4, 1, 2], (4, 1, 2)),
        (range(0, 6, 2), (0, 2, 4)),
        (range(2, 4), (2, 3)),
        (slice(2, 4), (2, 3)),
        (slice(None), (0, 1, 2, 3, 4, 5)),
        (slice(1, None, 2), (1, 3, 5)),
        (IndexSet([1, 3]), (1, 3)),
        ({"index_set": [1, 3]}, (1, 3)),
        (torch.tensor([0, 2]), (0, 1)),
        (np.array([5, 0, 2]), (5, 0, 2)),
    ],
)
def test_a_part_can_be_written_in_these_ways(part: Part, dimensions: tuple[int, ...]) -> None:
    assert parse_partition([part], size=6) == (dimensions,)


@law
@given(partition=st.lists(parts, min_size=1))
def test_a_partition_survives_json(partition: list[tuple[int, ...]]) -> None:
    parsed = parse_partition([IndexSet(part) for part in partition])

    assert parsed == tuple(partition)
    assert parse_partition(json.loads(json.dumps(partition_to_config(parsed)))) == parsed


@pytest.mark.parametrize(
    ("partition", "error", "message"),
    [
        ([[0, 5]], SubspaceIndexError, "Part [0, 5] names dimension 4; dimensions are 0 to 3."),
        ([[-1, 2]], SubspaceIndexError, "Part [-1, 2] names dimension -1; dimensions are 0 to 3."),
        ([[0, 1, 9]], SubspaceIndexError, "Part [0, 1, 9] names dimension 9; dimensions are 0 to 3."),
        (
            [slice(0, 9)],
            SubspaceIndexError,
            "Part slice(0, 9, None) names dimension 8; dimensions are 0 to 3.",
        ),
        ([[0, 1, 1]], SubspaceError, "Part [0, 1, 1] names dimension 1 twice; name it once."),
        (
            [[3, 1]],
            SubspaceError,
            "Part [3, 1] is the empty range from 3 up to 1. For the two dimensions themselves write"
            " IndexSet([3, 1]).",
        ),
        ([[]], SubspaceError, "Part [] holds no dimension; leave it out."),
        ([], SubspaceError, "subspace_partition=[] has no parts. Leave it out (None) to address dimensions."),
        (
            [0, 2],
            SubspaceError,
            "Part 0 is no part of a partition. Give [start, end), a longer list of dimensions, a range, a slice,"
            " or IndexSet([...]).",
        ),
        ([[0.0, 2.0]], SubspaceError, "Part [0.0, 2.0] holds 0.0; dimensions are whole numbers."),
        ("01", SubspaceError, "subspace_partition='01' is no list of parts. Example: [[0, 8], [8, 16]]."),
        ([{"set": [1]}], SubspaceError, "Part {'set': [1]} is a mapping without the one key 'index_set'."),
    ],
)
def test_a_partition_that_means_nothing_is_refused_when_the_intervention_is_made(
    partition: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        iv.VanillaIntervention(embed_dim=4, subspace_partition=partition)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_a_slice_without_end_needs_the_width() -> None:
    with pytest.raises(SubspaceError, match="needs the width to end at"):
        iv.VanillaIntervention(subspace_partition=[slice(2, None)])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (4, SubspaceIndexError, "Subspace id 4 is out of range: the ids of its 4 dimensions are 0 to 3."),
        (
            [0, -1],
            SubspaceIndexError,
            "Subspace id -1 is out of range: the ids of its 4 dimensions are 0 to 3.",
        ),
        (
            [[0], [7]],
            SubspaceIndexError,
            "Subspace id 7 for example 1 is out of range: the ids of its 4 dimensions are 0 to 3.",
        ),
        (
            SubspacePerPosition([[9]]),
            SubspaceIndexError,
            "Subspace id 9 for position 0 is out of range: the ids of its 4 dimensions are 0 to 3.",
        ),
        ([1, 1], SubspaceError, "Subspace id 1 is given twice; name each dimension once."),
        (
            [[0]],
            SubspaceError,
            "subspaces has ids for 1 examples, but there are 2. Give one list for each example, or one flat list"
            " of ids for all.",
        ),
        (
            [0, [1]],
            SubspaceError,
            "subspaces=[0, [1]] mixes ids and lists: entry 0 is 0. Give one flat list for all, or one list for"
            " each example.",
        ),
        ([0.5], SubspaceError, "0.5 is no subspace id: ids are whole numbers from 0 on."),
        ([True], SubspaceError, "True is no subspace id: ids are whole numbers from 0 on."),
        (
            "0",
            SubspaceError,
            "subspaces='0' is no choice of coordinates. Give None, an int, a list of ints, or one list of ints for"
            " each example.",
        ),
    ],
)
def test_ids_that_mean_nothing_are_refused_before_and_in_a_call(
    ids: object, error: type[Exception], message: str
) -> None:
    intervention = iv.ZeroIntervention(embed_dim=4)
    for call in (
        lambda: intervention.check_subspaces(ids, batch=2),  # type: ignore[arg-type]
        lambda: intervention(torch.ones(2, 1, 4), subspaces=ids),  # type: ignore[arg-type]
    ):
        with pytest.raises(error) as caught:
            call()
        assert str(caught.value) == message


def test_an_unknown_part_is_an_index_error_that_names_the_parts() -> None:
    with pytest.raises(IndexError) as caught:
        iv.VanillaIntervention(subspace_partition=[[0, 1], [1, 4]]).check_subspaces(2)
    assert str(caught.value) == "Subspace id 2 is out of range: the ids of its 2 parts are 0 to 1."


def test_a_partition_wider_than_the_activation_is_found_in_the_call_if_no_width_was_given() -> None:
    swap = iv.VanillaIntervention(subspace_partition=[[0, 2], [2, 9]])

    assert swap(BASE, SOURCE, subspaces=0).tolist() == [10, 20, 3, 4]
    with pytest.raises(SubspaceIndexError) as caught:
        swap(BASE, SOURCE, subspaces=1)
    assert str(caught.value) == "The partition names dimension 4; dimensions are 0 to 3."


@pytest.mark.parametrize(
    ("intervention", "size"),
    [
        (iv.RotatedSpaceIntervention(6), 6),
        (iv.LowRankRotatedSpaceIntervention(6, 2), 2),
        (iv.AutoencoderIntervention(6, 9), 9),
        (iv.JumpReLUAutoencoderIntervention(6, 9), 9),
        (iv.PCARotatedSpaceIntervention(torch.eye(6)[:4]), 4),
        (iv.LoreftIntervention(6, 3), 3),
        (iv.VanillaIntervention(embed_dim=6), 6),
        (iv.VanillaIntervention(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_ids_address_the_coordinates_the_intervention_works_in(
    intervention: iv.Intervention, size: int | None
) -> None:
    assert intervention.subspace_size == size
    if size is None:
        intervention.check_subspaces(10_000)
        return
    intervention.check_subspaces(size - 1)
    with pytest.raises(SubspaceIndexError):
        intervention.check_subspaces(size)
    with pytest.raises(SubspaceIndexError):
        intervention.subspace_partition = [[0, size + 1]]


def test_ids_for_each_position_need_an_axis_of_positions() -> None:
    ids = SubspacePerPosition([[0], [1]])
    with pytest.raises(SubspaceError, match="no axis of positions for SubspacePerPosition"):
        iv.RotatedSpaceIntervention(4).check_subspaces(ids)
    iv.RotatedSpaceIntervention(4, sees="per_unit").check_subspaces(ids)
    for shape in ((4,), (2, 3, 4)):
        with pytest.raises(SubspaceError) as caught:
            iv.ZeroIntervention()(torch.ones(shape), subspaces=ids)
        assert str(caught.value) == (
            f"SubspacePerPosition has ids for 2 units, but the activation's shape is {shape}: its axis before the"
            f" last must be those units."
        )


@law
@given(data=st.data())
def test_collecting_takes_each_examples_dimensions_in_their_order(data: st.DataObject) -> None:
    batch, units, width, count = data.draw(
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(3, 5), st.integers(0, 3))
    )
    rows = [
        data.draw(st.lists(st.integers(0, width - 1), min_size=count, max_size=count, unique=True))
        for _ in range(batch)
    ]
    base = torch.randn(batch, units, width)

    result = iv.CollectIntervention()(base, subspaces=rows)

    for index in np.ndindex(batch, units, count):
        example, unit, column = index
        assert result[index] == base[example, unit, rows[example][column]]


def test_collecting_different_numbers_of_dimensions_is_refused() -> None:
    with pytest.raises(SubspaceError) as caught:
        iv.CollectIntervention()(torch.ones(2, 3), subspaces=[[0], [1, 2]])
    assert str(caught.value) == (
        "Cannot collect different numbers of dimensions per example: got [1, 2]. A tensor needs equally many"
        " everywhere; collect them in separate calls."
    )


def test_float_and_bool_tensors_are_no_ids() -> None:
    wrong: list[Tensor] = [torch.tensor([0.0]), torch.tensor([True, False])]
    for ids in wrong:
        with pytest.raises(SubspaceError, match="ids are whole numbers"):
            iv.ZeroIntervention()(torch.ones(2), subspaces=ids)
