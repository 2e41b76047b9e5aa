"""The law of the residual: the stream after a branch is the stream before it and what the branch adds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from intervenable.map_laws import ADDED, Finding, deviation, limit_of, named
from intervenable.map_laws_runs import Bench
from intervenable.map_modules import has_own_matrix
from intervenable.map_trace import Call, Trace
from model_maps import COMPONENTS


def residual(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """The stream and what is said to be added are a stream that the model has, in the end the block's output."""
    for prefix in bench.prefixes:
        for layer in bench.layers(named("block_output", prefix)):
            yield from _residual_of(bench, traced, prefix, layer)


def calls_between(bench: Bench, traced: Trace, prefix: str, layer: int | None) -> list[Call]:
    """All calls from where a block is entered to where it is left, but for that of a block that is both.

    None, if the map does not say where that is.
    """
    sites = (bench.sites.get((named(word, prefix), layer)) for word in ("block_input", "block_output"))
    first, last = (None if site is None else next(iter(traced.of(site.path)), None) for site in sites)
    if first is None or last is None:
        return []
    if first is last:
        return list(first.inside())
    return [call for call in traced.calls if first.entered <= call.entered and call.left <= last.left]


def _residual_of(bench: Bench, traced: Trace, prefix: str, layer: int | None) -> Iterator[Finding]:
    seen = bench.plainly
    start, end = (
        seen.get((named("block_input", prefix), layer)),
        seen.get((named("block_output", prefix), layer)),
    )
    if start is None or end is None:
        return
    prefixes = (prefix, "cross") if prefix == "decoder" else (prefix,)
    added: list[tuple[str, Tensor]] = []
    for word in ADDED:
        for one in prefixes:
            name = named(word, one)
            value = seen.get((name, layer)) if COMPONENTS[name].word == word else None
            if value is not None and value.shape == start.shape:
                added.append((name, value))
    calls = calls_between(bench, traced, prefix, layer)
    if not calls:
        return
    limit = limit_of(end.dtype)
    streams = normed([Stream(start)], calls)
    added_to: dict[str, list[Stream]] = {}
    pending = list(added)
    # Any order: attention before the MLP in most, beside it in some.
    while pending:
        for position, (name, value) in enumerate(pending):
            before = [stream for stream in streams if _is_seen(stream.value + value, calls, end, limit)]
            known = [Stream(stream.value + value, stream.added | {name}) for stream in before]
            if known:
                added_to[name] = before
                yield _in_turn(bench, name, layer, before)
                streams = normed([*known, *streams], calls)
                pending.pop(position)
                break
        else:
            break
    if pending:
        # Several are added at once, beside each other.
        total = sum((value for _, value in pending), torch.zeros_like(start))
        best = min(deviation(stream.value + total, end) for stream in streams)
        for name, _ in pending:
            yield Finding(
                name,
                "residual",
                layer,
                best <= limit,
                best,
                limit,
                "the stream and this is the block's output",
            )
    for one in prefixes:
        name = named("block_mid", one)
        middle = seen.get((name, layer))
        if middle is not None and COMPONENTS[name].prefix == one:
            possible = _between(streams, [added_name for added_name, _ in added], one)
            own = {named("attention_contribution", one), named("mixer_contribution", one)}
            follows = [stream for other, found in added_to.items() if other not in own for stream in found]
            # Of a sum and what a norm makes of it, it is the one that a next part is added to.
            possible = [x for x in possible if any(x is stream for stream in follows)] or _kept(
                possible, calls
            )
            off = min((deviation(middle, stream.value) for stream in possible), default=math.inf)
            why = "the stream and what attention adds"
            yield Finding(name, "residual", layer, off <= limit, off, limit, why)


def _in_turn(bench: Bench, name: str, layer: int | None, before: Sequence[Stream]) -> Finding:
    """That a contribution is added to a stream: before what comes later, where nothing else tells which it is."""
    prefix = COMPONENTS[name].prefix
    mlp = named("mlp_contribution", prefix)
    later = {mlp, named("attention_contribution", "cross")} if prefix == "decoder" else {mlp}
    known = (named(word, prefix) for word in ("attention_pattern", "mixer_input"))
    right = name == mlp or any(bench.has(one, layer) for one in known)
    right = right or any(not later & stream.added for stream in before)
    why = "the stream and this is a stream" + ("" if right else f" before {' and '.join(sorted(later))}")
    off, limit = 0.0 if right else math.inf, limit_of(before[0].value.dtype)
    returned = (name.replace("contribution", "output"), layer)
    # What is added where nothing is that returns it was returned by something else.
    return Finding(
        name, "residual", layer, right, off, limit, why, returned[0] if returned in bench.faults else ""
    )


class Stream(NamedTuple):
    """A vector at each position that a block has or makes, and what was added to its input to get it."""

    value: Tensor
    added: frozenset[str] = frozenset()


def _between(streams: Sequence[Stream], added: Sequence[str], prefix: str) -> list[Stream]:
    """The streams to which attention, or what is in its place, has been added and nothing that comes later."""
    mixing = {named(word, prefix) for word in ("attention_contribution", "mixer_contribution")} & {*added}
    later = {named("mlp_contribution", prefix)}
    if prefix != "cross":
        later |= {named("attention_contribution", "cross")}
    if not mixing:
        return [] if prefix == "cross" else [*streams]  # it is another place of the same block
    return [stream for stream in streams if stream.added & mixing and not stream.added & later]


def _kept(streams: Sequence[Stream], calls: Sequence[Call]) -> list[Stream]:
    """Of streams those that a module is given beside what it computes with, to add to it; all if there are none."""
    beside = [
        value
        for call in calls
        for slot, value in call.inputs.items()
        if slot != call.main_input_slot and value.is_floating_point()
    ]
    shaped = [_like(value, stream.value) for stream in streams[:1] for value in beside]
    found = [x for x in streams if any(value is not None and _equal(value, x.value) for value in shaped)]
    return found or [*streams]


def normed(streams: Sequence[Stream], calls: Sequence[Call]) -> list[Stream]:
    """The streams, and what modules without matrices make of them (norms behind an addition)."""
    result = list(streams)
    shaped = streams[0].value
    for call in calls:
        if (
            call.module._modules
            or has_own_matrix(call.module)
            or call.main_output is None
            or call.main_input is None
        ):
            continue
        given = _like(call.main_input, shaped)
        origin = None if given is None else next((x for x in result if _equal(given, x.value)), None)
        out = _like(call.main_output, shaped)
        if origin is None or out is None or any(_equal(out, x.value) for x in result):
            continue
        if not _mixes(call, shaped):  # last, as it runs the module once more
            result.append(Stream(out, origin.added))
    return result


def _mixes(call: Call, stream: Tensor) -> bool:
    """Whether a module without parts makes other vectors of the same ones in another order: it is no norm."""
    given, out = call.main_input, call.main_output
    if given is None or out is None or given.dim() != 3 or len(call.inputs) > 1:
        return False
    if given.shape != stream.shape or out.shape != stream.shape:
        return False
    try:
        turned = call.module.forward(given.flip(1))  # not the call: nobody else is to see it
    except Exception:  # in words of the module's own: it is given more than tensors
        return False
    turned = turned[0] if isinstance(turned, tuple) else turned
    return isinstance(turned, Tensor) and not _equal(turned.flip(1), out)


def _is_seen(total: Tensor, calls: Iterable[Call], end: Tensor, limit: float) -> bool:
    """Whether a sum is the block's output, or what some module in the block is given."""
    if deviation(total, end) <= limit:
        return True
    for call in calls:
        given = None if call.main_input is None else _like(call.main_input, total)
        if given is not None and _equal(given, total, limit):
            return True
    return False


def _like(tensor: Tensor, stream: Tensor) -> Tensor | None:
    if (tensor.dim() == 3 and tensor.shape != stream.shape) and tensor.transpose(0, 1).shape == stream.shape:
        return tensor.transpose(0, 1)  # positions come first
    if tensor.dim() == 3 and tensor.shape != stream.shape and tensor.mT.shape == stream.shape:
        return tensor.mT  # positions come last
    return tensor.reshape(stream.shape) if tensor.numel() == stream.numel() else None


def _equal(found: Tensor, expected: Tensor, limit: float | None = None) -> bool:
    most = limit_of(expected.dtype) if limit is None else limit
    return not _differ_at_first(found, expected, most) and deviation(found, expected) <= most


def _differ_at_first(found: Tensor, expected: Tensor, limit: float) -> bool:
    """Whether the first vectors alone are too far apart, whatever the others are: true of nearly all that differ."""
    if found.shape != expected.shape or found.numel() == 0:
        return False
    first = (0,) * (found.dim() - 1)
    apart = (found[first].double() - expected[first].double()).abs().amax()
    return float(apart) > limit * float(expected.abs().amax())
