"""Interventions whose formula has nothing to learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import interventions as iv

BASE, SOURCE = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
law = settings(deadline=None, max_examples=25)


@pytest.mark.parametrize(
    ("intervention", "result"),
    [
        (iv.VanillaIntervention(), [10, 20, 30, 40]),
        (iv.VanillaIntervention(embed_dim=2), [10, 20, 3, 4]),
        (iv.SkipIntervention(), [10, 20, 30, 40]),
        (iv.AdditionIntervention(), [11, 22, 33, 44]),
        (iv.SubtractionIntervention(), [-9, -18, -27, -36]),
        (iv.ZeroIntervention(), [0, 0, 0, 0]),
        (iv.ZeroIntervention(embed_dim=3), [0, 0, 0, 4]),
        (iv.ScaleIntervention(0.5), [0.5, 1, 1.5, 2]),
        (iv.ScaleIntervention(), [1, 2, 3, 4]),
        (iv.CollectIntervention(), [1, 2, 3, 4]),
        (iv.CollectIntervention(embed_dim=2), [1, 2]),
    ],
)
def test_the_formula_on_four_numbers(intervention: iv.Intervention, result: list[float]) -> None:
    assert intervention(BASE, SOURCE).tolist() == result


@pytest.mark.parametrize(
    ("intervention", "result"),
    [
        (iv.VanillaIntervention(), [1, 20, 3, 40]),
        (iv.SkipIntervention(), [1, 20, 3, 40]),
        (iv.AdditionIntervention(), [1, 22, 3, 44]),
        (iv.SubtractionIntervention(), [1, -18, 3, -36]),
        (iv.ZeroIntervention(), [1, 0, 3, 0]),
        (iv.ScaleIntervention(10.0), [1, 20, 3, 40]),
    ],
)
def test_the_formula_holds_on_the_chosen_dimensions_alone(
    intervention: iv.Intervention, result: list[float]
) -> None:
    assert intervention(BASE, SOURCE, subspaces=[3, 1]).tolist() == result


def test_an_activation_narrower_than_promised_is_an_error() -> None:
    with pytest.raises(iv.InterventionShapeError) as caught:
        iv.ZeroIntervention(embed_dim=8)(BASE)
    assert str(caught.value) == (
        "ZeroIntervention was made for embed_dim=8, but the activation's shape is (4,): its last axis is too small."
    )


def test_collecting_takes_dimensions_in_the_order_given_and_copies() -> None:
    base = BASE.clone()
    reading = iv.CollectIntervention()(base)
    base.fill_(0.0)

    assert iv.CollectIntervention()(BASE, subspaces=[2, 0]).tolist() == [3, 1]
    assert reading.tolist() == [1, 2, 3, 4]
    assert iv.CollectIntervention.collects
    assert not iv.CollectIntervention.needs_source


def test_only_skipping_takes_its_source_from_the_modules_input() -> None:
    assert iv.SkipIntervention.source_side == "module_input"
    assert iv.VanillaIntervention.source_side == "site"


def test_zero_keeps_the_result_in_the_graph_with_zero_gradients() -> None:
    base = torch.ones(3, requires_grad=True)
    iv.ZeroIntervention()(base).sum().backward()

    assert base.grad is not None
    assert base.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_factor_has_to_be_finite(factor: float) -> None:
    with pytest.raises(iv.InterventionArgumentError, match="is not finite"):
        iv.ScaleIntervention(factor)


@law
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 700))
def test_fixed_noise_is_numpys_legacy_stream(seed: int, count: int) -> None:
    noise = iv.NoiseIntervention(1.0, seed, "fixed")(torch.zeros(2, count, dtype=torch.float64))

    wanted = torch.from_numpy(np.random.RandomState(seed).randn(count))
    assert_close(noise, wanted.expand(2, count), rtol=1e-12, atol=1e-12)


def test_fixed_noise_of_seed_one_starts_like_pyvenes() -> None:
    noise = iv.NoiseIntervention(seed=1, shape="fixed")(torch.zeros(1, 4, 3))

    assert_close(noise[0, 0], torch.tensor([0.2187, -0.0824, -0.0711]), atol=1e-4, rtol=0)


def test_fixed_noise_is_one_for_all_calls_examples_and_numbers_of_units() -> None:
    noise = iv.NoiseIntervention(seed=5, shape="fixed")
    short, long = noise(torch.zeros(2, 3, 8)), noise(torch.zeros(2, 7, 8))

    assert torch.equal(short[0], short[1])
    assert torch.equal(long[:, :3], short)
    assert torch.equal(noise(torch.zeros(2, 3, 8)), short)
    assert not torch.equal(short[0, 0], short[0, 1])


def test_fixed_noise_without_a_seed_takes_one_from_torch_and_keeps_it() -> None:
    torch.manual_seed(11)
    first = iv.NoiseIntervention(shape="fixed")
    other = iv.NoiseIntervention(shape="fixed")
    torch.manual_seed(11)
    again = iv.NoiseIntervention(shape="fixed")

    assert first.seed == again.seed != other.seed
    assert first.to_config()["seed"] == first.seed


def test_noise_per_call_is_new_for_every_example_and_call_and_repeats_with_its_seed() -> None:
    first, second = iv.NoiseIntervention(seed=7), iv.NoiseIntervention(seed=7)
    base = torch.zeros(2, 3, 8)
    one, two = first(base), first(base)

    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, two)
    assert torch.equal(second(base), one)
    assert torch.equal(second(base), two)


def test_noise_without_a_seed_follows_torchs_global_generator_and_with_one_leaves_it_alone() -> None:
    base = torch.zeros(4, 5)
    torch.manual_seed(3)
    free = iv.NoiseIntervention(2.0)(base)
    torch.manual_seed(3)
    iv.NoiseIntervention(2.0, seed=1)(base)

    assert_close(free, 2.0 * torch.randn(4, 5))


def test_noise_has_the_spread_it_was_asked_for() -> None:
    noise = iv.NoiseIntervention(0.3, seed=0)(torch.full((200, 200), 5.0))

    assert abs(noise.mean().item() - 5.0) < 0.01
    assert abs(noise.std().item() - 0.3) < 0.01


def test_noise_keeps_to_the_chosen_dimensions_and_to_the_dtype() -> None:
    base = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    noise = iv.NoiseIntervention(seed=0)(base, subspaces=[1])

    assert noise.dtype is torch.bfloat16
    assert torch.equal(noise[..., [0, 2, 3]], base[..., [0, 2, 3]])
    assert (noise[..., 1] != 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"std": -1.0}, "std=-1.0 is no standard deviation; give a number from 0 on."),
        ({"shape": "once"}, "shape='once' is unknown; allowed: 'per_call', 'fixed'."),
        ({"seed": -1}, "seed=-1 is no seed; give a whole number from 0 to 2**32 - 1."),
    ],
)
def test_noise_refuses_arguments_that_cannot_work(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(iv.InterventionArgumentError) as caught:
        iv.NoiseIntervention(**arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message
