"""What `model_map` and `verify` are given: a model, and keyword inputs to run it on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from intervenable.errors import ConfigError, InputError
from intervenable.inputs import check_spelling
from intervenable.model import IntervenableModel
from intervenable.signatures import forward_signature


def model_in(given: object) -> nn.Module:
    """The model that was given, itself or inside of an `IntervenableModel`.

    Raises:
        ConfigError: it is no torch module.
    """
    model: object = given.model if isinstance(given, IntervenableModel) else given
    if not isinstance(model, nn.Module):
        name = f" Load it first: {given!r:.60} is a name." if isinstance(given, str) else ""
        raise ConfigError(f"model is a {type(model).__name__}, not a torch module.{name}")
    return model


def inputs_in(given: object, model: nn.Module) -> Mapping[str, Any]:
    """The keyword inputs that were given for a model, such that gradients can be taken at them.

    Raises:
        ConfigError: it is no mapping from names of inputs, or an empty one.
        InputError: a name is a slip of one that the model takes.
    """
    if not isinstance(given, Mapping) or not given or not all(isinstance(name, str) for name in given):
        what = "empty" if given == {} else f"a {type(given).__name__}"
        raise ConfigError(
            f"example_inputs is {what}; it must be a mapping of the model's keyword inputs, as"
            ' {"input_ids": tokens}, with at least two examples.'
        )
    if not any(isinstance(value, Tensor) for value in given.values()):
        kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in given.items())
        raise ConfigError(
            f"example_inputs has no tensor ({kinds}). Give tensors, as torch.tensor(...) makes them."
        )
    check_spelling(given, forward_signature(model), model, "example_inputs")
    return {name: tree_map(_outside_inference_mode, value) for name, value in given.items()}


def _outside_inference_mode(value: Any) -> Any:
    """A tensor made in inference mode, which can be in no graph, as one that can."""
    if not isinstance(value, Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()


def check_runs(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Whether a model runs on the inputs that were given for it.

    Raises:
        InputError: it does not; the message has the model's own words.
    """
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception as error:
        raise not_run(model, inputs, error) from error


def not_run(model: nn.Module, inputs: Mapping[str, Any], error: Exception) -> InputError:
    """The error for inputs on which a model does not run, in the model's own words."""
    said = str(error).splitlines()[0] if str(error) else ""
    return InputError(
        f"{type(model).__name__} does not run on the example_inputs given ({', '.join(inputs)}):"
        f" {type(error).__name__}: {said}"
    )
