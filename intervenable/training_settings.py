"""The options of a training, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from intervenable.errors import ConfigError, listing, unknown_name

PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class EarlyStopping:
    """End a training that no longer gets better, and take the best weights that it had.

    Args:
        metric: What is to get better: a metric of the training, or `"loss"`. None for the first metric on the
            evaluation data, and for the loss where there are none.
        patience: After how many epochs without a new best it ends.
        minimum: By how much a best must be better than the one before.
        lower_is_better: None: so for losses alone.

    Raises:
        ConfigError: a patience below 1, or a minimum below 0.

    Example:
        >>> EarlyStopping(patience=3).patience
        3
    """

    metric: str | None = None
    patience: int = 3
    minimum: float = 0.0
    lower_is_better: bool | None = None

    def __post_init__(self) -> None:
        if not _whole(self.patience) or self.patience < 1:
            raise ConfigError(f"patience={self.patience!r}: give a number of epochs from 1 on.")
        if not _number(self.minimum) or self.minimum < 0:
            raise ConfigError(f"minimum={self.minimum!r}: give a number from 0 on.")

    def better(self, name: str, value: float, best: float | None) -> bool:
        """Whether a value of a metric is a new best."""
        if best is None or math.isnan(best):
            return True
        lower = self.lower_is_better
        if lower is None:
            lower = name in ("loss", "cross_entropy", "margin")
        return (best - value if lower else value - best) > self.minimum


@dataclass(frozen=True)
class Settings:
    """The options of a training that are numbers and names."""

    epochs: int
    max_steps: int | None
    batch_size: int
    accumulate: int
    precision: str | None
    clip_norm: float | None
    early_stopping: EarlyStopping | None
    include_model: bool
    seed: int
    checkpoint_every: int | None

    @property
    def global_batch(self) -> int:
        """How many examples a step is made of."""
        return self.batch_size * self.accumulate


def read_settings(*, lr: Any, weight_decay: Any, early_stopping: Any, **given: Any) -> Settings:
    """The options, checked.

    Raises:
        ConfigError: some cannot be; all are told.
    """
    faults = []
    for name in ("epochs", "batch_size", "accumulate", "max_steps", "checkpoint_every"):
        value = given[name]
        if value is None and name in ("max_steps", "checkpoint_every"):
            continue
        if not _whole(value) or value < 1:
            faults.append(f"{name}={value!r}: give a whole number from 1 on.")
    if not _whole(given["seed"]) or not 0 <= given["seed"] < 2**63:
        faults.append(f"seed={given['seed']!r}: give a whole number from 0 on.")
    for name, value, least in (("lr", lr, 0.0), ("weight_decay", weight_decay, 0.0)):
        if not _number(value) or value < least:
            faults.append(f"{name}={value!r}: give a number from {least:g} on.")
    clip = given["clip_norm"]
    if clip is not None and (not _number(clip) or clip <= 0):
        faults.append(f"clip_norm={clip!r}: give a number above 0, or None.")
    if given["precision"] is not None and given["precision"] not in PRECISIONS:
        faults.append(unknown_name("precision", given["precision"], PRECISIONS))
    if not isinstance(given["include_model"], bool):
        faults.append(f"include_model={given['include_model']!r}: give True or False.")
    if not (early_stopping is None or _whole(early_stopping) or isinstance(early_stopping, EarlyStopping)):
        faults.append(f"early_stopping={early_stopping!r}: give a number of epochs, or an EarlyStopping.")
    if faults:
        raise ConfigError(
            faults[0] if len(faults) == 1 else listing(faults, "the options of the training"), faults
        )
    if _whole(early_stopping):
        early_stopping = EarlyStopping(patience=early_stopping)
    return Settings(early_stopping=early_stopping, **given)


def whole_from_one(value: object) -> bool:
    """Whether this is a count of something."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
