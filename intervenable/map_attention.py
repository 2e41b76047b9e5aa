"""Where the attention of each block is: its module, its projections, and which columns of these belong to which head.

Nothing is known of the architecture. The functions that compute attention are met in a forward pass, and gradients
tell which linear maps make the queries, keys and values that they multiply, and which one reads the result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from intervenable.map_attention_banded import BANDED, Banded, banded_attention
from intervenable.map_attention_bands import bands_of
from intervenable.map_attention_module import (
    GIVEN_TWICE,
    attention_module,
    given_twice,
    input_site,
    output_site,
    reached_by,
)
from intervenable.map_attention_probe import probe
from intervenable.map_attention_products import Product
from intervenable.map_attention_projections import (
    ROLES,
    Operands,
    Projection,
    RefusedError,
    Role,
    convolutions,
    is_rotated,
    operand_projection,
    output_projection,
    take_moments,
)
from intervenable.map_attention_view import BlockView, layout, place, same_values
from intervenable.map_layers import block_at
from intervenable.map_trace import Call, Trace
from model_maps import Site

MATRICES = ("attention_scores", "attention_scores_masked", "attention_pattern")
VECTORS = ("rotary_query", "rotary_key", "expanded_head_key", "expanded_head_value")
INSIDE = (*MATRICES, *VECTORS)
WORDS = (
    "attention_input",
    "query_output",
    "key_output",
    "value_output",
    "attention_value_output",
    "attention_output",
    *INSIDE,
)
"""The words of attention. Of those inside its module a reason is stated where there is one; views by heads follow."""

NO_ATTENTION = "it computes no attention: no softmax lies between two products there"
NO_CROSS_ATTENTION = "it does not attend to another stack"
BOTH_STACKS = (
    "it attends to its own positions and to the other stack's at once, in one matrix; the pattern and the scores of"
    " its own attention, taken whole, have the keys of both"
)
ONE_AXIS = "its blocks have all examples on one axis, so that no matrix of scores has an axis of them"
NO_MATRIX = "no module has the matrix that the heads are projected with"
NO_ROTARY = "it has no rotary embedding"
UNKNOWN_ROTARY = "no linear module makes what would be rotated, so that it cannot be told whether it is"


@dataclass(frozen=True)
class BlockAttention:
    """The attention of one block."""

    sites: Mapping[str, Site]
    """Word -> where it is; paths are relative to the block."""

    absent: Mapping[str, str]
    """Word -> why the block has none."""

    path: str | None
    """The attention module, relative to the block; None if there is none."""

    call: Call | None = field(default=None, repr=False, compare=False)
    """The call of that module in the pass that was looked at."""


def attention_sites(
    model: nn.Module,
    inputs: Mapping[str, Any],
    trace: Trace,
    block_paths: Sequence[str],
    *,
    cross: bool = False,
) -> list[BlockAttention]:
    """Find the attention of blocks by structure and numbers.

    Args:
        model: A model small enough to be run with gradients.
        inputs: Its keyword inputs, of at least two positions.
        trace: A pass of the model on them, with calls of the blocks.
        block_paths: Paths of the blocks.
        cross: Whether to find the attention to another stack instead of the one to the blocks' own positions.
    """
    blocks = [block_at(model, path) for path in block_paths]
    calls = {path: call for path in block_paths for call in trace.of(path)[:1]}
    entrances = [
        calls[path].entrance.module if path in calls else block
        for path, block in zip(block_paths, blocks, strict=True)
    ]
    found = _found(model, inputs, blocks, entrances, cross)
    mixing = [module for view, several in found if several for module in convolutions(view, several)]
    if mixing:
        found = _found(model, inputs, blocks, entrances, cross, mixing)
    answers = [_answer(view, several, cross) for view, several in found]
    return answers if cross else _writable(model, inputs, [view for view, _ in found], blocks, answers)


def _writable(
    model: nn.Module,
    inputs: Mapping[str, Any],
    views: Sequence[BlockView],
    blocks: Sequence[nn.Module],
    answers: Sequence[BlockAttention],
) -> list[BlockAttention]:
    """The answers, with inputs of attention that cannot be written where a module is given them several times."""
    reached: dict[type[nn.Module], bool] = {}
    result = []
    for view, block, one in zip(views, blocks, answers, strict=True):
        site = one.sites.get("attention_input")
        if site is not None and one.call is not None and given_twice(one.call):
            kind = type(one.call.module)
            if kind not in reached:
                reached[kind] = reached_by(model, inputs, one.call, block, view.rows)
            if not reached[kind]:
                one = replace(
                    one, sites={**one.sites, "attention_input": replace(site, read_only=GIVEN_TWICE)}
                )
        result.append(one)
    return result


def _found(
    model: nn.Module,
    inputs: Mapping[str, Any],
    blocks: Sequence[nn.Module],
    entrances: Sequence[nn.Module],
    cross: bool,
    stops_too: Sequence[nn.Module] = (),
) -> list[tuple[BlockView, list[Operands]]]:
    """The blocks with their computations of attention of one kind."""
    passed = probe(model, inputs, blocks, entrances, stops_too)
    batch = next(
        (value.shape[0] for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 1
    )
    views = [BlockView(passed, block, batch) for block in blocks]
    found = [[Operands(one) for one in view.attentions] for view in views]
    take_moments(passed, [one for several in found for one in several])
    return [
        (view, [one for one in several if _is_of_stream(view, one) and _is_cross(view, one) == cross])
        for view, several in zip(views, found, strict=True)
    ]


def _answer(view: BlockView, found: Sequence[Operands], cross: bool) -> BlockAttention:
    """The sites of a block's attention to itself, or of that to another stack."""
    if not found:
        return _nothing(_why_not_across(view)) if cross else _banded_answer(view)
    calls = list(dict.fromkeys(one.attention.call for one in found))
    if len({type(call.module) for call in calls}) > 1:
        names = ", ".join(str(view.name(call)) for call in calls)
        return _nothing(f"{len(calls)} of its modules compute attention: {names}")
    # Of several alike, one after the other, the block's attention is the first.
    return _Answer(view, [one for one in found if one.attention.call is calls[0]]).made()


def _banded_answer(view: BlockView) -> BlockAttention:
    """The sites of a block's attention whose scores are no matrix, if it has such a one."""
    try:
        known = banded_attention(view)
    except RefusedError as error:
        return _nothing(str(error))
    return _nothing(NO_ATTENTION) if known is None else _BandedAnswer(view, known).made()


def _why_not_across(view: BlockView) -> str:
    """Why a block has no attention to another stack alone."""
    own, stream = view.attentions, None if view.call is None else view.block.main_input_slot
    makers = [leaf for one in own for leaf in view.probe.feeding(one.source) if leaf.call is not None]
    beside = [leaf for leaf in view.origins(makers) if leaf.slot != stream]
    joint = any(not same_values(leaf.tensor, view.block.main_input) for leaf in beside)
    return BOTH_STACKS if joint else NO_CROSS_ATTENTION


def _nothing(why: str) -> BlockAttention:
    return BlockAttention({}, dict.fromkeys(WORDS, why), None)


def _is_of_stream(view: BlockView, operands: Operands) -> bool:
    """Whether its queries are made of the block's stream, not of what it is given of other positions beside it."""
    own = view.block.main_input_slot
    query = operands.attention.query
    origins = [] if query is None else view.origins(view.probe.feeding(query))
    others = {leaf.slot for leaf in origins} - {own}
    return not others or any(
        leaf.slot == own or leaf.tensor.shape[:2] == (view.rows, view.positions) for leaf in origins
    )


def _is_cross(view: BlockView, operands: Operands) -> bool:
    """Whether its keys are made of nothing of the block's own stream."""
    own = view.block.main_input
    origins = view.origins(view.probe.feeding(operands.attention.source))
    return bool(origins) and not any(
        leaf.slot == view.block.main_input_slot or same_values(leaf.tensor, own) for leaf in origins
    )


class _Answer:
    """The sites of one attention of one block, as they are found."""

    def __init__(self, view: BlockView, found: Sequence[Operands]) -> None:
        self._view = view
        self._found = found
        self._attention = found[0].attention
        self._sites: dict[str, Site] = {}
        self._absent: dict[str, str] = {}

    def made(self) -> BlockAttention:
        """All of it."""
        projections = {role: known for role in ROLES if (known := self._operand(role)) is not None}
        output = self._output()
        module = attention_module(self._view, self._attention, list(projections.values()), output)
        path = self._view.name(module)
        if path is None:
            return _nothing(f"the module that computes it, {module.path}, is no part of the block")
        key = projections.get("key", projections.get("value"))
        own_heads = self._attention.heads if self._attention.key is None else self._attention.key.shape[1]
        heads = own_heads if key is None else key.columns.heads
        try:
            self._sites["attention_output"] = output_site(self._view, module, self._attention, output)
        except RefusedError as error:
            self._absent["attention_output"] = str(error)
        self._absent.update(self._not_inside())
        try:
            self._sites["attention_input"] = input_site(
                self._view, module, self._attention, projections.get("query"), heads
            )
        except RefusedError as error:
            why = self._why_not_all_positions() or str(error)
            self._absent.update(dict.fromkeys(("attention_input", *INSIDE), why))
        return BlockAttention(self._sites, self._absent, path, module)

    def _maker(self, role: Role) -> Projection:
        """What makes queries, keys or values."""
        return operand_projection(self._view, self._found, role)

    def _reader(self) -> Projection:
        """What reads the pattern times the values."""
        return output_projection(self._view, self._found)

    def _operand(self, role: Role) -> Projection | None:
        """The projection of queries, keys or values; its site or the reason is noted."""
        length = self._attention.queries if role == "query" else self._attention.keys
        try:
            known = self._maker(role)
            if length > self._attention.queries == self._view.positions and self._is_of_stream(known.call):
                length = self._attention.queries  # others are attended to in the same matrix
            self._sites[f"{role}_output"] = self._site(known, "output", role != "query", length)
        except RefusedError as error:
            self._absent[f"{role}_output"] = str(error)
            return None
        return known

    def _why_not_all_positions(self) -> str:
        """Why attention is not computed at all positions of the stream together; "" if it is."""
        attention, view = self._attention, self._view
        if attention.rows != view.rows or not view.positions or attention.queries >= view.positions:
            return ""
        return f"its stream has {view.positions} positions, of which {attention.queries} attend at one time"

    def _is_of_stream(self, call: Call) -> bool:
        """Whether a linear map, which the block calls for other positions too, returns vectors of the stream's."""
        made = call.main_output
        shape = (self._attention.rows, self._view.positions)
        several = sum(other.module is call.module for other in self._view.block.inside()) > 1
        return several and made is not None and made.dim() == 3 and made.shape[:2] == shape

    def _output(self) -> Projection | None:
        """The projection of what the heads have read; its site or the reason is noted."""
        try:
            known = self._reader()
            at = known if known.norm is None else Projection(known.norm, known.columns)
            few = self._why_not_all_positions()
            if few:
                self._absent["attention_value_output"] = few
                return known
            self._sites["attention_value_output"] = self._site(at, "input", False, self._attention.queries)
        except RefusedError as error:
            self._absent["attention_value_output"] = str(error)
            return None
        if isinstance(known.call, Product):
            self._absent["head_attention_output"] = NO_MATRIX
        if known.norm is not None:
            self._absent["head_attention_output"] = (
                f"{self._view.name(known.norm)} divides all heads by one number before they are projected, so that"
                " what one adds depends on the others"
            )
        return known

    def _site(self, known: Projection, side: Literal["input", "output"], shared: bool, length: int) -> Site:
        tensor = known.call.main_input if side == "input" else known.call.main_output
        path, axes = self._view.name(known.call), layout(tensor, self._attention.rows, length)
        if path is None or axes is None or tensor is None:
            few = self._why_not_all_positions()
            if few:
                raise RefusedError(few)
            shape = None if tensor is None else tuple(tensor.shape)
            raise RefusedError(
                f"{known.call.path} handles a tensor of the shape {shape}, which has no axes of"
                f" {self._attention.rows} examples and {length} positions"
            )
        if axes.get("flat") and known.positions_first:
            axes["axes"] = (1, 0)
        heads: Literal["query", "key_value"] = "key_value" if shared else "query"
        where = place(self._view, known.call)
        return Site(side=side, width=heads, heads=heads, columns=known.columns, **axes, **where)

    def _not_inside(self) -> dict[str, str]:
        """What cannot be seen of the functions that compute attention, and why."""
        attention, view = self._attention, self._view
        if not all(
            one is self._found[0]
            or (
                same_values(one.attention.query, attention.query)
                and same_values(one.attention.key, attention.key)
            )
            for one in self._found
        ):
            return dict.fromkeys(
                INSIDE, f"it computes {len(self._found)} patterns, each of other queries or keys"
            )
        counts, stream = (attention.rows, attention.queries), (view.rows, view.positions or attention.queries)
        if view.positions is None and view.block.main_input is not None and view.block.main_input.dim() == 2:
            return dict.fromkeys(INSIDE, ONE_AXIS)
        if counts not in (stream, stream[::-1]):  # positions may come first
            why = (
                f"its matrices are of {attention.queries} queries in {attention.rows} windows, and not of"
                f" {view.positions} in {view.rows} examples"
            )
            return dict.fromkeys(INSIDE, why)
        if not attention.plain:
            return dict.fromkeys(VECTORS, "its scores are no plain product of queries and keys")
        absent = {}
        for role in ROLES[:2]:
            rotated = is_rotated(self._found[0], role)
            if rotated is not True:
                absent[f"rotary_{role}"] = NO_ROTARY if rotated is False else UNKNOWN_ROTARY
        if len(self._found) > 1:
            absent["expanded_head_value"] = f"it multiplies its pattern with values {len(self._found)} times"
        return absent


class _BandedAnswer(_Answer):
    """The sites of attention whose scores are no matrix of queries by keys."""

    def __init__(self, view: BlockView, banded: Banded) -> None:
        super().__init__(view, [Operands(banded.attention)])
        self._banded = banded
        self._bands = bands_of(view, banded)

    def _maker(self, role: Role) -> Projection:
        return self._banded.projections[role]

    def _reader(self) -> Projection:
        return self._banded.output

    def made(self) -> BlockAttention:
        """All of it, with how its softmax lies."""
        made = super().made()
        site = made.sites.get("attention_input")
        if site is None or site.attention is None or self._bands is None:
            return made
        site = replace(site, attention=replace(site.attention, bands=self._bands))
        return replace(made, sites={**made.sites, "attention_input": site})

    def _not_inside(self) -> dict[str, str]:
        return dict.fromkeys(INSIDE if self._bands is None else VECTORS, BANDED)
