"""What the cells of a sweep put where, and from which token on each of them changes anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from intervenable.errors import ConfigError, LocationRangeError
from intervenable.sites import BoundSite
from intervenable.sweep_axes import Tokens
from intervenable.sweep_cells import Cell
from intervenable.sweep_grids import Grids
from intervenable.sweep_pairs import Pair
from intervenable.sweep_runs import Unpatched
from intervenable.sweep_sources import Source
from intervenable.sweep_values import CellUnits, Edits, Patches, Place, edits_together, patches_at
from intervenable.units import Level

TOGETHER = 2**18
"""How many numbers of activations are looked at in one go."""


def first_difference(pair: Pair, source: Source, align: Any) -> Tensor | None:
    """`[b]` the first token whose inputs differ between the runs, a tensor index; None where that says nothing.

    In a model that looks back only, whatever lies before it is the same in both.
    """
    base, feed = pair.base.base, source.paired
    if feed is None or align is not None or base.decoder is not None:
        return None
    same = base.input_ids, feed.input_ids
    if same[0] is None or same[1] is None or base.args or base.kwargs.keys() != feed.kwargs.keys():
        return None
    first = [base.length] * base.batch
    for key, item in base.kwargs.items():
        there = feed.kwargs[key]
        if not isinstance(item, Tensor) or not isinstance(there, Tensor):
            if item is not there and item != there:
                return None
            continue
        if item.shape != there.shape:
            return None
        if item.shape[:2] != (base.batch, base.length):
            if not torch.equal(item, there):
                return None
            continue
        differs = (item != there).flatten(2).any(-1) if item.dim() > 2 else item != there
        for example, row in enumerate(differs.tolist()):
            if True in row:
                first[example] = min(first[example], row.index(True))
    return torch.tensor(first)


def edits_of(
    cells: Sequence[Cell],
    grids: Grids,
    base: Unpatched,
    values: Mapping[Place, Sequence[Tensor]],
    start: Tensor | None,
) -> list[Edits]:
    """What all cells put where."""
    by_place: dict[Place, list[tuple[int, Cell]]] = {}
    for number, cell in enumerate(cells):
        for layer in cell.layers:
            by_place.setdefault((cell.grid.component, layer), []).append((number, cell))
    listed: list[Patches] = []
    known: dict[Any, CellUnits] = {}
    for place, here in by_place.items():
        own, put = base.values[place], values[place]
        if len(put) != len(own):
            raise ConfigError(
                f"{grids.sites[place].label} is passed {len(own)} times in one run and {len(put)} in the other."
            )
        for passage, (value, there) in enumerate(zip(put, own, strict=True)):
            whole = _as_long(grids.sites[place], here, grids.whole[place], there)
            listed += patches_at(grids.sites[place], passage, here, whole, value, there, known)
    return [
        edits
        for _, alike in groupby(listed, key=lambda patches: patches.kind)
        for together in _parts(list(alike))
        for edits in edits_together(together, start)
    ]


def _as_long(
    site: BoundSite, cells: Sequence[tuple[int, Cell]], whole: Mapping[Level, Tokens], own: Tensor
) -> Mapping[Level, Tokens]:
    """All tokens of a place, where its tensor has fewer positions than the run has tokens: a classifier's logits."""
    given = whole.get("positions")
    length = own.shape[-2]
    if given is None or int(given.base.max()) < length:
        return whole
    for _, cell in cells:
        named = cell.tokens("positions", given)
        if named is not given and int(named.base.max()) >= length:
            raise LocationRangeError(
                f"{cell.label}: position {int(named.base.max())} is out of range, because {site.label} has"
                f" {length} position(s) where the run has {int(given.base.max()) + 1}. Leave the axis 'pos' out to"
                " patch it as a whole."
            )
    every = torch.arange(length).expand(own.shape[0], -1)
    return {**whole, "positions": Tokens(every, every, torch.ones_like(every, dtype=torch.bool))}


def _parts(alike: Sequence[Patches]) -> Iterator[Sequence[Patches]]:
    """As many places at once as are small together: of small ones to call torch costs more than what it does."""
    size = max(1, TOGETHER // alike[0].own.numel())
    return (alike[i : i + size] for i in range(0, len(alike), size))


def changed_cells(edits: Sequence[Edits]) -> dict[int, int]:
    """For each cell that changes anything the first token that it changes; of what is at other positions than tokens
    have, such as those of an encoder or a tower, any token may be the first.
    """
    first: dict[int, int] = {}
    for one in edits:
        elsewhere = one.site.stack not in (None, "decoder")
        for cell, token in zip(one.cells, one.first, strict=True):
            if token < one.nowhere:
                first[cell] = 0 if elsewhere else min(first.get(cell, token), token)
    return dict(sorted(first.items()))
