"""How wide the stacks of a model are, and how wide those of its twin become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from intervenable.map_config_fields import (
    HEADS,
    LATENT_WIDTHS,
    field_of,
    first_number,
    is_number,
    layer_overrides,
    parts_of,
)
from intervenable.map_twin_shape import TwinShape
from model_maps.sizes import HEAD_DIM, HIDDEN


@dataclass(frozen=True)
class Geometry:
    """How wide the stack of one config and its heads are."""

    hidden: int
    heads: int
    width: int
    """Columns of a head; 0 if nothing says."""

    divisible: int
    """What all widths of heads are multiples of."""

    stated: bool
    """Whether that is not just the hidden size shared among the heads."""


def geometry_of(config: Any) -> Geometry | None:
    hidden, heads = first_number(config, HIDDEN), first_number(config, HEADS)
    if not hidden:
        return None
    if not heads:
        return Geometry(hidden, 1, 0, 0, True)
    latent = [width for name in LATENT_WIDTHS if is_number(width := field_of(config, name)) and width]
    latent += [
        fields[name]
        for fields in layer_overrides(config).values()
        for name in LATENT_WIDTHS
        if name in fields
    ]
    width = first_number(config, HEAD_DIM)
    if latent:
        return Geometry(hidden, heads, max(latent), gcd(*latent), True)
    if (width is not None and width * heads != hidden) or hidden % heads:
        return Geometry(hidden, heads, width or 0, width or 0, True)
    return Geometry(hidden, heads, hidden // heads, hidden // heads, False)


def hidden_sizes(config: Any, shape: TwinShape) -> dict[int, int]:
    """Hidden size of the model -> hidden size of its twin, for all parts of a config."""
    by_size: dict[int, list[Geometry]] = {}
    for part in parts_of(config):
        found = geometry_of(part)
        if found is not None:
            by_size.setdefault(found.hidden, []).append(found)
    sizes = {}
    for hidden, parts in by_size.items():
        followers = [part.width for part in parts if not part.stated]
        if followers:
            heads = max(part.heads for part in parts if not part.stated)
            sizes[hidden] = hidden // shrink_factor(followers, heads, shape)
        else:
            heads = max(part.heads for part in parts) if shape.heads_divide else 1
            sizes[hidden] = min(hidden, heads * 2 * max(1, -(-16 // heads)))
    return sizes


_WIDE = 256
"""Columns of all heads together from which on they become narrower still."""


def shrink_factor(widths: Sequence[int], heads: int, shape: TwinShape) -> int:
    """By how much heads of these widths can be narrowed: a whole number that leaves all of them even."""
    narrow = shape.narrow if heads * shape.narrow <= _WIDE else shape.narrow // 2
    common = gcd(*widths)
    factors = [f for f in range(1, common + 1) if common % f == 0 and (common // f) % 2 == 0]
    return max((factor for factor in factors if common // factor >= narrow), default=1)
