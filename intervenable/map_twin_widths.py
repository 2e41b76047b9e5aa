"""How wide the stacks of a model are, and how wide those of its twin become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from intervenable.map_config_fields import (
    HEADS,
    LATENT_WIDTHS,
    WIDTHS_OF_STAGES,
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
    hidden, heads = first_number(config, HIDDEN), first_number(config, HEADS) or _of_last_stage(config)
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


def _of_last_stage(config: Any) -> int | None:
    """The heads of the last of several stages, whose width is the hidden size."""
    lists = (field_of(config, name) for name in HEADS)
    return next((heads[-1] for heads in lists if isinstance(heads, (list, tuple)) and heads), None)


def hidden_sizes(config: Any, shape: TwinShape) -> dict[int, int]:
    """Hidden size of the model -> hidden size of its twin, for all parts of a config."""
    by_size: dict[int, list[Geometry]] = {}
    for part in parts_of(config):
        found = geometry_of(part)
        if found is not None:
            by_size.setdefault(found.hidden, []).append(found)
    of_stages = {width for part in parts_of(config) for width in _first_stages(part, shape)}
    sizes = {}
    for hidden, parts in by_size.items():
        if hidden in of_stages:
            sizes[hidden] = hidden // shape.stages
            continue
        followers = [part.width for part in parts if not part.stated]
        if followers:
            heads = max(part.heads for part in parts if not part.stated)
            sizes[hidden] = hidden // shrink_factor(followers, heads, shape)
        else:
            # Heads whose width nothing states, and does not divide the hidden size, have a share of it all the same.
            shared = max((part.heads for part in parts if not part.width), default=1)
            heads = max(part.heads for part in parts) if shape.heads_divide else 1
            sizes[hidden] = min(hidden, max(heads * 2 * max(1, -(-16 // heads)), shared * 4))
    return sizes


def _first_stages(config: Any, shape: TwinShape) -> set[int]:
    """The hidden size of a tower of stages that states it as the width of its first, too."""
    hidden = first_number(config, HIDDEN)
    lists = (value for name, value in vars(config).items() if name.endswith(WIDTHS_OF_STAGES))
    stated = any(isinstance(value, (list, tuple)) and hidden in value[:1] for value in lists)
    return {hidden} if hidden and stated and hidden % shape.stages == 0 else set()


_WIDE = 256
"""Columns of all heads together from which on they become narrower still."""


def shrink_factor(widths: Sequence[int], heads: int, shape: TwinShape) -> int:
    """By how much heads of these widths can be narrowed: a whole number that leaves all of them even."""
    narrow = shape.narrow if heads * shape.narrow <= _WIDE else shape.narrow // 2
    common = gcd(*widths)
    factors = [factor for factor in range(1, common + 1) if common % factor == 0 and (common // factor) % 2 == 0]
    found = 1
    for least in (narrow, narrow // 2):
        found = max((factor for factor in factors if min(widths) // factor >= least), default=1)
        if found > 1 or heads * max(widths) <= shape.most_columns:
            break
    return found
