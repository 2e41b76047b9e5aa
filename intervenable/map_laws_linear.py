"""The law of sums: outputs are affine maps of what the last matrix is given, and streams of what is added to them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from intervenable.map_attention_probe import keeps_columns
from intervenable.map_laws import Finding, deviation, limit_of, named
from intervenable.map_laws_groups import Change, Group, Key
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_swaps import MOVED, STILL, Judge
from intervenable.map_trace import Trace
from model_maps import COMPONENTS

GIVEN = {
    "attention_value_output": "attention_output",
    "mlp_hidden": "mlp_output",
    "expert_output": "mlp_output",
}
"""What goes into the last matrix, or comes out of it, and what the module makes of it."""

ADDED_TO = {
    ("mixer_output", "mixer_contribution"): "block_mid",
    ("attention_output", "attention_contribution"): "block_mid",
    ("mlp_output", "mlp_contribution"): "block_output",
}
"""An output, what is added to the stream of it, and the stream after that."""

TIMES = (0.0, 4.0)

PARTS = ("even columns", "odd columns", "all columns")


def affine(bench: Bench) -> Judge:
    """Zeroing half of the columns and zeroing the others comes to zeroing all and zeroing none."""
    made: list[tuple[str, str, list[Group]]] = []
    for prefix in (*bench.prefixes, "cross"):
        for given, output in GIVEN.items():
            written, read = named(given, prefix), named(output, prefix)
            if COMPONENTS[written].word != given or COMPONENTS[read].word != output:
                continue
            layers = [
                layer
                for layer in bench.layers(written)
                if bench.has(read, layer)
                and not (
                    given == "attention_value_output" and keeps_columns(bench.sites[written, layer].module)
                )
            ]
            if layers:
                stack = "decoder" if prefix == "cross" else prefix
                groups = []
                for part in PARTS:
                    writes = {
                        **bench.held(stack),
                        **{(written, layer): _zeroed(bench, part) for layer in layers},
                    }
                    groups.append(
                        bench.experiment(f"no {part} of {written}", writes, [(read, x) for x in layers])
                    )
                made.append((written, read, groups))

    def judge() -> Iterator[Finding]:
        for written, read, groups in made:
            for layer in bench.layers(read):
                key = (read, layer)
                if not all(key in group.seen for group in (bench.base, *groups)) or not bench.has(
                    written, layer
                ):
                    continue
                even, odd, none = (group.seen[key] for group in groups)
                whole = bench.base.seen[key]
                limit = MOVED * limit_of(whole.dtype)
                off = deviation(even + odd - none, whole) if _alike(even, odd, none) else float("inf")
                follows = deviation(none, whole) > STILL * limit_of(whole.dtype)
                why = f"{read} is the sum of what parts of {written} come to"
                why = why if follows else f"{read} is another without {written}"
                yield Finding(read, "linear", layer, off <= limit and follows, off, limit, why)

    return judge


def _alike(*values: Tensor) -> bool:
    """Whether values can be added: how long some models are in a pass follows from what is written in it."""
    return len({value.shape for value in values}) == 1


def _zeroed(bench: Bench, part: str) -> Change:
    start, step = {"even columns": (0, 2), "odd columns": (1, 2), "all columns": (0, 1)}[part]

    def change(groups: Tensor) -> Tensor:
        value = groups[bench.base.index].clone()
        value[..., torch.arange(start, value.shape[-1], step, device=value.device)] = 0
        return value

    return change


def _given_for(output: str) -> list[str]:
    """What goes into the last matrix of an output."""
    return [given for given, made_of_it in GIVEN.items() if made_of_it == output]


def straight(bench: Bench, traced: Trace) -> Judge:
    """Where the output itself is what is added, with some times as much of it the stream moves as many times as far.

    A branch that a gate lets through, or the gate, does not: there a function lies between it and the stream. It is
    asked where what the last matrix is given, which would tell as much, is not known, and no norm follows.
    """
    made: list[tuple[str, str, list[Group]]] = []
    for prefix in bench.prefixes:
        for (output, added), stream in ADDED_TO.items():
            written, read = named(output, prefix), named(stream, prefix)
            layers = [
                layer
                for layer in bench.layers(written)
                if bench.has(read, layer)
                and _same_place(bench, (written, layer), (named(added, prefix), layer))
                and not any(bench.has(named(word, prefix), layer) for word in _given_for(output))
            ]
            if layers:
                groups = [
                    bench.experiment(
                        f"{times:g} times {written}",
                        {
                            **bench.held(prefix),
                            **{(written, layer): _times(bench, times) for layer in layers},
                        },
                        [(read, layer) for layer in layers],
                    )
                    for times in TIMES
                ]
                made.append((written, read, groups))

    def judge() -> Iterator[Finding]:
        for written, read, (none, more) in made:
            for layer in bench.layers(written):
                key = (read, layer)
                if not all(key in group.seen for group in (bench.base, none, more)):
                    continue
                if _comes_from_a_norm(bench.plainly.get(key), traced):
                    continue
                without, once, moved = (group.seen[key].double() for group in (none, bench.base, more))
                limit = MOVED * limit_of(bench.base.seen[key].dtype)
                alike = _alike(without, once)
                off = deviation(moved, without + TIMES[1] * (once - without)) if alike else float("inf")
                why = f"{read} moves {TIMES[1]:g} times as far with {TIMES[1]:g} times {written}"
                yield Finding(written, "linear", layer, off <= limit, off, limit, why)

    return judge


def _comes_from_a_norm(stream: Tensor | None, traced: Trace) -> bool:
    """Whether a module returns this that has a weight for each column and no matrix."""
    if stream is None:
        return False
    for call in traced.calls:
        own = list(call.module.parameters())
        made = call.main_output if own and all(one.dim() == 1 for one in own) else None
        if made is not None and made.shape == stream.shape and torch.equal(made, stream):
            return True
    return False


def _same_place(bench: Bench, one: Key, other: Key) -> bool:
    """Whether two components are the very tensor."""
    if one not in bench.sites or other not in bench.sites:
        return False
    first, second = bench.sites[one], bench.sites[other]
    alike = (first.module, first.side, first.slot) == (second.module, second.side, second.slot)
    return alike and first.function == second.function and not first.read_only


def _times(bench: Bench, times: float) -> Change:
    return lambda groups: groups[bench.base.index] * times
