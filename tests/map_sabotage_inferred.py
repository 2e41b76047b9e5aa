"""Mistakes that finding a map out could make: the other side, slot, axis, group, kind of layer, stack."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from map_sabotage_block import Block, Spoiled, alike, named, numbers_of, with_sites
from torch import nn

from intervenable.map_trace import Call, Trace
from model_maps import COMPONENTS, AttentionHeads, HeadColumns, LayerKind, ModelMap, Site, columns_of

STREAM = (
    "block_input",
    "block_mid",
    "block_output",
    "attention_input",
    "attention_output",
    "attention_contribution",
    "mixer_input",
    "mixer_output",
    "mixer_contribution",
    "mlp_input",
    "mlp_hidden",
    "mlp_output",
    "mlp_contribution",
)
PROJECTED = ("query_output", "key_output", "value_output")
ROUTED = ("router_input", "router_output", "expert_choice", "expert_weight", "expert_input", "expert_output")


def inferred_wrongly(block: Block) -> Iterator[Spoiled]:
    """The mistakes about one layer."""
    yield from _columns_of_another(block)
    yield from _in_the_order_of_other_groups(block)
    yield from _shared_by_others(block)
    yield from _axes_exchanged(block)
    yield from _of_another_side(block)
    yield from _of_another_slot(block)
    yield from _unscaled(block)
    yield from _of_other_matrices(block)
    yield from _at_other_calls(block)
    yield from _of_experts(block)


# --- heads ------------------------------------------------------------------------------------------------


def _columns(block: Block, word: str) -> tuple[Site, HeadColumns] | None:
    site = block.site(word)
    tensor = None if site is None else block.tensor(site)
    if site is None or tensor is None:
        return None
    columns = columns_of(site, block.sizes, width=tensor.shape[-1])
    return None if columns is None else (site, columns)


def _columns_of_another(block: Block) -> Iterator[Spoiled]:
    """Of a projection that gives queries, keys and values: the columns of another of the three."""
    found = {word: of for word in PROJECTED if (of := _columns(block, word)) is not None}
    for word, (site, own) in found.items():
        for other, (beside, theirs) in found.items():
            if other == word or (beside.path, beside.side) != (site.path, site.side) or own == theirs:
                continue
            columns = replace(theirs, heads=min(own.heads, theirs.heads))
            if columns.heads == own.heads:
                wrong = replace(site, columns=columns, heads=None, part=None)
                yield block.put(f"columns of {other}", (word,), **{word: wrong})


def _in_the_order_of_other_groups(block: Block) -> Iterator[Spoiled]:
    """Heads that lie group by group, said to lie in turns: the second head is the first of the next group."""
    for word, view in (
        ("query_output", "head_query_output"),
        ("attention_value_output", "head_attention_value_output"),
    ):
        placed = _columns(block, word)
        if placed is None or block.site(view) is None:
            continue
        site, columns = placed
        if columns.heads < 4 or columns.heads % 2 or not columns.contiguous:
            continue
        half = columns.heads // 2
        turns = HeadColumns(
            columns.heads, columns.width, columns.start, half * columns.width, 2, columns.width
        )
        yield block.put(
            f"{word}, heads in turns",
            (view,),
            **{word: replace(site, columns=turns, heads=None, part=None)},
        )


def _shared_by_others(block: Block) -> Iterator[Spoiled]:
    """Another number of key-value heads in what is computed inside the attention."""
    attention = block.site("attention_input")
    if attention is None or block.site("rotary_key") is None or block.site("head_key_output") is None:
        return
    stated = attention.attention
    query = block.sizes.query_heads if stated is None else stated.query
    shared = block.sizes.key_value_heads if stated is None else stated.key_value
    if not query or not shared or shared == query:
        return
    width = None if stated is None else stated.width
    for count in sorted({query, 2 * shared, shared // 2} - {0, shared}):
        wrong = replace(attention, attention=AttentionHeads(query, count, width))
        yield block.put(f"{count} key-value heads", ("rotary_key",), attention_input=wrong)


# --- the tensor -------------------------------------------------------------------------------------------


def _axes_exchanged(block: Block) -> Iterator[Spoiled]:
    for word in STREAM:
        site = block.site(word)
        tensor = None if site is None else block.tensor(site)
        if site is None or tensor is None or site.flat or tensor.dim() != 3:
            continue
        turned = None if site.axes == (1, 0) else (1, 0)
        yield block.put("positions for examples", **{word: replace(site, axes=turned)})


def _of_another_side(block: Block) -> Iterator[Spoiled]:
    for word in (
        *STREAM,
        *PROJECTED,
        "attention_value_output",
        "mlp_pre_activation",
        "mlp_activation",
        *ROUTED,
    ):
        site = block.site(word)
        if site is not None and site.function is None:
            side = "output" if site.side == "input" else "input"
            if word == "block_mid" and site.path in block.norms():
                continue  # before the norm behind it, attention has been added to the stream as well
            yield from block.moved(f"the {side}", word, replace(site, side=side, slot=None))


def _of_another_slot(block: Block) -> Iterator[Spoiled]:
    """Another tensor that the module is given, or hands over, beside the right one."""
    for word in (*STREAM, *ROUTED):
        site = block.site(word)
        call = None if site is None else block.call_at(site)
        if site is None or call is None or site.function is not None:
            continue
        slots = call.inputs if site.side == "input" else call.outputs
        for slot, tensor in slots.items():
            if slot is not None and tensor.is_floating_point() and tensor.dim() > 1:
                yield from block.moved(f"slot {slot!r}", word, replace(site, slot=slot))


def _unscaled(block: Block) -> Iterator[Spoiled]:
    """Of what is multiplied before it is added: as it is before."""
    for word in STREAM:
        site = block.site(word)
        if site is not None and site.scale != 1.0:
            yield block.put("without its factor", **{word: replace(site, scale=1.0)})


def _of_other_matrices(block: Block) -> Iterator[Spoiled]:
    for word in ("attention_output", "mixer_output", "mlp_output", "expert_output"):
        own = block.site(word)
        for path in block.linears():
            if own is not None and block.same_shape(own, Site(path)):
                if word == "mlp_output" and block.is_made_of(own, path):
                    continue
                yield from block.moved(
                    f"from {path}", word, replace(own, path=path, side="output", slot=None)
                )
    for word in ("attention_input", "mixer_input", "mlp_input", "router_input", "expert_input"):
        own = block.site(word)
        for path in block.linears():
            if own is not None:
                yield from block.moved(f"into {path}", word, replace(own, path=path, side="input", slot=None))


def _at_other_calls(block: Block) -> Iterator[Spoiled]:
    for word in COMPONENTS:
        site = block.site(word)
        if site is not None and site.call is not None:
            yield from block.moved("at another call", word, replace(site, call=0 if site.call else 1))


def _of_experts(block: Block) -> Iterator[Spoiled]:
    choice, weight, logits = (
        block.site(word) for word in ("expert_choice", "expert_weight", "router_output")
    )
    if choice is not None and weight is not None and choice != weight:
        yield block.put("exchanged", expert_choice=weight, expert_weight=choice)
    if logits is not None and weight is not None and not block.same(weight, logits):
        yield block.put("at the router's logits", expert_weight=replace(logits, width="any"))
    if logits is not None and choice is not None:
        yield block.put("at the router's logits", expert_choice=replace(logits, width="any"))
    for word in ("router_output", "expert_choice", "expert_weight"):
        site = block.site(word)
        if site is not None and site.function == "linear":
            yield block.put("of the next product", **{word: replace(site, nth=site.nth + 1)})
        if site is not None and site.function == "top":
            yield block.put("what is largest, not where", **{word: replace(site, slot=0)})


# --- the whole --------------------------------------------------------------------------------------------


def of_the_whole_inferred_wrongly(model: nn.Module, described: ModelMap, traced: Trace) -> Iterator[Spoiled]:
    """The mistakes about kinds of layers, about stacks, and about what follows them."""
    yield from _kinds_at_other_layers(model, described, traced)
    yield from _attention_exchanged(described)
    yield from _stacks_exchanged(described)
    yield from _scales_of_other_norms(described, traced)


def _kinds_at_other_layers(model: nn.Module, described: ModelMap, traced: Trace) -> Iterator[Spoiled]:
    for number, kind in enumerate(described.kinds):
        name = named("block_output", kind.stack or "")
        blocks = described.blocks_of(name)
        listed = model.get_submodule(blocks) if blocks else model
        count = len(listed) if hasattr(listed, "__len__") else 1
        for step in (1, -1):
            layers = tuple(sorted((layer + step) % count for layer in kind.layers))
            if layers == tuple(sorted(kind.layers)):
                continue
            kinds = [*described.kinds]
            kinds[number] = LayerKind(layers, kind.stack, kind.sites, kind.absent)
            wrong = replace(described, kinds=tuple(kinds))
            names = tuple(
                name
                for name in described.components()
                if COMPONENTS[name].scope == "block"
                and COMPONENTS[name].prefix in (kind.stack or "", "cross" if kind.stack == "decoder" else "")
                and any(_differ(described, wrong, traced, name, layer) for layer in range(count))
            )
            if names:
                yield Spoiled(
                    f"{', '.join(names)}: the kind of layers {kind.layers} at {layers}", names, wrong
                )


def _differ(described: ModelMap, wrong: ModelMap, traced: Trace, name: str, layer: int) -> bool:
    """Whether a map says another place of a component in a layer than the one that is right.

    A map that places nothing there is no wrong one. What is not there at all is wrong whatever it says.
    """
    known = COMPONENTS[name]
    above = known.heads_of or known.derived_from or known.inside
    if above is not None and not _differ(described, wrong, traced, above, layer):
        return False
    right, said = described.site(name, layer), wrong.site(name, layer)
    if said is None or said == right:
        return False
    block = f"{wrong.blocks_of(name)}.{layer}"
    if right is None:
        return True
    tensors = [numbers_of(traced, block, site) for site in (right, said)]
    return not (right.columns == said.columns and right.plus == said.plus and alike(*tensors))


def _attention_exchanged(described: ModelMap) -> Iterator[Spoiled]:
    """The decoder's attention to the encoder taken for that to itself, and the other way round."""
    if "decoder" not in described.stacks:
        return
    words = [name.removeprefix("cross_") for name in described.sites if COMPONENTS[name].prefix == "cross"]
    words = [word for word in words if f"decoder_{word}" in described.sites and word != "block_mid"]
    if described.kinds or not words:
        return
    sites = {f"cross_{word}": described.sites[f"decoder_{word}"] for word in words}
    sites |= {f"decoder_{word}": described.sites[f"cross_{word}"] for word in words}
    yield Spoiled(
        "attention to itself and to the encoder exchanged", tuple(sites), with_sites(described, **sites)
    )


def _stacks_exchanged(described: ModelMap) -> Iterator[Spoiled]:
    """Two stacks taken for each other, with all that is in them."""
    stacks = [*described.stacks]
    for place, one in enumerate(stacks):
        for other in stacks[place + 1 :]:
            if "decoder" in (one, other) and any(
                COMPONENTS[name].prefix == "cross" for name in described.sites
            ):
                continue  # the attention to the encoder would be in the encoder then
            names = {one: other, other: one}

            def turned(name: str, names: dict[str, str] = names) -> str:
                known = COMPONENTS[name]
                return named(known.word, names.get(known.prefix, known.prefix))

            def site(found: Site, turn=turned) -> Site:
                return found if found.plus is None else replace(found, plus=turn(found.plus))

            wrong = replace(
                described,
                stacks={names.get(stack, stack): path for stack, path in described.stacks.items()},
                configs={names.get(stack, stack): part for stack, part in described.configs.items()},
                sites={turned(name): site(found) for name, found in described.sites.items()},
                absent={
                    turned(name) if name in COMPONENTS else name: why
                    for name, why in described.absent.items()
                },
                kinds=tuple(
                    LayerKind(
                        kind.layers,
                        names.get(kind.stack, kind.stack),
                        {turned(name): site(found) for name, found in kind.sites.items()},
                        {turned(name): why for name, why in kind.absent.items()},
                    )
                    for kind in described.kinds
                ),
            )
            said = tuple(name for name in wrong.components() if COMPONENTS[name].prefix in names)
            yield Spoiled(f"{one} and {other} exchanged", said, wrong)


def _scales_of_other_norms(described: ModelMap, traced: Trace) -> Iterator[Spoiled]:
    for name in described.components():
        known = COMPONENTS[name]
        if known.word != "final_norm_scale":
            continue
        blocks = described.blocks_of(named("block_output", known.prefix))
        layer = next(iter(traced.of(f"{blocks}.0")), None)
        norms: list[Call] = (
            [] if layer is None else [one for one in layer.children if "Norm" in type(one.module).__name__]
        )
        for norm in norms[:1]:
            yield Spoiled(
                f"{name}: of {norm.path}", (name,), with_sites(described, **{name: Site(norm.path)})
            )
