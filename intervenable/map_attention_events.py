"""Where a forward pass computes attention: the queries, keys, values and the pattern that its functions met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from intervenable.map_trace import Call, Met


@dataclass(eq=False)
class Attention:
    """One computation of attention."""

    call: Call
    """The innermost module that was running."""

    at: int
    """When the pattern was there, in events of the pass."""

    query: Tensor | None
    """The queries as they are multiplied, `[b, H, q, dh]`; None if it is not known how their axes lie."""

    key: Tensor | None
    """The keys, `[b, H or K, k, dh]`."""

    value: Tensor | None
    """The values, `[b, H or K, k, dv]`."""

    result: Tensor
    """The pattern times the values, as the function returned it."""

    heads: int
    """Query heads."""

    queries: int
    """Positions of queries."""

    keys: int
    """Positions of keys."""

    rows: int
    """Its first axis: examples, or examples times windows."""

    source: Tensor
    """The keys as the function was given them."""

    plain: bool = True
    """Whether queries, keys and values are multiplied by functions that hooks inside a module see."""


def attentions(call: Call, batch: int) -> Iterator[Attention]:
    """Every computation of attention inside a call, in order.

    A softmax counts if the product of two tensors goes before it and its result is multiplied with a third after it,
    so that routers and the like do not.
    """
    functions = call.met_inside()
    since = 0
    for index, met in enumerate(functions):
        if met.name == "fused" and len(met.given) >= 3 and met.returned is not None:
            query, key, value = (by_heads(one, batch) for one in met.given[:3])
            if query is not None and key is not None and value is not None:
                yield Attention(
                    met.call,
                    met.at,
                    query,
                    key,
                    value,
                    met.returned,
                    query.shape[1],
                    query.shape[2],
                    key.shape[2],
                    query.shape[0],
                    met.given[1],
                )
        elif met.name == "softmax":
            found = _around(met, functions[since:index], functions[index + 1 :], batch)
            if found is not None:
                since = index
                yield found


def by_heads(tensor: Tensor, batch: int) -> Tensor | None:
    """`[b, heads, n, m]`, also of a tensor with examples and heads as one axis; None of any other."""
    if tensor.dim() == 4:
        return tensor
    if tensor.dim() != 3 or tensor.shape[0] % batch:
        return None
    return tensor.reshape(batch, -1, *tensor.shape[1:])


def _around(softmax: Met, before: Sequence[Met], after: Sequence[Met], batch: int) -> Attention | None:
    """The attention of which a softmax is the middle, if it is one."""
    pattern = softmax.returned
    if pattern is None or pattern.dim() not in (3, 4):
        return None
    matrix = by_heads(pattern, batch)
    if matrix is None or not torch.allclose(matrix.detach().sum(-1), torch.ones(()).to(matrix), atol=1e-3):
        return None
    rows, heads, queries, columns = matrix.shape
    here = tuple(_around_a_function(softmax.call))
    first = next((met for met in before if met.call in here and _returns(met, pattern)), None)
    second = next((met for met in after if met.call in here and _reads(met, pattern)), None)
    if first is None or second is None or first.returned is None or second.returned is None:
        return None
    query, key = _operands(first, batch)
    _, value = _operands(second, batch)
    return Attention(
        first.call,
        softmax.at,
        query,
        None if key is None else key.transpose(2, 3),
        value,
        second.returned,
        heads,
        queries,
        columns if key is None else key.shape[3],
        rows,
        first.given[-1],
        first.name == second.name == "product",
    )


ORDERS = ((0, 1, 2, 3), (0, 2, 1, 3), (1, 2, 0, 3))
"""Orders in which an `einsum` may have examples, heads and positions."""


def _operands(met: Met, batch: int) -> tuple[Tensor | None, Tensor | None]:
    """The two factors of a product, by heads; of an `einsum` those whose product is what it returned."""
    left, right = met.given[-2:]
    if met.name == "product":
        return by_heads(left, batch), by_heads(right, batch)
    returned = met.returned
    if returned is None or left.dim() != 4 or right.dim() != 4:
        return None, None
    for one in ORDERS:
        for other in ORDERS:
            for last in ((0, 1, 2, 3), (0, 1, 3, 2)):
                first, second = left.permute(one), right.permute(other).permute(last)
                if first.shape[:2] != second.shape[:2] or first.shape[3] != second.shape[2]:
                    continue
                if _is_product(first.detach(), second.detach(), returned.detach()):
                    return first, second
    return None, None


def _is_product(left: Tensor, right: Tensor, returned: Tensor) -> bool:
    """Whether a tensor is the product of two others, with its axes in any of the usual orders."""
    made = left @ right
    return any(
        made.shape == other.shape and torch.allclose(made, other, rtol=1e-4, atol=1e-5)
        for other in (returned.permute(order) for order in ORDERS)
    )


def _around_a_function(call: Call) -> Iterator[Call]:
    """A call, and the one around it if its module is a function with a name alone, such as `nn.Softmax`."""
    yield call
    module = call.module
    is_function = next(module.children(), None) is None and next(module.parameters(), None) is None
    if is_function and call.parent is not None:
        yield call.parent


def _returns(met: Met, pattern: Tensor) -> bool:
    """Whether a product has the shape of a pattern; a sink may be a column more."""
    if met.name not in ("product", "einsum") or met.returned is None:
        return False
    shape, wanted = met.returned.shape, pattern.shape
    more = wanted[-1] - shape[-1] if shape else -1
    return shape[:-1].numel() == wanted[:-1].numel() and shape[-2:-1] == wanted[-2:-1] and more in (0, 1)


def _reads(met: Met, pattern: Tensor) -> bool:
    """Whether a product reads a pattern."""
    if met.name not in ("product", "einsum") or len(met.given) < 2:
        return False
    shape, wanted = met.given[0].shape, pattern.shape
    return shape[:-1].numel() == wanted[:-1].numel() and wanted[-1] - shape[-1] in (0, 1)
