"""One forward pass written down: every call of every module with what went in and came out, and the functions met.

What the parts of an architecture are is read off such a trace: nothing is known of the model but its modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from intervenable.attention_mode import FUSED, OPENED, PRODUCTS, PRODUCTS_ADDED, SOFTMAX, WHOLE
from intervenable.hooks import Hook, NthCall, hooked
from intervenable.passage import Passage
from model_maps import Side

Slot = str | int | None
"""Where a tensor is among the inputs or outputs of a call; None: it is the output."""

TOP = (torch.topk, Tensor.topk)
LINEAR = (nn.functional.linear, torch.nn.functional.linear)
NAMES: Mapping[Any, str] = {
    **dict.fromkeys(SOFTMAX, "softmax"),
    **dict.fromkeys((*PRODUCTS, *PRODUCTS_ADDED), "product"),
    **dict.fromkeys((torch.einsum,), "einsum"),
    **dict.fromkeys(TOP, "top"),
    **dict.fromkeys(LINEAR, "linear"),
    FUSED: "fused",
}
"""The functions that a trace notes, and what it calls them."""


@dataclass(eq=False)
class Call:
    """One call of one module."""

    path: str
    """The module's path in the model; "" is the model."""

    module: nn.Module

    number: int
    """How often the module had been called before."""

    entered: int
    """When it was entered, counted in events of the pass."""

    parent: Call | None
    """The call that was running then."""

    inputs: dict[Slot, Tensor]
    """The tensors given: by position and by keyword."""

    outputs: dict[Slot, Tensor] = field(default_factory=dict)
    """The tensors returned, as they were then."""

    left: int = -1
    """When it was left; -1 if it never was."""

    met: list[Met] = field(default_factory=list)
    """The functions that were called while it was the innermost module running."""

    children: list[Call] = field(default_factory=list)
    """The calls made inside it, in order."""

    of_parts: bool = False
    """Whether the module was not called, and this is put together from the calls of its parts."""

    @property
    def entrance(self) -> Call:
        """The call whose inputs these are: itself, or that of the first part."""
        return self.children[0] if self.of_parts else self

    @property
    def exit(self) -> Call:
        """The call whose outputs these are: itself, or that of the last part."""
        return max(self.children, key=lambda call: call.left) if self.of_parts else self

    @property
    def main_input(self) -> Tensor | None:
        """What a site without a slot reads going in."""
        key = self.main_input_slot
        return None if key is None else self.inputs[key]

    @property
    def main_input_slot(self) -> Slot:
        """The slot of `main_input`: the first argument, else `hidden_states`, else the first tensor by keyword."""
        if 0 in self.inputs:
            return 0
        return "hidden_states" if "hidden_states" in self.inputs else next(iter(self.inputs), None)

    @property
    def main_output(self) -> Tensor | None:
        """What a site without a slot reads coming out: the output itself, else its first tensor."""
        return next(iter(self.outputs.values()), None)

    def tensor_at(self, side: Side, slot: Slot) -> Tensor | None:
        """What is in a slot of what it was given or returned; without a slot the main one."""
        if side == "input":
            return self.main_input if slot is None else self.inputs.get(slot)
        return self.main_output if slot is None else self.outputs.get(slot)

    def inside(self) -> Iterator[Call]:
        """All calls made inside this one, however deep, in order."""
        for child in self.children:
            yield child
            yield from child.inside()

    def met_inside(self) -> list[Met]:
        """The functions met in this call and in all calls inside it, in order."""
        found = [*self.met, *(met for call in self.inside() for met in call.met)]
        return sorted(found, key=lambda met: met.at)


@dataclass(eq=False)
class Met:
    """One call of one function of `NAMES`."""

    name: str
    function: Callable[..., Any]
    at: int
    call: Call
    """The innermost module that was running."""

    given: tuple[Tensor, ...]
    """The tensors among its arguments, in order."""

    returned: Tensor | None
    """The tensor it returned (of several the first)."""


@dataclass(eq=False)
class Trace:
    """All calls of one forward pass, in the order in which modules were entered."""

    calls: list[Call]
    output: Any
    """What the model returned."""

    def __post_init__(self) -> None:
        self._by_path: dict[str, list[Call]] = {}
        for call in self.calls:
            self._by_path.setdefault(call.path, []).append(call)

    def of(self, path: str) -> list[Call]:
        """The calls of the module at a path, in order."""
        return self._by_path.get(path, [])

    def call_at(self, path: str, call: NthCall | None = None) -> Call | None:
        """The first call of the module at a path, or that which is meant; None if it is not called so often."""
        calls = self.of(path)
        nth = 0 if call is None else call.nth
        return calls[nth] if nth < len(calls) else None

    def insert(self, call: Call, before: Call) -> None:
        """Note a call that no module made, in front of another one."""
        self.calls.insert(self.calls.index(before), call)
        self._by_path.setdefault(call.path, []).append(call)

    @property
    def root(self) -> Call:
        """The call of the model itself."""
        return self.calls[0]


def paths_of(module: nn.Module) -> dict[nn.Module, str]:
    """The modules in a module and itself, each with the first path at which it is.

    Example:
        >>> shared = nn.ReLU()
        >>> list(paths_of(nn.Sequential(shared, nn.Sequential(shared))).values())
        ['', '0', '1']
    """
    return {part: path for path, part in module.named_modules()}


def trace(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    gradients: bool = False,
    extra: Sequence[Hook] = (),
    within: nn.Module | None = None,
) -> Trace:
    """Run a model once and write down what happens.

    Args:
        model: The model, small enough that all its activations fit into memory at once.
        inputs: Its keyword inputs.
        gradients: Whether the tensors kept are those of the autograd graph; otherwise they are copies.
        extra: Hooks of the caller's, which act before the trace reads.
        within: A module of it: of others nothing is written down, but for the model itself.
    """
    recorder = _Recorder(gradients)
    parts = None if within is None else {model, *within.modules()}
    paths = {part: path for part, path in paths_of(model).items() if parts is None or part in parts}
    hooks = [*extra]
    for module, path in paths.items():
        hooks += [Hook(module, side, recorder.noting(module, path, side)) for side in ("input", "output")]
    with torch.set_grad_enabled(gradients), _Meeting(recorder), hooked(hooks, model):
        output = model(**inputs)
    return Trace(recorder.calls, output)


class _Recorder:
    def __init__(self, gradients: bool) -> None:
        self.calls: list[Call] = []
        self.now = 0
        self._running: list[Call] = []
        self._gradients = gradients
        self._copies: dict[int, tuple[Tensor, int, Tensor]] = {}

    @property
    def innermost(self) -> Call | None:
        return self._running[-1] if self._running else None

    def kept(self, tensor: Tensor) -> Tensor:
        if self._gradients:
            return tensor
        # Some models change what they return in place later on; what they do not is handed on many times.
        if tensor.is_inference():  # which counts no changes
            return tensor.clone()
        seen, version, copy = self._copies.get(id(tensor), (None, -1, tensor))
        if seen is not tensor or version != tensor._version:
            copy = tensor.detach().clone()
            self._copies[id(tensor)] = tensor, tensor._version, copy
        return copy

    def tick(self) -> int:
        self.now += 1
        return self.now

    def noting(self, module: nn.Module, path: str, side: Side) -> Callable[[Passage], None]:
        counts = {"times": 0}

        def enter(passage: Passage) -> None:
            given: dict[Slot, Any] = dict(enumerate(passage.args))
            given.update(passage.kwargs)
            inputs = {key: self.kept(value) for key, value in given.items() if isinstance(value, Tensor)}
            call = Call(path, module, counts["times"], self.tick(), self.innermost, inputs)
            counts["times"] += 1
            if call.parent is not None:
                call.parent.children.append(call)
            self.calls.append(call)
            self._running.append(call)

        def leave(passage: Passage) -> None:
            while self._running and self._running[-1].module is not module:
                self._running.pop()
            call = self._running.pop()
            call.outputs = {key: self.kept(value) for key, value in _tensors(passage.output).items()}
            call.left = self.tick()

        return enter if side == "input" else leave


def _tensors(output: Any) -> dict[Slot, Tensor]:
    if isinstance(output, Tensor):
        return {None: output}
    items: Any = output.items() if isinstance(output, Mapping) else ()
    if isinstance(output, (tuple, list)):
        items = enumerate(output)
    return {key: value for key, value in items if isinstance(value, Tensor)}


class _Meeting(TorchFunctionMode):
    """Notes the functions of `NAMES` as the model calls them."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is WHOLE:
            with self:
                return OPENED(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        name, call = NAMES.get(func), self._recorder.innermost
        if name is not None and call is not None:
            kept = self._recorder.kept
            given: list[Tensor] = []
            for value in (*args, *(kwargs or {}).values()):
                given += [
                    item
                    for item in (value if isinstance(value, (tuple, list)) else (value,))
                    if isinstance(item, Tensor)
                ]
            first = result[0] if isinstance(result, tuple) else result
            returned = kept(first) if isinstance(first, Tensor) else None
            call.met.append(Met(name, func, self._recorder.tick(), call, tuple(map(kept, given)), returned))
        return result
