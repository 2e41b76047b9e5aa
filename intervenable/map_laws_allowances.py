"""What need not be the source's although a law says so: architectures in which more comes together than usual.

Gates behind the values, sinks that take their share of the weighted values, keys of which all heads share a part,
masks that follow from the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from intervenable.map_laws import deviation, limit_of, named, told
from intervenable.map_laws_groups import Group, Key, all_have
from intervenable.map_laws_runs import Bench
from model_maps import COMPONENTS

WEIGHTED = ("head_attention_value_output", "attention_pattern", "expanded_head_value")


def gated(bench: Bench, prefix: str, layer: int | None, group: Group, source: Group) -> float:
    """How far off it is that pattern and values are the source's, and a gate they are multiplied with the base's."""
    keys = [(named(word, prefix), layer) for word in WEIGHTED]
    if not all(all_have(key, group, source, bench.base) for key in keys):
        return float("inf")
    view, pattern, values = keys
    before, after = (one.seen[pattern] @ one.seen[values] for one in (bench.base, source))
    new, old = group.seen[view], bench.base.seen[view]
    if new.shape != after.shape:
        return float("inf")
    # The gate is what the base has for each weighted value: nothing is divided, as some are near zero.
    return deviation(new * before, old * after)


def beside_the_band(bench: Bench, prefix: str, layer: int | None) -> bool:
    """Whether queries that read the keys around them also read what is no position, so that no pattern has it."""
    key = (named("attention_pattern", prefix), layer)
    pattern, site = bench.plainly.get(key), bench.sites.get(key)
    if pattern is None or site is None or site.bands is None:
        return False
    return bool((pattern.sum(-1) < 1 - limit_of(pattern.dtype)).any())


def turned(new: Tensor, old: Tensor) -> float:
    """How far vectors by heads point elsewhere; how long they are is left out."""
    if new.shape != old.shape or new.shape[-1] < 2:
        return float("inf")
    long, short = (value / value.norm(dim=-1, keepdim=True).clamp(min=1e-12) for value in (new, old))
    return deviation(long, short)


MULTIPLIED = {
    "query_output": "rotary_query",
    "head_query_output": "rotary_query",
    "key_output": "expanded_head_key",
    "head_key_output": "expanded_head_key",
}
"""What the model multiplies of a projection's heads."""

SEEN_WITH = {
    "attention_value_output": WEIGHTED,
    "attention_scores": ("rotary_query", "expanded_head_key"),
}
"""What is looked at where a value is not the source's, for an architecture in which it need not be."""


def parts_of_heads(
    bench: Bench, prefix: str, layer: int | None, group: Group, source: Group, written: Sequence[str]
) -> float:
    """How far off it is that what is multiplied is partly the source's: of models whose heads come from two places.

    Some keys have columns that all heads share and that another projection makes (latent attention). Then the columns
    of a head that change have to be the source's, as many as the map gives a head, and the map must leave no column
    of the projection without a component.
    """
    worst, unseen, shared = 0.0, False, False
    for name in written:
        product = MULTIPLIED.get(COMPONENTS[name].word)
        key = (named(product or "", prefix), layer)
        columns = bench.sites[name, layer].columns
        if product == "rotary_query" and not bench.has(*key) and len(written) > 1:
            unseen = True  # without a rotary embedding no component has what is multiplied
            continue
        if (
            product is None
            or columns is None
            or not bench.has(*key)
            or not all_have(key, group, source, bench.base)
        ):
            return float("inf")
        new, old, aim = (one.seen[key].float() for one in (group, bench.base, source))
        limit, size = limit_of(source.seen[key].dtype), float(aim.abs().max())
        changed = ((new - old).abs() > limit * size).any(0).any(1)  # heads by columns
        off = torch.where(changed[None, :, None], (new - aim).abs(), torch.zeros_like(new)) / size
        worst = max(worst, float(off.max()))
        complete = bool(changed.all())
        shared |= not complete
        if not complete and (
            bool((changed.sum(-1) != columns.width).any()) or not bench.covered(name, layer)
        ):
            return float("inf")
    return float("inf") if unseen and not shared else worst


def in_sum(
    bench: Bench, key: Key, group: Group, rest: Group | None, source: Group, written: Sequence[str]
) -> float:
    """How far off it is that scores are one part that follows from what is written, and a bias that does not.

    Some biases follow from the stream through a projection of their own. Then the scores with these parts of the
    source and those with all but these come to the source's and the base's.
    """
    if rest is None or not all_have(key, group, rest, source, bench.base):
        return float("inf")
    whole = all(bench.sites[name, key[1]].columns is None or bench.covered(name, key[1]) for name in written)
    four = [one.seen[key] for one in (group, rest, source, bench.base)]
    if not whole or len({one.shape for one in four}) > 1:
        return float("inf")
    visible = torch.stack([told(one) for one in four]).all(0)
    alone, others, after, before = (torch.where(visible, one, torch.zeros_like(one)) for one in four)
    if deviation(alone, before) <= limit_of(before.dtype):
        return float("inf")
    return deviation(alone + others, after + before)


def in_product(bench: Bench, key: Key, group: Group, rest: Group | None, source: Group) -> float:
    """How far off it is that weighted values are a factor that follows from what is written, and one that does not.

    Some are normed head by head before the gate, or freed of their own position's value: so the factor need not be
    the pattern times the values. The values with these parts of the source, times those with all but these, come to
    the source's times the base's; the pattern and the values are not factors of each other, so neither will do alone.
    """
    if rest is None or not all_have(key, group, rest, source, bench.base):
        return float("inf")
    alone, others, after, before = (one.seen[key].double() for one in (group, rest, source, bench.base))
    if len({one.shape for one in (alone, others, after, before)}) > 1:
        return float("inf")
    if deviation(alone, before) <= limit_of(group.seen[key].dtype):
        return float("inf")
    return deviation(alone * others, after * before)


def of_common(pattern: Tensor, other: Tensor) -> Tensor:
    """Shares of the keys that are read in both: what a sink takes is not in the scores, nor what a mask that follows
    from the tokens hides.
    """
    common = (
        torch.where(other > 0, pattern, torch.zeros_like(pattern))
        if other.shape == pattern.shape
        else pattern
    )
    return common / common.sum(-1, keepdim=True).clamp(min=torch.finfo(pattern.dtype).tiny)


def where_both(scores: Tensor, other: Tensor) -> Tensor:
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
