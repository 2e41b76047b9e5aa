"""Optimizers, and what changes while a training goes on: learning rate and temperature."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from intervenable.errors import ConfigError, unknown_name
from intervenable.model import IntervenableModel
from interventions import SigmoidMaskIntervention
from interventions.temperature import Tempered

OPTIMIZERS: Mapping[str, type[Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
OptimizerLike: TypeAlias = "str | type[Optimizer] | Optimizer | Callable[[list[nn.Parameter]], Optimizer]"
ScheduleLike: TypeAlias = "str | Callable[[Optimizer, int], LRScheduler]"
TemperatureLike: TypeAlias = "tuple[float, float] | Callable[[float], float] | None"

BOUNDLESS = (50.0, 0.1)
"""Temperature of learned boundaries and of masks in a rotated space, at the start and at the end, as in pyvene."""
MASK = (1.0, 0.01)
"""Temperature of masks over the coordinates as they are."""


def make_optimizer(
    given: Any,
    trainable: Mapping[str, nn.Parameter],
    frozen: Mapping[str, Tensor],
    lr: float,
    weight_decay: float,
) -> Optimizer:
    """The optimizer of these parameters.

    Args:
        given: A name, a class, a function of the parameters, or an optimizer.
        trainable: What trains, by name.
        frozen: What does not, by name, for messages.
        lr, weight_decay: Of an optimizer that is made here.

    Raises:
        ConfigError: no optimizer, or one of other parameters than these.
    """
    parameters = list(trainable.values())
    if isinstance(given, str):
        if given not in OPTIMIZERS:
            raise ConfigError(unknown_name("optimizer", given, OPTIMIZERS))
        given = OPTIMIZERS[given]
    if isinstance(given, Optimizer):
        optimizer = given
    elif inspect.isclass(given) and issubclass(given, Optimizer):
        options: dict[str, Any] = {"lr": lr}
        if "weight_decay" in inspect.signature(given).parameters:
            options["weight_decay"] = weight_decay
        elif weight_decay:
            raise ConfigError(f"weight_decay={weight_decay}: {given.__name__} has none. Leave it out.")
        optimizer = given(parameters, **options)
    elif callable(given):
        optimizer = given(parameters)
    else:
        raise ConfigError(
            f"optimizer={given!r} is a {type(given).__name__}. Give one of {', '.join(OPTIMIZERS)}, a class or an"
            " instance of torch.optim, or a function of the parameters."
        )
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(f"optimizer gave a {type(optimizer).__name__}, not a torch.optim.Optimizer.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("LBFGS measures the loss itself, several times a step. Give another optimizer.")
    _check_parameters(optimizer, trainable, frozen)
    return optimizer


def _check_parameters(
    optimizer: Optimizer, trainable: Mapping[str, nn.Parameter], frozen: Mapping[str, Tensor]
) -> None:
    """That an optimizer has what trains, and nothing else."""
    own = {id(parameter) for parameter in trainable.values()}
    known = {id(tensor): name for name, tensor in frozen.items()}
    held = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for tensor in held:
        if id(tensor) in own:
            continue
        name = known.get(id(tensor))
        if name is None:
            raise ConfigError(
                f"The optimizer has a parameter of shape {tuple(tensor.shape)} that is none of this model's. Make it"
                " of model.parameters()."
            )
        why = (
            "is part of the wrapped model, which is frozen while its interventions train. Leave it out, or train the"
            " model too: include_model=True."
            if name.startswith("model.")
            else "is frozen (requires_grad is False). Leave it out, or unfreeze it."
        )
        raise ConfigError(f"The optimizer has {name!r}, which {why}")
    missing = [name for name, tensor in trainable.items() if all(tensor is not other for other in held)]
    if missing and len(missing) == len(trainable):
        raise ConfigError(f"The optimizer has none of what trains: {', '.join(missing[:5])}.")


def make_schedule(given: Any, optimizer: Optimizer, steps: int, warmup: float) -> LRScheduler:
    """The schedule of the learning rate over so many steps.

    `linear`, `cosine` and `constant` rise evenly over the warm-up, whose last step has the full rate, and then fall
    to zero behind the last step, on a line or half a cosine, or stay.

    Raises:
        ConfigError: no schedule, or a warm-up that is none.
    """
    if isinstance(given, str):
        if given not in _SHAPES:
            raise ConfigError(unknown_name("schedule", given, _SHAPES))
        return LambdaLR(optimizer, _factor(_SHAPES[given], steps, warmup_steps(warmup, steps)))
    if not callable(given):
        raise ConfigError(
            f"schedule={given!r} is a {type(given).__name__}. Give one of {', '.join(_SHAPES)}, or a function of the"
            " optimizer and the number of steps that gives a schedule of torch.optim.lr_scheduler."
        )
    schedule = given(optimizer, steps)
    if isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau) or not isinstance(
        schedule, LRScheduler
    ):
        raise ConfigError(
            f"schedule gave a {type(schedule).__name__}. Give a torch.optim.lr_scheduler.LRScheduler that needs no"
            " metric."
        )
    return schedule


def warmup_steps(warmup: Any, steps: int) -> int:
    """How many steps a warm-up takes: a share of them below 1, else a number.

    Raises:
        ConfigError: below 0, or longer than all.
    """
    if not isinstance(warmup, (int, float)) or not 0 <= warmup <= steps:
        raise ConfigError(
            f"warmup={warmup!r}: give a share of the {steps} steps (from 0 to below 1), or a number of steps."
        )
    return int(warmup * steps) if warmup < 1 else int(warmup)


def _factor(shape: Callable[[float], float], steps: int, warmup: int) -> Callable[[int], float]:
    """By what the learning rate of a step is multiplied."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return shape(min(1.0, (step - warmup) / max(1, steps - warmup)))

    return factor  # a function: of an object the schedule would keep the attributes in its state


_SHAPES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda share: 1 - share,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "constant": lambda share: 1.0,
}


class Temperatures:
    """The temperature of every intervention that has one, as a function of how much of the training is done.

    Args:
        given: `(start, end)`, between which it falls evenly; a function of the share of the training that is done;
            None for `BOUNDLESS` and `MASK`, each for what it is meant for, and nothing where it is itself trained.
        model: Whose temperatures.

    Raises:
        ConfigError: something else, or no intervention with a temperature.
    """

    def __init__(self, given: Any, model: IntervenableModel) -> None:
        self.now: float | None = None
        distinct = {id(one): one for one in model.interventions.values()}
        found: list[Any] = [one for one in distinct.values() if isinstance(one, Tempered)]
        self._schedules: list[tuple[Tempered, Callable[[float], float]]] = []
        if given is None:
            for one in found:
                if not one.trainable_temperature:
                    ends = MASK if isinstance(one, SigmoidMaskIntervention) else BOUNDLESS
                    self._schedules.append((one, _line(*ends)))
            return
        if not found:
            kinds = ", ".join(sorted({type(one).__name__ for one in distinct.values()}))
            raise ConfigError(f"temperature={given!r}: no intervention has one. There are: {kinds}.")
        if callable(given):
            schedule = given
        elif isinstance(given, (list, tuple)) and len(given) == 2 and all(_positive(end) for end in given):
            schedule = _line(*given)
        else:
            raise ConfigError(
                f"temperature={given!r}: give (start, end), both above 0, or a function of the share of the training"
                " that is done."
            )
        self._schedules = [(one, schedule) for one in found]

    def set(self, share: float) -> None:
        """Set those of this moment."""
        values = []
        for intervention, schedule in self._schedules:
            value = float(schedule(share))
            if not _positive(value):
                raise ConfigError(
                    f"temperature gave {value!r} at {share:.2f} of the training; give a number above 0."
                )
            intervention.set_temperature(value)
            values.append(value)
        self.now = values[0] if values else None


def _line(start: float, end: float) -> Callable[[float], float]:
    return lambda share: start * (1 - share) + end * share


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value > 0


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients as one vector."""
    if not gradients:
        return torch.zeros(())
    first = gradients[0].device
    norms = torch._foreach_norm(list(gradients))
    found: Tensor = torch.stack([norm.float().to(first) for norm in norms]).norm()
    return found
