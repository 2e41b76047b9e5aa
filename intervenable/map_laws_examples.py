"""Where the examples are in what a model is given and in what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import UnsupportedModelError
from intervenable.map_laws_groups import Group, Inputs
from intervenable.signatures import counts_time_first


class Examples:
    """How many examples inputs have, along which axes, and how several groups of them become one batch.

    Args:
        model: The model that is given them.
        inputs: Its keyword inputs, of one example or several.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        names = ("input_ids", "inputs_embeds", getattr(model, "main_input_name", ""), *inputs)
        main = next(v for name in names if isinstance(v := inputs.get(name), Tensor) and v.dim() > 0)
        self.time_first: bool = counts_time_first(model) and main.dim() == 3
        """Whether the axis of positions comes before that of examples."""
        self.count: int = main.shape[1 if self.time_first else 0]
        """How many there are."""

    def axis_of(self, name: str, value: Any) -> int | None:
        """The axis of examples of an input; None if it has none."""
        if not isinstance(value, Tensor) or value.dim() == 0 or name == "cache_position":
            return None
        second = (self.time_first and value.dim() == 3) or (name == "position_ids" and value.dim() == 3)
        return 1 if second else 0

    def first_of(self, inputs: Inputs) -> dict[str, Any] | None:
        """The inputs of the first example alone; None if one of them counts something other than examples."""
        first: dict[str, Any] = {}
        for name, value in inputs.items():
            axis = self.axis_of(name, value)
            if axis is not None and value.shape[axis] not in (1, self.count):
                return None
            first[name] = value if axis is None else value.narrow(axis, 0, 1)
        return first

    def stacked(self, inputs: Inputs, groups: list[Group], rows: int) -> dict[str, Any]:
        """The inputs of a pass of several groups, each with those that are its own.

        Args:
            inputs: What a group has that names no others.
            groups: In the order in which they are to follow each other.
            rows: Examples of one group.
        """
        return {name: self._stacked(name, value, groups, rows) for name, value in inputs.items()}

    def _stacked(self, name: str, value: Any, groups: list[Group], rows: int) -> Any:
        axis = self.axis_of(name, value)
        if axis is None or (name == "position_ids" and value.shape[axis] == 1 != rows):
            return value
        return torch.cat([group.inputs.get(name, value) for group in groups], axis)

    def in_output(self, output: Any) -> Tensor:
        """The main tensor of what the model returned, with the axis of examples in front."""
        tensor = main_tensor(output)
        return tensor.transpose(0, 1) if self.time_first and tensor.dim() == 3 else tensor


def _of_its_own(end: Any) -> Any:
    """Of vectors for each example of one tower beside each of the other, those of one and the same."""
    pairs = isinstance(end, Tensor) and end.dim() == 3 and end.shape[0] == end.shape[1]
    return end.diagonal().T if pairs else end


def main_tensor(output: Any) -> Tensor:
    """The logits, else what towers make of each example, else the first floating-point tensor of an output."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        # That of one tower is compared with those of all examples of the other.
        ends = [_of_its_own(value) for name, value in output.items() if str(name).endswith("_embeds")]
        if len(ends) > 1 and all(isinstance(end, Tensor) and end.dim() == 2 for end in ends):
            return torch.cat(ends, -1)
    items = list(output.values() if isinstance(output, Mapping) else output)
    inside = (inner for item in items if isinstance(item, (tuple, list)) for inner in item)
    for item in (*items, *inside):
        if isinstance(item, Tensor) and item.is_floating_point():
            return item
    raise UnsupportedModelError(f"{type(output).__name__}, which it returns, holds no floating-point tensor.")
