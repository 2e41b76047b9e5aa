"""Let the contenders of `benchmarks.sweep` take turns, and compare each with this library just before and after."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from benchmarks.overhead import BLOCK_SECONDS, Spread
from benchmarks.sweep_contenders import HOOKS, OURS, Call, Case, Contender

LONG_SECONDS = 2.0
"""A sweep by hooks that takes longer needs no trial run, and is run less often."""


@dataclass(frozen=True)
class Result:
    """What one contender needed for one sweep."""

    model: str
    prompts: str
    sweep: str
    cells: int
    contender: str
    seconds: Spread
    ratio: Spread | None  # to this library's sweeps just before and after; None where it takes no part
    difference: float  # the largest from the hooks' numbers, over the range of those


@dataclass(frozen=True)
class Turn:
    """One contender's turn."""

    label: str
    seconds: float
    values: Tensor


def spread(figures: Sequence[float]) -> Spread:
    return Spread.of(figures) if len(figures) > 1 else Spread(figures[0], figures[0], figures[0])


def turns(contenders: Sequence[Contender], case: Case, rounds: int) -> Iterator[Turn]:
    """Let them take turns, each round beginning with another one, and this library between all of them."""
    begun = time.process_time()
    case.model(case.corrupted)
    expected = (time.process_time() - begun) * len(case.rows) * len(case.columns)
    repeats = max(1, round(BLOCK_SECONDS / expected))
    lasting = [contender for contender in contenders if not contender.fresh]
    prepared = {contender.label: contender.prepare(case) for contender in lasting}
    own = [contender for contender in contenders if contender.label == OURS]
    others = [contender for contender in contenders if contender.label != OURS]
    for contender in lasting if expected < LONG_SECONDS else own:
        prepared[contender.label]()
    gc.freeze()  # what was prepared is not searched for garbage again and again

    def turn(contender: Contender) -> Turn:
        number = 1 if contender.fresh else repeats
        call: Call = contender.prepare(case) if contender.fresh else prepared[contender.label]
        gc.collect()
        begun = time.process_time()
        for _ in range(number):
            values = call()
        seconds = (time.process_time() - begun) / number
        if contender.package == OURS:
            return Turn(contender.label, seconds, values[case.rows])
        # The clean run is as long as a cell, and there is one of it however many cells there are.
        return Turn(contender.label, seconds * (case.cells + 1) / (values.numel() + 1), values)

    for number in range(rounds):
        first = number % len(others)
        for contender in others[first:] + others[:first]:
            yield from map(turn, [*own, contender])
    yield from map(turn, own)
    gc.unfreeze()


def neighbours(history: Sequence[Turn], index: int) -> list[float]:
    """Seconds of this library's turns that come just before and just after one turn."""
    before = [turn.seconds for turn in history[:index] if turn.label == OURS][-1:]
    after = [turn.seconds for turn in history[index + 1 :] if turn.label == OURS][:1]
    return before + after


def measure(
    model: str, prompts: str, case: Case, contenders: Sequence[Contender], rounds: int
) -> list[Result]:
    history = list(turns(contenders, case, rounds))
    expected = next(turn.values for turn in history if turn.label == HOOKS)
    scale = (expected.max() - expected.min()).item()
    results = []
    for contender in contenders:
        label = contender.label
        own = [index for index, turn in enumerate(history) if turn.label == label]
        ratios = [
            history[index].seconds / statistics.mean(found)
            for index in own
            if (found := neighbours(history, index))
        ]
        results.append(
            Result(
                model=model,
                prompts=prompts,
                sweep=case.sweep,
                cells=case.cells,
                contender=label,
                seconds=spread([history[index].seconds for index in own]),
                ratio=spread(ratios) if ratios else None,
                difference=max(difference(history[index].values, expected) for index in own) / scale,
            )
        )
    return results


def difference(found: Tensor, expected: Tensor) -> float:
    """The largest between two tables; infinite if their shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return (found - expected).abs().max().item()
