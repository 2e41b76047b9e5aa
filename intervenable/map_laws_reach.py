"""Laws about what reaches a place and from where: the tokens a stack is about, the positions a mixer mixes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from intervenable.map_laws import Finding, deviation, limit_of, named
from intervenable.map_laws_ends import turned_round
from intervenable.map_laws_groups import Change, Group, Key, all_have
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import STILL, Judge, writable
from model_maps import COMPONENTS

MIXED = (
    ("mixer_input", "mixer_output"),
    ("mixer_input", "mixer_contribution"),
    ("attention_input", "attention_output"),
)
"""What is given to a module that mixes positions, and what it returns; of attention, where no pattern shows it."""

UNMIXED = (("mlp_input", "mlp_output"), ("mlp_input", "mlp_contribution"))
"""The same of what works at each position by itself; convolutions in an MLP aside, which lie beside attention."""


def about(bench: Bench) -> Judge:
    """With tokens in another order their stack is entered by others, a stack before it or beside it is not."""
    made: list[tuple[str, Key, bool, Group]] = []
    for given, (moved, still) in _stacks_of_tokens(bench).items():
        ids = bench.experimented.get(given)
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            continue
        other = ids.gather(1, turned_round(ids, bench.special_tokens))
        keys = {prefix: key for prefix in (*moved, *still) if (key := _entrance(bench, prefix)) is not None}
        if torch.equal(ids, other) or not keys:
            continue
        group = bench.experiment(f"{given} turned round", {}, keys.values(), {given: other})
        made += [(prefix, key, prefix in moved, group) for prefix, key in keys.items()]

    def judge() -> Iterator[Finding]:
        for prefix, key, moves, group in made:
            if not bench.has(*key) or not all_have(key, group, bench.base):
                continue
            limit = STILL * limit_of(bench.base.seen[key].dtype)
            off = deviation(group.seen[key], bench.base.seen[key])
            right = (off > limit) == moves
            why = f"{key[0]} {'changes' if moves else 'stays'} with the order of {group.name.split()[0]}"
            yield Finding(key[0], "about", key[1], right, off, limit, why)
            if not right:  # then the list of blocks is that of another stack, with all that is in it
                for name, layer in bench.sites:
                    if COMPONENTS[name].prefix == prefix and (name, layer) != key:
                        yield Finding(name, "about", layer, right, off, limit, why)

    return judge


def _stacks_of_tokens(bench: Bench) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """For each input of tokens the stacks that it enters, and those that it does not."""
    prefixes, two = bench.prefixes, "decoder_input_ids" in bench.inputs
    beside = tuple(prefix for prefix in prefixes if prefix in ("vision", "audio"))
    enters = ("", "text", "encoder" if two or "decoder" not in prefixes else "decoder")
    return {
        "input_ids": (tuple(prefix for prefix in prefixes if prefix in enters), beside),
        "decoder_input_ids": (
            tuple(prefix for prefix in prefixes if prefix == "decoder"),
            (*beside, *(prefix for prefix in prefixes if prefix == "encoder")),
        ),
    }


def _entrance(bench: Bench, prefix: str) -> Key | None:
    """What of a stack is looked at: what enters its first block, else what is first there."""
    words = ("block_input", "attention_input", "mixer_input", "mlp_input", "block_output")
    keys = [(named(word, prefix), 0) for word in words]
    return next((key for key in keys if bench.has(*key)), None)


def mixes(bench: Bench) -> Judge:
    """What is given to a module that mixes positions reaches what it returns at other positions.

    What is given to an MLP does not, where nothing else in the layer mixes them but something in other layers does:
    else the layer's only part would be a mixer that was taken for an MLP.
    """
    made: list[tuple[str, str, bool, Group]] = []
    for prefix in bench.prefixes:
        for word, returned in (*MIXED, *UNMIXED):
            given, read = named(word, prefix), named(returned, prefix)
            mixing = (word, returned) in MIXED
            layers = [
                layer
                for layer in bench.layers(given)
                if bench.has(read, layer)
                and (_without_pattern(bench, word, prefix, layer) if mixing else _alone(bench, prefix, layer))
            ]
            if not layers or not writable(bench, given):
                continue
            writes = {**bench.held(prefix), **{(given, layer): _at_even_positions(bench) for layer in layers}}
            group = bench.experiment(f"{given} at even positions", writes, [(read, x) for x in layers])
            made.append((given, read, mixing, group))

    def judge() -> Iterator[Finding]:
        for given, read, mixing, group in made:
            for layer in bench.layers(given):
                key = (read, layer)
                if not bench.has(*key) or not all_have(key, group, bench.base):
                    continue
                new, old = group.seen[key], bench.base.seen[key]
                if old.dim() != 3 or old.shape[1] < 2 or new.shape != old.shape:
                    continue
                off, limit = deviation(new[:, 1::2], old[:, 1::2]), STILL * limit_of(old.dtype)
                how = "changes" if mixing else "stays"
                why = f"{read} {how} at positions at which {given} does not change"
                for name in (given, read):
                    yield Finding(name, "mixes", layer, (off > limit) == mixing, off, limit, why)

    return judge


def _without_pattern(bench: Bench, word: str, prefix: str, layer: int | None) -> bool:
    return word != "attention_input" or not bench.has(named("attention_pattern", prefix), layer)


def _alone(bench: Bench, prefix: str, layer: int | None) -> bool:
    """Whether nothing is placed in a layer that mixes positions, in a stack where other layers have it."""
    outputs = [named(word, prefix) for word in ("mixer_output", "attention_output")]
    elsewhere = any(bench.layers(name) for name in outputs)
    return elsewhere and not any(key in bench.sites for key in ((name, layer) for name in outputs))


def _at_even_positions(bench: Bench) -> Change:
    def change(groups: Tensor) -> Tensor:
        value = groups[bench.base.index].clone()
        value[:, ::2] = value[:, ::2].flip(-1)
        return value

    return change
