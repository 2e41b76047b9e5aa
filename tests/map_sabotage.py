"""Maps with one mistake in them, made from maps that are right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from map_sabotage_block import PREFIXES, Block, Spoiled, named, one_of_each_kind, with_all_layers, with_sites
from map_sabotage_inferred import inferred_wrongly, of_the_whole_inferred_wrongly
from map_sabotage_layouts import laid_out_wrongly, stacks_taken_for_the_blocks
from torch import nn

from intervenable.map_trace import Trace
from model_maps import COMPONENTS, AttentionHeads, HeadColumns, ModelMap, Site, columns_of

__all__ = ["Spoiled", "spoilt"]


def spoilt(model: nn.Module, model_map: ModelMap, traced: Trace) -> Iterator[Spoiled]:
    """Every mistake that can be made in a map of this model: where layers differ, in one layer of each kind.

    Args:
        model: The model.
        model_map: A map of it that is right.
        traced: A pass of the model written down.
    """
    traced = with_all_layers(traced, model, model_map)
    for prefix in PREFIXES:
        if any(COMPONENTS[name].prefix == prefix for name in model_map.components()):
            for layer in one_of_each_kind(model, model_map, prefix):
                yield from _Mistakes(model, model_map, traced, prefix, layer).spoilt()
            yield from _of_the_ends(model_map, traced, prefix)
    if "decoder" in model_map.stacks:
        yield from _of_two_stacks(model_map)
    yield from of_the_whole_inferred_wrongly(model, model_map, traced)
    yield from stacks_taken_for_the_blocks(model_map)


class _Mistakes(Block):
    """The mistakes that can be made about a layer."""

    def spoilt(self) -> Iterator[Spoiled]:
        if self.call is None:
            return
        yield from self.of_heads()
        yield from self.exchanged("key_output", "value_output")
        yield from self.exchanged("query_output", "key_output")
        yield from self.exchanged("query_output", "value_output")
        yield from self.exchanged("mlp_pre_activation", "mlp_activation")
        yield from self.exchanged("attention_output", "mlp_output")
        yield from self.counted()
        yield from self.of_norms()
        yield from self.of_matrices()
        yield from self.of_places()
        yield from inferred_wrongly(self)
        yield from laid_out_wrongly(self)

    # -- heads

    def exchanged(self, one: str, other: str) -> Iterator[Spoiled]:
        first, second = self.site(one), self.site(other)
        if first is not None and second is not None and first != second and not self.same(first, second):
            yield self.put("exchanged", **{one: second, other: first})

    def of_heads(self) -> Iterator[Spoiled]:
        for word, view in (
            ("query_output", "head_query_output"),
            ("key_output", "head_key_output"),
            ("value_output", "head_value_output"),
            ("attention_value_output", "head_attention_value_output"),
        ):
            site = self.site(word)
            tensor = None if site is None else self.tensor(site)
            if site is None or tensor is None or self.site(view) is None:
                continue
            columns = columns_of(site, self.sizes, width=tensor.shape[-1])
            if columns is None:
                continue
            for mistake, wrong in _wrong_columns(columns):
                if _columns(columns) != _columns(wrong):  # other columns are other heads
                    kept = replace(site, columns=wrong, heads=None, part=None)
                    yield self.put(f"{word}, {mistake}", (view,), **{word: kept})

    def counted(self) -> Iterator[Spoiled]:
        """Another number of heads in what is computed inside the attention."""
        attention = self.site("attention_input")
        if attention is None or self.site("attention_pattern") is None:
            return
        stated = attention.attention
        heads = self.sizes.query_heads if stated is None else stated.query
        for times, mistake in ((2.0, "twice as many heads"), (0.5, "half as many heads")):
            query = max(1, int((heads or 0) * times))
            if heads and query != heads:
                counted = replace(attention, attention=AttentionHeads(query, query))
                yield self.put(mistake, ("attention_pattern",), attention_input=counted)

    # -- places

    def of_norms(self) -> Iterator[Spoiled]:
        output, middle = self.site("block_output"), self.site("block_mid")
        for norm in self.norms():
            before, after = Site(norm, "input"), Site(norm)
            if self.prefix != "cross":
                yield from self.moved(f"before {norm}", "attention_input", before)
                yield from self.moved(f"before {norm}", "mlp_input", before)
                yield from self.moved(f"before {norm}", "mixer_input", before)
            if output is not None:  # a norm may be a block's last part
                yield from self.moved(f"after {norm}", "block_output", after)
            for word in ("attention_output", "mlp_output", "mixer_output"):
                yield from self.moved(f"after {norm}", word, after)
            if middle is not None and middle.plus is not None:
                yield from self.moved(f"on the branch into {norm}", "block_mid", before)

    def of_matrices(self) -> Iterator[Spoiled]:
        """Of another matrix of weights in the block."""
        linears = self.linears()
        for word in ("query_output", "key_output", "value_output", "mlp_pre_activation", "router_output"):
            for path in linears:
                own = self.site(word)
                if own is not None and own.path != path and self.same_shape(own, Site(path)):
                    if word == "value_output" and self.is_made_of(own, path):
                        continue
                    yield from self.moved(f"from {path}", word, replace(own, path=path, slot=None))
        for word in ("attention_value_output", "mlp_hidden"):
            for path in linears:
                own = self.site(word)
                if own is not None and own.path != path:
                    yield from self.moved(f"into {path}", word, replace(own, path=path, slot=None))

    def of_places(self) -> Iterator[Spoiled]:
        moved, site = self.moved, self.site
        if self.prefix != "cross":
            yield from moved("the block's input", "attention_input", Site("", "input"))
            yield from moved("the block's input", "mixer_input", Site("", "input"))
            yield from moved("the block's input", "mlp_input", Site("", "input"))
            yield from moved("of the block before", "block_output", Site("", "input"))
            yield from moved("of the block behind", "block_input", Site(""))
        for one, other in (("attention", "MLP"), ("mixer", "MLP"), ("MLP", "attention"), ("MLP", "mixer")):
            this, that = one.lower(), other.lower()
            for word in ("input", "output", "contribution"):
                yield from moved(f"the {other}'s", f"{this}_{word}", site(f"{that}_{word}"))
        for word in ("mlp_input", "mlp_pre_activation", "mlp_activation", "mlp_output"):
            yield from moved(f"at {word}", "mlp_hidden", site(word))
            if word != "mlp_input":
                yield from moved("at mlp_hidden", word, site("mlp_hidden"))
        yield from moved("after the nonlinearity", "mlp_pre_activation", site("mlp_activation"))
        yield from moved("before the nonlinearity", "mlp_activation", site("mlp_pre_activation"))
        for part in ("attention", "mlp", "mixer"):
            contribution = site(f"{part}_contribution")
            yield from moved("before what is behind it", f"{part}_contribution", site(f"{part}_output"))
            if contribution is not None:
                doubled = replace(contribution, scale=2 * contribution.scale)
                yield self.put("twice as large", **{f"{part}_contribution": doubled})
            if self.prefix != "cross":
                yield from moved(f"the {part}'s", "block_output", site(f"{part}_output"))
            yield from moved("the stream", f"{part}_output", site("block_mid"))
            yield from moved("the block's output", f"{part}_contribution", site("block_output"))
        yield from moved("at the router", "router_output", site("router_input"))
        yield from moved("the block's input", "router_input", Site("", "input"))
        yield from moved("the block's input", "expert_input", Site("", "input"))
        yield from moved("what goes in", "expert_output", site("expert_input"))
        middle = site("block_mid")
        if middle is not None and self.prefix != "cross":
            yield from moved("before attention", "block_mid", Site("", "input"))
            yield from moved("behind the MLP", "block_mid", Site(""))
            if middle.plus is not None:
                yield from moved("without the stream", "block_mid", replace(middle, plus=None))


def _columns(columns: HeadColumns) -> list[range]:
    firsts = (columns.first_column(head) for head in range(columns.heads))
    return [range(first, first + columns.width) for first in firsts]


def _wrong_columns(columns: HeadColumns) -> Iterator[tuple[str, HeadColumns]]:
    """Other columns than the right ones, with the mistake."""
    heads, width, start = columns.heads, columns.width, columns.start
    step = columns.first_column(1) - columns.first_column(0) if heads > 1 else width
    yield "heads shifted by one", replace(columns, start=start + step)
    yield "heads shifted back by one", replace(columns, start=start - step)
    yield "half a head further", replace(columns, start=start + width // 2)
    if heads > 1 and columns.contiguous:
        last = start + (heads - 1) * width
        yield "heads in the other order", HeadColumns(heads, width, last, -width, heads)
        turns = HeadColumns(heads, width // heads, start, width // heads, heads)
        if width % heads == 0:
            yield "heads narrower than they are", turns
    if heads > 1 and columns.contiguous and width % 2 == 0:
        yield "twice as many heads", HeadColumns(2 * heads, width // 2, start)
    if heads % 2 == 0 and columns.contiguous:
        yield "half as many heads", HeadColumns(heads // 2, 2 * width, start)
    if heads > 1:
        yield "without the last head", replace(columns, heads=heads - 1)
    if not columns.contiguous:
        yield "heads side by side", HeadColumns(heads, width, start)


def _of_the_ends(model_map: ModelMap, traced: Trace, prefix: str) -> Iterator[Spoiled]:
    """What is before and behind the blocks."""
    blocks = None if prefix == "cross" else model_map.blocks_of(named("block_output", prefix))
    if not blocks:
        return
    layer = next((call.path for call in traced.of(f"{blocks}.0")), None)
    if layer is None:
        return
    norms = [one.path for one in traced.of(layer)[0].children if "Norm" in type(one.module).__name__]

    def moved(mistake: str, word: str, site: Site | None) -> Iterator[Spoiled]:
        name = named(word, prefix) if word != "logits" else word
        own = model_map.site(name)
        if own is None or site is None or site == own or _equal(traced, own, site):
            return
        yield Spoiled(
            f"{name}: {mistake}", (name,), with_sites(model_map, **{name: replace(site, width=own.width)})
        )

    for norm in norms[:1]:
        yield from moved("a block's norm", "final_norm_output", Site(norm))
        yield from moved("a block's norm", "final_norm_input", Site(norm, "input"))
    yield from moved("the first block", "final_norm_input", Site(f"{blocks}.0"))
    own = model_map.site(named("final_norm_output", prefix))
    if own is not None:
        yield from moved("before it", "final_norm_output", replace(own, side="input"))
        yield from moved("behind it", "final_norm_input", own)
    yield from moved("the last norm", "logits", own)
    yield from moved("the last norm", "embedding_output", own)
    yield from moved("the first block", "embedding_output", Site(layer))
    yield from moved("the second block's input", "embedding_output", Site(f"{blocks}.1", "input"))


def _equal(traced: Trace, one: Site, other: Site) -> bool:
    """Whether two sites outside the blocks have the same numbers."""
    found = []
    for site in (one, other):
        call = next(iter(traced.of(site.path)), None)
        tensor = None if call is None else call.main_input if site.side == "input" else call.main_output
        if tensor is None:
            return False
        found.append(tensor.reshape(-1))
    return found[0].shape == found[1].shape and bool((found[0] == found[1]).all())


def _of_two_stacks(model_map: ModelMap) -> Iterator[Spoiled]:
    def put(name: str, site: Site | None) -> Iterator[Spoiled]:
        if site is not None and site != model_map.site(name):
            yield Spoiled(f"{name}: at {site.path}", (name,), with_sites(model_map, **{name: site}))

    for word in ("embedding_output", "final_norm_input", "final_norm_output"):
        yield from put(f"encoder_{word}", model_map.site(f"decoder_{word}"))
        yield from put(f"decoder_{word}", model_map.site(f"encoder_{word}"))
    for word in ("query_output", "key_output", "value_output", "attention_value_output", "attention_output"):
        yield from put(f"cross_{word}", model_map.site(f"decoder_{word}"))
        yield from put(f"decoder_{word}", model_map.site(f"cross_{word}"))
    yield from put("decoder_mlp_input", model_map.site("cross_attention_input"))
    yield from put("decoder_block_mid", model_map.site("cross_block_mid"))
    yield from put("cross_block_mid", model_map.site("decoder_block_mid"))
