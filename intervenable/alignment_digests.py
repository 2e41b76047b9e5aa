"""Digests of weights and of data: what tells two sweeps of alignments apart that were asked for in the same words."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 64
"""How many values of each weight are looked at."""


def weights_digest(model: nn.Module) -> str:
    """A digest of a model's state: names, shapes, and some values of each weight, evenly spread."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if not weight.is_meta and weight.numel():
            _add_tensor(digest, weight.flatten()[:: max(1, weight.numel() // SAMPLES)])
    return digest.hexdigest()


def columns_digest(columns: Mapping[str, Sequence[Any]]) -> str:
    """A digest of all values of a data set, whatever form its numbers are in.

    Example:
        >>> columns_digest({"labels": [1, 2]}) == columns_digest({"labels": torch.tensor([1, 2])})
        True
    """
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(f"{name} {len(columns[name])}".encode())
        for value in columns[name]:
            digest.update(f"{value.tolist() if hasattr(value, 'tolist') else value!r};".encode())
    return digest.hexdigest()


def _add_tensor(digest: Any, tensor: Tensor) -> None:
    digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
