"""Tensors with a row for each example, in memory or beyond the budget in a file that memory is mapped to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from intervenable.errors import StorageError


class Budget:
    """Bytes that are still free for what is kept."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.mapped = 0
        """Bytes that went into files."""

    def take(self, wanted: int) -> bool:
        """Whether there is so much room in memory; it is taken then."""
        if wanted > self.free:
            self.mapped += wanted
            return False
        self.free -= wanted
        return True


class RowStore:
    """A tensor with a row for each of a number of things, filled in row by row.

    Args:
        rows: How many rows.
        like: `[n, ...]` some rows, for shape, dtype and device.
        budget: Where there is no more room, rows are kept in a file without a name, which goes with this object.

    Raises:
        StorageError: the file cannot be made: a full disk.
    """

    def __init__(self, rows: int, like: Tensor, budget: Budget) -> None:
        shape = (rows, *like.shape[1:])
        count = torch.Size(shape).numel()
        self._device = like.device
        if count == 0 or budget.take(count * like.element_size()):
            self._values = torch.empty(shape, dtype=like.dtype, device=like.device)
        else:
            self._values = _mapped(count, like.dtype).view(shape)

    def put(self, rows: Sequence[int], values: Tensor) -> None:
        """Keep these values as those rows."""
        there = self._values
        there[torch.tensor(rows, device=there.device)] = values.detach().to(there.device, there.dtype)

    def at(self, rows: Tensor) -> Tensor:
        """`[n, ...]` these rows, a copy, on the device on which they were made."""
        return self._values.index_select(0, rows.to(self._values.device)).to(self._device)


def _mapped(count: int, dtype: torch.dtype) -> Tensor:
    """A tensor whose memory is a file's. The file has no name any more, and so goes when the tensor does."""
    size = count * dtype.itemsize
    try:
        with tempfile.TemporaryDirectory(prefix="intervenable-", ignore_cleanup_errors=True) as folder:
            path = Path(folder) / "rows"
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # a hole in the file would end the process on a full disk
                    os.posix_fallocate(file.fileno(), 0, size)
                file.truncate(size)
            return torch.from_file(str(path), shared=True, size=count, dtype=dtype)
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"No file of {size} bytes could be made in {tempfile.gettempdir()} for what does not fit into memory:"
            f" {error}. Make room, or name another place in the environment variable TMPDIR."
        ) from error
