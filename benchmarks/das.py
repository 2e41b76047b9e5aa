"""What it costs to train an alignment (DAS) in each library that is installed, and whether the same comes out.

At the middle layer and the last token, a batch of 32 pairs of prompts of 8 tokens a step, from the same basis, in
the same order, with Adam and the same learning rates: 4 directions, and a rotation of the whole space of which half
is swapped. By hand source and base run from end to end; pyvene runs its own loop, `train_alignment`. This library
computes once what does not change, so two sets of 256 pairs are trained on: one in which no prompt comes twice, and
one of 56 prompts. `suffix alone` is what none can do without: the blocks above the middle on the last token,
forward and backward, with everything else known.

The trainings take turns, a step each, in one process, on one thread, by CPU time. `a step` is one after the first
epoch; the whole training includes everything else: reading the data, the checks, what is kept beforehand, and with
this library also the measuring at the end. The first losses and the first gradients with respect to the basis, along
the orthonormal matrices, are compared with the hooks'; IIA is measured by hand on 128 other pairs.

Example:
    python -m benchmarks.das                                # everything, the better part of an hour
    python -m benchmarks.das --quick                        # tiny model: does it all run and agree?
    python -m benchmarks.das --markdown --models smollm2 --parts speed --ranks "rank 4"
    python -m benchmarks.das --models smollm2 --others 12   # the others stop after an epoch and four steps
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from transformers.utils import logging

from benchmarks.das_contenders import CONTENDERS, HAND, Contender, accuracy
from benchmarks.das_memory import JOBS, memory
from benchmarks.das_report import Figures, Result, as_markdown, as_text, results_of
from benchmarks.das_task import BATCH, DATA, MODELS, PAIRS, RANKS, Task, task_on
from benchmarks.das_turns import take_turns
from benchmarks.overhead import installed, versions

TOLERANCE = 1e-5
"""How far first losses and gradients may be from those of the hooks, relative to them."""

STEPS, QUICK_STEPS = 40, 12
PARTS = ("speed", "memory")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, help="default: all, with --quick the tiny one")
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA), help="default: both")
    parser.add_argument("--ranks", nargs="+", choices=RANKS, default=list(RANKS), help="default: both")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: both")
    parser.add_argument("--only", nargs="+", metavar="PACKAGE", help="leave out the other libraries")
    parser.add_argument("--quick", action="store_true", help="tiny model, one round, few steps")
    parser.add_argument("--steps", type=int, help=f"instead of {STEPS}, which are 5 epochs")
    parser.add_argument(
        "--others",
        type=int,
        help="let the others take as many steps only, more than an epoch's, and multiply",
    )
    parser.add_argument("--rounds", type=int, help="trainings of each, instead of 5, or of 1 for SmolLM2")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print everything as JSON")
    output.add_argument("--markdown", action="store_true", help="print tables for the documentation")
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 2:
        parser.error(f"--steps {options.steps}: the first step is not like the others; ask for 2 or more")
    if options.others is not None and options.others <= PAIRS // BATCH:
        parser.error(f"--others {options.others}: ask for more than the {PAIRS // BATCH} steps of an epoch")

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # what the libraries warn of is not the subject here
    packages = installed((c.package for c in CONTENDERS), options.only)
    contenders = [c for c in CONTENDERS if c.package is None or c.package in packages]
    models = options.models or [name for name in MODELS if not (options.quick and name == "smollm2")]
    load_before = os.getloadavg()[0]

    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    figures = Figures(steps)
    for name in models:
        rounds = options.rounds or (1 if options.quick or name == "smollm2" else 5)
        model = MODELS[name]()
        for data in options.data:
            for rank in options.ranks:
                task = replace(task_on(name, model, data, rank, steps=steps), taken=options.others)
                if "speed" in options.parts:
                    say(f"{name}, {data}, {rank}: {rounds} rounds of {len(contenders)} trainings")
                    found = measure(name, rank, task, contenders, rounds)
                    say("    " + ", ".join(f"{r.contender} {r.milliseconds.median:.3g} ms" for r in found))
                    figures.results.extend(found)
        if "memory" in options.parts:
            jobs = [job for job, (package, _) in JOBS.items() if package is None or package in packages]
            for data in options.data[:1]:
                for rank in options.ranks[:1] if options.quick else options.ranks:
                    say(f"{name}, {data}, {rank}: memory")
                    figures.memory.extend(memory(name, data, rank, job) for job in jobs)

    load = f"load average {load_before:.2f} before, {os.getloadavg()[0]:.2f} after"
    if options.others:
        load += (
            f"; all but intervenable took {options.others} steps, and the seconds of the others are as theirs"
        )
    if options.json:
        print(json.dumps({"versions": versions(packages), "load": load, **asdict(figures)}, indent=2))
    else:
        print((as_markdown if options.markdown else as_text)(figures))
        print(f"\n{versions(packages)}; one thread, CPU time, median (quartiles); {load}.")

    wrong = faults(figures.results)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


def measure(name: str, rank: str, task: Task, contenders: Sequence[Contender], rounds: int) -> list[Result]:
    """Let all train in turns, some times over, and see what the first of the trainings learned."""
    done = []
    for _ in range(rounds):
        done.append(take_turns({each.label: each.prepare(task) for each in contenders}))
    bases = {label: run.learned.basis for label, run in done[0].items()}
    ended = {label for label, run in done[0].items() if len(run.learned.losses) == task.steps}
    right = {
        label: accuracy(task, basis) for label, basis in bases.items() if basis is not None and label in ended
    }
    return results_of(name, rank, task, done, right)


def faults(results: Sequence[Result]) -> list[str]:
    """What is not as the hooks have it, in words."""
    found = []
    by_hand = {(r.model, r.data, r.rank): r for r in results if r.contender == HAND}
    for result in results:
        hooks = by_hand[result.model, result.data, result.rank]
        name = f"{result.contender} on {result.model}, {result.data}, {result.rank}"
        for what, difference in (
            ("first loss differs", result.loss_difference),
            ("first gradient differs", result.gradient_difference),
        ):
            if difference is not None and not difference <= TOLERANCE:
                found.append(
                    f"{name}: the {what} from the hooks' by {difference:.1e}, more than {TOLERANCE:g}."
                )
        one, other = result.accuracy, hooks.accuracy
        if one and other and not (one.low <= other.high and other.low <= one.high):
            found.append(f"{name}: IIA is {one.text()}, and the hooks' {other.text()}.")
    return found


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
