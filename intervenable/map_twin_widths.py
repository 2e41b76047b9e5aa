"""How wide the stacks of a model are, and how wide those of its twin become."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    staged: bool = False
    """Whether it is that of the last of several stages, whose heads no rotation turns."""


def geometry_of(config: Any) -> Geometry | None:
    hidden, one_stage = first_number(config, HIDDEN), first_number(config, HEADS)
    heads = one_stage or _of_last_stage(config)
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
    return Geometry(hidden, heads, hidden // heads, hidden // heads, False, staged=not one_stage)


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
    of_stages = {size: small for part in parts_of(config) for size, small in _first_stage(part, shape)}
    sizes = {}
    for hidden, parts in by_size.items():
        if hidden in of_stages:
            sizes[hidden] = of_stages[hidden]
            continue
        followers = [part.width for part in parts if not part.stated]
        even = [part.width for part in parts if part.staged]
        if followers:
            heads = max(part.heads for part in parts if not part.stated)
            sizes[hidden] = hidden // shrink_factor(followers, heads, shape, even)
        else:
            # Heads whose width nothing states, and does not divide the hidden size, have a share of it all the same.
            shared = max((part.heads for part in parts if not part.width), default=1)
            heads = max(part.heads for part in parts) if shape.heads_divide else 1
            sizes[hidden] = min(hidden, max(heads * 2 * max(1, -(-16 // heads)), shared * 4))
    return sizes


def stage_factor(config: Any, shape: TwinShape) -> int:
    """By how much the stages of a tower become narrower: twice as much as usual if all are wide."""
    least = min((min(widths) for widths in _widths_of_stages(config)), default=0)
    return 2 * shape.stages if shape.stages > 1 and least >= _WIDE_STAGE else shape.stages


_WIDE_STAGE = 128


def _widths_of_stages(config: Any) -> list[Sequence[int]]:
    """The lists of a config that have the width of each stage."""
    lists = (value for name, value in vars(config).items() if name.endswith(WIDTHS_OF_STAGES))
    return [
        value for value in lists if isinstance(value, (list, tuple)) and value and all(map(is_number, value))
    ]


def _first_stage(config: Any, shape: TwinShape) -> Iterator[tuple[int, int]]:
    """The hidden size, and that of the twin, of a tower of stages that states it as the width of its first, too."""
    hidden, factor = first_number(config, HIDDEN), stage_factor(config, shape)
    if hidden and hidden % factor == 0 and any(hidden == widths[0] for widths in _widths_of_stages(config)):
        yield hidden, hidden // factor


_WIDE = 256
"""Columns of all heads together from which on they become narrower still."""


def shrink_factor(widths: Sequence[int], heads: int, shape: TwinShape, even: Sequence[int] = ()) -> int:
    """By how much heads of these widths can be narrowed: a whole number that leaves all of them even.

    Four columns turn together where positions have two axes, so those of a multiple of four stay one.

    Args:
        widths: The widths.
        heads: How many there are at most.
        shape: How narrow they may become.
        even: Those of the widths of which it is enough that they stay even; with any, heads become narrower still.
    """
    narrow = shape.narrow if heads * shape.narrow <= _WIDE and not even else shape.narrow // 2
    common = gcd(*widths)
    factors = [
        factor
        for factor in range(1, common + 1)
        if common % factor == 0
        and all(
            (width // factor) % (4 if width % 4 == 0 and width not in even else 2) == 0 for width in widths
        )
    ]
    found = 1
    for least in (narrow, narrow // 2):
        found = max((factor for factor in factors if min(widths) // factor >= least), default=1)
        if found > 1 or heads * max(widths) <= shape.most_columns:
            break
    return found
