"""Branches of a block told apart: which of its contributions read other positions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intervenable.hooks import EarlyStop, Hook, hooked
from intervenable.map_layout import Layout
from intervenable.map_mlp import Placed, main, site_at
from intervenable.map_stream import Contribution
from intervenable.map_trace import Call, Trace
from intervenable.map_values import BlockValues
from intervenable.passage import Passage

Branch = Literal["attention", "cross", "mixer", "mlp"]
BRANCHES: Mapping[str, Branch] = {"attention": "attention", "cross": "cross"}


def mixer_sites(values: BlockValues, part: Contribution, maker: Call) -> Placed:
    """The sites of what mixes positions without a pattern.

    Args:
        values: What passed the modules of the block.
        part: What it adds to the stream.
        maker: The module that mixes, whose result is the contribution but for a last matrix.
    """
    sites = {
        "mixer_input": site_at(values, main(maker, "input")),
        "mixer_output": site_at(values, part.core),
    }
    if part.seen is not part.core or part.scale != 1.0:
        sites["mixer_contribution"] = site_at(values, part.seen, scale=part.scale)
    return Placed(sites, {})


def mixing_modules(
    model: nn.Module, inputs: Mapping[str, Any], run: Trace, paths: Collection[str], layout: Layout
) -> dict[str, bool]:
    """Which modules read more than one position: one vector of their input is changed, and others come out changed.

    Args:
        model: The model.
        inputs: Its inputs.
        run: A trace of the model on these inputs.
        paths: Paths of the modules.
        layout: The layout of their stack.
    """
    wanted = [path for path in paths if run.of(path)[0].main_input is not None]
    seen: dict[str, Tensor] = {}
    hooks: list[Hook] = []
    for path in wanted:
        call = run.of(path)[0]
        hooks.append(Hook(call.module, "input", _changing(call, layout)))
        hooks.append(Hook(call.module, "output", _keeping(path, seen)))
    if hooks:
        last = max(wanted, key=lambda path: run.of(path)[0].left)
        stop = EarlyStop(model, [last])  # what comes after all of them is not asked for
        hooks.append(Hook(run.of(last)[0].module, "output", lambda _: stop.request(last)))
        with torch.no_grad(), hooked([*hooks, *stop.hooks], model), stop:
            model(**inputs)
    return {path: _spreads(run.of(path)[0], seen[path], layout) for path in wanted}


def _changing(call: Call, layout: Layout) -> Callable[[Passage], None]:
    """Give a module what it was given in the trace, with one vector changed."""

    def change(passage: Passage) -> None:
        assert call.main_input is not None  # modules without one are not asked
        tensor = layout.vectors(call.main_input).clone(memory_format=torch.contiguous_format)
        vectors = tensor.view(-1, tensor.shape[-1])
        vectors[_changed_row(tensor)] += 1.0 + vectors[_changed_row(tensor)].abs()
        passage.put("input", None, tensor if tensor.shape == call.main_input.shape else tensor.mT)

    return change


def _changed_row(tensor: Tensor) -> int:
    """A vector with others of its example before and behind it, if there are two examples or more."""
    rows = tensor.numel() // tensor.shape[-1]
    return rows // 4


def _keeping(path: str, seen: dict[str, Tensor]) -> Callable[[Passage], None]:
    def keep(passage: Passage) -> None:
        seen.setdefault(path, passage.take("output", None).clone())

    return keep


def _spreads(call: Call, changed: Tensor, layout: Layout) -> bool:
    """Whether vectors other than the changed one come out changed."""
    given, returned = call.main_input, call.main_output
    if given is None or returned is None:
        return False
    given, returned, changed = (layout.vectors(tensor) for tensor in (given, returned, changed))
    rows = given.numel() // given.shape[-1]
    if returned.numel() // returned.shape[-1] != rows or returned.shape != changed.shape:
        return True
    difference = (returned - changed).abs().reshape(rows, -1).amax(-1)
    difference[_changed_row(given)] = 0.0
    return bool(difference.max() > 1e-4 * returned.abs().max())
