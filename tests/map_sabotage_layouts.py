"""Mistakes that keep to themselves: all heads of a projection in another layout, a tower taken for the blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from map_sabotage_block import Block, Spoiled, named

from model_maps import COMPONENTS, HeadColumns, LayerKind, ModelMap, Site, columns_of

PROJECTED = {
    "query_output": "head_query_output",
    "key_output": "head_key_output",
    "value_output": "head_value_output",
}
"""Projections and their views by heads."""


def laid_out_wrongly(block: Block) -> Iterator[Spoiled]:
    """The mistakes about the layout of heads in one layer."""
    yield from _fused_in_the_other_layout(block)
    yield from _what_lies_beside_a_head(block)
    yield from _rows_in_the_other_order(block)


def _columns(block: Block, word: str) -> tuple[Site, HeadColumns, int] | None:
    """Where a word lies, its columns and how many the tensor has in all."""
    site = block.site(word)
    tensor = None if site is None else block.tensor(site)
    if site is None or tensor is None:
        return None
    columns = columns_of(site, block.sizes, width=tensor.shape[-1])
    return None if columns is None else (site, columns, tensor.shape[-1])


def _fused_in_the_other_layout(block: Block) -> Iterator[Spoiled]:
    """Of a projection that gives queries, keys and values: each head's three side by side, or all queries first."""
    found = {word: of for word in PROJECTED if (of := _columns(block, word)) is not None}
    if len(found) != 3 or len({(site.path, site.side) for site, _, _ in found.values()}) != 1:
        return
    heads = {columns.heads for _, columns, _ in found.values()}
    widths = {columns.width for _, columns, _ in found.values()}
    if len(heads) != 1 or len(widths) != 1:
        return
    count, width = heads.pop(), widths.pop()
    all_first = all(columns.contiguous for _, columns, _ in found.values())
    wrong: dict[str, Site] = {}
    for place, (word, (site, columns, _)) in enumerate(
        sorted(found.items(), key=lambda of: of[1][1].first_column(0))
    ):
        other = (
            HeadColumns(count, width, place * width, 3 * width)
            if all_first
            else HeadColumns(count, width, place * count * width)
        )
        if count > 1 and other != columns:
            wrong[word] = replace(site, columns=other, heads=None, part=None)
    if wrong:
        how = "each head's three side by side" if all_first else "all of a kind side by side"
        yield block.put(how, tuple(PROJECTED[word] for word in wrong), **wrong)


def _what_lies_beside_a_head(block: Block) -> Iterator[Spoiled]:
    """Of heads that do not lie side by side: what lies between them, such as a gate."""
    for word, view in PROJECTED.items():
        placed = _columns(block, word)
        if placed is None or placed[1].contiguous:
            continue
        site, columns, total = placed
        beside = replace(columns, start=columns.start + columns.width)
        if beside.first_column(beside.heads - 1) + beside.width <= total:
            yield block.put(
                f"{word}, what lies beside each head",
                (view,),
                **{word: replace(site, columns=beside, heads=None, part=None)},
            )


def _rows_in_the_other_order(block: Block) -> Iterator[Spoiled]:
    """Of examples and positions in one axis: positions first for examples first."""
    for word in ("mlp_input", "mlp_output", "router_input", "router_output", "expert_input", "expert_output"):
        site = block.site(word)
        if site is not None and site.flat:
            turned = None if site.axes == (1, 0) else (1, 0)
            yield block.put("rows in the other order", **{word: replace(site, axes=turned)})


def stacks_taken_for_the_blocks(described: ModelMap) -> Iterator[Spoiled]:
    """A tower taken for the blocks beside it and the blocks for the tower, with all that is in them."""
    if described.blocks is None or any(COMPONENTS[name].prefix == "cross" for name in described.sites):
        return
    for stack, path in described.stacks.items():
        names = {"": stack, stack: ""}

        def turned(name: str, names: dict[str, str] = names) -> str:
            known = COMPONENTS[name]
            other = named(known.word, names.get(known.prefix, known.prefix))
            return other if other in COMPONENTS and known.word != "logits" else name

        def moved(site: Site, turn=turned) -> Site:
            return site if site.plus is None else replace(site, plus=turn(site.plus))

        wrong = replace(
            described,
            blocks=path,
            stacks={**described.stacks, stack: described.blocks},
            sites={turned(name): moved(site) for name, site in described.sites.items()},
            absent={
                turned(name) if name in COMPONENTS else name: why for name, why in described.absent.items()
            },
            kinds=tuple(
                LayerKind(
                    kind.layers,
                    names.get(kind.stack or "", kind.stack) or None,
                    {turned(name): moved(site) for name, site in kind.sites.items()},
                    {turned(name): why for name, why in kind.absent.items()},
                )
                for kind in described.kinds
            ),
        )
        said = tuple(
            name for name in wrong.components() if COMPONENTS[name].prefix in names and name != "logits"
        )
        yield Spoiled(f"the blocks and {stack} exchanged", said, wrong)
