"""Laws about writes: what determines what, what stays, what moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from intervenable.map_laws import ADDED, ENDS, ONLY, TRANSFERS, Finding, deviation, limit_of, named
from intervenable.map_laws_runs import Bench, Change, Group, Key, taken_from
from model_maps import COMPONENTS

Judge = Callable[[], Iterator[Finding]]
"""What a law found, once its experiments have been made."""

MOVED = 10
"""How many times the limit a change must have to count as one."""


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
            self._made[key] = bench.experiment(f"{', '.join(words)} of {source.name}", writes)
        group = self._made[key]
        for word in reads:
            name = named(word, prefix)
            bench.read_in(group, [(name, layer) for layer in bench.layers(name)])
            bench.read_in(source, [(name, layer) for layer in bench.layers(name)])
        return group


def _parted(bench: Bench, source: Group, part: Callable[[Tensor, Tensor], Tensor]) -> Change:
    return lambda groups: part(groups[bench.base.index], groups[source.index])


def determines(bench: Bench, swaps: Swaps) -> Judge:
    """With the source's value at one place, what follows from it is the source's."""
    made: list[tuple[str, tuple[str, ...], str, Group, Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        for written, read in TRANSFERS:
            if not all(_writable(bench, named(word, prefix)) for word in written):
                continue
            if (prefix == "cross" and named(written[0], prefix).startswith("decoder_")) or not bench.layers(
                named(read, prefix)
            ):
                continue
            for source in swaps.sources(prefix, written):
                made.append((prefix, written, read, source, swaps.swap(prefix, written, source, [read])))

    def judge() -> Iterator[Finding]:
        into: dict[Key, list[tuple[bool, float]]] = {}
        source_dtype: dict[Key, torch.dtype] = {}
        for prefix, written, read, source, group in made:
            names, name = [named(word, prefix) for word in written], named(read, prefix)
            for layer in bench.layers(name):
                key = (name, layer)
                if not all(bench.has(other, layer) for other in names) or not _all_have(
                    key, group, source, bench.base
                ):
                    continue
                limit = limit_of(source.seen[key].dtype)
                if deviation(source.seen[key], bench.base.seen[key]) < MOVED * limit:
                    continue  # nothing is told by what does not differ
                found, expected = group.seen[key], source.seen[key]
                if COMPONENTS[name].word == "attention_pattern":  # what a sink takes is not in the scores
                    found, expected = _of_all(found), _of_all(expected)
                off = deviation(found, expected)
                source_dtype[key] = expected.dtype
                into.setdefault(key, []).append((off <= limit, off))
                # The pattern is what its module computes; what is written beside it has to fit it.
                for other in names:
                    if COMPONENTS[other].word == "attention_pattern" and len(names) > 1:
                        continue
                    yield Finding(
                        other, "determines", layer, off <= limit, off, limit, f"{name} as in the source"
                    )
        for (name, layer), results in into.items():
            if COMPONENTS[name].inside is None:
                off = min(off for _, off in results)
                limit, passed = limit_of(source_dtype[name, layer]), any(passed for passed, _ in results)
                yield Finding(name, "determines", layer, passed, off, limit, "what should determine it does")

    return judge


def _of_all(pattern: Tensor) -> Tensor:
    return pattern / pattern.sum(-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny)


def stays(bench: Bench, swaps: Swaps) -> Judge:
    """What does not follow from a component stays the base's."""
    made: list[tuple[str, str, Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        for word, held, read in ONLY:
            if not _writable(bench, named(word, prefix)) or (held and not bench.layers(named(held, prefix))):
                continue
            for source in swaps.sources(prefix, [word])[-1:]:
                made.append(
                    (
                        named(word, prefix),
                        named(read, prefix),
                        swaps.swap(prefix, [word], source, [read], base_at=held),
                    )
                )

    def judge() -> Iterator[Finding]:
        for word, name, group in made:
            for layer in bench.layers(word):
                key = (name, layer)
                if bench.has(*key) and _all_have(key, group, bench.base):
                    yield _near(
                        word, "only", layer, group.seen[key], bench.base.seen[key], f"{name} as before"
                    )

    return judge


def adds(bench: Bench, swaps: Swaps) -> Judge:
    """What changes the stream through a contribution alone changes the block's output as the contribution does."""
    made: list[tuple[str, str, str, Group, Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        for contribution, words in ADDED.items():
            if not _writable(bench, named(contribution, prefix)):
                continue
            for source in swaps.sources(prefix, [contribution]):
                last = swaps.swap(prefix, [contribution], source, ["block_output"])
                for word in words:
                    if _writable(bench, named(word, prefix)) and COMPONENTS[named(word, prefix)].word == word:
                        group = swaps.swap(prefix, [word], source, ["block_output"])
                        made.append((prefix, word, contribution, group, last))

    def judge() -> Iterator[Finding]:
        for prefix, word, contribution, group, last in made:
            for layer in bench.layers(named(word, prefix)):
                key = (named("block_output", prefix), layer)
                if bench.has(named(contribution, prefix), layer) and _all_have(key, group, last):
                    why = f"{key[0]} as with the same change of {named(contribution, prefix)}"
                    yield _near(named(word, prefix), "adds", layer, group.seen[key], last.seen[key], why)

    return judge


def elementwise(bench: Bench, swaps: Swaps) -> Judge:
    """A nonlinearity works on each column by itself, and so does what it is multiplied with."""
    made: list[tuple[str, str, Group]] = []
    for prefix in bench.prefixes:
        for word, read in (("mlp_pre_activation", "mlp_activation"), ("mlp_activation", "mlp_hidden")):
            if _writable(bench, named(word, prefix)) and bench.layers(named(read, prefix)):
                for source in swaps.sources(prefix, [word]):
                    group = swaps.swap(prefix, [word], source, [read, word], part=_even_columns, tag="even")
                    made.append((named(word, prefix), named(read, prefix), group))

    def judge() -> Iterator[Finding]:
        for word, name, group in made:
            for layer in bench.layers(word):
                key = (name, layer)
                if not bench.has(*key) or not _all_have(key, group, bench.base):
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
                moved = deviation(new[..., ::2], old[..., ::2])
                limit = limit_of(new.dtype)
                yield Finding(word, "elementwise", layer, off <= limit < moved, off, limit, why)

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
        if known.scope == "model" or known.word == "block_output" or not _writable(bench, name):
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
                if bench.has(*key) and _all_have(key, group, bench.base):
                    yield _moved(name, layer, group.seen[key], bench.base.seen[key], f"{key[0]} changes")

    return judge


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
            group = bench.experiment(f"{key[0]} of {source.name}", {key: taken_from(source)})
            bench.read_in(group, [("logits", None)])
            made.append((key, prefix, group, source))

    def judge() -> Iterator[Finding]:
        for (name, layer), prefix, group, source in made:
            if group.output is None or source.output is None or bench.base.output is None:
                continue
            limit = limit_of(source.output.dtype)
            if deviation(source.output, bench.base.output) < MOVED * limit:
                continue
            if COMPONENTS[name].derived_from:
                yield _moved(name, layer, group.output, bench.base.output, "what the model returns changes")
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
            if group.output is None or bench.base.output is None or whole is None:
                continue
            off = deviation(whole, bench.base.output)
            if prefix and off < MOVED * limit_of(group.output.dtype):
                continue
            yield _moved(name, layer, group.output, bench.base.output, "what the model returns changes")

    return judge


def lookup(bench: Bench, swaps: Swaps) -> Judge:
    """The embedding of a token is the same wherever the token stands."""
    made: list[tuple[str, Group, Tensor]] = []
    for name, _ in list(bench.sites):
        if COMPONENTS[name].word != "embedding_output":
            continue
        prefix = COMPONENTS[name].prefix
        given = "decoder_input_ids" if prefix == "decoder" else "input_ids"
        ids = bench.inputs.get(given)
        if prefix not in ("", "encoder", "decoder", "text") or not isinstance(ids, Tensor) or ids.dim() != 2:
            continue
        order = _turned_round(ids, bench.special_tokens)
        inputs = {given: ids.gather(1, order)}
        group = bench.experiment(f"{name} turned round", {}, [(name, None)], inputs)
        made.append((name, group, order))

    def judge() -> Iterator[Finding]:
        for name, group, order in made:
            key = (name, None)
            if not bench.has(*key) or not _all_have(key, group, bench.base):
                continue
            old, new = bench.base.seen[key], group.seen[key]
            if old.dim() != 3 or old.shape[:2] != order.shape:
                yield Finding(name, "lookup", None, False, float("inf"), 0.0, "a vector for each token")
                continue
            expected = old.gather(1, order.to(old.device)[..., None].expand_as(old))
            yield _near(name, "lookup", None, new, expected, "the same vectors in another order")

    return judge


def _turned_round(ids: Tensor, special: frozenset[int]) -> Tensor:
    """For each example an order of its positions in which all ordinary tokens are turned round."""
    order = torch.arange(ids.shape[1], device=ids.device).repeat(len(ids), 1)
    for row, tokens in enumerate(ids.tolist()):
        ordinary = [index for index, token in enumerate(tokens) if token not in special]
        order[row, ordinary] = torch.tensor(ordinary[::-1], device=ids.device)
    return order


# --- shorthands -------------------------------------------------------------------------------------------


def _writable(bench: Bench, name: str) -> bool:
    layers = bench.layers(name)
    return any(not bench.sites[name, layer].read_only for layer in layers)


def _all_have(key: Key, *groups: Group) -> bool:
    return all(key in group.seen for group in groups)


def _near(name: str, law: str, layer: int | None, found: Tensor, expected: Tensor, why: str) -> Finding:
    limit, off = limit_of(expected.dtype), deviation(found, expected)
    return Finding(name, law, layer, off <= limit, off, limit, why)


def _moved(name: str, layer: int | None, found: Tensor, before: Tensor, why: str) -> Finding:
    limit, off = limit_of(before.dtype), deviation(found, before)
    return Finding(name, "moves", layer, off > limit, off, limit, why)
