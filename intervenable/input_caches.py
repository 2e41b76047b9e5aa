"""Key-value caches among the inputs of a run, which the run must not change."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def with_own_caches(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword inputs with copies of the key-value caches among them, which a run extends in place."""
    return {key: _copy(value) if hasattr(value, "get_seq_length") else value for key, value in kwargs.items()}


def _copy(cache: Any) -> Any:
    # Tensors are cloned by hand, because deepcopy refuses those that are inside an autograd graph.
    return copy.deepcopy(cache, {id(tensor): tensor.clone() for tensor in _tensors_of(cache)})


def _tensors_of(cache: Any) -> list[Tensor]:
    # A cache of two stacks is a cache for each attention.
    inner = [value for value in vars(cache).values() if hasattr(value, "get_seq_length")]
    parts = [cache, *getattr(cache, "layers", ())]
    own = [item for part in parts for item in vars(part).values() if isinstance(item, Tensor)]
    return own + [tensor for part in inner for tensor in _tensors_of(part)]
