"""Maps with one mistake in them, made from maps that are right."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from intervenable.map_trace import Trace
from model_maps import COMPONENTS, AttentionHeads, HeadColumns, ModelMap, Site, columns_of, sizes_of


@dataclass(frozen=True)
class Spoiled:
    """A map with one mistake."""

    mistake: str
    components: tuple[str, ...]
    """What it is wrong about: each of these has to be refused."""

    map: ModelMap


def spoilt(model: nn.Module, model_map: ModelMap, traced: Trace) -> Iterator[Spoiled]:
    """Every mistake that can be made in a map of this model.

    Args:
        model: The model.
        model_map: A map of it that is right.
        traced: A pass of the model written down.
    """
    for prefix in ("", "encoder", "decoder", "cross"):
        if any(COMPONENTS[name].prefix == prefix for name in model_map.components()):
            yield from _of_stack(model, model_map, traced, prefix)
    if "decoder" in model_map.stacks:
        yield from _of_two_stacks(model_map)


def _named(word: str, prefix: str) -> str:
    return f"{prefix}_{word}" if prefix else word


def _with(model_map: ModelMap, **sites: Site) -> ModelMap:
    return replace(model_map, sites={**model_map.sites, **sites})


class _Block:
    """One layer of a stack in a pass that was written down."""

    def __init__(self, model: nn.Module, model_map: ModelMap, traced: Trace, prefix: str, layer: int) -> None:
        self.map, self.prefix = model_map, prefix
        self.blocks = model_map.blocks_of(_named("attention_input", prefix))
        self.path = f"{self.blocks}.{layer}" if self.blocks else None
        self.call = next(iter(traced.of(self.path)), None) if self.path else None
        self.model = model

    def site(self, word: str) -> Site | None:
        return self.map.site(_named(word, self.prefix))

    def tensor(self, site: Site) -> Tensor | None:
        if self.call is None:
            return None
        path = ".".join(part for part in (self.path, site.path) if part)
        call = next((one for one in (self.call, *self.call.inside()) if one.path == path), None)
        if call is None:
            return None
        return call.main_input if site.side == "input" else call.main_output

    def same(self, one: Site, other: Site) -> bool:
        """Whether two sites have the same numbers."""
        a, b = self.tensor(one), self.tensor(other)
        return (
            a is not None
            and b is not None
            and a.numel() == b.numel()
            and bool((a.reshape(-1) == b.reshape(-1)).all())
        )

    def norms(self) -> list[str]:
        """Paths of the norms in the block that change what they are given, in order."""
        if self.call is None or self.path is None:
            return []
        return [
            one.path.removeprefix(f"{self.path}.")
            for one in self.call.children
            if "Norm" in type(one.module).__name__
        ]


def _of_stack(model: nn.Module, model_map: ModelMap, traced: Trace, prefix: str) -> Iterator[Spoiled]:
    block = _Block(model, model_map, traced, prefix, 1)
    if block.call is None:
        return
    sizes = sizes_of(getattr(model, "config", None))

    def moved(mistake: str, word: str, site: Site | None, *also: str) -> Iterator[Spoiled]:
        own = block.site(word)
        name = _named(word, prefix)
        if own is None or site is None or site == own or name not in COMPONENTS:
            return
        kept = replace(site, width=own.width)
        names = (name, *(_named(other, prefix) for other in also))
        yield Spoiled(f"{name}: {mistake}", names, _with(model_map, **{name: kept}))

    def exchanged(one: str, other: str) -> Iterator[Spoiled]:
        first, second = block.site(one), block.site(other)
        if first is not None and second is not None:
            a, b = _named(one, prefix), _named(other, prefix)
            yield Spoiled(f"{a} and {b} exchanged", (a, b), _with(model_map, **{a: second, b: first}))

    # -- heads

    for word, view in (
        ("query_output", "head_query_output"),
        ("key_output", "head_key_output"),
        ("value_output", "head_value_output"),
        ("attention_value_output", "head_attention_value_output"),
    ):
        site = block.site(word)
        tensor = None if site is None else block.tensor(site)
        columns = None if site is None or tensor is None else columns_of(site, sizes, width=tensor.shape[-1])
        if site is None or columns is None or tensor is None:
            continue
        name, by_heads = _named(word, prefix), _named(view, prefix)
        laid = partial(_laid, model_map, name, site, by_heads)
        step = columns.first_column(1) - columns.first_column(0) if columns.heads > 1 else columns.width
        if step:
            yield laid("heads shifted by one", replace(columns, start=columns.start + step))
            yield laid("half a head further", replace(columns, start=columns.start + columns.width // 2))
        if columns.heads > 1 and columns.contiguous:
            last = columns.start + (columns.heads - 1) * columns.width
            turned = HeadColumns(columns.heads, columns.width, last, -columns.width, columns.heads)
            yield laid("heads in the other order", turned)
        if columns.heads > 1 and columns.contiguous and columns.width % 2 == 0:
            half = columns.width // 2
            yield laid("twice as many heads", HeadColumns(2 * columns.heads, half, columns.start))
        if columns.heads % 2 == 0 and columns.contiguous:
            wide = HeadColumns(columns.heads // 2, 2 * columns.width, columns.start)
            yield laid("half as many heads", wide)
        if not columns.contiguous:
            yield laid("heads side by side", HeadColumns(columns.heads, columns.width, columns.start))
    yield from exchanged("key_output", "value_output")
    yield from exchanged("query_output", "key_output")
    yield from exchanged("query_output", "value_output")
    attention = block.site("attention_input")
    if attention is not None and sizes.query_heads and model_map.site(_named("attention_pattern", prefix)):
        for times, mistake in ((2.0, "twice as many heads"), (0.5, "half as many heads")):
            query = max(1, int(sizes.query_heads * times))
            if query != sizes.query_heads:
                counted = replace(attention, attention=AttentionHeads(query, query))
                name = _named("attention_input", prefix)
                pattern = _named("attention_pattern", prefix)
                yield Spoiled(f"{pattern}: {mistake}", (pattern,), _with(model_map, **{name: counted}))

    # -- places

    norms = block.norms()
    if attention is not None and prefix != "cross":
        yield from moved("the block's input", "attention_input", Site("", "input"))
    for norm in norms:
        before, after = Site(norm, "input"), Site(norm)
        yield from moved(f"before {norm}", "attention_input", before)
        yield from moved(f"before {norm}", "mlp_input", before)
        output = block.site("block_output")
        if output is not None and not block.same(output, after):  # a norm may be a block's last part
            yield from moved(f"after {norm}", "block_output", after)
        for word in ("attention_output", "mlp_output"):
            own_site = block.site(word)
            if own_site is not None and not block.same(own_site, after):
                yield from moved(f"after {norm}", word, after)
        middle = block.site("block_mid")
        if middle is not None and middle.plus is not None:
            yield from moved(f"on the branch into {norm}", "block_mid", before)
    yield from moved("the attention's input", "mlp_input", block.site("attention_input"))
    yield from moved("the MLP's input", "attention_input", block.site("mlp_input"))
    hidden = block.site("mlp_hidden")
    if hidden is not None:
        for word in ("mlp_input", "mlp_pre_activation", "mlp_activation", "mlp_output"):
            other = block.site(word)
            if other is not None and not block.same(hidden, other):
                yield from moved(f"at {word}", "mlp_hidden", other)
        yield from moved("after the nonlinearity", "mlp_pre_activation", block.site("mlp_activation"))
        yield from moved("before the nonlinearity", "mlp_activation", block.site("mlp_pre_activation"))
    for part in ("attention", "mlp"):
        contribution, output = block.site(f"{part}_contribution"), block.site(f"{part}_output")
        if contribution is not None and output is not None and not block.same(contribution, output):
            yield from moved("before the norm behind it", f"{part}_contribution", output)
    yield from moved("the MLP's", "attention_output", block.site("mlp_output"))
    yield from moved("the attention's", "mlp_output", block.site("attention_output"))
    yield from moved("the MLP's", "attention_contribution", block.site("mlp_contribution"))
    yield from moved("the attention's", "mlp_contribution", block.site("attention_contribution"))
    if prefix != "cross":
        yield from moved("of the block before", "block_output", Site("", "input"))
        yield from moved("of the block behind", "block_input", Site(""))
        yield from moved("the attention's", "block_output", block.site("attention_output"))
        yield from moved("the MLP's", "block_output", block.site("mlp_output"))
    yield from moved("the stream", "attention_output", block.site("block_mid"))
    for norm in norms[:1]:
        inside = f"{block.blocks}.0.{norm}"
        yield from moved("a block's norm", "final_norm_output", Site(inside))
        yield from moved("a block's norm", "final_norm_input", Site(inside, "input"))
    yield from moved("the last norm", "logits", block.site("final_norm_output"))
    first = block.site("embedding_output")
    if first is not None:
        yield from moved("the last norm", "embedding_output", block.site("final_norm_output"))
        yield from moved("the first block", "embedding_output", Site(f"{block.blocks}.0"))


def _laid(
    model_map: ModelMap, name: str, site: Site, by_heads: str, mistake: str, columns: HeadColumns
) -> Spoiled:
    """A map in which the heads of a component lie elsewhere."""
    changed = replace(site, columns=columns, heads=None, part=None)
    return Spoiled(f"{name}: {mistake}", (by_heads,), _with(model_map, **{name: changed}))


def _of_two_stacks(model_map: ModelMap) -> Iterator[Spoiled]:
    def put(name: str, site: Site | None) -> Iterator[Spoiled]:
        if site is not None and site != model_map.site(name):
            yield Spoiled(f"{name}: at {site.path}", (name,), _with(model_map, **{name: site}))

    for word in ("embedding_output", "final_norm_input", "final_norm_output"):
        yield from put(f"encoder_{word}", model_map.site(f"decoder_{word}"))
        yield from put(f"decoder_{word}", model_map.site(f"encoder_{word}"))
    for word in ("query_output", "key_output", "value_output", "attention_value_output", "attention_output"):
        yield from put(f"cross_{word}", model_map.site(f"decoder_{word}"))
        yield from put(f"decoder_{word}", model_map.site(f"cross_{word}"))
    yield from put("decoder_mlp_input", model_map.site("cross_attention_input"))
    yield from put("decoder_block_mid", model_map.site("cross_block_mid"))
    yield from put("cross_block_mid", model_map.site("decoder_block_mid"))
