"""Many experiments in one forward pass: each is a group of the batch with edits of its own.

The first group is left alone and is the *base*. For each stack of blocks one group is its *source*: noise is added
to what its first block is given, so that its stream is another while all that comes from the tokens themselves stays.
In the groups of experiments values of the source (or of the base) are written at places of a map, in all layers at
once. Whatever is compared so went through the same kernels in the same pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.binding import Places
from intervenable.errors import IntervenableError
from intervenable.hooks import Hook, hooked
from intervenable.map_laws import deviation, limit_of, named
from intervenable.map_laws_carried import carrying, pinned
from intervenable.map_laws_examples import Examples
from intervenable.map_laws_groups import (
    Change,
    Definition,
    Group,
    Inputs,
    Key,
    by_group,
    definition_of,
    taken_from,
)
from intervenable.map_laws_hooks import GroupHooks, first_line
from intervenable.map_media import rows_of_picture
from intervenable.map_trace import Slot, Trace, trace
from intervenable.signatures import takes
from intervenable.site_binding import live_width
from intervenable.sites import BoundSite, columns_of_heads
from intervenable.stack_lengths import rows_of_example
from model_maps import COMPONENTS, ModelMap

NOISE_SEED = 20
MOST_LOGITS = 40_000_000
"""Entries of logits that one pass may have."""

MOST_INPUTS = 4_000_000
"""Numbers that a pass may be given: of clips and pictures, few are looked at at a time."""

MOST_ENTRIES = 400_000
"""Entries that one place may have in a pass: with many heads, few experiments at few places are made at a time."""


class GivenPlaces(Places):
    """Finds sites in a model by a map that is given, not looked up."""

    def __init__(self, model: nn.Module, model_map: ModelMap) -> None:
        super().__init__(model)
        self._map = model_map


class Bench:
    """A model, a map of it, inputs, and the experiments that are to be made.

    Args:
        model: The model, in evaluation mode.
        model_map: The map to be looked at.
        inputs: Keyword inputs of the model, of one example or several.
        components: The components to look at; None for all that the map has.
    """

    def __init__(
        self, model: nn.Module, model_map: ModelMap, inputs: Inputs, components: Iterable[str] | None = None
    ) -> None:
        self.model = model
        self.map = model_map
        self.places = GivenPlaces(model, model_map)
        keeping = any(COMPONENTS[name].axes == "state" for name in model_map.components())
        self.inputs: dict[str, Any] = {
            **({"use_cache": keeping} if takes(model, "use_cache") else {}),  # states are kept in caches
            **inputs,
        }
        self.examples = Examples(model, inputs)
        self.batch, self.time_first = self.examples.count, self.examples.time_first
        self.experimented: dict[str, Any] = self.inputs
        """The inputs of experiments: of the first example alone, if the model gives it the same by itself."""
        self.rows = self.batch
        """Examples of one experiment."""
        patches = rows_of_picture(inputs, self.batch)
        self.rows_of_example = (
            patches if patches > 1 else rows_of_example(model, model_map, inputs, self.batch)
        )
        """Rows of the inputs that are one example of the blocks."""
        self.sites: dict[Key, BoundSite] = {}
        self.faults: dict[Key, str] = {}
        """Places that cannot be bound, read or written, and why."""
        self._layers: dict[str, list[int | None]] | None = None
        self._bind(model_map.components() if components is None else components)
        self.plainly: dict[Key, Tensor] = {}
        """What the places have in the plain pass."""
        self.passes: dict[Key, int] = {}
        """How often a place was passed in the plain pass."""
        self._trace: Trace | None = None
        self.carrying: frozenset[str] = frozenset()
        """Prefixes of the stacks whose blocks are given more of those before them than the stream."""
        self.pinned: Mapping[Key, Sequence[Slot]] = {}
        """Inputs of blocks beside the stream that all groups are given as the base is."""
        self.before: Bench | None = None
        """The bench of the map from which some places are gone in this one's."""
        self._begin()

    def _begin(self) -> None:
        """Have no experiments yet."""
        self.base: Group = Group("base")
        self.sources: dict[str, Group] = {}
        for prefix in self.prefixes:
            first = (named("block_input", prefix), 0)
            if first in self.sites:
                group = Group(f"source of {prefix or 'the blocks'}", {first: self._noised})
                self.sources[prefix] = group
        self.fixed: list[Group] = [self.base, *self.sources.values()]
        """Groups that are in every pass."""
        self.groups: list[Group] = []
        self._made: dict[Definition, Group] = {}

    @property
    def known(self) -> bool:
        """Whether all places were looked at before, beside others that are gone."""
        return self.before is not None

    def of_less(self, model_map: ModelMap) -> Bench:
        """A bench of a map with fewer places than this one's: what passes showed of the rest is known.

        Args:
            model_map: The map of this bench, without what was refused.
        """
        less = copy.copy(self)
        less.map, less.places, less.before = model_map, GivenPlaces(self.model, model_map), self
        less.sites = {key: site for key, site in self.sites.items() if model_map.site(*key) is not None}
        less.faults, less._layers = {}, None
        less.plainly = {key: value for key, value in self.plainly.items() if key in less.sites}
        less._begin()
        return less

    # -- what there is

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of the stacks that have components, cross attention aside."""
        return tuple(
            dict.fromkeys(p for p in (COMPONENTS[name].prefix for name, _ in self.sites) if p != "cross")
        )

    def layers(self, component: str) -> list[int | None]:
        """The layers in which a component is placed and could be bound; `[None]` outside the blocks."""
        return [layer for layer in self._placed().get(component, ()) if (component, layer) not in self.faults]

    def _placed(self) -> Mapping[str, Sequence[int | None]]:
        """The layers of each component, of all that are bound."""
        if self._layers is None:
            self._layers = {}
            for name, layer in self.sites:
                self._layers.setdefault(name, []).append(layer)
        return self._layers

    def has(self, component: str, layer: int | None) -> bool:
        """Whether a component is placed in a layer, and nothing has failed there so far."""
        return (component, layer) in self.sites and (component, layer) not in self.faults

    def last_layer(self, prefix: str) -> int:
        """The last layer of a stack, whether or not a component is placed in it."""
        name = named("block_output", prefix)
        return self.places.layers_of(name) - 1 if self.layers(name) else 0

    def _bind(self, components: Iterable[str]) -> None:
        for component in components:
            inside = COMPONENTS[component].scope == "block"
            try:
                layers: list[int | None] = [*range(self.places.layers_of(component))] if inside else [None]
            except IntervenableError as error:
                self.faults[component, 0 if inside else None] = first_line(error)
                continue
            for layer in layers:
                if self.map.site(component, layer) is None:
                    continue
                try:
                    self.sites[component, layer] = self.places.at(component, layer)
                except (IntervenableError, ValueError) as error:
                    self.faults[component, layer] = first_line(error)

    def covered(self, component: str, layer: int | None) -> bool:
        """Whether every column of the tensor in which a component lies belongs to a component."""
        at = self.sites[component, layer]
        width = live_width(at.module, at.side)
        if width is None and self._trace is not None:
            call = self._trace.call_at(at.path, at.call)
            tensor = None if call is None else call.main_input if at.side == "input" else call.main_output
            width = None if tensor is None else tensor.shape[-1]
        taken: set[int] = set()
        for (_, other), site in self.sites.items():
            if other == layer and site.path == at.path and site.side == at.side and site.columns is not None:
                taken.update(columns_of_heads(site.columns))
        return width is not None and taken >= set(range(width))

    # -- experiments

    def experiment(
        self, name: str, writes: Mapping[Key, Change], reads: Iterable[Key] = (), inputs: Inputs | None = None
    ) -> Group:
        """A group of the next passes; what it reads is read in base and sources too."""
        group = Group(name, dict(writes), inputs=inputs or {})
        self.groups.append(group)
        self.read_in(group, reads)
        return group

    def fixed_group(self, name: str, writes: Mapping[Key, Change]) -> Group:
        """A group of every pass, of which others take values."""
        group = Group(name, dict(writes))
        self.fixed.append(group)
        return group

    def read_in(self, group: Group, keys: Iterable[Key]) -> None:
        """Have places read in a group, and in the base."""
        known = {key for key in keys if self.has(*key)}
        group.reads |= known
        self.base.reads |= known

    @property
    def special_tokens(self) -> frozenset[int]:
        """Ids of tokens that stand for something other than a piece of text."""
        config = getattr(self.model, "config", None)
        fields = vars(config).items() if config is not None else ()
        return frozenset(
            value
            for name, value in fields
            if name.endswith(("token_id", "token_index")) and isinstance(value, int)
        )

    def held(self, prefix: str) -> dict[Key, Change]:
        """Writes that give every block of a stack the base's input, so that each layer is an experiment by itself."""
        name = named("block_input", prefix)
        return {(name, layer): taken_from(self.base) for layer in self.layers(name)}

    def _noised(self, groups: Tensor) -> Tensor:
        value = groups[self.base.index]
        generator = torch.Generator().manual_seed(NOISE_SEED)
        noise = torch.randn(value.shape, generator=generator).to(value.device, torch.float32)
        wide = value.to(torch.float32)
        spread = wide.std(-1, keepdim=True) if value.shape[-1] > 1 else wide.std()
        floor = 0.1 * wide.std() + 1e-6
        return (wide + noise * spread.clamp(min=float(floor))).to(value.dtype)

    # -- passes

    def plain(self, inputs: Inputs | None = None) -> Tensor:
        """What the model returns without hooks."""
        with torch.no_grad():
            output = self.model(**(self.inputs if inputs is None else inputs))
            return self.examples.in_output(output).detach().clone()

    def narrow(self, output: Tensor) -> bool:
        """Make experiments with the first example alone, if the model returns for it what it does beside others.

        Args:
            output: What the model returns for all examples.
        """
        first = self.examples.first_of(self.inputs)
        if first is None or self.batch == 1 or len(output) != self.batch:
            return False
        try:
            alone = self.plain(first)
        except Exception:  # whatever the code of a model may raise that needs several
            return False
        if deviation(alone, output[:1]) > limit_of(output.dtype):
            return False
        self.experimented, self.rows = first, 1
        return True

    def traced(self) -> Trace:
        """The plain pass written down; what the places of the map have is put into the base, bit for bit."""
        if self.known and self._trace is not None:
            return self._noted(self._trace)
        group = Group("plain")
        group.reads = set(self.sites)
        group.index = 0
        hooks = self._hooks([group], self.batch, self.passes)
        result = trace(self.model, self.inputs, extra=hooks)
        self.plainly = group.seen
        return self._noted(result)

    def _noted(self, result: Trace) -> Trace:
        self._trace = result
        self.carrying = carrying(self.sites, result)
        self.pinned = pinned(self.sites, result)
        return result

    def run(self) -> None:
        """Make all experiments, in as few passes as memory allows; places with large values in passes of few.

        What is defined as it was before some places were gone is not made again.
        """
        self._made |= {definition_of(group): group for group in self.groups}
        waiting = sorted(self._not_known(), key=self._size_of)
        self.groups = []
        fixed = {group: group.reads for group in self.fixed}
        unseen = set().union(*(group.reads - group.seen.keys() for group in self.fixed))
        lone = unseen.difference(*(group.reads for group in waiting))
        passes = self._shared_out(waiting)
        if lone and not passes and self.known:
            passes = [[]]
        least = min(passes, key=len, default=None)
        for groups in passes:
            wanted = set().union(*(group.reads for group in groups)) | (lone if groups is least else set())
            for group, reads in fixed.items():
                group.reads = reads & wanted
            self._pass([*self.fixed, *groups])
        for group, reads in fixed.items():
            group.reads = reads

    def _not_known(self) -> list[Group]:
        """The experiments that the bench before this one has not made; the others take their results from there."""
        before = self.before
        if before is None or (before.carrying, before.pinned) != (self.carrying, self.pinned):
            return self.groups
        fixed = {definition_of(group): group for group in before.fixed}
        if not all(definition_of(group) in fixed for group in self.fixed):
            return self.groups  # what is taken from one of them is something else then
        for group in self.fixed:
            group.take_results(fixed[definition_of(group)])
        self._made = before._made | self._made
        waiting = []
        for group in self.groups:
            made = before._made.get(definition_of(group))
            if made is None or not made.seen.keys() >= group.reads:
                waiting.append(group)
            else:
                group.take_results(made)
        return waiting

    def _size_of(self, group: Group) -> int:
        """How many entries the largest value has that a group reads or writes, for one example."""
        keys = group.reads | group.writes.keys()
        sizes = [self.plainly[key].numel() for key in keys if key in self.plainly]
        return max(sizes, default=0) * self.rows // self.batch

    def _shared_out(self, groups: Sequence[Group]) -> list[list[Group]]:
        """The groups of each pass; those with the smallest values come first."""
        passes: list[list[Group]] = []
        most = self._room() - len(self.fixed)
        for group in groups:
            room = min(most, MOST_ENTRIES // max(1, self._size_of(group)) - len(self.fixed))
            if not passes or len(passes[-1]) >= room:
                passes.append([])
            passes[-1].append(group)
        return passes

    def identity(self, keys: Sequence[Key]) -> Tensor:
        """What the model returns if at these places everything is written back as it was read."""
        group = Group("identity", dict.fromkeys(keys, _back))
        with torch.no_grad(), hooked(self._hooks([group], self.batch), self.model):
            return self.examples.in_output(self.model(**self.inputs)).detach().clone()

    def _room(self) -> int:
        ids = next((v for v in self.inputs.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
        tokens = self.rows if ids is None else self.rows * ids.shape[1]
        logits = tokens * (self.places.sizes.vocabulary or 1)
        given = sum(value.numel() for value in self.experimented.values() if isinstance(value, Tensor))
        return max(8, min(MOST_LOGITS // max(1, logits), MOST_INPUTS // max(1, given)))

    def _pass(self, groups: list[Group]) -> None:
        for index, group in enumerate(groups):
            group.index = index
        given = self.examples.stacked(self.experimented, groups, self.rows)
        with torch.no_grad(), hooked(self._hooks(groups, self.rows), self.model):
            output = self.examples.in_output(self.model(**given))
        returned = by_group(output, len(groups))
        for group in groups:
            group.output = returned[group.index].detach().clone()
            group.beside, group.output_beside = dict(self.base.seen), self.base.output

    def _hooks(self, groups: Sequence[Group], each: int, passes: dict[Key, int] | None = None) -> list[Hook]:
        """Hooks for a pass of these groups, of `each` examples."""
        return GroupHooks(
            self.sites,
            groups,
            each * len(groups) // self.rows_of_example,
            self.time_first,
            self.carrying,
            self.faults,
            self.pinned,
            passes,
            entries={key: value.numel() * each / self.batch for key, value in self.plainly.items()},
            times=each * len(groups) / self.batch,
        ).in_order()


def _back(groups: Tensor) -> Tensor:
    return groups[0].clone()
