"""Many examples as batches: what `collect` may be given, one run's inputs at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intervenable.errors import InputError
from intervenable.signatures import forward_signature
from intervenable.stack_lengths import check_divisible

DEFAULT_BATCH = 32
"""Examples in a batch, of texts and datasets."""
PER_TOKEN = {"input_ids": 0, "attention_mask": 0, "token_type_ids": 0, "position_ids": 0}
"""Columns with an entry for each token, and what fills them up."""


class Batch(NamedTuple):
    """The inputs of one run."""

    inputs: Any

    start: int
    """Which example is the first."""

    total: int | None
    """How many examples there are in all, if it is known before."""


def batches_of(given: Any, model: nn.Module, tokenizer: Any, batch_size: int | None) -> Iterator[Batch]:
    """The inputs of each run.

    Args:
        given: One batch (a mapping, a tensor, a tuple), a text or a list of them, a `datasets.Dataset`, or anything
            that gives one batch after the other.
        model: The model that is to run.
        tokenizer: Makes tokens of texts.
        batch_size: Examples in a run; by default as many as there are, and 32 of texts and datasets.

    Raises:
        InputError: none of these.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or batch_size < 1):
        raise InputError(f"batch_size is {batch_size!r}. Give the number of examples in a run, 1 or more.")
    if isinstance(given, str) or _all_texts(given):
        texts = [given] if isinstance(given, str) else list(given)
        size = batch_size or DEFAULT_BATCH
        for start in range(0, len(texts), size):
            columns = _tokenized(texts[start : start + size], tokenizer)
            yield Batch(_padded(columns, model, tokenizer), start, len(texts))
    elif hasattr(given, "column_names"):
        size = batch_size or DEFAULT_BATCH
        for start in range(0, len(given), size):
            yield Batch(_of_dataset(given[start : start + size], model, tokenizer), start, len(given))
    elif isinstance(given, (Mapping, Tensor, tuple)):
        yield from _parts(given, batch_size)
    elif isinstance(given, Iterable):
        start = 0
        for batch in given:
            if _all_texts(batch):
                batch = _padded(_tokenized(list(batch), tokenizer), model, tokenizer)
            yield Batch(batch, start, None)
            start += _examples(batch)
    else:
        raise InputError(
            f"inputs is a {type(given).__name__}. Give what the model takes (a tokenizer's output), texts with a"
            " tokenizer, a datasets.Dataset, or an iterable of batches."
        )


def _all_texts(given: Any) -> bool:
    return isinstance(given, (list, tuple)) and bool(given) and all(isinstance(item, str) for item in given)


def _parts(given: Any, size: int | None) -> Iterator[Batch]:
    """One batch in parts of a size."""
    examples = _examples(given)
    step = examples if size is None or not examples else size
    for start in range(0, examples or 1, step or 1):
        yield Batch(_cut(given, start, start + step, examples), start, examples)


def _cut(given: Any, start: int, stop: int, examples: int) -> Any:
    """Some of the examples: each tensor with an entry for each example is cut."""
    if start == 0 and stop >= examples:
        return given
    if isinstance(given, Mapping):
        check_divisible(given, examples, -1, "the batch cannot be cut into smaller ones")
        return {name: _cut(value, start, stop, examples) for name, value in given.items()}
    if isinstance(given, (tuple, list)):
        return type(given)(_cut(value, start, stop, examples) for value in given)
    whole = isinstance(given, Tensor) and given.dim() and len(given) == examples
    return given[start:stop] if whole else given


def sources_of(sources: Any, batch: Batch) -> Any:
    """The sources of the examples in one batch: of those with a row for each example their rows, others whole."""
    if sources is None or batch.total is None:
        return sources
    listed = sources if isinstance(sources, (list, tuple)) else [sources]
    stop = batch.start + _examples(batch.inputs)
    cut = [
        _cut(one, batch.start, stop, batch.total) if _examples(one) == batch.total else one for one in listed
    ]
    return cut if isinstance(sources, (list, tuple)) else cut[0]


def _examples(given: Any) -> int:
    values = given.values() if isinstance(given, Mapping) else given if isinstance(given, tuple) else (given,)
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 0)


def _tokenized(texts: Sequence[str], tokenizer: Any) -> dict[str, Any]:
    # What resolves positions carries its tokenizer with it.
    encode = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(encode):
        raise InputError("inputs are texts, which need a tokenizer: collect(..., tokenizer=tokenizer).")
    return dict(encode(list(texts)))


def _of_dataset(rows: Mapping[str, Any], model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """The columns of a dataset that the model takes; of texts if it has no others."""
    taken = forward_signature(model).parameters
    columns = {name: values for name, values in rows.items() if name in taken}
    if columns:
        return _padded(columns, model, tokenizer)
    texts = [name for name, values in rows.items() if values and isinstance(values[0], str)]
    if len(texts) != 1 and "text" not in texts:
        raise InputError(
            f"The dataset has the columns {', '.join(rows)}, of which {type(model).__name__} takes none, and"
            f" {len(texts) or 'none'} of them are texts. Keep one column of texts, called 'text', or tokenize before."
        )
    chosen = "text" if "text" in texts else texts[0]
    return _padded(_tokenized(rows[chosen], tokenizer), model, tokenizer)


def _padded(columns: Mapping[str, Any], model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    """Rows of different lengths as tensors, filled up as the tokenizer would, at the right if there is none."""
    taken = forward_signature(model).parameters
    encode = getattr(tokenizer, "tokenizer", tokenizer)
    left = getattr(encode, "padding_side", "right") == "left"
    fillers = {**PER_TOKEN, "input_ids": getattr(encode, "pad_token_id", None) or 0}
    found: dict[str, Any] = {}
    for name, values in columns.items():
        if name not in taken:
            continue
        rows = [torch.as_tensor(value) for value in values]
        longest = max((len(row) for row in rows if row.dim()), default=0)
        if name in PER_TOKEN and any(len(row) < longest for row in rows):
            rows = [_filled(row, longest, fillers[name], left) for row in rows]
            if "attention_mask" not in columns and "attention_mask" in taken:
                ones = [torch.ones(len(value), dtype=torch.long) for value in values]
                found["attention_mask"] = torch.stack([_filled(row, longest, 0, left) for row in ones])
        try:
            found[name] = torch.stack(rows)
        except RuntimeError as error:
            raise InputError(
                f"The rows of {name!r} have different shapes, and cannot be one batch."
            ) from error
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return found
    return {name: value.to(device) for name, value in found.items()}


def _filled(row: Tensor, length: int, filler: int, left: bool) -> Tensor:
    missing = row.new_full((length - len(row),), filler)
    return torch.cat([missing, row] if left else [row, missing])
