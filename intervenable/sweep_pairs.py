"""The two runs of a sweep: the one that is patched, and the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intervenable.cache import ActivationCache
from intervenable.errors import ConfigError, InputError, UnknownNameError, unknown_name
from intervenable.inputs import RunInputs, read_inputs
from intervenable.model import IntervenableModel
from intervenable.plan import Plan
from intervenable.stack_lengths import is_by_picture

Direction = Literal["denoise", "noise"]
DIRECTIONS: tuple[Direction, ...] = ("denoise", "noise")


@dataclass(frozen=True, eq=False)
class Pair:
    """The clean and the corrupted run of a sweep, and which of them is patched."""

    model: nn.Module
    """The wrapped model."""

    clean: Plan | None
    """The clean run, with the interventions that act in it; None if it was not given as inputs."""

    corrupted: Plan | None

    cache: ActivationCache | None
    """Activations of the clean run, if those were given."""

    direction: Direction
    tokenizer: Any = None

    @property
    def base(self) -> Plan:
        """The run that is patched."""
        found = self.corrupted if self.direction == "denoise" else self.clean
        assert found is not None
        return found

    @property
    def other(self) -> Plan | None:
        """The other one."""
        return self.clean if self.direction == "denoise" else self.corrupted

    @property
    def noising(self) -> bool:
        """Whether the clean run is the one that is patched."""
        return self.direction == "noise"

    @classmethod
    def of(cls, model: nn.Module, clean: Any, corrupted: Any, direction: Any, swaps: bool) -> Pair:
        """The runs of a sweep, checked.

        Args:
            model: A model, or an `IntervenableModel`.
            clean: Inputs or activations of the clean run; None if nothing of it is needed.
            corrupted: Inputs of the corrupted run, likewise.
            direction: Which of them is patched; None for the usual.
            swaps: Whether the values come from the other run.

        Raises:
            UnknownNameError: no such direction.
            ConfigError: a run that is needed is missing, or the model is in training mode.
            InputError: inputs that do not fit, or of different numbers of examples.
        """
        if direction is None:
            direction = "denoise" if swaps else "noise"
        if direction not in DIRECTIONS:
            raise UnknownNameError(unknown_name("direction", direction, DIRECTIONS))
        intervenable = model if isinstance(model, IntervenableModel) else None
        wrapped = model.model if isinstance(model, IntervenableModel) else model
        if not isinstance(wrapped, nn.Module):
            raise ConfigError(f"model is a {type(wrapped).__name__}, not a torch module.")
        if wrapped.training:
            raise ConfigError(
                f"The {type(wrapped).__name__} is in training mode, where dropout makes every run another. Call"
                " model.eval() first."
            )
        cache = clean if isinstance(clean, ActivationCache) else None
        given = {"clean": None if cache is not None else clean, "corrupted": corrupted}
        needed = "corrupted" if direction == "denoise" else "clean"
        other = "clean" if direction == "denoise" else "corrupted"
        if given[needed] is None:
            raise ConfigError(
                f"direction={direction!r} patches the {needed} run, so that its inputs are needed."
            )
        if swaps and given[other] is None and cache is None:
            raise ConfigError(
                f"direction={direction!r} puts activations of the {other} run in, and none was given. Give {other}"
                " or another value: value='zero', 'mean', 'resample' or a number."
            )
        read = {
            name: None if item is None else read_inputs(item, wrapped, name) for name, item in given.items()
        }
        batch = max(run.batch for run in read.values() if run is not None)
        plans: dict[str, Plan | None] = {}
        for name, run in read.items():
            if run is None:
                plans[name] = None
                continue
            if run.batch != batch and not (name == "clean" and run.batch == 1):
                sizes = {key: one.batch for key, one in read.items() if one is not None}
                raise InputError(
                    f"clean has {sizes['clean']} examples and corrupted {sizes['corrupted']}. Give pairs: as many of"
                    " one as of the other (or a single clean one)."
                )
            run = run if run.batch == batch else repeated(run, batch)
            plans[name] = (
                Plan(run, (), (), ())
                if intervenable is None
                else intervenable._plan(run.args or dict(run.kwargs), None, None, None, None, "tokens")
            )
        tokenizer = intervenable.tokenizer if intervenable is not None else None
        return cls(wrapped, plans["clean"], plans["corrupted"], cache, direction, tokenizer)


def repeated(inputs: RunInputs, times: int) -> RunInputs:
    """The inputs of one example as those of several equal ones.

    Also of several examples, group after group.
    """

    def more(item: Any, axis: int = 0, name: str = "") -> Any:
        if not isinstance(item, Tensor) or item.dim() <= axis:
            return item
        by_picture = is_by_picture(name, item, inputs.batch, inputs.length)
        return torch.cat([item] * times, axis) if by_picture or item.shape[axis] == inputs.batch else item

    axis = 1 if inputs.time_first else 0
    kwargs: Mapping[str, Any] = {key: more(item, axis, key) for key, item in inputs.kwargs.items()}
    args = tuple(more(item, axis) for item in inputs.args)
    decoder = inputs.decoder
    return replace(
        inputs,
        args=args,
        kwargs=kwargs,
        given=None if args else kwargs,
        batch=inputs.batch * times,
        attention_mask=more(inputs.attention_mask),
        input_ids=more(inputs.input_ids, axis),
        decoder=None if decoder is None else repeated(decoder, times),
    )
