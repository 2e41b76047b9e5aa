"""Key-value caches of the unpatched run, cut to where a wave begins and given its rows."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.unwrapping import config_of
from intervenable.wave_rows import NoShortcutError, Path, Rows, tensors_in, with_groups

GROWING = ("keys", "values")
"""Tensors of a cache layer that a block makes longer out of place; others are written where they are."""


def recording_cache(model: nn.Module) -> Any:
    """An empty cache that keeps what is needed to be cut afterwards.

    Raises:
        NoShortcutError: the model has no such caches.
    """
    config: Any = config_of(model)
    if config is None or not hasattr(config, "get_text_config"):
        raise NoShortcutError("the model has no config to make a cache of")
    from transformers import DynamicCache  # here, for the half second that it takes

    cache = DynamicCache(config=config.get_text_config(decoder=True))
    if not hasattr(cache, "activate_past_recording"):
        raise NoShortcutError("caches of this transformers version cannot be cut")
    cache.activate_past_recording()  # type: ignore[no-untyped-call]
    return cache


def _of_decoder(cache: Any) -> Any:
    """Of a cache with a part for what the encoder gave the other part; any other as it is."""
    return getattr(cache, "self_attention_cache", cache)


def layers_of(cache: Any) -> list[Any]:
    """The layers of a cache; of one with two parts those of the decoder itself.

    Raises:
        NoShortcutError: it has none.
    """
    inner = _of_decoder(cache)
    found = getattr(inner, "layers", None)
    if not isinstance(found, list):
        raise NoShortcutError(f"a {type(cache).__name__} has no layers")
    return found


def watch(cache: Any) -> Watched:
    """Put a list that tells which layers are looked at in the place of a cache's layers."""
    inner = _of_decoder(cache)
    watched = inner.layers = Watched(layers_of(cache))
    return watched


class Watched(list[Any]):
    """Layers of a cache, and which of them were looked at."""

    def __init__(self, layers: Sequence[Any]) -> None:
        super().__init__(layers)
        self.seen: set[int] = set()

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int):
            self.seen.add(index % len(self))
        return super().__getitem__(index)


def shapes_of(cache: Any) -> list[dict[Path, tuple[int, ...]]]:
    """For each layer the shapes of its tensors."""
    return [
        {
            (name, *path): tuple(tensor.shape)
            for name, item in vars(layer).items()
            for path, tensor in tensors_in(item)
        }
        for layer in layers_of(cache)
    ]


def copied(cache: Any) -> Any:
    """A cache that a run can go on with while the first one stays as it is."""
    if hasattr(cache, "self_attention_cache"):
        return type(cache)(copied(cache.self_attention_cache), copied(cache.cross_attention_cache))
    if type(cache).__name__ != "DynamicCache":
        return copy.deepcopy(cache)
    new = copy.copy(cache)
    new.layers = [_copied_layer(layer) for layer in cache.layers]
    return new


def _copied_layer(layer: Any) -> Any:
    new = copy.copy(layer)
    for name, item in vars(layer).items():
        if isinstance(item, dict):
            setattr(
                new, name, {key: one.clone() if isinstance(one, Tensor) else one for key, one in item.items()}
            )
        elif isinstance(item, list):
            setattr(new, name, [one.clone() if isinstance(one, Tensor) else one for one in item])
        elif isinstance(item, Tensor) and name not in GROWING and item.dim():
            setattr(new, name, item.clone())
    return new


def cut(cache: Any, removed: int) -> Any:
    """A copy of a recorded cache without its last positions."""
    new = copied(cache)
    if removed:
        new.crop(-removed)
    return new


def is_croppable(cache: Any) -> bool:
    """Whether a recorded cache can be cut."""
    inner = _of_decoder(cache)
    return bool(getattr(inner, "is_croppable", False))


def give_rows(layer: Any, rows: Rows, groups: int) -> None:
    """Let the tensors of a cache layer have so many groups of rows."""
    for name, item in list(vars(layer).items()):
        if isinstance(item, Tensor):
            known = rows.get((name,))
            if (
                known is not None
                and item.dim()
                and item.numel()
                and item.shape[known.axis] != groups * known.per_group
            ):
                new = with_groups(item, known, groups)
                setattr(layer, name, new if name in GROWING else new.contiguous())
        elif isinstance(item, (dict, list)):
            for key in list(item) if isinstance(item, dict) else range(len(item)):
                known = rows.get((name, key)) if isinstance(item[key], Tensor) else None
                if known is not None and item[key].shape[known.axis] != groups * known.per_group:
                    item[key] = with_groups(item[key], known, groups).contiguous()


def release(layer: Any) -> None:
    """Let go of what a block has read and no other will: rows of a whole wave."""
    for name in GROWING:
        item: Mapping[str, Any] = vars(layer)
        if isinstance(item.get(name), Tensor):
            setattr(layer, name, torch.empty(0, dtype=item[name].dtype, device=item[name].device))
