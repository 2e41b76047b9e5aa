"""Sees what a module computes by a function of torch's, such as a router's logits before it chooses among them.

Today's routers compute logits, turn them into weights and choose the experts in one module: what it hands over is too
late to be written. So the function is met where the module calls it. As in `attention_mode`, a `TorchFunctionMode` is
known to its own thread alone, and `hooks` has it on from where the module is entered to where it is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from intervenable.attention_mode import SOFTMAX
from intervenable.passage import InsidePassage, Passage
from model_maps import FunctionName

FUNCTIONS: Mapping[FunctionName, tuple[Any, ...]] = {
    "linear": (nn.functional.linear,),
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
        self._met: dict[FunctionName, int] = {}
        self.awake = True
        """Whether it looks at what is computed; not at what edits inside the module compute."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _NAMES.get(func)
        if name is None or not self.awake or name not in self._wanted:
            return result
        nth = self._met.get(name, 0)
        self._met[name] = nth + 1
        for hook in self._hooks:
            if hook.function == name and hook.nth == nth:
                result = self._shown(hook, result)
        return result

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
