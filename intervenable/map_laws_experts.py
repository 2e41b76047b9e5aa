"""Laws about experts: their numbers, their logits and their weights are about the same experts, in the same order."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from intervenable.map_laws import Finding, deviation, limit_of, named
from intervenable.map_laws_groups import Change, Group, Key, all_have
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import Judge, writable
from model_maps import COMPONENTS

FAR = 10
"""How many times the spread of a position's logits one of them is moved to be far from the others."""


def chosen(bench: Bench) -> Judge:
    """Experts are chosen by their logits: with one far above the others an expert is chosen no less than far below.

    Other things may add to the choice: a bias for each expert, groups of which a few are allowed, a table of tokens.
    """
    made: list[tuple[str, str, Group, Group]] = []
    for prefix in bench.prefixes:
        logits, choice = named("router_output", prefix), named("expert_choice", prefix)
        if not writable(bench, logits) or not bench.layers(choice):
            continue
        layers = [layer for layer in bench.layers(logits) if bench.has(choice, layer)]
        keys: list[Key] = [(choice, layer) for layer in layers]
        above, below = (
            bench.experiment(
                f"one of {logits} far {where} the others",
                {**bench.held(prefix), **{(logits, layer): _far(bench, sign) for layer in layers}},
                keys,
            )
            for where, sign in (("above", 1.0), ("below", -1.0))
        )
        bench.read_in(bench.base, [(logits, layer) for layer in layers])
        made.append((logits, choice, above, below))

    def judge() -> Iterator[Finding]:
        for logits, choice, above, below in made:
            for layer in bench.layers(choice):
                key, given = (choice, layer), bench.base.seen.get((logits, layer))
                if given is None or not all_have(key, above, below):
                    continue
                high, low = above.seen[key], below.seen[key]
                if given.shape[:-1] != high.shape[:-1] or high.shape != low.shape:
                    continue
                if torch.equal(high.sort(-1).values, low.sort(-1).values):
                    continue  # the choice does not follow from logits there
                expert = _experts(given)
                in_high, in_low = ((value == expert).any(-1) for value in (high, low))
                off = float((in_low & ~in_high).float().mean())
                right = off == 0.0 and bool((in_high & ~in_low).any())
                why = "an expert is chosen with a logit far above the others, not with one far below"
                for name in (logits, choice):
                    yield Finding(name, "chosen", layer, right, off, 0.0, why)

    return judge


def _experts(logits: Tensor) -> Tensor:
    """For each position an expert, all in turn."""
    positions = torch.arange(logits.shape[-2], device=logits.device) % logits.shape[-1]
    return positions[:, None].expand(*logits.shape[:-1], 1)


def _far(bench: Bench, sign: float) -> Change:
    """At each position the logit of one expert is put far above or below the others."""

    def change(groups: Tensor) -> Tensor:
        value = groups[bench.base.index]
        high, low = value.amax(-1, keepdim=True), value.amin(-1, keepdim=True)
        away = FAR * (high - low)
        return value.scatter(-1, _experts(value), high + away if sign > 0 else low - away)

    return change


def weighs(bench: Bench) -> Judge:
    """With twice the weights the experts return twice as much."""
    made: list[tuple[str, str, str, Group]] = []
    for prefix in bench.prefixes:
        weight, output = named("expert_weight", prefix), named("expert_output", prefix)
        if not writable(bench, weight) or not bench.layers(output):
            continue
        layers = [layer for layer in bench.layers(weight) if bench.has(output, layer)]
        writes = {**bench.held(prefix), **{(weight, layer): _doubled(bench) for layer in layers}}
        given = named("expert_input", prefix)
        keys: list[Key] = [(name, layer) for name in (output, given) for layer in layers]
        group = bench.experiment(f"twice {weight}", writes, keys)
        made.append((weight, output, given, group))

    def judge() -> Iterator[Finding]:
        for weight, output, given, group in made:
            for layer in bench.layers(weight):
                key = (output, layer)
                if not bench.has(*key) or not all_have(key, group, bench.base):
                    continue
                before = (given, layer)
                if all_have(before, group, bench.base) and not torch.equal(
                    group.seen[before], bench.base.seen[before]
                ):
                    continue  # earlier layers reach this one beside the stream
                new, old = group.seen[key], bench.base.seen[key]
                off, limit = deviation(new, 2 * old), limit_of(old.dtype)
                why = f"{output} is twice as large with twice {weight}"
                for name in (weight, output):
                    yield Finding(name, "weighs", layer, off <= limit, off, limit, why)

    return judge


def numbered(bench: Bench) -> Iterator[Finding]:
    """What is chosen are whole numbers, each once at a position, of experts with a logit, each with a weight."""
    for (name, layer), value in bench.plainly.items():
        if COMPONENTS[name].word != "expert_choice":
            continue
        weight = named("expert_weight", COMPONENTS[name].prefix)
        logits = bench.plainly.get((named("router_output", COMPONENTS[name].prefix), layer))
        weights = bench.plainly.get((weight, layer))
        ordered = value.sort(-1).values
        once = bool((ordered[..., 1:] != ordered[..., :-1]).all())
        known = logits is None or bool((value < logits.shape[-1]).all())
        right = not value.is_floating_point() and once and known and bool((value >= 0).all())
        why = "whole numbers, each once at a position, of experts that have a logit"
        yield Finding(name, "chosen", layer, right, 0.0 if right else math.inf, 0.0, why)
        if weights is not None:
            right = weights.is_floating_point() and weights.shape[-1] == value.shape[-1]
            why = f"a weight for each of {name}"
            yield Finding(weight, "chosen", layer, right, 0.0 if right else math.inf, 0.0, why)


def _doubled(bench: Bench) -> Change:
    return lambda groups: 2 * groups[bench.base.index]
