"""The only file that registers hooks.

However a run ends, exactly our hooks are gone afterwards. While they are there they act for the thread that
registered them alone, so that several threads can run different interventions on one model.

One exception, with gradient checkpointing: backward then runs parts of the model a second time, which has to meet
the same edits. Hooks inside checkpointed layers stay until that cannot happen any more (the graph is freed by
backward, or goes with the output), and act for nothing but that second run. Where a second run could not be exact
(source runs, which stop early, and reentrant checkpointing), layers with hooks in them are not checkpointed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from intervenable.attention_mode import AttentionMode, InsideHook
from intervenable.compiled import uncompiled
from intervenable.function_mode import FunctionHook, FunctionMode
from intervenable.passage import Passage
from intervenable.recomputing import check_not_computed_again
from model_maps import Side

RECORDS = "transformers.utils.output_capturing"
"""Where the hooks come from by which transformers records hidden states."""


class NthCall(NamedTuple):
    """One of the calls of a module that is called several times inside another one."""

    nth: int
    """Which, counted from 0."""

    since: nn.Module
    """The module at whose every call the counting begins anew."""


class Hook(NamedTuple):
    """Something to do at each passage through one side of a module, or inside it."""

    module: nn.Module
    side: Side
    act: Callable[[Passage], None]

    inside: InsideHook | FunctionHook | None = None
    """What to do inside the module; it has `act` as well, and the module is not hooked otherwise."""

    call: NthCall | None = None
    """The one call of the module that is meant, where it is not each."""


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


class _Modes:
    """The modes that are on in each thread, for one run."""

    def __init__(self) -> None:
        self._on: dict[int, list[AttentionMode | FunctionMode]] = {}

    def put_on(self, mode: AttentionMode | FunctionMode) -> None:
        self._on.setdefault(get_ident(), []).append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def take_off(self) -> None:
        """Take off the last one put on in this thread, if there is any."""
        modes = self._on.get(get_ident())
        if modes:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def unseen(self, acts: Sequence[Callable[[Passage], None]], passage: Passage) -> None:
        """Act on a passage, and let what is computed there pass unseen: edits inside an attention module multiply
        matrices too.
        """
        awake = [mode for mode in self._on.get(get_ident(), ()) if mode.awake] if self._on else ()
        for mode in awake:
            mode.awake = False
        try:
            for act in acts:
                act(passage)
        finally:
            for mode in awake:
                mode.awake = True

    def take_all_off(self) -> None:
        """Take off what a run has left on that ended inside a module."""
        while self._on.get(get_ident()):
            self.take_off()


def _register_inside(
    module: nn.Module, hooks: Sequence[InsideHook | FunctionHook], gate: Gate, modes: _Modes, kept: bool
) -> list[RemovableHandle]:
    """Let hooks see inside a module: a mode is on from where the module is entered to where it is left."""
    watched = torch.is_grad_enabled() and not kept and any(getattr(hook, "writes", True) for hook in hooks)
    of_attention = [hook for hook in hooks if isinstance(hook, InsideHook)]
    of_functions = [hook for hook in hooks if isinstance(hook, FunctionHook)]

    def before(module: nn.Module, *rest: Any) -> None:
        if not gate.open():
            return
        if watched:
            check_not_computed_again(module)
        if of_attention:
            modes.put_on(AttentionMode(module, of_attention, Passage(module, *rest).take("input", None)))
        if of_functions:
            modes.put_on(FunctionMode(module, of_functions))

    def after(module: nn.Module, *rest: Any) -> None:
        if not gate.open():
            return
        for kind in (of_attention, of_functions):
            if kind:
                modes.take_off()

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True, always_call=True, prepend=True),
    ]


def _register(
    module: nn.Module,
    side: Side,
    acts: Sequence[Callable[[Passage], None]],
    gate: Gate,
    modes: _Modes,
    kept: bool,
) -> RemovableHandle:
    """Attach one hook that does several things in order; it acts where the gate is open and is inert elsewhere.

    Kept ones are there when backward computes the module again.
    """
    watched = torch.is_grad_enabled() and not kept

    # While another thread registers or removes hooks, torch may leave out the keyword inputs: look at the gate
    # first and at the rest after.
    def before(module: nn.Module, *rest: Any) -> Any:
        if not gate.open():
            return None
        passage = Passage(module, *rest)
        modes.unseen(acts, passage)
        if passage.changed and watched:
            check_not_computed_again(module)
        return (passage.args, passage.kwargs) if passage.changed else None

    def after(module: nn.Module, *rest: Any) -> Any:
        if not gate.open():
            return None
        passage = Passage(module, *rest)
        modes.unseen(acts, passage)
        if passage.changed and watched:
            check_not_computed_again(module)
        return passage.output if passage.changed else None

    if side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    handle = module.register_forward_hook(after, with_kwargs=True)
    _put_recorders_last(module)
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
def hooked(hooks: Sequence[Hook], model: nn.Module, *, recomputed: bool = False) -> Iterator[Recomputation]:
    """Run the block with these hooks, which act in this order where several are at one place.

    Args:
        hooks: What to do where.
        model: The model that is run.
        recomputed: Whether the hooks stay for the second run of checkpointed layers. Otherwise the layers they are
            in are not checkpointed, as a run that ends in the middle of a layer cannot be.
    """
    # The second run of a compiled layer would be the compiled one, which does not look at hooks.
    with (
        uncompiled(model) as compiled,
        _registered(hooks, model, recomputed and not compiled) as recomputation,
    ):
        yield recomputation


@contextmanager
def _registered(hooks: Sequence[Hook], model: nn.Module, recomputed: bool) -> Iterator[Recomputation]:
    """Run the block with these hooks on a model."""
    gate = Gate()
    recomputation = Recomputation()
    layers = _checkpointed_layers(hooks, model)
    again = {layer: recomputed and not _reentrant(layer) for layer in layers.values()}
    passing: list[RemovableHandle] = []
    modes = _Modes()

    def stays(module: nn.Module) -> bool:
        return module in layers and again[layers[module]]

    def kept(module: nn.Module) -> list[RemovableHandle]:
        return recomputation.handles if stays(module) else passing

    try:
        for (module, side), acts in _by_place(hooks).items():
            kept(module).append(_register(module, side, acts, gate, modes, stays(module)))
        for module, inside in _by_module(hooks).items():
            kept(module).extend(_register_inside(module, inside, gate, modes, stays(module)))
        with _watched(again, gate):
            yield recomputation
    except BaseException:
        recomputation.remove()
        raise
    finally:
        modes.take_all_off()
        gate.leave()
        for handle in passing:
            handle.remove()
        if not recomputation.waits:
            recomputation.remove()


_Place = tuple[nn.Module, Side]


def _by_place(hooks: Sequence[Hook]) -> dict[_Place, list[Callable[[Passage], None]]]:
    """What to do at each side of each module, in order: one hook of torch's for all of it."""
    found: dict[_Place, list[Callable[[Passage], None]]] = {}
    counts: dict[tuple[nn.Module, Side, nn.Module], _Count] = {}
    for hook in hooks:
        if hook.inside is not None:
            continue
        acts = found.setdefault((hook.module, hook.side), [])
        if hook.call is None:
            acts.append(hook.act)
            continue
        nth, since = hook.call
        count = counts.get((hook.module, hook.side, since))
        if count is None:
            count = counts[hook.module, hook.side, since] = _Count()
            found.setdefault((since, "input"), []).insert(0, count.begin)
            acts.append(count.go_on)
        acts.append(count.only(nth, hook.act))
    return found


class _Count:
    """Counts the passages at one place in one run, anew from each passage at another place on."""

    def __init__(self) -> None:
        self._nth = -1

    def begin(self, passage: Passage) -> None:
        self._nth = -1

    def go_on(self, passage: Passage) -> None:
        self._nth += 1

    def only(self, nth: int, act: Callable[[Passage], None]) -> Callable[[Passage], None]:
        """An act that happens at one of the passages alone."""

        def at(passage: Passage) -> None:
            if self._nth == nth:
                act(passage)

        return at


def _by_module(hooks: Sequence[Hook]) -> dict[nn.Module, list[InsideHook | FunctionHook]]:
    """The hooks inside modules, by module, in their order."""
    found: dict[nn.Module, list[InsideHook | FunctionHook]] = {}
    for hook in hooks:
        if hook.inside is not None:
            found.setdefault(hook.module, []).append(hook.inside)
    return found


# --- other functions in the place of modules --------------------------------------------------------------


class _Stub:
    """Stands in for a module's forward, and calls another function instead in the runs that asked for it."""

    lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, module: nn.Module) -> None:
        self.forward: Callable[..., Any] = module.forward
        self.own: bool = "forward" in vars(module)
        self.runs: dict[Gate, Callable[..., Any]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for gate, function in tuple(self.runs.items()):
            if gate.open():
                return function(*args, **kwargs)
        return self.forward(*args, **kwargs)


@contextmanager
def stubbed(stubs: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run the block with these functions in the place of what the modules compute, in this thread alone.

    Hooks of the modules act as ever. Afterwards the modules are as they were, however the block ends.
    """
    gate = Gate()
    placed: list[tuple[nn.Module, _Stub]] = []
    with _Stub.lock:
        for module, function in stubs.items():
            there = vars(module).get("forward")
            stub = there if isinstance(there, _Stub) else _Stub(module)
            stub.runs[gate] = function
            vars(module)["forward"] = stub
            placed.append((module, stub))
    try:
        yield
    finally:
        gate.leave()
        with _Stub.lock:
            for module, stub in placed:
                del stub.runs[gate]
                if stub.runs or vars(module).get("forward") is not stub:
                    continue
                if stub.own:
                    vars(module)["forward"] = stub.forward
                else:
                    del vars(module)["forward"]


# --- gradient checkpointing -------------------------------------------------------------------------------


def _checkpointed_layers(hooks: Sequence[Hook], model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For each hooked module that backward will run again, the layer that is run again as a whole."""
    if not model.training or not torch.is_grad_enabled():
        return {}
    wanted = {hook.module for hook in hooks}
    wanted |= {hook.call.since for hook in hooks if hook.call is not None}
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


_CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps, on each layer, the function that runs a layer so that backward can run it again."""


def _reentrant(layer: nn.Module) -> bool:
    """Whether a layer is checkpointed in the older way, which lets no gradient through to values from elsewhere."""
    checkpoint: Any = getattr(layer, _CHECKPOINT)
    settings = getattr(getattr(checkpoint, "checkpoint", checkpoint), "keywords", {})
    return settings.get("use_reentrant") is not False


class _Watch:
    """Stands in for a layer's checkpointing function while runs of ours pass, and tells them from all others.

    What a run of ours hands to the checkpoint opens that run's gate when backward calls it again, or is not
    checkpointed; what any other run hands over is left alone.
    """

    lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint
        self.runs: dict[Gate, bool] = {}

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        gate = next((gate for gate in tuple(self.runs) if gate.open()), None)
        if gate is None:
            return self.checkpoint(function, *args)
        return self.checkpoint(_opening(gate, function), *args) if self.runs[gate] else function(*args)


def _opening(gate: Gate, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that opens the gate for as long as it runs in backward."""

    def opening(*args: Any) -> Any:
        if not _in_backward():
            return function(*args)
        gate.enter()
        try:
            return function(*args)
        finally:  # also when the checkpoint has seen enough, which it says by an exception
            gate.leave()

    return opening


@contextmanager
def _watched(layers: Mapping[nn.Module, bool], gate: Gate) -> Iterator[None]:
    """While the block runs, checkpoint these layers so that backward opens the gate, or (False) not at all."""
    watches: list[tuple[nn.Module, _Watch]] = []
    with _Watch.lock:
        for layer, again in layers.items():
            checkpoint: Any = getattr(layer, _CHECKPOINT)
            watch = checkpoint if isinstance(checkpoint, _Watch) else _Watch(checkpoint)
            setattr(layer, _CHECKPOINT, watch)
            watch.runs[gate] = again
            watches.append((layer, watch))
    try:
        yield
    finally:
        with _Watch.lock:
            for layer, watch in watches:
                del watch.runs[gate]
                if not watch.runs and getattr(layer, _CHECKPOINT) is watch:
                    setattr(layer, _CHECKPOINT, watch.checkpoint)


class Recomputation:
    """Hooks inside checkpointed layers, which stay for the second run of these."""

    def __init__(self) -> None:
        self.handles: list[RemovableHandle] = []
        self.waits = False
        self._tokens = 0

    def until_freed(self, output: Any) -> Any:
        """The same output, tied to the hooks: they stay until no backward can come from it any more."""
        return _with_tensors(output, self._tied) if self.handles else output

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def __del__(self) -> None:
        # The graph holds this object. It goes with the graph, also after a backward that raised half-way.
        self.remove()

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

    @property
    def ended(self) -> bool:
        """Whether the run was ended."""
        return self._wanted

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
        hook = vars(module).get("_hf_hook")
        if any(getattr(one, "offload", False) for one in (hook, *getattr(hook, "hooks", ()))):
            return module
        module = getattr(module, name) if name else module
    return None
