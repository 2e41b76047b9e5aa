"""Read an activation where it passes, and put a new one in its place. The only file that does either.

A *stream* is the tensor at a site in one layout for all architectures, `[batch, positions, columns]`. Reading picks
units out of it; writing returns a new stream with other values in those units, everything else bit for bit as
it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from intervenable.attention_mode import InsideHook
from intervenable.errors import EditError, LocationError, LocationRangeError, UnsupportedModelError
from intervenable.function_mode import FunctionHook
from intervenable.hooks import Hook, NthCall
from intervenable.inputs import RunInputs
from intervenable.linear_maps import matrix_of, parameter_of
from intervenable.masked_scores import floor_of
from intervenable.mixer_state import state_after
from intervenable.norms import norm_scale
from intervenable.passage import Passage
from intervenable.unit_index import UnitIndex
from intervenable.units import Level, UnitRows, Units, Whole
from model_maps import COMPONENTS, Bands, FunctionName, HeadColumns, Side, Stack

# --- a component in a model -------------------------------------------------------------------------------

Kind = Literal["stored", "sum", "per_head", "norm_scale", "inside", "state"]


class StreamAxes(NamedTuple):
    """Where a tensor has its examples and its tokens, if not on the first two axes."""

    rows: int
    """The axis of examples."""

    positions: int
    """The axis of tokens; the same one if examples lie behind each other on it."""

    def stream(self, tensor: Tensor, batch: int) -> Tensor:
        """The tensor as `[batch, positions, columns]`."""
        if self.rows == self.positions:
            ahead = tensor.movedim(self.rows, 0)
            return ahead.reshape(batch, -1, *ahead.shape[1:]).flatten(2)
        return tensor.movedim((self.rows, self.positions), (0, 1)).flatten(2)

    def tensor(self, stream: Tensor, like: Tensor) -> Tensor:
        """The inverse of `stream`."""
        rest = [size for axis, size in enumerate(like.shape) if axis not in self]
        by_axis = stream.reshape(*stream.shape[:2], *rest)
        if self.rows == self.positions:
            return by_axis.flatten(0, 1).movedim(0, self.rows)
        return by_axis.movedim((0, 1), (self.rows, self.positions))


class BoundFunction(NamedTuple):
    """A function that a module calls, as the place of a component."""

    name: FunctionName

    nth: int = 0
    """Which of its calls."""

    weight: str | None = None
    """The parameter of the module that it multiplies with; then the site may be what is multiplied."""


@dataclass(frozen=True, eq=False)
class BoundSite:
    """A component of one model at one layer: the module to hook, and how its tensor is laid out."""

    component: str
    """The component's name, or the module path the user gave."""

    layer: int | None
    """The block, counted from 0; None outside the blocks."""

    module: nn.Module
    """The module it passes."""

    path: str
    """That module's path in the model."""

    side: Side
    """Whether it goes in or comes out."""

    slot: str | int | None = None
    """Which input or output it is."""

    kind: Kind = "stored"
    """Whether the tensor is there as it is, or has to be made from what is there."""

    width: int | None = None
    """Size of one unit's last axis, if it can be known without a run."""

    columns: HeadColumns | None = None
    """The columns it has of the tensor; None means all."""

    by_heads: bool = False
    """Whether units are heads."""

    flat: bool = False
    """Whether batch and positions are one axis of the tensor."""

    plus: BoundSite | None = None
    """For a `sum`: what is added to this site's tensor."""

    read_only: str = ""
    """Why it cannot be written, if it cannot."""

    head_counts: tuple[int, int] = (0, 0)
    """For what is computed inside an attention module: its query heads and its key-value heads."""

    bands: Bands | None = None
    """How the softmax lies whose matrix it is, if not as one."""

    causal: bool = False
    """Whether it is a matrix in which no query reads a key behind itself."""

    stack: Stack | None = None
    """The stack whose positions it has (a matrix: in its rows); None where there is but one."""

    axes: StreamAxes | None = None
    """Where it has its examples and its tokens, if that was found out by a run."""

    key_stack: Stack | None = None
    """The stack whose positions the columns of a matrix have."""

    scale: float = 1.0
    """What the model multiplies its tensor with before it is the component."""

    function: BoundFunction | None = None
    """The function inside the module whose result it is, and which of its calls; None if the module's own."""

    call: NthCall | None = None
    """Which of the module's calls in its block it passes; None if there is but one."""

    @property
    def word(self) -> str:
        """The component's name without a prefix; a module path as it is."""
        return COMPONENTS[self.component].word if self.component in COMPONENTS else self.component

    @property
    def heads(self) -> int | None:
        """How many heads its units can name; None if it has none."""
        if self.kind == "inside":
            return self.head_counts[1 if self.word == "rotary_key" else 0]
        return self.columns.heads if self.by_heads and self.columns else None

    @property
    def matrix(self) -> bool:
        """Whether it is a matrix of queries by keys for each head."""
        return self.kind == "inside" and COMPONENTS[self.component].axes == "matrix"

    @property
    def label(self) -> str:
        """The component with its layer, for messages."""
        return self.component if self.layer is None else f"{self.component} of layer {self.layer}"

    def input_of_module(self) -> BoundSite:
        """The same place on the other side of the module: what goes into it."""
        return replace(self, side="input", slot=None, plus=None, kind="stored")

    # -- layout

    def stream(self, passage: Passage, inputs: RunInputs) -> Tensor:
        """The tensor as `[batch, positions, columns]`."""
        return self._as_stream(passage.take(self.side, self.slot), inputs.of(self.stack))

    def _as_stream(self, tensor: Tensor, inputs: RunInputs) -> Tensor:
        if self.axes is not None and self.flat:  # positions first
            return tensor.reshape(-1, inputs.batch, tensor.shape[-1]).transpose(0, 1)
        if self.axes is not None:
            return self.axes.stream(tensor, inputs.batch)
        if self.flat:
            return tensor.reshape(inputs.batch, -1, tensor.shape[-1])
        if tensor.dim() == 2:
            return tensor[:, None]
        return tensor.transpose(0, 1) if inputs.time_first else tensor

    def _from_stream(self, stream: Tensor, like: Tensor, inputs: RunInputs) -> Tensor:
        if self.axes is not None and self.flat:
            return stream.transpose(0, 1).reshape(like.shape)
        if self.axes is not None:
            return self.axes.tensor(stream, like)
        if inputs.time_first and like.dim() == 3:
            return stream.transpose(0, 1)
        return stream.reshape(like.shape)

    def index(self, units: Units | UnitRows | Whole, inputs: RunInputs, device: torch.device) -> UnitIndex:
        """The units of one run as an index into this site's stream, on its device."""
        if self.kind == "inside":
            return self._index_inside(units, inputs, device)
        inputs = inputs.of(self.stack)
        located = None if isinstance(units, Whole) else units
        real = None if located is None else _on(located.real, device)
        last = -1 if located is None else located.last_position
        if not self.by_heads:
            columns = self._column_index(device)
            if located is None:
                return UnitIndex((slice(None), slice(None), columns))
            if located.spans is not None and isinstance(columns, slice):
                return UnitIndex(
                    (slice(None), located.spans["positions"], columns), None, None, last, view=True
                )
            positions = _on(located.filled["positions"], device)
            rows = _rows(units, len(positions), device)[:, None]
            if isinstance(columns, slice):
                return UnitIndex((rows, positions, columns), real, None, last)
            return UnitIndex((rows[..., None], positions[..., None], columns), real, None, last)
        batch = inputs.batch if located is None else len(located)
        filled = {} if located is None else located.filled
        heads, positions = (_on(filled.get(level), device) for level in ("heads", "positions"))
        if positions is None:
            positions = torch.arange(inputs.length, device=device)[None].expand(batch, -1)
        if real is not None and real.dim() == 2:  # unit `h`: all positions of each head
            real = real[..., None].expand(-1, -1, positions.shape[1])
        rows = _rows(units, batch, device)[:, None, None, None]
        return UnitIndex(
            (rows, positions[:, None, :, None], self._head_columns(heads, batch, device)),
            real,
            heads,
            last,
            columns=self.columns if located is None else None,
        )

    def _index_inside(
        self, units: Units | UnitRows | Whole, inputs: RunInputs, device: torch.device
    ) -> UnitIndex:
        """An index into `[b, heads, positions, dh]` or `[b, heads, queries, keys]`."""
        if isinstance(units, Whole):
            return UnitIndex((slice(None),) * 4)
        if units.spans is not None:
            axes: tuple[Level, ...] = ("heads", "queries", "keys") if self.matrix else ("heads", "positions")
            slices = [units.spans.get(level, slice(None)) for level in axes]
            columns = () if self.matrix else (slice(None),)
            return UnitIndex((slice(None), *slices, *columns), None, None, units.last_position, view=True)
        batch, real = len(units), _on(units.real, device)
        length = inputs.of(self.stack).length
        sizes: dict[Level, int] = {"heads": self.heads or 0, "positions": length}
        if self.matrix:
            keys = inputs.of(self.key_stack).length
            sizes = {"heads": self.heads or 0, "queries": length, "keys": keys}
        parts = [_rows(units, batch, device)[:, None]]
        for level, size in sizes.items():
            if level not in units.filled:  # not located: all there are
                parts.append(torch.arange(size, device=device).expand(batch, -1))
                real = None if real is None else real[..., None].expand(*real.shape, size)
            else:
                parts.append(_on(units.filled[level], device))
        # Each part along an axis of its own, the batch along the first of them.
        spread = [
            part.view(batch, *(part.shape[1] if other == axis else 1 for other in range(1, len(parts))))
            for axis, part in enumerate(parts)
        ]
        whole = () if self.matrix else (slice(None),)
        return UnitIndex((*spread, *whole), real, None, units.last_position)

    def _head_columns(self, heads: Tensor | None, batch: int, device: torch.device) -> Tensor:
        """The columns of each head, `[b, heads, 1, dh]`."""
        assert self.columns is not None
        if heads is not None and self.columns.contiguous:
            start, width = self.columns.start, self.columns.width
            return (heads[..., None] * width + torch.arange(start, start + width, device=device))[:, :, None]
        first = torch.tensor(_first_columns(self.columns), device=device)
        first = first[None].expand(batch, -1) if heads is None else first[heads]
        return (first[..., None] + torch.arange(self.columns.width, device=device))[:, :, None]

    def _column_index(self, device: torch.device) -> Any:
        columns = self.columns
        if columns is None:
            return slice(None)
        if columns.contiguous:
            return slice(columns.start, columns.start + columns.heads * columns.width)
        return torch.tensor(columns_of_heads(columns), device=device)

    # -- reading and writing

    def read(
        self, passage: Passage, index: UnitIndex, inputs: RunInputs, added: Tensor | None = None
    ) -> Tensor:
        """The units `index` names, as the model has them now.

        Shape: `[b, n, d]`; by heads `[b, heads, n, dh]` (`head_attention_output`: `[b, heads, n, D]`).
        """
        run, inputs = inputs, inputs.of(self.stack)
        if self.kind == "per_head":
            values = self._as_stream(passage.take("input", None), inputs)
            added_by_heads = index.read(values) @ self._output_weights(index.heads, values.device)
            return added_by_heads.to(passage.take(self.side, self.slot).dtype)  # autocast may have another
        if self.kind == "inside":
            return self._protected(self._read_inside(passage.take(self.side, None), index))
        if self.kind == "state":
            return self._state(passage, index)
        if self.kind == "norm_scale":
            return index.read(
                norm_scale(passage.module, self._as_stream(passage.take("input", None), inputs))
            )
        stream = self.stream(passage, run)
        if stream.dim() != 3 and self.columns is not None:
            raise LocationError(
                f"{self.label} has shape {tuple(stream.shape)}, which has no [batch, positions] axes."
            )
        if stream.dim() != 3 and index.last_position >= 0:
            raise LocationError(
                f"{self.label} has shape {tuple(stream.shape)}, so that no position can be named in it: leave its"
                " locations out to have it whole."
            )
        if stream.dim() == 3 and index.last_position >= stream.shape[1]:
            raise LocationRangeError(
                f"Position {index.last_position} is out of range in {self.label}: the model's tensor has"
                f" {stream.shape[1]} position(s) here and the input {inputs.length}. Locate within those, or leave"
                " the locations out to have it whole."
            )
        units = stream if stream.dim() != 3 else index.read(stream)
        if self.scale != 1.0:
            units = units * self.scale
        return units if added is None else units + index.read(added)

    def read_whole(self, passage: Passage, inputs: RunInputs, added: Tensor | None = None) -> Tensor:
        """All units, as `read` gives them; maybe a view of what the model has."""
        tensor = passage.take(self.side, self.slot)
        columns = self.columns
        if (
            self.kind == "stored"
            and self.scale == 1.0
            and (columns is None or (self.by_heads and columns.contiguous))
        ):
            stream = self._as_stream(tensor, inputs.of(self.stack))
            if columns is None:
                return stream
            if stream.dim() == 3:  # of anything else `read` tells
                heads, width = columns.heads, columns.width
                found = stream.narrow(2, columns.start, heads * width)
                return found.view(*found.shape[:2], heads, width).transpose(1, 2)
        return self.read(passage, self.index(Whole(), inputs, tensor.device), inputs, added)

    def write(self, passage: Passage, index: UnitIndex, inputs: RunInputs, old: Tensor, new: Tensor) -> None:
        """Let the model go on with `new` where it had `old` (as `read` gave it)."""
        tensor = passage.take(self.side, self.slot)
        if self.kind == "state":
            return  # nothing in this pass reads it
        if self.kind == "inside":
            passage.put(self.side, None, self._written_inside(tensor, index, new))
            return
        inputs = inputs.of(self.stack)
        stream = self._as_stream(tensor, inputs)
        if self.kind == "per_head":
            change = new - old
            if index.real is not None:
                change = torch.where(index.real[..., None], change, torch.zeros_like(change))
            rows, positions = index.index[0][:, 0, :, 0], index.index[1][:, 0, :, 0]
            result = stream.index_put((rows, positions), change.sum(1), accumulate=True)
        elif self.kind == "norm_scale":
            result = self._rescaled(passage.module, stream, index, old, new)
        elif self.kind == "sum" or self.scale != 1.0:
            change = new - old
            result = index.add(stream, change if self.scale == 1.0 else change / self.scale)
        elif stream.dim() != 3:
            result = new
        else:
            result = index.write(stream, new)
        passage.put(self.side, self.slot, self._from_stream(result, tensor, inputs))

    def _state(self, passage: Passage, index: UnitIndex) -> Tensor:
        if index.last_position >= 0:
            raise LocationError(
                f"{self.label} is what is kept of all positions, so that none can be named in it: leave its locations"
                " out to have it whole."
            )
        state = state_after(passage, self.layer)
        if state is None:
            raise UnsupportedModelError(
                f"{self.label}: {type(passage.module).__name__} left no state behind. It does so where the model"
                " fills a cache: not with use_cache=False, and not while training."
            )
        return state

    # -- inside an attention module

    def _protected(self, scores: Tensor) -> Tensor:
        """Scores with -inf where they are masked; anything else as it is."""
        if self.word != "attention_scores":
            return scores
        return scores.masked_fill(scores <= floor_of(scores.dtype), -torch.inf)

    def protected(self, old: Tensor, new: Tensor) -> Tensor:
        """What an edit comes to: scores that are masked stay so."""
        return torch.where(old == -torch.inf, old, new) if self.word == "attention_scores" else new

    def _read_inside(self, stream: Tensor, index: UnitIndex) -> Tensor:
        if index.last_position >= stream.shape[2]:
            raise LocationRangeError(
                f"Position {index.last_position} is out of range in {self.label}, which has {stream.shape[2]} here."
            )
        return index.read(stream)

    def _written_inside(self, tensor: Tensor, index: UnitIndex, new: Tensor) -> Tensor:
        if self.word == "attention_scores":
            old = index.read(tensor)
            new = torch.where(old <= floor_of(tensor.dtype), old, new)
        return index.write(tensor, new)

    def renormalize(self, passage: Passage, index: UnitIndex, before: Tensor, divide: bool) -> None:
        """Make the rows of a pattern that an edit touched sum to one, or find out that they do not.

        Rows without any mass stay as they are; those that had none before, of queries at padding, are not looked at.

        Args:
            passage: Where the pattern passes, edited.
            index: What was edited.
            before: The pattern before.
            divide: Whether to divide the rows by their sums; otherwise they are only looked at.

        Raises:
            EditError: a row does not sum to one and is not to be divided.
        """
        pattern = passage.take(self.side, self.slot)
        touched = index.write(torch.zeros_like(pattern, dtype=torch.bool), torch.ones((), dtype=torch.bool))
        rows = touched.any(-1, keepdim=True)
        sums = pattern.sum(-1, keepdim=True)
        if divide:
            whole = rows & (sums > 0)
            passage.put(self.side, self.slot, torch.where(whole, pattern / sums.where(whole, 1.0), pattern))
            return
        rows = rows & (before.sum(-1, keepdim=True) > 0)
        sums = sums.detach()
        off = torch.where(rows, (sums - 1).abs(), torch.zeros_like(sums)).nan_to_num(torch.inf)
        tolerance = 4 * pattern.shape[-1] ** 0.5 * torch.finfo(pattern.dtype).eps + 1e-5
        if bool((off > tolerance).any()):
            example, head, query, _ = (int(i) for i in (off == off.max()).nonzero()[0])
            raise EditError(
                f"{self.label}: after the edit the row of query {query} of head {head} in example {example} sums to"
                f" {float(sums[example, head, query, 0]):.4g}, not to 1. Give a pattern whose rows do, or set"
                " renormalize='rows' or 'none'."
            )

    def output_projection(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """The output projection by heads, `[heads, dh, D]`, and its bias, `[D]`, if it has one."""
        return self._output_weights(None, device)[0], self._matrix(device)[1]

    def _matrix(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return matrix_of(self.module, device, f"{self.component} needs the weight of {self.path}")

    def _output_weights(self, heads: Tensor | None, device: torch.device) -> Tensor:
        """The output projection by heads: `[b or 1, heads, dh, D]`."""
        assert self.columns is not None
        weight, _ = self._matrix(device)
        by_heads = torch.stack(
            [weight[start : start + self.columns.width] for start in _first_columns(self.columns)]
        )
        return by_heads[None] if heads is None else by_heads[heads]

    def _rescaled(
        self, module: nn.Module, stream: Tensor, index: UnitIndex, old: Tensor, new: Tensor
    ) -> Tensor:
        """A norm's output as if its divisor had been another; exact where it is the same."""
        bias = parameter_of(module, "bias", stream.device)
        output = index.read(stream)
        scaled = output if bias is None else output - bias
        return index.add(stream, (_wide(scaled) * (old / _wide(new) - 1)).to(output.dtype))


@lru_cache(maxsize=1024)
def _first_columns(columns: HeadColumns) -> tuple[int, ...]:
    return tuple(columns.first_column(head) for head in range(columns.heads))


@lru_cache(maxsize=1024)
def columns_of_heads(columns: HeadColumns) -> tuple[int, ...]:
    """Every column that a head has, head after head."""
    return tuple(first + offset for first in _first_columns(columns) for offset in range(columns.width))


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _rows(units: Units | UnitRows | Whole, batch: int, device: torch.device) -> Tensor:
    """`[b]`: the row of the stream in which each example of the units is."""
    return units.rows.to(device) if isinstance(units, UnitRows) else torch.arange(batch, device=device)


def _on(tensor: Tensor | None, device: torch.device) -> Any:
    return None if tensor is None else tensor.to(device)


# --- hooking ----------------------------------------------------------------------------------------------


def hook_at(site: BoundSite, act: Callable[[Passage], None], *, writes: bool = False) -> Hook:
    """What is done at each passage of a site, as a hook.

    Args:
        site: Where.
        act: What; it is given the passage, from which the site reads and to which it writes.
        writes: Whether it may change what it is given.
    """
    if site.function is not None:
        slot = site.slot if isinstance(site.slot, int) else None
        name, nth, weight = site.function
        return Hook(site.module, site.side, act, FunctionHook(name, act, nth, slot, weight, site.side))
    if site.kind != "inside":
        return Hook(site.module, site.side, act, call=site.call)
    time_first = site.axes is not None and site.axes.rows > site.axes.positions
    return Hook(
        site.module,
        site.side,
        act,
        InsideHook(site.word, act, writes, *site.head_counts, time_first, site.bands),
    )
