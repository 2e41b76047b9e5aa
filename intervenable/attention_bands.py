"""Attention that computes scores for the keys around each query alone, shown and changed as a matrix.

Each query, or each block of queries, has columns for the keys around it. In the matrix these entries lie where their
keys are; all others are of keys that the query does not see, like those under a mask.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from intervenable.errors import EditError, UnsupportedModelError
from intervenable.masked_scores import floor_of
from intervenable.passage import InsidePassage
from model_maps import Bands, Side


class BandedMatrix:
    """Where the entries of one softmax over bands lie in the matrix of queries by keys.

    Args:
        shape: The shape of what goes into the softmax.
        bands: What its axes count.
        positions: How many queries there are, and keys.
        device: Where indices should be.
    """

    def __init__(
        self, shape: torch.Size, bands: Bands, positions: int, device: torch.device | None = None
    ) -> None:
        named = dict(zip(bands.axes, shape, strict=True))
        self._order = [bands.axes.index(name) for name in bands.order]
        self._shape = shape
        self._positions = positions
        block = named["queries"] if "blocks" in named else 1
        self.columns = bands.blocks * block if bands.blocks else named["keys"]
        """Columns that stand for positions; others stand for something else, and take weight."""

        self.first = max(0, named["keys"] - self.columns) if bands.ahead else 0
        """The first of them."""

        before = (self.columns - block) // 2
        queries = torch.arange(positions, device=device)[:, None]
        columns = torch.arange(min(self.columns, named["keys"]), device=device)
        keys = queries // block * block - before + columns
        self._there = (keys >= 0) & (keys < positions)
        self._rows, columns = self._there.nonzero(as_tuple=True)
        self._columns = columns + self.first
        self._keys = keys[self._there]

    @staticmethod
    def fits(shape: torch.Size, bands: Bands, batch: int, heads: int, positions: int) -> bool:
        """Whether a softmax over so many examples, heads and positions can have this shape."""
        if len(shape) != len(bands.axes):
            return False
        named = dict(zip(bands.axes, shape, strict=True))
        blocks = named.get("blocks", 1)
        rows = blocks * named["queries"]
        return (named["examples"], named["heads"]) == (batch, heads) and (
            rows - named["queries"] < positions <= rows if "blocks" in named else rows == positions
        )

    @property
    def whole(self) -> bool:
        """Whether the columns that it needs are there, as many on either side."""
        block = self._shape[self._order[-2]] if len(self._order) == 5 else 1
        return self.columns <= self._shape[-1] and (self.columns - block) % 2 == 0

    @property
    def beside(self) -> int:
        """How many columns stand for no position."""
        return self._shape[-1] - self.columns

    def key_at(self, query: int, column: int) -> int:
        """The key that a column of a query's band stands for."""
        return int(self._keys[(self._rows == query) & (self._columns == column)])

    def rows(self, tensor: Tensor) -> Tensor:
        """The bands of each query, `[b, heads, positions, columns]`."""
        by_heads = tensor.permute(self._order)
        if len(self._order) == 5:
            by_heads = by_heads.flatten(2, 3)
        return by_heads[:, :, : self._positions]

    def matrix(self, tensor: Tensor, elsewhere: float) -> Tensor:
        """The matrix `[b, heads, queries, keys]` of what is in the bands.

        Args:
            tensor: What goes into the softmax, or what comes out.
            elsewhere: What entries have that are in no band.
        """
        bands = self.rows(tensor)
        result = bands.new_full((*bands.shape[:2], self._positions, self._positions), elsewhere)
        result[:, :, self._rows, self._keys] = bands[:, :, self._rows, self._columns]
        return result

    def put(self, tensor: Tensor, matrix: Tensor) -> Tensor:
        """The tensor with the bands of a matrix in it; the matrix's other entries are not looked at."""
        by_heads = tensor.permute(self._order)
        sizes = by_heads.shape
        result = by_heads.flatten(2, 3).clone() if len(sizes) == 5 else by_heads.clone()
        result[:, :, self._rows, self._columns] = matrix[:, :, self._rows, self._keys].to(result.dtype)
        back = [self._order.index(axis) for axis in range(len(sizes))]
        return result.reshape(sizes).permute(back).contiguous()

    def fault(self, scores: Tensor) -> str:
        """Why these scores are not of the keys around each query alone; "" if they are.

        Columns that would stand for keys before the first position or behind the last one are masked then.
        """
        floor = floor_of(scores.dtype)
        if self.whole:
            nothing = torch.zeros(self._positions, scores.shape[-1], dtype=torch.bool, device=scores.device)
            nothing[:, self.first : self.first + self.columns] = ~self._there
            if not bool((self.rows(scores.detach()) > floor)[:, :, nothing].any()):
                return ""
        return (
            f"Scores of the shape {tuple(scores.shape)} are not of the keys around each query alone: some positions"
            " are attended to from everywhere in this run (a global attention mask). Run it without, or take"
            " 'head_query_output', 'head_key_output', 'head_value_output' and 'head_attention_value_output', which"
            " are of the attention to the positions around."
        )

    def check_elsewhere(self, new: Tensor, least: float) -> None:
        """That nothing was written where there is no band.

        Args:
            new: The matrix as it is after an edit.
            least: The largest value that counts as nothing.

        Raises:
            EditError: something was.
        """
        near = torch.zeros(self._positions, self._positions, dtype=torch.bool, device=new.device)
        near[self._rows, self._keys] = True
        lost = (new.detach() > least) & ~near
        if bool(lost.any()):
            example, head, query, key = (int(i) for i in lost.nonzero()[0])
            seen = self._keys[self._rows == query]
            raise EditError(
                f"The edit gives query {query} of head {head} in example {example} weight on key {key}, which it"
                " cannot read: queries of this model read the keys around them alone, this one keys"
                f" {int(seen.min())} to {int(seen.max())}. Locate keys within those."
            )


class BandedPassage(InsidePassage):
    """A matrix put together from bands, and what our edits make of it.

    Args:
        module: The attention module.
        tensor: The matrix.
        repeated: Whether the same hook was called before in this call of the module.
        banded: Where its entries lie.
        least: The largest value that counts as nothing.
        fault: Why there is no such matrix in this run; then nothing can be read.
    """

    def __init__(
        self,
        module: nn.Module,
        tensor: Tensor,
        repeated: bool,
        banded: BandedMatrix,
        least: float,
        fault: str = "",
    ) -> None:
        super().__init__(module, tensor, repeated)
        self._banded, self._least, self._fault = banded, least, fault

    def take(self, side: Side, slot: str | int | None) -> Tensor:
        """The matrix.

        Raises:
            UnsupportedModelError: there is none in this run.
        """
        if self._fault:
            raise UnsupportedModelError(self._fault)
        return super().take(side, slot)

    def put(self, side: Side, slot: str | int | None, value: Tensor) -> None:
        """Let the module go on with another matrix.

        Raises:
            EditError: it has something where there is no band.
        """
        self._banded.check_elsewhere(value, self._least)
        super().put(side, slot, value)
