"""From a model without a registered map to a verified one: read off a tiny twin, proved there, and fitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from intervenable.collections_paused import collections_paused
from intervenable.errors import IntervenableError
from intervenable.map_cache import KeptMap, keep, look_up, note
from intervenable.map_fitting import fitted
from intervenable.map_inference import infer_map
from intervenable.map_inputs import example_inputs
from intervenable.map_layers import models_that_stay
from intervenable.map_towers import with_towers
from intervenable.map_twin import on_cpu, twin_of
from intervenable.map_verification import proved
from model_maps import ModelMap, UnmappedModelError


def proved_map(
    model: nn.Module, inputs: Mapping[str, Any], shown: Mapping[str, Any] | None = None
) -> ModelMap:
    """The map of a model as its runs show it: inferred, and without what breaks a law.

    Args:
        model: The model, small enough to be run.
        inputs: Its keyword inputs, on which the map is proved.
        shown: Those from which it is inferred; the same by default.
    """
    # Whatever the caller has switched off: heads are told apart by gradients.
    with torch.inference_mode(False), torch.enable_grad():
        return proved(model, infer_map(model, inputs if shown is None else shown), inputs).map


def make_map(model: nn.Module, example: Mapping[str, Any] | None = None) -> ModelMap:
    """The verified map of a model, found on a tiny twin of it, or on itself where its class has no config.

    What is found out is kept, and taken from there for models of the same structure.

    Args:
        model: The model.
        example: Keyword inputs of the model, of two examples at least. They are run on the model itself.

    Raises:
        UnmappedModelError: neither could be run; the message says why and the ways out.
    """
    if example is not None:
        return with_towers(model, proved_map(model, example), proved_map)
    found = look_up(model)
    if found.kept is not None:
        note(model, "kept from an earlier time")
        return found.kept.map
    if found.note:
        note(model, found.note)
    made = _made(model)
    if _has_config(model) or not _measured(made):
        keep(model, KeptMap(made))
    return made


def _has_config(model: nn.Module) -> bool:
    """Whether a tiny twin can be made of a model."""
    return hasattr(getattr(model, "config", None), "to_dict")


def _measured(made: ModelMap) -> bool:
    """Whether a map says what was measured on weights, which another model of the same structure has otherwise."""
    everywhere = [made.sites, *(kind.sites for kind in made.kinds)]
    return any(site.scale != 1.0 for sites in everywhere for site in sites.values())


def _made(model: nn.Module) -> ModelMap:
    try:
        if not _has_config(model):
            return proved_map(model, example_inputs(model))
        with models_that_stay(), collections_paused(), on_cpu():
            with torch.inference_mode(False):
                twin = twin_of(model)
            record = with_towers(twin, proved_map(twin, example_inputs(twin)), proved_map)
            return fitted(record, twin, model)
    except Exception as error:  # whatever the code of a model that we know nothing of may raise
        why = str(error) if isinstance(error, IntervenableError) else f"{type(error).__name__}: {error}"
        raise UnmappedModelError(
            f"No map describes {type(model).__name__}, and none could be made. {why.splitlines()[0]}"
            "\nCall iv.model_map(model, example_inputs=...) once with inputs that it runs on, write a ModelMap and"
            " register_map() it, or name the place by its module path, such as 'model.layers[3].mlp.output'."
        ) from error
