"""The temperature that soft masks share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from interventions.errors import InterventionArgumentError


class Tempered(nn.Module):
    """A module with a temperature: the lower it is, the harder the module's soft mask.

    A buffer, so that it is saved but not trained, unless it was asked to be a parameter.
    """

    temperature: Tensor
    """The temperature, a tensor without axes."""
    trainable_temperature: bool
    """Whether the temperature is a parameter."""

    def set_temperature(self, value: float | Tensor) -> None:
        """Set the temperature, usually step by step from high to low while training.

        Raises:
            InterventionArgumentError: `value` is not a positive, finite number.

        Example:
            >>> from interventions import SigmoidMaskIntervention
            >>> mask = SigmoidMaskIntervention(4)
            >>> mask.set_temperature(0.5)
            >>> mask.temperature
            tensor(0.5000)
        """
        number = float(value)
        if not (math.isfinite(number) and number > 0):
            raise InterventionArgumentError(f"temperature={value!r} is out of range; give a number above 0.")
        with torch.no_grad():
            self.temperature.fill_(number)

    def _start_temperature(self, value: float, trainable: bool) -> None:
        start = torch.ones(())
        if trainable:
            self.temperature = nn.Parameter(start)
        else:
            self.register_buffer("temperature", start)
        self.trainable_temperature = trainable
        self.set_temperature(value)
