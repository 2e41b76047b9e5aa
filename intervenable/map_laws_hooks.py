"""The hooks of a pass of several groups: what writes each one's edits, and what notes the values that are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from intervenable.hooks import Hook
from intervenable.inputs import RunInputs
from intervenable.map_laws import named
from intervenable.map_laws_groups import Change, Group, Key, by_group
from intervenable.map_trace import Slot
from intervenable.passage import Passage
from intervenable.sites import BoundSite, hook_at
from intervenable.unit_index import UnitIndex
from intervenable.units import Whole
from model_maps import COMPONENTS

DERIVED = ("per_head", "norm_scale")
"""Kinds of sites that are computed from what goes into a module."""


@dataclass(eq=False)
class GroupHooks:
    """Writes and reads of the groups of one pass, at the bound sites of a map."""

    sites: Mapping[Key, BoundSite]
    groups: Sequence[Group]
    examples: int
    """Examples of the blocks in the whole batch."""

    time_first: bool
    """Whether the axis of positions comes before that of examples."""

    carrying: frozenset[str]
    """Prefixes of the stacks whose blocks are given more of those before them than the stream."""

    faults: dict[Key, str]
    """Places that failed, and why; those that fail in this pass are added."""

    pinned: Mapping[Key, Sequence[Slot]] = field(default_factory=dict)
    """Inputs of blocks beside the stream that all groups are given as the first one is."""

    passes: dict[Key, int] | None = None
    """How often a place is passed, if that is to be counted."""

    entries: Mapping[Key, float] = field(default_factory=dict)
    """How many entries places have in one group, as a plain pass showed."""

    times: float = 1.0
    """How many times the examples of a plain pass there are."""

    streams: dict[Key, Tensor] = field(default_factory=dict)
    """What went through the places to which others add, in the pass that is on."""

    def __post_init__(self) -> None:
        self._run = self._run_of(self.examples)

    def in_order(self) -> list[Hook]:
        """First all that write, then all that read what was made of it."""
        written = [key for key in self.sites if any(key in group.writes for group in self.groups)]
        read = [key for key in self.sites if any(key in group.reads for group in self.groups)]
        whole = {
            (site.plus.component, site.plus.layer) for site in self.sites.values() if site.plus is not None
        }
        hooks = [hook_at(self.sites[key], self._pinning(slots)) for key, slots in self.pinned.items()]
        for key in written:
            hooks.append(hook_at(self.sites[key], self._writing(key), writes=True))
            if key in whole:
                hooks.append(hook_at(self.sites[key], self._keeping(key)))
        for key in self.sites:
            if key in whole and key not in written:
                hooks.append(hook_at(self.sites[key], self._keeping(key)))
        hooks += [hook_at(self.sites[key], self._noting(key)) for key in read]
        for key in written:
            # What a block is given by hand counts as what the one before returned, once that has been read.
            left = self._left_of(key)
            if left is not None:
                hooks.append(hook_at(self.sites[left], self._writing(left, key), writes=True))
        return hooks

    def _pinning(self, slots: Sequence[Slot]) -> Callable[[Passage], None]:
        """What gives all groups what the first one is given."""

        def act(passage: Passage) -> None:
            for slot in slots:
                value = by_group(passage.take("input", slot), len(self.groups))
                passage.put("input", slot, value[:1].expand_as(value).flatten(0, 1))

        return act

    def _left_of(self, key: Key) -> Key | None:
        """The output of the block before, where blocks are given that beside the stream."""
        name, layer = key
        known = COMPONENTS[name]
        left = (named("block_output", known.prefix), (layer or 0) - 1)
        if known.word != "block_input" or known.prefix not in self.carrying:
            return None
        return left if left in self.sites and left not in self.faults else None

    def _writing(self, key: Key, like: Key | None = None) -> Callable[[Passage], None]:
        """What writes at a place what the groups have for it, or for another place."""
        site, wanted = self.sites[key], like or key
        changes: list[tuple[Group, Change]] = [
            (group, group.writes[wanted]) for group in self.groups if wanted in group.writes
        ]

        def act(passage: Passage) -> None:
            if key in self.faults:
                return
            try:
                old = self._reading(passage, site)
                new = by_group(old.clone(), len(self.groups))
                if self._has_grown(key, new):
                    return
                for group, change in changes:  # those of sources come first: others take what they made
                    new[group.index] = change(new)
                site.write(passage, self._index_at(passage, site), self._run, old, new.flatten(0, 1))
            except Exception as error:  # a place that is wrong fails in any way
                self.faults[key] = f"writing there fails ({first_line(error)})"

        return act

    def _noting(self, key: Key) -> Callable[[Passage], None]:
        """What keeps, for the groups that read a place, what they have there."""
        site = self.sites[key]
        wanting = [group for group in self.groups if key in group.reads]

        def act(passage: Passage) -> None:
            if self.passes is not None:
                self.passes[key] = self.passes.get(key, 0) + 1
            if key in self.faults:
                return
            try:
                values = by_group(self._reading(passage, site), len(self.groups))
                if self._has_grown(key, values):
                    return
                for group in wanting:
                    group.seen[key] = values[group.index].detach().clone()
            except Exception as error:
                self.faults[key] = f"reading there fails ({first_line(error)})"

        return act

    def _has_grown(self, key: Key, values: Tensor) -> bool:
        """Whether a place has as many times more entries of an example as there are examples: it is at fault then."""
        before = self.entries.get(key)
        if before is None or self.times == 1 or values.numel() // len(self.groups) != before * self.times:
            return False
        self.faults[key] = "how much it has of an example depends on how many are beside it"
        return True

    def _keeping(self, key: Key) -> Callable[[Passage], None]:
        """What keeps the stream at a place, for those to which it is added."""
        site = self.sites[key]

        def act(passage: Passage) -> None:
            try:
                stream = site.stream(passage, self._run)
                stream = stream if site.scale == 1.0 else stream * site.scale
                below = self._added_to(site)
                self.streams[key] = stream if below is None else stream + below
            except Exception as error:
                self.faults[key] = f"the stream there cannot be added to ({first_line(error)})"

        return act

    def _added_to(self, site: BoundSite) -> Tensor | None:
        plus = site.plus
        return None if plus is None else self.streams.get((plus.component, plus.layer))

    def _reading(self, passage: Passage, site: BoundSite) -> Tensor:
        return site.read(passage, self._index_at(passage, site), self._run, self._added_to(site))

    def _index_at(self, passage: Passage, site: BoundSite) -> UnitIndex:
        tensor = passage.take("input" if site.kind in DERIVED else site.side, site.slot)
        if not site.by_heads or site.kind == "inside":
            return site.index(Whole(), self._run, tensor.device)
        # How many positions there are is read off what passes: a tower's are those of no input.
        batch = self.examples
        if tensor.dim() == 3 and not (site.flat or site.axes or self.time_first):
            batch = tensor.shape[0]  # blocks may have parts of a picture beside each other
        length = tensor.numel() // (batch * tensor.shape[-1])
        if site.axes is not None and tensor.dim() > 3:  # its heads are an axis as well
            length = tensor.shape[site.axes.positions]
        return site.index(Whole(), self._run_of(batch, length), tensor.device)

    def _run_of(self, batch: int, length: int = 0) -> RunInputs:
        run = RunInputs((), {}, None, batch, length, None, None, self.time_first)
        return replace(run, decoder=run)


def first_line(error: Exception) -> str:
    """The class of an error and what its first line says, short."""
    text = str(error).splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
