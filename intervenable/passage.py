"""One passage of tensors through a module, and the slots in which they come and go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from intervenable.errors import UnsupportedModelError
from model_maps import Side


class Passage:
    """One call of a module: what goes in, what comes out, and what our edits make of it."""

    def __init__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None
    ) -> None:
        self.module = module
        self.args = args
        self.kwargs = kwargs
        self.output = output
        self.changed = False
        self.repeated = False
        """Whether this is not the first passage of its kind in one call of the module."""

    def take(self, side: Side, slot: str | int | None) -> Tensor:
        """The tensor in a slot of the inputs or of the output."""
        found = self._input(slot) if side == "input" else _item(self.output, slot)
        if not isinstance(found, Tensor):
            where = "first" if slot is None else repr(slot)
            raise UnsupportedModelError(
                f"{type(self.module).__name__} has no tensor in the {where} {side} slot, but {type(found).__name__}."
            )
        if found.is_nested:
            raise UnsupportedModelError(
                f"{type(self.module).__name__} is given or gives a nested tensor, which has no positions to count."
                " Set use_nested_tensor = False on torch's TransformerEncoder."
            )
        return found

    def put(self, side: Side, slot: str | int | None, value: Tensor) -> None:
        """Let the call go on with another tensor in a slot; nothing of the caller's is changed."""
        self.changed = True
        if side == "output":
            self.output = _with_item(self.output, slot, value)
            return
        key = self._input_key(slot)
        if isinstance(key, int):
            self.args = (*self.args[:key], value, *self.args[key + 1 :])
        else:
            self.kwargs = {**self.kwargs, key: value}

    def _input_key(self, slot: str | int | None) -> str | int:
        if slot is not None:
            return slot
        if self.args:
            return 0
        return "hidden_states" if "hidden_states" in self.kwargs else next(iter(self.kwargs), 0)

    def _input(self, slot: str | int | None) -> Any:
        key = self._input_key(slot)
        if isinstance(key, int):
            return self.args[key] if key < len(self.args) else None
        return self.kwargs.get(key)


class InsidePassage(Passage):
    """One tensor that a module computes inside itself, and what our edits make of it."""

    def __init__(self, module: nn.Module, tensor: Tensor, repeated: bool = False) -> None:
        super().__init__(module, (), {})
        self.tensor = tensor
        self.repeated = repeated

    def take(self, side: Side, slot: str | int | None) -> Tensor:
        """The tensor."""
        return self.tensor

    def put(self, side: Side, slot: str | int | None, value: Tensor) -> None:
        """Let the module go on with another tensor."""
        self.changed = True
        self.tensor = value


def _item(output: Any, slot: str | int | None) -> Any:
    if slot is None:
        if isinstance(output, Tensor):
            return output
        if isinstance(output, Mapping):
            return next(iter(output.values()), None)
        return output[0] if isinstance(output, Sequence) and output else None
    if isinstance(slot, str) and not isinstance(output, Mapping):
        return getattr(output, slot, None)
    return output[slot]


def _with_item(output: Any, slot: str | int | None, value: Tensor) -> Any:
    if isinstance(output, Tensor):
        return value
    if isinstance(output, Mapping):
        key = next(iter(output)) if slot is None else slot
        return type(output)(**{**output, str(key): value})
    position = 0 if slot is None else int(slot)
    items = [*output[:position], value, *output[position + 1 :]]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*items)
    return type(output)(items)
