"""Layers that are called part by part: a call of each put together from those of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.hooks import Hook, hooked
from intervenable.map_trace import Call, Slot, Trace
from intervenable.passage import Passage
from model_maps import Side


def call_of_parts(trace: Trace, layer: nn.Module, path: str = "") -> Call | None:
    """What a call of a layer would be, of which only parts are called; None if it is not one after the other.

    It is given what the first of them is given and returns what the last one returns. The trace stays as it is.

    Args:
        trace: A forward pass.
        layer: The layer, or its parts in one module.
        path: What the call says for its path.
    """
    parts = set(layer.modules()) - {layer}
    called = [call for call in trace.calls if call.module in parts]
    # A part that layers share, such as a nonlinearity, is called in those of others as well.
    outer = [call for call in called if call.parent is not None and call.parent.module not in parts]
    around = Counter(call.parent for call in outer)
    parent = max(around, key=lambda call: around[call], default=None)
    outer = [call for call in outer if call.parent is parent]
    if parent is None or len({call.module for call in outer}) < len(outer):
        return None
    first, last = outer[0], outer[-1]
    if first.main_input is None or last.main_output is None:
        return None
    met = [one for one in parent.met if first.entered < one.at < last.left]
    return Call(
        path,
        layer,
        0,
        first.entered,
        parent,
        {0: first.main_input},
        {None: last.main_output},
        last.left,
        met,
        outer,
        of_parts=True,
    )


GOES_PAST = (
    "its layers are called part by part, and the stream goes past the first part as well, which is given it here;"
    " write 'block_output' of the layer before"
)
"""Why what the first part of a layer is given is not the stream for all of the layer."""


Place = tuple[Call, Slot]
"""A call, and where among its inputs or outputs a tensor is."""


def goes_past(
    model: nn.Module, inputs: Mapping[str, Any], left: Place, entered: Place, end: Place, stream: Tensor
) -> bool:
    """Whether a stream does something else where a layer is given it than where the layer before it left it.

    Args:
        model: The model.
        inputs: Its keyword inputs.
        left: Where the layer before hands it on.
        entered: Where the layer is given it.
        end: Where the layer hands on what it makes of it.
        stream: What it is there.
    """
    other = stream.clone() * 1.5 + 0.5
    seen: list[Tensor] = []
    last, slot = end
    sides: tuple[tuple[Side, Place], ...] = (("output", left), ("input", entered))
    read = Hook(last.module, "output", lambda passage: seen.append(passage.take("output", slot).clone()))
    for side, (call, where) in sides:
        with torch.no_grad(), hooked([Hook(call.module, side, _putting(other, side, where)), read], model):
            model(**inputs)
    return not torch.allclose(seen[0], seen[1], rtol=1e-4, atol=1e-4 * float(seen[0].abs().max()))


def _putting(value: Tensor, side: Side, slot: Slot) -> Callable[[Passage], None]:
    # A copy, as the model may change it in place.
    return lambda passage: passage.put(side, slot, value.clone())


def put_in(trace: Trace, call: Call) -> None:
    """Put a call that was put together into the trace, between its parts and the module around these."""
    assert call.parent is not None  # `call_of_parts` makes no others
    around, first = call.parent, call.children[0]
    for part in call.children:
        part.parent = call
    around.children.insert(around.children.index(first), call)
    around.children = [child for child in around.children if child not in call.children]
    around.met = [one for one in around.met if one not in call.met]
    for one in call.met:
        one.call = call
    trace.insert(call, first)


def with_calls_of(trace: Trace, layers: Sequence[nn.Module]) -> Trace:
    """The trace with a call of each of these layers, put together where only its parts are called."""
    called = {call.module for call in trace.calls}
    for layer in layers:
        call = None if layer in called else call_of_parts(trace, layer)
        if call is not None:
            put_in(trace, call)
    return trace
