"""The law of branches: what a branch of a block is given reaches the stream through what it returns alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from intervenable.map_laws import Finding, named
from intervenable.map_laws_groups import Group, Key, all_have
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import Judge, Swaps, near, writable
from model_maps import COMPONENTS

BRANCHES: Mapping[str, str] = {
    "attention_input": "attention_output",
    "mixer_input": "mixer_output",
    "mlp_input": "mlp_output",
}
"""What a branch is given, and what it returns."""

OF_EXPERTS = ("router_input", "expert_input")
"""What parts of an MLP of experts are given: it reaches the stream through what the MLP adds."""


def branches(bench: Bench, swaps: Swaps) -> Callable[[Iterable[Finding]], Iterator[Finding]]:
    """With another run's input of a branch and its output held, the block's output stays: it is the whole output.

    It is no gate, and nothing that a gate lets through. What is added to the stream tells as much, where it is known
    and comes of the output: so this is asked where that is at the same place, and the stream is not the sum.

    Returns:
        From the findings of a plain pass to those of this law.
    """
    made: list[tuple[str, str, str, Group]] = []
    for prefix in (*bench.prefixes, "cross"):
        for given, returned in BRANCHES.items():
            name = named(returned, prefix)
            if COMPONENTS[name].prefix != prefix or not (
                writable(bench, name) and writable(bench, named(given, prefix))
            ):
                continue
            for source in swaps.sources(prefix, [given])[-1:]:
                group = swaps.swap(prefix, [given], source, ["block_output"], base_at=returned)
                made.append((named(given, prefix), name, named("block_output", prefix), group))

    def judge(plain: Iterable[Finding]) -> Iterator[Finding]:
        sums = {(one.component, one.layer): one.passed for one in plain if one.law == "residual"}
        for given, name, block, group in made:
            added = name.replace("_output", "_contribution")
            for layer in bench.layers(name):
                key = (block, layer)
                if not bench.has(*key) or not all_have(key, group, bench.base) or sums.get((added, layer)):
                    continue
                if bench.map.site(added, layer) in (None, bench.map.site(name, layer)):
                    why = f"{block} as before, with another input of the branch and this held"
                    found = near(name, "only", layer, group.seen[key], bench.base.seen[key], why)
                    yield found
                    if not found.passed:  # either may be elsewhere
                        yield replace(found, component=given)

    return judge


def within(bench: Bench, swaps: Swaps) -> Judge:
    """With another run's values given to router or experts and what the MLP adds held, the block's output stays."""
    made: list[tuple[str, Key, Key, Group]] = []
    for prefix in bench.prefixes:
        block, added = named("block_output", prefix), named("mlp_contribution", prefix)
        for word in OF_EXPERTS:
            given = named(word, prefix)
            if not (writable(bench, given) and writable(bench, added)):
                continue
            for source in swaps.sources(prefix, [word]):
                group = swaps.swap(prefix, [word], source, ["block_output"], base_at="mlp_contribution")
                made += [(given, (block, layer), (added, layer), group) for layer in bench.layers(given)]

    def judge() -> Iterator[Finding]:
        for given, block, added, group in made:
            if bench.has(given, block[1]) and bench.has(*added) and all_have(block, group, bench.base):
                found, expected = group.seen[block], bench.base.seen[block]
                why = f"{block[0]} as before, with what the MLP adds held"
                yield near(given, "only", block[1], found, expected, why)

    return judge
