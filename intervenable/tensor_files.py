"""Tensors and what is to be known of them in one file: safetensors with a JSON header and checksums."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intervenable.atomic_files import replacing
from intervenable.errors import StorageError


@dataclass(frozen=True)
class FileKind:
    """A kind of file, as its header and the messages about it name it."""

    format: str
    """What stands in the file: `"intervenable.ActivationCache"`."""

    version: int
    """Files up to this version of the format can be read."""

    file_name: str
    """Its name where only a folder is given."""

    noun: str
    """`"an activation cache"`."""

    writer: str
    """What writes such files: `"ActivationCache.save"`."""

    remedy: str
    """What to do about a damaged one: `"Collect them anew."`."""

    def file_at(self, path: str | Path) -> Path:
        """The file that a path means: itself, or the one in that folder."""
        path = Path(path)
        return path if path.suffix == ".safetensors" else path / self.file_name


def write_tensors(target: Path, kind: FileKind, tensors: Mapping[str, Tensor], content: Any) -> Path:
    """Write tensors and a JSON content, at once or not at all. The same values give the same bytes.

    Raises:
        StorageError: a content that JSON has no form for, or a file that could not be written.
    """
    from safetensors.torch import save_file

    content = _as_json(content, kind)
    alone = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    sums = {name: _checksum(tensor) for name, tensor in alone.items()}
    header = {
        "format": kind.format,
        "version": kind.version,
        "content": content,
        "checksums": sums,
        "checksum": _checksum_of_text(content, sums),
    }
    with replacing(target) as part:
        try:
            # One entry alone: safetensors writes several in any order.
            save_file(alone, part, {"header": json.dumps(header)})
        except KeyError as error:
            raise StorageError(f"{target} cannot hold a tensor of {error.args[0]}.") from error
    return target


def read_tensors(target: Path, kind: FileKind) -> tuple[dict[str, Tensor], Any]:
    """What `write_tensors` has written: the tensors, and the content with lists for tuples.

    Raises:
        StorageError: another kind of file, or a damaged one.
        FileNotFoundError: no file.
    """
    from safetensors import SafetensorError, safe_open

    if not target.is_file():
        raise FileNotFoundError(f"There is no file {str(target)!r}.")
    try:
        with safe_open(target, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            header = {**metadata, **json.loads(metadata.get("header", "{}"))}
            _check_kind(header, target, kind)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
        sums = {name: _checksum(tensor) for name, tensor in tensors.items()}
        if _checksum_of_text(header["content"], sums) != header["checksum"] or sums != header["checksums"]:
            raise StorageError(f"{target} is damaged: what it holds is not what was written. {kind.remedy}")
        return tensors, header["content"]
    except StorageError:
        raise
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise StorageError(
            f"{target} cannot be read as {kind.noun}: it is damaged, or another kind of file ({error})."
            f" {kind.remedy}"
        ) from error


def _check_kind(header: Mapping[str, Any], target: Path, kind: FileKind) -> None:
    if header.get("format") != kind.format:
        raise StorageError(
            f"{target} is a safetensors file, and not one that {kind.writer} has written (its format is"
            f" {header.get('format')!r})."
        )
    if int(header["version"]) > kind.version:
        raise StorageError(
            f"{target} has version {header['version']} of the format, and this library reads versions up to"
            f" {kind.version}. Update intervenable."
        )


def _checksum(tensor: Tensor) -> int:
    flat = tensor.contiguous().reshape(-1)
    return zlib.crc32(flat.view(torch.uint8).numpy().data) if flat.numel() else 0


def _checksum_of_text(content: Any, sums: Mapping[str, int]) -> int:
    return zlib.crc32(json.dumps([content, dict(sums)], sort_keys=True).encode())


def _as_json(content: Any, kind: FileKind) -> Any:
    """What reading it gives back: lists for tuples, texts for the keys of mappings."""
    try:
        return json.loads(json.dumps(content, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StorageError(f"{kind.noun} holds something that cannot be written as JSON: {error}.") from error
