"""Means of activations: over groups of positions, over examples, over tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from intervenable.cache_joining import Name, names_of
from intervenable.cache_layout import (
    BATCH,
    FILLER,
    GROUP,
    KEY,
    POSITION,
    QUERY,
    TOKEN_AXES,
    Layout,
    TokenAxis,
)
from intervenable.errors import CacheError


def wide(tensor: Tensor) -> Tensor:
    """The same numbers with room for sums: float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def means_of_groups(key: Name, value: Any, layout: Layout) -> tuple[Tensor, Layout]:
    """The mean over each group of positions: the axis `position` becomes `group`.

    Raises:
        CacheError: there are no groups, or rows and columns instead of positions.
    """
    name, tokens = names_of([key]), layout.tokens.get(POSITION)
    if QUERY in layout.axes or KEY in layout.axes:
        raise CacheError(
            f"{name} is a matrix of queries by keys: its groups are averaged by iv.pattern_blocks."
        )
    if isinstance(value, tuple):
        raise CacheError(f"{name} is kept apart by examples, which group_means() cannot average.")
    if POSITION not in layout.axes:
        return value, layout
    if not value.is_floating_point():
        raise CacheError(f"{name} is {value.dtype} and has no mean. Leave it out: cache.only([...]).")
    if tokens is None or tokens.groups is None:
        raise CacheError(f"{name} has no groups of positions: name them when collecting, positions=[...].")
    members = torch.nn.functional.one_hot(tokens.groups.clamp(min=0), len(tokens.labels))
    members = (members * (tokens.groups != FILLER)[..., None]).to(value.device)  # [b, n, groups]
    counts = members.sum(1)  # [b, groups]
    if not bool((counts > 0).all()):
        example, group = (counts == 0).nonzero()[0].tolist()
        raise CacheError(
            f"{name} has no position of the group {tokens.labels[group]!r} in example {example}."
        )
    at = layout.axes.index(POSITION)
    rows = wide(value).movedim(at, 1)
    shape = (*counts.shape, *[1] * (rows.dim() - 2))
    weights = members.to(rows.dtype)
    means = torch.einsum("bn...,bng->bg...", rows, weights) / counts.view(shape)
    axes = tuple(GROUP if axis == POSITION else axis for axis in layout.axes)
    others = {axis: kept for axis, kept in layout.tokens.items() if axis != POSITION}
    return means.movedim(1, at), replace(layout, axes=axes, tokens={**others, GROUP: tokens})


class RunningMean:
    """The mean over examples, or over all their tokens, of activations that come batch by batch.

    With each batch `mean <- mean + sum over the batch of (value - mean) / n`, where `n` counts all so far. The mean
    is float32 at least.

    Args:
        over: `"examples"`: each entry by itself, which asks for equally many units in all examples. `"tokens"`: over
            all real tokens of all examples.

    Example:
        >>> mean = RunningMean()
        >>> for value in (0.0, 1.0, 2.0):
        ...     mean.add(("block_output", 0), torch.full((1, 3, 2), value), Layout(("batch", "position", "hidden")))
        >>> mean.values["block_output", 0].unique().item()
        1.0
    """

    def __init__(self, over: Literal["examples", "tokens"] = "examples") -> None:
        if over not in ("examples", "tokens"):
            raise CacheError(f"average={over!r} is unknown. Allowed: 'examples', 'tokens'.")
        self.over = over
        self.values: dict[Name, Tensor] = {}
        self.layouts: dict[Name, Layout] = {}
        self.counts: dict[Name, int] = {}

    def add(self, key: Name, value: Any, layout: Layout) -> None:
        """Take one batch in.

        Raises:
            CacheError: it has no mean with the others.
        """
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = value.dtype if isinstance(value, Tensor) else "kept apart by examples"
            raise CacheError(
                f"{names_of([key])} is {kind} and has no mean. Leave it out of what is averaged."
            )
        if layout.axes[:1] != (BATCH,):
            raise CacheError(f"{names_of([key])} has no batch axis to average over: {layout.axes}.")
        rows, rest = (
            self._of_tokens(key, wide(value), layout)
            if self.over == "tokens"
            else (self._of_examples(key, wide(value), layout))
        )
        if key not in self.values:
            self.values[key], self.layouts[key], self.counts[key] = rows.mean(0), rest, len(rows)
            return
        before = self.layouts[key]
        if self.values[key].shape != rows.shape[1:] or not before.same_as(
            replace(rest, tokens=before.tokens)
        ):
            raise CacheError(
                f"{names_of([key])} has the shape {tuple(rows.shape[1:])} {rest.axes} in one batch and"
                f" {tuple(self.values[key].shape)} {before.axes} in another, and no mean over both. Choose positions"
                " that all examples have, take group_means, or average='tokens'."
            )
        self.layouts[key] = replace(before, tokens=_same_tokens(before, rest))
        self.counts[key] += len(rows)
        mean = self.values[key]
        self.values[key] = mean + (rows - mean).sum(0) / self.counts[key]

    def _of_examples(self, key: Name, value: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        if any(tokens.filled for name, tokens in layout.tokens.items() if name in TOKEN_AXES):
            raise CacheError(
                f"{names_of([key])} has other numbers of tokens in different examples, and no mean over them entry by"
                " entry. Choose positions that all examples have, take group_means, or average='tokens'."
            )
        first = {name: tokens.mapped(lambda kept: kept[0]) for name, tokens in layout.tokens.items()}
        same = {
            name: tokens
            for name, tokens in first.items()
            if name == GROUP or bool((layout.tokens[name].positions == tokens.positions).all())
        }
        return value, Layout(layout.axes[1:], same, layout.heads)

    def _of_tokens(self, key: Name, value: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        at = layout.axis(POSITION)
        if at is None:
            raise CacheError(
                f"{names_of([key])} has no position axis, {layout.axes}: average='tokens' is for what has one."
            )
        rows = value.movedim(at, 1)
        tokens = layout.tokens.get(POSITION)
        picked = rows.flatten(0, 1) if tokens is None else rows[tokens.real.to(rows.device)]
        return picked, Layout(tuple(a for a in layout.axes if a not in (BATCH, POSITION)), {}, layout.heads)


def _same_tokens(one: Layout, other: Layout) -> dict[str, TokenAxis]:
    """The tokens that two layouts without batch agree on."""
    return {
        name: tokens
        for name, tokens in one.tokens.items()
        if name in other.tokens
        and (name == GROUP or torch.equal(tokens.positions, other.tokens[name].positions))
    }
