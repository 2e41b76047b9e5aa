"""The files of a saved model: `config.json` names a file of tensors, and to replace it replaces both at once.

    config.json                                 what was declared, and which of the other files it goes with
    interventions-0123456789abcdef.safetensors  the tensors, under a name made of what they hold
    model-0123456789abcdef/                     the wrapped model, where it was saved too

What `config.json` names is on the disk before `config.json` itself, and what it no longer names is removed after, so
that whoever reads finds the old state or the new one, also when a writer is killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intervenable.atomic_files import remove_unfinished, replacing, replacing_folder
from intervenable.cache_memory import format_bytes
from intervenable.errors import MissingFileError, StorageError
from intervenable.folder_locks import FolderLock
from intervenable.tensor_files import FileKind, read_tensors, write_tensors

CONFIG = "config.json"
FORMAT = "intervenable.IntervenableModel"
SCHEMA_VERSION = 1
"""Folders up to this version of the schema can be read."""
LOCK = ".saving.lock"
WAIT = 60.0
"""For how many seconds to wait until another writer is done."""
LARGEST_JSON = 32_000_000

TENSORS = FileKind(
    "intervenable.Interventions",
    version=1,
    file_name="interventions.safetensors",
    noun="the tensors of interventions",
    writer="IntervenableModel.save_pretrained",
    remedy="Take an intact copy, or save the model anew.",
)
TENSOR_FILE = re.compile(r"interventions-[0-9a-f]{16}\.safetensors")
MODEL_FOLDER = re.compile(r"model-[0-9a-f]{16}")
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


@dataclass(frozen=True)
class Contents:
    """What is in a folder."""

    description: dict[str, Any]
    """What `config.json` says."""

    tensors: dict[str, Tensor]
    """The tensors by name."""

    notes: Any
    """What the file of tensors says beside them."""

    model_folder: Path | None
    """Where the wrapped model is, if it was saved too."""


# --- writing ----------------------------------------------------------------------------------------------


def write_folder(
    folder: Path,
    description: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    notes: Any,
    model: tuple[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write everything so that readers find what was there before or what is there now.

    Args:
        folder: Where; what is in it already must be a saved model, if it has a `config.json`.
        description: What `config.json` says, as JSON has it.
        tensors: What goes into the other file.
        notes: What goes there with them, as JSON has it.
        model: A digest of the wrapped model and what writes it into a folder, if it is to be saved too.

    Raises:
        StorageError: it could not be written, or there is something else in the folder. What was there is as it was.
    """
    files = {
        "tensors": f"interventions-{digest_of(tensors, notes)}.safetensors",
        "model": None if model is None else f"model-{model[0]}",
    }
    content = {"format": FORMAT, "schema_version": SCHEMA_VERSION, **description, "files": files}
    text = json.dumps({**content, "checksum": _checksum(content)}, indent=2, allow_nan=False) + "\n"
    with _alone_in(folder):
        valid = _files_before(folder)
        remove_unfinished(folder)
        try:
            write_tensors(folder / str(files["tensors"]), TENSORS, tensors, notes)
            if model is not None and not (folder / str(files["model"])).is_dir():
                with replacing_folder(folder / str(files["model"])) as part:
                    model[1](part)
            with replacing(folder / CONFIG) as part:
                part.write_text(text, encoding="utf-8")
            valid = files
        finally:
            _sweep(folder, valid)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Have the folder to ourselves, among those who write."""
    until = time.monotonic() + WAIT
    while True:
        try:
            lock = FolderLock(folder, LOCK)
            break
        except StorageError as error:
            if not isinstance(error.__cause__, BlockingIOError) or time.monotonic() > until:
                raise
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def _files_before(folder: Path) -> Mapping[str, Any]:
    """The files of the state that is there.

    Raises:
        StorageError: what is there is not ours, such as a model of transformers, and would be lost.
    """
    file = folder / CONFIG
    if not file.exists() and not file.is_symlink():
        return {}
    try:
        there = read_json(file) if file.is_file() else {}
    except StorageError:
        there = {}
    files = there.get("files")
    if there.get("format") != FORMAT or not isinstance(files, dict):
        raise StorageError(
            f"{file} is there already and was not written by save_pretrained of an IntervenableModel; it would be"
            " lost. Choose another folder, or remove it."
        )
    return files


def _sweep(folder: Path, files: Mapping[str, Any]) -> None:
    """Remove what is left of other states."""
    for path in folder.iterdir():
        if path.name in files.values():
            continue
        if TENSOR_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)
        elif MODEL_FOLDER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def digest_of(tensors: Mapping[str, Tensor], notes: Any) -> str:
    """Sixteen hexadecimal digits that tell one content from another."""
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


# --- reading ----------------------------------------------------------------------------------------------


def read_folder(folder: Path) -> Contents:
    """What `write_folder` has written.

    Raises:
        StorageError: something is damaged, of another kind, or not to be trusted.
        MissingFileError: there is no such folder, or nothing saved in it.
    """
    if not folder.is_dir():
        raise MissingFileError(
            f"There is no folder {str(folder)!r}. For a repository of the Hub write 'owner/name', without a folder"
            " 'owner' here."
        )
    try:
        while True:
            description = _description(folder)
            try:
                return _rest(folder, description)
            except MissingFileError:
                if _description(folder) == description:
                    raise  # and was not replaced meanwhile, which would have swept the file away
    except RecursionError as error:
        raise StorageError(f"{folder / CONFIG} is nested too deeply. {TENSORS.remedy}") from error
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{folder} could not be read: {error.strerror or error}.") from error


def _description(folder: Path) -> dict[str, Any]:
    file = _inside(folder, CONFIG)
    if not file.is_file():
        raise MissingFileError(f"There is no {CONFIG} in {str(folder)!r}.{_pickles(folder)}")
    content = read_json(file)
    if content.get("format") != FORMAT:
        hint = (
            " It looks as if pyvene has written it: IntervenableModel.from_pyvene(folder, model=model) reads that."
            if "intervention_types" in content and "format" not in content
            else f" Give a folder that save_pretrained of an IntervenableModel has written.{_pickles(folder)}"
        )
        raise StorageError(f"{file} is of another kind (its format is {content.get('format')!r}).{hint}")
    version = content.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise StorageError(f"{file} has schema_version {version!r}, which is no version. {TENSORS.remedy}")
    if version > SCHEMA_VERSION:
        raise StorageError(
            f"{file} has version {version} of the schema (written by intervenable"
            f" {content.get('library_version')!r}), and this library reads versions up to {SCHEMA_VERSION}."
            " Update intervenable."
        )
    checksum = content.pop("checksum", None)
    if checksum is not None and checksum != _checksum(content):
        raise StorageError(
            f"{file} is damaged or was changed: what it says is not what was written. {TENSORS.remedy} If it was"
            ' changed on purpose, remove its entry "checksum".'
        )
    return content


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        StorageError: no JSON object, numbers that are none, or one too large or too deep to be ours.
    """
    try:
        size = file.stat().st_size
        if size > LARGEST_JSON:
            raise StorageError(
                f"{file} has {format_bytes(size)}; what save_pretrained writes has at most"
                f" {format_bytes(LARGEST_JSON)}. {TENSORS.remedy}"
            )
        content = json.loads(file.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except RecursionError as error:
        raise StorageError(f"{file} is nested too deeply. {TENSORS.remedy}") from error
    except StorageError:
        raise
    except (OSError, ValueError) as error:
        raise StorageError(f"{file} cannot be read as JSON: {error}. {TENSORS.remedy}") from error
    if not isinstance(content, dict):
        raise StorageError(f"{file} holds a {type(content).__name__}, not an object. {TENSORS.remedy}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _rest(folder: Path, description: dict[str, Any]) -> Contents:
    """The other files, which the description names."""
    files = description.get("files")
    if not isinstance(files, dict) or set(files) != {"tensors", "model"}:
        raise StorageError(
            f'{folder / CONFIG}: "files" is {files!r}; it must name "tensors" and "model". {TENSORS.remedy}'
        )
    name = _named(files["tensors"], TENSOR_FILE, folder)
    file = _inside(folder, name)
    if not file.is_file():
        raise MissingFileError(
            f"{name}, which {CONFIG} names, is not in {str(folder)!r}. {TENSORS.remedy}{_pickles(folder)}"
        )
    try:
        tensors, notes = read_tensors(file, TENSORS)
    except FileNotFoundError as error:
        raise MissingFileError(str(error)) from error
    if f"interventions-{digest_of(tensors, notes)}.safetensors" != name:
        raise StorageError(
            f"{file} is damaged or another one: its name tells another content. {TENSORS.remedy}"
        )
    # Away from the file: in memory of their own, where every tensor is aligned as any other.
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    model_folder = None
    if files["model"] is not None:
        model_folder = _inside(folder, _named(files["model"], MODEL_FOLDER, folder))
        if not model_folder.is_dir():
            raise MissingFileError(
                f"{model_folder.name}, which {CONFIG} names, is not in {str(folder)!r}. {TENSORS.remedy}"
            )
    said = {
        key: value for key, value in description.items() if key not in ("format", "schema_version", "files")
    }
    return Contents(said, tensors, notes, model_folder)


def _named(name: object, pattern: re.Pattern[str], folder: Path) -> str:
    if not isinstance(name, str) or not pattern.fullmatch(name):
        raise StorageError(
            f"{folder / CONFIG} names the file {name!r}, which save_pretrained would not. {TENSORS.remedy}"
        )
    return name


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder; one that is a link must stay there, or in the store of the Hub's cache around it."""
    file = folder / name
    if file.is_symlink():
        home = Path(os.path.realpath(folder))
        homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
        target = Path(os.path.realpath(file))  # which, unlike `resolve`, does not mind circles
        if not any(target.is_relative_to(place) for place in homes):
            raise StorageError(
                f"{file} is a link that leads out of the folder, to {str(target)!r}. Put the file itself there."
            )
    return file


def _pickles(folder: Path) -> str:
    """A hint where there are pickles, which are never read."""
    found = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if not found:
        return ""
    listed = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
    return f" The pickled files there ({listed}) are not read: pickles can run code."
