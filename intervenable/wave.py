"""The engine of sweeps: many cells in one forward pass, each from its layer and its first changed token on.

A wave is one call of the model on the run that is patched. Before each block, what the block is given is extended to
the rows of the cells that are patched there or were before, by copies of the unpatched rows; a hook at the place
writes the values into the new rows. Nothing of the model is overridden or called by itself: its own forward runs with
its own masks, rotations and caches. The unpatched rows ride along and have to give the logits of the run without
patches, so that every wave proves itself; one that does not is computed in another way.

Which axes count rows and which ways are exact is learnt from the model (`wave_learning`) and checked against plain
runs of two cells, once per model and kind of place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.hooks import Hook, hooked
from intervenable.inputs import RunInputs
from intervenable.passage import Passage
from intervenable.runs import gather_added
from intervenable.sites import BoundSite, hook_at
from intervenable.sweep_runs import PLAIN, PlainRuns
from intervenable.sweep_values import Edits, rows_of, write_at
from intervenable.units import UnitRows
from intervenable.wave_caches import copied, cut, give_rows, is_croppable, layers_of, release
from intervenable.wave_inputs import WaveInputs
from intervenable.wave_learning import ROUTES, WHOLE_FIRST, CallRows, Learnt, Route, learn_calls, prefix_cache
from intervenable.wave_plan import Blocks, Costs, Wave, grows_by_layer, leaves_tokens_out, plan_waves
from intervenable.wave_readout import Reading, Readout, furthest, reads_head
from intervenable.wave_rows import NoShortcutError, Path, Rows, UnknownTensorError, mapped, with_groups

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""How far the unpatched rows of a wave may be from the run without patches, of the largest logit: rounding in other
shapes. (At 1e-4 in float32 one architecture of 184 slipped through.)"""

Cell = int


@dataclass(frozen=True, eq=False)
class Recorded:
    """What is known of the run that is patched."""

    inputs: WaveInputs
    logits: Tensor
    """`[b, P, T]` that are read, without patches."""

    scale: float
    """The largest logit there is."""

    calls: int
    """How many calls of blocks there are."""

    joins: Mapping[tuple[int, int], int]
    """For each place (by identity) and passage the call of a block that is on; -1 before the first."""

    cache: Any = None
    """Its keys and values, to be cut; None if they were not recorded."""


@dataclass
class Waves:
    """Computes cells in waves.

    Args:
        model: The model.
        blocks: Its blocks, in the order in which they first run.
        recorded: The run that is patched.
        edits: What the cells put where.
        first: For each cell that changes anything the first token that it changes.
        reading: Which logits are read.
        plain: Computes single cells, without any shortcut.
        learnt: What is known of the model.
        kind: The kind of places that are patched, for what is remembered of them.
        memory: Bytes that the rows of a wave may take.
    """

    model: nn.Module
    blocks: Blocks
    recorded: Recorded
    edits: Sequence[Edits]
    first: Mapping[Cell, int]
    reading: Reading
    plain: PlainRuns
    learnt: Learnt
    kind: Hashable
    memory: int

    used: Counter[str] = field(default_factory=Counter)
    """How many cells were computed in which way."""

    def __post_init__(self) -> None:
        self._of_cell: dict[Cell, list[tuple[Edits, int]]] = {}
        for one in self.edits:
            for index, cell in enumerate(one.cells):
                if cell in self.first:
                    self._of_cell.setdefault(cell, []).append((one, index))
        self._joins = {
            cell: min(self.recorded.joins[id(one.site), one.passage] for one, _ in parts)
            for cell, parts in self._of_cell.items()
        }
        self._last_prefix: tuple[int, Any] = (0, None)
        self._reads_head = reads_head(self.model, [one.site for one in self.edits])
        self.tolerance = TOLERANCES.get(self.recorded.logits.dtype, 1e-5)
        batch, length = self.recorded.inputs.batch, self.reading.length
        tokens = self.recorded.logits.shape[-1] * max(1, len(self.reading.positions))
        suffix = self._suffixes and next(self._routes(1), ROUTES[-1]).cache != "none"
        self.waves: list[Wave] = plan_waves(
            self.first, self._joins, length, batch, Costs.of(self.blocks, length, tokens), self.memory, suffix
        )

    # -- which ways there are

    def _is_exact(self, route: Route) -> bool:
        """Whether a route gives what plain runs give, for two cells; found out once per model and kind of place."""
        with self.learnt.lock:
            known = self.learnt.exact.get((self.kind, route))
            if known is None:
                known = self.learnt.exact[self.kind, route] = self._probe(route)
        return known

    def _probe(self, route: Route) -> bool:
        cells, truth = self._probes
        start = min(self.first[cell] for cell in cells) if route.cache != "none" else 0
        got = self._try(Wave(cells, start), route)
        if got is None:
            return False
        if furthest(got, truth) > self.tolerance * self.recorded.scale:
            self.learnt.why[route] = "its values differ from those of plain runs"
            return False
        return True

    @cached_property
    def _probes(self) -> tuple[tuple[Cell, ...], Tensor]:
        """Two cells, and what plain runs give for them."""
        cells = sorted(self.first, key=lambda cell: (self.first[cell], self._joins[cell]))
        late = [cell for cell in cells if self.first[cell] > 0] or cells
        probes = tuple(sorted({late[len(late) // 2], late[-1]}, key=lambda cell: self._joins[cell]))
        return probes, torch.stack([self.reading.of(self.plain.logits(cell)) for cell in probes])

    def _routes(self, start: int) -> Iterator[Route]:
        """The exact routes for waves that begin at a token, the one that leaves out most first."""
        for route in ROUTES if self._grows else WHOLE_FIRST:
            if (route.cache == "none" or (start > 0 and self._suffixes)) and self._is_exact(route):
                yield route

    @cached_property
    def _grows(self) -> bool:
        """Whether it is worth the trouble to let rows come layer by layer."""
        tokens = len(self.first) * self.recorded.inputs.batch * self.reading.length
        return grows_by_layer(self.blocks, tokens)

    @cached_property
    def _suffixes(self) -> bool:
        """Whether any cell leaves tokens alone before the first one it changes."""
        worth = leaves_tokens_out(self.blocks, self.reading.length) and not self.recorded.inputs.time_first
        return worth and any(self.first.values())

    # -- running

    def run(self, wave: Wave) -> Tensor:
        """`[cells, b, P, T]` the logits that are read, in the order of the wave's cells."""
        for route in self._routes(wave.start):
            got = self._try(wave, route)
            if got is not None:
                self.used[route.note] += len(wave.cells)
                return got
        self.used[PLAIN] += len(wave.cells)
        return torch.stack([self.reading.of(self.plain.logits(cell)) for cell in wave.cells])

    def _try(self, wave: Wave, route: Route) -> Tensor | None:
        """The logits of a wave along one route; None if it is no way here."""
        start = wave.start if route.cache != "none" else 0
        for narrow in (True, False) if self.learnt.narrow_head is not False else (False,):
            try:
                got, drift = self._learning_more(wave.cells, start, route, narrow)
            # A model's own code, given what it was not made for, may raise anything.
            except Exception as error:
                self.learnt.why[route] = f"{type(error).__name__}: {error}"[:200]
                continue
            if drift <= self.tolerance * self.recorded.scale:
                if self.learnt.narrow_head is None:
                    self.learnt.narrow_head = narrow
                return got
            off = drift / max(self.recorded.scale, 1e-30)
            self.learnt.why[route] = f"its unpatched rows are off by {off:.1e} of the largest logit"
        return None

    def _learning_more(
        self, cells: Sequence[Cell], start: int, route: Route, narrow: bool
    ) -> tuple[Tensor, float]:
        """A wave; where blocks are given something that was not met before, that is looked at first."""
        try:
            return self._wave(cells, start, route, narrow)
        except UnknownTensorError:
            learn_calls(self.learnt, self.recorded.inputs, self.blocks, route.cache, start)
            return self._wave(cells, start, route, narrow)

    def _rows_at_calls(self, route: Route) -> list[CallRows]:
        if route.cache not in self.learnt.calls:
            learn_calls(self.learnt, self.recorded.inputs, self.blocks, route.cache)
        calls = self.learnt.calls_of(route.cache, self.recorded.inputs.batch)
        if len(calls) != self.recorded.calls:
            raise NoShortcutError("blocks are called another number of times for another number of tokens")
        return calls

    def _wave(self, cells: Sequence[Cell], start: int, route: Route, narrow: bool) -> tuple[Tensor, float]:
        """The logits of cells, and how far the unpatched rows are from where they should be."""
        whole = route.growth == "whole"
        joins = [-1 if whole else self._joins[cell] for cell in cells]
        order = sorted(range(len(cells)), key=lambda i: joins[i])
        group = {cells[i]: 1 + place for place, i in enumerate(order)}
        total = 1 + len(cells)
        at_start = 1 + sum(join < 0 for join in joins)
        alive = [1 + sum(join <= call for join in joins) for call in range(self.recorded.calls)]
        cache = self._cache_for(route, start)
        calls = [] if whole or not alive else self._rows_at_calls(route)
        rows = Growth(calls, alive, total, route.growth, at_start)
        if cache is not None:
            rows.caches(cache, self.learnt.cache_rows_of(route.cache, self.recorded.inputs.batch))
        readout = Readout(self.model, self.reading, start, narrow, self._reads_head)
        met: Counter[int] = Counter()
        writing = self._writing(cells, group, start, rows, met)
        hooks = [*rows.entering(self.blocks), *writing, *rows.leaving(self.blocks)]
        groups = total if whole or route.growth == "pad" else at_start
        with hooked([*hooks, *readout.hooks], self.model):
            output = self.recorded.inputs.call(groups, start, cache=cache, keep=readout.keep)
        wanted = {(id(one.site), one.passage) for cell in cells for one, _ in self._of_cell[cell]}
        if any(met[site] <= passage for site, passage in wanted):
            raise NoShortcutError("a place that is patched was not reached")
        logits = readout.of(output)
        batch = self.recorded.logits.shape[0]
        if logits.shape[0] != total * batch:
            raise NoShortcutError(f"the model gave logits of {logits.shape[0]} rows, not of {total * batch}")
        logits = logits.view(total, batch, *logits.shape[1:])
        known = self.recorded.logits
        early = known.shape[1] - logits.shape[2]
        drift = furthest(logits[0], known[:, early:])
        in_order = order == list(range(len(cells)))
        picked = logits[1:] if in_order else logits[[group[cell] for cell in cells]]
        if early:
            before = known[:, :early].expand(len(cells), -1, -1, -1)
            picked = torch.cat([before, picked], 2)
        return picked, drift

    def _cache_for(self, route: Route, start: int) -> Any:
        """Keys and values of the tokens before a wave, to go on with; None if it begins at the first."""
        if route.cache == "none":
            return None
        self._rows_at_calls(route)
        if route.cache == "recorded":
            return cut(self._recorded, self.reading.length - start)
        return copied(self._prefix(start))

    @cached_property
    def _recorded(self) -> Any:
        """The cache of the run that is patched, alone.

        Raises:
            NoShortcutError: there is none that can be cut.
        """
        cache = self.recorded.cache
        if cache is None or not is_croppable(cache):
            raise NoShortcutError("the model's cache cannot be cut")
        cache = copied(cache)
        known = self.learnt.cache_rows_of("recorded", self.recorded.inputs.batch)
        for layer, rows in zip(layers_of(cache), known, strict=True):
            give_rows(layer, rows, 1)
        return cache

    def _prefix(self, stop: int) -> Any:
        """The cache of a run of the first tokens, a token at a time; it goes on from the last one that was needed."""
        length, cache = self._last_prefix
        if not 0 < length <= stop:
            length, cache = 1, prefix_cache(self.recorded.inputs, 1, "prefix")
        while length < stop:
            output = self.recorded.inputs.call(1, length, length + 1, copied(cache), keep=1)
            length, cache = length + 1, output.past_key_values
        self._last_prefix = length, cache
        return cache

    def _writing(
        self,
        cells: Sequence[Cell],
        group: Mapping[Cell, int],
        start: int,
        rows: Growth,
        met: Counter[int],
    ) -> list[Hook]:
        """Hooks that put the values of cells into their rows, and count the passages of each place."""
        picked: dict[int, tuple[list[int], list[int]]] = {}
        by_site: dict[int, dict[int, list[Edits]]] = {}
        sites: dict[int, BoundSite] = {}
        for cell in cells:
            for one, index in self._of_cell[cell]:
                if id(one) not in picked:
                    picked[id(one)] = ([], [])
                    sites[id(one.site)] = one.site
                    by_site.setdefault(id(one.site), {}).setdefault(one.passage, []).append(one)
                picked[id(one)][0].append(index)
                picked[id(one)][1].append(group[cell])
        base = self.plain.base.plan.base
        added, gathering = gather_added(tuple(sites.values()), base)
        runs: dict[int, RunInputs] = {}

        def run_of(groups: int) -> RunInputs:
            if groups not in runs:
                runs[groups] = rows_of(base, groups, start)
            return runs[groups]

        def writing(key: int, site: BoundSite) -> Callable[[Passage], None]:
            def act(passage: Passage) -> None:
                here = by_site[key].get(met[key], ())
                groups = rows.present(self.recorded.joins[key, met[key]]) if here else 1
                met[key] += 1
                shift = _shift(site, passage, self.reading.length, start)
                parts: list[tuple[UnitRows, Tensor]] = []
                for one in here:
                    units = one.at(*picked[id(one)], start, shift)
                    if units is not None:
                        parts.append(units)
                write_at(site, parts, passage, run_of(groups), added.get(key))

            return act

        return [*gathering, *(hook_at(site, writing(key, site), writes=True) for key, site in sites.items())]


def _shift(site: BoundSite, passage: Passage, length: int, start: int) -> int:
    """From which token on the stream at a place runs, in a wave that begins at another than the first.

    Raises:
        NoShortcutError: it has neither the tokens of the wave nor all there are.
    """
    if start == 0 or site.kind != "inside":
        return start
    stream = passage.take(site.side, site.slot)
    if site.matrix and stream.shape[3] != length:
        raise NoShortcutError(f"its rows have {stream.shape[3]} keys for {length} tokens")
    there = stream.shape[2]  # keys and values come with those of the cache
    if there not in (length, length - start):
        raise NoShortcutError(f"{site.component} has {there} of {length} tokens")
    return length - there


class Growth:
    """Gives blocks the rows of the cells that have come.

    Args:
        calls: The row axes at each call of a block.
        alive: Groups of rows at each call.
        total: All groups.
        kind: Whether rows come to the batch, or are cut out of one that has all of them.
        start: Groups before the first block.
    """

    def __init__(
        self, calls: Sequence[CallRows], alive: Sequence[int], total: int, kind: str, start: int
    ) -> None:
        self._calls, self._alive, self._total, self._start = calls, alive, total, start
        self._pads, self._whole = kind == "pad", kind == "whole"
        self._call = -1
        self._layers: Sequence[Any] = ()
        self._cache_rows: Sequence[Rows] = ()
        self._last: dict[int, int] = {}

    def caches(self, cache: Any, rows: Sequence[Rows]) -> None:
        """Give the layers of a cache their rows too, and let go of each after the last block that looks at it."""
        self._layers, self._cache_rows = layers_of(cache), rows
        self._last = {layer: call for call, known in enumerate(self._calls) for layer in known.touched}

    def present(self, call: int) -> int:
        """How many groups there are at a place that is passed during (or after) a call."""
        if self._whole or (self._pads and call < 0):
            return self._total
        return self._start if call < 0 else self._alive[call]

    def entering(self, blocks: Sequence[nn.Module]) -> list[Hook]:
        """Hooks that give each block its rows."""
        return [] if self._whole else [Hook(block, "input", self._enter) for block in dict.fromkeys(blocks)]

    def leaving(self, blocks: Sequence[nn.Module]) -> list[Hook]:
        """Hooks that give the model's loop all rows back."""
        return [Hook(block, "output", self._leave) for block in dict.fromkeys(blocks)] if self._pads else []

    def _enter(self, passage: Passage) -> None:
        self._call += 1
        known, groups = self._calls[self._call], self._alive[self._call]

        def fit(path: Path, tensor: Tensor) -> Tensor:
            if path not in known.into:
                if tensor.dim() == 0:
                    return tensor
                raise UnknownTensorError(f"the tensor at {path} was not there before")
            return with_groups(tensor, known.into[path], groups)

        passage.args, passage.kwargs = mapped((passage.args, passage.kwargs), fit)
        passage.changed = True
        for number in known.touched:
            give_rows(self._layers[number], self._cache_rows[number], groups)
        for number, last in self._last.items():
            if last == self._call - 1:
                release(self._layers[number])

    def _leave(self, passage: Passage) -> None:
        known = self._calls[self._call].out
        passage.output = mapped(
            passage.output, lambda path, tensor: with_groups(tensor, known.get(path), self._total)
        )
        passage.changed = True
