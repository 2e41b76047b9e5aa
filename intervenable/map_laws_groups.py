"""An experiment: a group of the batch with edits of its own, and what was seen in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Key = tuple[str, int | None]
"""A component and a layer; None outside the blocks."""

Change = Callable[[Tensor], Tensor]
"""From the values of all groups, `[groups, b, ...]`, to those that one group is to have, `[b, ...]`."""

Inputs = Mapping[str, Any]
"""Keyword inputs of a model."""

Definition = tuple[str, frozenset[Key], frozenset[str]]
"""The name of an experiment, where it writes, and which inputs of its own it has."""


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

    def take_results(self, other: Group) -> None:
        """Take what was seen in another group with the same edits, of the places that are to be read in this one."""
        self.seen = {**{key: other.seen[key] for key in self.reads if key in other.seen}, **self.seen}
        self.output, self.beside, self.output_beside = other.output, other.beside, other.output_beside


def definition_of(group: Group) -> Definition:
    """What makes a group the same experiment as another one: all that its changes depend on is in its name."""
    return group.name, frozenset(group.writes), frozenset(group.inputs)


def taken_from(group: Group) -> Change:
    """A change that puts there what another group has."""
    return lambda groups: groups[group.index]


def all_have(key: Key, *groups: Group) -> bool:
    """Whether something was seen at a place in each of these groups."""
    return all(key in group.seen for group in groups)


def by_group(tensor: Tensor, groups: int) -> Tensor:
    """A batch with an axis of groups before that of their examples."""
    return tensor.reshape(groups, -1, *tensor.shape[1:])
