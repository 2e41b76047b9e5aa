"""How scores that are computed in bands lie in a matrix of queries by keys, told by gradients.

An entry of such a matrix is made of one query and one key. So of some entries the gradients are taken: where they
arrive is the query that the entry's row stands for, and the key that its column stands for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from intervenable.attention_bands import BandedMatrix
from intervenable.map_attention_banded import Banded
from intervenable.map_attention_projections import Role
from intervenable.map_attention_view import BlockView, layout
from intervenable.masked_scores import floor_of
from model_maps import BandAxis, Bands, HeadColumns

SAMPLES = 8
"""Entries whose gradients are taken: the laws look at all."""

SEED = 3


def bands_of(view: BlockView, banded: Banded) -> Bands | None:
    """How the softmax of an attention in bands lies; None if its columns are not of the keys around each query.

    Args:
        view: The block.
        banded: What is known of its attention.
    """
    attention = banded.attention
    met = next((met for met in view.block.met_inside() if met.at == attention.at), None)
    if met is None or not met.given:
        return None
    scores = met.given[0]
    sizes = (attention.rows, attention.heads, attention.queries)
    for bands in _candidates(scores.shape, sizes):
        if _is_so(view, banded, scores, bands):
            return bands
    return None


def _candidates(shape: torch.Size, sizes: tuple[int, int, int]) -> Iterator[Bands]:
    """What the axes of a softmax over so many examples, heads and positions may count."""
    names: tuple[BandAxis, ...] = ("examples", "heads", "queries")
    if len(shape) == 5:
        names = (*names, "blocks")
    if len(shape) != len(names) + 1:
        return
    for order in permutations(names):
        axes: tuple[BandAxis, ...] = (*order, "keys")
        if not BandedMatrix.fits(shape, Bands(axes), *sizes):
            continue
        if "blocks" not in axes:
            yield Bands(axes)
            continue
        block = shape[axes.index("queries")]
        for blocks in range(1, shape[-1] // block + 1, 2):
            yield Bands(axes, blocks)
            if blocks * block < shape[-1]:
                yield Bands(axes, blocks, ahead=True)


def _is_so(view: BlockView, banded: Banded, scores: Tensor, bands: Bands) -> bool:
    """Whether some entries are made of the query and the key that they would stand for, and of nothing else."""
    attention = banded.attention
    matrix = BandedMatrix(scores.shape, bands, attention.queries, scores.device)
    if matrix.fault(scores):
        return False
    rows = matrix.rows(scores)
    told = rows.detach() > floor_of(scores.dtype)
    told[..., : matrix.first] = told[..., matrix.first + matrix.columns :] = False
    makers = [_Maker.of(view, banded, role) for role in ("query", "key")]
    known = [maker for maker in makers if maker is not None]
    generator = torch.Generator().manual_seed(SEED)
    for _ in range(SAMPLES):
        example, head = (
            int(torch.randint(count, (), generator=generator)) for count in (attention.rows, attention.heads)
        )
        seen = told[example, head].nonzero()
        if not len(seen):
            return False
        query, column = map(int, seen[int(torch.randint(len(seen), (), generator=generator))])
        gradients = view.probe.gradients(rows[example, head, query, column], [one.tensor for one in known])
        positions = (query, matrix.key_at(query, column))
        places = [(example, position, head / attention.heads) for position in positions]
        if len(known) < 2 or not all(
            gradient is not None and maker.reaches(gradient, *place)
            for maker, gradient, place in zip(known, gradients, places, strict=True)
        ):
            return False
    return True


@dataclass(frozen=True, eq=False)
class _Maker:
    """What makes the queries, or the keys, and the tensor at which gradients stop there."""

    tensor: Tensor
    columns: HeadColumns
    axes: Mapping[str, object]
    examples: int

    @classmethod
    def of(cls, view: BlockView, banded: Banded, role: Role) -> _Maker | None:
        """That of a block; None if it has no axes of examples and positions."""
        made, attention = banded.projections[role], banded.attention
        leaf = next((leaf for leaf in view.probe.leaves.values() if leaf.call is made.call), None)
        axes = None if leaf is None else layout(leaf.tensor, attention.rows, attention.queries)
        return None if leaf is None or axes is None else cls(leaf.tensor, made.columns, axes, attention.rows)

    def reaches(self, gradient: Tensor, example: int, position: int, share: float) -> bool:
        """Whether a gradient arrives at one position of one example alone, and there in one head's columns.

        Args:
            gradient: The gradient.
            example: The example.
            position: The position.
            share: The part of all heads that come before the head of queries.
        """
        reached = _in_order(gradient, self.axes, self.examples) != 0
        first = self.columns.first_column(int(share * self.columns.heads))
        there = reached[example, position, first : first + self.columns.width]
        return bool(there.any()) and int(reached.sum()) == int(there.sum())


def _in_order(tensor: Tensor, place: Mapping[str, object], rows: int) -> Tensor:
    """`[b, positions, columns]` of what a linear map returns."""
    if place.get("flat"):
        return tensor.reshape(rows, -1, tensor.shape[-1])
    axes = place.get("axes", (0, 1))
    assert isinstance(axes, tuple)  # `layout` gives no other
    return tensor.movedim(axes, (0, 1)).flatten(2)
