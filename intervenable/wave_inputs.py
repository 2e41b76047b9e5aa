"""The inputs of a wave: the same examples several times, from one token to another."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.inputs import RunInputs
from intervenable.padding import with_position_ids
from intervenable.signatures import forward_signature, takes
from intervenable.stack_lengths import holds_codes, is_by_picture

MASK = "attention_mask"
POSITIONS = "position_ids"


class WaveInputs:
    """Inputs of one run as keyword arguments, to be repeated and cut.

    Args:
        inputs: The run.
        model: The model.
    """

    def __init__(self, inputs: RunInputs, model: nn.Module) -> None:
        names = list(forward_signature(model).parameters)
        self._kwargs: dict[str, Any] = {
            **dict(zip(names, inputs.args, strict=False)),
            **with_position_ids(inputs, model),
        }
        self.model = model
        self.batch, self.length, self.time_first = inputs.batch, inputs.length, inputs.time_first
        self.padded = inputs.real_positions is not None
        real: Sequence[Sequence[int]] = inputs.real_positions or [()] * inputs.batch
        self._order = sorted(range(inputs.batch), key=lambda example: len(real[example]))
        self.has_pictures = any(self._by_picture(name, item) for name, item in self._kwargs.items())
        """Whether a part of the tokens cannot be run alone, because pictures or sounds belong to some of them."""

    @property
    def kind(self) -> tuple[tuple[str, bool], ...]:
        """Which inputs there are, and whether each is given example by example."""
        items = sorted(self._kwargs.items())
        return tuple(
            (name, isinstance(item, Tensor) and self._counts_rows(name, item)) for name, item in items
        )

    def call(
        self, groups: int, start: int = 0, stop: int | None = None, cache: Any = None, keep: int = 0
    ) -> Any:
        """Run the model on several groups of the examples.

        Args:
            groups: How many.
            start: The first token; those before it are in the cache.
            stop: Where to end; None for the end.
            cache: Keys and values to go on with; True for whatever cache the model makes itself.
            keep: Of how many positions from the end logits are needed; 0 for all.
        """
        options: dict[str, Any] = {}
        if cache is True:
            options = {"use_cache": True}
        elif cache is not None:
            options = {"use_cache": True, "past_key_values": cache}
        elif "use_cache" not in self._kwargs and self._takes("use_cache"):
            options = {"use_cache": False}
        if keep and takes(self.model, "logits_to_keep"):
            options["logits_to_keep"] = keep
        with torch.no_grad():
            return self.model(**{**self.tensors(groups, start, stop), **options})

    def tensors(self, groups: int, start: int = 0, stop: int | None = None) -> dict[str, Any]:
        """The inputs of several groups, from a token to another."""
        return {
            name: self._repeated(name, self._cut(name, item, start, stop), groups)
            for name, item in self._kwargs.items()
        }

    def sample(self, examples: int) -> WaveInputs:
        """The same with a few examples alone, the one with most padding first; with all where they have pictures."""
        if examples >= self.batch or not self.is_divisible:
            return self
        part = copy.copy(self)
        rows = torch.tensor(self._order[: examples - 1] + self._order[-1:])
        part._kwargs = {
            name: item.index_select(self._row_axis, rows.to(item.device))
            if isinstance(item, Tensor) and self._counts_rows(name, item)
            else item
            for name, item in self._kwargs.items()
        }
        part.batch, part._order = examples, list(range(examples))
        return part

    def longer(self, more: int) -> WaveInputs:
        """The same with some more tokens at the end: those at the beginning once more."""
        part = copy.copy(self)
        length = self.length + more
        times = -(-length // self.length)
        part._kwargs = {
            name: torch.cat([item] * times, 1)[:, :length] if self._counts_tokens(name, item) else item
            for name, item in self._kwargs.items()
        }
        part.length = length
        return part

    def together_with(self, other: WaveInputs) -> dict[str, Any] | None:
        """The inputs of this run and another as one of two groups; None if they do not fit together."""
        if self._kwargs.keys() != other._kwargs.keys() or (self.batch, self.length) != (
            other.batch,
            other.length,
        ):
            return None
        joined: dict[str, Any] = {}
        for name, item in self._kwargs.items():
            there = other._kwargs[name]
            if not isinstance(item, Tensor) or not isinstance(there, Tensor):
                if item is not there and item != there:
                    return None
                joined[name] = item
            elif self._counts_rows(name, item) and item.shape == there.shape and item.dtype == there.dtype:
                joined[name] = torch.cat([item, there], self._row_axis)
            elif item.shape == there.shape and torch.equal(item, there):
                joined[name] = item
            else:
                return None
        return joined

    @property
    def _row_axis(self) -> int:
        return 1 if self.time_first else 0

    def _takes(self, name: str) -> bool:
        parameters = forward_signature(self.model).parameters
        return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())

    @property
    def is_divisible(self) -> bool:
        """Whether each example can be run without the others: whose pictures are whose is not known."""
        return all(
            item.shape[0] == self.batch
            for name, item in self._kwargs.items()
            if self._by_picture(name, item) and item.dim()
        )

    def _by_picture(self, name: str, item: Any) -> bool:
        return isinstance(item, Tensor) and is_by_picture(name, item, self.batch, self.length)

    def _counts_rows(self, name: str, item: Tensor) -> bool:
        if self._by_picture(name, item):
            return item.dim() > 0
        return item.dim() > self._row_axis and item.shape[self._row_axis] == self.batch

    def _counts_tokens(self, name: str, item: Any) -> bool:
        if not isinstance(item, Tensor) or item.dim() < 2 or item.shape[1] != self.length:
            return False
        return holds_codes(name, item, self.batch, self.length) or not self._by_picture(name, item)

    def _repeated(self, name: str, item: Any, groups: int) -> Any:
        if groups == 1 or not isinstance(item, Tensor) or not self._counts_rows(name, item):
            return item
        times = [1] * item.dim()
        times[self._row_axis] = groups
        return item.repeat(times)

    def _cut(self, name: str, item: Any, start: int, stop: int | None) -> Any:
        if not isinstance(item, Tensor) or (start == 0 and stop is None):
            return item
        if name == POSITIONS and item.shape[-1] == self.length:
            return item[..., start:stop]
        if not self._counts_tokens(name, item) or self.time_first:
            return item
        return item[:, :stop] if name == MASK else item[:, start:stop]
