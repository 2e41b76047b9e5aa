"""What an alignment is held against: data without the relation to find, and a model that has learned nothing."""

from __future__ import annotations

import copy
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from intervenable.errors import ConfigError
from intervenable.toy_models import MLPClassifier
from intervenable.training_columns import Columns, plain
from intervenable.training_data import SOURCE

OF_THE_ROW = ("source_mask",)
"""Columns that begin as those of the source do and say something about the row."""


def shuffled_sources(columns: Columns, seed: int) -> Columns:
    """The data with every base and its label kept, and the source of another example beside it.

    So a label is no longer the answer that its source calls for. Sources stay among the examples of one intervention
    (`intervention_id`), if there are several.

    Raises:
        ConfigError: there are no sources to shuffle.
    """
    moved = [name for name in columns if name.startswith(SOURCE) and name not in OF_THE_ROW]
    if not moved:
        raise ConfigError(
            f"The data set has no column that begins with {SOURCE!r}, so there is nothing to shuffle. Leave the"
            " control 'shuffled' out."
        )
    count = len(columns[moved[0]])
    groups: dict[Hashable, list[int]] = {}
    for row in range(count):
        key = plain(columns["intervention_id"][row]) if "intervention_id" in columns else None
        groups.setdefault(repr(key), []).append(row)
    generator = torch.Generator().manual_seed(seed)
    order = list(range(count))
    for rows in groups.values():
        ring = [rows[index] for index in torch.randperm(len(rows), generator=generator).tolist()]
        for row, other in zip(ring, [*ring[1:], *ring[:1]], strict=True):  # nobody keeps their own
            order[row] = other
    return {
        name: [values[row] for row in order] if name in moved else list(values)
        for name, values in columns.items()
    }


def untrained_like(model: nn.Module, seed: int) -> nn.Module:
    """A model of the same architecture with fresh weights, which the seed decides; in evaluation mode.

    Raises:
        ConfigError: it is not known how to make one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = _fresh(model)
    weight = next(iter(model.parameters()), None)
    if weight is not None:
        fresh = fresh.to(device=weight.device, dtype=weight.dtype)
    return fresh.eval()


def _fresh(model: nn.Module) -> nn.Module:
    config: Any = getattr(model, "config", None)
    if isinstance(model, MLPClassifier):
        return MLPClassifier(config.hidden_size, config.num_hidden_layers, config.num_labels)
    from_config = getattr(type(model), "_from_config", None)
    if from_config is not None and config is not None:
        made: nn.Module = from_config(copy.deepcopy(config))
        return made
    fresh = copy.deepcopy(model)
    reset: set[int] = set()
    for module in fresh.modules():
        again = getattr(module, "reset_parameters", None)
        if callable(again):
            again()
            reset |= {id(parameter) for parameter in module.parameters()}
    left = [name for name, parameter in fresh.named_parameters() if id(parameter) not in reset]
    if left:
        raise ConfigError(
            f"It is not known how a {type(model).__name__} begins before training ({left[0]} has no"
            " reset_parameters). Give a model with fresh weights, untrained_model=..., or leave the control"
            " 'untrained' out."
        )
    return fresh
