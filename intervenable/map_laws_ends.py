"""Laws about what follows the blocks, and what goes into them: the end of a model, single layers, tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from intervenable.map_laws import ENDS, Finding, deviation, limit_of, named
from intervenable.map_laws_groups import Change, Group, Key, all_have, taken_from
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import MOVED, Judge, Swaps, moved, near
from model_maps import COMPONENTS


def ends(bench: Bench, swaps: Swaps) -> Judge:
    """After the blocks each place determines the rest: the model returns what it did in the source."""
    made: list[tuple[Key, str, Group, Group]] = []
    for prefix in bench.prefixes:
        source = bench.sources.get(prefix)
        if source is None:
            continue
        last = bench.last_layer(prefix)
        keys: list[Key] = [
            (named(w, prefix), last if w == "block_output" else None)
            for w in ENDS
            if w != "logits" or not prefix
        ]
        if not bench.has(*(keys[-1])) and bench.has("logits", None):
            keys.append(("logits", None))
        for key in keys:
            if not bench.has(*key) or bench.sites[key].read_only:
                continue
            # Where blocks keep what those before them returned, the last output does not determine the rest alone.
            every = bench.layers(key[0]) if prefix in bench.carrying else [key[1]]
            writes: dict[Key, Change] = {(key[0], layer): taken_from(source) for layer in every}
            entered: Key = (named("block_input", prefix), last)
            if key[1] is not None and prefix in bench.carrying and bench.has(*entered):
                # Given the source's, the last block would return it by itself, whatever is written.
                writes[entered] = taken_from(bench.base)
            group = bench.experiment(f"{key[0]} of {source.name}", writes)
            bench.read_in(group, [("logits", None)])
            made.append((key, prefix, group, source))

    def judge() -> Iterator[Finding]:
        for (name, layer), prefix, group, source in made:
            if group.output is None or source.output is None or bench.base.output is None:
                continue
            assert group.output_beside is not None
            limit = limit_of(source.output.dtype)
            if deviation(source.output, bench.base.output) < MOVED * limit:
                continue
            if COMPONENTS[name].derived_from:
                yield moved(name, layer, group.output, group.output_beside, "what the model returns changes")
                continue
            if prefix and deviation(group.output, bench.base.output) < MOVED * limit:
                continue  # a tower of which the model reads an earlier layer
            off = deviation(group.output, source.output)
            yield Finding(
                name, "ends", layer, off <= limit, off, limit, "the model returns what it did in the source"
            )

    return judge


def single_layers(bench: Bench, swaps: Swaps) -> Judge:
    """A write at one layer's output reaches the end of the model, the other layers left alone."""
    made: list[tuple[Key, Group]] = []
    for prefix in bench.prefixes:
        source = bench.sources.get(prefix)
        if source is None:
            continue
        name = named("block_output", prefix)
        layers = bench.layers(name)
        step = max(1, len(layers) // 4)
        for layer in layers[::step]:
            for key in ((name, layer), (named("block_input", prefix), layer)):
                if bench.has(*key):
                    made.append((key, bench.experiment(f"{key}", {key: taken_from(source)})))

    def judge() -> Iterator[Finding]:
        for (name, layer), group in made:
            prefix = COMPONENTS[name].prefix
            whole = bench.sources[prefix].output
            if group.output is None or group.output_beside is None or whole is None:
                continue
            off = deviation(whole, group.output_beside)
            if prefix and off < MOVED * limit_of(group.output.dtype):
                continue
            yield moved(name, layer, group.output, group.output_beside, "what the model returns changes")

    return judge


def entered(bench: Bench, swaps: Swaps) -> Judge:
    """A value written where a block is entered does what it does at the output of the block before.

    Where the stream goes past the module that is given it, as in blocks that are no modules, it does not.
    """
    made: list[tuple[str, Key, Group, Group, Group]] = []
    for prefix, source in bench.sources.items():
        name, left = named("block_input", prefix), named("block_output", prefix)
        layers = [layer for layer in bench.layers(name) if layer and bench.has(left, layer - 1)]
        layer = layers[0] if layers else None
        if layer is None or bench.sites[name, layer].read_only or not bench.has(left, layer):
            continue
        groups = [
            bench.experiment(f"{key} of {source.name}", {key: taken_from(source)}, [(left, layer)])
            for key in ((left, layer - 1), (name, layer))
        ]
        bench.read_in(source, [(left, layer)])
        made.append((name, (left, layer), groups[0], groups[1], source))

    def judge() -> Iterator[Finding]:
        for name, key, before, here, source in made:
            if not bench.has(*key) or not all_have(key, before, here, source, bench.base):
                continue
            expected, limit = source.seen[key], limit_of(source.seen[key].dtype)
            moves = deviation(expected, bench.base.seen[key]) >= MOVED * limit
            if not moves or deviation(before.seen[key], expected) > limit:
                continue  # a block may be given more of those before than the stream
            off = deviation(here.seen[key], expected)
            why = f"{key[0]} as with the same value at {key[0]} of the layer before"
            for layer in bench.layers(name):
                yield Finding(name, "determines", layer, off <= limit, off, limit, why)

    return judge


def lookup(bench: Bench, swaps: Swaps) -> Judge:
    """The embedding of a token is the same wherever the token stands."""
    made: list[tuple[str, Group, Tensor]] = []
    for name, _ in list(bench.sites):
        if COMPONENTS[name].word != "embedding_output":
            continue
        prefix = COMPONENTS[name].prefix
        given = "decoder_input_ids" if prefix == "decoder" else "input_ids"
        ids = bench.experimented.get(given)
        if prefix not in ("", "encoder", "decoder", "text") or not isinstance(ids, Tensor) or ids.dim() != 2:
            continue
        order = turned_round(ids, bench.special_tokens)
        inputs = {given: ids.gather(1, order)}
        group = bench.experiment(f"{name} turned round", {}, [(name, None)], inputs)
        made.append((name, group, order))

    def judge() -> Iterator[Finding]:
        for name, group, order in made:
            key = (name, None)
            if not bench.has(*key) or not all_have(key, group, bench.base):
                continue
            old, new = bench.base.seen[key], group.seen[key]
            if old.dim() != 3 or old.shape[:2] != order.shape:
                yield Finding(name, "lookup", None, False, float("inf"), 0.0, "a vector for each token")
                continue
            expected = old.gather(1, order.to(old.device)[..., None].expand_as(old))
            yield near(name, "lookup", None, new, expected, "the same vectors in another order")

    return judge


def turned_round(ids: Tensor, special: frozenset[int]) -> Tensor:
    """For each example an order of its positions in which all ordinary tokens are turned round."""
    order = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
    for row, tokens in enumerate(ids.tolist()):
        ordinary = [index for index, token in enumerate(tokens) if token not in special]
        order[row, ordinary] = torch.tensor(ordinary[::-1], device=ids.device)
    return order
