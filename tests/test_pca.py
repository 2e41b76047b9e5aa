"""Interchange along principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import interventions as iv

law = settings(deadline=None, max_examples=25)


def test_two_components_with_mean_and_spread() -> None:
    swap = iv.PCARotatedSpaceIntervention(torch.tensor([[0.6, 0.8], [-0.8, 0.6]]), 1.0, 2.0)
    base, source = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 5.0])

    assert_close(swap(base, source, subspaces=0), torch.tensor([4.2, 2.6]))
    assert_close(swap(base, source), torch.tensor([1.0, 5.0]))


@law
@given(width=st.integers(1, 6), data=st.data(), seed=st.integers(0, 100))
def test_swapping_is_projecting_standardised_activations_and_keeping_the_residual(
    width: int, data: st.DataObject, seed: int
) -> None:
    torch.manual_seed(seed)
    rank = data.draw(st.integers(1, width))
    ids = data.draw(st.lists(st.integers(0, rank - 1), unique=True))
    components = torch.linalg.qr(torch.randn(width, width))[0][:rank]
    mean, std = torch.randn(width), torch.rand(width) + 0.5
    base, source = torch.randn(2, 3, width)

    result = iv.PCARotatedSpaceIntervention(components, mean, std)(base, source, subspaces=ids)

    own, other = ((x - mean) / std for x in (base, source))
    residual = own - own @ components.mT @ components
    coordinates = own @ components.mT
    coordinates[:, ids] = (other @ components.mT)[:, ids]
    assert_close(result, (coordinates @ components + residual) * std + mean, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("standardize", [True, False])
def test_fitted_components_are_the_leading_eigenvectors_of_the_covariance(standardize: bool) -> None:
    data = (
        np.random.default_rng(0).normal(size=(200, 5))
        * [5, 4, 3, 2, 1]
        @ np.linalg.qr(np.ones((5, 5)) + np.eye(5))[0]
    )
    swap = iv.PCARotatedSpaceIntervention.fit(torch.tensor(data).view(50, 4, 5), 3, standardize=standardize)

    matrix = np.corrcoef(data.T) if standardize else np.cov(data.T)
    values, vectors = np.linalg.eigh(matrix)
    leading = vectors[:, np.argsort(values)[::-1][:3]].T
    overlap = np.abs((leading * swap.components.numpy()).sum(1))
    np.testing.assert_allclose(overlap, 1.0, atol=1e-8)
    np.testing.assert_allclose(swap.mean.numpy(), data.mean(0))


def test_a_constant_dimension_does_not_divide_by_zero() -> None:
    data = torch.randn(10, 3)
    data[:, 1] = 4.0

    swap = iv.PCARotatedSpaceIntervention.fit(data)

    assert swap(data, data.flip(0)).isfinite().all()


def test_it_is_not_trained_and_keeps_its_own_copy() -> None:
    components = torch.eye(3)
    swap = iv.PCARotatedSpaceIntervention(components)
    components.fill_(0.0)

    assert list(swap.parameters()) == []
    assert torch.equal(swap.components, torch.eye(3))
    assert sorted(swap.state_dict()) == ["components", "mean", "std"]


def test_without_components_it_waits_for_a_state_dict() -> None:
    waiting = iv.PCARotatedSpaceIntervention(embed_dim=4, low_rank_dimension=2)
    with pytest.raises(iv.InterventionError) as caught:
        waiting(torch.zeros(4), torch.ones(4))
    assert str(caught.value) == (
        "PCARotatedSpaceIntervention has no components yet: make it with components, fit it, or load a state dict."
    )

    fitted = iv.PCARotatedSpaceIntervention.fit(torch.randn(20, 4), 2)
    waiting.load_state_dict(fitted.state_dict())

    assert torch.equal(waiting(torch.zeros(4), torch.ones(4)), fitted(torch.zeros(4), torch.ones(4)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: iv.PCARotatedSpaceIntervention(),
            iv.InterventionArgumentError,
            "PCARotatedSpaceIntervention needs its components ([k, embed_dim]), or embed_dim to load them later.",
        ),
        (
            lambda: iv.PCARotatedSpaceIntervention(torch.eye(3), embed_dim=4),
            iv.InterventionShapeError,
            "components has shape (3, 3), but [low_rank_dimension, embed_dim] = [None, 4] was given. Leave the sizes"
            " out, or make them equal.",
        ),
        (
            lambda: iv.PCARotatedSpaceIntervention(torch.ones(3)),
            iv.InterventionShapeError,
            "components has shape (3,); give [k, embed_dim].",
        ),
        (
            lambda: iv.PCARotatedSpaceIntervention(torch.eye(3), mean=torch.zeros(2)),
            iv.InterventionShapeError,
            "mean has shape (2,); give [3] or a number.",
        ),
        (
            lambda: iv.PCARotatedSpaceIntervention(torch.eye(3), std=torch.tensor([1.0, 0.0, 1.0])),
            iv.InterventionArgumentError,
            "std has entries that are not positive (smallest: 0.0), but it divides. Give the standard deviations,"
            " with 1 for constant dimensions.",
        ),
        (
            lambda: iv.PCARotatedSpaceIntervention.fit(torch.randn(3, 8), 4),
            iv.InterventionArgumentError,
            "low_rank_dimension=4 is out of range; give a whole number from 1 to 3 (3 activations of width 8).",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(make: object, error: type[Exception], message: str) -> None:
    assert callable(make)
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message
