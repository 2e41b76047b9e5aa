"""Attention whose scores are no matrix of queries by keys: in bands, in blocks of positions, with keys beside them.

The functions that compute it multiply tensors cut in pieces, of which it cannot be told what is a head or a position.
What the output projection is given has both: gradients from there tell which linear map makes the queries, which the
keys and the values, and which columns of these belong to which head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intervenable.map_attention_events import Attention
from intervenable.map_attention_heads import ColumnHeads, Moments, column_heads, head_columns, head_sums
from intervenable.map_attention_probe import Leaf, is_linear, made_of
from intervenable.map_attention_projections import Projection, RefusedError, Role
from intervenable.map_attention_view import BlockView, layout
from intervenable.map_trace import Call, Met
from model_maps import HeadColumns

BANDED = "its scores are computed in bands or blocks, and are no matrix of queries by keys"

SEED = 2


@dataclass(frozen=True, eq=False)
class Banded:
    """The attention of one block, as far as it is known without its scores."""

    attention: Attention
    """The computation; of queries, keys and values it is not known how their axes lie."""

    projections: Mapping[Role, Projection]
    """What makes queries, keys and values."""

    output: Projection
    """What reads the pattern times the values."""


def banded_attention(view: BlockView) -> Banded | None:
    """The attention of a block whose softmax is over pieces; None if it computes none.

    Args:
        view: The block, which has no attention with a matrix of scores.

    Raises:
        RefusedError: it computes attention, and its heads are not apart.
    """
    if view.call is None or view.positions is None:
        return None
    patterns = [met for met in view.block.met_inside() if _weighs(view, met)]
    if not patterns:
        return None
    pattern, reader, axes = _reader(view, patterns)
    result = reader.main_input
    assert result is not None
    sizes = set() if pattern.returned is None else set(pattern.returned.shape)
    leaves = [leaf for leaf in view.probe.feeding(result) if leaf.call is not None]
    for heads in sorted(sizes, reverse=True):
        if heads > 1 and result.shape[-1] % heads == 0:
            made = _parts(view, result, axes, heads, leaves)
            if made is not None:
                columns = HeadColumns(heads, result.shape[-1] // heads)
                attention = _attention(view, pattern, result, heads)
                return Banded(attention, made, Projection(reader, columns))
    raise RefusedError(
        f"{BANDED}, and no linear maps of which each makes queries, keys or values for heads that are apart in"
        f" what {view.name(reader)} reads"
    )


def _weighs(view: BlockView, met: Met) -> bool:
    """Whether a softmax gives a pattern with which something is multiplied."""
    pattern = met.returned
    if met.name != "softmax" or pattern is None or pattern.dim() < 4:
        return False
    return any(
        after.at > met.at
        and after.name in ("product", "einsum")
        and after.call is met.call
        and any(made_of(given, pattern) for given in after.given)
        for after in view.block.met_inside()
    )


def _reader(view: BlockView, patterns: Sequence[Met]) -> tuple[Met, Call, dict[str, object]]:
    """A pattern, the linear map that reads it times the values, and how that has the stream's examples and positions.

    There may be other patterns, of queries that are no positions of the stream.
    """
    assert view.positions is not None
    found, others = [], []
    for pattern in patterns:
        reader = next((call for call in view.block.inside() if _reads(call, pattern)), None)
        axes = None if reader is None else layout(reader.main_input, view.rows, view.positions)
        if reader is not None and axes is not None and view.name(reader) is not None:
            found.append((pattern, reader, axes))
        elif reader is not None and reader.main_input is not None and reader.main_input.dim() == 3:
            others.append((view.name(reader), reader.main_input.shape[1]))
    if len(found) != 1:
        why = "no one linear module reads what comes of them by positions"
        if others and not found:
            name, length = others[-1]
            why = (
                f"{name} reads what comes of them at {length} positions where the stream has {view.positions}"
            )
        raise RefusedError(f"{BANDED}, and {why}")
    return found[0]


def _reads(call: Call, pattern: Met) -> bool:
    """Whether a call of a linear map is given what was made of a pattern."""
    given = call.main_input
    if not is_linear(call.module) or given is None or call.entered < pattern.at:
        return False
    return pattern.returned is not None and made_of(given, pattern.returned)


def _parts(
    view: BlockView, result: Tensor, axes: Mapping[str, object], heads: int, leaves: Sequence[Leaf]
) -> dict[Role, Projection] | None:
    """The projections of queries, keys and values, if each is made by a linear map of its own in so many heads."""
    by_heads = _by_heads(result, view, axes, heads)
    found: dict[Role, Projection] = {}
    tensors = [leaf.tensor for leaf in leaves]
    generator = torch.Generator().manual_seed(SEED)
    sums = head_sums(by_heads, heads, generator)
    here = by_heads[:, :, by_heads.shape[2] // 2].sum()
    gradients = [view.probe.gradients(one, tensors) for one in (*sums[:4], here)]
    at_positions = {
        leaf.call.module
        for leaf in leaves
        if leaf.call is not None and layout(leaf.tensor, view.rows, by_heads.shape[2]) is not None
    }
    for leaf, *parts in zip(leaves, *gradients, strict=True):
        known = [torch.zeros_like(leaf.tensor) if part is None else part for part in parts]
        assert leaf.call is not None
        place = layout(leaf.tensor, view.rows, by_heads.shape[2])
        if place is None and leaf.call.module in at_positions:
            continue  # of what is attended to beside them
        if not known[0].any() or place is None or view.name(leaf.call) is None:
            return None
        columns = column_heads(Moments(*known), None)
        if columns.mixed or not columns.fed.all() or (columns.count != 1).any():
            return None
        role = _role(columns, known[4], place, view.rows)
        by_head = [(columns.first == head).nonzero()[:, 0].tolist() for head in range(heads)]
        regular = head_columns(by_head) if all(by_head) else "some heads have no columns"
        if role in found or isinstance(regular, str):
            return None
        found[role] = Projection(leaf.call, regular)
    return found if len(found) == 3 else None


def _role(columns: ColumnHeads, here: Tensor, place: Mapping[str, object], rows: int) -> Role:
    """What a linear map makes: values are read channel by channel, queries where they are, keys elsewhere too.

    Args:
        columns: In which heads and channels its columns end up.
        here: The gradient of what the position in the middle has read.
        place: How the map's output has examples and positions.
        rows: Examples.
    """
    if bool((columns.channel >= 0).all()):
        return "value"
    positions = here.reshape(rows, -1, here.shape[-1]).transpose(0, 1) if place.get("flat") else here
    axes = place.get("axes", (0, 1))
    assert isinstance(axes, tuple)
    positions = positions if place.get("flat") else here.movedim(axes[1], 0)
    reached = positions.flatten(1).abs().amax(-1)
    reached[len(reached) // 2] = 0
    return "key" if bool(reached.any()) else "query"


def _by_heads(tensor: Tensor, view: BlockView, axes: Mapping[str, object], heads: int) -> Tensor:
    """`[b, heads, positions, width]` of what the output projection reads."""
    if axes.get("flat"):
        tensor = tensor.reshape(view.rows, -1, tensor.shape[-1])
    elif "axes" in axes:
        order = axes["axes"]
        assert isinstance(order, tuple)  # `layout` gives no other
        tensor = tensor.movedim(order, (0, 1)).flatten(2)
    return tensor.reshape(*tensor.shape[:2], heads, -1).transpose(1, 2)


def _attention(view: BlockView, pattern: Met, result: Tensor, heads: int) -> Attention:
    assert view.positions is not None
    return Attention(
        pattern.call,
        pattern.at,
        None,
        None,
        None,
        result,
        heads,
        view.positions,
        view.positions,
        view.rows,
        result,
        plain=False,
    )
