"""Interchange through learned soft masks, and the temperature they share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import interventions as iv
from interventions.temperature import Tempered

BASE, SOURCE = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
TEMPERED = (
    iv.BoundlessRotatedSpaceIntervention,
    iv.SigmoidMaskIntervention,
    iv.SigmoidMaskRotatedSpaceIntervention,
)
law = settings(deadline=None, max_examples=25)
Kind = type[
    iv.BoundlessRotatedSpaceIntervention | iv.SigmoidMaskIntervention | iv.SigmoidMaskRotatedSpaceIntervention
]


def test_a_sharp_mask_swaps_where_it_is_positive_and_halves_where_it_is_zero() -> None:
    swap = iv.SigmoidMaskIntervention(4)
    swap.mask.data = torch.tensor([-1.0, 1.0, 0.0, 0.0])

    assert_close(swap(BASE, SOURCE).detach(), torch.tensor([1.0, 20.0, 16.5, 22.0]))


def test_masks_start_with_the_shares_of_their_first_temperature() -> None:
    assert_close(iv.SigmoidMaskIntervention(3).mask_weights().detach(), torch.full((3,), 0.5))
    assert_close(
        iv.SigmoidMaskRotatedSpaceIntervention(3).mask_weights().detach(),
        torch.full((3,), 0.8808),
        atol=1e-4,
        rtol=0,
    )


@law
@given(width=st.integers(1, 6), temperature=st.floats(0.1, 10), seed=st.integers(0, 100))
def test_a_soft_mask_mixes_base_and_source(width: int, temperature: float, seed: int) -> None:
    torch.manual_seed(seed)
    plain = iv.SigmoidMaskIntervention(width, temperature)
    rotated = iv.SigmoidMaskRotatedSpaceIntervention(width, temperature)
    mask = torch.randn(width)
    plain.mask.data, rotated.mask.data = mask.clone(), mask.clone()
    base, source = torch.randn(2, 3, width)
    shares = 1 / (1 + torch.exp(-mask / temperature))
    columns = rotated.rotation().detach()

    assert_close(plain(base, source).detach(), (1 - shares) * base + shares * source, atol=1e-5, rtol=1e-4)
    mixed = (1 - shares) * (base @ columns) + shares * (source @ columns)
    assert_close(rotated(base, source).detach(), mixed @ columns.mT, atol=1e-5, rtol=1e-4)


def test_a_mask_acts_on_the_chosen_coordinates_only() -> None:
    plain, rotated = iv.SigmoidMaskIntervention(4), iv.SigmoidMaskRotatedSpaceIntervention(4)
    columns = rotated.rotation().detach()

    assert_close(plain(BASE, SOURCE, subspaces=[1]).detach(), torch.tensor([1.0, 11.0, 3.0, 4.0]))
    coordinates = rotated(BASE, SOURCE, subspaces=[1]).detach() @ columns
    others = [0, 2, 3]
    assert_close(coordinates[others], (BASE @ columns)[others], atol=1e-4, rtol=1e-4)
    assert (coordinates[1] - (BASE @ columns)[1]).abs() > 1e-3 * (SOURCE @ columns - BASE @ columns)[1].abs()


def test_training_a_mask_finds_the_dimensions_that_matter() -> None:
    torch.manual_seed(0)
    swap = iv.SigmoidMaskIntervention(5, temperature=1.0)
    optimizer = torch.optim.Adam(swap.parameters(), lr=0.2)
    base, source = torch.randn(2, 64, 5)
    wanted = torch.where(torch.tensor([True, False, True, False, False]), source, base)
    for _ in range(100):
        optimizer.zero_grad()
        (swap(base, source) - wanted).square().mean().backward()
        optimizer.step()

    assert (swap.mask > 0).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("kind", TEMPERED)
def test_the_temperature_is_saved_and_not_trained_unless_asked(kind: Kind) -> None:
    fixed, trained = kind(4), kind(4, trainable_temperature=True)

    for intervention in (fixed, trained):
        intervention.set_temperature(0.25)
        assert intervention.temperature.item() == 0.25
        assert "temperature" in intervention.state_dict()
        assert isinstance(intervention, Tempered)
    assert "temperature" not in dict(fixed.named_parameters())
    assert isinstance(trained.temperature, nn.Parameter)
    if not isinstance(trained, iv.BoundlessRotatedSpaceIntervention):
        trained.mask.data = torch.tensor([0.1, -0.2, 0.3, 0.4])
    trained(BASE, SOURCE).square().sum().backward()
    assert trained.temperature.grad is not None
    assert trained.temperature.grad.item() != 0


@pytest.mark.parametrize("kind", TEMPERED)
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_positive_is_refused(kind: Kind, temperature: float) -> None:
    for call in (lambda: kind(4, temperature), lambda: kind(4).set_temperature(temperature)):
        with pytest.raises(iv.InterventionArgumentError) as caught:
            call()
        assert str(caught.value) == f"temperature={temperature!r} is out of range; give a number above 0."


@pytest.mark.parametrize("kind", TEMPERED)
def test_lowering_the_temperature_hardens_the_mask(kind: Kind) -> None:
    intervention = kind(6)
    if not isinstance(intervention, iv.BoundlessRotatedSpaceIntervention):
        intervention.mask.data = torch.tensor([-1.0, 0.5, 0.8, -0.7, 2.0, -0.3])
    softness = []
    for temperature in (10.0, 1.0, 0.1, 0.01):
        intervention.set_temperature(temperature)
        shares = intervention.mask_weights().detach()
        softness.append((shares * (1 - shares)).sum().item())

    assert softness == sorted(softness, reverse=True)
    assert softness[-1] < 1e-3
