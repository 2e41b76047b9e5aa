"""Which axis of a tensor counts rows, and how a tensor is given more of them.

What a block receives is a tree of tensors: hidden states, masks, rotations, caches' contents. Which axis of each has
one entry (or several) for each example is not known of any architecture; it is found out from runs with two and with
three groups of the same examples, where that axis has sizes in the ratio 2 : 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Path = tuple[Any, ...]
"""Where a tensor is in a tree: indices and keys."""


class NoShortcutError(Exception):
    """A shortcut is not possible here; the sweep goes another way."""


class UnknownTensorError(NoShortcutError):
    """A block is given a tensor of which it was not learnt which axis counts rows."""


class RowAxis(NamedTuple):
    """The axis of a tensor that counts rows."""

    axis: int
    per_group: int
    """Entries for one group of examples."""

    def scaled(self, batch: int, known: int) -> RowAxis:
        """The same for groups of `batch` examples, where it is known for groups of `known`.

        Raises:
            NoShortcutError: an example has no whole number of entries.
        """
        if self.per_group * batch % known:
            raise NoShortcutError(f"{known} examples have {self.per_group} entries")
        return RowAxis(self.axis, self.per_group * batch // known)


Rows = Mapping[Path, RowAxis | None]
"""The row axis of each tensor in a tree; None where the tensor is the same for any number of rows."""


def tensors_in(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """All tensors of a tree with their places."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, (tuple, list)):
        for index, item in enumerate(tree):
            yield from tensors_in(item, (*path, index))
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            yield from tensors_in(item, (*path, key))


def shapes_in(tree: Any) -> dict[Path, tuple[int, ...]]:
    """The shapes of all tensors of a tree."""
    return {path: tuple(tensor.shape) for path, tensor in tensors_in(tree)}


def mapped(tree: Any, function: Callable[[Path, Tensor], Tensor], path: Path = ()) -> Any:
    """A tree with a function applied to its tensors; lists and dictionaries are changed where they are.

    Blocks share dictionaries and write into them, so that copies would come apart. They are the model's, made anew
    in each run.
    """
    if isinstance(tree, Tensor):
        return function(path, tree)
    if isinstance(tree, tuple):
        items = [mapped(item, function, (*path, index)) for index, item in enumerate(tree)]
        if all(new is old for new, old in zip(items, tree, strict=True)):
            return tree
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    if isinstance(tree, list):
        for index, item in enumerate(tree):
            tree[index] = mapped(item, function, (*path, index))
    elif isinstance(tree, MutableMapping):
        for key, item in list(tree.items()):
            if isinstance(item, (Tensor, tuple, list, Mapping)):
                new = mapped(item, function, (*path, key))
                if new is not item:
                    tree[key] = new
    return tree


def row_axes(
    two: Mapping[Path, Sequence[int]], three: Mapping[Path, Sequence[int]]
) -> dict[Path, RowAxis | None]:
    """The row axes of a tree, from its shapes in runs of two and of three groups.

    Raises:
        NoShortcutError: a shape that changes in another way.
    """
    found: dict[Path, RowAxis | None] = {}
    for path, small in two.items():
        large = three.get(path)
        if large is None or len(small) != len(large):
            continue
        axes = [axis for axis, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
        if not axes:
            found[path] = None
        elif len(axes) == 1 and small[axes[0]] * 3 == large[axes[0]] * 2:
            found[path] = RowAxis(axes[0], small[axes[0]] // 2)
        else:
            raise NoShortcutError(
                f"the tensor at {path} is {tuple(small)} for 2 groups and {tuple(large)} for 3"
            )
    return found


def with_groups(tensor: Tensor, rows: RowAxis | None, groups: int) -> Tensor:
    """A tensor with so many groups of rows: cut, or filled up with copies of the first group.

    Raises:
        NoShortcutError: its rows are no whole groups.
    """
    if rows is None:
        return tensor
    axis, unit = rows
    there, wanted = tensor.shape[axis], groups * unit
    if there == wanted:
        return tensor
    if there > wanted:
        return tensor.narrow(axis, 0, wanted)
    if there % unit:
        raise NoShortcutError(f"{there} rows are no whole number of groups of {unit}")
    first = tensor.narrow(axis, 0, unit)
    if unit == 1:
        shape = list(tensor.shape)
        shape[axis] = wanted if there == 1 else wanted - there
        more = first.expand(shape)
        return more if there == 1 else torch.cat([tensor, more], axis)
    repeats = [1] * tensor.dim()
    repeats[axis] = (wanted - there) // unit
    return torch.cat([tensor, first.repeat(repeats)], axis)
