"""Many experiments in one forward pass: each is a group of the batch with edits of its own.

The first group is left alone and is the *base*. For each stack of blocks one group is its *source*: noise is added
to what its first block is given, so that its stream is another while all that comes from the tokens themselves stays.
In the groups of experiments values of the source (or of the base) are written at places of a map, in all layers at
once. Whatever is compared so went through the same kernels in the same pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.binding import Places
from intervenable.errors import IntervenableError
from intervenable.hooks import Hook, hooked
from intervenable.inputs import RunInputs
from intervenable.map_laws import deviation, limit_of, named
from intervenable.map_laws_carried import carrying
from intervenable.map_media import rows_of_picture
from intervenable.map_trace import Trace, trace
from intervenable.passage import Passage
from intervenable.signatures import counts_time_first, takes
from intervenable.site_binding import live_width
from intervenable.sites import BoundSite, hook_at
from intervenable.stack_lengths import rows_of_example
from intervenable.unit_index import UnitIndex
from intervenable.units import Whole
from model_maps import COMPONENTS, ModelMap

Key = tuple[str, int | None]
"""A component and a layer; None outside the blocks."""

Change = Callable[[Tensor], Tensor]
"""From the values of all groups, `[groups, b, ...]`, to those that one group is to have, `[b, ...]`."""

Inputs = Mapping[str, Any]

NOISE_SEED = 20
MOST_LOGITS = 40_000_000
"""Entries of logits that one pass may have."""

MOST_ENTRIES = 250_000
"""Entries that one place may have in a pass: with many heads, few experiments at few places are made at a time."""


@dataclass(eq=False)
class Group:
    """One experiment: what is written where, and what was seen in it."""

    name: str
    writes: dict[Key, Change] = field(default_factory=dict)
    reads: set[Key] = field(default_factory=set)
    inputs: Inputs = field(default_factory=dict)
    """Model inputs that are others than those of the base."""

    seen: dict[Key, Tensor] = field(default_factory=dict)
    """The values at the places that were to be read, of the last passage there."""

    output: Tensor | None = None
    """What the model returned: its logits if it has any, else its first tensor."""

    beside: Mapping[Key, Tensor] = field(default_factory=dict)
    """What the base had at the places that were read, in the same pass."""

    output_beside: Tensor | None = None
    """What the model returned for the base in the same pass."""

    index: int = 0
    """Its place in the batch of the pass that is on."""


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
        self.batch, self.time_first = _batch_of(model, inputs)
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
        self._bind(model_map.components() if components is None else components)
        self.base = Group("base")
        self.sources: dict[str, Group] = {}
        for prefix in self.prefixes:
            first = (named("block_input", prefix), 0)
            if first in self.sites:
                group = Group(f"source of {prefix or 'the blocks'}", {first: self._noised})
                self.sources[prefix] = group
        self.fixed: list[Group] = [self.base, *self.sources.values()]
        """Groups that are in every pass."""
        self.groups: list[Group] = []
        self.plainly: dict[Key, Tensor] = {}
        """What the places have in the plain pass."""
        self.passes: dict[Key, int] = {}
        """How often a place was passed in the plain pass."""
        self._trace: Trace | None = None
        self.carrying: frozenset[str] = frozenset()
        """Prefixes of the stacks whose blocks are given more of those before them than the stream."""

    # -- what there is

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of the stacks that have components, cross attention aside."""
        return tuple(
            dict.fromkeys(p for p in (COMPONENTS[name].prefix for name, _ in self.sites) if p != "cross")
        )

    def layers(self, component: str) -> list[int | None]:
        """The layers in which a component is placed and could be bound; `[None]` outside the blocks."""
        return [layer for name, layer in self.sites if name == component and (name, layer) not in self.faults]

    def has(self, component: str, layer: int | None) -> bool:
        """Whether a component is placed in a layer, and nothing has failed there so far."""
        return (component, layer) in self.sites and (component, layer) not in self.faults

    def last_layer(self, prefix: str) -> int:
        """The last layer of a stack."""
        return max(
            (layer or 0 for name, layer in self.sites if name == named("block_output", prefix)), default=0
        )

    def _bind(self, components: Iterable[str]) -> None:
        for component in components:
            inside = COMPONENTS[component].scope == "block"
            try:
                layers: list[int | None] = [*range(self.places.layers_of(component))] if inside else [None]
            except IntervenableError as error:
                self.faults[component, 0 if inside else None] = _first_line(error)
                continue
            for layer in layers:
                if self.map.site(component, layer) is None:
                    continue
                try:
                    self.sites[component, layer] = self.places.at(component, layer)
                except (IntervenableError, ValueError) as error:
                    self.faults[component, layer] = _first_line(error)

    def covered(self, component: str, layer: int | None) -> bool:
        """Whether every column of the tensor in which a component lies belongs to a component."""
        at = self.sites[component, layer]
        width = live_width(at.module, at.side)
        if width is None and self._trace is not None:
            call = next(iter(self._trace.of(at.path)), None)
            tensor = None if call is None else call.main_input if at.side == "input" else call.main_output
            width = None if tensor is None else tensor.shape[-1]
        taken: set[int] = set()
        for (_, other), site in self.sites.items():
            if other == layer and site.path == at.path and site.side == at.side and site.columns is not None:
                firsts = (site.columns.first_column(head) for head in range(site.columns.heads))
                taken |= {first + offset for first in firsts for offset in range(site.columns.width)}
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
            return self._examples_first(main_tensor(output)).detach().clone()

    def narrow(self, output: Tensor) -> bool:
        """Make experiments with the first example alone, if the model returns for it what it does beside others.

        Args:
            output: What the model returns for all examples.
        """
        first: dict[str, Any] = {}
        for name, value in self.inputs.items():
            axis = self._axis_of(name, value)
            if axis is not None and value.shape[axis] not in (1, self.batch):
                return False
            first[name] = value if axis is None else value.narrow(axis, 0, 1)
        if self.batch == 1 or len(output) != self.batch:
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
        group = Group("plain")
        group.reads = set(self.sites)
        group.index = 0
        hooks = self._hooks([group], self.batch, count=True)
        result = trace(self.model, self.inputs, extra=hooks)
        self.plainly = group.seen
        self._trace = result
        self.carrying = carrying(self.sites, result)
        return result

    def run(self) -> None:
        """Make all experiments, in as few passes as memory allows; places with large values in passes of few."""
        waiting, self.groups = sorted(self.groups, key=self._size_of), []
        fixed = {group: group.reads for group in self.fixed}
        passes = self._shared_out(waiting)
        least = min(passes, key=len, default=None)
        lone = set().union(*fixed.values()).difference(*(group.reads for group in waiting))
        for groups in passes:
            wanted = set().union(*(group.reads for group in groups)) | (lone if groups is least else set())
            for group, reads in fixed.items():
                group.reads = reads & wanted
            self._pass([*self.fixed, *groups])
        for group, reads in fixed.items():
            group.reads = reads

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
            return self._examples_first(main_tensor(self.model(**self.inputs))).detach().clone()

    def _room(self) -> int:
        ids = next((v for v in self.inputs.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
        tokens = self.rows if ids is None else self.rows * ids.shape[1]
        return max(8, MOST_LOGITS // max(1, tokens * (self.places.sizes.vocabulary or 1)))

    def _pass(self, groups: Sequence[Group]) -> None:
        for index, group in enumerate(groups):
            group.index = index
        given = {name: self._stacked(name, value, groups) for name, value in self.experimented.items()}
        with torch.no_grad(), hooked(self._hooks(groups, self.rows), self.model):
            output = main_tensor(self.model(**given))
        by_group = _by_group(self._examples_first(output), len(groups))
        for group in groups:
            group.output = by_group[group.index].detach().clone()
            group.beside, group.output_beside = dict(self.base.seen), self.base.output

    def _examples_first(self, output: Tensor) -> Tensor:
        return output.transpose(0, 1) if self.time_first and output.dim() == 3 else output

    def _axis_of(self, name: str, value: Any) -> int | None:
        """The axis of examples of an input; None if it has none."""
        if not isinstance(value, Tensor) or value.dim() == 0 or name == "cache_position":
            return None
        second = (self.time_first and value.dim() == 3) or (name == "position_ids" and value.dim() == 3)
        return 1 if second else 0

    def _stacked(self, name: str, value: Any, groups: Sequence[Group]) -> Any:
        axis = self._axis_of(name, value)
        if axis is None or (name == "position_ids" and value.shape[axis] == 1 != self.rows):
            return value
        return torch.cat([group.inputs.get(name, value) for group in groups], axis)

    def _hooks(self, groups: Sequence[Group], each: int, *, count: bool = False) -> list[Hook]:
        """Hooks for a pass of these groups: first all that write, then all that read what was made of it."""
        written = [key for key in self.sites if any(key in group.writes for group in groups)]
        read = [key for key in self.sites if any(key in group.reads for group in groups)]
        streams: dict[Key, Tensor] = {}
        run = self._run_inputs(each * len(groups) // self.rows_of_example)
        whole = {
            (site.plus.component, site.plus.layer) for site in self.sites.values() if site.plus is not None
        }
        hooks: list[Hook] = []

        def reading(key: Key, passage: Passage, site: BoundSite) -> Tensor:
            added = streams.get((site.plus.component, site.plus.layer)) if site.plus is not None else None
            return site.read(passage, index_at(passage, site), run, added)

        def index_at(passage: Passage, site: BoundSite) -> UnitIndex:
            tensor = passage.take("input" if site.kind in DERIVED else site.side, site.slot)
            if not site.by_heads or site.kind == "inside":
                return site.index(Whole(), run, tensor.device)
            # How many positions there are is read off what passes: a tower's are those of no input.
            batch = run.batch
            if tensor.dim() == 3 and not (site.flat or site.axes or self.time_first):
                batch = tensor.shape[0]  # blocks may have parts of a picture beside each other
            length = tensor.numel() // (batch * tensor.shape[-1])
            if site.axes is not None and tensor.dim() > 3:  # its heads are an axis as well
                length = tensor.shape[site.axes.positions]
            return site.index(Whole(), self._run_inputs(batch, length), tensor.device)

        def keeping(key: Key) -> Callable[[Passage], None]:
            site = self.sites[key]

            def act(passage: Passage) -> None:
                stream = site.stream(passage, run)
                stream = stream if site.scale == 1.0 else stream * site.scale
                plus = site.plus
                below = None if plus is None else streams.get((plus.component, plus.layer))
                streams[key] = stream if below is None else stream + below

            return act

        def writing(key: Key, like: Key | None = None) -> Callable[[Passage], None]:
            site, like = self.sites[key], like or key
            changes = [(group, group.writes[like]) for group in groups if like in group.writes]

            def act(passage: Passage) -> None:
                if key in self.faults:
                    return
                try:
                    old = reading(key, passage, site)
                    new = _by_group(old.clone(), len(groups))
                    for (
                        group,
                        change,
                    ) in changes:  # those of sources come first, and others take what they made
                        new[group.index] = change(new)
                    site.write(passage, index_at(passage, site), run, old, new.flatten(0, 1))
                except Exception as error:  # a place that is wrong fails in any way
                    self.faults[key] = f"writing there fails ({_first_line(error)})"

            return act

        def noting(key: Key) -> Callable[[Passage], None]:
            site = self.sites[key]
            wanting = [group for group in groups if key in group.reads]

            def act(passage: Passage) -> None:
                if count:
                    self.passes[key] = self.passes.get(key, 0) + 1
                if key in self.faults:
                    return
                try:
                    by_group = _by_group(reading(key, passage, site), len(groups))
                    for group in wanting:
                        group.seen[key] = by_group[group.index].detach().clone()
                except Exception as error:
                    self.faults[key] = f"reading there fails ({_first_line(error)})"

            return act

        for key in written:
            hooks.append(hook_at(self.sites[key], writing(key), writes=True))
            if key in whole:
                hooks.append(hook_at(self.sites[key], keeping(key)))
        for key in self.sites:
            if key in whole and key not in written:
                hooks.append(hook_at(self.sites[key], keeping(key)))
        hooks += [hook_at(self.sites[key], noting(key)) for key in read]
        for name, layer in written:
            # What a block is given by hand counts as what the one before returned, once that has been read.
            known = COMPONENTS[name]
            left = (named("block_output", known.prefix), (layer or 0) - 1)
            if known.word == "block_input" and known.prefix in self.carrying and self.has(*left):
                hooks.append(hook_at(self.sites[left], writing(left, (name, layer)), writes=True))
        return hooks

    def _run_inputs(self, batch: int, length: int = 0) -> RunInputs:
        run = RunInputs((), {}, None, batch, length, None, None, self.time_first)
        return replace(run, decoder=run)


DERIVED = ("per_head", "norm_scale")
"""Kinds of sites that are computed from what goes into a module."""


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    return tensor.reshape(groups, -1, *tensor.shape[1:])


def taken_from(group: Group) -> Change:
    """A change that puts there what another group has."""
    return lambda groups: groups[group.index]


def all_have(key: Key, *groups: Group) -> bool:
    """Whether something was seen at a place in each of these groups."""
    return all(key in group.seen for group in groups)


def _back(groups: Tensor) -> Tensor:
    return groups[0].clone()


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]


def _batch_of(model: nn.Module, inputs: Inputs) -> tuple[int, bool]:
    """How many examples inputs have, and whether the axis of positions comes first."""
    names = ("input_ids", "inputs_embeds", getattr(model, "main_input_name", ""), *inputs)
    main = next(v for name in names if isinstance(v := inputs.get(name), Tensor) and v.dim() > 0)
    time_first = counts_time_first(model) and main.dim() == 3
    return main.shape[1 if time_first else 0], time_first


def main_tensor(output: Any) -> Tensor:
    """The logits, else what towers make of each example, else the first floating-point tensor of an output."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        # That of one tower is compared with those of all examples of the other.
        ends = [value for name, value in output.items() if str(name).endswith("_embeds")]
        if len(ends) > 1 and all(isinstance(end, Tensor) and end.dim() == 2 for end in ends):
            return torch.cat(ends, -1)
    items: Any = output.values() if isinstance(output, Mapping) else output
    found: Tensor = next(item for item in items if isinstance(item, Tensor) and item.is_floating_point())
    return found
