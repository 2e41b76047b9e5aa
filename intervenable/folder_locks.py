"""One process at a time in a folder."""

from __future__ import annotations

import os
import sys
import weakref
from contextlib import suppress
from pathlib import Path

from intervenable.errors import StorageError


class FolderLock:
    """A folder that is ours until `release`, or until this process ends in whatever way.

    The operating system holds the lock on the file, so that of a killed process is gone with it; the file stays.

    Raises:
        StorageError: someone else has it, it is no folder, or it cannot be written to.
    """

    def __init__(self, folder: Path, name: str) -> None:
        file = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise StorageError(
                f"{folder} cannot be used as a folder: {error.strerror}. Choose another one."
            ) from error
        try:
            _lock(descriptor)
        except OSError as error:
            with suppress(OSError):
                holder = os.read(descriptor, 100).decode(errors="replace").strip()
            os.close(descriptor)
            raise StorageError(_refusal(folder, holder, error)) from error
        self._release = weakref.finalize(self, os.close, descriptor)
        with suppress(OSError):  # a full disk does not keep anyone from reading what is there
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()}\n".encode())

    def release(self) -> None:
        """Let others have the folder."""
        self._release()


def _refusal(folder: Path, holder: str, error: OSError) -> str:
    if not isinstance(error, BlockingIOError | PermissionError):
        return f"{folder} cannot be locked against other processes: {error.strerror}. Choose another folder."
    who = "this process" if holder == str(os.getpid()) else f"process {holder or 'unknown'}"
    return f"{folder} is in use by {who}. Wait until that is done, or choose another folder."


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        # Far behind what is written, since nobody else can read what is locked there.
        os.lseek(descriptor, 1 << 30, os.SEEK_SET)
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        os.lseek(descriptor, 0, os.SEEK_SET)

else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
