"""Laws about two stacks: which of them attention reads, and to which of them what follows the blocks belongs."""

from __future__ import annotations

import math
from collections.abc import Iterator

from intervenable.map_laws import Finding, deviation, limit_of, named
from intervenable.map_laws_groups import Change, Group, Key, all_have, taken_from
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import MOVED, STILL, Judge, writable
from model_maps import COMPONENTS

AFTER_BLOCKS = ("final_norm_input", "final_norm_output")
"""What belongs to the stack that it follows."""

FIRST = ("encoder", "vision", "audio")
"""Stacks that are through before the blocks beside them, or a decoder, begin, and depend on nothing of these."""


def attends(bench: Bench) -> Judge:
    """With other values in the encoder alone, attention to it returns something else, attention to itself the same.

    Both are given the base's inputs meanwhile, as the stream of one has been through the other.
    """
    own, cross, stream = "decoder_attention_output", "cross_attention_output", "decoder_block_output"
    inputs = [f"{prefix}_attention_input" for prefix in ("decoder", "cross")]
    source = bench.sources.get("encoder")
    if source is None or not bench.layers(cross):
        return lambda: iter(())
    held: dict[Key, Change] = {
        (name, layer): taken_from(bench.base)
        for name in inputs
        if writable(bench, name)
        for layer in bench.layers(name)
    }
    keys: list[Key] = [(name, layer) for name in (own, cross, stream) for layer in bench.layers(cross)]
    group = bench.experiment(
        "the encoder's source with attention's inputs held",
        {**source.writes, **bench.held("decoder"), **held},
        keys,
    )

    def judge() -> Iterator[Finding]:
        for layer in bench.layers(cross):
            for name, moves in ((own, False), (cross, True)):
                key: Key = (name, layer)
                if not all_have(key, group, bench.base) or (not moves and (inputs[0], layer) not in held):
                    continue
                limit = STILL * limit_of(bench.base.seen[key].dtype)
                off = deviation(group.seen[key], bench.base.seen[key])
                if moves and not _changes(bench, group, (stream, layer), limit):
                    continue  # nothing of the encoder gets there
                why = f"{name} {'changes' if moves else 'stays'} with other values in the encoder alone"
                for other in _of_attention(bench, COMPONENTS[name].prefix, layer):
                    yield Finding(other, "attends", layer, (off > limit) == moves, off, limit, why)

    return judge


def _changes(bench: Bench, group: Group, key: Key, limit: float) -> bool:
    """Whether something is another in a group than in the base; also if that cannot be seen."""
    if not all_have(key, group, bench.base):
        return True
    return deviation(group.seen[key], bench.base.seen[key]) > limit


def _of_attention(bench: Bench, prefix: str, layer: int | None) -> Iterator[str]:
    """The components of a decoder's layer that are about one of its two attentions."""
    for name, at in bench.sites:
        known = COMPONENTS[name]
        own = known.prefix == prefix and at == layer and known.word != "block_mid"
        if own and f"cross_{known.word}" in COMPONENTS:
            yield name


def followed(bench: Bench) -> Judge:
    """What follows the blocks is another with other values in its own stack, not with others in a later one."""
    made: list[tuple[str, Group, bool]] = []
    for prefix, source in bench.sources.items():
        for name in (named(word, prefix) for word in AFTER_BLOCKS):
            if not bench.has(name, None):
                continue
            last = (named("block_output", prefix), bench.last_layer(prefix))
            bench.read_in(source, [(name, None), last])
            made.append((name, source, True))
            for later, other in bench.sources.items():
                if prefix in FIRST and later not in FIRST:
                    bench.read_in(other, [(name, None)])
                    made.append((name, other, False))

    def judge() -> Iterator[Finding]:
        for name, source, moves in made:
            key: Key = (name, None)
            prefix = COMPONENTS[name].prefix
            last = (named("block_output", prefix), bench.last_layer(prefix))
            if not all_have(key, source, bench.base):
                continue
            limit = STILL * limit_of(bench.base.seen[key].dtype)
            if moves and not (
                all_have(last, source, bench.base)
                and deviation(source.seen[last], bench.base.seen[last]) > MOVED * limit
            ):
                continue
            off = deviation(source.seen[key], bench.base.seen[key])
            why = f"{name} {'changes' if moves else 'stays'} in the {source.name}"
            if moves:  # there is no number for what is to change and does not
                off = 0.0 if off > limit else math.inf
            yield Finding(name, "follows", None, off <= limit, off, limit, why)

    return judge
