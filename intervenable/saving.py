"""Interventions kept in a folder or on the Hub: what was declared, and what was learned.

Nothing is ever unpickled, and no code is imported because a file names it: classes come from the registry alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from intervenable.binding import BoundRepresentation
from intervenable.config import IntervenableConfig
from intervenable.errors import ConfigError, ModelMismatchError
from intervenable.saving_content import checked, described, restored
from intervenable.saving_files import read_folder, write_folder
from intervenable.saving_fingerprint import description_of, differences, weights_of
from intervenable.saving_models import attention_of, load_model, loader_of, model_writer
from intervenable.saving_types import Registry, TypeNames

CheckModel = bool | Literal["sizes"]


@dataclass(frozen=True)
class Loaded:
    """What a folder holds, ready to be bound."""

    declared: IntervenableConfig
    """The configuration as it was declared."""

    made: IntervenableConfig
    """The same with the interventions themselves."""

    model: nn.Module
    """The model to bind it to."""


def save(
    folder: str | Path,
    config: IntervenableConfig,
    bound: Sequence[BoundRepresentation],
    model: nn.Module,
    *,
    include_model: bool = False,
    registry: Registry | None = None,
) -> Path:
    """Write a model's interventions to a folder; see `IntervenableModel.save_pretrained`."""
    folder = Path(folder)
    description, tensors = described(config, bound, TypeNames(registry))
    described_model = description_of(model)
    writer = None
    if include_model:
        described_model |= {"loader": loader_of(model), "attention": attention_of(model)}
        writer = model_writer(model)
    write_folder(folder, {**description, "model": described_model}, tensors, weights_of(model), writer)
    return folder


def load(
    folder: str | Path,
    model: nn.Module | None,
    *,
    registry: Registry | None = None,
    check_model: CheckModel = True,
) -> Loaded:
    """Read what `save` has written; see `IntervenableModel.from_pretrained`."""
    folder = Path(folder)
    if check_model not in (True, False, "sizes"):
        raise ConfigError(f"check_model is {check_model!r}; give True, 'sizes' (not the weights) or False.")
    types = TypeNames(registry)
    contents = read_folder(folder)
    saved, weights = checked(folder, contents)
    if model is None:
        kept = saved.model
        model = load_model(contents.model_folder, kept.loader, kept.class_name, kept.attention, folder)
    if check_model:
        found = differences(
            saved.model.model_dump(),
            {name: weight.model_dump() for name, weight in weights.items()},
            model,
            compare_weights=check_model is True,
        )
        if found:
            listed = "\n".join(f"- {one}" for one in found)
            way_out = (
                "check_model='sizes' loads them onto other weights, such as finetuned ones"
                if "weights have other values" in found[0]
                else "check_model=False loads them all the same"
            )
            raise ModelMismatchError(
                f"The interventions in {folder} were saved with another model than this {type(model).__name__}:\n"
                f"{listed}\nGive the model that they were saved with; {way_out}."
            )
    result = restored(folder, saved, contents.tensors, types)
    return Loaded(result.declared, result.made, model)
