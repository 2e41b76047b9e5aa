"""Files that are written at once or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp

from intervenable.errors import StorageError

UNFINISHED = ".unfinished-"
"""How the folders begin in which files are made; whoever is killed leaves one behind."""


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a path to write to, and let what is there take the place of `target` when the block ends.

    It is on the disk by then, and has the permissions of any new file. If the block fails, `target` is as it was
    before and nothing else is left. A process that is killed leaves at most a hidden folder (see `UNFINISHED`).

    Raises:
        StorageError: it could not be written: a full disk, no permission.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "note.txt") as part:
        ...         _ = part.write_text("whole")
        ...     (Path(folder) / "note.txt").read_text(), len(os.listdir(folder))
        ('whole', 1)
    """
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(mkdtemp(prefix=UNFINISHED, dir=target.parent))
        try:
            part = workshop / target.name
            part.touch()
            mode = part.stat().st_mode  # what safetensors writes has other permissions
            yield part
            part.chmod(mode)
            _flush(part)
            os.replace(part, target)
            _flush_names(target.parent)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{target} could not be written: {_reason(error)}. What was there before is as it was."
        ) from error


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """Give a new folder to fill, which gets the name `target`, that must be free, when the block ends.

    It and all files in it are on the disk by then. If the block fails, nothing is left.

    Raises:
        StorageError: it could not be written, or the name is not free.
    """
    from safetensors import SafetensorError

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        workshop = Path(mkdtemp(prefix=UNFINISHED, dir=target.parent))
        try:
            part = workshop / target.name
            part.mkdir()
            yield part
            for path in part.rglob("*"):
                (_flush_names if path.is_dir() else _flush)(path)
            _flush_names(part)
            os.rename(part, target)
            _flush_names(target.parent)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{target} could not be written: {_reason(error)}. What was there before is as it was."
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes have left in a folder; nobody may be writing there."""
    for left in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left, ignore_errors=True)


def _flush(file: Path) -> None:
    """Wait until the content of a file is on the disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _flush_names(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where folders can be waited for."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        number, text = error.errno, error.strerror or str(error)
    else:  # safetensors has the number in its message alone
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
        text = os.strerror(number) if number is not None else str(error)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    return f"the disk is full ({text}). Make room, or choose another place" if full else text
