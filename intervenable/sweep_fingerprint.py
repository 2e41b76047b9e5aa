"""What was asked of a sweep, and what tells it from another: a checkpoint of one is not to be taken for another's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from intervenable._version import __version__
from intervenable.digests import digest_of, digest_of_weights
from intervenable.inputs import RunInputs
from intervenable.sweep_axes import Axis, real_tokens
from intervenable.sweep_grids import Subsets
from intervenable.sweep_pairs import Pair


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
    found["weights"] = digest_of_weights(pair.model)
    for name, plan in (("clean", pair.clean), ("corrupted", pair.corrupted)):
        found[name] = "" if plan is None else digest_of(plan.base.args, plan.base.kwargs)
    return found | {name: digest_of(part) for name, part in parts.items()}
