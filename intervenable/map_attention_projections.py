"""Which linear maps make queries, keys and values, which one reads the result, and where the heads are in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from intervenable.map_attention_events import Attention
from intervenable.map_attention_heads import (
    CLEAN,
    ColumnHeads,
    Moments,
    column_heads,
    head_columns,
    head_sums,
)
from intervenable.map_attention_probe import Leaf, Probe, is_linear, keeps_columns, made_of
from intervenable.map_attention_view import BlockView, layout, same_values, within
from intervenable.map_trace import Call
from model_maps import HeadColumns

Role = Literal["query", "key", "value"]
ROLES: tuple[Role, ...] = ("query", "key", "value")
PLURAL: dict[Role, str] = {"query": "queries", "key": "keys", "value": "values"}


class RefusedError(Exception):
    """A component that cannot be placed, with the reason."""


class MovedError(RefusedError):
    """Positions are mixed after a linear map, so that its output is not yet what is multiplied at a position."""

    def __init__(self, why: str, call: Call) -> None:
        super().__init__(why)
        self.call = call


@dataclass(eq=False)
class Operands:
    """One computation of attention, with the linear maps that make what it multiplies."""

    attention: Attention

    feeding: dict[Role, list[Leaf]] = field(default_factory=dict)
    """What each operand is made of."""

    moments: dict[Role, dict[int, Moments]] = field(default_factory=dict)
    """By the `id` of a leaf's tensor the gradients that tell its columns apart."""

    read: dict[tuple[Role, int], ColumnHeads] = field(default_factory=dict)
    """By the operand and the `id` of a leaf's tensor what its gradients say, once they have been read."""


@dataclass(frozen=True)
class Projection:
    """The columns that the heads have in what a linear map returns, or is given."""

    call: Call
    columns: HeadColumns

    norm: Call | None = None
    """A norm over all heads that lies before a map that reads them; then the columns are those of its input."""

    positions_first: bool = False
    """Whether a map that is given examples and positions as one axis has the examples of a position side by side."""


def take_moments(probe: Probe, found: Sequence[Operands]) -> None:
    """Gradients of all attentions of all blocks at once: five backward passes for each of three operands."""
    generator = torch.Generator().manual_seed(0)
    for role in ROLES:
        sums: list[tuple[Tensor, ...]] = []
        leaves: dict[int, Leaf] = {}
        for one in found:
            operand: Tensor | None = getattr(one.attention, role)
            if operand is None or not operand.requires_grad:
                continue
            one.feeding[role] = probe.feeding(operand)
            leaves.update({id(leaf.tensor): leaf for leaf in one.feeding[role]})
            sums.append(head_sums(operand, operand.shape[1], generator))
        if not leaves:
            continue
        tensors = [leaf.tensor for leaf in leaves.values()]
        totals = [torch.stack(parts).sum() for parts in zip(*sums, strict=True)]
        gradients = [probe.gradients(total, tensors) for total in totals]
        moments: dict[int, Moments] = {}
        for tensor, *parts in zip(tensors, *gradients, strict=True):
            known = [torch.zeros_like(tensor) if part is None else part for part in parts]
            if known[0].any():
                moments[id(tensor)] = Moments(*known)
        for one in found:
            one.feeding[role] = [leaf for leaf in one.feeding.get(role, ()) if id(leaf.tensor) in moments]
            one.moments[role] = {id(leaf.tensor): moments[id(leaf.tensor)] for leaf in one.feeding[role]}


# --- queries, keys, values --------------------------------------------------------------------------------


def operand_projection(view: BlockView, found: Sequence[Operands], role: Role) -> Projection:
    """The columns of the one linear map that makes an operand.

    Args:
        view: The block.
        found: The computations of its attention, of which there is one as a rule.
        role: Which operand.

    Raises:
        RefusedError: no linear map makes it alone, or its heads are not apart there.
    """
    first, *others = found
    feeding = first.feeding.get(role, [])
    ids = {id(leaf.tensor) for leaf in feeding}
    if any({id(leaf.tensor) for leaf in other.feeding.get(role, [])} != ids for other in others):
        raise RefusedError(
            f"it computes attention {len(found)} times, each time with {PLURAL[role]} of its own"
        )
    if others and role == "value":
        raise RefusedError(f"it multiplies its pattern with values {len(found)} times")
    linear = [
        (leaf, leaf.call) for leaf in feeding if leaf.call is not None and view.name(leaf.call) is not None
    ]
    if not linear:
        raise RefusedError(f"no linear module hands over what its {PLURAL[role]} are made of")
    if any(leaf.call is None and leaf.slot == view.block.main_input_slot for leaf in feeding):
        raise RefusedError(f"its {PLURAL[role]} are not made by linear modules alone")
    candidates: list[tuple[Call, ColumnHeads, int]] = []
    for leaf, call in linear:
        heads = _column_heads(first, leaf, role)
        if heads.mixed:
            raise RefusedError(f"{heads.mixed} columns of {view.name(call)} count for several heads at once")
        if heads.moved:
            raise MovedError(f"positions are mixed between {view.name(call)} and its {PLURAL[role]}", call)
        candidates += [(call, heads, count) for count in sorted({*heads.count[heads.fed].tolist()})]
    total: int = getattr(first.attention, role).shape[1]
    candidates = _of_own_positions(view, candidates)
    if len(candidates) > 1:  # latent attention: a part of each key is the same for all heads
        candidates = [one for one in candidates if one[2] < total] or candidates
    if len(candidates) > len({call.module for call, *_ in candidates}) == 1:
        raise RefusedError(
            f"{view.name(candidates[0][0])} makes {PLURAL[role]} {len(candidates)} times in a pass"
        )
    if len(candidates) > 1:
        names = ", ".join(dict.fromkeys(str(view.name(call)) for call, *_ in candidates))
        raise RefusedError(f"its {PLURAL[role]} are made by several linear maps: {names}")
    call, heads, count = candidates[0]
    return Projection(call, _columns(heads, count, total, role))


def _of_own_positions(
    view: BlockView, candidates: list[tuple[Call, ColumnHeads, int]]
) -> list[tuple[Call, ColumnHeads, int]]:
    """Of several calls of one module those that are given the positions of the block's stream.

    Those of another stack, which is attended to in the same matrix, are left out.
    """
    if len({call.module for call, *_ in candidates}) != 1 or view.positions is None:
        return candidates
    own = [one for one in candidates if _is_made_of_stream(view, one[0])]
    return own or candidates


def _is_made_of_stream(view: BlockView, call: Call) -> bool:
    """Whether what a call is given is made of the block's stream and of nothing else that the block is given."""
    if call.main_input is None or layout(call.main_input, view.rows, view.positions or 0) is None:
        return False
    origins = view.origins(view.probe.feeding(call.main_input))
    return bool(origins) and all(leaf.slot == view.block.main_input_slot for leaf in origins)


def convolutions(view: BlockView, found: Sequence[Operands]) -> list[nn.Module]:
    """The modules that mix positions between linear maps and operands, and hand over what is multiplied then."""
    modules = []
    for role in ROLES:
        try:
            operand_projection(view, found, role)
        except MovedError as error:
            made = error.call.main_output
            modules += [
                call.module
                for call in view.block.inside()
                if made is not None
                and call.main_output is not None
                and call.main_output.shape == made.shape
                and same_values(call.main_input, made)
                and not same_values(call.main_output, made)
            ]
        except RefusedError:
            continue
    return modules


def is_rotated(operands: Operands, role: Role) -> bool | None:
    """Whether channels are mixed between the projections and an operand; None if that cannot be told."""
    linear = [leaf for leaf in operands.feeding.get(role, []) if leaf.call is not None]
    if not linear:
        return None
    read = [_column_heads(operands, leaf, role) for leaf in linear]
    return any(bool((one.channel[one.fed] < 0).any()) for one in read)


def _column_heads(operands: Operands, leaf: Leaf, role: Role) -> ColumnHeads:
    key = (role, id(leaf.tensor))
    if key not in operands.read:
        operands.read[key] = _read_moments(operands, leaf, role)
    return operands.read[key]


def _read_moments(operands: Operands, leaf: Leaf, role: Role) -> ColumnHeads:
    attention, moments = operands.attention, operands.moments[role][id(leaf.tensor)]
    rows, length = attention.rows, attention.queries if role == "query" else attention.keys
    known = layout(leaf.tensor, rows, length)
    if known is None:
        return column_heads(moments, None)
    if known.get("flat"):
        moments = Moments(*(part.reshape(rows, length, -1) for part in vars(moments).values()))
    return column_heads(moments, known.get("axes", (0, 1))[1])


def _columns(heads: ColumnHeads, count: int, total: int, role: Role) -> HeadColumns:
    if role == "query" and count != 1:
        raise RefusedError(f"{count} heads share each query")
    chosen = (heads.fed & (heads.count == count)).nonzero()[:, 0]
    by_head: dict[int, list[int]] = {}
    for column, head in zip(chosen.tolist(), heads.first[chosen].tolist(), strict=True):
        by_head.setdefault(head, []).append(column)
    if sorted(by_head) != list(range(0, total, count)):
        raise RefusedError(
            f"its {PLURAL[role]} are made of columns for {len(by_head)} of {total // count} heads"
        )
    if role == "value":
        channel = heads.channel.tolist()
        rising = [[channel[column] for column in by_head[head]] for head in sorted(by_head)]
        if any(row != list(range(row[0], row[0] + len(row))) for row in rising):
            raise RefusedError(
                "the columns of its values are mixed before they are multiplied with the pattern"
            )
    return _regular([by_head[head] for head in sorted(by_head)])


def _regular(columns_of_heads: Sequence[Sequence[int]]) -> HeadColumns:
    columns = head_columns(columns_of_heads)
    if isinstance(columns, str):
        raise RefusedError(columns)
    return columns


# --- what reads the result --------------------------------------------------------------------------------


def output_projection(view: BlockView, found: Sequence[Operands]) -> Projection:
    """The linear map that reads the pattern times the values, and the columns of each head in its input.

    Raises:
        RefusedError: none does alone, or the heads are not apart there.
    """
    attention = found[0].attention
    calls = [
        call
        for call in view.block.inside()
        if is_linear(call.module)
        and not (call.parent is not None and is_linear(call.parent.module))  # a part of an adapted one
        and call.entered > attention.at
        and call.main_input is not None
        and made_of(call.main_input, attention.result)
    ]
    if not calls:
        raise RefusedError("no linear module reads the pattern times the values")
    if len({call.path for call in calls}) > 1:
        names = ", ".join(dict.fromkeys(str(view.name(call)) for call in calls))
        raise RefusedError(f"several linear maps read the pattern times the values: {names}")
    if len(found) > 1:
        raise RefusedError(f"it multiplies its pattern with values {len(found)} times")
    (reader, *_) = calls
    mixing = _mixing_heads(view, attention, reader)
    if mixing is not None and not within(reader, attention.call):  # a matrix further on
        raise RefusedError("no linear module reads the pattern times the values")
    if mixing is None:
        first = _positions_first(view, attention, reader)
        return Projection(reader, _result_columns(view, attention, reader), positions_first=first)
    if not same_values(mixing.main_output, reader.main_input):
        raise RefusedError(
            f"{view.name(mixing)}, between the pattern times the values and {view.name(reader)}, mixes the heads"
        )
    return Projection(reader, _result_columns(view, attention, mixing), mixing)


def _mixing_heads(view: BlockView, attention: Attention, reader: Call) -> Call | None:
    """A norm over all heads between the pattern times the values and their projection."""
    for call in view.block.inside():
        given, returned = call.main_input, call.main_output
        if (
            call.children
            or not attention.at < call.entered < reader.entered
            or not keeps_columns(call.module)
        ):
            continue
        if given is None or returned is None or given.shape != returned.shape:
            continue
        if given.shape[-1] == attention.result.shape[-1] or not made_of(given, attention.result):
            continue
        with torch.no_grad():
            half = given.shape[-1] // 2
            other = given.detach().clone()
            other[..., half:] = 0
            before, after = call.module(given.detach()), call.module(other)
        if not torch.equal(before[..., :half], after[..., :half]):
            return call
    return None


def _result_columns(view: BlockView, attention: Attention, reader: Call) -> HeadColumns:
    """The columns of each head in what a linear map reads."""
    given, result = reader.main_input, attention.result
    assert given is not None
    ranks = torch.arange(1, given.shape[-1] + 1).to(given)
    gradients = [view.probe.gradients(total, [result])[0] for total in (given.sum(), (given * ranks).sum())]
    if gradients[0] is None or gradients[1] is None or not _orders(gradients[0], attention):
        raise RefusedError(f"the pattern times the values has the shape {tuple(result.shape)}")
    # Where there are as many positions as heads, which is which is told by whose columns are apart.
    for order in _orders(gradients[0], attention):
        ones, ranked = (
            _ordered(one, order, attention).flatten(2).double() for one in gradients if one is not None
        )  # [H, dv, examples * positions]
        size = ones.pow(2).sum(-1)
        column = (ones * ranked).sum(-1) / size.clamp_min(1e-60)
        off = (ranked - column[..., None] * ones).norm(dim=-1) / ranked.norm(dim=-1).clamp_min(1e-30)
        if bool((size > 0).all()) and bool((off <= CLEAN).all()):
            return _regular((column.round().long() - 1).tolist())
    raise RefusedError(f"the heads are not apart in what {view.name(reader)} reads")


def _positions_first(view: BlockView, attention: Attention, reader: Call) -> bool:
    """Whether a linear map reads one axis whose second row is the first position of the second example."""
    given = reader.main_input
    if given is None or given.dim() != 2 or attention.rows < 2:
        return False
    gradient = view.probe.gradients(given[1].sum(), [attention.result])[0]
    if gradient is None or not (orders := _orders(gradient, attention)):
        return False
    return bool(_ordered(gradient, orders[0], attention)[:, :, 1, 0].any())


Order = tuple[int, int, int, int]


def _orders(tensor: Tensor, attention: Attention) -> tuple[Order, ...]:
    """The orders in which a result may have its axes, so that it becomes `[heads, dv, examples, positions]`."""
    rows, heads, positions = attention.rows, attention.heads, attention.queries
    shape = _by_rows(tensor, attention).shape
    orders: tuple[tuple[tuple[int, int, int], Order], ...] = (
        ((rows, heads, positions), (1, 3, 0, 2)),
        ((rows, positions, heads), (2, 3, 0, 1)),
        ((positions, rows, heads), (2, 3, 1, 0)),
    )
    return tuple(order for leading, order in orders if tuple(shape[:-1]) == leading)


def _ordered(tensor: Tensor, order: Order, attention: Attention) -> Tensor:
    return _by_rows(tensor, attention).permute(order)


def _by_rows(tensor: Tensor, attention: Attention) -> Tensor:
    """A result with an axis of examples and one of heads, where it has one of both."""
    if tensor.dim() == 3 and tensor.shape[0] == attention.rows * attention.heads:
        return tensor.reshape(attention.rows, attention.heads, *tensor.shape[1:])
    return tensor
