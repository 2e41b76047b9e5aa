"""What tells a training from another: a checkpoint of one is not to be taken for another's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from intervenable.digests import digest_of, digest_of_weights
from intervenable.model import IntervenableModel
from intervenable.training_data import Examples
from intervenable.training_places import Places
from intervenable.training_settings import Settings


def model_fingerprint(
    model: IntervenableModel, include_model: bool, frozen: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The wrapped model and what is declared on it. What trains counts by its shape alone."""
    wrapped = model.model
    state = {name: list(tensor.shape) for name, tensor in wrapped.state_dict().items()}
    fixed = {
        name: tensor
        for name, tensor in frozen.items()
        if not name.startswith("model.") and not name.endswith("temperature")
    }
    return {
        "model": type(wrapped).__name__,
        "weights": digest_of(state) if include_model else digest_of_weights(wrapped),
        "interventions": [
            [
                entry.name,
                type(entry.intervention).__name__,
                entry.config.unit,
                entry.config.max_number_of_units,
            ]
            for entry in model._bound
        ],
        "shapes": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "groups": [entry.group for entry in model._bound],
        "where": [repr(entry.config.where) for entry in model._bound],
        "constants": digest_of([entry.constant for entry in model._bound], fixed),
    }


def data_fingerprint(examples: Examples, rows: Sequence[int], name: str) -> dict[str, Any]:
    """The examples, and which of them."""
    places = examples.places
    where = places.unit_locations if isinstance(places, Places) else named(places)
    return {
        name: digest_of(examples.base, examples.sources, examples.labels, list(rows)),
        f"{name} locations": digest_of(where) if isinstance(places, Places) else where,
        f"{name} subspaces": digest_of(examples.subspaces),
    }


def option_fingerprint(
    settings: Settings, optimizer: Optimizer, schedule: LRScheduler, options: Mapping[str, Any]
) -> dict[str, Any]:
    """The options, by name where they are functions."""
    stopping = settings.early_stopping
    plain = {
        key: value
        for key, value in asdict(settings).items()
        if key not in ("checkpoint_every", "early_stopping")
    }
    return {
        **plain,
        "early_stopping": None if stopping is None else repr(stopping),
        "optimizer": type(optimizer).__name__,
        **{f"optimizer {key}": repr(value) for key, value in optimizer.defaults.items() if key != "lr"},
        "schedule class": type(schedule).__name__,
        **{key: named(value) for key, value in options.items()},
    }


def named(value: Any) -> Any:
    """A value as JSON has it; what is no plain value by its name."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (list, tuple)):
        return [named(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): named(item) for key, item in value.items()}
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{getattr(value, '__module__', '')}.{name}"
