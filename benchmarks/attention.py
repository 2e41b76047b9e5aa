"""What reading and editing attention patterns costs in each library that is installed.

Five jobs at the middle layer, on prompts of 8 and of 64 tokens:

    all patterns   the patterns of all layers
    one pattern    that of the middle layer
    zero a key     one head's column set to zero in the pattern, after the softmax
    mask a key     the same column forbidden in the scores, before the softmax
    untouched      the pattern handed to the user's code, which leaves it as it is

The first two are ratios to what one writes without a library: the model with eager attention, asked for
`output_attentions=True`. The edits are ratios to the plain forward pass of the model as it was loaded, with
fused attention and nothing edited: what an edit adds is what it costs. By hand there are two ways, both
shown: eager attention everywhere with the attention function replaced, and fused attention everywhere but in
the layer that is edited.

Every library works in the cheapest way that it offers for the job. Each gets the same weight tensors, in a
copy of the model's modules; their calls take turns in one process, on one thread, by CPU time, as in
`benchmarks.overhead`. Every library's result is compared with that of the model edited by hand.

easyroutine needs an older transformers and so an environment of its own: `benchmarks/easyroutine.md`.

Example:
    python -m benchmarks.attention                              # everything, some twenty minutes
    python -m benchmarks.attention --quick                      # few rounds: does it all run and agree?
    python -m benchmarks.attention --markdown --models smollm2  # as tables for the documentation
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks.attention_contenders import (
    BY_HAND,
    CONTENDERS,
    EAGER,
    JOBS,
    PLAIN,
    Case,
    Contender,
    Job,
    case_on,
    load,
)
from benchmarks.overhead import BLOCK_SECONDS, MODELS, Spread, aligned, installed, seconds_of, versions

BATCHES = (1, 16)
LENGTHS = (8, 64)
TOLERANCE = 5e-4
"""How far a library's patterns or logits may be from the hand-written ones, relative to their largest value."""


# --- measuring ---


@dataclass(frozen=True)
class Result:
    """What one contender needed for one job."""

    model: str
    batch: int
    tokens: int
    job: str
    contender: str
    milliseconds: Spread
    ratio: Spread
    difference: float | None  # the largest, relative to the largest value expected; None if nothing is edited


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference, over the largest expected value; infinite if shapes or numbers differ."""
    if [tuple(x.shape) for x in found] != [tuple(x.shape) for x in expected]:
        return float("inf")
    scale = max(x.abs().max().item() for x in expected)
    return max((x - y).abs().max().item() for x, y in zip(found, expected, strict=True)) / scale


def measure(
    name: str, case: Case, job: Job, baseline: str, contenders: Sequence[Contender], rounds: int
) -> list[Result]:
    """Let the contenders take turns, each round beginning with another one."""
    calls = {
        entry.label: entry.prepare(case, job.name) for entry in contenders if entry.takes(case, job.name)
    }
    expected = calls[job.expected]()
    differences = {
        label: None
        if job.expected == BY_HAND and label in (PLAIN, EAGER)  # these edit nothing
        else difference(call(), expected)
        for label, call in calls.items()
    }
    del expected
    gc.freeze()  # what was prepared is not searched for garbage again and again
    repeats = max(1, round(BLOCK_SECONDS / min(seconds_of(calls[baseline], 2) for _ in range(2))))

    seconds: dict[str, list[float]] = {label: [] for label in calls}
    turns = list(calls)
    for number in range(rounds):
        first = number % len(turns)
        for label in turns[first:] + turns[:first]:
            seconds[label].append(seconds_of(calls[label], repeats))
    gc.unfreeze()
    return [
        Result(
            model=name,
            batch=case.ids.shape[0],
            tokens=case.ids.shape[1],
            job=job.name,
            contender=label,
            milliseconds=Spread.of([1000 * second for second in seconds[label]]),
            ratio=Spread.of(
                [own / base for own, base in zip(seconds[label], seconds[baseline], strict=True)]
            ),
            difference=differences[label],
        )
        for label in calls
    ]


# --- reporting ---


def as_text(results: Sequence[Result]) -> str:
    rows = [["model", "batch", "tokens", "job", "contender", "ms", "ratio", "differs by"]]
    rows += [
        [
            result.model,
            str(result.batch),
            str(result.tokens),
            result.job,
            result.contender,
            result.milliseconds.text(".2f"),
            result.ratio.text(".2f", "x"),
            "" if result.difference is None else f"{result.difference:.1e}",
        ]
        for result in results
    ]
    return aligned(rows)


def as_markdown(results: Sequence[Result]) -> str:
    """One table a job: one row a contender, one column a case."""
    tables = []
    for job in dict.fromkeys(result.job for result in results):
        chosen = [result for result in results if result.job == job]
        cases = list(dict.fromkeys((result.model, result.batch, result.tokens) for result in chosen))
        found = {
            (result.contender, result.model, result.batch, result.tokens): result.ratio.text(".2f", "x")
            for result in chosen
        }
        heads = [f"{model}, {batch} x {tokens}" for model, batch, tokens in cases]
        lines = [f"| {job} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(cases)]
        for label in dict.fromkeys(result.contender for result in chosen):
            cells = [found.get((label, *case), "") for case in cases]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def rounds_for(name: str, case: Case, *, quick: bool) -> int:
    if quick:
        return 3
    if name != "smollm2":
        return 30
    return {8: 16, 64: 12, 128: 10}.get(case.ids.numel(), 5)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="default: 1 16")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(LENGTHS), help="default: 8 64")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="default: all")
    parser.add_argument("--only", nargs="+", metavar="PACKAGE", help="leave out the other libraries")
    parser.add_argument(
        "--baseline", choices=[PLAIN, EAGER], help="one baseline for all jobs, where they have it"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument(
        "--rounds", type=int, help="rounds of each case, instead of 30, or 16 to 5 for SmolLM2"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print everything as JSON")
    output.add_argument("--markdown", action="store_true", help="print tables for the documentation")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # what the libraries warn of is not the subject here
    packages = installed((c.package for c in CONTENDERS), options.only)
    contenders = [entry for entry in CONTENDERS if entry.package is None or entry.package in packages]

    results: list[Result] = []
    for name in options.models:
        model = load(name)
        for batch in options.batches:
            for tokens in options.lengths:
                case = case_on(model, batch, tokens)
                rounds = options.rounds or rounds_for(name, case, quick=options.quick)
                for job in (JOBS[name] for name in options.jobs):
                    baseline = options.baseline or job.baseline
                    if not any(
                        entry.label == baseline and entry.takes(case, job.name) for entry in contenders
                    ):
                        baseline = job.baseline
                    print(
                        f"{name}, {batch} x {tokens} tokens, {job.name}: {rounds} rounds",
                        file=sys.stderr,
                        flush=True,
                    )
                    with torch.no_grad():
                        results += measure(name, case, job, baseline, contenders, rounds)

    if options.json:
        figures = [asdict(result) for result in results]
        print(json.dumps({"versions": versions(packages), "results": figures}, indent=2))
    else:
        print((as_markdown if options.markdown else as_text)(results))
        print(f"\n{versions(packages)}; one thread, CPU time, median (quartiles).")

    wrong = [result for result in results if not (result.difference or 0) <= TOLERANCE]
    for result in wrong:
        print(
            f"{result.contender}, {result.job} on {result.model}, {result.batch} x {result.tokens} tokens: the"
            f" result differs by {result.difference:.1e}, more than {TOLERANCE:g}.",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
