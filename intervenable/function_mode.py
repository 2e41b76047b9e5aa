"""Sees what a module computes by a function of torch's, such as a router's logits before it chooses among them.

Today's routers compute logits, turn them into weights and choose the experts in one module: what it hands over is too
late to be written. So the function is met where the module calls it. As in `attention_mode`, a `TorchFunctionMode` is
known to its own thread alone, and `hooks` has it on from where the module is entered to where it is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from intervenable.attention_mode import OPENED, SOFTMAX, WHOLE
from intervenable.linear_maps import is_matrix_of
from intervenable.passage import InsidePassage, Passage
from model_maps import FunctionName, Side

FUNCTIONS: Mapping[FunctionName, tuple[Any, ...]] = {
    "linear": (nn.functional.linear,),
    "einsum": (torch.einsum,),
    "softmax": SOFTMAX,
    "top": (torch.topk, Tensor.topk),
}
"""The functions that can be met, by the names that maps have for them."""

_NAMES: Mapping[Any, FunctionName] = {
    function: name for name, functions in FUNCTIONS.items() for function in functions
}


class FunctionHook(NamedTuple):
    """Something to do with what one function hands over inside a module."""

    function: FunctionName
    act: Callable[[Passage], None]

    nth: int = 0
    """Which of the function's calls inside one call of the module, counted from 0."""

    slot: int | None = None
    """Which of several tensors it hands over; None if it is one."""

    weight: str | None = None
    """The parameter of the module that it multiplies with; None: whatever it is given. `nth` counts such calls."""

    side: Side = "output"
    """Whether what is multiplied with the weight is meant, or what the function hands over."""


class FunctionMode(TorchFunctionMode):
    """Lets hooks see and change what functions hand over in one call of one module.

    Args:
        module: The module.
        hooks: What to do with what, in this order where several are at one place.
    """

    def __init__(self, module: nn.Module, hooks: Sequence[FunctionHook]) -> None:
        super().__init__()
        self._module = module
        self._hooks = hooks
        self._wanted = {hook.function for hook in hooks}
        self._met: dict[tuple[FunctionName, str | None], int] = {}
        self.awake = True
        """Whether it looks at what is computed; not at what edits inside the module compute."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is WHOLE and self.awake:
            with self:
                return OPENED(*args, **kwargs)
        name = _NAMES.get(func)
        if name is None or not self.awake or name not in self._wanted:
            return func(*args, **kwargs)
        weights = {hook.weight for hook in self._hooks if hook.function == name}
        weights = {weight for weight in weights if weight is None or self._is_given(weight, args, kwargs)}
        times = {weight: self._met.get((name, weight), 0) for weight in weights}
        self._met.update({(name, weight): count + 1 for weight, count in times.items()})
        hooks = [hook for hook in self._hooks if hook.function == name and times.get(hook.weight) == hook.nth]
        for hook in hooks:
            if hook.weight is not None and hook.side == "input":
                args, kwargs = self._given(hook, hook.weight, args, kwargs)
        result = func(*args, **kwargs)
        for hook in hooks:
            if hook.weight is None or hook.side == "output":
                result = self._shown(hook, result)
        return result

    def _is_given(self, weight: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        parameter = _parameter(self._module, weight)
        tensors = _tensors(args, kwargs)
        return parameter is not None and any(is_matrix_of(tensor, parameter) for _, tensor in tensors)

    def _given(
        self, hook: FunctionHook, weight: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with what a hook makes of the first tensor that is not the weight."""
        parameter = _parameter(self._module, weight)
        tensors = _tensors(args, kwargs)
        place, tensor = next((place, one) for place, one in tensors if not is_matrix_of(one, parameter))
        passage = InsidePassage(self._module, tensor)
        hook.act(passage)
        if not passage.changed:
            return args, kwargs
        first, *rest = place
        if isinstance(first, str):
            return args, {**kwargs, first: passage.tensor}
        new: Any = passage.tensor
        if rest:  # `einsum` takes its tensors as a list too
            new = [new if at == rest[0] else one for at, one in enumerate(args[first])]
        return (*args[:first], new, *args[first + 1 :]), kwargs

    def _shown(self, hook: FunctionHook, result: Any) -> Any:
        """What a hook makes of the result of its function."""
        passage = InsidePassage(self._module, result if hook.slot is None else result[hook.slot])
        hook.act(passage)
        if not passage.changed:
            return result
        if hook.slot is None:
            return passage.tensor
        items = [passage.tensor if at == hook.slot else item for at, item in enumerate(result)]
        return type(result)(items)


def _parameter(module: nn.Module, name: str) -> Any:
    """A module's parameter as it is now, as some are put in place only while they are used; None if it has none."""
    try:
        path, _, own = name.rpartition(".")
        return getattr(module.get_submodule(path), own, None)
    except AttributeError:
        return None


def _tensors(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[tuple[int | str, ...], Tensor]]:
    """The tensors among arguments, each with its place."""
    for at, value in enumerate(args):
        if isinstance(value, (tuple, list)):
            yield from (((at, item), one) for item, one in enumerate(value) if isinstance(one, Tensor))
        elif isinstance(value, Tensor):
            yield (at,), value
    yield from (((name,), value) for name, value in kwargs.items() if isinstance(value, Tensor))
