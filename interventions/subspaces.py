"""Which coordinates an intervention may touch: partitions, ids, and the masks made of them.

The one home of this question. A **partition** names groups of coordinates once, when an intervention is made;
**ids** choose, call by call, dimensions, or parts where there is a partition. Ids always belong to *examples*
(the first axis); `SubspacePerPosition` gives them to units (the axis before the last) instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeGuard

import torch
from torch import Tensor

from interventions.errors import SubspaceError, SubspaceIndexError

Ids: TypeAlias = tuple[int, ...]
Partition: TypeAlias = tuple[Ids, ...]


class HasToList(Protocol):
    """Whatever turns into nested lists: tensors and numpy arrays."""

    def tolist(self) -> object: ...


class IndexSet:
    """A part of a partition given as the very dimensions it holds, in this order.

    Needed for two dimensions only, because a list of exactly two ints is a half-open range.

    >>> parse_partition([[1, 3], IndexSet([1, 3])], size=4)
    ((1, 2), (1, 3))
    """

    def __init__(self, dimensions: Iterable[int]) -> None:
        self.dimensions = tuple(dimensions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexSet) and self.dimensions == other.dimensions

    def __hash__(self) -> int:
        return hash((IndexSet, self.dimensions))

    def __repr__(self) -> str:
        return f"IndexSet({list(self.dimensions)})"


class SubspacePerPosition:
    """Ids for each unit (the axis before the last) instead of for each example.

    >>> from interventions import ZeroIntervention
    >>> ZeroIntervention()(torch.ones(1, 2, 3), subspaces=SubspacePerPosition([[0], [1, 2]]))
    tensor([[[0., 1., 1.],
             [1., 0., 0.]]])
    """

    def __init__(self, ids: Sequence[Sequence[int] | None] | HasToList) -> None:
        self.ids = ids

    def __repr__(self) -> str:
        return f"SubspacePerPosition({self.ids!r})"


Part: TypeAlias = Sequence[int] | range | slice | IndexSet | Mapping[str, Sequence[int]]
Subspaces: TypeAlias = (
    int | Sequence[int] | Sequence[Sequence[int] | None] | HasToList | SubspacePerPosition | None
)


@dataclass(frozen=True)
class Selection:
    """Checked coordinates: one row for all, or one row for each example or unit.

    A row of None means every coordinate.
    """

    rows: tuple[Ids | None, ...]
    """The coordinates, in the order given."""
    axis: Literal["all", "example", "position"]
    """What the rows run over; `"all"` has exactly one row."""

    def mask(self, size: int, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
        """Return a boolean mask over `size` coordinates that broadcasts against `(*shape[:-1], size)`.

        Shape:
            result: `(size,)`, `(shape[0], 1, ..., size)` by example, `(shape[-2], size)` by position.

        >>> Selection(((0,), (1, 2)), "example").mask(3, (2, 5, 3)).shape
        torch.Size([2, 1, 3])
        """
        self._check_units(shape)
        mask = torch.zeros(len(self.rows), size, dtype=torch.bool)
        for row, ids in enumerate(self.rows):
            mask[row, slice(None) if ids is None else list(ids)] = True
        mask = mask.to(device)
        if self.axis == "all":
            return mask[0]
        if self.axis == "position":
            return mask
        return mask.view(shape[0], *[1] * (len(shape) - 2), size) if len(shape) > 1 else mask[0]

    def gather(self, values: Tensor) -> Tensor:
        """Return a new tensor of the chosen coordinates alone, in the order they were given.

        Raises:
            SubspaceError: Rows of different lengths, which no tensor can hold.

        >>> Selection(((2, 0),), "all").gather(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor([3., 1.])
        """
        self._check_units(values.shape)
        size = values.shape[-1]
        rows = [tuple(range(size)) if ids is None else ids for ids in self.rows]
        lengths = [len(ids) for ids in rows]
        if len(set(lengths)) > 1:
            raise SubspaceError(
                f"Cannot collect different numbers of dimensions per {self.axis}: got {lengths}."
                f" A tensor needs equally many everywhere; collect them in separate calls."
            )
        index = torch.tensor(rows, dtype=torch.long, device=values.device).view(len(rows), lengths[0])
        if self.axis == "all" or values.dim() == 1:
            return values.index_select(-1, index[0])
        if self.axis == "example":
            index = index.view(len(rows), *[1] * (values.dim() - 2), lengths[0])
        return values.gather(-1, index.expand(*values.shape[:-1], lengths[0]))

    def _check_units(self, shape: Sequence[int]) -> None:
        if self.axis == "position" and (len(shape) < 2 or shape[-2] != len(self.rows)):
            raise SubspaceError(
                f"SubspacePerPosition has ids for {len(self.rows)} units, but the activation's shape is"
                f" {tuple(shape)}: its axis before the last must be those units."
            )


def parse_partition(parts: Iterable[Part] | HasToList | None, size: int | None = None) -> Partition | None:
    """Turn what a user writes as a partition into tuples of dimensions.

    A list of exactly two ints `[a, b]` is the half-open range from a to b; other lists hold the dimensions
    themselves; `slice` and `range` mean what they mean in Python; `IndexSet([1, 3])` is a set of two. Parts
    may share dimensions.

    Args:
        parts: The parts; None for no partition.
        size: How many dimensions there are, if that is known yet.

    Raises:
        SubspaceError: An empty or malformed part, or one with a dimension twice.
        SubspaceIndexError: A dimension that is negative or not below `size`.

    Example:
        >>> parse_partition([[0, 2], [5, 3, 4], range(6, 8), slice(2, 4)], size=8)
        ((0, 1), (5, 3, 4), (6, 7), (2, 3))
    """
    if parts is None:
        return None
    listed = _as_lists(parts)
    if isinstance(listed, str) or not isinstance(listed, Iterable):
        raise SubspaceError(f"subspace_partition={parts!r} is no list of parts. Example: [[0, 8], [8, 16]].")
    parsed = tuple(_parse_part(part, size) for part in listed)
    if not parsed:
        raise SubspaceError("subspace_partition=[] has no parts. Leave it out (None) to address dimensions.")
    return parsed


def partition_to_config(partition: Partition | None) -> list[list[int] | dict[str, list[int]]] | None:
    """Write a parsed partition as JSON that `parse_partition` reads back to the same tuples.

    >>> partition_to_config(((0, 1), (1, 3), (5, 3, 4)))
    [[0, 2], {'index_set': [1, 3]}, [5, 3, 4]]
    """
    if partition is None:
        return None
    return [_part_to_config(part) for part in partition]


def _part_to_config(part: Ids) -> list[int] | dict[str, list[int]]:
    if part == tuple(range(part[0], part[0] + len(part))):
        return [part[0], part[-1] + 1]
    return {"index_set": list(part)} if len(part) == 2 else list(part)


def select(
    subspaces: Subspaces, *, size: int | None, partition: Partition | None = None, batch: int | None = None
) -> Selection | None:
    """Check `subspaces` and return the coordinates they choose; None means all of them.

    Args:
        subspaces: None (all), an int or a flat list of ints (the same for every example), one list for each
            example (lengths may differ; None for all), or `SubspacePerPosition`.
        size: How many coordinates there are; None if that is not known yet.
        partition: Parsed parts; if given, ids are indices into it and choose the union of their parts.
        batch: How many examples there are; None if that is not known yet.

    Raises:
        SubspaceIndexError: An id that does not exist.
        SubspaceError: Repeated ids, something that is no id, or a number of rows other than `batch`.

    Example:
        >>> select([1, 3], size=4).rows
        ((1, 3),)
        >>> select([[0], [1]], size=4, partition=((0,), (1, 2, 3)), batch=2).rows
        ((0,), (1, 2, 3))
    """
    if subspaces is None:
        return None
    per_position = isinstance(subspaces, SubspacePerPosition)
    given = _as_lists(subspaces.ids if isinstance(subspaces, SubspacePerPosition) else subspaces)
    if _is_int(given) and not per_position:
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise SubspaceError(
            f"subspaces={subspaces!r} is no choice of coordinates. Give None, an int, a list of ints,"
            f" or one list of ints for each example."
        )
    rows = [_as_lists(row) for row in given]
    nested = per_position or any(row is None or isinstance(row, Sequence) for row in rows)
    if not nested:
        return Selection((_resolve(rows, size, partition, ""),), "all")
    what = "position" if per_position else "example"
    resolved: list[Ids | None] = []
    for number, row in enumerate(rows):
        if row is None:
            resolved.append(None)
        elif isinstance(row, Sequence) and not isinstance(row, str):
            resolved.append(_resolve(row, size, partition, f" for {what} {number}"))
        else:
            raise SubspaceError(
                f"subspaces={subspaces!r} mixes ids and lists: entry {number} is {row!r}."
                f" Give one flat list for all, or one list for each {what}."
            )
    if batch is not None and not per_position and len(resolved) != batch:
        raise SubspaceError(
            f"subspaces has ids for {len(resolved)} examples, but there are {batch}."
            f" Give one list for each example, or one flat list of ids for all."
        )
    return Selection(tuple(resolved), "position" if per_position else "example")


def _resolve(row: Sequence[object], size: int | None, partition: Partition | None, where: str) -> Ids:
    """Check the ids of one row and return the coordinates they stand for."""
    count = size if partition is None else len(partition)
    kind = "dimension" if partition is None else "part"
    ids: list[int] = []
    for item in row:
        value = _as_lists(item)
        if not _is_int(value):
            raise SubspaceError(f"{item!r} is no subspace id{where}: ids are whole numbers from 0 on.")
        if value < 0 or (count is not None and value >= count):
            allowed = f"0 to {count - 1}" if count is not None else "0 and up"
            ids_are = f"the ids of its {count} {kind}s are" if count is not None else "ids are"
            raise SubspaceIndexError(f"Subspace id {value}{where} is out of range: {ids_are} {allowed}.")
        if value in ids:
            raise SubspaceError(f"Subspace id {value} is given twice{where}; name each {kind} once.")
        ids.append(value)
    if partition is None:
        return tuple(ids)
    dimensions = tuple(dict.fromkeys(dim for part in ids for dim in partition[part]))
    outside = [dim for dim in dimensions if size is not None and dim >= size]
    if outside:
        raise SubspaceIndexError(
            f"The partition names dimension {outside[0]}{where}; dimensions are 0 to {(size or 0) - 1}."
        )
    return dimensions


def _parse_part(part: object, size: int | None) -> Ids:
    values = _dimensions_of(part, size)
    for value in values:
        if value < 0 or (size is not None and value >= size):
            allowed = f"0 to {size - 1}" if size is not None else "0 and up"
            raise SubspaceIndexError(f"Part {part!r} names dimension {value}; dimensions are {allowed}.")
    if len(set(values)) < len(values):
        twice = next(value for value in values if values.count(value) > 1)
        raise SubspaceError(f"Part {part!r} names dimension {twice} twice; name it once.")
    return values


def _dimensions_of(part: object, size: int | None) -> Ids:
    if isinstance(part, Mapping):
        if set(part) != {"index_set"}:
            raise SubspaceError(f"Part {part!r} is a mapping without the one key 'index_set'.")
        part = IndexSet(part["index_set"])
    if isinstance(part, slice):
        if size is None and (part.stop is None or part.stop < 0):
            raise SubspaceError(
                f"Part {part!r} needs the width to end at; give it a stop, or give embed_dim."
            )
        values: list[object] = list(range(*part.indices(size if size is not None else part.stop)))
        if size is not None and part.stop is not None and part.stop > size:
            values.append(part.stop - 1)  # Python would cut it short in silence; the caller reports it
    elif isinstance(part, range):
        values = list(part)
    else:
        listed = _as_lists(part.dimensions if isinstance(part, IndexSet) else part)
        if not isinstance(listed, Sequence) or isinstance(listed, str):
            raise SubspaceError(
                f"Part {part!r} is no part of a partition. Give [start, end), a longer list of dimensions,"
                f" a range, a slice, or IndexSet([...])."
            )
        values = [_as_lists(value) for value in listed]
    whole: list[int] = []
    for value in values:
        if not _is_int(value):
            raise SubspaceError(f"Part {part!r} holds {value!r}; dimensions are whole numbers.")
        whole.append(value)
    if len(whole) == 2 and not isinstance(part, (IndexSet, range, slice)):
        start, end = whole
        if start >= end:
            raise SubspaceError(
                f"Part {part!r} is the empty range from {start} up to {end}."
                f" For the two dimensions themselves write IndexSet({whole})."
            )
        whole = [start, end - 1] if start < 0 else list(range(start, end))
    if not whole:
        raise SubspaceError(f"Part {part!r} holds no dimension; leave it out.")
    return tuple(whole)


def _as_lists(value: object) -> object:
    """Return tensors and arrays as nested lists, tuples and lists as they are."""
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype is torch.bool:
            raise SubspaceError(f"Ids of dtype {value.dtype} were given; ids are whole numbers.")
        return [row.tolist() for row in value.unbind()] if value.is_nested else value.tolist()
    return value.tolist() if hasattr(value, "tolist") else value


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
