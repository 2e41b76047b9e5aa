"""The law of branches: what a branch of a block is given reaches the stream through what it returns alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from intervenable.map_laws import Finding, named
from intervenable.map_laws_groups import Group, all_have
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import Swaps, near, writable
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

    of_experts: list[tuple[str, str, Group]] = []
    for prefix in bench.prefixes:
        block, added = named("block_output", prefix), named("mlp_contribution", prefix)
        for given in (named(word, prefix) for word in OF_EXPERTS):
            if writable(bench, given) and writable(bench, added):
                for source in swaps.sources(prefix, [COMPONENTS[given].word]):
                    words = [COMPONENTS[given].word]
                    group = swaps.swap(prefix, words, source, ["block_output"], base_at="mlp_contribution")
                    of_experts.append((given, block, group))

    def judge(plain: Iterable[Finding]) -> Iterator[Finding]:
        for given, block, group in of_experts:
            for layer in bench.layers(given):
                if bench.has(given.replace(COMPONENTS[given].word, "mlp_contribution"), layer) and all_have(
                    (block, layer), group, bench.base
                ):
                    why = f"{block} as before, with what the MLP adds held"
                    yield near(
                        given, "only", layer, group.seen[block, layer], bench.base.seen[block, layer], why
                    )
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
