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
    python -m benchmarks.sweep --markdown --models smollm2 --parts speed --pairs "5 tokens"
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers.utils import logging

from benchmarks.overhead import BLOCK_SECONDS, MODELS, Spread, aligned, installed, versions
from benchmarks.sweep_arithmetic import best_rate, changed, hook_loop
from benchmarks.sweep_contenders import (
    CONTENDERS,
    HOOKS,
    OURS,
    PAIRS,
    SWEEPS,
    Call,
    Case,
    Contender,
    case_on,
)
from benchmarks.sweep_growth import VARIED, Growth, growth
from benchmarks.sweep_memory import JOBS, PLAIN, Memory, memory

TOLERANCE = 1e-3
"""How far a library's numbers may be from those of the hooks, relative to how far those are apart."""

LONG_SECONDS = 2.0
"""A sweep by hooks that takes longer needs no trial run, and is run less often."""

PARTS = ("speed", "memory", "growth")


# --- measuring ---


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
class Limit:
    """What one sweep asks of the processor."""

    model: str
    prompts: str
    sweep: str
    by_hooks: int  # multiply-adds
    changed: int  # those of them that the patches can change
    busy_seconds: float  # that a fully busy processor would need for the changed ones

    @property
    def ratio(self) -> float:
        return self.by_hooks / self.changed


@dataclass(frozen=True)
class Turn:
    """One contender's turn."""

    label: str
    seconds: float
    values: Tensor


def spread(figures: Sequence[float]) -> Spread:
    return Spread.of(figures) if len(figures) > 1 else Spread(*3 * figures)


def turns(contenders: Sequence[Contender], case: Case, rounds: int) -> Iterator[Turn]:
    """Let them take turns, each round beginning with another one, and this library between all of them."""
    begun = time.process_time()
    case.model(case.corrupted)
    expected = (time.process_time() - begun) * case.cells
    repeats = max(1, round(BLOCK_SECONDS / expected))
    prepared = {contender.label: contender.prepare(case) for contender in contenders}
    own = [contender for contender in contenders if contender.package == OURS]
    others = [contender for contender in contenders if contender.package != OURS]
    for contender in contenders if expected < LONG_SECONDS else own:
        prepared[contender.label]()
    gc.freeze()  # what was prepared is not searched for garbage again and again

    def turn(contender: Contender) -> Turn:
        number = 1 if contender.fresh else repeats
        call: Call = contender.prepare(case) if contender.fresh else prepared[contender.label]
        gc.collect()
        begun = time.process_time()
        for _ in range(number):
            values = call()
        return Turn(contender.label, (time.process_time() - begun) / number, values)

    for number in range(rounds):
        first = number % len(others)
        for contender in others[first:] + others[:first]:
            for entry in (*own, contender):
                yield turn(entry)
    for entry in own:
        yield turn(entry)
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


def limit_of(model: str, prompts: str, case: Case, rate: float) -> Limit:
    possible = changed(case)
    return Limit(model, prompts, case.sweep, hook_loop(case), possible, possible / rate)


# --- reporting ---


def as_text(
    results: Sequence[Result],
    limits: Sequence[Limit],
    peaks: Sequence[Memory],
    sizes: Sequence[Growth],
) -> str:
    parts = []
    if results:
        rows = [["model", "prompts", "sweep", "contender", "CPU s", "ratio to ours", "numbers differ by"]]
        rows += [
            [
                result.model,
                result.prompts,
                f"{result.sweep}, {result.cells} cells",
                result.contender,
                result.seconds.text(".3f"),
                result.ratio.text(".1f", "x") if result.ratio else "",
                f"{result.difference:.1e}",
            ]
            for result in results
        ]
        parts.append(aligned(rows))
    parts += [aligned(rows) for rows in tables(results, limits, peaks, sizes)]
    return "\n\n".join(parts)


def as_markdown(
    results: Sequence[Result],
    limits: Sequence[Limit],
    peaks: Sequence[Memory],
    sizes: Sequence[Growth],
) -> str:
    """One row a contender, one column a case; then the smaller tables."""
    parts = []
    cases = list(dict.fromkeys((r.model, r.prompts, r.sweep, r.cells) for r in results))
    if cases:
        found = {(r.contender, r.model, r.prompts, r.sweep, r.cells): r for r in results}
        rows = [["", *(f"{m}, {p}: {s}, {cells} cells" for m, p, s, cells in cases)]]
        for label in dict.fromkeys(result.contender for result in results):
            row = [label]
            for case in cases:
                result = found[label, *case]
                ratio = f", {result.ratio.text('.1f', 'x')}" if result.ratio and label != OURS else ""
                row.append(f"{result.seconds.median:.3g} s{ratio}")
            rows.append(row)
        parts.append(markdown(rows))
    parts += [markdown(rows) for rows in tables(results, limits, peaks, sizes)]
    return "\n\n".join(parts)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def tables(
    results: Sequence[Result],
    limits: Sequence[Limit],
    peaks: Sequence[Memory],
    sizes: Sequence[Growth],
) -> list[list[list[str]]]:
    """What is the same in both forms: limits, memory and growth."""
    made = []
    if limits:
        measured = {(r.model, r.prompts, r.sweep, r.contender): r for r in results}
        rows = [
            [
                "limits",
                "sweep",
                "10^9 multiply-adds by hooks",
                "that patches can change",
                "ratio",
                "measured",
                "s if fully busy",
                "ours, s",
            ]
        ]
        for limit in limits:
            case = (limit.model, limit.prompts, limit.sweep)
            hooks, ours = measured[*case, HOOKS], measured.get((*case, OURS))
            rows.append(
                [
                    f"{limit.model}, {limit.prompts}",
                    limit.sweep,
                    f"{limit.by_hooks / 1e9:.3g}",
                    f"{limit.changed / 1e9:.3g}",
                    f"{limit.ratio:.1f}x",
                    f"{hooks.ratio.median:.1f}x" if hooks.ratio else "",
                    f"{limit.busy_seconds:.3g}",
                    f"{ours.seconds.median:.3g}" if ours else "",
                ]
            )
        made.append(rows)
    if peaks:
        plain = {(p.model, p.prompts, p.sweep): p.peak for p in peaks if p.job == PLAIN}
        rows = [["memory", "sweep", "", "peak MB", "over a plain pass, MB", "1.5 x plain + budget, MB"]]
        for peak in peaks:
            base = plain[peak.model, peak.prompts, peak.sweep]
            rows.append(
                [
                    f"{peak.model}, {peak.prompts}",
                    peak.sweep,
                    peak.job,
                    f"{peak.peak:.0f}",
                    f"{peak.peak - base:+.0f}",
                    f"{1.5 * base + peak.budget:.0f}" if peak.budget else "",
                ]
            )
        made.append(rows)
    for model, varied in dict.fromkeys((size.model, size.varied) for size in sizes):
        chosen = [size for size in sizes if (size.model, size.varied) == (model, varied)]
        first = chosen[0]
        rows = [
            [f"{model}, {varied}", "cells", "hooks, s", "ours, s", "ratio", "hooks grew", "ours grew", "by"]
        ]
        rows += [
            [
                str(size.value),
                str(size.cells),
                f"{size.hooks:.3g}",
                f"{size.ours:.3g}",
                f"{size.hooks / size.ours:.1f}x",
                f"{size.hooks / first.hooks:.1f}x",
                f"{size.ours / first.ours:.1f}x",
                f"{size.value / first.value:.1f}x",
            ]
            for size in chosen
        ]
        made.append(rows)
    return made


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

    results: list[Result] = []
    limits: list[Limit] = []
    peaks: list[Memory] = []
    sizes: list[Growth] = []
    for name in models:
        rounds = options.repeats or rounds_for(name, quick=options.quick)
        model = MODELS[name]()
        cases = [
            (pair, case_on(name, model, PAIRS[pair], sweep))
            for sweep in options.sweeps
            for pair in options.pairs
        ]
        with torch.no_grad():
            rate = best_rate(model) if "speed" in options.parts else 0.0
            for pair, case in cases if rate else ():
                say(f"{name}, {pair}, {case.sweep}: {rounds} rounds of {len(contenders)}")
                results += measure(name, pair, case, contenders, rounds)
                limits.append(limit_of(name, pair, case, rate))
            if "growth" in options.parts and OURS in packages and name != "tiny-gpt2":
                for varied, values in grown(quick=options.quick).items():
                    say(f"{name}, growth with {varied}")
                    sizes += growth(name, model, varied, values, 1 if options.quick else 3)
        if "memory" in options.parts and OURS in packages:
            for pair, case in cases[:1] if options.quick else cases:
                say(f"{name}, {pair}, {case.sweep}: memory")
                peaks += [memory(name, pair, case.sweep, job) for job in JOBS]
        del model

    load = f"load average {load_before:.2f} before, {os.getloadavg()[0]:.2f} after"
    if options.json:
        figures = {"results": results, "limits": limits, "memory": peaks, "growth": sizes}
        plain = {part: [asdict(entry) for entry in entries] for part, entries in figures.items()}
        print(json.dumps({"versions": versions(packages), "load": load, **plain}, indent=2))
    else:
        print((as_markdown if options.markdown else as_text)(results, limits, peaks, sizes))
        print(f"\n{versions(packages)}; one thread, CPU time, median (quartiles); {load}.")

    wrong = [result for result in results if not result.difference <= TOLERANCE]
    for result in wrong:
        print(
            f"{result.contender}, {result.sweep} of {result.model}, {result.prompts}: the numbers differ from the"
            f" hooks' by {result.difference:.1e} of their range, more than {TOLERANCE:g}.",
            file=sys.stderr,
        )
    return 1 if wrong else 0


def grown(*, quick: bool) -> Mapping[str, Sequence[int]]:
    return {varied: values[:2] for varied, values in VARIED.items()} if quick else VARIED


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
