"""What can be chosen about a tiny twin: how narrow it gets, and which layers it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


class Shown(Protocol):
    """Which layers of a stack a small model has."""

    def __call__(self, count: int, *, sharing: int = 0, listed: bool = False) -> tuple[int, ...]:
        """The layers, in order.

        Args:
            count: How many the stack has.
            sharing: How many of the last ones use the keys and values of layers before.
            listed: Whether the config lists the kinds of its layers, so that others than the first can be chosen.
        """


@dataclass(frozen=True)
class TwinShape:
    """What can be tried where the usual twin of a config does not run."""

    narrow: int = 8
    """About how wide heads become whose width follows from the hidden size."""

    window: int = 4
    """Positions in a sliding window."""

    mlp: int = 48
    """Width of the widest MLP."""

    most_columns: int = 512
    """Columns of all heads together from which on they become narrow even where their width is stated apart."""

    stages: int = 4
    """By how much the widths of stages become narrower, where towers have several."""

    heads_divide: bool = False
    """Whether the hidden size stays a multiple of the number of heads where it need not be."""

    even_stacks: bool = False
    """Whether all stacks get as many layers as the one that needs most."""

    first_layers: bool = False
    """Whether its layers are the first ones of the model even where the config lists their kinds."""

    stated_fields_alone: bool = False
    """Whether what equals the default of its field is left to the config to work out again."""
