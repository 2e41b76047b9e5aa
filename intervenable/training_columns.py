"""A data set, in whatever form it comes, as columns: for each name a list with a value for each example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intervenable.errors import DatasetError

Columns = dict[str, Sequence[Any]]

FORMS = "a datasets.Dataset, a list of dicts, a mapping of columns, or a torch Dataset of dicts"
TEXTS = ("base", "source", "label")
"""Columns of words, which `iv.causal.tokenized` makes ids of."""


def read_columns(dataset: object, name: str = "dataset") -> Columns:
    """The columns of a data set, all of one length.

    Args:
        dataset: A `datasets.Dataset`, a list of dicts, a mapping of columns, or a torch `Dataset` of dicts.
        name: What to call it in messages.

    Raises:
        DatasetError: none of these, no examples, or examples with different columns.

    Example:
        >>> read_columns([{"input_ids": [1, 2], "labels": 3}, {"input_ids": [4], "labels": 5}])
        {'input_ids': [[1, 2], [4]], 'labels': [3, 5]}
    """
    if isinstance(dataset, Mapping) and any(_is_split(value) for value in dataset.values()):
        splits = ", ".join(map(repr, dataset))
        raise DatasetError(f"{name} is a dict of splits ({splits}). Give one of them.")
    if _is_split(dataset):
        columns = _of_datasets(dataset)
    elif isinstance(dataset, Mapping):
        columns = {str(key): _values(values, key, name) for key, values in dataset.items()}
    elif (
        hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
        and not isinstance(dataset, (str, Tensor))
    ):
        columns = _of_rows([dataset[index] for index in range(len(dataset))], name)
    else:
        raise DatasetError(f"{name} is a {type(dataset).__name__}. Give {FORMS}.")
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise DatasetError(f"The columns of {name} have different lengths: {told}.")
    if not any(lengths.values()):
        raise DatasetError(f"{name} has no examples.")
    return columns


def missing_columns(wanted: Sequence[str], columns: Iterable[str], name: str, why: str = "") -> DatasetError:
    """What to say of columns that are needed and not there."""
    there = list(columns)
    near = {column: get_close_matches(column, there, n=1, cutoff=0.75) for column in wanted}
    hints = [f"{found[0]!r} is there: is it meant for {column!r}?" for column, found in near.items() if found]
    if set(TEXTS) & set(there) and "input_ids" in wanted:
        hints = ["It has words: iv.causal.tokenized(dataset, tokenizer) makes ids of them."]
    columns_ = "column" if len(wanted) == 1 else "columns"
    message = f"{name} has no {columns_} {', '.join(map(repr, wanted))}{why}."
    return DatasetError(" ".join([message, f"It has: {', '.join(there) or 'none'}.", *hints]))


def as_tensors(values: Sequence[Any], column: str, name: str) -> list[Tensor]:
    """The values of a column as tensors.

    Raises:
        DatasetError: one of them is not numbers, or is ragged in itself.
    """
    together = _at_once(values)
    if together is not None:
        return list(together.unbind(0))
    found = []
    for row, value in enumerate(values):
        try:
            found.append(value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise DatasetError(
                f"{column!r} of row {row} of {name} is {_shown(value)}, which makes no tensor ({error})."
            ) from error
    return found


def _at_once(values: Any) -> Tensor | None:
    """All values as one tensor, if they are of one shape; None if it takes a closer look."""
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if any(isinstance(value, Tensor) for value in values):
        shapes = {value.shape for value in values if isinstance(value, Tensor)}
        alike = len(shapes) == 1 and all(isinstance(value, Tensor) for value in values)
        return torch.stack([value.detach().cpu() for value in values]) if alike else None
    try:
        return (
            torch.from_numpy(np.stack(values))
            if isinstance(values[0], np.ndarray)
            else torch.as_tensor(values)
        )
    except (TypeError, ValueError, RuntimeError):
        return None


def plain(value: Any) -> Any:
    """Tensors and arrays as lists and numbers."""
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def depth(value: Any) -> int:
    """How many lists are nested in each other."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim
    if isinstance(value, (list, tuple)):
        return 1 + max((depth(item) for item in value), default=0)
    return 0


def _is_split(dataset: object) -> bool:
    """Whether this is one table of the library `datasets`."""
    return hasattr(dataset, "with_format") and hasattr(dataset, "column_names")


def _of_datasets(dataset: Any) -> Columns:
    if not hasattr(dataset, "__len__"):
        raise DatasetError(
            "An iterable data set has no fixed rows to come back to. Make a datasets.Dataset of it:"
            " datasets.Dataset.from_list(list(dataset))."
        )
    return dict(dataset.with_format(None)[:])


def _values(values: Any, column: object, name: str) -> list[Any]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise DatasetError(
            f"{column!r} of {name} is {_shown(values)}. As a mapping, a data set has a list for each column, with a"
            " value for each example."
        )
    return values.detach() if isinstance(values, Tensor) else list(values)  # type: ignore[return-value]


def _of_rows(rows: list[Any], name: str) -> Columns:
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise DatasetError(f"Row {index} of {name} is a {type(row).__name__}, not a dict. Give {FORMS}.")
        if row.keys() != rows[0].keys():
            different = ", ".join(sorted(map(repr, row.keys() ^ rows[0].keys())))
            raise DatasetError(
                f"Rows 0 and {index} of {name} have different columns: {different} is in one alone."
            )
    return {str(key): [row[key] for row in rows] for key in rows[0]} if rows else {}


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
