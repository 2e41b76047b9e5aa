"""What one swap costs in each library that is installed: source run, base run, one activation carried over.

`block_output` at the middle layer and the last token, on prompts of 8 tokens. `raw` is two whole forward
passes with hooks written by hand; all other figures are ratios to it. Each library gets the same weight
tensors, in a copy of the model's modules, and their calls take turns in one process, on one thread, by CPU
time: two threads on busy cores wait for each other, and a machine that slows down then slows all of them. A
ratio compares neighbours in time; the tables show the median of the rounds and, in brackets, the quartiles.
Every library's logits are compared with those of `raw`.

Example:
    python -m benchmarks.overhead                              # all models, a few minutes
    python -m benchmarks.overhead --quick                      # few rounds: does everything run and agree?
    python -m benchmarks.overhead --markdown --models smollm2  # as a table for the README
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.utils import logging

TOKENS = 8
BATCHES = (1, 16)
TOLERANCE = 5e-3
"""How far a library's logits may be from those of `raw`; no swap at all is off by 0.5 and more."""

BLOCK_SECONDS = 0.05
"""Calls that are shorter than this are timed several at a time."""


# --- the models ---


def tiny_gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=4, n_embd=64, n_head=4, vocab_size=256, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=4,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=160,
        vocab_size=256,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def smollm2() -> PreTrainedModel:
    from scripts.fetch_smollm2 import smollm2_folder

    return AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()


MODELS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "tiny-gpt2": tiny_gpt2,
    "tiny-llama": tiny_llama,
    "smollm2": smollm2,
}


@dataclass(frozen=True)
class Swap:
    """The job that every library does."""

    model: PreTrainedModel
    base: Tensor  # (batch, TOKENS)
    source: Tensor  # (batch, TOKENS)
    layer: int

    @property
    def batch(self) -> int:
        return self.base.shape[0]

    def blocks_path(self) -> str:
        return "transformer.h" if isinstance(self.model, GPT2LMHeadModel) else "model.layers"

    def block(self) -> nn.Module:
        return self.model.get_submodule(f"{self.blocks_path()}.{self.layer}")


def swap_on(model: PreTrainedModel, batch: int) -> Swap:
    """A swap at the middle layer between two batches of random prompts."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, layers = model.config.vocab_size, model.config.num_hidden_layers
    base, source = torch.randint(vocabulary, (2, batch, TOKENS), generator=generator)
    return Swap(model, base, source, layers // 2)


def with_own_modules(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose modules are its own and whose weights are the very tensors of `model`."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


# --- the contenders: each prepares what a user would prepare once, and returns one call of the job ---

Call = Callable[[], Tensor]


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def raw(swap: Swap) -> Call:
    """Two whole forward passes with hooks written by hand."""
    model, block = swap.model, swap.block()

    def call() -> Tensor:
        kept: list[Tensor] = []

        def read(module: nn.Module, args: Any, output: Any) -> None:
            kept.append(first_of(output)[:, -1].clone())

        def write(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = first_of(output).clone()
            hidden[:, -1] = kept[0]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        with hooked(block, read):
            model(swap.source)
        with hooked(block, write):
            return model(swap.base).logits

    return call


class _Stop(Exception):  # noqa: N818 (it is no error)
    """Ends a forward pass whose rest nobody needs."""


def raw_stopped(swap: Swap) -> Call:
    """By hand too, with a source run that ends at the block by an exception."""
    model, block = swap.model, swap.block()

    def call() -> Tensor:
        kept: list[Tensor] = []

        def read(module: nn.Module, args: Any, output: Any) -> None:
            kept.append(first_of(output)[:, -1].clone())
            raise _Stop

        def write(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = first_of(output).clone()
            hidden[:, -1] = kept[0]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        try:
            with hooked(block, read):
                model(swap.source)
        except _Stop:
            pass
        with hooked(block, write):
            return model(swap.base).logits

    return call


def pyvene_like(library: Any, swap: Swap) -> Call:
    """The same words in pyvene and here, which is what makes moving from one to the other easy."""
    config = library.IntervenableConfig(
        [library.RepresentationConfig(swap.layer, "block_output", "pos", 1)], library.VanillaIntervention
    )
    model = library.IntervenableModel(config, with_own_modules(swap.model))
    base, sources = {"input_ids": swap.base}, [{"input_ids": swap.source}]
    locations = {"sources->base": ([[[TOKENS - 1]] * swap.batch], [[[TOKENS - 1]] * swap.batch])}

    def call() -> Tensor:
        _, intervened = model(base, sources, locations)
        return intervened.logits

    return call


def intervenable(swap: Swap) -> Call:
    import intervenable as iv

    return pyvene_like(iv, swap)


def pyvene(swap: Swap) -> Call:
    import pyvene as pv

    return pyvene_like(pv, swap)


def _transformer_lens(swap: Swap, *, stop: bool) -> Call:
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = with_own_modules(swap.model)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    name = f"blocks.{swap.layer}.hook_out"
    options: dict[str, Any] = {"stop_at_layer": swap.layer + 1} if stop else {}

    def call() -> Tensor:
        _, cache = bridge.run_with_cache(swap.source, names_filter=name, **options)

        def write(hidden: Tensor, hook: Any) -> Tensor:
            hidden = hidden.clone()
            hidden[:, -1] = cache[name][:, -1]
            return hidden

        return bridge.run_with_hooks(swap.base, fwd_hooks=[(name, write)])

    return call


def transformer_lens(swap: Swap) -> Call:
    return _transformer_lens(swap, stop=False)


def transformer_lens_stopped(swap: Swap) -> Call:
    return _transformer_lens(swap, stop=True)


def nnsight(swap: Swap) -> Call:
    from nnsight import NNsight

    model = NNsight(with_own_modules(swap.model))
    block = model.get(f"{swap.blocks_path()}.{swap.layer}")
    returns_tuple = isinstance(block_output(swap), tuple)

    def call() -> Tensor:
        with model.trace(swap.source):
            value = (block.output[0] if returns_tuple else block.output)[:, -1].save()
        with model.trace(swap.base):
            (block.output[0] if returns_tuple else block.output)[:, -1] = value
            logits = model.output.logits.save()
        return logits  # noqa: RET504 (it has its value when the block has ended)

    return call


def nnsight_stopped(swap: Swap) -> Call:
    from nnsight import NNsight

    model = NNsight(with_own_modules(swap.model))
    block = model.get(f"{swap.blocks_path()}.{swap.layer}")
    returns_tuple = isinstance(block_output(swap), tuple)

    def call() -> Tensor:
        with model.trace(swap.source) as tracer:
            value = (block.output[0] if returns_tuple else block.output)[:, -1].save()
            tracer.stop()
        with model.trace(swap.base):
            (block.output[0] if returns_tuple else block.output)[:, -1] = value
            logits = model.output.logits.save()
        return logits  # noqa: RET504 (it has its value when the block has ended)

    return call


def block_output(swap: Swap) -> Any:
    """What the block returns: a tensor or a tuple, which is the model's own affair."""
    seen: list[Any] = []
    with hooked(swap.block(), lambda module, args, output: seen.append(output)):
        swap.model(swap.base[:1])
    return seen[0]


@dataclass(frozen=True)
class Contender:
    """A way to do the job."""

    label: str
    package: str | None  # what has to be importable
    prepare: Callable[[Swap], Call]


CONTENDERS: Sequence[Contender] = (
    Contender("raw", None, raw),
    Contender("raw, source stopped", None, raw_stopped),
    Contender("intervenable", "intervenable", intervenable),
    Contender("pyvene", "pyvene", pyvene),
    Contender("TransformerLens", "transformer_lens", transformer_lens),
    Contender("TransformerLens, source stopped", "transformer_lens", transformer_lens_stopped),
    Contender("nnsight", "nnsight", nnsight),
    Contender("nnsight, source stopped", "nnsight", nnsight_stopped),
)
DISTRIBUTIONS = {"transformer_lens": "transformer-lens"}


# --- measuring ---


@dataclass(frozen=True)
class Spread:
    """The median of some figures and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> Spread:
        low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
        return cls(median, low, high)

    def text(self, form: str, unit: str = "") -> str:
        return f"{self.median:{form}}{unit} ({self.low:{form}}-{self.high:{form}})"


@dataclass(frozen=True)
class Result:
    """What one contender needed for one swap."""

    model: str
    batch: int
    contender: str
    milliseconds: Spread
    ratio: Spread
    logits_difference: float


@dataclass(frozen=True)
class ImportResult:
    """CPU time of importing a package after torch and transformers."""

    package: str
    seconds: Spread


def seconds_of(call: Call, calls: int) -> float:
    """CPU seconds of one call, averaged over `calls`; garbage is collected before the clock starts."""
    gc.collect()
    begun = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - begun) / calls


def measure(name: str, swap: Swap, rounds: int, labels: Sequence[str]) -> list[Result]:
    """Let the contenders take turns, each round beginning with another one."""
    chosen = [contender for contender in CONTENDERS if contender.label in labels]
    calls = {contender.label: contender.prepare(swap) for contender in chosen}
    expected = calls["raw"]()
    differences = {label: (call() - expected).abs().max().item() for label, call in calls.items()}
    gc.freeze()  # what was prepared is not searched for garbage again and again
    repeats = max(1, round(BLOCK_SECONDS / min(seconds_of(calls["raw"], 2) for _ in range(2))))

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
            batch=swap.batch,
            contender=label,
            milliseconds=Spread.of([1000 * second for second in seconds[label]]),
            ratio=Spread.of([own / raw for own, raw in zip(seconds[label], seconds["raw"], strict=True)]),
            logits_difference=differences[label],
        )
        for label in calls
    ]


IMPORT_PROGRAM = """
import time, torch, transformers
begun = time.process_time()
import {package}
print("seconds", time.process_time() - begun)
"""


def import_times(packages: Sequence[str], rounds: int) -> list[ImportResult]:
    """Import each package in fresh processes; the first, which may compile bytecode, does not count."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # An installed package has its bytecode; a checkout must be allowed to keep its own to be compared with it.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    seconds: dict[str, list[float]] = {package: [] for package in packages}
    for number in range(rounds + 1):
        for package in packages:
            command = [sys.executable, "-W", "ignore", "-c", IMPORT_PROGRAM.format(package=package)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            if number:
                seconds[package].append(float(done.stdout.split("seconds")[-1]))
    return [ImportResult(package, Spread.of(figures)) for package, figures in seconds.items()]


# --- reporting ---


def versions(packages: Sequence[str]) -> str:
    names = ["torch", "transformers", *(package for package in packages if package != "intervenable")]
    return ", ".join(f"{name} {importlib.metadata.version(DISTRIBUTIONS.get(name, name))}" for name in names)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def as_text(results: Sequence[Result], imports: Sequence[ImportResult]) -> str:
    rows = [["model", "batch", "contender", "ms a swap", "ratio to raw", "logits differ by"]]
    rows += [
        [
            result.model,
            str(result.batch),
            result.contender,
            result.milliseconds.text(".2f"),
            result.ratio.text(".2f", "x"),
            f"{result.logits_difference:.1e}",
        ]
        for result in results
    ]
    parts = [aligned(rows)] if results else []
    if imports:
        lines = [["import beyond torch and transformers", "CPU seconds"]]
        parts.append(aligned(lines + [[entry.package, entry.seconds.text(".3f")] for entry in imports]))
    return "\n\n".join(parts)


def as_markdown(results: Sequence[Result], imports: Sequence[ImportResult]) -> str:
    """One row a contender, one column a case."""
    cases = list(dict.fromkeys((result.model, result.batch) for result in results))
    found = {(result.contender, result.model, result.batch): result for result in results}
    lines = []
    if cases:
        lines += ["| | " + " | ".join(f"{model}, batch {batch}" for model, batch in cases) + " |"]
        lines += ["|---|" + "---|" * len(cases)]
        baseline = [found["raw", *case].milliseconds.text(".1f") for case in cases]
        lines += ["| raw, ms | " + " | ".join(baseline) + " |"]
    for label in dict.fromkeys(result.contender for result in results if result.contender != "raw"):
        cells = [found[label, *case].ratio.text(".2f", "x") for case in cases]
        lines += [f"| {label} | " + " | ".join(cells) + " |"]
    if imports:
        lines += ["", "| import beyond torch and transformers | CPU seconds |", "|---|---|"]
        lines += [f"| {entry.package} | {entry.seconds.text('.2f')} |" for entry in imports]
    return "\n".join(lines)


def rounds_for(name: str, batch: int, *, quick: bool) -> int:
    if quick:
        return 3
    if name != "smollm2":
        return 40
    return 16 if batch == 1 else 8


def installed(packages: Iterable[str | None], only: Sequence[str] | None) -> list[str]:
    """Those of the libraries that are there, in order and each once; what is left out is said.

    Args:
        packages: What contenders need; None where they need nothing.
        only: The libraries that were asked for; None for all.
    """
    wanted = [p for p in dict.fromkeys(packages) if p is not None and (only is None or p in only)]
    missing = [package for package in wanted if importlib.util.find_spec(package) is None]
    for package in missing:
        print(f"{package} is not installed: left out.", file=sys.stderr)
    return [package for package in wanted if package not in missing]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="default: all")
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES), help="default: 1 16")
    parser.add_argument("--only", nargs="+", metavar="PACKAGE", help="leave out the other libraries")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument(
        "--rounds", type=int, help="rounds of each case, instead of 40, or 16 and 8 for SmolLM2"
    )
    parser.add_argument("--no-imports", action="store_true", help="leave out the import times")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print everything as JSON")
    output.add_argument("--markdown", action="store_true", help="print tables for the README")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # what the libraries warn of is not the subject here
    # Ours comes before nnsight, which gives `object` a method when it is imported.
    packages = installed((c.package for c in CONTENDERS), options.only)
    labels = [c.label for c in CONTENDERS if c.package is None or c.package in packages]

    results: list[Result] = []
    for name in options.models:
        model = MODELS[name]()
        for batch in options.batches:
            rounds = options.rounds or rounds_for(name, batch, quick=options.quick)
            print(f"{name}, batch {batch}: {rounds} rounds of {len(labels)}", file=sys.stderr, flush=True)
            with torch.no_grad():
                results += measure(name, swap_on(model, batch), rounds, labels)
    imports = [] if options.no_imports else import_times(packages, 2 if options.quick else 5)

    if options.json:
        figures = {"results": [asdict(result) for result in results], "imports": [asdict(i) for i in imports]}
        print(json.dumps({"versions": versions(packages), **figures}, indent=2))
    else:
        print((as_markdown if options.markdown else as_text)(results, imports))
        print(f"\n{versions(packages)}; one thread, CPU time, median (quartiles).")

    wrong = [result for result in results if not result.logits_difference <= TOLERANCE]
    for result in wrong:
        print(
            f"{result.contender} on {result.model}, batch {result.batch}: the logits differ from raw's by"
            f" {result.logits_difference:.1e}, more than {TOLERANCE:g}.",
            file=sys.stderr,
        )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
