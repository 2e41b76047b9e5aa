"""Edits of a mixture of experts that have a name.

Every function here declares and nothing more: it gives a `RepresentationConfig` if one layer is meant by a number,
and a list of them otherwise, for `IntervenableConfig` to take. Layers are a number, several, or `"all"` (with the
model, to know which of its layers have experts).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from torch import nn

from intervenable.config import RepresentationConfig
from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from intervenable.layer_lists import Layers, layers_named, whole_numbers
from interventions import KnockoutIntervention

STACKS = ("encoder", "decoder", "vision", "audio", "text")


def switched_off(
    layer: Layers,
    experts: int | Iterable[int],
    *,
    where: Any = None,
    stack: Literal["encoder", "decoder", "vision", "audio", "text"] | None = None,
    model: nn.Module | None = None,
) -> RepresentationConfig | list[RepresentationConfig]:
    """Switch experts off: their logits become -inf, so that the router gives them no weight.

    What follows is the architecture's own: where the largest logits are taken, others are chosen in their place, and
    weights that are normalised are so over those. A router that adds a bias to what it ranks may still count an
    expert among the chosen, with weight 0. At least as many experts must stay as a position is sent to.

    Args:
        layer: The layer, several, or "all".
        experts: The number of the expert, counted from 0, or several.
        where: Positions, as the `where` of a `RepresentationConfig` for `pos`; by default everywhere.
        stack: In a model of several stacks, which is meant.
        model: The model, for `layer="all"`.

    Raises:
        ConfigError: no expert, or what is no number of one.
        UnknownNameError: a stack that there is not.

    Example:
        >>> switched_off(3, [0, 2], where="last").intervention.coordinates
        (0, 2)
        >>> [entry.layer for entry in switched_off(range(3, 5), 1)]
        [3, 4]
    """
    if stack not in (None, *STACKS):
        raise UnknownNameError(unknown_name("stack", str(stack), STACKS))
    numbers = whole_numbers(experts, "experts")
    numbers = [numbers] if isinstance(numbers, int) else numbers
    if not numbers or min(numbers) < 0:
        raise ConfigError(f"experts={experts!r}: give at least one number of an expert, counted from 0.")
    component = "router_output" if stack is None else f"{stack}_router_output"
    layers = layers_named(layer, component, model)

    def entry(number: int) -> RepresentationConfig:
        return RepresentationConfig(
            number, component, "pos", where=where, intervention=KnockoutIntervention(numbers)
        )

    return entry(layers) if isinstance(layers, int) else [entry(number) for number in layers]
