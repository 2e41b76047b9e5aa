"""A training begins with the loss and the gradient that it begins with in pyvene."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarks.das_contenders import CONTENDERS, HAND, OURS, PYVENE
from benchmarks.das_task import DATA, MODELS, RANKS, task_on

# What pyvene and its dependencies warn of is theirs (2026-11).
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

BY_LABEL = {contender.label: contender for contender in CONTENDERS}


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("rank", RANKS)
def test_first_losses_and_gradients_with_respect_to_the_basis_are_equal(rank, data):
    assert importlib.util.find_spec("pyvene"), "pyvene is not installed: `make peers` installs it."
    task = task_on("tiny-llama", MODELS["tiny-llama"](), data, rank, pairs=64, steps=3)
    by_hand, ours, theirs = (BY_LABEL[label].prepare(task)(lambda: None) for label in (HAND, OURS, PYVENE))

    for other in (by_hand, theirs):
        assert ours.losses[0] == pytest.approx(other.losses[0], rel=1e-6)
        assert (ours.gradient - other.gradient).norm() < 1e-5 * other.gradient.norm()
    assert by_hand.losses == pytest.approx(theirs.losses, rel=1e-4)
    # The first step has a rate of zero; the second begins with the same basis and another batch.
    assert ours.losses[1] == pytest.approx(theirs.losses[1], rel=1e-4)
