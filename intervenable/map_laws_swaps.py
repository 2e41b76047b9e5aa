"""Laws about writes: what determines what, what stays, what moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from intervenable.attention_mode import SCORES
from intervenable.map_laws import ADDED, ENDS, ONLY, TRANSFERS, Finding, deviation, limit_of, named, told
from intervenable.map_laws_runs import Bench, Change, Group, Key, taken_from
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
                seen = [read, *_SEEN_WITH.get(read, ())]
                made.append((prefix, written, read, source, swaps.swap(prefix, written, source, seen)))

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
                if COMPONENTS[name].word == "attention_pattern":
                    found, expected = _of_common(found, expected), _of_common(expected, found)
                elif COMPONENTS[name].word in SCORES:
                    found, expected = _where_both(found, expected), _where_both(expected, found)
                off = deviation(found, expected)
                if off > limit and COMPONENTS[name].word == "attention_value_output":
                    off = min(off, _gated(bench, prefix, layer, group, source))
                if off > limit and COMPONENTS[name].word == "attention_scores":
                    off = min(off, _parts_of_heads(bench, prefix, layer, group, source, names))
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


_WEIGHTED = ("head_attention_value_output", "attention_pattern", "expanded_head_value")


def _gated(bench: Bench, prefix: str, layer: int | None, group: Group, source: Group) -> float:
    """How far off it is that pattern and values are the source's, and a gate they are multiplied with the base's."""
    keys = [(named(word, prefix), layer) for word in _WEIGHTED]
    if not all(_all_have(key, group, source, bench.base) for key in keys):
        return float("inf")
    view, pattern, values = keys
    before, after = (one.seen[pattern] @ one.seen[values] for one in (bench.base, source))
    new, old = group.seen[view], bench.base.seen[view]
    if new.shape != after.shape:
        return float("inf")
    # The gate is what the base has for each weighted value: nothing is divided, as some are near zero.
    return deviation(new * before, old * after)


def _turned(new: Tensor, old: Tensor) -> float:
    """How far vectors by heads point elsewhere; how long they are is left out."""
    if new.shape != old.shape or new.shape[-1] < 2:
        return float("inf")
    long, short = (value / value.norm(dim=-1, keepdim=True).clamp(min=1e-12) for value in (new, old))
    return deviation(long, short)


_MULTIPLIED = {
    "query_output": "rotary_query",
    "head_query_output": "rotary_query",
    "key_output": "expanded_head_key",
    "head_key_output": "expanded_head_key",
}
"""What the model multiplies of a projection's heads."""

_SEEN_WITH = {
    "attention_value_output": _WEIGHTED,
    "attention_scores": ("rotary_query", "expanded_head_key"),
}
"""What is looked at where a value is not the source's, for an architecture in which it need not be."""


def _parts_of_heads(
    bench: Bench, prefix: str, layer: int | None, group: Group, source: Group, written: Sequence[str]
) -> float:
    """How far off it is that what is multiplied is partly the source's: of models whose heads come from two places.

    Some keys have columns that all heads share and that another projection makes (latent attention). Then the columns
    of a head that change have to be the source's, as many as the map gives a head, and the map must leave no column
    of the projection without a component.
    """
    worst = 0.0
    for name in written:
        product = _MULTIPLIED.get(COMPONENTS[name].word)
        key = (named(product or "", prefix), layer)
        columns = bench.sites[name, layer].columns
        if (
            product is None
            or columns is None
            or not bench.has(*key)
            or not _all_have(key, group, source, bench.base)
        ):
            return float("inf")
        new, old, aim = (one.seen[key].float() for one in (group, bench.base, source))
        limit, size = limit_of(source.seen[key].dtype), float(aim.abs().max())
        changed = ((new - old).abs() > limit * size).any(0).any(1)  # heads by columns
        off = torch.where(changed[None, :, None], (new - aim).abs(), torch.zeros_like(new)) / size
        worst = max(worst, float(off.max()))
        complete = bool(changed.all())
        if not complete and (
            bool((changed.sum(-1) != columns.width).any()) or not bench.covered(name, layer)
        ):
            return float("inf")
    return worst


def _of_common(pattern: Tensor, other: Tensor) -> Tensor:
    """Shares of the keys that are read in both: what a sink takes is not in the scores, nor what a mask that follows
    from the tokens hides.
    """
    common = (
        torch.where(other > 0, pattern, torch.zeros_like(pattern))
        if other.shape == pattern.shape
        else pattern
    )
    return common / common.sum(-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny)


def _where_both(scores: Tensor, other: Tensor) -> Tensor:
    """Scores where neither is masked, as a mask may follow from what the attention is given."""
    if other.shape != scores.shape:
        return scores
    ours, theirs = told(scores), told(other)
    visible = ours & theirs
    if not torch.equal(ours, theirs):
        # Of a row the model may take the largest entry first, which may be one that only one of them has.
        top = scores.masked_fill(~visible, -torch.inf).amax(-1, keepdim=True)
        scores = scores - top.masked_fill(top == -torch.inf, 0.0)
    return torch.where(visible, scores, torch.zeros_like(scores))


def stays(bench: Bench, swaps: Swaps) -> Judge:
    """What does not follow from a component stays the base's."""
    made: list[tuple[str, str, Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        for word, held, read in ONLY:
            if not _writable(bench, named(word, prefix)) or (held and not bench.layers(named(held, prefix))):
                continue
            views = ["head_attention_value_output"] if read == "attention_value_output" else []
            for source in swaps.sources(prefix, [word])[-1:]:
                group = swaps.swap(prefix, [word], source, [read, *views], base_at=held)
                made.append((named(word, prefix), named(read, prefix), group))

    def judge() -> Iterator[Finding]:
        for word, name, group in made:
            for layer in bench.layers(word):
                key = (name, layer)
                if not bench.has(*key) or not _all_have(key, group, bench.base):
                    continue
                found = _near(word, "only", layer, group.seen[key], bench.base.seen[key], f"{name} as before")
                view = (f"{name.removesuffix('attention_value_output')}head_attention_value_output", layer)
                if not found.passed and _all_have(view, group, bench.base):
                    # A sink may take its share of the weighted values and not of the pattern.
                    off = _turned(group.seen[view], bench.base.seen[view])
                    found = replace(found, passed=off <= found.limit, deviation=off)
                yield found

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
                right = off <= limit < moved
                if right or word.endswith("mlp_pre_activation"):  # a norm may lie before the last matrix
                    yield Finding(word, "elementwise", layer, right, off, limit, why)

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
    limit, off = STILL * limit_of(before.dtype), deviation(found, before)
    return Finding(name, "moves", layer, off > limit, off, limit, why)
