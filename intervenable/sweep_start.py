"""The runs that come before the cells: both prompts at once where that goes, and what waves need to know of them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intervenable.hooks import hooked
from intervenable.inputs import RunInputs
from intervenable.plan import Plan
from intervenable.runs import without_cache
from intervenable.signatures import takes
from intervenable.sites import BoundSite
from intervenable.sweep_axes import real_tokens
from intervenable.sweep_pairs import Pair
from intervenable.sweep_runs import Unpatched, run_unpatched
from intervenable.sweep_values import Place, Reader, rows_of
from intervenable.wave import TOLERANCES
from intervenable.wave_caches import recording_cache
from intervenable.wave_inputs import WaveInputs
from intervenable.wave_learning import Trace, knowledge_of
from intervenable.wave_plan import Blocks, leaves_tokens_out
from intervenable.wave_readout import Reading, Readout, furthest, largest, logits_of, reads_head


@dataclass(frozen=True, eq=False)
class Start:
    """The runs without patches."""

    base: Unpatched
    """The run that is patched."""

    other: Unpatched | None
    """The other one, if there is one."""

    waves: Tracks | None
    """What waves need to know; None where there can be none."""


@dataclass(frozen=True, eq=False)
class Tracks:
    """What waves need to know of the run that is patched."""

    inputs: WaveInputs
    order: tuple[int, ...]
    """Which block each call was of."""

    joins: Mapping[tuple[int, int], int]
    """For each place (by identity) and passage the call that was on."""

    cache: Any
    """Keys and values of this run, and maybe of the other behind it; None if they were not recorded."""


def last_tokens(inputs: RunInputs, length: int) -> list[int]:
    """Tensor positions at which metrics probably look: the last real token of each example."""
    if length != inputs.length:
        return list(range(length))
    return sorted({row[-1] for row in real_tokens(inputs) if row})


def start(pair: Pair, sites: Mapping[Place, BoundSite], from_other: bool, blocks: Blocks) -> Start:
    """Run both prompts without patches.

    Args:
        pair: The prompts.
        sites: Places whose values are kept, of the run that is patched.
        from_other: Whether they are kept of the other run too.
        blocks: The model's blocks.

    Raises:
        NotFiredError: a place was not reached.
        UnsupportedModelError: the model gives no logits.
    """
    acting = any(plan is not None and plan.edits for plan in (pair.base, pair.other))
    if not acting:
        found = _together(pair, sites, from_other, blocks)
        if found is not None and _apart(pair, found):
            return found
    base = run_unpatched(pair.model, pair.base, sites, "run that is patched")
    kept = sites if from_other else {}
    other = None if pair.other is None else run_unpatched(pair.model, pair.other, kept, "other run")
    if acting:
        return Start(base, other, None)
    return Start(base, other, _tracks(pair, sites, blocks))


def _records(pair: Pair, blocks: Blocks) -> bool:
    """Whether it is worth the trouble to record keys and values."""
    counted = pair.base.base.decoder or pair.base.base
    return takes(pair.model, "past_key_values") and leaves_tokens_out(blocks, counted.length)


def _tracks(pair: Pair, sites: Mapping[Place, BoundSite], blocks: Blocks) -> Tracks:
    """What waves need to know, from one more run of the prompt that is patched."""
    inputs = WaveInputs(pair.base.base, pair.model)

    def run(cache: Any) -> Tracks:
        trace = Trace(blocks)
        reader = Reader(sites, pair.base.base, lambda: trace.now)
        with hooked([*trace.hooks, *reader.hooks], pair.model):
            output = inputs.call(1, cache=cache)
        kept = None if cache is None else getattr(output, "past_key_values", None)
        return Tracks(inputs, tuple(trace.order), reader.calls, kept)

    if _records(pair, blocks):
        with suppress(Exception):  # as in `_together`
            return run(recording_cache(pair.model))
    return run(None)


def _together(pair: Pair, sites: Mapping[Place, BoundSite], from_other: bool, blocks: Blocks) -> Start | None:
    """Both runs as one of two groups of rows; None if they do not go together."""
    inputs = WaveInputs(pair.base.base, pair.model)
    other = None if pair.other is None else WaveInputs(pair.other.base, pair.model)
    tensors = inputs.tensors(1) if other is None else inputs.together_with(other)
    if tensors is None:
        return None
    base = pair.base.base
    counted = base.decoder or base
    groups = 1 if other is None else 2
    for recording in (True, False) if _records(pair, blocks) else (False,):
        trace = Trace(blocks)
        reader = Reader(sites, rows_of(base, groups), lambda trace=trace: trace.now)  # type: ignore[misc]
        guess = last_tokens(counted, counted.length)
        if other is not None and pair.other is not None:
            guess = sorted({*guess, *last_tokens(pair.other.base.decoder or pair.other.base, counted.length)})
        readout = Readout(
            pair.model,
            Reading(torch.tensor(guess), None, counted.length),
            0,
            True,
            reads_head(pair.model, sites.values()),
        )
        try:
            cache = recording_cache(pair.model) if recording else None
            options = (
                {"past_key_values": cache, "use_cache": True}
                if recording
                else without_cache(pair.model, base)
            )
            with torch.no_grad(), hooked([*trace.hooks, *reader.hooks, *readout.hooks], pair.model):
                output = pair.model(**tensors, **options)
            logits = logits_of(output, pair.model)
        except Exception:  # a model's own code may raise anything for a cache it was not made for
            if recording:
                continue
            return None
        reader.check("run that is patched")
        narrow = bool(readout.hooks) and logits.shape[1] == len(guess)
        positions = torch.tensor(guess) if narrow else None
        length = counted.length if narrow else logits.shape[1]
        if logits.shape[0] % groups:
            return None
        return _split(
            pair,
            reader,
            logits,
            positions,
            length,
            from_other,
            Tracks(
                inputs,
                tuple(trace.order),
                reader.calls,
                getattr(output, "past_key_values", None) if recording else None,
            ),
        )
    return None


def _apart(pair: Pair, found: Start) -> bool:
    """Whether prompts that ran together gave what they give alone; found out once per model.

    There are models in which examples of a batch see each other.
    """
    base, tracks = found.base, found.waves
    if found.other is None or tracks is None:
        return True
    learnt = knowledge_of(pair.model, tracks.inputs)
    with learnt.lock:
        if learnt.apart is None:
            length = base.shape[1]
            positions = torch.arange(length) if base.positions is None else base.positions
            narrow = base.positions is not None
            readout = Readout(pair.model, Reading(positions, None, length), 0, narrow, whole=not narrow)
            with hooked(readout.hooks, pair.model):
                alone = readout.of(tracks.inputs.call(1))
            off = furthest(alone, base.known) if alone.shape == base.known.shape else torch.inf
            learnt.apart = off <= TOLERANCES.get(alone.dtype, 1e-5) * largest(alone)
        return learnt.apart


def _split(
    pair: Pair,
    reader: Reader,
    logits: Tensor,
    positions: Tensor | None,
    length: int,
    from_other: bool,
    tracks: Tracks,
) -> Start:
    """What one run of both prompts gave, prompt by prompt."""
    groups = 1 if pair.other is None else 2
    shape = (logits.shape[0] // groups, length, logits.shape[-1])

    def part(plan: Plan, number: int, kept: bool) -> Unpatched:
        def of(tensor: Tensor) -> Tensor:
            return tensor.view(groups, -1, *tensor.shape[1:])[number]

        values = {place: [of(value) for value in passed] for place, passed in reader.values.items()}
        return Unpatched(pair.model, plan, values if kept else {}, shape, positions, of(logits))

    other = None if pair.other is None else part(pair.other, 1, from_other)
    return Start(part(pair.base, 0, True), other, tracks)
