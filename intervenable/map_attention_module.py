"""Which module of a block is its attention, and where what goes into it and what comes out is handed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from intervenable.hooks import Hook
from intervenable.map_attention_events import Attention, attentions
from intervenable.map_attention_probe import made_of
from intervenable.map_attention_projections import Projection, RefusedError
from intervenable.map_attention_view import BlockView, ancestors, layout, place, same_values, within
from intervenable.map_layer_calls import with_calls_of
from intervenable.map_trace import Call, trace
from intervenable.passage import Passage
from model_maps import AttentionHeads, Site


def attention_module(
    view: BlockView, attention: Attention, projections: Sequence[Projection], output: Projection | None
) -> Call:
    """The module that computes attention: with its projections inside, if one has them all.

    Of several around each other that are given the same and return the same it is the outermost.
    """
    block, module = view.block, attention.call
    above = list(ancestors(module, block))
    around = [call for call in above if all(within(one.call, call) for one in projections)]
    streams = [
        call for call in above if layout(call.main_input, attention.rows, attention.queries) is not None
    ]
    module = next(iter(around if projections else streams), module)
    result = None if output is None else output.call.main_output
    for call in ancestors(module, block):
        if call is module:
            continue
        returns = same_values(call.main_output, module.main_output) or same_values(call.main_output, result)
        if call is block or not returns or not same_values(call.main_input, module.main_input):
            break
        module = call
    return module


def input_site(
    view: BlockView, module: Call, attention: Attention, query: Projection | None, heads: int
) -> Site:
    """What goes into the attention module.

    Args:
        view: The block.
        module: The module.
        attention: What it computes.
        query: The projection of queries, if there is one.
        heads: Key-value heads.

    Raises:
        RefusedError: examples and positions are not apart there.
    """
    if module is view.block:
        raise RefusedError("the block computes attention itself, without a module for it")
    slot = _input_slot(view, module, query)
    given = module.inputs.get(slot)
    axes = layout(given, attention.rows, attention.queries)
    if axes is None:
        shape = None if given is None else tuple(given.shape)
        raise RefusedError(
            f"{view.name(module)} is given a tensor of the shape {shape}, which has no axes of"
            f" {attention.rows} examples and {attention.queries} positions"
        )
    width = None if attention.query is None else attention.query.shape[-1]
    return Site(
        view.name(module) or "",
        "input",
        None if slot == module.main_input_slot else slot,
        attention=AttentionHeads(attention.heads, heads, width),
        **axes,
    )


GIVEN_TWICE = (
    "the module is given it as several inputs (queries, keys, values), and a write reaches one of these"
)


def given_twice(module: Call) -> bool:
    """Whether a module is given what its main input holds in another slot too."""
    main = module.main_input_slot
    return any(
        slot != main and same_values(value, module.main_input) for slot, value in module.inputs.items()
    )


def reached_by(
    model: nn.Module, inputs: Mapping[str, Any], module: Call, block: nn.Module, batch: int
) -> bool:
    """Whether queries, keys and values are all made of the main input of a block's attention module.

    Found out by a pass in which that input is another one.

    Args:
        model: The model.
        inputs: Its keyword inputs.
        module: A call of the attention module.
        block: The block.
        batch: Examples in a pass.
    """

    def changed(passage: Passage) -> None:
        given = passage.take("input", module.main_input_slot)
        passage.put("input", module.main_input_slot, given.roll(1, -1) * 1.5 + 0.5)

    before, after = (
        next(
            call
            for call in with_calls_of(trace(model, inputs, extra=extra, within=block), [block]).calls
            if call.module is block
        )
        for extra in ([], [Hook(module.module, "input", changed)])
    )
    pairs = zip(attentions(before, batch), attentions(after, batch), strict=False)
    there = _first(before, module)
    one, other = next(((a, b) for a, b in pairs if within(a.call, there)), (None, None))
    return not any(
        same_values(getattr(one, role, None), getattr(other, role, None))
        for role in ("query", "key", "value")
    )


def _first(block: Call, module: Call) -> Call:
    """The call of a module in another pass."""
    return next(call for call in block.inside() if call.module is module.module)


def output_site(view: BlockView, module: Call, attention: Attention, output: Projection | None) -> Site:
    """What attention makes of its heads, before anything else is added or a norm is taken.

    Raises:
        RefusedError: no module hands it over.
    """
    made = None if output is None else output.call.main_output
    turned = output is not None and output.positions_first
    in_examples = made
    if turned and made is not None:
        in_examples = made.reshape(attention.queries, attention.rows, -1).transpose(0, 1)
    if _begins_with(module.main_output, made, view) and view.name(module):  # other positions follow
        slot = next(iter(module.outputs))
        return Site(slot=None if slot in (None, 0) else slot, **place(view, module))
    if output is not None and not any(same_values(module.main_output, one) for one in (made, in_examples)):
        module = output.call
    elif output is None and (module is view.block or _adds_its_input(module, attention)):
        raise RefusedError(
            f"{view.name(module) or 'the block'} adds what it is given to the result before it returns, and no linear"
            " module reads the result"
        )
    name, axes = view.name(module), layout(module.main_output, attention.rows, attention.queries)
    if name is None or axes is None:
        raise RefusedError("no module of the block hands it over by examples and positions")
    if turned and axes.get("flat"):
        axes["axes"] = (1, 0)
    slot = next(iter(module.outputs))
    return Site(slot=None if slot in (None, 0) else slot, **axes, **place(view, module))


def _begins_with(whole: Tensor | None, part: Tensor | None, view: BlockView) -> bool:
    """Whether what a module returns has all positions of the stream, and at the first of them another tensor."""
    if whole is None or part is None or whole.dim() != 3 or whole.shape[:2] != (view.rows, view.positions):
        return False
    positions = part[0].numel() // part.shape[-1]
    first = whole[:, :positions]
    return positions < whole.shape[1] and first.shape[-1] == part.shape[-1] and same_values(first, part)


def _adds_its_input(module: Call, attention: Attention) -> bool:
    """Whether there is a way from what a module is given to what it returns that does not lead through attention."""
    given, returned = module.main_input, module.main_output
    if given is None or returned is None:
        return False
    return made_of(returned, given, not_through=attention.result)


def _input_slot(view: BlockView, module: Call, query: Projection | None) -> str | int | None:
    """The input of the attention module that its projections are given."""
    wanted = None if query is None else _first_input(view, query.call, module)
    if wanted is None or same_values(module.main_input, wanted):
        return module.main_input_slot
    return next(
        (slot for slot, value in module.inputs.items() if same_values(value, wanted)), module.main_input_slot
    )


def _first_input(view: BlockView, call: Call, module: Call) -> Tensor | None:
    """What the first of the linear maps is given that lead to one."""
    while call.main_input is not None:
        before = [leaf.call for leaf in view.probe.feeding(call.main_input)]
        inside = [one for one in before if one is not None and within(one, module)]
        if len(inside) != 1:
            break
        (call,) = inside
    return call.main_input
