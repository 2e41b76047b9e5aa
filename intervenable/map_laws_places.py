"""Laws about places: they are found, passed once, of the stream's examples and positions, and of columns apart."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from intervenable.map_laws import Finding, named
from intervenable.map_laws_runs import Bench
from intervenable.map_trace import Trace
from intervenable.sites import columns_of_heads
from model_maps import COMPONENTS


def bound(bench: Bench, _: Trace) -> Iterator[Finding]:
    """Every place could be found, read and written, and has the examples and positions of the stream around it."""
    for (name, layer), why in bench.faults.items():
        yield Finding(name, "bound", layer, False, math.inf, 0.0, why)
    for (name, layer), value in bench.plainly.items():
        why = _of_other_size(bench, name, layer, value) or _with_a_stream(bench, name, layer)
        if why and (name, layer) not in bench.faults:
            yield Finding(name, "bound", layer, False, math.inf, 0.0, why)


KEYS = ("key_output", "value_output", "head_key_output", "head_value_output", "rotary_key")
"""What may have other positions than the stream: of another stack, or made of a few positions each."""


def _with_a_stream(bench: Bench, name: str, layer: int | None) -> str:
    """Which stream is added to what lies at a place, though the component is none itself; "" if none is."""
    plus = bench.sites[name, layer].plus
    if plus is None or COMPONENTS[name].word.startswith("block_"):
        return ""
    return f"{plus.component} is added to it, and only streams are sums with a stream"


def _of_other_size(bench: Bench, name: str, layer: int | None, value: Tensor) -> str:
    """How what is at a place differs from the stream of its block in examples or positions; "" if it does not.

    A layer that cuts its positions into windows has a row for each, where a position of an example is none of theirs.
    """
    known = COMPONENTS[name]
    prefix = "decoder" if known.prefix == "cross" else known.prefix
    stream = bench.plainly.get((named("block_output", prefix), layer))
    if layer is None or stream is None or stream.dim() != 3 or known.axes not in ("stream", "heads"):
        return ""
    rows, positions = stream.shape[:2]
    if value.dim() < 3 or value.shape[0] != rows:
        return f"it has {value.shape[0]} rows where the stream has {rows} examples"
    length = value.shape[-2]
    if known.word not in KEYS and length != positions and known.inside is None:
        return f"it has {length} positions where the stream has {positions}"
    return ""


def once(bench: Bench, _: Trace) -> Iterator[Finding]:
    """Every place is passed once in a forward pass."""
    for (name, layer), _site in bench.sites.items():
        times = bench.passes.get((name, layer), 0)
        if times != 1 and (name, layer) not in bench.faults:
            yield Finding(name, "once", layer, False, float(times), 1.0, f"passed {times} times in one pass")


def layout(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """Columns of heads do not overlap, and lie inside the tensor."""
    for (name, layer), site in bench.sites.items():
        columns = site.columns
        if columns is None or (name, layer) in bench.faults:
            continue
        call = traced.call_at(site.path, site.call)
        side = "input" if site.kind == "per_head" else site.side
        tensor = None if call is None or site.function else call.tensor_at(side, site.slot)
        if tensor is None:
            continue
        taken = columns_of_heads(columns)
        total = tensor.shape[-1]
        right = len(set(taken)) == len(taken) and min(taken) >= 0 and max(taken) < total
        why = f"{columns.heads} heads of {columns.width} columns in {total}"
        yield Finding(name, "layout", layer, right, 0.0 if right else math.inf, 0.0, why)


def viewed(bench: Bench) -> Iterator[Finding]:
    """The view by heads has the numbers that the component of which it is the view has, position by position."""
    for (name, layer), heads in bench.plainly.items():
        whole = COMPONENTS[name].heads_of
        values = None if whole is None else bench.plainly.get((whole, layer))
        if whole is None or values is None or values.dim() != 3 or heads.dim() != 4:
            continue
        by_position = heads.transpose(1, 2).flatten(2)
        if by_position.shape != values.shape:
            continue  # more than the heads' columns, or fewer
        right = torch.equal(by_position.sort(-1).values, values.sort(-1).values)
        why = f"{name} has the numbers of {whole}"
        for one in (name, whole):
            yield Finding(one, "layout", layer, right, 0.0 if right else math.inf, 0.0, why)
