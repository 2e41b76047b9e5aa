"""Where the blocks of any causal language model are, and what a sweep of their inputs has to give.

Nothing here uses the library: blocks are found by structure, layouts by shapes, and `patched_by_hand` patches one
cell a forward pass with hooks of its own.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Mapping[str, Tensor]

EXCEPTIONS = {
    # Bytes, patches of bytes, bytes again: the list that ends in the logits, not the one that finds the patches.
    "blt": "model.local_decoder.layers",
    # Attention, MLP and norms in lists of their own, no blocks.
    "xlm": "transformer.attentions",
}
"""Lists of blocks that the structure does not tell."""


# --- blocks -----------------------------------------------------------------------------------------------


@dataclass
class _Call:
    index: int
    given: Tensor | None
    returned: Tensor | None = None


def block_list(model: nn.Module, inputs: Inputs, model_type: str) -> str:
    """The path of the list of blocks: that in which the most entries are given what the one before returned."""
    if model_type in EXCEPTIONS:
        return EXCEPTIONS[model_type]
    chains = {path: _chain(calls) for path, calls in _calls(model, inputs).items()}
    return max(chains, key=lambda path: chains[path])


def blocks_called(model: nn.Module, path: str, inputs: Inputs) -> tuple[int, ...]:
    """Which blocks of a list a forward pass calls."""
    return tuple(sorted({call.index for call in _calls(model, inputs)[path]}))


def _chain(calls: Sequence[_Call]) -> tuple[int, int]:
    """How many entries continue the one before, and how many there are."""
    linked = [
        one.returned is not None
        and other.given is not None
        and one.returned.shape == other.given.shape
        and torch.equal(one.returned, other.given)
        for one, other in itertools.pairwise(calls)
    ]
    return sum(linked), len(calls)


def _calls(model: nn.Module, inputs: Inputs) -> dict[str, list[_Call]]:
    """What the entries of each list of modules are given and return, in the order in which they are called."""
    found: dict[str, list[_Call]] = {}
    with contextlib.ExitStack() as stack:
        for path, modules in model.named_modules():
            if isinstance(modules, nn.ModuleList):
                for index, module in enumerate(modules):
                    _record(stack, module, index, found.setdefault(path, []))
        with torch.no_grad():
            model(**inputs)
    return {path: calls for path, calls in found.items() if calls}


def _record(stack: contextlib.ExitStack, module: nn.Module, index: int, calls: list[_Call]) -> None:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = read_input(args, kwargs)
        calls.append(_Call(index, given.clone() if isinstance(given, Tensor) else None))

    def leave(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        while isinstance(output, (tuple, list)) and output:
            output = output[0]
        if isinstance(output, Tensor):
            next(call for call in reversed(calls) if call.index == index).returned = output.clone()

    stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(module.register_forward_hook(leave).remove)


def read_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a module: its first positional argument, or `hidden_states`, or its first keyword."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()), None)


def write_input(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> tuple[Any, Any]:
    """The arguments with another input."""
    if args:
        return (value, *args[1:]), kwargs
    key = "hidden_states" if "hidden_states" in kwargs else next(iter(kwargs))
    return args, {**kwargs, key: value}


def parts_called(model: nn.Module, path: str, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    """Parts of blocks with a weight matrix that return what has the shape of the block's input: name -> its blocks.

    Those are attention, MLPs, mixers of states, whatever they are called.
    """
    found: dict[str, list[int]] = {}
    blocks: Any = model.get_submodule(path)
    shapes = {call.index: call.given.shape for call in _calls(model, inputs)[path] if call.given is not None}
    for index, shape in shapes.items():
        calls = {name: list[_Call]() for name, _ in blocks[index].named_children()}
        with contextlib.ExitStack() as stack:
            for name, child in blocks[index].named_children():
                _record(stack, child, 0, calls[name])
            with torch.no_grad():
                model(**inputs)
        for name, child in blocks[index].named_children():
            back = calls[name][-1].returned if calls[name] else None
            matrix = any(parameter.dim() >= 2 for parameter in child.parameters())
            if matrix and back is not None and back.shape == shape:
                found.setdefault(name, []).append(index)
    return {name: tuple(layers) for name, layers in found.items()}


# --- places -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """One tensor of a module for each layer."""

    modules: Mapping[int, nn.Module]
    """Layer -> module."""

    side: str = "input"

    slot: str | int | None = None
    """Which input or output, where it is not the first."""

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Tensor:
        if self.side == "input":
            found = read_input(args, kwargs) if self.slot is None else kwargs[str(self.slot)]
        elif self.slot is not None:
            found = output[self.slot]
        else:
            found = output[0] if isinstance(output, (tuple, list)) else output
        assert isinstance(found, Tensor)
        return found

    def hooked(
        self, layer: int, change: Callable[[Tensor], Tensor | None]
    ) -> contextlib.AbstractContextManager[None]:
        """Let `change` see the tensor at each call, and put what it returns in its place."""
        return _hooked(self, layer, change)


@contextlib.contextmanager
def _hooked(place: Place, layer: int, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if place.slot is not None:
            new = change(kwargs[str(place.slot)])
            return None if new is None else (args, {**kwargs, str(place.slot): new})
        new = change(place.read(args, kwargs, None))
        return None if new is None else write_input(args, kwargs, new)

    def leave(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        new = change(place.read(args, kwargs, output))
        if new is None or not isinstance(output, (tuple, list)):
            return new
        items = (new, *output[1:])
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)

    module = place.modules[layer]
    if place.side == "input":
        handle = module.register_forward_pre_hook(enter, with_kwargs=True)
    else:
        handle = module.register_forward_hook(leave, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# --- layouts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axes:
    """Which axis of a tensor counts examples and which positions; they are one where both are flattened."""

    rows: int
    positions: int

    def at(self, tensor: Tensor, position: int, batch: int) -> Tensor:
        """A view of one position of all examples."""
        if self.rows == self.positions:
            return tensor.unflatten(self.rows, (batch, -1)).select(self.rows + 1, position)
        return tensor.select(self.positions, position)


def axes_of(model: nn.Module, place: Place, inputs: Inputs) -> Axes:
    """Find the axes of a tensor by running more examples, and fewer positions."""
    layer = next(iter(place.modules))

    def shape(given: Inputs) -> torch.Size:
        seen: list[torch.Size] = []
        with place.hooked(layer, lambda tensor: seen.append(tensor.shape)), torch.no_grad():
            model(**given)
        return seen[0]

    length = inputs["input_ids"].shape[1]
    usual = shape(inputs)
    more = shape({name: torch.cat([tensor, tensor]) for name, tensor in inputs.items()})
    rows = _only(axis for axis, (one, two) in enumerate(zip(usual, more, strict=True)) if two == 2 * one)
    for fewer in (2, 4):  # some models pad their inputs to a round number of positions
        shorter = shape({name: tensor[:, : length - fewer] for name, tensor in inputs.items()})
        differ = [axis for axis, (one, two) in enumerate(zip(usual, shorter, strict=True)) if one != two]
        if differ:
            return Axes(rows, _only(differ))
    raise LookupError(f"No axis of {tuple(usual)} counts positions.")


def _only(axes: Any) -> int:
    (axis,) = axes
    return int(axis)


# --- the truth --------------------------------------------------------------------------------------------


def last_logits(
    model: nn.Module, inputs: Inputs, tokens: Sequence[int], lasts: Sequence[int] | None = None
) -> Tensor:
    """`[rows, tokens]` logits at the last position, or at one given for each example."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    rows = torch.arange(len(logits))[:, None]
    at = torch.tensor(lasts or [logits.shape[1] - 1] * len(logits))[:, None]
    return logits[rows, at, list(tokens)].clone()


def values_of(model: nn.Module, place: Place, inputs: Inputs) -> dict[int, list[Tensor]]:
    """What a run has at a place: for each layer its tensor at each call."""
    values: dict[int, list[Tensor]] = {layer: [] for layer in place.modules}

    def keep(layer: int) -> Callable[[Tensor], None]:
        return lambda tensor: values[layer].append(tensor.clone())

    with contextlib.ExitStack() as stack, torch.no_grad():
        for layer in place.modules:
            stack.enter_context(place.hooked(layer, keep(layer)))
        model(**inputs)
    return values


def patched_by_hand(
    model: nn.Module,
    place: Place,
    clean: Inputs,
    corrupted: Inputs,
    tokens: Sequence[int],
    lasts: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> Tensor:
    """`[layers, positions, rows, tokens]`: one forward pass a cell, with the clean value at a layer and position."""
    axes, batch = axes_of(model, place, corrupted), corrupted["input_ids"].shape[0]
    values = values_of(model, place, clean)
    cells = [
        _patched(
            model,
            place,
            layer,
            _position_cell(axes, position, batch, values[layer]),
            corrupted,
            tokens,
            lasts,
        )
        for layer in place.modules
        for position in positions or range(corrupted["input_ids"].shape[1])
    ]
    return torch.stack(cells).unflatten(0, (len(place.modules), -1))


def heads_by_hand(
    model: nn.Module, place: Place, heads: int, clean: Inputs, corrupted: Inputs, tokens: Sequence[int]
) -> Tensor:
    """`[layers, heads, rows, tokens]`: the same for the columns of one head at all positions."""
    values = values_of(model, place, clean)
    cells = [
        _patched(model, place, layer, _head_cell(head, heads, values[layer]), corrupted, tokens)
        for layer in place.modules
        for head in range(heads)
    ]
    return torch.stack(cells).unflatten(0, (len(place.modules), -1))


Cell = Callable[[Tensor, int], None]
"""Writes the clean value into a tensor, at the call of this number."""


def _position_cell(axes: Axes, position: int, batch: int, values: Sequence[Tensor]) -> Cell:
    def write(tensor: Tensor, call: int) -> None:
        axes.at(tensor, position, batch).copy_(axes.at(values[call], position, batch))

    return write


def _head_cell(head: int, heads: int, values: Sequence[Tensor]) -> Cell:
    def write(tensor: Tensor, call: int) -> None:
        columns = tensor.unflatten(-1, (heads, -1)).select(-2, head)
        columns.copy_(values[call].unflatten(-1, (heads, -1)).select(-2, head))

    return write


def _patched(
    model: nn.Module,
    place: Place,
    layer: int,
    cell: Cell,
    inputs: Inputs,
    tokens: Sequence[int],
    lasts: Sequence[int] | None = None,
) -> Tensor:
    calls = iter(range(1000))

    def change(tensor: Tensor) -> Tensor:
        new = tensor.clone()
        cell(new, next(calls))
        return new

    with place.hooked(layer, change):
        return last_logits(model, inputs, tokens, lasts)
