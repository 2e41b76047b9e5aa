"""The only file that registers hooks.

However a run ends, exactly our hooks are gone afterwards. While they are there they act for the thread that
registered them alone, so that several threads can run different interventions on one model.

One exception, with gradient checkpointing: backward then runs parts of the model a second time, which has to meet
the same edits. Hooks inside checkpointed layers stay until that cannot happen any more (the graph is freed by
backward, or goes with the output), and act for nothing but that second run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from intervenable.sites import Passage
from model_maps import Side

RECORDS = "transformers.utils.output_capturing"
"""Where the hooks come from by which transformers records hidden states."""


class Hook(NamedTuple):
    """Something to do at each passage through one side of a module."""

    module: nn.Module
    side: Side
    act: Callable[[Passage], None]


class Gate:
    """Says in which threads hooks act: the one that made it, until it leaves."""

    def __init__(self) -> None:
        self._threads = {get_ident()}

    def enter(self) -> None:
        """Let hooks act in this thread."""
        self._threads.add(get_ident())

    def leave(self) -> None:
        """Let them act in this thread no more."""
        self._threads.discard(get_ident())

    def open(self) -> bool:
        """Whether hooks act in this thread now."""
        return get_ident() in self._threads


def _register(hook: Hook, gate: Gate) -> RemovableHandle:
    """Attach one hook; it acts where the gate is open and is inert elsewhere."""

    # While another thread registers or removes hooks, torch may leave out the keyword inputs: look at the gate
    # first and at the rest after.
    def before(module: nn.Module, *rest: Any) -> Any:
        if not gate.open():
            return None
        passage = Passage(module, *rest)
        hook.act(passage)
        return (passage.args, passage.kwargs) if passage.changed else None

    def after(module: nn.Module, *rest: Any) -> Any:
        if not gate.open():
            return None
        passage = Passage(module, *rest)
        hook.act(passage)
        return passage.output if passage.changed else None

    if hook.side == "input":
        return hook.module.register_forward_pre_hook(before, with_kwargs=True)
    handle = hook.module.register_forward_hook(after, with_kwargs=True)
    _put_recorders_last(hook.module)
    return handle


def _put_recorders_last(module: nn.Module) -> None:
    """Let transformers record what our hooks make of an output.

    From the first call that asks for hidden states on, it leaves its hooks on the model.
    """
    hooks: Any = module._forward_hooks  # ordered, which torch's annotation does not say
    recording = [key for key, hook in hooks.items() if hook.__module__ == RECORDS]
    for key in recording:
        hooks.move_to_end(key)


@contextmanager
def hooked(hooks: Sequence[Hook], model: nn.Module | None = None) -> Iterator[Recomputation]:
    """Run the block with these hooks, which act in this order where several are at one place.

    Args:
        hooks: What to do where.
        model: The model that is run, if backward may run through it; None if nothing will be recomputed.
    """
    gate = Gate()
    recomputation = Recomputation(gate)
    layers = _checkpointed_layers(hooks, model)
    passing: list[RemovableHandle] = []
    try:
        for layer in dict.fromkeys(layers.values()):
            recomputation.watch(layer)
        for hook in hooks:
            handles = recomputation.handles if hook.module in layers else passing
            handles.append(_register(hook, gate))
        yield recomputation
    except BaseException:
        recomputation.remove()
        raise
    finally:
        gate.leave()
        for handle in passing:
            handle.remove()
        if not recomputation.waits:
            recomputation.remove()


# --- gradient checkpointing -------------------------------------------------------------------------------


def _checkpointed_layers(hooks: Sequence[Hook], model: nn.Module | None) -> dict[nn.Module, nn.Module]:
    """For each hooked module that backward will run again, the layer that is run again as a whole."""
    if model is None or not model.training or not torch.is_grad_enabled():
        return {}
    wanted = {hook.module for hook in hooks}
    return {
        part: layer
        for layer in model.modules()
        if getattr(layer, "gradient_checkpointing", False)
        and any(cls.__name__ == "GradientCheckpointingLayer" for cls in type(layer).__mro__)
        for part in layer.modules()
        if part in wanted
    }


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # the only way to ask; there is no public one


class Recomputation:
    """Hooks inside checkpointed layers, and the second run for which they stay.

    A layer that backward runs again is recognised by its inputs, which checkpointing keeps: the same memory, and the
    very same keyword objects, as in the run that was hooked.
    """

    def __init__(self, gate: Gate) -> None:
        self.handles: list[RemovableHandle] = []
        self.waits = False
        self._gate = gate
        self._seen: dict[int, list[tuple[int, Mapping[str, Any]]]] = {}
        self._tokens = 0

    def watch(self, layer: nn.Module) -> None:
        """Note what goes into a checkpointed layer, and open the gate while the same goes in again in backward."""

        def before(module: nn.Module, *rest: Any) -> None:
            if len(rest) < 2 or not rest[0] or not isinstance(rest[0][0], Tensor):
                return
            pointer, kwargs = rest[0][0].data_ptr(), rest[1]
            if self._gate.open():
                self._seen.setdefault(id(module), []).append((pointer, dict(kwargs)))
            elif _in_backward() and any(
                pointer == seen
                and kwargs.keys() == others.keys()
                and all(kwargs[k] is others[k] for k in kwargs)
                for seen, others in self._seen.get(id(module), ())
            ):
                self._gate.enter()

        def after(*_: Any) -> None:
            if _in_backward():
                self._gate.leave()

        self.handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        # Recomputation stops as soon as it has what backward needs, by an exception.
        self.handles.append(layer.register_forward_hook(after, always_call=True))

    def until_freed(self, output: Any) -> Any:
        """The same output, tied to the hooks: they stay until no backward can come from it any more."""
        return _with_tensors(output, self._tied) if self.handles else output

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self._seen = {}

    def _tied(self, tensor: Tensor) -> Tensor:
        if not tensor.requires_grad:
            return tensor
        self.waits = True
        self._tokens += 1
        with torch.autograd.graph.saved_tensors_hooks(self._token, lambda token: token.tensor):
            tied: Tensor = _Tie.apply(tensor, self._after_backward)  # type: ignore[no-untyped-call]
        return tied

    def _token(self, tensor: Tensor) -> _Token:
        token = _Token(tensor)
        weakref.finalize(token, self._freed)
        return token

    def _freed(self) -> None:
        self._tokens -= 1
        # Backward frees what it leaves behind as it goes, and the layers below are still to be run again.
        if not _in_backward():
            self._after_backward()

    def _after_backward(self) -> None:
        if self._tokens == 0:
            self.remove()


class _Token:
    """Lives as long as backward from one output tensor is possible."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Tie(torch.autograd.Function):
    """The identity, which says when the backward pass through it has ended."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ended: Callable[[], None]) -> Tensor:
        ctx.ended = ended
        ctx.save_for_backward(tensor)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        torch.autograd.Variable._execution_engine.queue_callback(ctx.ended)
        return gradients[0], None


def _with_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A model's output with a function applied to each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return type(value)(**{key: _with_tensors(item, function) for key, item in value.items()})
    if type(value) in (tuple, list):
        return type(value)(_with_tensors(item, function) for item in value)
    return value


# --- stopping early ---------------------------------------------------------------------------------------


class _Stop(BaseException):
    """Unwinds a run that has what it is for. Not an `Exception`, so that no model takes it for an error."""


class EarlyStop:
    """Ends a run from inside a hook: `request` unwinds it, and execution goes on after the `with` block.

    Modules that move their weights in and out of memory (accelerate's offloading) must finish first: inside one of
    those the run ends as soon as the outermost of them is done.

    Args:
        model: The model that is run.
        paths: Paths of the modules whose hooks may end the run.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._wanted = False
        self._holders = {path: _offloading_above(model, path) for path in paths}
        self.hooks = [
            Hook(holder, "output", self._leave_holder)
            for holder in dict.fromkeys(self._holders.values())
            if holder is not None
        ]

    def request(self, path: str) -> None:
        """End the run now, or as soon as may be."""
        self._wanted = True
        if self._holders[path] is None:
            raise _Stop

    def _leave_holder(self, passage: Passage) -> None:
        if self._wanted:
            raise _Stop

    def __enter__(self) -> EarlyStop:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        return kind is _Stop


def _offloading_above(model: nn.Module, path: str) -> nn.Module | None:
    """The outermost module around a path that offloads its weights, if any does."""
    module = model
    for name in path.split("."):
        hook = getattr(module, "_hf_hook", None)
        if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
            return module
        module = getattr(module, name) if name else module
    return None
