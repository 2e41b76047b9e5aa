"""Interchange in learned bases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import interventions as iv
from interventions import Intervention, OrthogonalWeight

BASE, SOURCE = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
law = settings(deadline=None, max_examples=25)
sizes = st.integers(1, 8).flatmap(lambda width: st.tuples(st.just(width), st.integers(1, width)))


def set_basis(intervention: Intervention, columns: list[list[float]] | Tensor) -> None:
    rotation = intervention.get_submodule("rotation")
    with torch.no_grad():
        rotation.get_parameter("weight").copy_(torch.as_tensor(columns))


def test_a_rotation_by_thirty_degrees_swaps_its_first_coordinate() -> None:
    swap = iv.RotatedSpaceIntervention(2)
    set_basis(swap, [[0.8660, -0.5], [0.5, 0.8660]])

    result = swap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), subspaces=0)

    assert_close(result.detach(), torch.tensor([0.6830, -0.1830]), atol=1e-4, rtol=0)


def test_one_direction_is_swapped_and_the_rest_stays() -> None:
    swap = iv.LowRankRotatedSpaceIntervention(2, 1)
    set_basis(swap, [[0.6], [0.8]])

    result = swap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))

    assert_close(result.detach(), torch.tensor([1.12, 0.16]))


@law
@given(size=sizes, seed=st.integers(0, 1000))
def test_low_rank_is_the_source_inside_and_the_base_outside(size: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    width, rank = size
    swap = iv.LowRankRotatedSpaceIntervention(width, rank)
    base, source = torch.randn(2, 3, 2, width)
    columns = swap.rotation().detach()
    inside = columns @ columns.mT
    outside = torch.eye(width) - inside

    result = swap(base, source).detach()

    assert_close(result @ inside, source @ inside, atol=1e-5, rtol=1e-4)
    assert_close(result @ outside, base @ outside, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "low rank"])
@law
@given(size=sizes, data=st.data(), seed=st.integers(0, 1000))
def test_chosen_coordinates_are_the_sources_and_the_others_the_bases(
    kind: str, size: tuple[int, int], data: st.DataObject, seed: int
) -> None:
    torch.manual_seed(seed)
    width, rank = size if kind == "low rank" else (size[0], size[0])
    swap: iv.RotatedSpaceIntervention | iv.LowRankRotatedSpaceIntervention = (
        iv.RotatedSpaceIntervention(width)
        if kind == "full"
        else iv.LowRankRotatedSpaceIntervention(width, rank)
    )
    ids = data.draw(st.lists(st.integers(0, rank - 1), unique=True))
    others = [column for column in range(rank) if column not in ids]
    base, source = torch.randn(2, 4, width)

    columns = swap.rotation().detach()
    coordinates = swap(base, source, subspaces=ids).detach() @ columns

    assert_close(coordinates[:, ids], source @ columns[:, ids], atol=1e-5, rtol=1e-4)
    assert_close(coordinates[:, others], base @ columns[:, others], atol=1e-5, rtol=1e-4)


def test_the_whole_rotated_space_is_the_source() -> None:
    base, source = torch.randn(2, 3, 5)

    assert_close(iv.RotatedSpaceIntervention(5)(base, source).detach(), source)


@pytest.mark.parametrize("rank", [None, 5])
def test_parts_do_the_same_as_their_coordinates_spelled_out(rank: int | None) -> None:
    def make(parts: list[list[int]] | None) -> Intervention:
        if rank is None:
            return iv.RotatedSpaceIntervention(6, subspace_partition=parts)
        return iv.LowRankRotatedSpaceIntervention(6, rank, subspace_partition=parts)

    by_part, by_id = make([[0, 2], [2, 5]]), make(None)
    by_id.load_state_dict(by_part.state_dict())
    base, source = torch.randn(2, 3, 6)

    assert torch.equal(by_part(base, source, subspaces=1), by_id(base, source, subspaces=[2, 3, 4]))
    assert torch.equal(
        by_part(base, source, [[0], [1], [0, 1]]), by_id(base, source, [[0, 1], [2, 3, 4], range(5)])
    )


def test_two_parts_of_one_basis_commute_and_both_orders_train_it() -> None:
    swap = iv.LowRankRotatedSpaceIntervention(8, 4, subspace_partition=[[0, 2], [2, 4]])
    base, one, two = torch.randn(3, 2, 8)

    first = swap(swap(base, one, subspaces=0), two, subspaces=1)
    second = swap(swap(base, two, subspaces=1), one, subspaces=0)

    assert_close(first, second, atol=1e-5, rtol=1e-5)
    first.square().sum().backward()
    assert swap.rotation.weight.grad is not None
    assert swap.rotation.weight.grad.norm() > 1e-3


def test_two_separate_low_rank_edits_both_get_gradients() -> None:
    first, second = (iv.LowRankRotatedSpaceIntervention(6, 2) for _ in range(2))
    base, one, two = torch.randn(3, 2, 6)

    second(first(base, one), two).square().sum().backward()

    for edit in (first, second):
        assert edit.rotation.weight.grad is not None
        assert edit.rotation.weight.grad.norm() > 1e-3


@law
@given(size=sizes, scale=st.floats(0.01, 100), seed=st.integers(0, 1000))
def test_columns_are_orthonormal_and_span_what_the_weight_spans(
    size: tuple[int, int], scale: float, seed: int
) -> None:
    torch.manual_seed(seed)
    width, rank = size
    rotation = OrthogonalWeight(width, rank)
    with torch.no_grad():
        rotation.weight.copy_(scale * torch.randn(width, rank))

    columns = rotation(torch.float64).detach()

    assert_close(columns.mT @ columns, torch.eye(rank, dtype=torch.float64))
    weight = rotation.weight.detach().double()
    assert_close(columns @ (columns.mT @ weight), weight)
    upper = columns.mT @ weight
    assert_close(upper, upper.triu(), atol=1e-4 * scale, rtol=0)
    assert (upper.diagonal() >= 0).all()


@law
@given(size=sizes, seed=st.integers(0, 1000))
def test_an_orthonormal_weight_is_its_own_basis(size: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    rotation = OrthogonalWeight(*size)
    orthonormal = torch.linalg.qr(torch.randn(size))[0]
    with torch.no_grad():
        rotation.weight.copy_(orthonormal)

    assert_close(rotation().detach(), orthonormal, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_columns_stay_orthonormal_while_they_are_trained(dtype: torch.dtype) -> None:
    swap = iv.LowRankRotatedSpaceIntervention(12, 4).to(dtype)
    base, source, wanted = torch.randn(3, 16, 12, dtype=dtype)
    optimizer = torch.optim.Adam(swap.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (swap(base, source) - wanted).float().square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    columns = swap.rotation().detach()
    assert_close(columns.mT @ columns, torch.eye(4), atol=1e-5, rtol=0)
    assert losses[-1] < losses[0]


def test_training_finds_the_direction_that_carries_a_variable() -> None:
    torch.manual_seed(0)
    width = 6
    hidden_direction = nn.functional.normalize(torch.randn(width), dim=0)
    base, source = torch.randn(2, 256, width)
    wanted = source @ hidden_direction
    swap = iv.LowRankRotatedSpaceIntervention(width, 1)
    optimizer = torch.optim.Adam(swap.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (swap(base, source) @ hidden_direction - wanted).square().mean().backward()
        optimizer.step()

    assert abs(swap.rotation().detach()[:, 0] @ hidden_direction) > 0.999


def test_the_state_dict_holds_one_plain_weight_and_a_loaded_one_need_not_be_orthonormal() -> None:
    swap = iv.LowRankRotatedSpaceIntervention(4, 2)
    assert list(swap.state_dict()) == ["rotation.weight"]

    swap.load_state_dict({"rotation.weight": 3 * torch.randn(4, 2)})

    columns = swap.rotation().detach()
    assert_close(columns.mT @ columns, torch.eye(2))


@pytest.mark.parametrize("change", ["in place", "data", "parameter", "load"])
def test_columns_follow_the_weight_however_it_is_changed(change: str) -> None:
    rotation = OrthogonalWeight(4, 2)
    new = torch.linalg.qr(torch.randn(4, 2))[0]
    with torch.no_grad():
        before = rotation()
        assert rotation() is before  # nothing changed: the same columns serve
        if change == "in place":
            rotation.weight.copy_(new)
        elif change == "data":
            rotation.weight.data.copy_(new)
        elif change == "parameter":
            rotation.weight = nn.Parameter(new)
        else:
            rotation.load_state_dict({"weight": new})
        assert_close(rotation(), new, atol=1e-6, rtol=1e-5)


def test_columns_computed_under_inference_mode_can_be_trained_through_later() -> None:
    swap = iv.LowRankRotatedSpaceIntervention(4, 2).requires_grad_(False)
    base, source = torch.randn(2, 3, 4)
    with torch.inference_mode():
        swap(base, source)

    base.requires_grad_()
    swap(base, source).sum().backward()

    columns = swap.rotation()
    assert_close(base.grad, (torch.eye(4) - columns @ columns.mT).sum(0).expand(3, 4))


def test_shapes_can_be_tried_out_on_the_meta_device() -> None:
    with torch.device("meta"):
        swap, base = iv.LowRankRotatedSpaceIntervention(8, 3), torch.zeros(2, 5, 8)
    with torch.no_grad():
        assert swap(base, base).shape == (2, 5, 8)
    assert swap(base, base, subspaces=[0]).is_meta


def test_results_are_the_same_with_and_without_gradients() -> None:
    swap = iv.RotatedSpaceIntervention(5)
    base, source = torch.randn(2, 3, 5)
    with torch.no_grad():
        without = swap(base, source, subspaces=[0, 1])

    assert torch.equal(swap(base, source, subspaces=[0, 1]).detach(), without)


def test_retracting_makes_the_weight_orthonormal_and_changes_no_result() -> None:
    swap = iv.LowRankRotatedSpaceIntervention(6, 3)
    with torch.no_grad():
        swap.rotation.weight.copy_(5 * torch.randn(6, 3))
    base, source = torch.randn(2, 4, 6)
    before = swap(base, source).detach()

    swap.rotation.retract()

    weight = swap.rotation.weight.detach()
    assert_close(weight.mT @ weight, torch.eye(3), atol=1e-5, rtol=0)
    assert_close(swap(base, source).detach(), before, atol=1e-5, rtol=1e-5)


def test_a_rank_above_the_width_is_refused() -> None:
    with pytest.raises(iv.InterventionArgumentError) as caught:
        iv.LowRankRotatedSpaceIntervention(4, 5)
    assert str(caught.value) == (
        "low_rank_dimension=5 is out of range; give a whole number from 1 to 4 (embed_dim=4)."
    )


def test_the_boundless_shares_sit_on_half_integers() -> None:
    swap = iv.BoundlessRotatedSpaceIntervention(4, temperature=0.1)

    assert_close(
        swap.mask_weights().detach(), torch.tensor([0.99331, 0.99331, 0.00669, 0.0000003]), atol=1e-5, rtol=0
    )


@law
@given(width=st.integers(1, 12), beta=st.floats(-0.5, 1.5), temperature=st.floats(0.05, 60))
def test_the_boundless_shares_follow_their_formula(width: int, beta: float, temperature: float) -> None:
    swap = iv.BoundlessRotatedSpaceIntervention(width, temperature)
    with torch.no_grad():
        swap.intervention_boundaries.fill_(beta)

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x > -700 else 0.0

    clamped = min(max(beta, 1e-3), 1.0)
    wanted = [
        sigmoid((i + 0.5) / temperature) * sigmoid((clamped * width - i - 0.5) / temperature)
        for i in range(width)
    ]
    assert_close(swap.mask_weights().detach(), torch.tensor(wanted), atol=1e-5, rtol=1e-4)


def test_the_boundless_result_mixes_rotated_coordinates_by_their_shares() -> None:
    swap = iv.BoundlessRotatedSpaceIntervention(4, temperature=0.7)
    columns, shares = swap.rotation().detach(), swap.mask_weights().detach()

    result = swap(BASE, SOURCE).detach()

    mixed = (1 - shares) * (BASE @ columns) + shares * (SOURCE @ columns)
    assert_close(result, mixed @ columns.mT, atol=1e-4, rtol=1e-5)


def test_at_a_low_temperature_the_boundless_swap_is_that_of_the_first_coordinates() -> None:
    boundless, plain = iv.BoundlessRotatedSpaceIntervention(6), iv.RotatedSpaceIntervention(6)
    boundless.set_temperature(1e-3)
    boundless.rotation.load_state_dict(plain.rotation.state_dict())
    base, source = torch.randn(2, 2, 3, 6)

    assert_close(boundless(base, source), plain(base, source, subspaces=[0, 1, 2]), atol=1e-5, rtol=1e-5)


def test_boundless_learns_its_boundary() -> None:
    swap = iv.BoundlessRotatedSpaceIntervention(4, temperature=1.0)
    optimizer = torch.optim.Adam([swap.intervention_boundaries], lr=0.05)
    start = swap.mask_weights().sum().item()
    for _ in range(20):
        optimizer.zero_grad()
        (swap(torch.zeros(4), torch.ones(4)) - torch.ones(4)).square().sum().backward()
        optimizer.step()

    assert swap.mask_weights().sum().item() > start + 0.1


def test_boundless_works_for_heads_in_a_batch_with_one_unit() -> None:
    base, source = torch.randn(2, 3, 1, 4)

    assert iv.BoundlessRotatedSpaceIntervention(4)(base, source).shape == (3, 1, 4)
