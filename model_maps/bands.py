"""How attention lies that computes no matrix of scores, but a band of keys around each query."""

from __future__ import annotations

import dataclasses
from typing import Literal

BandAxis = Literal["examples", "heads", "blocks", "queries", "keys"]


@dataclasses.dataclass(frozen=True, slots=True)
class Bands:
    """How the softmax of an attention lies that has columns for the keys around each query alone, and no matrix.

    Its columns are of keys side by side, as many before the query, or its block of queries, as behind.

    Example:
        >>> Bands(("examples", "blocks", "heads", "queries", "keys"), blocks=3).order
        ('examples', 'heads', 'blocks', 'queries', 'keys')
    """

    axes: tuple[BandAxis, ...]
    """What each axis counts. With "blocks", "queries" counts those in one block; "keys" is the last."""

    blocks: int = 0
    """How many blocks of keys a block of queries has columns for, itself in the middle; other columns are of what is
    no position. 0: each query has columns of its own, and all of them are of keys."""

    ahead: bool = False
    """Whether columns of what is no position come before those of keys, and not behind."""

    @property
    def order(self) -> tuple[BandAxis, ...]:
        """The axes as they come in a matrix by heads."""
        inside: tuple[BandAxis, ...] = ("blocks",) if "blocks" in self.axes else ()
        return ("examples", "heads", *inside, "queries", "keys")
