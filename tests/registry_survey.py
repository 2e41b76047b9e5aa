"""Sweeps of one architecture after another, compared with one forward pass a cell; and the page that reports them.

python tests/registry_survey.py                        # every type, docs/sweep-coverage.md written anew
python tests/registry_survey.py --only mamba xlnet     # these, to the terminal
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

import torch
from registry_sites import (
    Inputs,
    Place,
    block_list,
    blocks_called,
    heads_by_hand,
    last_logits,
    parts_called,
    patched_by_hand,
)
from tiny_registry import FIRST_SPECIAL, HEADS, TOKENS, UNBUILDABLE, build, model_types
from torch import Tensor, nn
from written_maps import find_map

import intervenable as iv
from intervenable import wave_plan
from intervenable.signatures import takes
from model_maps import UnmappedModelError

# Tiny models stand for large ones here, of which no token is computed that need not be.
wave_plan.WORTH = 0.0

PAGE = Path(__file__).parents[1] / "docs" / "sweep-coverage.md"

LENGTH, PADDED = 11, 3
"""Tokens of a prompt, and how many fewer the second of two has."""

DIFFERENT = (4, 7)
"""Tokens in which the prompts of a pair differ; the shorter has them too, on whichever side it is padded."""

READ = (11, 37, 64, 88)
"""Ids of the tokens whose logits the metric gives."""

TOLERANCE = 1e-4
"""How far a cell may be from the one made by hand, of the largest logit."""

SOME = (4, 7, 10)
"""The positions at which parts and named components are patched."""

SECONDS = 600
"""How long the sweeps of one type may take."""

Verdict = Literal["right", "wrong", "refused", "failed"]


@dataclass(frozen=True)
class Finding:
    """What became of one sweep of one type."""

    model_type: str
    case: str
    """What was swept: inputs of blocks (`path`, `two prompts`), outputs of a `part`, or a component by its name."""
    verdict: Verdict
    """`wrong` is another number and no word about it; `refused` an error of the library; `failed` any other error."""
    where: str = ""
    """The component, and how prompts were padded."""
    error: float = 0.0
    """The largest difference, of the largest logit."""
    moved: float = 0.0
    """The largest change that patching a cell makes, of the largest logit: far more than the tolerance."""
    text: str = ""
    """What the error said."""
    shortcuts: tuple[str, ...] = ()
    seconds: float = 0.0


# --- prompts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A clean and a corrupted batch, and the same examples one by one, without padding."""

    clean: Inputs
    corrupted: Inputs
    alone: tuple[tuple[Inputs, ...], ...]
    padding: str = ""

    @property
    def mask(self) -> Tensor:
        """`[rows, positions]`: 1 at real tokens."""
        return self.corrupted.get("attention_mask", torch.ones_like(self.corrupted["input_ids"]))

    @property
    def lasts(self) -> tuple[int, ...]:
        """Where the last real token of each example is."""
        return tuple(int(row.nonzero()[-1]) for row in self.mask)


def one_pair(model: nn.Module) -> Pair:
    """One prompt and another; for models of several code books a row for each."""
    rows = getattr(getattr(model.config, "decoder", model.config), "num_codebooks", None)
    ids = _tokens(rows if isinstance(rows, int) and "Musicgen" in type(model).__name__ else 1)
    clean, corrupted = {"input_ids": _changed(ids)}, {"input_ids": ids}
    return Pair(clean, corrupted, ((clean, corrupted),))


def two_pairs(model: nn.Module, place: Place) -> Pair | None:
    """Two prompts and two others, the second shorter: padded so that the model computes what it does without.

    On the left if that is possible, else on the right, else not at all and of one length; None if the model makes
    one example of both.
    """
    ids = _tokens(2)
    for side in ("left", "right", ""):
        mask = torch.ones_like(ids)
        mask[1, {"left": slice(0, PADDED), "right": slice(LENGTH - PADDED, None), "": slice(0, 0)}[side]] = 0
        clean, corrupted = (
            {"input_ids": tokens * mask + (1 - mask), **({"attention_mask": mask} if side else {})}
            for tokens in (_changed(ids), ids)
        )
        alone = tuple(
            tuple({"input_ids": row["input_ids"][index, kept.bool()][None]} for row in (clean, corrupted))
            for index, kept in enumerate(mask)
        )
        pair = Pair(clean, corrupted, alone, side)
        if _same_alone(model, place, pair):
            return pair
    return None


def _same_alone(model: nn.Module, place: Place, pair: Pair) -> bool:
    """Whether a model gives a batch, patched in one layer, the logits it gives its examples patched.

    It may need to be told their positions.
    """
    layer = sorted(place.modules)[1]
    one = replace(place, modules={layer: place.modules[layer]})
    told = {"position_ids": (pair.mask.cumsum(-1) - 1).clamp(min=0)}
    for options in ({}, told) if takes(model, "position_ids") else ({},):
        clean, corrupted = {**pair.clean, **options}, {**pair.corrupted, **options}
        try:
            (alone,) = _by_hand(model, pair, one, by_heads=False)
            (together,) = patched_by_hand(model, one, clean, corrupted, READ, pair.lasts)
            near = TOLERANCE / 4 * _largest_logit(model, pair)
        except (RuntimeError, ValueError, LookupError):
            continue
        if together.shape == alone.shape and all(
            bool((together[kept.bool(), row] - alone[: kept.sum(), row]).abs().max() < near)
            for row, kept in enumerate(pair.mask)
        ):
            return True
    return False


def _tokens(rows: int) -> Tensor:
    return torch.randint(*TOKENS, (rows, LENGTH), generator=torch.Generator().manual_seed(3))


def _changed(ids: Tensor) -> Tensor:
    first, end = TOKENS
    new = ids.clone()
    for place in DIFFERENT:
        new[:, place] = (new[:, place] - first + 37) % (end - first) + first
    return new


# --- sweeps -----------------------------------------------------------------------------------------------


def survey(model_type: str, sweep: Callable[..., Any] | None = None, *, brief: bool = False) -> list[Finding]:
    """Every sweep of one type, made by the library or by the function given.

    Args:
        model_type: The type.
        sweep: What makes the sweeps, if not the library.
        brief: Whether to sweep the inputs of blocks alone, for one pair of prompts.
    """
    tiny = build(model_type)
    model = tiny.model
    path = block_list(model, tiny.inputs, model_type)
    blocks = model.get_submodule(path)
    layers = blocks_called(model, path, one_pair(model).clean)
    inputs = Place({layer: blocks[layer] for layer in layers})
    template = path + "[{layer}].input"
    every = list(layers) if len(layers) < len(blocks) else None
    compared = partial(_compared, sweep or iv.patching.sweep, model_type, model)
    findings = [compared("path", one_pair(model), template, inputs, every)]
    if brief:
        return findings
    pair = two_pairs(model, inputs)
    if pair is not None:
        findings.append(compared("two prompts", pair, template, inputs, every))
    for name, at in _first_and_last(parts_called(model, path, one_pair(model).clean)):
        outputs = Place({layer: blocks[layer].get_submodule(name) for layer in at}, "output")
        template = f"{path}[{{layer}}].{name}.output"
        every = list(at) if len(at) < len(blocks) else None
        findings.append(compared("part", one_pair(model), template, outputs, every, SOME))
    for component, place in _mapped(model):
        findings.append(compared(component, one_pair(model), component, place, None, SOME))
    return findings


def _first_and_last(parts: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    """Of the parts that most blocks have the first and the last: attention and MLP, as a rule."""
    most = max(map(len, parts.values()), default=0)
    common = [(name, layers) for name, layers in parts.items() if len(layers) == most]
    return common if len(common) < 2 else [common[0], common[-1]]


NAMED = ("block_input", "attention_output", "mlp_output", "head_attention_value_output")
"""The components that are swept by name where a map has them, the last one by heads."""


def _mapped(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """The components that a model's map has, each where the map puts it."""
    try:
        described = find_map([cls.__name__ for cls in type(model).__mro__], model.config)
    except UnmappedModelError:
        return
    for component in NAMED:
        site = described.site(component.removeprefix("head_"))
        if site is None or site.plus is not None:
            continue
        blocks = model.get_submodule(str(described.blocks_of(component)))
        modules = {layer: block.get_submodule(site.path) for layer, block in enumerate(blocks)}
        yield component, Place(modules, site.side, site.slot)


def _compared(
    sweep: Callable[..., Any],
    model_type: str,
    model: nn.Module,
    case: str,
    pair: Pair,
    component: str,
    place: Place,
    layers: list[int] | None,
    positions: Sequence[int] | None = None,
) -> Finding:
    """One sweep beside the one made by hand."""
    by_heads = component.startswith("head_")
    where = component + (f", padded on the {pair.padding}" if pair.padding else "")
    truth = _by_hand(model, pair, place, by_heads, positions)
    plain = torch.cat([last_logits(model, corrupted, READ) for _, corrupted in pair.alone])
    scale = _largest_logit(model, pair)
    moved = float((truth - plain).abs().max()) / scale
    begun = time.perf_counter()
    rows, lasts = torch.arange(len(pair.lasts))[:, None], torch.tensor(pair.lasts)[:, None]
    try:
        result = sweep(
            model,
            dict(pair.clean),
            dict(pair.corrupted),
            component=component,
            axes=("layer", "head") if by_heads else ("layer", "pos"),
            metric=lambda logits: logits[rows, lasts, list(READ)],
            layers=layers,
            positions=None if by_heads or positions is None else list(positions),
            progress=False,
        )
    except iv.IntervenableError as error:
        return Finding(model_type, case, "refused", where, moved=moved, text=_line(error))
    except Exception as error:
        return Finding(model_type, case, "failed", where, moved=moved, text=_line(error))
    seconds = time.perf_counter() - begun
    (values,) = result.results.values()
    if values.shape != truth.shape:
        text = f"shape {tuple(values.shape)}, by hand {tuple(truth.shape)}"
        return Finding(model_type, case, "wrong", where, moved=moved, text=text, shortcuts=result.shortcuts)
    error = float((values - truth).abs().max()) / scale
    verdict: Verdict = "right" if error <= TOLERANCE else "wrong"
    return Finding(model_type, case, verdict, where, error, moved, "", tuple(result.shortcuts), seconds)


def _by_hand(
    model: nn.Module, pair: Pair, place: Place, by_heads: bool, positions: Sequence[int] | None = None
) -> Tensor:
    """`[layers, positions or heads, rows, tokens]`, each example run alone and without padding.

    Where an example has no token of that number its cell is its unpatched run.
    """
    if by_heads:
        return torch.cat([heads_by_hand(model, place, HEADS, *runs, READ) for runs in pair.alone], dim=2)
    if positions is not None:
        cells = [patched_by_hand(model, place, *runs, READ, positions=positions) for runs in pair.alone]
        return torch.cat(cells, dim=2)
    longest = max(corrupted["input_ids"].shape[1] for _, corrupted in pair.alone)
    columns = []
    for clean, corrupted in pair.alone:
        cells = patched_by_hand(model, place, clean, corrupted, READ)
        plain = last_logits(model, corrupted, READ).expand(len(cells), longest - cells.shape[1], -1, -1)
        columns.append(torch.cat([cells, plain], dim=1))
    return torch.cat(columns, dim=2)


def _largest_logit(model: nn.Module, pair: Pair) -> float:
    with torch.no_grad():
        return max(float(model(**runs[1]).logits[:, -1, :FIRST_SPECIAL].abs().max()) for runs in pair.alone)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ")[:600]


# --- a process beside this one ----------------------------------------------------------------------------


class Worker:
    """A process that surveys one type after another. One that crashes or hangs is replaced, and that is a finding."""

    def __init__(self) -> None:
        self._process: Any = None

    def ask(
        self, function: Callable[[str], list[Finding]], model_type: str, seconds: float = SECONDS
    ) -> list[Finding]:
        """What a function finds about a type."""
        if self._process is None:
            context = multiprocessing.get_context("spawn")
            self._ours, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
            self._process.start()
            theirs.close()
            self._ours.recv()  # it has imported what it needs
        answer: list[Finding] | str = f"no answer after {seconds:g} seconds"
        try:
            self._ours.send((function, model_type))
            if self._ours.poll(seconds):
                answer = self._ours.recv()
            else:
                self.close()
        except EOFError:
            self._process.join(10)
            answer = f"the process ended with code {self._process.exitcode}"
            self.close()
        return [Finding(model_type, "path", "failed", text=answer)] if isinstance(answer, str) else answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._ours.close()
            self._process = None


def _serve(theirs: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    theirs.send("ready")
    while True:
        function, model_type = theirs.recv()
        try:
            theirs.send(function(model_type))
        except Exception as error:
            theirs.send(_line(error))


# --- the page ---------------------------------------------------------------------------------------------


HEAD = """# Sweeps over every architecture

Written by `make registry-page`; `make registry` makes the same comparisons. Every type that transformers
registers as a causal language model, made tiny and random, is swept layer by position at the input of its
blocks, which a module path names: one pair of prompts of {length} tokens, then two pairs of different length,
padded on the left if the model computes the same with such padding as without, else on the right, else (no side
is named) of one length. Then the outputs of the first and of the last part that all its blocks have, by module
paths, attention and MLP as a rule; and components by their names where the type has a model map. Each cell is
compared with a forward pass of its own, patched by hooks that do not come from the library, each example alone
and without padding. *Right* is within {tolerance:g} of the largest logit.
"""


def page(findings: Sequence[Finding]) -> str:
    """The page about what was found."""
    by_type: dict[str, list[Finding]] = {}
    for finding in findings:
        by_type.setdefault(finding.model_type, []).append(finding)
    sweeps = [finding for finding in findings if finding.verdict == "right"]
    right = sum(all(f.verdict == "right" for f in found) for found in by_type.values())
    silent = sum(finding.verdict == "wrong" for finding in findings)
    worst = max((finding.error for finding in sweeps), default=0.0)
    lines = [
        HEAD.format(length=LENGTH, tolerance=TOLERANCE).rstrip(),
        "",
        f"Right in all sweeps: **{right} of {len(by_type)}** types; wrong without an error: {silent}. The worst"
        f" right sweep is off by {worst:.0e} of the largest logit.",
        "",
        "| type | blocks | one pair | two pairs | parts | by name | how cells were computed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(name, found) for name, found in sorted(by_type.items())),
        "",
        "## What is not there",
        "",
        *(
            f"- {finding.model_type}, {finding.case}: {finding.verdict}. {finding.text}"
            for finding in findings
            if finding.verdict != "right"
        ),
        *(f"- {name}: not made, {reason}." for name, reason in sorted(UNBUILDABLE.items())),
        "",
    ]
    return "\n".join(lines)


def _row(name: str, found: Sequence[Finding]) -> str:
    by_case = {finding.case: finding for finding in found}
    path, two = by_case.get("path"), by_case.get("two prompts")
    by_name = ", ".join(_unless_right(one.case, one) for one in found if one.case in NAMED)
    parts = ", ".join(
        _unless_right(one.where.partition("].")[2].removesuffix(".output"), one)
        for one in found
        if one.case == "part"
    )
    cells = [
        name,
        f"`{path.where.removesuffix('[{layer}].input')}`" if path else "",
        path.verdict if path else "",
        (two.verdict + two.where.partition(",")[2].replace(" padded on the", "")) if two else "",
        parts,
        by_name,
        ", ".join(_way(note) for note in path.shortcuts if _COMPUTED in note) if path else "",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _unless_right(name: str, finding: Finding) -> str:
    return name if finding.verdict == "right" else f"{name} {finding.verdict}"


_COMPUTED = "cells were computed "


def _way(note: str) -> str:
    """How cells were computed, out of a sentence that says how many."""
    return note.partition(_COMPUTED)[2].rstrip(".")


def main(arguments: Sequence[str] | None = None) -> None:
    """Survey, show what was found, and write the page if it was all types."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=None, help="these types, to the terminal")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args(arguments)
    findings: list[Finding] = []
    workers = [Worker() for _ in range(options.jobs)]
    idle: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def survey_beside(model_type: str) -> list[Finding]:
        worker = idle.get()
        try:
            return worker.ask(survey, model_type)
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(options.jobs) as pool, contextlib.ExitStack() as stack:
        for worker in workers:
            stack.callback(worker.close)
        for found in pool.map(survey_beside, options.only or reversed(model_types())):
            findings += found
            for one in found:
                figures = f"{one.error:9.1e}{one.moved:9.1e}{one.seconds:7.2f} s"
                said = one.text or " ".join(one.shortcuts)
                print(
                    f"{one.verdict:8}{one.model_type:26}{one.case:28}{figures}  {said}  [{one.where}]",
                    flush=True,
                )
    if options.only is None:
        PAGE.write_text(page(findings))


if __name__ == "__main__":
    main()
