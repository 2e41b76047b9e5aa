"""A forward pass in which gradients stop at the outputs of linear maps: tells what is made of what.

From the tensors that attention multiplies, gradients reach the linear maps that make them and nothing below these. A
sum in which each head counts with a number of its own tells by its gradients in which head a column ends up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.hooks import Hook
from intervenable.linear_maps import is_conv1d
from intervenable.map_attention_products import StoppingProducts, products
from intervenable.map_layer_calls import with_calls_of
from intervenable.map_trace import Call, Trace, trace
from intervenable.passage import Passage


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its input with one matrix, whatever its class: also quantised or adapted ones."""
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    adapted = getattr(module, "base_layer", None)
    if isinstance(adapted, nn.Module):
        return is_linear(adapted)
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def keeps_columns(module: nn.Module) -> bool:
    """Whether a module has no parts and no matrix, so that it can scale columns and not exchange them: a norm."""
    return (
        next(module.children(), None) is None
        and next(module.buffers(), None) is None
        and all(parameter.dim() <= 1 for parameter in module.parameters())
    )


@dataclass(eq=False)
class Leaf:
    """A tensor at which gradients stop."""

    tensor: Tensor
    call: Call | None = None
    """The call of the linear map that returned it; None for what a block is given."""

    slot: str | int | None = None
    """For what a block is given: which input it is."""


@dataclass(eq=False)
class Probe:
    """One forward pass written down, with the tensors at which gradients stop."""

    trace: Trace
    leaves: dict[int, Leaf] = field(default_factory=dict)
    """By the `id` of their tensors."""

    def feeding(self, tensor: Tensor) -> list[Leaf]:
        """The leaves that a tensor is made of."""
        found = {}
        for node in _graph(tensor):
            leaf = self.leaves.get(id(getattr(node, "variable", None)))
            if leaf is not None:
                found[id(leaf.tensor)] = leaf
        return list(found.values())

    def gradients(self, total: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of a number; the graph stays."""
        return list(torch.autograd.grad(total, list(leaves), retain_graph=True, allow_unused=True))


def probe(
    model: nn.Module,
    inputs: Mapping[str, Any],
    blocks: Sequence[nn.Module],
    entrances: Sequence[nn.Module],
    stops_too: Sequence[nn.Module] = (),
) -> Probe:
    """Run a model once; inside these blocks gradients stop at linear maps and pass norms column by column.

    The values are those of the model. Its parameters and their gradients are left alone.

    Args:
        model: The model.
        inputs: Its keyword inputs.
        blocks: The blocks.
        entrances: For each block the module that is given what it is given: itself, or the first of its parts.
        stops_too: Other modules at whose outputs gradients stop.
    """
    stops: dict[int, Leaf] = {}
    given: list[Tensor] = []  # ids count while tensors live
    hooks: list[Hook] = []
    done: set[nn.Module] = set()
    for block, entrance in zip(blocks, entrances, strict=True):
        hooks.append(Hook(entrance, "input", _stopping_inputs(stops, given)))
        inside_a_linear: set[nn.Module] = set()
        for module in block.modules():
            if module in done or module in inside_a_linear:
                continue
            done.add(module)
            if is_linear(module) or module in stops_too:
                inside_a_linear.update(module.modules())
                hooks.append(Hook(module, "output", _stopping_output(stops, given)))
            elif keeps_columns(module) and module is not block:
                hooks.append(Hook(module, "output", _straight))
    multiplied: dict[int, Tensor] = {}
    with StoppingProducts(multiplied):
        run = with_calls_of(trace(model, inputs, gradients=True, extra=hooks), blocks)
    for call in run.calls:
        leaf = stops.get(id(call.main_output))
        if leaf is not None and leaf.call is None and leaf.slot is None:
            leaf.call = call
    found = {id(leaf.tensor): leaf for leaf in stops.values()}
    outside = [call for call in run.calls if not _in_a_linear(call)]
    found.update({id(made): Leaf(made, product) for product, made in products(outside, multiplied)})
    return Probe(run, found)


def _in_a_linear(call: Call) -> bool:
    """Whether a call is that of a linear map, or was made inside one."""
    return is_linear(call.module) or (call.parent is not None and _in_a_linear(call.parent))


def made_of(tensor: Tensor, part: Tensor, *, not_through: Tensor | None = None) -> bool:
    """Whether `part` is among what a tensor was computed from, or the tensor itself.

    Args:
        tensor: The tensor.
        part: What it may be made of.
        not_through: A tensor behind which nothing is looked for.
    """
    if tensor is part:
        return True
    end = None if not_through is None else not_through.grad_fn
    return part.grad_fn is not None and any(node is part.grad_fn for node in _graph(tensor, end))


def _graph(tensor: Tensor, end: Any = None) -> Iterator[Any]:
    """The nodes of the graph that a tensor was computed with, but for `end` and those behind it."""
    waiting, seen = [tensor.grad_fn], {end}
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(following for following, _ in node.next_functions)


def _stopped(tensor: Tensor, stops: dict[int, Leaf], given: list[Tensor], slot: Any = None) -> Tensor:
    leaf = tensor.detach().requires_grad_()
    # A copy, as models change some outputs in place.
    copy = leaf.clone()
    stops[id(copy)] = Leaf(leaf, slot=slot)
    given.append(copy)
    return copy


def _stopping_output(stops: dict[int, Leaf], given: list[Tensor]) -> Callable[[Passage], None]:
    def act(passage: Passage) -> None:
        if isinstance(passage.output, Tensor) and passage.output.is_floating_point():
            passage.output = _stopped(passage.output, stops, given)
            passage.changed = True

    return act


def _stopping_inputs(stops: dict[int, Leaf], given: list[Tensor]) -> Callable[[Passage], None]:
    def act(passage: Passage) -> None:
        slots: list[tuple[str | int, Any]] = [*enumerate(passage.args), *passage.kwargs.items()]
        for slot, value in slots:
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() >= 3:
                passage.put("input", slot, _stopped(value, stops, given, slot))

    return act


def _straight(passage: Passage) -> None:
    """Let gradients pass column by column, as if nothing were done; the values are as they were."""
    output = passage.output
    given = next(
        (value for value in (*passage.args, *passage.kwargs.values()) if isinstance(value, Tensor)), None
    )
    if not isinstance(output, Tensor) or given is None or output.shape != given.shape:
        return
    if (
        output.is_floating_point()
        and given.is_floating_point()
        and given.requires_grad
        and output is not given
    ):
        passage.output = output.detach() + (given - given.detach()).to(output.dtype)
        passage.changed = True
