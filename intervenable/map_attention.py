"""Where the attention of each block is: its module, its projections, and which columns of these belong to which head.

Nothing is known of the architecture. The functions that compute attention are met in a forward pass, and gradients
tell which linear maps make the queries, keys and values that they multiply, and which one reads the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intervenable.map_attention_events import Attention, attentions
from intervenable.map_attention_heads import ColumnHeads, Moments, column_heads, head_columns, head_sums
from intervenable.map_attention_probe import Leaf, Probe, is_linear, keeps_columns, made_of, probe
from intervenable.map_trace import Call, Trace
from model_maps import AttentionHeads, HeadColumns, Site, Width

Role = Literal["query", "key", "value"]
ROLES: tuple[Role, ...] = ("query", "key", "value")

MATRICES = ("attention_scores", "attention_scores_masked", "attention_pattern")
INSIDE = (*MATRICES, "rotary_query", "rotary_key", "expanded_head_key", "expanded_head_value")
WORDS = (
    "attention_input",
    "query_output",
    "key_output",
    "value_output",
    "attention_value_output",
    "attention_output",
    *INSIDE,
)
"""The words of attention, of which each block has a site or a reason; views by heads follow from these."""

NO_ATTENTION = "it computes no attention: no softmax lies between two products there"
NO_CROSS_ATTENTION = "it does not attend to another stack"
NO_ROTARY = "it has no rotary embedding"


@dataclass(frozen=True)
class BlockAttention:
    """The attention of one block."""

    sites: Mapping[str, Site]
    """Word -> where it is; paths are relative to the block."""

    absent: Mapping[str, str]
    """Word -> why the block has none."""

    path: str | None
    """The attention module, relative to the block; None if there is none."""


class _RefusalError(Exception):
    """A component that cannot be placed, with the reason."""


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
        trace: A pass of the model on them.
        block_paths: Paths of the blocks.
        cross: Whether to find the attention to another stack instead of the one to the blocks' own positions.
    """
    blocks = [model.get_submodule(path) for path in block_paths]
    probed = probe(model, inputs, blocks)
    calls = [_call_of(probed.trace, block) for block in blocks]
    found = [_BlockView(probed, call, block) for call, block in zip(calls, blocks, strict=True)]
    _take_moments(probed, [attention for view in found for attention in view.attentions])
    return [view.answer(cross) for view in found]


def _call_of(trace: Trace, block: nn.Module) -> Call | None:
    """The first call of a block."""
    return next((call for call in trace.calls if call.module is block), None)


# --- columns ----------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Placed:
    """One computation of attention, with the linear maps that make what it multiplies."""

    attention: Attention
    feeding: dict[Role, list[Leaf]] = field(default_factory=dict)
    moments: dict[Role, dict[int, Moments]] = field(default_factory=dict)


def _take_moments(probed: Probe, placed: Sequence[_Placed]) -> None:
    """Gradients of all attentions of all blocks at once: five backward passes for each of three operands."""
    generator = torch.Generator().manual_seed(0)
    for role in ROLES:
        sums: list[tuple[Tensor, ...]] = []
        leaves: dict[int, Leaf] = {}
        for one in placed:
            operand: Tensor | None = getattr(one.attention, role)
            if operand is None or not operand.requires_grad:
                continue
            one.feeding[role] = probed.feeding(operand)
            leaves.update({id(leaf.tensor): leaf for leaf in one.feeding[role]})
            sums.append(head_sums(operand, operand.shape[1], generator))
        if not leaves:
            continue
        tensors = [leaf.tensor for leaf in leaves.values()]
        totals = [torch.stack(parts).sum() for parts in zip(*sums, strict=True)]
        gradients = [probed.gradients(total, tensors) for total in totals]
        by_leaf: dict[int, Moments] = {}
        for tensor, *parts in zip(tensors, *gradients, strict=True):
            zero = torch.zeros_like(tensor)
            by_leaf[id(tensor)] = Moments(*(zero if part is None else part for part in parts))
        for one in placed:
            one.moments[role] = {
                id(leaf.tensor): by_leaf[id(leaf.tensor)]
                for leaf in one.feeding.get(role, ())
                if by_leaf[id(leaf.tensor)].ones.abs().max() > 0
            }
            one.feeding[role] = [
                leaf for leaf in one.feeding.get(role, ()) if id(leaf.tensor) in one.moments[role]
            ]


@dataclass(frozen=True)
class _Projection:
    """The part of a linear map's output that makes queries, keys or values."""

    call: Call
    columns: HeadColumns


class _BlockView:
    """One block: its computations of attention, and what is said of them."""

    def __init__(self, probed: Probe, call: Call | None, block: nn.Module) -> None:
        self._probed = probed
        self._call = call
        self._names = {
            module: name for name, module in reversed(list(block.named_modules(remove_duplicate=False)))
        }
        stream = None if call is None else call.main_input
        self._rows, self._positions = (1, 1) if stream is None else (stream.shape[0], stream.shape[1])
        found = [] if call is None else list(attentions(call, self._rows))
        self.attentions = [_Placed(one) for one in found]

    # -- which of them

    def answer(self, cross: bool) -> BlockAttention:
        """The sites of the block's attention to itself, or of that to another stack."""
        chosen = [one for one in self.attentions if self._is_cross(one) == cross]
        if not chosen:
            return BlockAttention(
                {}, dict.fromkeys(WORDS, NO_CROSS_ATTENTION if cross else NO_ATTENTION), None
            )
        modules = list(dict.fromkeys(one.attention.call.path for one in chosen))
        if len(modules) > 1:
            why = f"{len(modules)} modules of the block compute attention: {', '.join(modules)}"
            return BlockAttention({}, dict.fromkeys(WORDS, why), None)
        return _Answer(self, chosen).made()

    def _is_cross(self, one: _Placed) -> bool:
        """Whether its keys are made of nothing of the block's own stream."""
        origins = self._origins(one, "key")
        main = None if self._call is None else self._call.main_input_slot
        slots = {leaf.slot for leaf in origins if leaf.call is None}
        return bool(slots) and main not in slots

    def _origins(self, one: _Placed, role: Role) -> list[Leaf]:
        """The inputs of the block that an operand is made of, through however many linear maps."""
        found, waiting, seen = [], list(one.feeding.get(role, ())), set()
        while waiting:
            leaf = waiting.pop()
            if id(leaf) in seen:
                continue
            seen.add(id(leaf))
            if leaf.call is None:
                found.append(leaf)
            elif leaf.call.main_input is not None:
                waiting.extend(self._probed.feeding(leaf.call.main_input))
        return found

    # -- what the answer needs

    def name(self, call: Call) -> str | None:
        """A module's path from the block."""
        return self._names.get(call.module)

    @property
    def block(self) -> Call:
        assert self._call is not None
        return self._call

    def inside(self, leaf: Leaf) -> bool:
        """Whether a leaf is the output of a linear map called in the block."""
        return leaf.call is not None and any(call is leaf.call for call in self.block.inside())

    def feeding(self, tensor: Tensor) -> list[Leaf]:
        return self._probed.feeding(tensor)

    def gradients(self, total: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
        return self._probed.gradients(total, tensors)

    def layout(self, tensor: Tensor, rows: int, positions: int) -> dict[str, Any] | None:
        """How a tensor has examples and positions, as fields of a site; None if it is not known how."""
        shape = tensor.shape
        if tensor.dim() == 2 and shape[0] == rows * positions:
            return {"flat": True}
        if tensor.dim() < 3:
            return None
        if shape[:2] == (rows, positions) and tensor.dim() == 3:
            return {}
        if tensor.dim() == 4 and shape[1] == 1 and (shape[0], shape[2]) == (rows, positions):
            return {"axes": (0, 2)}
        if shape[:2] == (positions, rows) and tensor.dim() == 3:
            return {"axes": (1, 0)}
        return None


class _Answer:
    """The sites of one attention of one block."""

    def __init__(self, view: _BlockView, placed: Sequence[_Placed]) -> None:
        self._view = view
        self._placed = placed
        self._one = placed[0]
        self._attention = self._one.attention
        self.sites: dict[str, Site] = {}
        self.absent: dict[str, str] = {}

    def made(self) -> BlockAttention:
        attention = self._attention
        projections: dict[Role, _Projection] = {}
        for role in ROLES:
            word = f"{role}_output"
            length = attention.queries if role == "query" else attention.keys
            try:
                projections[role] = self._projection(role)
                self.sites[word] = self._site(
                    projections[role].call,
                    "output",
                    "query" if role == "query" else "key_value",
                    projections[role].columns,
                    length,
                )
            except _RefusalError as error:
                self.absent[word] = str(error)
        output = None
        try:
            output, columns = self._output()
            self.sites["attention_value_output"] = self._site(
                output, "input", "query", columns, attention.queries
            )
        except _RefusalError as error:
            self.absent["attention_value_output"] = str(error)
        module = self._module(output, [one.call for one in projections.values()])
        path = self._view.name(module)
        if path is None:
            why = f"the module that computes it ({module.path}) is no part of the block"
            return BlockAttention({}, dict.fromkeys(WORDS, why), None)
        self._place_module(module, path, output, projections)
        for role in ("query", "key"):
            if self._is_rotated(role) is False:
                self.absent[f"rotary_{role}"] = NO_ROTARY
        self.absent.update(self._matrices())
        return BlockAttention(self.sites, self.absent, path)

    def _shape(self) -> tuple[int, int]:
        return self._attention.rows, self._attention.queries

    # -- projections

    def _projection(self, role: Role) -> _Projection:
        """The columns of the one linear map that makes an operand."""
        if len({id(leaf.tensor) for one in self._placed for leaf in one.feeding.get(role, ())}) == 0:
            raise _RefusalError(f"no module hands over what its {_plural(role)} are made of")
        feeding = self._one.feeding[role]
        others = [leaf for one in self._placed[1:] for leaf in one.feeding.get(role, ())]
        if any(leaf not in feeding for leaf in others):
            raise _RefusalError(
                f"it computes {len(self._placed)} patterns, of which each has {_plural(role)} of another linear map"
            )
        found: list[tuple[Leaf, ColumnHeads, int]] = []
        for leaf in feeding:
            if leaf.call is None or self._view.name(leaf.call) is None:
                raise _RefusalError(f"its {_plural(role)} are not made by linear modules of the block alone")
            heads = self._column_heads(leaf, self._one.moments[role][id(leaf.tensor)], role)
            if heads.mixed:
                raise _RefusalError(
                    f"{heads.mixed} columns of {self._view.name(leaf.call)} count for several heads at once"
                )
            if heads.moved:
                raise _RefusalError(
                    f"positions are mixed between {self._view.name(leaf.call)} and its {_plural(role)}"
                )
            found += [(leaf, heads, count) for count in sorted({*heads.count[heads.fed].tolist()})]
        total: int = getattr(self._attention, role).shape[1]
        if len(found) > 1:  # latent attention: a part of each key is the same for all heads
            own = [one for one in found if one[2] < total]
            found = own if len(own) < len(found) else found
        if len(found) > 1:
            names = ", ".join(
                dict.fromkeys(str(self._view.name(leaf.call)) for leaf, *_ in found if leaf.call)
            )
            raise _RefusalError(f"its {_plural(role)} are made by several linear maps: {names}")
        leaf, heads, count = found[0]
        assert leaf.call is not None
        return _Projection(leaf.call, self._columns(heads, count, total, role))

    def _is_rotated(self, role: Role) -> bool | None:
        """Whether channels are mixed between the projections and an operand; None if that cannot be told."""
        moments = self._one.moments.get(role)
        if not moments:
            return None
        read = [column_heads(one, None) for one in moments.values()]
        return any(bool((one.channel[one.fed] < 0).any()) for one in read)

    def _column_heads(self, leaf: Leaf, moments: Moments, role: Role) -> ColumnHeads:
        length = self._attention.queries if role == "query" else self._attention.keys
        layout = self._view.layout(leaf.tensor, self._attention.rows, length)
        axis = None
        if layout is not None:
            rows = self._attention.rows
            if layout.get("flat"):
                moments = Moments(*(part.reshape(rows, length, -1) for part in vars(moments).values()))
            axis = layout.get("axes", (0, 1))[1]
        return column_heads(moments, axis)

    def _columns(self, heads: ColumnHeads, count: int, total: int, role: Role) -> HeadColumns:
        if role == "query" and count != 1:
            raise _RefusalError(f"{count} heads share each query")
        chosen = heads.fed & (heads.count == count)
        by_head: dict[int, list[int]] = {}
        for column in chosen.nonzero()[:, 0].tolist():
            by_head.setdefault(int(heads.first[column]), []).append(column)
        if sorted(by_head) != list(range(0, total, count)):
            raise _RefusalError(
                f"its {_plural(role)} are made of columns for {len(by_head)} of {total // count} heads"
            )
        columns = head_columns([by_head[head] for head in sorted(by_head)])
        if isinstance(columns, str):
            raise _RefusalError(columns)
        if role == "value":
            rising = [[int(heads.channel[column]) for column in by_head[head]] for head in sorted(by_head)]
            if any(row != list(range(row[0], row[0] + len(row))) for row in rising):
                raise _RefusalError(
                    "the columns of its values are mixed before they are multiplied with the pattern"
                )
        return columns

    def _site(
        self, call: Call, side: Literal["input", "output"], width: Width, columns: HeadColumns, length: int
    ) -> Site:
        tensor = call.main_input if side == "input" else call.main_output
        path = self._view.name(call)
        if tensor is None or path is None:
            raise _RefusalError("its projection is no part of the block")
        layout = self._view.layout(tensor, self._attention.rows, length)
        if layout is None:
            raise _RefusalError(
                f"its tensor has the shape {tuple(tensor.shape)} there, in which no axis counts the"
                f" {length} positions of {self._attention.rows} examples"
            )
        return Site(
            path,
            side,
            width=width,
            heads="query" if width == "query" else "key_value",
            columns=columns,
            **layout,
        )

    # -- output projection

    def _output(self) -> tuple[Call, HeadColumns]:
        """The linear map that reads the pattern times the values, and the columns of each head in its input."""
        result = self._attention.result
        readers = [
            call
            for call in self._view.block.inside()
            if is_linear(call.module)
            and call.entered > self._attention.at
            and isinstance(call.main_input, Tensor)
            and made_of(call.main_input, result)
        ]
        readers = [call for call in readers if not _inside_linear(call)]
        if not readers:
            raise _RefusalError("no linear module reads the pattern times the values")
        if len({call.path for call in readers}) > 1:
            names = ", ".join(str(self._view.name(call)) for call in readers)
            raise _RefusalError(f"several linear maps read the pattern times the values: {names}")
        call = readers[0]
        if len(self._placed) > 1:
            raise _RefusalError(
                f"it computes {len(self._placed)} patterns, which one tensor of heads is made of"
            )
        mixing = self._mixing_heads(call)
        if mixing is not None:
            raise _RefusalError(
                f"{mixing} lies between the pattern times the values and {self._view.name(call)}, and mixes the heads"
            )
        return call, self._result_columns(call, result)

    def _mixing_heads(self, reader: Call) -> str | None:
        """A norm over all heads between the pattern times the values and their projection."""
        for call in self._view.block.inside():
            if not self._attention.at < call.entered < reader.entered or call.children:
                continue
            given, back = call.main_input, call.main_output
            if given is None or back is None or given.shape != back.shape or not keeps_columns(call.module):
                continue
            if (
                not made_of(given, self._attention.result)
                or given.shape[-1] == self._attention.result.shape[-1]
            ):
                continue
            with torch.no_grad():
                other = given.detach().clone()
                half = given.shape[-1] // 2
                other[..., half:] = 0
                if not torch.equal(call.module(given.detach())[..., :half], call.module(other)[..., :half]):
                    return self._view.name(call)
        return None

    def _result_columns(self, call: Call, result: Tensor) -> HeadColumns:
        """The columns of each head in what a linear map reads."""
        given = call.main_input
        assert given is not None
        ranks = torch.arange(1, given.shape[-1] + 1).to(given)
        once, ranked = (
            self._view.gradients(total, [result])[0] for total in (given.sum(), (given * ranks).sum())
        )
        if once is None or ranked is None:
            raise _RefusalError(
                f"no gradient leads from {self._view.name(call)} to the pattern times the values"
            )
        heads = self._attention.heads
        by_head = [
            _heads_first(one, heads, self._attention.rows, self._attention.queries) for one in (once, ranked)
        ]
        if by_head[0] is None or by_head[1] is None:
            raise _RefusalError(f"the pattern times the values has the shape {tuple(result.shape)}")
        ones, ranks_of = (one.flatten(2).double() for one in by_head if one is not None)  # [H, dv, n]
        size = ones.pow(2).sum(-1)
        column = (ones * ranks_of).sum(-1) / size.clamp_min(1e-60)
        off = (ranks_of - column[..., None] * ones).norm(dim=-1) / ranks_of.norm(dim=-1).clamp_min(1e-30)
        if bool((size == 0).any()) or bool((off > 2e-3).any()):
            raise _RefusalError(f"the heads are not apart in what {self._view.name(call)} reads")
        table = (column.round().long() - 1).tolist()
        columns = head_columns(table)
        if isinstance(columns, str):
            raise _RefusalError(columns)
        return columns

    # -- the module

    def _module(self, output: Call | None, projections: Sequence[Call]) -> Call:
        """The module that computes attention: with its projections inside, if one has them all."""
        block, module = self._view.block, self._attention.call
        above = list(_ancestors(module, block))
        around = [call for call in above if all(_within(one, call) for one in projections)]
        streams = [call for call in above if self._is_stream(call.main_input)]
        module = next(iter(around if projections else streams), module)
        result = None if output is None else output.main_output
        for call in _ancestors(module, block):
            if call is module or call is block:
                continue
            same_input = _same(call.main_input, module.main_input)
            if same_input and (
                _same(call.main_output, module.main_output) or _same(call.main_output, result)
            ):
                module = call
            else:
                break
        return module

    def _is_stream(self, tensor: Tensor | None) -> bool:
        return tensor is not None and self._view.layout(tensor, *self._shape()) is not None

    def _place_module(
        self, module: Call, path: str, output: Call | None, projections: Mapping[Role, _Projection]
    ) -> None:
        """The module's input and output."""
        attention = self._attention
        key = projections.get("key", projections.get("value"))
        counts = AttentionHeads(
            attention.heads,
            self._key_value_heads() if key is None else key.columns.heads,
            None if attention.query is None else attention.query.shape[-1],
        )
        slot = self._input_slot(module, projections)
        given = module.inputs.get(slot)
        layout = None if given is None else self._view.layout(given, *self._shape())
        if layout is None or module is self._view.block:
            shape = None if given is None else tuple(given.shape)
            self.absent["attention_input"] = (
                "the block itself computes attention, without a module for it"
                if module is self._view.block
                else f"what its module is given has the shape {shape}, in which examples and positions are not apart"
            )
            self.absent.update(dict.fromkeys(INSIDE, self.absent["attention_input"]))
        else:
            shown = None if slot == module.main_input_slot else slot
            self.sites["attention_input"] = Site(path, "input", shown, attention=counts, **layout)
        result = None if output is None else output.main_output
        returned = module.main_output
        if output is not None and not _same(returned, result):
            module, returned = output, result
        elif output is None and self._adds_its_input(module):
            self.absent["attention_output"] = (
                f"{path} adds what it is given to its result before it returns, and no linear module reads the result"
            )
            return
        where = self._view.name(module)
        layout = None if returned is None else self._view.layout(returned, *self._shape())
        if where is None or layout is None or (output is None and module is self._view.block):
            self.absent["attention_output"] = "no module hands over what its heads have in common alone"
            return
        back = next(iter(module.outputs))
        self.sites["attention_output"] = Site(where, slot=None if back in (None, 0) else back, **layout)

    def _adds_its_input(self, module: Call) -> bool:
        """Whether what a module returns has a way from what it is given that does not lead through attention."""
        given, returned = module.main_input, module.main_output
        if given is None or returned is None:
            return False
        return made_of(returned, given, not_through=self._attention.result)

    def _input_slot(self, module: Call, projections: Mapping[Role, _Projection]) -> str | int | None:
        """The input of the attention module that its projections are given."""
        wanted = self._first_input(projections.get("query"), module)
        usual = module.main_input_slot
        if wanted is not None and not _same(module.main_input, wanted):
            for slot, value in module.inputs.items():
                if _same(value, wanted):
                    return slot
        return usual

    def _first_input(self, projection: _Projection | None, module: Call) -> Tensor | None:
        """What the first of the linear maps is given that lead to a projection's output."""
        if projection is None:
            return None
        call = projection.call
        for _ in range(4):
            before = [
                leaf.call
                for leaf in self._view.feeding(call.main_input)  # type: ignore[arg-type]  # linear maps have one
                if leaf.call is not None and _within(leaf.call, module)
            ]
            if len(before) != 1:
                break
            call = before[0]
        return call.main_input

    def _key_value_heads(self) -> int:
        key = self._attention.key
        return self._attention.heads if key is None else key.shape[1]

    # -- matrices

    def _matrices(self) -> dict[str, str]:
        """What cannot be said of scores and pattern."""
        attention = self._attention
        rows, positions = self._view._rows, self._view._positions
        if len(self._placed) > 1:
            why = f"it computes {len(self._placed)} patterns, and a score or probability of which is not said"
            return dict.fromkeys(INSIDE, why)
        if (attention.rows, attention.queries) not in ((rows, positions), (positions, rows)):
            why = (
                f"its matrices are of {attention.queries} queries in {attention.rows} windows, and not of"
                f" {positions} in {rows} examples"
            )
            return dict.fromkeys(INSIDE, why)
        if attention.query is None or attention.key is None:
            why = "its scores are no plain product of queries and keys"
            return dict.fromkeys(
                ("rotary_query", "rotary_key", "expanded_head_key", "expanded_head_value"), why
            )
        return {}


def _plural(role: Role) -> str:
    return {"query": "queries", "key": "keys", "value": "values"}[role]


def _heads_first(tensor: Tensor, heads: int, rows: int, positions: int) -> Tensor | None:
    """A result by heads as `[heads, dv, rows, positions]`."""
    shape = tensor.shape
    if tensor.dim() == 3 and shape[0] == rows * heads:
        tensor = tensor.reshape(rows, heads, *shape[1:])
        shape = tensor.shape
    if tensor.dim() != 4:
        return None
    if shape[:3] == (rows, heads, positions):
        return tensor.permute(1, 3, 0, 2)
    if shape[:3] == (rows, positions, heads):
        return tensor.permute(2, 3, 0, 1)
    if shape[:3] == (positions, rows, heads):
        return tensor.permute(2, 3, 1, 0)
    return None


def _ancestors(call: Call, last: Call) -> Iterator[Call]:
    """A call and the calls around it, up to `last`."""
    here: Call | None = call
    while here is not None:
        yield here
        if here is last:
            return
        here = here.parent


def _within(call: Call, other: Call) -> bool:
    """Whether a call was made inside another."""
    here: Call | None = call
    while here is not None and here is not other:
        here = here.parent
    return here is other


def _inside_linear(call: Call) -> bool:
    """Whether a call is a part of a linear map: of one that is adapted."""
    return call.parent is not None and is_linear(call.parent.module)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same numbers in the same order."""
    if one is None or other is None or one.numel() != other.numel():
        return False
    return one is other or torch.equal(one.detach().reshape(-1), other.detach().reshape(-1))
