"""Activation caches as files: safetensors with a JSON header, written at once or not at all."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from intervenable.cache_layout import Layout, TokenAxis
from intervenable.errors import StorageError

FORMAT = "intervenable.ActivationCache"
VERSION = 1
FILE_NAME = "activations.safetensors"

Name = tuple[str, int | None]
Kept = Tensor | tuple[Tensor, ...]


def file_at(path: Path) -> Path:
    """The file that a path means: itself, or the one in that folder."""
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def write_cache(
    path: Path, values: Mapping[Name, Kept], layouts: Mapping[Name, Layout], info: Mapping[str, Any]
) -> Path:
    """Write activations to a file, by way of another beside it: whoever is interrupted leaves the old one as it was.

    Raises:
        StorageError: `info` holds something that JSON has no form for.
    """
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    known: dict[int, str] = {}

    def keep(tensor: Tensor) -> str:
        if id(tensor) not in known:
            known[id(tensor)] = f"{len(tensors):05d}"
            tensors[known[id(tensor)]] = tensor.detach().cpu().contiguous().clone()
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
    sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    try:
        header = json.dumps({"activations": entries, "info": dict(info), "checksums": sums}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise StorageError(f"info holds something that cannot be written as JSON: {error}.") from error
    target = file_at(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid4().hex}.part")
    try:
        part.touch()  # with the permissions of any new file, which save_file does not give
        mode = part.stat().st_mode
        save_file(tensors, part, {"format": FORMAT, "version": str(VERSION), "header": header})
        part.chmod(mode)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return target


def read_cache(
    path: Path, device: torch.device
) -> tuple[dict[Name, Kept], dict[Name, Layout], dict[str, Any]]:
    """What `write_cache` has written.

    Raises:
        StorageError: another kind of file, or a damaged one.
        FileNotFoundError: no file.
    """
    from safetensors import SafetensorError, safe_open

    target = file_at(path)
    if not target.is_file():
        raise FileNotFoundError(f"There is no file {str(target)!r}.")
    try:
        with safe_open(target, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            _check_kind(metadata, target)
            header = json.loads(metadata["header"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        damaged = [name for name, total in header["checksums"].items() if _checksum(tensors[name]) != total]
        if damaged or header["checksums"].keys() != tensors.keys():
            raise StorageError(
                f"{target} is damaged: its tensors are not those that were written. Collect them anew."
            )
        return (*_activations(header["activations"], tensors, device), header["info"])
    except StorageError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise StorageError(
            f"{target} cannot be read as an activation cache: it is damaged, or another kind of file ({error})."
        ) from error


def _check_kind(metadata: Mapping[str, str], target: Path) -> None:
    if metadata.get("format") != FORMAT:
        raise StorageError(
            f"{target} is a safetensors file, and not one that ActivationCache.save has written (its format is"
            f" {metadata.get('format')!r})."
        )
    if int(metadata["version"]) > VERSION:
        raise StorageError(
            f"{target} has version {metadata['version']} of the format, and this library reads versions up to"
            f" {VERSION}. Update intervenable."
        )


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


def _checksum(tensor: Tensor) -> int:
    flat = tensor.contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0
