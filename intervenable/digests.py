"""Digests that tell two values, or the weights of two models, from each other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 64
"""How many values of each weight are looked at."""


def digest_of(*values: Any) -> str:
    """A digest of tensors, numbers and texts, and of lists and mappings of these.

    Example:
        >>> digest_of([1, 2]) == digest_of((1, 2)), digest_of([1, 2]) == digest_of([2, 1])
        (True, False)
    """
    digest = hashlib.sha256()
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def digest_of_weights(model: nn.Module) -> str:
    """A digest of names, shapes and `SAMPLES` values of each weight of a model."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta or not weight.numel():
            continue
        _add(digest, weight.flatten()[:: max(1, weight.numel() // SAMPLES)])
    return digest.hexdigest()


def digest_of_columns(columns: Mapping[str, Sequence[Any]]) -> str:
    """A digest of all values of a data set, whatever form its numbers are in.

    Example:
        >>> digest_of_columns({"labels": [1, 2]}) == digest_of_columns({"labels": torch.tensor([1, 2])})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name} {len(columns[name])}".encode())
        for value in columns[name]:
            digest.update(f"{value.tolist() if hasattr(value, 'tolist') else value!r};".encode())
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _add(digest, value[key])
        digest.update(b"}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
        digest.update(b"]")
    else:
        digest.update(f"{value!r};".encode())
