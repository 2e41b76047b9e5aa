"""Attention written out from its queries, keys and values, to compare edits inside attention modules with.

The formula takes the place of the one in a model's own source file; nothing of ours is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import by_hand
import torch
from declared import LAYER, main_output, map_of
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]


@dataclass
class Seen:
    """What the formula computed in the block of interest, before any change."""

    scores: list[Tensor] = field(default_factory=list)
    pattern: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    output: list[Tensor] = field(default_factory=list)


def _unchanged(matrix: Tensor) -> Tensor:
    return matrix


@contextmanager
def attention_written_out(
    model: nn.Module, scores: Change = _unchanged, pattern: Change = _unchanged, layer: int = LAYER
) -> Iterator[Seen]:
    """Let a model compute attention by softmax(q k / sqrt(d)) v, with changes to scores and pattern in one block.

    Scores are -inf where a query may not read; a row that may read nothing has a pattern of zeros.
    """
    seen = Seen()

    def formula(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **rest: Any,
    ) -> tuple[Tensor, Tensor]:
        shared = query.shape[1] // key.shape[1]
        key, value = (
            torch.stack([one[:, h // shared] for h in range(query.shape[1])], 1) for one in (key, value)
        )
        matrix = torch.einsum("bhqd,bhkd->bhqk", query, key) * (
            query.shape[-1] ** -0.5 if scaling is None else scaling
        )
        if attention_mask is not None:
            matrix = torch.where(attention_mask < -1e30, -torch.inf, matrix)
        here = module.layer_idx == layer
        if here:
            seen.scores.append(matrix)
            matrix = scores(matrix)
        dead = (matrix == -torch.inf).all(-1, keepdim=True)
        powers = (matrix - matrix.masked_fill(dead, 0.0).amax(-1, keepdim=True)).exp()
        weights = torch.where(dead, 0.0, powers / powers.sum(-1, keepdim=True))
        if here:
            seen.pattern.append(weights)
            seen.values.append(value)
            weights = pattern(weights)
        return torch.einsum("bhqk,bhkd->bqhd", weights, value).contiguous(), weights

    map_of(model)  # found out before the formula takes the place of what it is found by
    home = importlib.import_module(type(model).__module__)
    usual = home.eager_attention_forward  # type: ignore[attr-defined]
    implementation = model.config._attn_implementation
    assert implementation == "eager"
    home.eager_attention_forward = formula  # type: ignore[attr-defined]
    handle = by_hand.hook(model, "attention_output", lambda value: seen.output.append(value.clone()), layer)
    try:
        yield seen
    finally:
        handle.remove()
        home.eager_attention_forward = usual  # type: ignore[attr-defined]


def run_written_out(model: nn.Module, inputs: Mapping[str, Tensor], **changes: Change) -> tuple[Tensor, Seen]:
    """The main output of a model with changes in its middle block, and what the formula saw there."""
    with attention_written_out(model, **changes) as seen:
        return main_output(model(**inputs)), seen


def offsets_of(inputs: Mapping[str, Tensor]) -> list[int]:
    """How many positions of padding are before each example."""
    return [int(row.argmax()) for row in inputs["attention_mask"]]


def put(
    offsets: list[int],
    change: Callable[[float | Tensor], Any],
    heads: Any = range(4),
    queries: Any = None,
    keys: Any = None,
    chosen: Callable[[int, int], bool] = lambda query, key: True,
) -> Change:
    """A change of single entries, one by one; queries and keys count real tokens, None means all."""

    def changed(matrix: Tensor) -> Tensor:
        rows = list(matrix.flatten().unbind())
        batch, count, length, width = matrix.shape
        for example in range(batch):
            offset = offsets[example]
            for head in range(count):
                for query in range(length):
                    for key in range(width):
                        if (
                            head in heads
                            and (queries is None or query - offset in queries)
                            and (keys is None or key - offset in keys)
                            and chosen(query, key)
                        ):
                            at = ((example * count + head) * length + query) * width + key
                            rows[at] = torch.as_tensor(change(rows[at]), dtype=matrix.dtype)
        return torch.stack(rows).view(matrix.shape)

    return changed
