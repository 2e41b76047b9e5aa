"""Intervals of means over examples and seeds, and of paired differences."""

from __future__ import annotations

import math

import pytest
import torch

import intervenable as iv
from intervenable.alignment_statistics import (
    bootstrap_difference,
    bootstrap_interval,
    wilson_interval,
)


def shares(right: int, of: int) -> torch.Tensor:
    """So many ones of so many examples."""
    return torch.tensor([1.0] * right + [0.0] * (of - right))


def test_the_interval_of_a_share_is_that_of_the_binomial_distribution():
    # Resampling zeros and ones draws from a binomial distribution, whose quantiles can be added up exactly.
    right, of = 70, 100
    shares_of = [math.comb(of, k) * 0.7**k * 0.3 ** (of - k) for k in range(of + 1)]
    below = [sum(shares_of[: k + 1]) for k in range(of + 1)]
    low = next(k for k, share in enumerate(below) if share >= 0.025) / of
    high = next(k for k, share in enumerate(below) if share >= 0.975) / of

    found = bootstrap_interval(shares(right, of), samples=20_000)

    assert found == pytest.approx((low, high), abs=0.011)


def test_the_interval_of_numbers_is_that_of_the_normal_distribution_where_there_are_many():
    values = torch.randn(500, generator=torch.Generator().manual_seed(1)) * 3 + 10
    error = values.std(correction=0).item() / 500**0.5

    low, high = bootstrap_interval(values, confidence=0.9, samples=8000)

    assert (values.mean().item() - low) / error == pytest.approx(1.645, abs=0.1)
    assert (high - values.mean().item()) / error == pytest.approx(1.645, abs=0.1)


@pytest.mark.parametrize(("right", "low", "high"), [(60, 0.93983, 1.0), (0, 0.0, 0.06017)])
def test_a_share_of_one_or_zero_has_the_score_interval(right, low, high):
    # n / (n + z^2) and its complement, by hand.
    assert bootstrap_interval(shares(right, 60)) == pytest.approx((low, high), abs=1e-5)


def test_fewer_right_never_moves_an_end_up():
    found = [bootstrap_interval(shares(right, 40)) for right in range(41)]
    assert found == sorted(found)
    assert [high for _, high in found] == sorted(high for _, high in found)
    assert all(low <= right / 40 <= high for right, (low, high) in enumerate(found))


def test_the_score_interval_solves_its_equation():
    # Its ends are the shares from which the one observed is z standard errors away.
    for share, count in ((0.3, 20), (0.9, 77), (0.5, 3)):
        for end in wilson_interval(share, count):
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-5)


def test_the_interval_does_not_depend_on_the_order_of_the_examples():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(values) == bootstrap_interval(values.flip(0))


def test_the_same_seed_gives_the_same_interval_and_torch_is_left_alone():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_ninety_five_intervals_of_a_hundred_hold_the_truth():
    generator = torch.Generator().manual_seed(0)
    for truth in (0.5, 0.9, 0.98):
        held = 0
        for _ in range(300):
            values = (torch.rand(60, generator=generator) < truth).float()
            low, high = bootstrap_interval(values, samples=400)
            held += low <= truth <= high
        assert held / 300 >= 0.92


def test_seeds_that_differ_widen_the_interval():
    alike = torch.stack([shares(30, 60)] * 4)
    different = torch.stack([shares(60, 60), shares(60, 60), shares(0, 60), shares(0, 60)])
    (low, high), (wide_low, wide_high) = bootstrap_interval(alike), bootstrap_interval(different)
    assert high - low == pytest.approx(4 * 0.0645, abs=0.03)
    assert wide_high - wide_low > 2 * (high - low)


def test_seeds_share_their_examples():
    # Four seeds that are right on the same examples know no more than one.
    one, four = bootstrap_interval(shares(30, 60)), bootstrap_interval(torch.stack([shares(30, 60)] * 4))
    assert four == pytest.approx(one, abs=0.02)


def test_the_difference_of_a_method_and_itself_is_about_zero():
    for right in (30, 50, 60):
        low, high = bootstrap_difference(shares(right, 60), shares(right, 60))
        assert low == pytest.approx(-high)
        assert 0 <= high < 0.09


def test_what_makes_examples_hard_for_both_does_not_widen_the_difference():
    hard = torch.rand(100, generator=torch.Generator().manual_seed(0)) * 100
    low, high = bootstrap_difference(hard + 1, hard)
    assert (low, high) == pytest.approx((1, 1), abs=1e-4)
    first, second = bootstrap_interval(hard + 1), bootstrap_interval(hard)
    assert first.low < second.high


def test_the_difference_turns_its_sign_with_its_sides():
    first, second = shares(45, 60), shares(20, 60).flip(0)
    low, high = bootstrap_difference(first, second, samples=20_000)
    other_low, other_high = bootstrap_difference(second, first, samples=20_000)
    assert (low, high) == pytest.approx((-other_high, -other_low), abs=0.02)
    assert low < 25 / 60 < high


def test_a_clear_difference_of_shares_has_a_width():
    low, high = bootstrap_difference(shares(30, 30), shares(0, 30))
    assert 0.8 < low < 0.9
    assert high == 1


def test_one_seed_is_held_against_each_of_several():
    several = torch.stack([shares(60, 60), shares(0, 60)])
    low, high = bootstrap_difference(several, shares(0, 60))
    assert low == pytest.approx(0, abs=0.1)
    assert high == 1


def test_examples_of_many_thousands_are_drawn_in_parts(monkeypatch):
    values = torch.rand(500, generator=torch.Generator().manual_seed(0))
    whole = bootstrap_interval(values)
    monkeypatch.setattr("intervenable.alignment_statistics.AT_ONCE", 7000)
    assert bootstrap_interval(values) == pytest.approx(whole, abs=1e-12)


def test_many_intervals_draw_the_same_examples():
    first, second = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    alone = bootstrap_interval(second)
    bootstrap_interval(first)
    bootstrap_interval(torch.ones(3, 30))
    assert bootstrap_interval(second) == alone


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            torch.ones(2, 3, 4),
            "per_example has the shape (2, 3, 4). Give a value for each example: [examples] or [seeds, examples].",
        ),
        (
            torch.ones(0),
            "per_example has the shape (0,). Give a value for each example: [examples] or [seeds, examples].",
        ),
        (
            torch.tensor([1.0, math.nan, math.inf]),
            "per_example has 2 value(s) that are no numbers, the first nan: there is no interval of them.",
        ),
    ],
)
def test_values_without_an_interval_are_refused(values, message):
    with pytest.raises(iv.MetricError) as caught:
        bootstrap_interval(values)
    assert str(caught.value) == message


def test_methods_on_different_examples_are_refused():
    with pytest.raises(iv.MetricError) as caught:
        bootstrap_difference(torch.ones(3), torch.ones(4))
    assert str(caught.value) == (
        "first has 3 examples and second 4. A paired difference needs both for the same examples."
    )
    with pytest.raises(
        iv.MetricError, match=r"first has 2 seeds and second 3. Give equally many, or one of either."
    ):
        bootstrap_difference(torch.ones(2, 4), torch.ones(3, 4))


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_a_confidence_that_is_no_share_is_refused(confidence):
    with pytest.raises(iv.ConfigError) as caught:
        bootstrap_interval(torch.ones(3), confidence=confidence)
    assert str(caught.value) == f"confidence={confidence}: give a number between 0 and 1, such as 0.95."


def test_a_number_of_draws_below_one_is_refused():
    with pytest.raises(iv.ConfigError, match=r"samples=0: give a whole number from 1 on, such as 2000."):
        bootstrap_interval(torch.ones(3), samples=0)
