"""What was asked of a sweep, and what tells it from another: a checkpoint of one is not to be taken for another's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intervenable._version import __version__
from intervenable.inputs import RunInputs
from intervenable.sweep_axes import Axis, real_tokens
from intervenable.sweep_grids import Subsets
from intervenable.sweep_pairs import Pair

SAMPLES = 64
"""How many values of each weight are looked at."""


def settings_of(
    pair: Pair, components: Sequence[str], axes: Sequence[Axis], kind: Any, subsets: Subsets
) -> dict[str, Any]:
    """What was asked for, as JSON has it."""
    return {
        "model": type(pair.model).__name__,
        "version": __version__,
        "components": list(components),
        "axes": list(axes),
        "direction": pair.direction,
        "value": kind if isinstance(kind, (str, int, float)) else type(kind).__name__,
        "window": {str(axis): width for axis, width in subsets.windows.items()},
        "tokens": _tokens(pair.base.base.decoder or pair.base.base),
    }


def _tokens(inputs: RunInputs) -> list[int | None]:
    """The ids of the real tokens of the run that is patched; None where its examples differ, or have no ids."""
    real = real_tokens(inputs)
    found: list[int | None] = []
    for position in range(max(map(len, real))):
        ids = {
            None if inputs.input_ids is None else int(inputs.input_ids[example, row[position]])
            for example, row in enumerate(real)
            if position < len(row)
        }
        found.append(ids.pop() if len(ids) == 1 else None)
    return found


def fingerprint(pair: Pair, settings: Mapping[str, Any], **parts: Any) -> dict[str, Any]:
    """A description of a sweep, as JSON has it: two of the same description give the same values.

    Args:
        pair: The model and its inputs.
        settings: What is told of the sweep as it is.
        **parts: What is told of it by a digest alone: what cells put where, and which are computed together.
    """
    found = {key: value for key, value in settings.items() if key != "version"}
    found["weights"] = _of_weights(pair.model)
    for name, plan in (("clean", pair.clean), ("corrupted", pair.corrupted)):
        found[name] = "" if plan is None else _of(plan.base.args, plan.base.kwargs)
    return found | {name: _of(part) for name, part in parts.items()}


def _of_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.is_meta or not weight.numel():
            continue
        step = max(1, weight.numel() // SAMPLES)
        _add(digest, weight.flatten()[::step])
    return digest.hexdigest()


def _of(*values: Any) -> str:
    digest = hashlib.sha256()
    for value in values:
        _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _add(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    else:
        digest.update(f"{value!r};".encode())
