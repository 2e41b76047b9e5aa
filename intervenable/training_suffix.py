"""The engine that trains a frozen model's interventions: what stays the same is computed once for each prompt.

Below the first edit nothing depends on what is trained. So the hidden states there are recorded once for each
different base prompt, with the keys and values of the tokens before the first edited one, and source values once
for each different source. A step then runs the model's own forward on the tokens from the first edited one to the
last that is read, with the blocks below the edit stubbed (for this thread alone) and the output embedding given the
read tokens alone. Nothing of this is believed: logits and gradients of a few examples are compared with the plain
path first, and what is not exact on the model at hand is not left out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from intervenable.binding import Places
from intervenable.errors import IntervenableError
from intervenable.evaluation_mode import evaluating
from intervenable.hooks import Hook, stubbed
from intervenable.inputs import RunInputs
from intervenable.model import IntervenableModel
from intervenable.padding import with_position_ids
from intervenable.passage import Passage
from intervenable.plan import Capture, Edit, Plan, make_plan
from intervenable.runs import Observers, run_base, run_source, without_cache
from intervenable.signatures import forward_signature
from intervenable.sweep_grids import model_blocks
from intervenable.training_data import IGNORED, Examples
from intervenable.training_engine import (
    Engine,
    PlainEngine,
    Read,
    device_of,
    logits_in,
    predicts_next,
)
from intervenable.training_prompts import (
    EditRows,
    digest,
    first_rows,
    numbered,
    picked_inputs,
    picked_units,
    picked_values,
    row_keys,
    row_tensors,
)
from intervenable.training_recording import BaseRecords, SourceRecords, Trunk, find_trunk, like_output
from intervenable.training_store import Budget
from intervenable.units import Units
from intervenable.wave_budget import bytes_of
from intervenable.wave_inputs import MASK, POSITIONS
from intervenable.wave_readout import output_embedding, reads_head
from intervenable.wave_rows import NoShortcutError

T = TypeVar("T")


class Shortcuts(NamedTuple):
    """What a way of computing steps leaves out."""

    blocks: bool
    """The blocks below the first edit."""

    tokens: bool
    """The tokens before the first edited one."""

    logits: bool
    """The logits that are not read."""


WAYS = (
    Shortcuts(True, True, True),
    Shortcuts(True, False, True),
    Shortcuts(True, False, False),
    Shortcuts(False, False, True),
    Shortcuts(False, False, False),
)
"""From the one that leaves out most to the one that caches source values alone."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far logits and gradients of the examples that are looked at may be from the plain path's, of the largest."""


def make_engine(
    model: IntervenableModel, examples: Examples, *, fast: bool = True, memory: int | None = None
) -> Engine:
    """The fastest engine that gives what the plain one gives, on a few of the examples; that one if there is none.

    Where the wrapped model trains too (its parameters require gradients) or is in training mode nothing about it is a
    constant.

    Args:
        fast: Whether to leave anything out.
        memory: Bytes of what is kept between steps; what does not fit is kept in a file. None: `wave_budget.DEFAULT`.
    """
    plain = PlainEngine(model, examples)
    wrapped = model.model
    trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in wrapped.parameters())
    if not fast or wrapped.training or trains:
        return plain
    if examples.left_out is not None:
        plain.notes = (
            "Interventions are left out of some examples, and others come before them: nothing is shared.",
        )
        return plain
    why: list[str] = []
    for way in WAYS:
        try:
            engine = SuffixEngine(model, examples, way, bytes_of(memory))
            if engine.is_exact(plain):
                return engine
            why.append("its numbers differ from those of the plain path")
        # What is wrong with the call itself the plain path will say.
        except IntervenableError:
            return plain
        # A model's own code, given what it was not made for, may raise anything.
        except Exception as error:
            why.append(f"{type(error).__name__}: {error}"[:200])
    plain.notes = (f"Nothing could be left out on this model ({why[0]}).",)
    return plain


# --- what several trainings share -------------------------------------------------------------------------

_Key = tuple[Any, ...]
_shared: ContextVar[OrderedDict[_Key, Any] | None] = ContextVar("shared_records", default=None)
MOST_SHARED = 6
"""How many recordings are kept for other trainings: bases and sources of data and evaluation, and some more."""


@contextmanager
def shared_records() -> Iterator[None]:
    """Let the trainings and evaluations in the block share what they record of models that stay as they are.

    Trainings at one place on one data set run its prompts once for all of them.
    """
    token = _shared.set(OrderedDict()) if _shared.get() is None else None
    try:
        yield
    finally:
        if token is not None:
            _shared.reset(token)


def _kept(model: nn.Module, key: _Key, make: Callable[[], T]) -> T:
    """What was made for this key on this model before, or is made now."""
    shared = _shared.get()
    if shared is None:
        return make()
    device = next((str(weight.device) for weight in model.parameters()), "cpu")
    kind = device.partition(":")[0]
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    key = (id(model), device, autocast, *key)
    if key not in shared:
        shared[key] = (model, make())  # the model, so that its identity is not given to another
        while len(shared) > MOST_SHARED:
            shared.popitem(last=False)
    shared.move_to_end(key)
    made: T = shared[key][1]
    return made


@dataclass(frozen=True, eq=False)
class _Feed:
    """What source runs keep for one edit."""

    capture: Capture
    inputs: RunInputs
    numbers: Tensor
    """`[N]` the number of each example's source among those that differ."""

    digest: bytes
    """Tells the sources of one data set, and where they are read, from those of another."""

    @cached_property
    def firsts(self) -> list[int]:
        """For each of those that differ the first example that has it."""
        return first_rows(self.numbers)

    @property
    def count(self) -> int:
        """How many differ."""
        return len(self.firsts)

    @property
    def key(self) -> _Key:
        """What else tells one recording from another."""
        site = self.capture.bound.source_site
        return ("source", site.component, site.layer, site.path, site.side, site.by_heads, self.digest)


class SuffixEngine:
    """Steps on recorded prompts.

    Args:
        model: The interventions on a frozen model.
        examples: The data.
        way: What to leave out.
        memory: Bytes for what is kept; beyond it is a file.

    Raises:
        NoShortcutError: it cannot be left out here.
        InputError, SourceError, LocationError, SubspaceError: something is wrong with the examples.
    """

    def __init__(self, model: IntervenableModel, examples: Examples, way: Shortcuts, memory: int) -> None:
        self.model, self.way = model, way
        self._budget = Budget(memory)
        batch = examples.batch(range(len(examples))).to(device_of(model))
        call = (batch.base, batch.sources, batch.unit_locations, None, batch.subspaces)
        plan = make_plan(model._bound, model.model, *call, "tokens", model.tokenizer)
        self._edits = [edit for edit in plan.edits if not edit.bound.intervention.collects]
        self._base = replace(
            plan.base, args=(), kwargs=_named(plan.base, model.model), attention_mask=plan.base.attention_mask
        )
        self._rows = [EditRows(edit.units, plan.base.batch) for edit in self._edits]
        self._read = _Reading(batch.labels.cpu(), plan.base, model.model)
        self._feeds = {
            capture.bound.index: _feed(capture, run.inputs)
            for run in plan.source_runs
            for capture in run.captures
        }
        self._sources = {
            index: _kept(model.model, feed.key, SourceRecords) for index, feed in self._feeds.items()
        }
        keys = row_keys(row_tensors(self._base))
        self._prompts, self._digest = numbered(keys), digest(keys)
        self._firsts = first_rows(self._prompts)
        self._distinct = len(self._firsts)
        sites = [edit.bound.site for edit in self._edits]
        self._head = (
            output_embedding(model.model) if way.logits and not reads_head(model.model, sites) else None
        )
        if way.logits and self._head is None:
            raise NoShortcutError("the model names no output embedding")
        self._first = (
            torch.stack([self._read.first, *(rows.first for rows in self._rows)]).amin(0)
            if self._rows
            else None
        )
        if way.tokens and (self._first is None or not self._cuts_tokens(plan)):
            raise NoShortcutError("no tokens come before the first one that is edited or read")
        self._trunk = self._find_trunk(sites)
        self._records = self._make_records()

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out, and where what is kept went."""
        found = []
        if self.way.blocks:
            found.append(
                f"{len(self._trunk.blocks)} blocks below the first edit ran once for each of {self._distinct}"
                " prompts."
            )
        if self.way.tokens:
            found.append("Tokens before the first edited one ran once, for their keys and values.")
        if self._feeds:
            count = sum(feed.count for feed in self._feeds.values())
            found.append(f"Source values were computed once for each of {count} sources.")
        if self.way.logits:
            found.append("Logits were computed where they are read.")
        if self._budget.mapped:
            found.append(f"{self._budget.mapped / 1e6:.0f} MB beyond the budget were kept in a file.")
        return tuple(found)

    # -- what can be left out

    def _cuts_tokens(self, plan: Plan) -> bool:
        simple = all(edit.bound.site.kind != "inside" for edit in self._edits)
        whole = plan.base.decoder is not None or plan.base.time_first or plan.base.length < 2
        return simple and not whole and self._first is not None and int(self._first.max()) > 0

    def _find_trunk(self, sites: Sequence[Any]) -> Trunk:
        nothing = Trunk((), {}, frozenset(), None)
        if not self.way.blocks:
            return nothing
        if self._base.decoder is not None:
            raise NoShortcutError("the model has two stacks")
        blocks = list(dict.fromkeys(model_blocks(Places(self.model.model), ())))
        if not blocks or not sites:
            raise NoShortcutError("the model has no list of blocks")
        few = list(range(min(2, self._base.batch)))
        trunk = find_trunk(self.model.model, picked_inputs(self._base, few), blocks, sites, self.way.tokens)
        if not trunk.blocks and not self.way.tokens:
            raise NoShortcutError("no block comes before the first edit")
        return trunk

    def _make_records(self) -> BaseRecords | None:
        if not self.way.blocks:
            return None
        span, cached = (0, self._base.length), 0
        if self.way.tokens:
            assert self._first is not None
            span = (int(self._first.min()), self._read.last + 1)
            cached = int(self._first.max())
        trunk, distinct = self._trunk, self._distinct
        last = None if trunk.last is None else trunk.paths[trunk.last]
        key = ("base", last, trunk.cache_layers, span, cached, self._digest)
        return _kept(
            self.model.model,
            key,
            lambda: BaseRecords(self.model.model, trunk, distinct, span, cached, self._budget),
        )

    # -- a step

    def step(self, rows: Sequence[int]) -> Read:
        """The logits that are read of some examples, with the graph of what is trained.

        Shape:
            logits: `[b, V]` with labels `[b]`, or `[b, P, V]` with `[b, P]`.
        """
        index = torch.as_tensor(list(rows))
        self._record(index)
        positions, labels = self._read.of(index)
        start, stop = 0, self._base.length
        if self.way.tokens:
            assert self._first is not None
            start, stop = int(self._first[index].min()), int(positions.max()) + 1
        base, cache = self._inputs(index, start, stop)
        captured = {
            number: self._sources[number].at(feed.numbers[index]) for number, feed in self._feeds.items()
        }
        edits = tuple(
            self._edit(edit, at, index, start) for edit, at in zip(self._edits, self._rows, strict=True)
        )
        plan = Plan(base, edits, (), ())
        options = {} if cache is not None else without_cache(self.model.model, base)
        with ExitStack() as stack:
            hooks: list[Hook] = []
            if self._records is not None:
                stack.enter_context(stubbed(self._stubs(self._records, index, start, stop)))
            if self._head is not None:
                hooks.append(Hook(self._head, "input", _keeping(positions - start)))
            output = run_base(
                self.model.model, plan, captured, options, Observers(before=hooks), cache
            ).output
        return self._read.taken(
            logits_in(output, self.model.model), positions - start, labels, self._head is None
        )

    def _edit(self, edit: Edit, at: EditRows, index: Tensor, start: int) -> Edit:
        batch = self._base.batch
        return replace(
            edit,
            units=cast(Any, at.of(index, start)),
            constant=picked_values(edit.constant, index, batch),
            subspaces=picked_values(edit.subspaces, index, batch),
        )

    def _inputs(self, index: Tensor, start: int, stop: int) -> tuple[RunInputs, Any]:
        """The inputs of some examples from one token to another, and the cache of the tokens before them."""
        picked = picked_inputs(self._base, index.tolist())
        kwargs = dict(picked.kwargs)
        if self.way.tokens:
            kwargs = {name: _cut(name, item, self._base.length, start, stop) for name, item in kwargs.items()}
        # Position ids are there where padding calls for them.
        picked = replace(picked, kwargs=kwargs, length=stop - start, attention_mask=None, input_ids=None)
        cache = None
        if self.way.tokens:
            assert self._records is not None
            cache = self._records.cache(self._prompts[index], start)
        return picked, cache

    def _stubs(
        self, records: BaseRecords, index: Tensor, start: int, stop: int
    ) -> dict[nn.Module, Callable[..., Any]]:
        """What the blocks below the first edit give instead: the last what was recorded, the others what they get."""

        def imitating(block: nn.Module) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                given = Passage(block, args, kwargs).take("input", None)
                return like_output(records.outputs[block], given)

            return forward

        stubs = {block: imitating(block) for block in self._trunk.blocks}
        last = self._trunk.last
        if last is not None:
            hidden = records.hidden(self._prompts[index], start, stop)
            stubs[last] = lambda *args, **kwargs: like_output(records.outputs[last], hidden)
        return stubs

    # -- what is computed once

    def _record(self, index: Tensor) -> None:
        """Run what is needed of these examples and was not run yet."""
        for number, feed in self._feeds.items():
            for sources in _chunks(feed.numbers[index], self._sources[number].known, feed.count):
                self._record_sources(number, feed, sources)
        if self._records is not None:
            for prompts in _chunks(self._prompts[index], self._records.known, self._distinct):
                rows = [self._firsts[prompt] for prompt in prompts]
                self._records.record(prompts, picked_inputs(self._base, rows))

    def _record_sources(self, number: int, feed: _Feed, sources: list[int]) -> None:
        rows = [feed.firsts[source] for source in sources]
        capture = replace(feed.capture, units=picked_units(feed.capture.units, rows))
        with torch.no_grad():
            values = run_source(self.model.model, picked_inputs(feed.inputs, rows), [capture])[number]
        if values.shape[0] != len(rows):
            raise NoShortcutError("the first axis of source values does not count examples")
        self._sources[number].put(sources, values, feed.count, self._budget)

    # -- whether it is right

    def is_exact(self, plain: PlainEngine) -> bool:
        """Whether logits and gradients of a few examples are those of the plain path."""
        rows = self._to_look_at()
        with evaluating(self.model):  # without the dropout of interventions
            here, there = self.step(rows), plain.step(rows)
            if here.logits.shape != there.logits.shape or not torch.equal(here.labels, there.labels):
                return False
            tolerance = TOLERANCES.get(there.logits.dtype, 1e-4)
            asked = (there.labels >= 0)[..., None].to(there.logits.device)
            off = torch.where(asked, (here.logits - there.logits).detach().float(), 0.0).abs().max()
            if not off <= tolerance * there.logits.detach().float().abs().max():
                return False
            trained = [value for value in self.model.parameters() if value.requires_grad]
            if not trained or not torch.is_grad_enabled():
                return True
            gradients = [_gradients(read, trained) for read in (here, there)]
        return all(
            bool((one - other).norm() <= 10 * tolerance * other.norm() + 1e-12)
            for one, other in zip(*gradients, strict=True)
        )

    def _to_look_at(self) -> list[int]:
        """Up to three examples: one with most real tokens, one with fewest, and the first."""
        counts = [self._base.count(row) for row in range(self._base.batch)]
        longest = max(range(len(counts)), key=counts.__getitem__)
        shortest = min(range(len(counts)), key=counts.__getitem__)
        return list(dict.fromkeys([longest, shortest, 0, len(counts) - 1]))[:3]


class _Reading:
    """Where the labels of each example are read, as `read_at` of the plain engine does."""

    def __init__(self, labels: Tensor, base: RunInputs, model: nn.Module) -> None:
        self._by_token = labels.dim() == 2
        self._labels = labels[:, 1:] if self._by_token and predicts_next(model) else labels
        inputs = base.decoder or base
        ends = [inputs.length - 1] * inputs.batch
        if inputs.real_positions is not None:
            ends = [real[-1] if real else inputs.length - 1 for real in inputs.real_positions]
        self._ends = torch.tensor(ends)
        asked = (self._labels != IGNORED).nonzero()
        self.last = int(asked[:, 1].max()) if self._by_token else int(self._ends.max())
        """The last position that is read in any example."""
        self.first = (self._labels != IGNORED).long().argmax(1) if self._by_token else self._ends.clone()
        """`[N]` the first position that is read in each."""

    def of(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, P]` where some examples are read, and their labels, `[b]` or `[b, P]`."""
        labels = self._labels[index]
        if not self._by_token:
            return self._ends[index][:, None], labels
        asked = (labels != IGNORED).any(0).nonzero().reshape(-1)
        return asked.expand(len(index), -1), labels[:, asked]

    def taken(self, logits: Tensor, positions: Tensor, labels: Tensor, whole: bool) -> Read:
        """What is read, out of logits of all positions (`whole`) or of those that are read alone.

        Raises:
            NoShortcutError: the model gave others.
        """
        labels = labels.to(logits.device)
        if logits.dim() == 2:
            if self._by_token:
                raise NoShortcutError("the model gives one answer, and there are labels for tokens")
            return Read(logits, labels)
        if whole:
            logits = _at(logits, positions)
        elif logits.shape[1] != positions.shape[1]:
            raise NoShortcutError(f"the model gave logits of {logits.shape[1]} positions")
        return Read(logits if self._by_token else logits[:, 0], labels)


CHUNK = 32
"""How many prompts run at once to be recorded. Which of them run together never depends on the order in which
examples are asked for, so that a training that was killed goes on with the same numbers, to the last bit."""


def _chunks(wanted: Tensor, known: set[int], count: int) -> list[list[int]]:
    """The chunks in which wanted prompts are that were not run yet."""
    firsts = dict.fromkeys(number - number % CHUNK for number in wanted.tolist() if number not in known)
    return [list(range(first, min(first + CHUNK, count))) for first in sorted(firsts)]


def _feed(capture: Capture, inputs: RunInputs) -> _Feed:
    content = row_tensors(inputs)
    if isinstance(capture.units, Units):
        content = [*content, *EditRows(capture.units, inputs.batch).content]
    keys = row_keys(content)
    return _Feed(capture, inputs, numbered(keys), digest(keys))


def _named(inputs: RunInputs, model: nn.Module) -> dict[str, Any]:
    """All inputs by name, with the position ids that padding calls for."""
    names = list(forward_signature(model).parameters)
    return {**dict(zip(names, inputs.args, strict=False)), **with_position_ids(inputs, model)}


def _cut(name: str, item: Any, length: int, start: int, stop: int) -> Any:
    if not isinstance(item, Tensor):
        return item
    if name == POSITIONS and item.shape[-1] == length:
        return item[..., start:stop]
    if item.dim() < 2 or item.shape[1] != length:
        return item
    return item[:, :stop] if name == MASK else item[:, start:stop]


def _keeping(positions: Tensor) -> Callable[[Passage], None]:
    """What lets a module see `[b, P]` some positions of each row alone."""

    def act(passage: Passage) -> None:
        given = passage.take("input", None)
        if given.dim() != 3:
            raise NoShortcutError(f"the output embedding is given {given.dim()} axes")
        passage.put("input", None, _at(given, positions))

    return act


def _at(stream: Tensor, positions: Tensor) -> Tensor:
    """`[b, P, d]` some positions of each row."""
    rows = torch.arange(len(positions), device=stream.device)[:, None]
    return stream[rows, positions.to(stream.device)]


def _gradients(read: Read, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients of a sum of the logits, each with a weight of its own."""
    logits = read.logits.float()
    weights = torch.linspace(-1, 1, logits.shape[-1], device=logits.device)
    asked = (read.labels >= 0)[..., None].to(logits.device)
    total = (torch.where(asked, logits, 0.0) * weights).sum()
    if not total.requires_grad:
        return [torch.zeros_like(value) for value in parameters]
    return list(torch.autograd.grad(total, list(parameters), materialize_grads=True))
