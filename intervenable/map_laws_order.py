"""Laws about what comes before and what after: places that follow from each other are two places, in this order."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from intervenable.map_laws import Finding, named
from intervenable.map_laws_groups import Group, Key, all_have, taken_from
from intervenable.map_laws_residual import Stream, calls_between, normed
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import Judge, Swaps, near
from intervenable.map_trace import Call, Trace
from model_maps import COMPONENTS

APART: tuple[tuple[str, str], ...] = (
    ("block_input", "block_mid"),
    ("block_mid", "block_output"),
    ("block_input", "block_output"),
    ("attention_input", "attention_output"),
    ("attention_value_output", "attention_output"),
    ("mixer_input", "mixer_output"),
    ("attention_input", "attention_value_output"),
    ("mlp_input", "mlp_output"),
    ("mlp_input", "mlp_hidden"),
    ("mlp_hidden", "mlp_output"),
    ("router_input", "router_output"),
    ("expert_input", "expert_output"),
    ("attention_contribution", "mixer_contribution"),
    ("attention_contribution", "mlp_contribution"),
    ("mixer_contribution", "mlp_contribution"),
    ("final_norm_input", "final_norm_output"),
)
"""What is computed from what, or added before what, so that both are never the same."""

LATER: tuple[tuple[str, str], ...] = (
    ("block_output", "final_norm_input"),
    ("final_norm_input", "final_norm_output"),
)
"""What stays as it was if what comes later is written."""


def apart(bench: Bench, _: Trace) -> Iterator[Finding]:
    """What one thing is computed from, or follows in the stream, is not that thing."""
    for name, layer in bench.sites:
        known = COMPONENTS[name]
        for before, after in APART:
            given, found = (
                bench.plainly.get((named(before, known.prefix), layer)),
                bench.plainly.get((name, layer)),
            )
            if (
                known.word != after
                or given is None
                or found is None
                or not _does_something(bench, name, layer)
            ):
                continue
            same = given.numel() == found.numel() and torch.equal(given.reshape(-1), found.reshape(-1))
            for one, other in ((named(before, known.prefix), name), (name, named(before, known.prefix))):
                yield Finding(one, "apart", layer, not same, float(same), 0.0, f"other numbers than {other}")
        yield from _apart_from_the_decoder(bench, name, layer)


def _apart_from_the_decoder(bench: Bench, name: str, layer: int | None) -> Iterator[Finding]:
    """What cross attention returns is not what the decoder's attention to itself does: one module may be both."""
    own = "decoder_attention_output"
    found, given = bench.plainly.get((name, layer)), bench.plainly.get((own, layer))
    if name == "cross_attention_output" and found is not None and given is not None:
        same = _same(found, given)
        yield Finding(name, "apart", layer, not same, float(same), 0.0, f"other numbers than {own}")


def _does_something(bench: Bench, name: str, layer: int | None) -> bool:
    """Whether something is added to the stream in a layer, so that it does not leave as it came."""
    prefix = COMPONENTS[name].prefix
    parts = [named(f"{part}_contribution", prefix) for part in ("attention", "mixer", "mlp")]
    added = [bench.plainly[one, layer] for one in parts if (one, layer) in bench.plainly]
    return layer is None or not added or any(bool(one.any()) for one in added)


def given_to_experts(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """What experts are given is what their router or the MLP is given, or goes into weights beside the router.

    Where a module is told which experts to take, it is that one: what is given to a matrix for all positions alike
    before, or comes out of one behind, is not the experts'.
    """
    yield from _given_to_what_is_told(bench, traced)
    for (name, layer), site in bench.sites.items():
        known = COMPONENTS[name]
        router = bench.sites.get((named("router_input", known.prefix), layer))
        if known.word != "expert_input" or router is None or (name, layer) not in bench.plainly:
            continue
        beside = not f"{router.path}.".startswith(f"{site.path}.") if site.path else False
        weighs = any(parameter.dim() > 1 for parameter in site.module.parameters())
        others = [(named(word, known.prefix), layer) for word in ("router_input", "mlp_input")]
        right = (beside and weighs) or any(_equal(bench, (name, layer), other) for other in others)
        why = "what the router is given, or what is given to weights beside it"
        yield Finding(name, "reads", layer, right, 0.0 if right else float("inf"), 0.0, why)


def given_to_routers(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """What a router is given is a stream, what the MLP or its experts are given, or what norms make of these."""
    known = ("block_input", "block_mid", "mlp_input", "expert_input")
    for (name, layer), value in bench.plainly.items():
        prefix = COMPONENTS[name].prefix
        if COMPONENTS[name].word != "router_input":
            continue
        seen = [bench.plainly.get((named(word, prefix), layer)) for word in known]
        streams = [Stream(one) for one in seen if one is not None]
        if not streams:
            continue
        calls = calls_between(bench, traced, prefix, layer)
        right = any(_same(stream.value, value) for stream in normed(streams, calls))
        why = "a stream, what the MLP or experts are given, or a norm of these"
        yield Finding(name, "reads", layer, right, 0.0 if right else float("inf"), 0.0, why)


def _given_to_what_is_told(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """Whether a module that is told which experts to take is given their input, and returns their output."""
    for (name, layer), value in bench.plainly.items():
        known = COMPONENTS[name]
        if known.word not in ("expert_input", "expert_output"):
            continue
        weights = bench.plainly.get((named("expert_weight", known.prefix), layer))
        told = [] if weights is None else [call for call in traced.calls if _is_given(call, weights)]
        sides = [call.main_input if known.word == "expert_input" else call.main_output for call in told]
        if not told:
            continue
        right = any(side is not None and _same(side, value) for side in sides)
        off = 0.0 if right else float("inf")
        why = "the module that is told which experts to take is given it, or returns it"
        yield Finding(
            name, "reads" if known.word == "expert_input" else "projects", layer, right, off, 0.0, why
        )


def _is_given(call: Call, weights: Tensor) -> bool:
    main = call.main_input
    return any(value is not main and _same(value, weights) for value in call.inputs.values())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.numel() == other.numel() and torch.equal(one.reshape(-1), other.reshape(-1))


def order(bench: Bench, swaps: Swaps) -> Judge:
    """With another run's value behind the blocks, what comes before it stays as it was."""
    made: list[tuple[str, Key, Group]] = []
    for prefix in bench.prefixes:
        source = bench.sources.get(prefix)
        for before, after in LATER if source is not None else ():
            written = named(after, prefix)
            key = (named(before, prefix), bench.last_layer(prefix) if before == "block_output" else None)
            if source is None or not bench.has(written, None) or not bench.has(*key):
                continue
            if not bench.sites[written, None].read_only:
                group = bench.experiment(f"{written} alone", {(written, None): taken_from(source)}, [key])
                bench.read_in(source, [key])
                made.append((written, key, group))

    def judge() -> Iterator[Finding]:
        for written, key, group in made:
            if all_have(key, group, bench.base) and not _equal(bench, (written, None), key):
                found, expected = group.seen[key], bench.base.seen[key]
                yield near(written, "only", None, found, expected, f"{key[0]} as before")

    return judge


def _equal(bench: Bench, one: Key, other: Key) -> bool:
    a: Tensor | None = bench.plainly.get(one)
    b: Tensor | None = bench.plainly.get(other)
    return a is not None and b is not None and _same(a, b)
