"""Losses and metrics of trainings, by name or as functions of logits and labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from intervenable.errors import ConfigError, MetricError, unknown_name
from intervenable.training_data import IGNORED
from intervenable.training_engine import Read

Measure: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From logits and labels to a value for each example `[b]`, or one for all."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`-log_softmax(logits)[label]`; of several labels of an example the mean.

    Shape:
        logits: `(b, V)` or `(b, P, V)`; labels: `(b,)` or `(b, P)`; result: `(b,)`.

    Example:
        >>> cross_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
        tensor([1.3863, 1.3863])
    """
    logits = logits.float()
    if labels.dim() == 1:
        return functional.cross_entropy(logits, labels, reduction="none")
    each = functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=IGNORED)
    return each.sum(1) / (labels != IGNORED).sum(1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """`relu(1 + z[best other] - z[label])`: nothing where the answer is ahead by 1; of several labels the mean.

    Shape:
        logits: `(b, V)` or `(b, P, V)`; labels: `(b,)` or `(b, P)`; result: `(b,)`.
    """
    asked = labels != IGNORED
    index = labels.clamp(min=0)[..., None]
    logits = logits.float()
    answer = logits.gather(-1, index)[..., 0]
    other = logits.scatter(-1, index, -torch.inf).amax(-1)
    each = functional.relu(1 + other - answer)
    return each if labels.dim() == 1 else torch.where(asked, each, 0.0).sum(1) / asked.sum(1)


def iia(logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the answer, the largest logit, is the label; of several labels all must be. The mean is the accuracy.

    Shape:
        logits: `(b, V)` or `(b, P, V)`; labels: `(b,)` or `(b, P)`; result: `(b,)`.

    Example:
        >>> iia(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([1, 0]))
        tensor([1., 0.])
    """
    right = (logits.argmax(-1) == labels) | (labels == IGNORED)
    return (right if labels.dim() == 1 else right.all(1)).float()


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    """`softmax(logits)[label]`; of several labels the product.

    Shape:
        logits: `(b, V)` or `(b, P, V)`; labels: `(b,)` or `(b, P)`; result: `(b,)`.
    """
    chances = logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    if labels.dim() > 1:
        chances = torch.where(labels != IGNORED, chances, 0.0).sum(1)
    return chances.exp()


LOSSES: Mapping[str, Measure] = {"cross_entropy": cross_entropy, "margin": margin}
METRICS: Mapping[str, Measure] = {"iia": iia, "accuracy": iia, "probability": probability, **LOSSES}


def read_loss(loss: object) -> Measure:
    """A loss by its name, or as it is.

    Raises:
        ConfigError: neither.
    """
    return _read("loss", loss, LOSSES)


def read_metrics(metric: object) -> dict[str, Measure]:
    """Metrics by their names.

    Raises:
        ConfigError: a name that there is not, or something else than a function.
    """
    if isinstance(metric, Mapping):
        if not metric:
            raise ConfigError("metric is an empty mapping. Give at least one metric, such as 'iia'.")
        return {str(name): _read("metric", value, METRICS) for name, value in metric.items()}
    if isinstance(metric, (list, tuple)):
        return {name: value for entry in metric for name, value in read_metrics(entry).items()}
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    return {name: _read("metric", metric, METRICS)}


def _read(kind: str, given: Any, table: Mapping[str, Measure]) -> Measure:
    if isinstance(given, str):
        if given not in table:
            raise ConfigError(unknown_name(kind, given, table))
        return table[given]
    if not callable(given):
        raise ConfigError(
            f"{kind}={given!r} is a {type(given).__name__}. Give one of {', '.join(table)}, or a function of"
            " (logits, labels)."
        )
    return given  # type: ignore[no-any-return]


def total(measure: Measure, read: Read, name: str) -> Tensor:
    """The sum over the examples of what a measure gives; one value for all counts for each.

    Raises:
        MetricError: it gave something else.
    """
    value = values_of(measure, read, name)
    count = len(read.labels)
    return value * count if value.dim() == 0 else value.sum()


def values_of(measure: Measure, read: Read, name: str) -> Tensor:
    """What a measure gives: `[b]` or one value.

    Raises:
        MetricError: something else.
    """
    value: Any = measure(read.logits, read.labels)
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, device=read.logits.device)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if value.dim() == 0 or value.shape == (len(read.labels),):
        return value  # type: ignore[no-any-return]
    raise MetricError(
        f"{name} gave a tensor of shape {tuple(value.shape)} for {len(read.labels)} examples. Give one value, or one"
        " for each example."
    )
