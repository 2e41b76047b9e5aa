"""The values that a variable of a causal model may take, and when two of them are the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from intervenable.errors import ConfigError, InputError

Setting = Mapping[str, Any]
"""Values by variable: of some of them, or of all."""

SHOWN = 12
"""How many values a message lists."""


def same(left: Any, right: Any) -> bool:
    """Whether two values are equal, also where they are arrays or tensors.

    Example:
        >>> same((1, 2), (1, 2)), same(torch.zeros(2), torch.zeros(2)), same(torch.zeros(2), 0)
        (True, True, False)
    """
    if left is right:
        return True
    if isinstance(left, (Tensor, np.ndarray)) or isinstance(right, (Tensor, np.ndarray)):
        first, second = np.asarray(left), np.asarray(right)
        return first.shape == second.shape and bool((first == second).all())
    return bool(left == right)


class Domain:
    """The values that one variable may take, in the order in which they were declared.

    Args:
        variable: Whose they are, for messages.
        values: The values; None if anything goes.

    Raises:
        ConfigError: no values, or one of them twice.
    """

    def __init__(self, variable: str, values: Iterable[Any] | None) -> None:
        self.variable = variable
        self.values: Sequence[Any] | None = None if values is None else tuple(values)
        self._places: dict[Any, int] | None = None
        if self.values is None:
            return
        if not self.values:
            raise ConfigError(
                f"Variable {variable!r} has no values. List what it may be, or None for anything."
            )
        try:
            self._places = {}
            for place, value in enumerate(self.values):
                self._places.setdefault(value, place)
        except TypeError:  # arrays and lists cannot be looked up, only compared
            self._places = None
        if self._places is not None and len(self._places) < len(self.values):
            twice = next(value for place, value in enumerate(self.values) if self._places[value] != place)
            raise ConfigError(f"Variable {variable!r} lists the value {twice!r} twice. Each may occur once.")

    def listed(self, why: str) -> Sequence[Any]:
        """Its values one by one.

        Raises:
            InputError: anything goes; the message says `why` they are needed.
        """
        if self.values is None:
            raise InputError(
                f"Variable {self.variable!r} was declared without values, which are needed to {why}. List them in"
                " `values`, or give a sampler of your own."
            )
        return self.values

    def place(self, value: Any) -> int | None:
        """Where among the declared values it is; None if it is none of them."""
        if self._places is not None:
            try:
                found = self._places.get(value)
            except TypeError:
                found = None
            if found is not None:
                return found
        return next((place for place, member in enumerate(self.values or ()) if same(member, value)), None)

    def member(self, value: Any) -> Any:
        """The declared value that this one is equal to.

        Raises:
            InputError: there is none.
        """
        if self.values is None:
            return value
        place = self.place(value)
        if place is None:
            raise InputError(f"{self.variable!r} cannot be {value!r}. Its values: {self.summary()}.")
        return self.values[place]

    def summary(self) -> str:
        """Its values for a message, the first few if there are many."""
        if self.values is None:
            return "anything"
        shown = ", ".join(map(repr, self.values[:SHOWN]))
        return shown if len(self.values) <= SHOWN else f"{shown}, ... ({len(self.values)} in all)"


def as_numbers(value: Any) -> list[float]:
    """A value as numbers in a row: a vector as its coordinates, a number or a truth value as one.

    Raises:
        InputError: it is nothing of that kind.

    Example:
        >>> as_numbers((1, 2.5)), as_numbers(True)
        ([1.0, 2.5], [1.0])
    """
    try:
        return [float(number) for number in torch.as_tensor(value).flatten().tolist()]
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{value!r} cannot be written as numbers. Give an encoding of your own: `encode=lambda setting: [...]`."
        ) from None
