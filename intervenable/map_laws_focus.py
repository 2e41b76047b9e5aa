"""Which experiments tell something of some components, so that these are looked at without all the rest."""

from __future__ import annotations

from collections.abc import Iterable

from intervenable.map_laws import ADDED, named
from intervenable.map_laws_groups import Group
from model_maps import COMPONENTS

COMPARED = {
    "block_input": "block_output",
    "head_attention_output": "head_attention_value_output",
    "query_output": "head_query_output",
    "key_output": "head_key_output",
    "value_output": "head_value_output",
    **{word: contribution for contribution, words in ADDED.items() for word in words},
}
"""Of what else an experiment writes something to tell this component."""

VIEWED = {"attention_value_output": "head_attention_value_output"}
"""Through which view by heads, where an experiment reads it, something is told of this component."""

OF_MLPS = ("mlp", "router", "expert")
"""With what the words start that are about MLPs and their experts."""


def with_what_they_are_made_from(components: Iterable[str]) -> frozenset[str]:
    """The components, and those without which they are not: of a view by heads, what has the columns.

    Example:
        >>> sorted(with_what_they_are_made_from(["head_query_output"]))
        ['head_query_output', 'query_output']
    """
    result: set[str] = set()
    for name in components:
        above: str | None = name
        while above:
            result.add(above)
            above = COMPONENTS[above].heads_of or COMPONENTS[above].derived_from
    return frozenset(result)


def of_the_same_parts(components: Iterable[str], names: Iterable[str]) -> frozenset[str]:
    """Those of some names that are about the same part of the same stack as one of the components is.

    Example:
        >>> sorted(of_the_same_parts(["router_input"], ["mlp_output", "attention_output", "vision_mlp_output"]))
        ['mlp_output']
    """
    parts = {(COMPONENTS[name].stack, _part(name)) for name in components}
    return frozenset(name for name in names if (COMPONENTS[name].stack, _part(name)) in parts)


def _part(name: str) -> str:
    """What of a block, or whether of no block, a component is about; all that is in no other is in attention."""
    if COMPONENTS[name].scope != "block":
        return "ends"
    first = COMPONENTS[name].word.split("_")[0]
    return {"block": "block", "mixer": "mixer"}.get(first, "mlp" if first in OF_MLPS else "attention")


def groups_about(groups: Iterable[Group], components: Iterable[str]) -> list[Group]:
    """The experiments of which a law says something about one of the components.

    Args:
        groups: All experiments that are to be made.
        components: The components that are looked at.
    """
    asked = frozenset(components)
    known = [COMPONENTS[name] for name in asked]
    compared = {named(COMPARED[one.word], one.prefix) for one in known if one.word in COMPARED}
    viewed = {named(VIEWED[one.word], one.prefix) for one in known if one.word in VIEWED}
    return [
        group
        for group in groups
        if group.inputs
        or (asked | viewed) & {name for name, _ in group.reads}
        or (asked | compared) & _written(group)
    ]


def _written(group: Group) -> set[str]:
    """What an experiment writes, but for the blocks' inputs, if it only holds these as they were."""
    names = {name for name, _ in group.writes}
    chosen = {name for name in names if COMPONENTS[name].word != "block_input"}
    return chosen or names
