"""Runs of a sweep without any shortcut: the unpatched runs, and one run for one cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import NotFiredError
from intervenable.hooks import Hook
from intervenable.inputs import RunInputs
from intervenable.passage import Passage
from intervenable.plan import Plan
from intervenable.runs import Observers, gather_added, run_base, without_cache
from intervenable.sites import BoundSite, hook_at
from intervenable.sweep_values import Edits, Place, Reader, rows_of, write_at
from intervenable.units import UnitRows
from intervenable.wave_plan import Wave
from intervenable.wave_readout import Reading, logits_of


@dataclass(eq=False)
class Unpatched:
    """A run without patches: what passed at the places of a sweep, and its logits."""

    model: nn.Module
    plan: Plan
    """The inputs, and the interventions that act in every run."""

    values: Mapping[Place, Sequence[Tensor]]
    """What passed at each place, passage by passage."""

    shape: tuple[int, int, int]
    """`(b, s, V)` of its logits."""

    positions: Tensor | None
    """`[P]` the positions of which logits are known; None for all."""

    known: Tensor
    """`[b, P, V]`."""

    @property
    def inputs(self) -> RunInputs:
        """The inputs, counted in the positions that have logits: one, where a head makes one of all."""
        counted = self.plan.base.decoder or self.plan.base
        if self.shape[1] == 1 != counted.length:
            return replace(counted, length=1, attention_mask=None, input_ids=None)
        return counted

    def logits(self, positions: Tensor | None = None) -> Tensor:
        """`[b, P, V]` its logits at tensor positions, at all of them by default; the model is run if need be."""
        if self.positions is not None:
            if positions is not None and torch.equal(positions, self.positions):
                return self.known
            there = {position: place for place, position in enumerate(self.positions.tolist())}
            if positions is not None and all(position in there for position in positions.tolist()):
                return self.known[:, [there[position] for position in positions.tolist()]]
            self.known = logits_of(_run(self.model, self.plan, ()), self.model)
            self.positions = None
        return self.known if positions is None else self.known[:, positions.to(self.known.device)]


def run_unpatched(model: nn.Module, plan: Plan, sites: Mapping[Place, BoundSite], name: str) -> Unpatched:
    """Run a model and keep what passes at the places.

    Raises:
        NotFiredError: a place was not reached.
        UnsupportedModelError: the model gives no logits.
    """
    reader = Reader(sites, plan.base)
    output = _run(model, plan, reader.hooks)
    reader.check(name)
    logits = logits_of(output, model)
    batch, length, vocabulary = logits.shape
    return Unpatched(model, plan, reader.values, (batch, length, vocabulary), None, logits)


def _run(model: nn.Module, plan: Plan, hooks: Sequence[Hook]) -> Any:
    with torch.no_grad():
        options = without_cache(model, plan.base)
        return run_base(model, plan, {}, options, Observers(after=hooks)).output


@dataclass
class PlainRuns:
    """One run for each cell, from the first layer to the last: slow, and nothing that could go wrong.

    Args:
        model: The model.
        base: The run that is patched.
        edits: What the cells put where.
    """

    model: nn.Module
    base: Unpatched
    edits: Sequence[Edits]
    _of_cell: dict[int, list[tuple[Edits, int]]] = field(init=False)

    def __post_init__(self) -> None:
        self._of_cell = {}
        for edits in self.edits:
            for index, cell in enumerate(edits.cells):
                self._of_cell.setdefault(cell, []).append((edits, index))

    def logits(self, cell: int) -> Tensor:
        """`[b, s, V]` the logits with one cell patched.

        Raises:
            NotFiredError: one of its places was not reached.
        """
        parts: dict[int, list[tuple[Edits, int]]] = {}
        for edits, index in self._of_cell[cell]:
            parts.setdefault(id(edits.site), []).append((edits, index))
        done: list[bool] = []
        sites = {id(edits.site): edits.site for edits, _ in self._of_cell[cell]}
        added, gathering = gather_added(tuple(sites.values()), self.base.plan.base)
        hooks = [
            hook_at(site, self._writing(site, parts[key], added, done), writes=True)
            for key, site in sites.items()
        ]
        # What is added is read where it passes, before the patch that needs it.
        output = _run(self.model, self.base.plan, [*hooks, *gathering])
        if len(done) < len(self._of_cell[cell]):
            raise NotFiredError("A patched run did not reach all of its places, which the unpatched one did.")
        return logits_of(output, self.model)

    def _writing(
        self,
        site: BoundSite,
        parts: Sequence[tuple[Edits, int]],
        added: Mapping[int, Tensor],
        done: list[bool],
    ) -> Callable[[Passage], None]:
        passages: dict[int, list[tuple[UnitRows, Tensor]]] = {}
        for edits, index in parts:
            units = edits.at([index], [0], 0)
            assert units is not None
            passages.setdefault(edits.passage, []).append(units)
        inputs = rows_of(self.base.plan.base, 1)
        count = [0]

        def act(passage: Passage) -> None:
            here = passages.get(count[0], ())
            count[0] += 1
            write_at(site, here, passage, inputs, added.get(id(site)))
            done.extend([True] * len(here))

        return act


PLAIN = "in a forward pass of its own each"
"""How cells were computed that no shortcut would do for."""


@dataclass
class PlainWaves:
    """An engine without shortcuts but one: cells that change nothing are not run.

    Args:
        plain: Computes a cell.
        reading: Which logits are read.
        first: For each cell that changes anything the first token that it changes.
    """

    plain: PlainRuns
    reading: Reading
    first: Mapping[int, int]
    used: Counter[str] = field(default_factory=Counter)
    """How many cells were computed in which way."""

    @property
    def waves(self) -> list[Wave]:
        """Which cells are computed one after the other."""
        changing = list(self.first)
        return [Wave(tuple(changing[i : i + 8]), 0) for i in range(0, len(changing), 8)]

    def run(self, wave: Wave) -> Tensor:
        """`[cells, b, P, T]` the logits that are read."""
        self.used[PLAIN] += len(wave.cells)
        return torch.stack([self.reading.of(self.plain.logits(cell)) for cell in wave.cells])
