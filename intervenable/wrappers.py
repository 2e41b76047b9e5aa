"""Models inside of others: compiled ones, adapters, replicas."""

from __future__ import annotations

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without torch.compile, adapters and data parallel around it."""
    return model.get_submodule(wrapping_path(model))


def wrapping_path(model: nn.Module) -> str:
    """Path of the model itself inside its wrappers; "" if there are none.

    Example:
        >>> wrapping_path(nn.DataParallel(nn.Linear(2, 2))), wrapping_path(nn.Linear(2, 2))
        ('module', '')
    """
    steps: list[str] = []
    at = model
    while (step := _step(at)) is not None:
        steps.append(step)
        at = at.get_submodule(step)
    return ".".join(steps)


def _step(model: nn.Module) -> str | None:
    if "_orig_mod" in model._modules:
        return "_orig_mod"
    if hasattr(model, "peft_config") and "base_model" in model._modules:
        # Adapters that change modules sit in a tuner around the model; prompts stand before the model itself.
        tuned = isinstance(getattr(model.base_model, "model", None), nn.Module) and hasattr(
            model.base_model, "targeted_module_names"
        )
        return "base_model.model" if tuned else "base_model"
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    return None
