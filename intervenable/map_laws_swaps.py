"""Laws about writes: what determines what, what stays, what moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from intervenable.attention_mode import SCORES
from intervenable.map_laws import ADDED, ONLY, TRANSFERS, Finding, deviation, limit_of, named
from intervenable.map_laws_allowances import (
    SEEN_WITH,
    beside_the_band,
    gated,
    in_product,
    in_sum,
    of_common,
    parts_of_heads,
    turned,
    where_both,
)
from intervenable.map_laws_groups import Change, Group, Key, all_have, taken_from
from intervenable.map_laws_runs import Bench
from model_maps import COMPONENTS

Judge = Callable[[], Iterator[Finding]]
"""What a law found, once its experiments have been made."""

MOVED = 10
"""How many times the limit a change must have to count as one."""


STILL = 0.1
"""How many times the limit a change may have to count as none: both come from one pass."""


class Swaps:
    """Experiments in which values of a source are written, each made once however many laws look at it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._made: dict[tuple[object, ...], Group] = {}
        self._held_source: Group | None = None

    def sources(self, prefix: str, words: Iterable[str]) -> list[Group]:
        """The sources whose values are written at words of a stack.

        What cross attention is given comes from two stacks, each with a source.
        """
        bench = self.bench
        if prefix != "cross":
            found = bench.sources.get(prefix)
            return [] if found is None else [found]
        asking = bench.sources.get("decoder")
        sources = [] if asking is None else [asking]
        if "encoder" in bench.sources and any("key" in w or "value" in w for w in words):
            sources.append(self.encoder_alone)
        return sources

    @property
    def encoder_alone(self) -> Group:
        """The encoder's source with the decoder's blocks held at the base's inputs."""
        if self._held_source is None:
            noise = self.bench.sources["encoder"].writes
            self._held_source = self.bench.fixed_group(
                "source of the encoder alone", noise | self.bench.held("decoder")
            )
        return self._held_source

    def swap(
        self,
        prefix: str,
        words: Iterable[str],
        source: Group,
        reads: Iterable[str],
        *,
        base_at: str = "",
        held: bool = True,
        part: Callable[[Tensor, Tensor], Tensor] | None = None,
        tag: str = "",
    ) -> Group:
        """A group in which the words of a stack have the source's values, in every layer that has them."""
        bench, words = self.bench, tuple(words)
        held = held and "block_input" not in words
        key = (prefix, words, id(source), base_at, held, tag)
        if key not in self._made:
            stack = "decoder" if prefix == "cross" else prefix
            writes: dict[Key, Change] = dict(bench.held(stack)) if held else {}
            for word in words:
                name = named(word, prefix)
                for layer in bench.layers(name):
                    if not bench.sites[name, layer].read_only:
                        writes[name, layer] = (
                            taken_from(source) if part is None else _parted(bench, source, part)
                        )
            if base_at:
                name = named(base_at, prefix)
                writes.update({(name, layer): taken_from(bench.base) for layer in bench.layers(name)})
            beside = f", {base_at} held" if base_at else ""
            name = f"{_listed(words, prefix)} of {source.name}{beside} {tag}".rstrip()
            self._made[key] = bench.experiment(name, writes)
        group = self._made[key]
        for word in reads:
            name = named(word, prefix)
            bench.read_in(group, [(name, layer) for layer in bench.layers(name)])
            bench.read_in(source, [(name, layer) for layer in bench.layers(name)])
        return group

    def rest(self, prefix: str, words: Iterable[str], source: Group, read: str) -> Group | None:
        """A group in which all that goes into attention is the source's but for what the words name."""
        bench, words = self.bench, tuple(words)
        key = (prefix, words, id(source), read, "rest")
        given = named("attention_input" if prefix == "cross" else "block_input", prefix)
        if not writable(bench, given):
            return None
        if key not in self._made:
            writes: dict[Key, Change] = dict(bench.held("decoder")) if prefix == "cross" else {}
            writes.update({(given, layer): taken_from(source) for layer in bench.layers(given)})
            for name in (named(word, prefix) for word in words):
                writes.update({(name, layer): taken_from(bench.base) for layer in bench.layers(name)})
            reads = [(named(read, prefix), layer) for layer in bench.layers(named(read, prefix))]
            name = f"all but {_listed(words, prefix)} of {source.name}"
            self._made[key] = bench.experiment(name, writes, reads)
        return self._made[key]


def _listed(words: Iterable[str], prefix: str) -> str:
    return ", ".join(named(word, prefix) for word in words)


def _parted(bench: Bench, source: Group, part: Callable[[Tensor, Tensor], Tensor]) -> Change:
    return lambda groups: part(groups[bench.base.index], groups[source.index])


def determines(bench: Bench, swaps: Swaps) -> Judge:
    """With the source's value at one place, what follows from it is the source's."""
    made: list[tuple[str, tuple[str, ...], str, Group, Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        for written, read in TRANSFERS:
            if not all(writable(bench, named(word, prefix)) for word in written):
                continue
            if (prefix == "cross" and named(written[0], prefix).startswith("decoder_")) or not bench.layers(
                named(read, prefix)
            ):
                continue
            for source in swaps.sources(prefix, written):
                seen = [read, *SEEN_WITH.get(read, ())]
                made.append((prefix, written, read, source, swaps.swap(prefix, written, source, seen)))

    def judge() -> Iterator[Finding]:
        transfers = [one for each in made for one in _transfers(bench, swaps, *each)]
        if bench.groups:  # few architectures need any
            bench.run()
        into: dict[Key, list[tuple[float, float]]] = {}
        for transfer in transfers:
            name, layer = transfer.key
            off, limit = transfer.off_by(bench), transfer.limit
            into.setdefault(transfer.key, []).append((off, limit))
            # The pattern is what its module computes; what is written beside it has to fit it.
            for other in transfer.names:
                if COMPONENTS[other].word == "attention_pattern" and len(transfer.names) > 1:
                    continue
                why = f"{name} as in the source"
                yield Finding(other, "determines", layer, off <= limit, off, limit, why, compared=name)
        for (name, layer), results in into.items():
            if COMPONENTS[name].inside is None:
                off, limit = min(results)  # what is read at one place has one limit
                yield Finding(
                    name, "determines", layer, off <= limit, off, limit, "what should determine it does"
                )

    return judge


@dataclass(frozen=True)
class _Transfer:
    """What was read at a place of a layer with the source's values written at those that should determine it."""

    names: Sequence[str]
    key: Key
    group: Group
    source: Group
    limit: float
    off: float
    """How far what was read is from the source's."""

    rest: Group | None
    """With all but these values of the source, if that may show that it need not be the source's."""

    def off_by(self, bench: Bench) -> float:
        """How far off it is, once all experiments have been made."""
        if self.rest is None:
            return self.off
        if COMPONENTS[self.key[0]].word == "attention_scores":
            return min(self.off, in_sum(bench, self.key, self.group, self.rest, self.source, self.names))
        return min(self.off, in_product(bench, self.key, self.group, self.rest, self.source))


def _transfers(
    bench: Bench, swaps: Swaps, prefix: str, written: Sequence[str], read: str, source: Group, group: Group
) -> Iterator[_Transfer]:
    """What an experiment of `determines` came to in each layer in which it tells something."""
    names, name = [named(word, prefix) for word in written], named(read, prefix)
    for layer in bench.layers(name):
        key = (name, layer)
        if not all(bench.has(other, layer) for other in names) or not all_have(
            key, group, source, bench.base
        ):
            continue
        if "attention_pattern" in written and beside_the_band(bench, prefix, layer):
            continue
        found, expected = group.seen[key], source.seen[key]
        limit = limit_of(expected.dtype)
        if deviation(expected, bench.base.seen[key]) < MOVED * limit:
            continue  # nothing is told by what does not differ
        word = COMPONENTS[name].word
        if word == "attention_pattern":
            found, expected = of_common(found, expected), of_common(expected, found)
        elif word in SCORES:
            found, expected = where_both(found, expected), where_both(expected, found)
        off = deviation(found, expected)
        if off > limit and word == "attention_value_output":
            off = min(off, gated(bench, prefix, layer, group, source))
        if off > limit and word == "attention_scores":
            off = min(off, parts_of_heads(bench, prefix, layer, group, source, names))
        divided = off > limit and word in ("attention_value_output", "attention_scores")
        rest = swaps.rest(prefix, written, source, read) if divided else None
        yield _Transfer(names, key, group, source, limit, off, rest)


def stays(bench: Bench, swaps: Swaps) -> Judge:
    """What does not follow from a component stays the base's."""
    made: list[tuple[str, str, str, Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        for word, held, read in ONLY:
            if not writable(bench, named(word, prefix)) or (held and not bench.layers(named(held, prefix))):
                continue
            views = ["head_attention_value_output"] if read == "attention_value_output" else []
            for source in swaps.sources(prefix, [word])[-1:]:
                group = swaps.swap(prefix, [word], source, [read, *views], base_at=held)
                made.append(
                    (named(word, prefix), named(held, prefix) if held else "", named(read, prefix), group)
                )

    def judge() -> Iterator[Finding]:
        for word, held, name, group in made:
            for layer in bench.layers(word):
                key = (name, layer)
                if not bench.has(*key) or not all_have(key, group, bench.base):
                    continue
                if held and not bench.has(held, layer):
                    continue
                known = COMPONENTS[name]
                if known.word == "attention_value_output" and beside_the_band(bench, known.prefix, layer):
                    continue
                found = near(word, "only", layer, group.seen[key], bench.base.seen[key], f"{name} as before")
                view = (f"{name.removesuffix('attention_value_output')}head_attention_value_output", layer)
                if not found.passed and all_have(view, group, bench.base):
                    # A sink may take its share of the weighted values and not of the pattern.
                    off = turned(group.seen[view], bench.base.seen[view])
                    found = replace(found, passed=off <= found.limit, deviation=off)
                yield found

    return judge


def adds(bench: Bench, swaps: Swaps) -> Judge:
    """What changes the stream through a contribution alone changes the block's output as the contribution does."""
    made: list[tuple[str, str, str, Group, Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        for contribution, words in ADDED.items():
            if not writable(bench, named(contribution, prefix)):
                continue
            for source in swaps.sources(prefix, [contribution]):
                last = swaps.swap(prefix, [contribution], source, ["block_output"])
                for word in words:
                    if writable(bench, named(word, prefix)) and COMPONENTS[named(word, prefix)].word == word:
                        group = swaps.swap(prefix, [word], source, ["block_output"])
                        made.append((prefix, word, contribution, group, last))

    def judge() -> Iterator[Finding]:
        for prefix, word, contribution, group, last in made:
            for layer in bench.layers(named(word, prefix)):
                key = (named("block_output", prefix), layer)
                if bench.has(named(contribution, prefix), layer) and all_have(key, group, last):
                    name = named(contribution, prefix)
                    why = f"{key[0]} as with the same change of {name}"
                    found = near(named(word, prefix), "adds", layer, group.seen[key], last.seen[key], why)
                    yield replace(found, compared=name)

    return judge


def elementwise(bench: Bench, swaps: Swaps) -> Judge:
    """A nonlinearity works on each column by itself, and so does what it is multiplied with."""
    made: list[tuple[str, str, Group]] = []
    for prefix in bench.prefixes:
        for word, read in (("mlp_pre_activation", "mlp_activation"), ("mlp_activation", "mlp_hidden")):
            if writable(bench, named(word, prefix)) and bench.layers(named(read, prefix)):
                for source in swaps.sources(prefix, [word]):
                    group = swaps.swap(prefix, [word], source, [read, word], part=_even_columns, tag="even")
                    made.append((named(word, prefix), named(read, prefix), group))

    def judge() -> Iterator[Finding]:
        for word, name, group in made:
            for layer in bench.layers(word):
                key = (name, layer)
                if not bench.has(*key) or not all_have(key, group, bench.base):
                    continue
                new, old = group.seen[key], bench.base.seen[key]
                why = f"odd columns of {name} as before, even ones not"
                if new.shape != old.shape or new.shape[-1] < 2:
                    continue
                own = bench.base.seen.get((word, layer))
                if own is not None and torch.equal(own, old) and word.endswith("mlp_pre_activation"):
                    same = "another vector before the nonlinearity than behind it"
                    for one in (word, name):
                        yield Finding(one, "elementwise", layer, False, 0.0, 0.0, same)
                    continue
                off = deviation(new[..., 1::2], old[..., 1::2])
                change = deviation(new[..., ::2], old[..., ::2])
                limit = limit_of(new.dtype)
                right = off <= limit < change
                if right or word.endswith("mlp_pre_activation"):  # a norm may lie before the last matrix
                    yield Finding(word, "elementwise", layer, right, off, limit, why)
                    if not right:  # either may be elsewhere
                        yield Finding(name, "elementwise", layer, right, off, limit, why)
                elif change <= limit:
                    why = f"it follows from {word}"
                    yield Finding(name, "elementwise", layer, False, change, limit, why)

    return judge


def _even_columns(base: Tensor, source: Tensor) -> Tensor:
    result = base.clone()
    result[..., ::2] = source[..., ::2]
    return result


def moves(bench: Bench, swaps: Swaps) -> Judge:
    """A write anywhere in a block changes what the block returns."""
    made: list[tuple[str, str, Group]] = []
    for name in dict.fromkeys(name for name, _ in bench.sites):
        known = COMPONENTS[name]
        if known.scope == "model" or known.word == "block_output" or not writable(bench, name):
            continue
        for source in swaps.sources(known.prefix, [known.word])[-1:]:
            held = known.word != "block_input"
            made.append(
                (
                    name,
                    known.prefix,
                    swaps.swap(known.prefix, [known.word], source, ["block_output"], held=held),
                )
            )

    def judge() -> Iterator[Finding]:
        for name, prefix, group in made:
            for layer in bench.layers(name):
                key = (named("block_output", prefix), layer)
                if bench.has(*key) and key in group.seen and key in group.beside:
                    yield moved(name, layer, group.seen[key], group.beside[key], f"{key[0]} changes")

    return judge


# --- shorthands -------------------------------------------------------------------------------------------


def writable(bench: Bench, name: str) -> bool:
    """Whether a component can be written in any layer."""
    layers = bench.layers(name)
    return any(not bench.sites[name, layer].read_only for layer in layers)


def near(name: str, law: str, layer: int | None, found: Tensor, expected: Tensor, why: str) -> Finding:
    """That two ways to the same numbers agree."""
    limit, off = limit_of(expected.dtype), deviation(found, expected)
    return Finding(name, law, layer, off <= limit, off, limit, why)


def moved(name: str, layer: int | None, found: Tensor, before: Tensor, why: str) -> Finding:
    """That a write changed something."""
    limit, off = STILL * limit_of(before.dtype), deviation(found, before)
    return Finding(name, "moves", layer, off > limit, off, limit, why)
