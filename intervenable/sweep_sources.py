"""Where the values that a sweep puts in come from: the other prompt, other examples, or no run at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from intervenable.cache import ActivationCache
from intervenable.errors import ConfigError, InputError, ModelMismatchError, UnknownNameError, unknown_name
from intervenable.inputs import RunInputs, read_inputs
from intervenable.plan import Plan
from intervenable.sites import BoundSite
from intervenable.stack_lengths import check_divisible
from intervenable.sweep_pairs import Pair
from intervenable.sweep_runs import Unpatched, run_unpatched
from intervenable.sweep_values import Place, constant_like, mean_of

WORDS = ("source", "zero", "mean", "resample")


def read_value(value: Any) -> Any:
    """A kind of value as users write it: one of the words, a number, a tensor, or tensors by layer.

    Raises:
        UnknownNameError, ConfigError: none of these.
    """
    if isinstance(value, str):
        if value not in WORDS:
            raise UnknownNameError(unknown_name("value", value, WORDS))
        return 0.0 if value == "zero" else value
    if isinstance(value, (int, float, Tensor, Mapping)) and not isinstance(value, bool):
        return value
    raise ConfigError(
        f"value is a {type(value).__name__}. Allowed: {', '.join(map(repr, WORDS))}, a number, a tensor, or a mapping"
        " of layers to these."
    )


def swaps(value: Any) -> bool:
    """Whether values are those of the other prompt."""
    return isinstance(value, str) and value == "source"


@dataclass(frozen=True, eq=False)
class Source:
    """Where the values of one sweep come from."""

    kind: Any
    """One of the words, a number, a tensor, or tensors by layer."""

    pair: Pair

    run: Plan | None
    """The run that the values are read in; None if there is none, or if it is done already."""

    @classmethod
    def of(cls, value: Any, pair: Pair, reference: Any, seed: int) -> Source:
        """The source of a kind of values.

        Args:
            value: The kind, as `read_value` gives it.
            pair: The runs of the sweep.
            reference: Inputs of examples for means and for drawing from; None for those of the other run.
            seed: Says which are drawn.

        Raises:
            ConfigError: nothing to take a mean of or to draw from, or a reference that nobody asks.
        """
        asks = isinstance(value, str) and value in ("mean", "resample")
        if not asks:
            if reference is not None:
                raise ConfigError("reference is for value='mean' and value='resample'. Leave it out.")
            return cls(value, pair, pair.other if swaps(value) else None)
        fallback = pair.other or pair.base
        inputs = fallback.base if reference is None else read_inputs(reference, pair.model, "reference")
        if value == "resample":
            inputs = resampled(
                inputs, pair.base.base.batch, reference is None and fallback is pair.base, seed
            )
        return cls(
            value,
            pair,
            Plan(inputs, fallback.edits, (), ()) if reference is None else Plan(inputs, (), (), ()),
        )

    @property
    def paired(self) -> RunInputs | None:
        """The inputs whose tokens give their values to those of the base; None if none do."""
        own = self.kind in ("source", "resample") if isinstance(self.kind, str) else False
        return self.run.base if own and self.run is not None else None

    def values(
        self, base: Unpatched, other: Unpatched | None, sites: Mapping[Place, BoundSite]
    ) -> Mapping[Place, Sequence[Tensor]]:
        """What is put at each place, as if it had been read in one run; passage by passage."""
        if swaps(self.kind):
            if other is not None:
                return other.values
            assert self.pair.cache is not None
            return of_cache(self.pair.cache, base, sites)
        if self.run is None:
            return constants(self.kind, base, sites)
        run = run_unpatched(self.pair.model, self.run, sites, "reference run")
        return means(run, base, sites) if self.kind == "mean" else run.values


def resampled(reference: RunInputs, batch: int, itself: bool, seed: int) -> RunInputs:
    """Inputs of randomly drawn examples, one for each of the base.

    Args:
        reference: Inputs of the examples to draw from.
        batch: How many to draw.
        itself: Whether these are the examples of the base, of which none is to be given its own.
        seed: Says which are drawn.

    Raises:
        ConfigError: there is nothing else to draw.
    """
    generator = torch.Generator().manual_seed(seed)
    if itself:
        if batch < 2:
            raise ConfigError(
                "value='resample' takes values of another example, and there is but one. Give more prompts, or"
                " examples to draw from: reference=..."
            )
        # A rotation by a random amount in a random order leaves no example with itself.
        order = torch.randperm(batch, generator=generator)
        drawn = torch.empty(batch, dtype=torch.long)
        drawn[order] = order.roll(1)
    else:
        drawn = torch.randint(reference.batch, (batch,), generator=generator)
    if reference.args or reference.time_first:
        raise InputError(
            "value='resample' draws examples from inputs by name (input_ids=...). Give such a mapping."
        )
    check_divisible(
        reference.kwargs, reference.batch, reference.length, "value='resample' cannot draw examples"
    )
    kwargs = {
        key: item[drawn]
        if isinstance(item, Tensor) and item.dim() and item.shape[0] == reference.batch
        else item
        for key, item in reference.kwargs.items()
    }
    return replace(
        reference,
        kwargs=kwargs,
        given=kwargs,
        batch=batch,
        attention_mask=None if reference.attention_mask is None else reference.attention_mask[drawn],
        input_ids=None if reference.input_ids is None else reference.input_ids[drawn],
    )


def of_cache(
    cache: ActivationCache, base: Unpatched, sites: Mapping[Place, BoundSite]
) -> dict[Place, tuple[Tensor, ...]]:
    """Values that were collected before.

    Raises:
        MissingActivationError: one was not.
        ConfigError: only some of its tokens or heads were.
        ModelMismatchError: they are of another number of examples or tokens.
    """
    cache.require([place if place[1] is not None else place[0] for place in sites])
    found: dict[Place, tuple[Tensor, ...]] = {}
    for place, site in sites.items():
        value, axes = cache[place], cache.axes[place]
        expected = 4 if site.heads is not None else 3
        if value.dim() == expected and "head" in axes and axes[1] != "head" and not site.matrix:
            value = value.transpose(1, 2)
        if value.dim() != expected or "group" in axes or cache.layouts[place].heads is not None:
            raise ConfigError(
                f"The cache has {site.label} as {tuple(value.shape)} {axes}. A sweep needs all its tokens and heads:"
                " collect it without positions, heads or means."
            )
        own = base.values[place][0]
        if value.shape[1:] != own.shape[1:] or value.shape[0] not in (1, own.shape[0]):
            raise ModelMismatchError(
                f"The cache has {site.label} as {tuple(value.shape)}, and in the run that is patched it is"
                f" {tuple(own.shape)}. Collect it from as many prompts of the same length, or give the prompts."
            )
        found[place] = (value.to(own),)
    return found


def constants(
    value: Any, base: Unpatched, sites: Mapping[Place, BoundSite]
) -> dict[Place, tuple[Tensor, ...]]:
    """Numbers or tensors as values at each place.

    Raises:
        ConfigError: a mapping without one of the layers.
        ModelMismatchError: a tensor that does not fit.
    """
    found = {}
    for place, site in sites.items():
        one = value
        if isinstance(value, Mapping):
            if place not in value and place[1] not in value:
                raise ConfigError(
                    f"value has nothing for {site.label}. It has: {', '.join(map(str, value))}."
                )
            one = value[place] if place in value else value[place[1]]
        found[place] = tuple(constant_like(own, one, site) for own in base.values[place])
    return found


def means(
    run: Unpatched, base: Unpatched, sites: Mapping[Place, BoundSite]
) -> dict[Place, tuple[Tensor, ...]]:
    """The mean at each place as values.

    Raises:
        ModelMismatchError: matrices of another length.
    """
    found = {}
    for place, site in sites.items():
        counted = run.plan.base.of(site.stack)
        means = [mean_of(value, site, counted) for value in run.values[place]]
        for mean, own in zip(means, base.values[place], strict=True):
            if site.matrix and mean.shape[1:] != own.shape[1:]:
                raise ModelMismatchError(
                    f"The mean of {site.label} is over matrices of {tuple(mean.shape[1:])}, and here they are"
                    f" {tuple(own.shape[1:])}. Give reference examples of the same length."
                )
        found[place] = tuple(
            mean.expand(own.shape) for mean, own in zip(means, base.values[place], strict=True)
        )
    return found
