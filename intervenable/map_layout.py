"""Which axes of the tensors of a stack count examples and positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from intervenable.map_blocks import BlockStack
from model_maps import Site


@dataclass(frozen=True)
class Layout:
    """How many examples and positions the stream of a stack has.

    Example:
        >>> import torch
        >>> layout = Layout(examples=2, positions=7)
        >>> layout.placed(Site("norm"), torch.zeros(14, 32)).flat
        True
        >>> layout.placed(Site("norm"), torch.zeros(7, 2, 32)).axes
        (1, 0)
        >>> layout.placed(Site("norm"), torch.zeros(2, 32, 7)).axes
        (0, 2)
    """

    examples: int
    positions: int

    def placed(self, site: Site, tensor: Tensor) -> Site:
        """A site that says where its tensor has its examples and positions, if not on its first two axes."""
        shape, wanted = tuple(tensor.shape), (self.examples, self.positions)
        if len(shape) == 2:
            return replace(site, flat=True)
        if shape[:2] == wanted:
            return site if len(shape) == 3 else replace(site, axes=(0, 1))
        if shape[:2] == wanted[::-1]:
            return replace(site, axes=(1, 0))
        for first in range(1, len(shape) - 2):
            if shape[first : first + 2] == wanted:
                return replace(site, axes=(first, first + 1))
        return replace(site, axes=(0, 2)) if self._has_columns_before(shape) else site

    def _has_columns_before(self, shape: Sequence[int]) -> bool:
        """Whether a vector's columns come before the positions."""
        return len(shape) == 3 and (shape[0], shape[2]) == (self.examples, self.positions)

    def vectors(self, tensor: Tensor) -> Tensor:
        """A tensor with the vectors of all positions on its last axis; others than such are as they are."""
        shape = tuple(tensor.shape)
        first = shape[:2] in ((self.examples, self.positions), (self.positions, self.examples))
        return tensor.mT if self._has_columns_before(shape) and not first else tensor


def layout_of(stack: BlockStack, inputs: Mapping[str, Any]) -> Layout:
    """The layout of a stack's stream: as many examples and positions as the inputs have, if it has them on two axes.

    Args:
        stack: The stack.
        inputs: What the model is given.
    """
    shape = tuple(stack.first.entering.shape)
    names = ("decoder_input_ids",) if stack.role == "decoder" else ("input_ids",)
    for name in names:
        tokens = inputs.get(name)
        if isinstance(tokens, Tensor) and tokens.dim() == 2:
            examples, positions = tokens.shape
            pairs = [shape[axis : axis + 2] for axis in range(len(shape) - 2)]
            if (examples, positions) in pairs or (positions, examples) in pairs:
                return Layout(examples, positions)
            if len(shape) == 3 and (shape[0], shape[2]) == (examples, positions):
                return Layout(examples, positions)
    return Layout(shape[0], shape[1])
