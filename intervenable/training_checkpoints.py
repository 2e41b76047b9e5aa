"""The state of a training, kept in a folder so that a killed training goes on where it was.

The folder has one file, which is replaced at once or not at all. It says of what training it is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intervenable.atomic_files import remove_unfinished
from intervenable.errors import StorageError
from intervenable.folder_locks import FolderLock
from intervenable.tensor_files import FileKind, read_tensors, write_tensors
from intervenable.training_processes import Processes

LOCK = "training.lock"
STATE = FileKind(
    "intervenable.Training",
    version=1,
    file_name="training.safetensors",
    noun="the state of a training",
    writer="a training with checkpoints",
    remedy="Delete this file: the training starts anew.",
)
OFTEN, SELDOM = 1.0, 30.0
"""Seconds after which the state is kept at the end of an epoch, and at any step."""


@dataclass(frozen=True)
class Kept:
    """The state of a training at one moment."""

    tensors: Mapping[str, Tensor]
    content: Mapping[str, Any]


class Checkpoint:
    """A folder with the state of one training, this training's alone until it is closed.

    The first process reads and writes; the others are told what it read.

    Args:
        folder: Made if it is not there. Other files in it are left alone.
        about: All that the result depends on, as JSON has it.
        every: After how many steps to keep the state; None to go by the clock.
        processes: Which train together.

    Raises:
        StorageError: the folder has the state of another training, is damaged, in use, or cannot be written to.
    """

    def __init__(
        self, folder: Path, about: Mapping[str, Any], every: int | None, processes: Processes
    ) -> None:
        self.folder = folder
        self._about = json.loads(json.dumps(about, allow_nan=False))
        self._every = every
        self._processes = processes
        self._lock: FolderLock | None = None
        self._last = time.monotonic()
        self.kept: Kept | None = None
        error: Exception | None = None
        if processes.first:
            try:
                self.kept = self._open()
            except Exception as raised:
                error = raised
                self.close()
        if processes.agree(error is None) is False:
            raise error or StorageError(f"The first process could not use {folder}; see what it says.")
        self.kept = _shared(self.kept, processes)

    def _open(self) -> Kept | None:
        self._lock = FolderLock(self.folder, LOCK)
        remove_unfinished(self.folder)
        file = STATE.file_at(self.folder)
        if not file.exists():
            return None
        tensors, content = read_tensors(file, STATE)
        known = content.get("training") if isinstance(content, dict) else None
        if not isinstance(known, dict):
            raise StorageError(f"{file} does not say of what training it is. {STATE.remedy}")
        names = dict.fromkeys([*self._about, *known])
        different = [name for name in names if self._about.get(name) != known.get(name)]
        if different:
            name = different[0]
            more = f" (and {', '.join(different[1:])})" if different[1:] else ""
            raise StorageError(
                f"{self.folder} has the checkpoint of another training: {name} was {_shown(known, name)} there and is"
                f" {_shown(self._about, name)} here{more}. Choose another folder, or delete that one to start anew."
            )
        return Kept(tensors, content)

    def due(self, step: int, epoch_ended: bool) -> bool:
        """Whether the state after so many steps is to be kept."""
        if self._every is not None:
            return step % self._every == 0
        passed = time.monotonic() - self._last
        return self._processes.agree(passed >= (OFTEN if epoch_ended else SELDOM))

    def write(self, state: Kept) -> None:
        """Keep a state; it is on the disk when this returns.

        Raises:
            StorageError: it could not be written; the last one is still there.
        """
        if self._processes.first:
            content = {**state.content, "training": self._about}
            write_tensors(STATE.file_at(self.folder), STATE, state.tensors, content)
        self._last = time.monotonic()

    def close(self) -> None:
        """Let others use the folder."""
        if self._lock is not None:
            self._lock.release()


def _shared(kept: Kept | None, processes: Processes) -> Kept | None:
    """What the first process has read, in all."""
    if processes.count == 1:
        return kept
    from safetensors.torch import load, save

    sent = b""
    if kept is not None:
        told = torch.frombuffer(bytearray(json.dumps(dict(kept.content)).encode()), dtype=torch.uint8)
        sent = save({**{f"t.{name}": tensor for name, tensor in kept.tensors.items()}, "content": told})
    found = processes.told(sent)
    if not found:
        return None
    tensors = load(found)
    content = json.loads(tensors.pop("content").numpy().tobytes())
    return Kept({name.removeprefix("t."): tensor.clone() for name, tensor in tensors.items()}, content)


def _shown(about: Mapping[str, Any], name: str) -> str:
    text = json.dumps(about[name], ensure_ascii=False) if name in about else "nothing"
    return text if len(text) <= 100 else f"{text[:97]}..."
