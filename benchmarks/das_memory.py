"""The most memory that a process holds while it trains an alignment for an epoch.

Each figure comes from a fresh process, which loads the model and the library, forgets the peak of the loading where
the system lets it, and does one thing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from transformers.utils import logging

from benchmarks.das_contenders import (
    HAND,
    OURS,
    PYVENE,
    Learned,
    Pause,
    Training,
    by_hand,
    intervenable,
    pyvene,
)
from benchmarks.das_task import BATCH, MODELS, Task, task_on
from benchmarks.sweep_memory import MEGABYTE, forget_the_peak, peak

PLAIN, TIGHT = "plain forward pass", "intervenable, 4 MB"


def plain(task: Task) -> Training:
    def train(pause: Pause) -> Learned:
        with torch.no_grad():
            task.model(task.pairs.base[:BATCH])
        return Learned([])

    return train


JOBS: Mapping[str, tuple[str | None, object]] = {
    PLAIN: (None, plain),
    HAND: (None, by_hand),
    OURS: ("intervenable", intervenable),
    TIGHT: ("intervenable", partial(intervenable, memory="4MB")),
    PYVENE: ("pyvene", pyvene),
}
"""What is measured, and what has to be importable."""


@dataclass(frozen=True)
class Memory:
    """What one process held, in megabytes."""

    model: str
    data: str
    rank: str
    job: str
    before: float
    """With model and libraries loaded."""

    peak: float


def memory(model: str, data: str, rank: str, job: str) -> Memory:
    """Run one job in a process of its own."""
    program = f"from benchmarks.das_memory import report; report({model!r}, {data!r}, {rank!r}, {job!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    before, most = map(float, done.stdout.split("held")[-1].split())
    return Memory(model, data, rank, job, before, most)


def report(model: str, data: str, rank: str, job: str) -> None:
    """What the fresh process does: print what it held before and at most, in megabytes."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    task = task_on(model, MODELS[model](), data, rank, steps=1)
    task = task_on(model, task.model, data, rank, steps=task.steps_per_epoch)
    prepare = JOBS[job][1]
    assert callable(prepare)
    training = prepare(task)
    forget_the_peak()
    before = peak()
    training(lambda: None)
    print("held", before / MEGABYTE, peak() / MEGABYTE)
