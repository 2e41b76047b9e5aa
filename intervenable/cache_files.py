"""Activation caches as files: safetensors with a JSON header, written at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intervenable.cache_layout import Layout, TokenAxis
from intervenable.errors import StorageError
from intervenable.tensor_files import FileKind, read_tensors, write_tensors

CACHE = FileKind(
    "intervenable.ActivationCache",
    version=1,
    file_name="activations.safetensors",
    noun="an activation cache",
    writer="ActivationCache.save",
    remedy="Collect them anew.",
)

Name = tuple[str, int | None]
Kept = Tensor | tuple[Tensor, ...]


def write_cache(
    path: Path, values: Mapping[Name, Kept], layouts: Mapping[Name, Layout], info: Mapping[str, Any]
) -> Path:
    """Write activations to a file, by way of another beside it: whoever is interrupted leaves the old one as it was.

    Raises:
        StorageError: `info` holds something that JSON has no form for, or the file could not be written.
    """
    tensors: dict[str, Tensor] = {}
    known: dict[int, str] = {}

    def keep(tensor: Tensor) -> str:
        if id(tensor) not in known:
            known[id(tensor)] = f"{len(tensors):05d}"
            tensors[known[id(tensor)]] = tensor
        return known[id(tensor)]

    entries = [
        {
            "component": key[0],
            "layer": key[1],
            "tensors": [keep(part) for part in (value if isinstance(value, tuple) else (value,))],
            "by_example": isinstance(value, tuple),
            "axes": layouts[key].axes,
            "heads": layouts[key].heads,
            "tokens": {
                name: {
                    "positions": keep(axis.positions),
                    "groups": None if axis.groups is None else keep(axis.groups),
                    "labels": axis.labels,
                }
                for name, axis in layouts[key].tokens.items()
            },
        }
        for key, value in values.items()
    ]
    try:
        json.dumps(dict(info), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StorageError(f"info holds something that cannot be written as JSON: {error}.") from error
    return write_tensors(CACHE.file_at(path), CACHE, tensors, {"activations": entries, "info": dict(info)})


def read_cache(
    path: Path, device: torch.device
) -> tuple[dict[Name, Kept], dict[Name, Layout], dict[str, Any]]:
    """What `write_cache` has written.

    Raises:
        StorageError: another kind of file, or a damaged one.
        FileNotFoundError: no file.
    """
    tensors, content = read_tensors(CACHE.file_at(path), CACHE)
    return (*_activations(content["activations"], tensors, device), content["info"])


def _activations(
    entries: list[dict[str, Any]], tensors: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[Name, Kept], dict[Name, Layout]]:
    values: dict[Name, Kept] = {}
    layouts: dict[Name, Layout] = {}
    for entry in entries:
        key = (entry["component"], entry["layer"])
        parts = tuple(tensors[name].to(device) for name in entry["tensors"])
        values[key] = parts if entry["by_example"] else parts[0]
        layouts[key] = Layout(
            tuple(entry["axes"]),
            {
                name: TokenAxis(
                    tensors[axis["positions"]],
                    None if axis["groups"] is None else tensors[axis["groups"]],
                    tuple(axis["labels"]),
                )
                for name, axis in entry["tokens"].items()
            },
            None if entry["heads"] is None else tuple(entry["heads"]),
        )
    return values, layouts
