"""Maps that were found out once, kept in a folder for the next time a model of the same structure comes."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intervenable._version import __version__
from intervenable.atomic_files import replacing
from intervenable.errors import StorageError
from intervenable.map_records import from_record, to_record
from model_maps import ModelMap

VARIABLE = "INTERVENABLE_CACHE"
"""The environment variable that names the folder; set but empty, nothing is kept."""

_LOG = logging.getLogger(__name__)
_OURS = ("model_maps", "intervenable")
_RELEASED = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
_NOT_STRUCTURE = (
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "torch_dtype",
    "transformers_version",
)
_MANY_FILES = 4000
"""Beyond so many files the oldest go."""


@dataclass(frozen=True)
class KeptMap:
    """A map as it is kept."""

    map: ModelMap

    refused: Mapping[str, str] = field(default_factory=dict)
    """Component -> which law it broke."""


@dataclass(frozen=True)
class Lookup:
    """What was found in the folder for a model."""

    kept: KeptMap | None

    note: str = ""
    """What was wrong with the file there, if anything was."""


def cache_folder() -> Path | None:
    """The folder in which maps are kept; None if they are not.

    It is `maps` in what `INTERVENABLE_CACHE` names, by default in `intervenable` among the user's caches.
    """
    named = os.environ.get(VARIABLE)
    if named is not None:
        return Path(named).expanduser() / "maps" if named.strip() else None
    caches = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    try:
        return (Path(caches) if caches else Path.home() / ".cache") / "intervenable" / "maps"
    except RuntimeError:  # there is no home
        return None


def look_up(model: nn.Module) -> Lookup:
    """The map that was kept for models like this one, if there is one and it is whole."""
    file = _file_of(model)
    if file is None:
        return Lookup(None)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("digest") != _digest(record):
            raise StorageError("its content is not what was written")
        return Lookup(KeptMap(from_record(record["map"]), dict(record["refused"])))
    except FileNotFoundError:
        return Lookup(None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        note = f"the map kept in {file} could not be read and is made again: {error}"
        _LOG.info("%s", note)
        return Lookup(None, note)


def keep(model: nn.Module, kept: KeptMap) -> bool:
    """Keep a map for models like this one; False where that is not possible, which is no fault."""
    file = _file_of(model)
    if file is None:
        return False
    record: dict[str, Any] = {
        "class": type(model).__name__,
        "map": to_record(kept.map),
        "refused": dict(kept.refused),
    }
    record["digest"] = _digest(record)
    try:
        with replacing(file) as part:
            part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        _tidy(file.parent)
    except (OSError, StorageError) as error:
        _LOG.info("the map of %s could not be kept: %s", type(model).__name__, error)
        return False
    return True


def fingerprint(model: nn.Module) -> str | None:
    """What tells models apart that may have other maps: the same for all that differ in their weights alone.

    It follows from the classes, their forwards and the source of both, the config, the modules and the shapes of
    their weights, and the versions of torch, transformers and this library. None if a source cannot be read.
    """
    digest = hashlib.sha256()
    digest.update(f"{torch.__version__} {_version_of_transformers()} {__version__} {_own_source()}".encode())
    digest.update(json.dumps(_structure_of(model), sort_keys=True, default=str).encode())
    sources: set[str] = set()
    for path, module in model.named_modules():
        cls = type(module)
        sources.add(cls.__module__)
        digest.update(f"{path} {cls.__module__}.{cls.__qualname__}".encode())
        forward = getattr(module, "forward", None)  # perhaps a function of another's, put in its place
        where = getattr(forward, "__module__", None) or cls.__module__
        sources.add(where)
        digest.update(f" {where}.{getattr(forward, '__qualname__', '')}".encode())
        for name, parameter in module._parameters.items():
            if parameter is not None:
                digest.update(f" {name} {tuple(parameter.shape)}".encode())
    for source in sorted(sources):
        content = _source_of(source)
        if content is None:
            return None
        digest.update(content.encode())
    return digest.hexdigest()


def note(model: nn.Module, text: str) -> None:
    """Write down where the map of a model comes from, for those who ask."""
    _NOTES[model] = (*_NOTES.get(model, ()), text)


def notes_of(model: nn.Module) -> tuple[str, ...]:
    """What was written down about the map of a model."""
    return _NOTES.get(model, ())


_NOTES: weakref.WeakKeyDictionary[nn.Module, tuple[str, ...]] = weakref.WeakKeyDictionary()


def _structure_of(model: nn.Module) -> Mapping[str, Any]:
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    found: dict[str, Any] = _without_names(config.to_dict())
    found["attention"] = getattr(config, "_attn_implementation", None)
    return found


def _without_names(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _without_names(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _NOT_STRUCTURE
    }


@functools.cache
def _version_of_transformers() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return ""


@functools.cache
def _own_source() -> str:
    """A digest of all that finds maps and proves them, so that what an older version found is not taken."""
    digest = hashlib.sha256()
    above = Path(__file__).resolve().parent.parent
    for package in _OURS:
        for file in sorted((above / package).glob("*.py")):
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _source_of(module: str) -> str | None:
    """A digest of the source of a module that is not of a release; "" for those that are; None if there is none."""
    if module.partition(".")[0] in _RELEASED:
        return ""
    file = getattr(sys.modules.get(module), "__file__", None)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
    except OSError:
        return None


def _file_of(model: nn.Module) -> Path | None:
    folder = cache_folder()
    name = fingerprint(model) if folder is not None else None
    return None if folder is None or name is None else folder / f"{type(model).__name__}-{name[:32]}.json"


def _digest(record: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _tidy(folder: Path) -> None:
    """Let the oldest files go where there are very many: those of versions of long ago."""
    files = list(folder.glob("*.json"))
    if len(files) > _MANY_FILES:
        for file in sorted(files, key=lambda one: one.stat().st_mtime)[: len(files) // 2]:
            file.unlink(missing_ok=True)
