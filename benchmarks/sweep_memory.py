"""The most memory that a process holds while it sweeps, beside one that runs a plain forward pass.

Each figure comes from a fresh process, which loads the model, forgets the peak of the loading where the
system lets it, and does one thing.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

import intervenable as iv  # noqa: F401 (in each of the processes, so that importing it is in all figures)
from benchmarks.overhead import MODELS
from benchmarks.sweep_contenders import PAIRS, Call, Case, Contender, by_hand, case_on, intervenable

MEGABYTE = 1_000_000
PLAIN, TIGHT = "plain forward pass", "intervenable, 64 MB"


def plain(case: Case) -> Call:
    return lambda: case.model(case.corrupted).logits


JOBS: Mapping[str, tuple[Contender, int]] = {
    contender.label: (contender, budget)
    for contender, budget in (
        (Contender(PLAIN, None, plain), 0),
        (Contender("hooks by hand", None, by_hand), 0),
        (Contender(TIGHT, "intervenable", partial(intervenable, memory="64MB")), 64),
        (Contender("intervenable, 1 GB", "intervenable", intervenable), 1000),
    )
}
"""What is measured, and the budget in megabytes that it was given."""


@dataclass(frozen=True)
class Memory:
    """The peak of one process."""

    model: str
    prompts: str
    sweep: str
    job: str
    budget: int  # megabytes
    peak: float  # megabytes


def memory(model: str, prompts: str, sweep: str, job: str) -> Memory:
    """Run one job in a process of its own."""
    program = (
        f"from benchmarks.sweep_memory import report; report({model!r}, {prompts!r}, {sweep!r}, {job!r})"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return Memory(model, prompts, sweep, job, JOBS[job][1], float(done.stdout.split("peak")[-1]))


def report(model: str, prompts: str, sweep: str, job: str) -> None:
    """What the fresh process does: print the peak in megabytes."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    with torch.no_grad():
        case = case_on(model, MODELS[model](), PAIRS[prompts], sweep)
        call = JOBS[job][0].prepare(replace(case, sampled=1))  # all layers of the hooks need as much
        forget_the_peak()
        call()
    print("peak", peak() / MEGABYTE)


def forget_the_peak() -> None:
    """Let Linux count anew from what the process holds now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """Bytes of memory that this process held at most.

    Linux lets a new process inherit `ru_maxrss` of the one that started it, so there its status is read.
    """
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
