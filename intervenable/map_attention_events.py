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
    """The queries as they are multiplied, `[b, H, q, dh]`; None if not by a plain product of matrices."""

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
    scores, pattern = softmax.given[0], softmax.returned
    if pattern is None or pattern.dim() not in (3, 4):
        return None
    matrix = by_heads(pattern, batch)
    if matrix is None or not torch.allclose(matrix.detach().sum(-1), torch.ones(()).to(matrix), atol=1e-3):
        return None
    rows, heads, queries, columns = matrix.shape
    first = next((met for met in before if _returns(met, softmax, pattern)), None)
    second = next((met for met in after if _reads(met, softmax, pattern)), None)
    if first is None or second is None or second.returned is None or scores is None:
        return None
    assert first.returned is not None
    keys = columns if first.name == "einsum" else first.returned.shape[-1]
    query = key = value = None
    if first.name == "product":
        query, right = (by_heads(one, batch) for one in first.given[-2:])
        key = None if right is None else right.transpose(2, 3)
    if second.name == "product":
        value = by_heads(second.given[-1], batch)
    return Attention(softmax.call, softmax.at, query, key, value, second.returned, heads, queries, keys, rows)


def _returns(met: Met, softmax: Met, pattern: Tensor) -> bool:
    """Whether a product has the shape of a pattern; a sink may be a column more."""
    if met.name not in ("product", "einsum") or met.call is not softmax.call or met.returned is None:
        return False
    shape, wanted = met.returned.shape, pattern.shape
    more = wanted[-1] - shape[-1] if shape else -1
    return shape[:-1].numel() == wanted[:-1].numel() and shape[-2:-1] == wanted[-2:-1] and more in (0, 1)


def _reads(met: Met, softmax: Met, pattern: Tensor) -> bool:
    """Whether a product reads a pattern."""
    if met.name not in ("product", "einsum") or met.call is not softmax.call or len(met.given) < 2:
        return False
    shape, wanted = met.given[0].shape, pattern.shape
    return shape[:-1].numel() == wanted[:-1].numel() and wanted[-1] - shape[-1] in (0, 1)
