"""The position ids that left padding calls for, and how to find out whether a model needs them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.compiled import uncompiled
from intervenable.errors import InputError
from intervenable.evaluation_mode import evaluating
from intervenable.inputs import RunInputs
from intervenable.signatures import takes

PADDING_TOLERANCE = 0.1
"""How far a model may be from its unpadded outputs, of the largest of them; rounding in bfloat16 stays far below."""

_fills_positions: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def with_position_ids(inputs: RunInputs, model: nn.Module) -> Mapping[str, Any]:
    """The keyword inputs of a run, with `position_ids` that count real tokens where they are called for.

    They are filled in only for left-padded input, when the caller gave none, and when the model does not itself
    derive positions from the mask. Whether it does is found out once per model, by comparing a padded with an
    unpadded prompt of three tokens.

    Raises:
        InputError: the model computes something else under left padding, with and without position ids.
    """
    kwargs = inputs.kwargs
    if (
        not inputs.padded_left
        or "position_ids" in kwargs
        or inputs.attention_mask is None
        or not takes(model, "position_ids")
    ):
        return kwargs
    if model not in _fills_positions:
        _fills_positions[model] = _needs_position_ids(model, inputs)
    if not _fills_positions[model]:
        return kwargs
    return {**kwargs, "position_ids": _counted(inputs.attention_mask)}


def _counted(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _needs_position_ids(model: nn.Module, inputs: RunInputs) -> bool:
    key = "input_ids" if inputs.input_ids is not None else "inputs_embeds"
    tokens = inputs.kwargs.get(key)
    if tokens is None or not isinstance(inputs.attention_mask, Tensor):
        return True
    # Three real tokens that differ, alone and behind two of padding.
    example = max(range(inputs.batch), key=inputs.count)
    real = [] if inputs.real_positions is None else inputs.real_positions[example][-3:]
    alone = tokens[example : example + 1, real]
    # Some models tell positions by the padding token itself.
    begins = [row[0] for row in inputs.real_positions or ()]
    short = next((row for row, first in enumerate(begins) if first > 0), example)
    padding = tokens[short : short + 1, :1].repeat_interleave(2, dim=1)
    padded = torch.cat([padding, alone], dim=1)
    ones = inputs.attention_mask.new_ones(1, alone.shape[1])
    mask = torch.cat([ones.new_zeros(1, 2), ones], dim=1)
    with evaluating(model), uncompiled(model), torch.no_grad():
        truth = first_tensor(model(**{key: alone, "attention_mask": ones}))
        bare = first_tensor(model(**{key: padded, "attention_mask": mask}))
        filled = first_tensor(model(**{key: padded, "attention_mask": mask, "position_ids": _counted(mask)}))
    if truth.dim() < 3:
        return True
    scale = truth.abs().max().clamp(min=1e-6)
    errors = [float((tensor[:, 2:] - truth).abs().max() / scale) for tensor in (bare, filled)]
    if min(errors) > PADDING_TOLERANCE:
        raise InputError(
            f"{type(model).__name__} computes something else for left-padded prompts than for the same prompts"
            f" without padding, with and without position_ids (off by {min(errors):.2g} of the largest output)."
            " Pad on the right, run the examples one by one, or pass position_ids of your own."
        )
    if torch.equal(bare[:, 2:], filled[:, 2:]):
        return False
    # Where rotations tell positions both are right for the outputs, and ids alone for the rotated queries and keys.
    return errors[1] < 4 * (errors[0] + torch.finfo(truth.dtype).eps)


def first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, Tensor))
