"""The parts of an MLP in a traced block: what it reads, its nonlinearity, what its last matrix reads."""

from __future__ import annotations

from dataclasses import dataclass

from intervenable.map_modules import Key, has_matrix, holds, is_elementwise, is_linear, is_norm, key_of
from intervenable.map_stream import Contribution
from intervenable.map_trace import Call
from intervenable.map_values import BlockValues, Seen
from model_maps import Side, Site

FUNCTION = "its nonlinearity is a function, which no module computes"


@dataclass(frozen=True)
class Placed:
    """What was found: components with their sites, and others with the reason why not."""

    sites: dict[str, Site]
    absent: dict[str, str]


def mlp_sites(values: BlockValues, part: Contribution, stream: set[Key]) -> Placed:
    """The sites of an MLP.

    Args:
        values: What passed the modules of the block.
        part: What the MLP adds to the stream.
        stream: Values that the stream has in the block.
    """
    core = part.core
    sites = {"mlp_output": site_at(values, core)}
    absent: dict[str, str] = {}
    if part.seen is not core or part.scale != 1.0:
        sites["mlp_contribution"] = site_at(values, part.seen, scale=part.scale)
    entry = entry_of(values, core.call, stream)
    if entry is None:
        absent["mlp_input"] = "no module is given what all of its MLP reads"
        span = list(core.call.inside())
    else:
        sites["mlp_input"] = site_at(values, entry)
        span = _between(values, entry.call, core.call)
    activations = [call for call in span if is_elementwise(call)]
    if len(activations) == 1:
        (act,) = activations
        sites["mlp_pre_activation"] = site_at(values, main(act, "input"))
        sites["mlp_activation"] = site_at(values, main(act, "output"))
    else:
        reason = FUNCTION if not activations else f"its MLP has {len(activations)} nonlinearities"
        absent |= dict.fromkeys(("mlp_pre_activation", "mlp_activation"), reason)
    down = _down(values, core, span)
    if down is None:
        absent["mlp_hidden"] = "its MLP does not end in one linear map"
    else:
        sites["mlp_hidden"] = site_at(values, main(down, "input"))
    return Placed(sites, absent)


def main(call: Call, side: Side) -> Seen:
    """What a call was given or returned at the usual place."""
    tensor = call.main_input if side == "input" else call.main_output
    assert tensor is not None  # a module that neither takes nor gives a tensor is no candidate
    return Seen(call, side, None, tensor, key_of(tensor))


def site_at(values: BlockValues, seen: Seen, *, scale: float = 1.0, plus: str | None = None) -> Site:
    """The site of a tensor, from the block; its width is told later."""
    nth = values.nth(seen.call)
    site = Site(values.path(seen.call), seen.side, seen.slot, scale=scale, plus=plus, width="any", call=nth)
    return values.layout.placed(site, seen.tensor)


def entry_of(values: BlockValues, core: Call, stream: set[Key]) -> Seen | None:
    """The module that is given what a branch reads, after its norm.

    It is the core itself if that has more than one matrix. Else the way goes back from matrix to matrix, to where the
    stream or a norm's output is read, and out again to the largest module that reads it.
    """
    if not is_linear(core.module):
        matrices = [call for call in core.inside() if is_linear(call.module)]
        if len(matrices) != 1 or not _is_all_of(core, matrices[0]):
            return main(core, "input") if core.main_input is not None else None
        core = matrices[0]  # in a wrapper
    key = _start_of(values, core, stream)
    if key is None:
        return None
    readers = [
        seen for seen in values.given_like(key) if seen.call.left <= core.left or holds(seen.call, core)
    ]
    readers = [seen for seen in readers if seen.slot is None and has_matrix(seen.call.module)]
    readers = [seen for seen in readers if not is_norm(seen.call) and seen.call is not values.call]
    inner = [seen for seen in readers if is_linear(seen.call.module)]
    if not inner:
        return None
    first = inner[-1]
    around = {seen.call: seen for seen in readers}
    call: Call | None = first.call
    found = first
    while call is not None and call in around:
        found = around[call]
        call = call.parent
    return found


def _is_all_of(around: Call, inside: Call) -> bool:
    """Whether a module is given what one inside it is given, and returns what that returns."""
    pairs = ((around.main_input, inside.main_input), (around.main_output, inside.main_output))
    return all(one is not None and other is not None and key_of(one) == key_of(other) for one, other in pairs)


def _start_of(values: BlockValues, core: Call, stream: set[Key]) -> Key | None:
    """The value that the matrices before the last one read: back bit for bit, or by order where a gate is between."""
    assert core.main_input is not None
    key = key_of(core.main_input)
    for step in range(12):
        makers = [seen for seen in values.returned_like(key) if seen.call.left < core.left]
        if key in stream or any(is_norm(seen.call) for seen in makers):
            return key
        if not makers:
            if step and any(is_linear(seen.call.module) for seen in values.given_like(key)):
                return key  # a sum that the block makes by itself
            break
        before = makers[0].call.main_input
        if before is None:
            return None
        key = key_of(before)
    normed = [
        seen
        for seen in values.given
        if seen.call.left < core.left
        and is_linear(seen.call.module)
        and (seen.key in stream or any(is_norm(other.call) for other in values.returned_like(seen.key)))
    ]
    return normed[-1].key if normed else None


def _between(values: BlockValues, first: Call, last: Call) -> list[Call]:
    """The calls of a branch: those inside its module, or from its first module to its last."""
    if first is last:
        return list(first.inside())
    return [call for call in values.calls if call.entered >= first.entered and call.left <= last.left]


def _down(values: BlockValues, core: Seen, span: list[Call]) -> Call | None:
    """The linear map whose output is the MLP's."""
    if is_linear(core.call.module):
        return core.call
    last = [seen.call for seen in values.returned_like(core.key) if is_linear(seen.call.module)]
    inside = [call for call in last if call in span]
    return inside[0] if len(inside) == 1 else None
