"""What the axes of collected activations are: their names, the tokens they run over, the heads they hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from intervenable.errors import CacheError
from model_maps import COMPONENTS

BATCH, GROUP, HEAD, POSITION, QUERY, KEY = "batch", "group", "head", "position", "query", "key"
TOKEN_AXES = (POSITION, QUERY, KEY)
"""Axes that run over the tokens of an example."""
FILLER = -1
"""The position of an entry that is no token of its example: padding, or what fills a shorter example up."""


@dataclass(frozen=True, eq=False)
class TokenAxis:
    """Which tokens an axis runs over, for each example."""

    positions: Tensor
    """`[batch, n]`: the position of each entry among the real tokens of its example; -1 where it is none of them."""

    groups: Tensor | None = None
    """`[batch, n]`: the group each entry belongs to, as an index into `labels`; None if none were asked for."""

    labels: tuple[str, ...] = ()
    """What each group was asked for as."""

    @property
    def filled(self) -> bool:
        """Whether some entries are no tokens."""
        return bool((self.positions == FILLER).any())

    @property
    def real(self) -> Tensor:
        """True at the entries that are tokens."""
        return self.positions != FILLER

    def tensors(self) -> list[Tensor]:
        """All that is kept for each example."""
        return [self.positions] if self.groups is None else [self.positions, self.groups]

    def mapped(self, function: Callable[[Tensor], Tensor]) -> TokenAxis:
        """The same with a function applied to what is kept for each example."""
        groups = None if self.groups is None else function(self.groups)
        return replace(self, positions=function(self.positions), groups=groups)


@dataclass(frozen=True, eq=False)
class Layout:
    """What each axis of an activation is."""

    axes: tuple[str, ...]
    """Names of the axes, such as `("batch", "position", "hidden")`."""

    tokens: Mapping[str, TokenAxis] = field(default_factory=dict)
    """For each axis over tokens (or over groups of them) which these are."""

    heads: tuple[int, ...] | None = None
    """Which heads the head axis holds; None for all of them."""

    def axis(self, name: str) -> int | None:
        """Where an axis is; None if there is none of that name."""
        return self.axes.index(name) if name in self.axes else None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Layout:
        """The same with a function applied to all that is kept for each example."""
        return replace(self, tokens={name: axis.mapped(function) for name, axis in self.tokens.items()})

    def without_batch(self) -> Layout:
        """The layout of one example by itself."""
        return replace(self.mapped(lambda kept: kept[0]), axes=self.axes[1:])

    def same_as(self, other: Layout) -> bool:
        """Whether the axes are the same, whatever tokens of whatever examples they run over."""
        return (
            self.axes == other.axes
            and self.heads == other.heads
            and self.tokens.keys() == other.tokens.keys()
            and (GROUP not in self.tokens or self.tokens[GROUP].labels == other.tokens[GROUP].labels)
        )


_WIDTHS = {
    "[b, s, M]": "neuron",
    "[b, s, V]": "vocabulary",
    "[b, s, E]": "expert",
    "[b, s, n]": "choice",
    "[b, s, 1]": "one",
}


def axes_of(component: str, dimensions: int) -> tuple[str, ...]:
    """Names for the axes of a component's tensor, by what is known of it.

    Args:
        component: A component's name, or anything else (a module path).
        dimensions: How many axes the tensor has.
    """
    name = component.removesuffix(".gradient")
    known = COMPONENTS.get("attention_pattern" if name == "value_weighted_pattern" else name)
    axes: tuple[str, ...] = (BATCH, POSITION, "hidden")
    if known is not None and known.axes == "state":
        axes = ()
    elif name == "input_ids":
        axes = (BATCH, POSITION)
    elif known is not None and known.axes == "matrix":
        axes = (BATCH, HEAD, QUERY, KEY)
    elif known is not None and known.axes == "heads":
        axes = (BATCH, HEAD, POSITION, "hidden" if known.shape.endswith("D]") else "head_dim")
    elif known is not None and known.shape in _WIDTHS:
        axes = (BATCH, POSITION, _WIDTHS[known.shape])
    elif known is not None and known.shape.endswith("dh]"):
        axes = (BATCH, POSITION, "heads_joined")
    if len(axes) == dimensions:
        return axes
    return (BATCH, *(f"axis_{axis}" for axis in range(1, dimensions)))[:dimensions]


def check_axes(key: object, value: Tensor, layout: Layout) -> None:
    """That a layout fits its tensor.

    Raises:
        CacheError: it does not.
    """
    if len(layout.axes) != value.dim() or len(set(layout.axes)) != len(layout.axes):
        raise CacheError(
            f"The axes of {key} are {layout.axes}, and its tensor has shape {tuple(value.shape)}."
            " Give each axis one name."
        )


# --- joining ----------------------------------------------------------------------------------------------


def padded(tensor: Tensor, sizes: Sequence[int], filler: float = 0) -> Tensor:
    """A tensor filled up at the end of each axis to these sizes."""
    missing = [want - have for want, have in zip(sizes, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    pairs = [pad for amount in reversed(missing) for pad in (0, amount)]
    return torch.nn.functional.pad(tensor, pairs, value=filler)


def joined_tokens(axes: Sequence[TokenAxis]) -> TokenAxis:
    """The tokens of several batches, shorter ones filled up; their groups, if they were asked for as the same."""
    longest = max(axis.positions.shape[-1] for axis in axes)

    def join(tensors: Sequence[Any]) -> Tensor:
        return torch.cat([padded(tensor, (len(tensor), longest), FILLER) for tensor in tensors])

    positions = join([axis.positions for axis in axes])
    if any(axis.groups is None or axis.labels != axes[0].labels for axis in axes):
        return TokenAxis(positions)
    return TokenAxis(positions, join([axis.groups for axis in axes]), axes[0].labels)


def joined_layouts(layouts: Sequence[Layout]) -> Layout:
    """The layout of several batches one after the other."""
    names = layouts[0].tokens
    return replace(
        layouts[0],
        tokens={name: joined_tokens([layout.tokens[name] for layout in layouts]) for name in names},
    )
