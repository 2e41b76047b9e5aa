"""Finished parts of a long sweep, kept in a folder so that a killed sweep goes on where it was.

The folder has one file for each finished wave, written at once or not at all, and `sweep.json`, which says of what
sweep they are. Every wave file says so too, by a digest: a file that was copied from elsewhere is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from torch import Tensor

from intervenable.atomic_files import remove_unfinished, replacing
from intervenable.errors import StorageError
from intervenable.folder_locks import FolderLock
from intervenable.tensor_files import FileKind, read_tensors, write_tensors

FORMAT = "intervenable.sweep"
VERSION = 1
DESCRIPTION = "sweep.json"
LOCK = "sweep.lock"
WAVE = FileKind(
    "intervenable.SweepWave",
    version=1,
    file_name="wave.safetensors",
    noun="a finished part of a sweep",
    writer="a sweep with checkpoints",
    remedy="Delete this file: the sweep computes that part again, and takes the others from the folder.",
)
ABSENT = "nothing"


class FinishedWave(NamedTuple):
    """What is kept of a wave."""

    results: dict[str, Tensor]
    """What it gave, bit by bit."""

    ways: dict[str, int]
    """How many cells were computed in which way."""


class Checkpoints:
    """A folder of finished waves of one sweep, to read those that there are and to add others.

    It is this process's alone until it is closed, or the process ends in whatever way.

    Args:
        folder: Made if it is not there. Other files in it are left alone.
        fingerprint: All that the numbers depend on, as JSON has it: digests of inputs and weights, settings.
        waves: How many waves the sweep has.

    Raises:
        StorageError: the folder has waves of another sweep, is damaged, in use, or cannot be written to.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Checkpoints(folder, {"component": "block_input"}, waves=2) as kept:
        ...         kept.write(0, {"difference": torch.tensor([1.0, 2.0])})
        ...     with Checkpoints(folder, {"component": "block_input"}, waves=2) as kept:
        ...         kept.finished, kept.read(0).results, kept.read(1)
        ((0,), {'difference': tensor([1., 2.])}, None)
    """

    def __init__(self, folder: str | Path, fingerprint: Mapping[str, Any], waves: int) -> None:
        self.folder = Path(folder)
        about = _as_json({**fingerprint, "waves": waves})
        self._digest = sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        self._lock = FolderLock(self.folder, LOCK)
        try:
            remove_unfinished(self.folder)
            self._describe(about)
            self._finished = {wave for wave in map(_wave_of, self.folder.iterdir()) if wave is not None}
        except BaseException:
            self._lock.release()
            raise

    @property
    def finished(self) -> tuple[int, ...]:
        """Numbers of the waves that are there, in order."""
        return tuple(sorted(self._finished))

    def read(self, wave: int) -> FinishedWave | None:
        """What is kept of a wave; None if it is not finished.

        Raises:
            StorageError: its file is damaged, or of another sweep; the message names it.
        """
        if wave not in self._finished:
            return None
        file = self._file(wave)
        try:
            tensors, content = read_tensors(file, WAVE)
        except FileNotFoundError:
            return None  # deleted meanwhile: to be computed again
        if content["sweep"] != self._digest or content["wave"] != wave:
            raise StorageError(f"{file} is of another sweep, or of another part of this one. {WAVE.remedy}")
        results = {name: tensors[f"{number:04d}"] for number, name in enumerate(content["names"])}
        return FinishedWave(results, content["ways"])

    def write(self, wave: int, results: Mapping[str, Tensor], ways: Mapping[str, int] | None = None) -> None:
        """Keep what a wave gave, and in which ways its cells were computed; it is on the disk when this returns.

        Raises:
            StorageError: it could not be written, because the disk is full for instance; all others are kept.
        """
        tensors = {f"{number:04d}": results[name] for number, name in enumerate(results)}
        content = {"sweep": self._digest, "wave": wave, "names": list(results), "ways": dict(ways or {})}
        write_tensors(self._file(wave), WAVE, tensors, content)
        self._finished.add(wave)

    def close(self) -> None:
        """Let others use the folder."""
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _file(self, wave: int) -> Path:
        return self.folder / f"wave-{wave:06d}.safetensors"

    def _describe(self, about: Mapping[str, Any]) -> None:
        """Write of what sweep the folder is, or compare with what stands there."""
        file = self.folder / DESCRIPTION
        if not file.exists():
            with replacing(file) as part:
                text = json.dumps({"format": FORMAT, "version": VERSION, "sweep": about}, indent=1)
                part.write_text(f"{text}\n", encoding="utf-8")
            return
        known = _described(file)
        different = [name for name in (*about, *known) if about.get(name) != known.get(name)]
        if different:
            name = different[0]
            raise StorageError(
                f"{self.folder} has the checkpoints of another sweep: {name} was {_shown(known, name)} there and is"
                f" {_shown(about, name)} here. Choose another folder, or delete that one to start anew."
            )


def _described(file: Path) -> dict[str, Any]:
    """The sweep that a folder is of."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known, version, sweep = found["format"], int(found["version"]), dict(found["sweep"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{file} is damaged, or no description of a sweep ({error}). Delete this file if the folder is of this"
            " sweep: what is finished is kept."
        ) from error
    if known != FORMAT:
        raise StorageError(
            f"{file} is no description of a sweep (its format is {known!r}). Choose another folder."
        )
    if version > VERSION:
        raise StorageError(
            f"{file} has version {version} of the format, and this library reads versions up to {VERSION}. Update"
            " intervenable."
        )
    return sweep


def _as_json(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(fingerprint, allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise StorageError(
            f"This sweep cannot be described as JSON, so it has no checkpoints: {error}."
        ) from error


def _shown(about: Mapping[str, Any], name: str) -> str:
    text = json.dumps(about[name], ensure_ascii=False) if name in about else ABSENT
    return text if len(text) <= 100 else f"{text[:97]}..."


def _wave_of(file: Path) -> int | None:
    found = re.fullmatch(r"wave-(\d{6,})\.safetensors", file.name)
    return int(found[1]) if found else None
