"""What a patching sweep costs in each library that is installed: a whole map, from two prompts to the numbers.

Two sweeps, of the residual stream by layer and position and of the attention heads by layer and head, each on
prompts of 5 tokens, on prompts of 14 tokens that differ at one word, and on prompts that differ from their first
token on. The metric is a plain function of the logits. By hand a sweep is a forward pass with a hook for each
cell; the other libraries do what their own functions or tutorials do. Nothing is kept from one sweep to the next
but what this library remembers of a model; `first time` has it learn that, too.

Each library gets the same weight tensors, in a copy of the model's modules; their calls take turns in one
process, on one thread, by CPU time, as in `benchmarks.overhead`. This library sweeps before and after each of
the others, and is compared with its two neighbours. All numbers are compared, cell by cell, with those of the
hooks.

Beside that: the limit by arithmetic (`benchmarks.sweep_arithmetic`), the peak of memory
(`benchmarks.sweep_memory`), and how the cost grows (`benchmarks.sweep_growth`).

Example:
    python -m benchmarks.sweep                              # everything, the better part of an hour
    python -m benchmarks.sweep --quick                      # tiny models: does it all run and agree?
    python -m benchmarks.sweep --layers 3                   # the others patch in three layers, evenly spread
    python -m benchmarks.sweep --markdown --models smollm2 --parts speed --pairs "5 tokens"
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

from benchmarks.overhead import MODELS, installed, versions
from benchmarks.sweep_arithmetic import best_rate, limit_of
from benchmarks.sweep_contenders import CONTENDERS, OURS, PAIRS, SWEEPS, case_on
from benchmarks.sweep_growth import VARIED, growth
from benchmarks.sweep_memory import JOBS, PLAIN, TIGHT, memory
from benchmarks.sweep_report import Figures, as_markdown, as_text
from benchmarks.sweep_turns import measure

TOLERANCE = 1e-3
"""How far a library's numbers may be from those of the hooks, relative to how far those are apart."""

PARTS = ("speed", "memory", "growth")

GROWING = ("tiny-llama", "smollm2")
"""The models whose sizes are varied."""


def rounds_for(name: str, *, quick: bool) -> int:
    return 1 if quick or name == "smollm2" else 5


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="*", choices=MODELS, help="default: all, with --quick the tiny ones"
    )
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), help="default: all")
    parser.add_argument("--sweeps", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="default: both")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--only", nargs="+", metavar="PACKAGE", help="leave out the other libraries")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round, little growth")
    parser.add_argument(
        "--repeats", type=int, help="rounds of the libraries, instead of 5, or of 1 for SmolLM2"
    )
    parser.add_argument(
        "--layers", type=int, help="let all others patch in as many layers only, and multiply their seconds"
    )
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print everything as JSON")
    output.add_argument("--markdown", action="store_true", help="print tables for the documentation")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # what the libraries warn of is not the subject here
    # Ours comes before nnsight, which gives `object` a method when it is imported.
    packages = installed((c.package for c in CONTENDERS), options.only)
    contenders = [c for c in CONTENDERS if c.package is None or c.package in packages]
    models = options.models or [name for name in MODELS if not (options.quick and name == "smollm2")]
    load_before = os.getloadavg()[0]

    figures = Figures()
    for name in models:
        rounds = options.repeats or rounds_for(name, quick=options.quick)
        model = MODELS[name]()
        cases = [
            (pair, replace(case_on(name, model, PAIRS[pair], sweep), sampled=options.layers))
            for sweep in options.sweeps
            for pair in options.pairs
        ]
        if "speed" in options.parts:
            with torch.no_grad():
                rate = best_rate(model)
                for pair, case in cases:
                    say(f"{name}, {pair}, {case.sweep}: {rounds} rounds of {len(contenders)}")
                    measured = measure(name, pair, case, contenders, rounds)
                    say("    " + ", ".join(f"{r.contender} {r.seconds.median:.3g} s" for r in measured))
                    figures.results.extend(measured)
                    figures.limits.append(limit_of(name, pair, case, rate))
        if OURS not in packages:
            continue
        if "memory" in options.parts and (name in GROWING or not options.quick):
            for pair, case in cases[:1] if options.quick else cases:
                say(f"{name}, {pair}, {case.sweep}: memory")
                jobs = (PLAIN, TIGHT) if options.quick else JOBS
                figures.memory.extend(memory(name, pair, case.sweep, job) for job in jobs)
        if "growth" in options.parts and name in GROWING:
            count, repeats = (2, 1) if options.quick else (None, 3)
            for varied, values in VARIED.items():
                say(f"{name}, growth with {varied}")
                with torch.no_grad():
                    for size in growth(name, model, varied, values[:count], repeats):
                        say(f"    {size.value}: hooks {size.hooks:.3g} s, intervenable {size.ours:.3g} s")
                        figures.growth.append(size)

    load = f"load average {load_before:.2f} before, {os.getloadavg()[0]:.2f} after"
    if options.layers:
        load += (
            f"; all but intervenable patched in {options.layers} layers of each model, and were multiplied"
        )
    if options.json:
        print(json.dumps({"versions": versions(packages), "load": load, **asdict(figures)}, indent=2))
    else:
        print((as_markdown if options.markdown else as_text)(figures))
        print(f"\n{versions(packages)}; one thread, CPU time, median (quartiles); {load}.")

    wrong = [result for result in figures.results if not result.difference <= TOLERANCE]
    for result in wrong:
        print(
            f"{result.contender}, {result.sweep} of {result.model}, {result.prompts}: the numbers differ from the"
            f" hooks' by {result.difference:.1e} of their range, more than {TOLERANCE:g}.",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
