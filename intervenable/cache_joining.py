"""Activations of several batches as those of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor

from intervenable.cache_layout import (
    BATCH,
    GROUP,
    TOKEN_AXES,
    Layout,
    TokenAxis,
    joined_layouts,
    padded,
)
from intervenable.errors import CacheError

Name = tuple[str, int | None]
Kept = Tensor | tuple[Tensor, ...]
Aggregation = Literal["cat", "first", "last", "sum"] | Callable[[Tensor, Tensor], Tensor]
"""How the activations of two batches become one: by a known name, or by a function of the old and the new."""
AGGREGATIONS = ("cat", "first", "last", "sum")


def join(
    parts: Sequence[Mapping[Name, Kept]],
    layouts: Sequence[Mapping[Name, Layout]],
    ragged: str,
    aggregation: Mapping[str, Aggregation],
) -> tuple[dict[Name, Kept], dict[Name, Layout]]:
    """The activations of several batches, and their layouts, as those of one batch.

    Raises:
        CacheError: they do not belong together.
    """
    if ragged not in ("error", "pad", "list"):
        raise CacheError(f"ragged={ragged!r} is unknown. Allowed: 'error', 'list', 'pad'.")
    _same_keys(parts)
    values: dict[Name, Kept] = {}
    axes: dict[Name, Layout] = {}
    ways = {key: _way(key, aggregation) for key in parts[0]}
    unmatched = [name for name in aggregation if not any(_matches(key, name) for key in parts[0])]
    if unmatched:
        known = ", ".join(sorted({component for component, _ in parts[0]}))
        raise CacheError(
            f"There is an aggregation for {unmatched[0]!r}, which is not there. There is: {known}."
        )
    for key in parts[0]:
        one = [part[key] for part in parts]
        theirs = [layout[key] for layout in layouts]
        way = ways[key]
        if ragged == "list" or any(isinstance(value, tuple) for value in one):
            values[key], axes[key] = _listed(key, one, theirs)
            continue
        tensors = [value for value in one if isinstance(value, Tensor)]
        _alike(key, tensors, theirs)
        if way == "cat":
            values[key], axes[key] = _concatenated(key, tensors, theirs, ragged)
        else:
            values[key], axes[key] = _aggregated(key, tensors, theirs, way)
    return values, axes


def _same_keys(parts: Sequence[Mapping[Name, Kept]]) -> None:
    for part in parts[1:]:
        missing = [key for key in parts[0] if key not in part]
        more = [key for key in part if key not in parts[0]]
        if missing or more:
            sides = []
            if missing:
                sides.append(f"only the left has {names_of(missing)}")
            if more:
                sides.append(f"only the right has {names_of(more)}")
            raise CacheError(
                f"The caches hold different activations: {', and '.join(sides)}."
                " Keep what both have: cache.only([...])."
            )


def names_of(keys: Sequence[Name]) -> str:
    """Activations in words."""
    return ", ".join(
        component if layer is None else f"{component} of layer {layer}" for component, layer in keys
    )


def _alike(key: Name, tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> None:
    name = names_of([key])
    for tensor, layout in zip(tensors, layouts, strict=True):
        if not layout.same_as(layouts[0]):
            raise CacheError(
                f"{name} has the axes {_described(layouts[0])} in one cache and {_described(layout)} in another."
            )
        if tensor.dtype != tensors[0].dtype or tensor.device != tensors[0].device:
            raise CacheError(
                f"{name} is {tensors[0].dtype} on {tensors[0].device} in one cache and {tensor.dtype} on"
                f" {tensor.device} in another. Make them alike first: cache.to(...)."
            )


def _described(layout: Layout) -> str:
    heads = "" if layout.heads is None else f" of heads {list(layout.heads)}"
    labels = f" of groups {list(layout.tokens[GROUP].labels)}" if GROUP in layout.tokens else ""
    return f"{layout.axes}{heads}{labels}"


def _concatenated(
    key: Name, tensors: Sequence[Tensor], layouts: Sequence[Layout], ragged: str
) -> tuple[Tensor, Layout]:
    axes = layouts[0].axes
    if axes[:1] != (BATCH,):
        raise CacheError(f"{names_of([key])} has no batch axis to join on: {axes}.")
    sizes = [max(tensor.shape[axis] for tensor in tensors) for axis in range(len(axes))]
    for axis, name in list(enumerate(axes))[1:]:
        different = sorted({tensor.shape[axis] for tensor in tensors})
        if len(different) > 1 and not (ragged == "pad" and name in TOKEN_AXES):
            hint = ' Allow it: ragged="pad" or ragged="list".' if name in TOKEN_AXES else ""
            raise CacheError(
                f"{names_of([key])} is {' and '.join(map(str, different))} long on the axis {name!r}, and cannot be"
                f" joined.{hint}"
            )
    if all(list(tensor.shape[1:]) == sizes[1:] for tensor in tensors):
        return torch.cat(list(tensors)), joined_layouts(layouts)
    told = [_with_tokens(tensor, layout) for tensor, layout in zip(tensors, layouts, strict=True)]
    return torch.cat([padded(tensor, [len(tensor), *sizes[1:]]) for tensor in tensors]), joined_layouts(told)


def _with_tokens(tensor: Tensor, layout: Layout) -> Layout:
    """A layout that tells filler from tokens, before there is any filler."""
    missing = {
        name: TokenAxis(torch.arange(tensor.shape[axis]).expand(len(tensor), -1))
        for axis, name in enumerate(layout.axes)
        if name in TOKEN_AXES and name not in layout.tokens
    }
    return replace(layout, tokens={**layout.tokens, **missing})


def _way(key: Name, aggregation: Mapping[str, Aggregation]) -> Aggregation:
    way: Aggregation = next((way for name, way in aggregation.items() if _matches(key, name)), "cat")
    if isinstance(way, str) and way not in AGGREGATIONS:
        raise CacheError(
            f"The aggregation of {key[0]!r} is {way!r}. Allowed: {', '.join(map(repr, AGGREGATIONS))}, or a function"
            " of the old and the new tensor."
        )
    return way


def _matches(key: Name, name: str) -> bool:
    return fnmatchcase(key[0], name)


def _aggregated(
    key: Name, tensors: Sequence[Tensor], layouts: Sequence[Layout], way: Aggregation
) -> tuple[Tensor, Layout]:
    if way == "first":
        return tensors[0], layouts[0]
    if way == "last":
        return tensors[-1], layouts[-1]
    total: Any = tensors[0]
    for tensor in tensors[1:]:
        if way == "sum":
            if tensor.shape != total.shape:
                raise CacheError(
                    f"{names_of([key])} has the shapes {tuple(total.shape)} and {tuple(tensor.shape)}: no sum."
                )
            total = total + tensor
        elif callable(way):
            total = way(total, tensor)
    if not isinstance(total, Tensor) or total.dim() != tensors[0].dim():
        what = f"shape {tuple(total.shape)}" if isinstance(total, Tensor) else f"a {type(total).__name__}"
        raise CacheError(
            f"The aggregation of {names_of([key])} returned {what}. Return a tensor with the axes {layouts[0].axes}."
        )
    # Which tokens the sum of several is about cannot be said.
    return total, replace(layouts[0], tokens={})


# --- apart by examples ------------------------------------------------------------------------------------


def _listed(
    key: Name, values: Sequence[Kept], layouts: Sequence[Layout]
) -> tuple[tuple[Tensor, ...], Layout]:
    for layout in layouts:
        if layout.axes[:1] != (BATCH,) or not layout.same_as(layouts[0]):
            raise CacheError(
                f"{names_of([key])} has the axes {_described(layouts[0])} in one cache and {_described(layout)} in"
                " another; examples are kept apart along the same axes, of which the first is the batch."
            )
    rows = [row for value, layout in zip(values, layouts, strict=True) for row in rows_of(value, layout)]
    return tuple(rows), joined_layouts(layouts)


def rows_of(value: Kept, layout: Layout) -> tuple[Tensor, ...]:
    """One tensor for each example, with the tokens of that example alone."""
    if isinstance(value, tuple):
        return value
    rows = []
    for example, row in enumerate(value):
        for name, tokens in layout.tokens.items():
            if name in TOKEN_AXES:
                real = tokens.real[example].nonzero().flatten().to(row.device)
                row = row.index_select(layout.axes.index(name) - 1, real)
        rows.append(row.clone())
    return tuple(rows)
