"""The batch at which a training failed, kept in a file to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import mkdtemp

import torch

from intervenable.tensor_files import FileKind, write_tensors
from intervenable.training_data import Examples

FAILED = FileKind(
    "intervenable.FailedBatch",
    version=1,
    file_name="failed-batch.safetensors",
    noun="the batch of a failed training",
    writer="a training that fails",
    remedy="Train again.",
)


def save_batch(examples: Examples, rows: Sequence[int], folder: Path | None) -> Path:
    """Write the inputs and labels of these rows, into a folder or a new temporary one; return the file.

    Raises:
        StorageError: it could not be written.
    """
    index = torch.tensor(list(rows))
    tensors = {"rows": index, "labels": examples.labels[index]}
    tensors |= {f"base.{key}": value[index] for key, value in examples.base.items()}
    for group, source in enumerate(examples.sources):
        tensors |= {f"source_{group}.{key}": value[index] for key, value in (source or {}).items()}
    target = FAILED.file_at(folder if folder is not None else mkdtemp(prefix="intervenable-"))
    return write_tensors(target, FAILED, tensors, {"dataset": examples.name})
