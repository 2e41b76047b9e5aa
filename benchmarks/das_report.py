"""What `benchmarks.das` found, compared with this library, as text and as tables for the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.das_contenders import HAND, LIMIT, OURS
from benchmarks.das_memory import Memory
from benchmarks.das_task import Task
from benchmarks.das_turns import Run, steady, whole
from benchmarks.overhead import Spread, aligned
from benchmarks.sweep_report import Table, markdown
from benchmarks.sweep_turns import spread


@dataclass(frozen=True)
class Accuracy:
    """A share of so many examples, with the Wilson interval of 95%."""

    share: float
    low: float
    high: float

    @classmethod
    def of(cls, right: Tensor) -> Accuracy:
        count, share = len(right), right.double().mean().item()
        z = statistics.NormalDist().inv_cdf(0.975)
        middle = (share + z * z / (2 * count)) / (1 + z * z / count)
        half = z / (1 + z * z / count) * (share * (1 - share) / count + z * z / (4 * count**2)) ** 0.5
        return cls(share, middle - half, middle + half)

    def text(self) -> str:
        return f"{self.share:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Result:
    """What one way to train needed, and what came out."""

    model: str
    data: str
    rank: str
    contender: str
    milliseconds: Spread  # of a step after the first epoch
    ratio: Spread | None  # of such a step to the same one of this library
    seconds: Spread  # of everything, what is kept beforehand included
    whole_ratio: float | None  # of everything to this library's
    first_loss: float
    last_loss: float
    loss_difference: float  # of the first loss from the hooks', relative
    gradient_difference: float | None  # likewise, of the norm
    accuracy: Accuracy | None  # on the held-out pairs, in the first round
    notes: Sequence[str] = ()


def results_of(
    name: str, rank: str, task: Task, rounds: Sequence[Mapping[str, Run]], right: Mapping[str, Tensor]
) -> list[Result]:
    """One result a contender, from some rounds of trainings and the held-out pairs that came out right."""

    def steps(run: Run) -> list[float]:
        return steady(run.seconds, task.steps_per_epoch)

    def seconds(run: Run) -> float:
        return whole(run.seconds, task.steps, task.steps_per_epoch)

    by_hand = rounds[0][HAND].learned
    found = []
    for label in rounds[0]:
        runs = [each[label] for each in rounds]
        ours = [each[OURS] for each in rounds if OURS in each and label != OURS]
        pairs = list(zip(runs, ours, strict=False))
        ratios = [one / own for run, our in pairs for one, own in zip(steps(run), steps(our), strict=False)]
        totals = [seconds(run) / seconds(our) for run, our in pairs]
        learned = runs[0].learned
        off = None
        if learned.gradient is not None and by_hand.gradient is not None:
            off = ((learned.gradient - by_hand.gradient).norm() / by_hand.gradient.norm()).item()
        found.append(
            Result(
                model=name,
                data=task.data,
                rank=rank,
                contender=label,
                milliseconds=spread([1000 * second for run in runs for second in steps(run)]),
                ratio=spread(ratios) if ratios else None,
                seconds=spread([seconds(run) for run in runs]),
                whole_ratio=statistics.median(totals) if totals and label != LIMIT else None,
                first_loss=learned.losses[0],
                last_loss=learned.losses[-1],
                loss_difference=abs(learned.losses[0] - by_hand.losses[0]) / abs(by_hand.losses[0]),
                gradient_difference=off,
                accuracy=Accuracy.of(right[label]) if label in right else None,
                notes=learned.notes,
            )
        )
    return found


@dataclass(frozen=True)
class Figures:
    """All that was measured, in order."""

    steps: int = 0
    results: list[Result] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)


def as_text(figures: Figures) -> str:
    return "\n\n".join(aligned(table) for table in tables(figures) if len(table) > 1)


def as_markdown(figures: Figures) -> str:
    return "\n\n".join(markdown(table) for table in tables(figures) if len(table) > 1)


def tables(figures: Figures) -> list[Table]:
    return [trainings(figures), peaks(figures)]


def trainings(figures: Figures) -> Table:
    """A row for each contender of each task."""
    whole = f"{figures.steps} steps, s"
    rows = [
        [
            "model, prompts, rank",
            "",
            "a step, ms",
            "to ours",
            whole,
            "to ours",
            "IIA",
            "first loss",
            "gradient",
        ]
    ]
    for result in figures.results:
        rows.append(
            [
                f"{result.model}, {result.data}, {result.rank}",
                result.contender,
                result.milliseconds.text(".1f"),
                result.ratio.text(".2f", "x") if result.ratio else "",
                "" if result.contender == LIMIT else f"{result.seconds.median:.2f}",
                f"{result.whole_ratio:.2f}x" if result.whole_ratio else "",
                result.accuracy.text() if result.accuracy else "",
                f"{result.first_loss:.5f}",
                "" if result.gradient_difference is None else f"{result.gradient_difference:.0e}",
            ]
        )
    return rows


def peaks(figures: Figures) -> Table:
    """Megabytes of each process."""
    rows = [["model, prompts, rank", "", "held before, MB", "peak, MB", "more, MB"]]
    for found in figures.memory:
        rows.append(
            [
                f"{found.model}, {found.data}, {found.rank}",
                found.job,
                f"{found.before:.0f}",
                f"{found.peak:.0f}",
                f"{found.peak - found.before:.0f}",
            ]
        )
    return rows
