"""The state of optimizers and schedules as tensors and JSON, which nothing is executed to read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from intervenable.errors import StorageError

Tree = Any
"""Dicts, lists and tuples of tensors, numbers, texts, None."""


def pack(tree: Tree, prefix: str, tensors: dict[str, Tensor]) -> Any:
    """A tree as JSON has it; its tensors are put into `tensors`, under names that begin with `prefix`.

    Raises:
        StorageError: something that is no tensor, number or text.

    Example:
        >>> import torch
        >>> tensors = {}
        >>> pack({0: {"step": torch.ones(2), "betas": (0.9, 0.999)}}, "adam", tensors)
        {'dict': [[0, {'dict': [['step', {'tensor': 'adam.0'}], ['betas', {'tuple': [0.9, 0.999]}]]}]]}
        >>> list(tensors)
        ['adam.0']
    """
    if isinstance(tree, Tensor):
        name = f"{prefix}.{sum(key.startswith(f'{prefix}.') for key in tensors)}"
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        pairs = [[_key(key, prefix), pack(value, prefix, tensors)] for key, value in tree.items()]
        return {"dict": pairs}
    if isinstance(tree, tuple):
        return {"tuple": [pack(item, prefix, tensors) for item in tree]}
    if isinstance(tree, list):
        return [pack(item, prefix, tensors) for item in tree]
    if isinstance(tree, float) and not math.isfinite(tree):
        return {"float": repr(float(tree))}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    raise StorageError(
        f"The state of the {prefix} holds a {type(tree).__name__}, and a checkpoint holds tensors, numbers and texts"
        " alone. Train without a checkpoint, or with another one."
    )


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Tree:
    """What `pack` was given.

    Raises:
        KeyError, TypeError, ValueError: something that `pack` does not give.
    """
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "dict":
        return {key: unpack(item, tensors) for key, item in value}
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in value)
    if kind == "float":
        return float(value)
    raise ValueError(f"unknown kind {kind!r}")


def _key(key: object, prefix: str) -> str | int:
    if type(key) in (str, int):
        return key  # type: ignore[return-value]
    raise StorageError(
        f"The state of the {prefix} has the key {key!r}, and a checkpoint has texts and whole numbers."
    )
