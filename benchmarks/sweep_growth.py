"""How the cost of a sweep grows with layers, positions and prompts: this library and hooks by hand.

The residual stream of models with random weights and the sizes of the given one; the prompts differ at the
middle token. A hook's cell costs what its neighbour costs, so of a long loop a sample is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers import PreTrainedModel

from benchmarks.overhead import seconds_of
from benchmarks.sweep_contenders import (
    RESIDUAL,
    Case,
    inputs_of,
    intervenable,
    patched_by_hand,
    random_case,
    resized,
)

VARIED: Mapping[str, Sequence[int]] = {
    "layers": (2, 4, 8, 16, 32),
    "positions": (5, 10, 20, 40, 80),
    "prompts": (1, 2, 4, 8),
}
SAMPLED_CELLS = 16
"""Cells of the hook loop that are run; the loop's time follows from them."""


@dataclass(frozen=True)
class Size:
    """How large a sweep is."""

    layers: int = 8
    positions: int = 10
    prompts: int = 1

    def case(self, model: PreTrainedModel) -> Case:
        """A sweep of that size, in a new model of the widths of `model`."""
        middle = self.positions // 2
        return random_case(resized(model, self.layers), self.prompts, self.positions, [middle], RESIDUAL)


@dataclass(frozen=True)
class Growth:
    """What one size of sweep costs."""

    model: str
    varied: str
    value: int
    cells: int
    hooks: float  # CPU seconds
    ours: float  # CPU seconds


def growth(
    name: str, model: PreTrainedModel, varied: str, values: Sequence[int], repeats: int
) -> Iterator[Growth]:
    """One measurement for each value of what is varied, the rest staying as `Size` has it."""
    for value in values:
        case = replace(Size(), **{varied: value}).case(model)
        ours = intervenable(case)
        ours()  # what it learns about a model is not the subject here
        seconds = sorted(seconds_of(ours, 1) for _ in range(repeats))
        yield Growth(name, varied, value, case.cells, hook_seconds(case), seconds[len(seconds) // 2])


def hook_seconds(case: Case) -> float:
    """CPU seconds of the loop by hand, from evenly spread cells of it."""
    cells = [(layer, column) for layer in case.layers for column in case.columns]
    step = max(1, len(cells) // SAMPLED_CELLS)
    sample = cells[::step]
    clean = inputs_of(case.model, case, case.clean)
    run = partial(patched_by_hand, case.model, case, clean)
    first = seconds_of(lambda: inputs_of(case.model, case, case.clean)[0], 1)
    loop = seconds_of(lambda: torch.stack([run(*cell) for cell in sample]), 1)
    return first + loop * len(cells) / len(sample)
