"""What a call gives back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from intervenable.receipt import Receipt


@dataclass(frozen=True)
class IntervenableOutput:
    """The outcome of a call. Unpacks as, and is indexable like, the pair `(original, intervened)`."""

    original: Any
    """The model's output without interventions; None unless `output_original_output=True`."""

    intervened: Any
    """The model's output with all interventions, of the type that the model itself returns."""

    receipt: Receipt = field(repr=False)
    """What was touched, how often and by how much."""

    collected: Mapping[str, Tensor] = field(default_factory=dict)
    """What the collecting interventions read, by name, in declared order: `[b, n, d]`, by heads `[b, heads, n, dh]`.
    Where examples have different numbers of units the rest is zero, and `collected_mask` tells which is which."""

    collected_mask: Mapping[str, Tensor] = field(default_factory=dict)
    """For ragged readings: True where `collected` holds a unit."""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.original, self.intervened))

    def __getitem__(self, index: int) -> Any:
        return (self.original, self.intervened)[index]

    def __len__(self) -> int:
        return 2

    @property
    def original_outputs(self) -> Any:
        """The same as `original`."""
        return self.original

    @property
    def intervened_outputs(self) -> Any:
        """The same as `intervened`."""
        return self.intervened

    @property
    def collected_activations(self) -> list[Tensor]:
        """The readings as a list, in declared order."""
        return list(self.collected.values())
