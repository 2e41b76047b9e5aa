"""Branches of a block told apart: which of its contributions read other positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intervenable.hooks import Hook
from intervenable.map_blocks import Block
from intervenable.map_mlp import Placed, entry_of, site_at
from intervenable.map_stream import Contribution
from intervenable.map_trace import Trace, trace
from intervenable.map_values import BlockValues, Key
from intervenable.passage import Passage

Branch = Literal["attention", "cross", "mixer", "mlp"]


def mixer_sites(values: BlockValues, part: Contribution, stream: set[Key]) -> Placed:
    """The sites of what mixes positions without a pattern.

    Args:
        values: What passed the modules of the block.
        part: What it adds to the stream.
        stream: Values that the stream has in the block.
    """
    sites = {"mixer_output": site_at(values, part.core)}
    if part.seen is not part.core or part.scale != 1.0:
        sites["mixer_contribution"] = site_at(values, part.seen, scale=part.scale)
    entry = entry_of(values, part.core.call, stream)
    if entry is None:
        return Placed(sites, {"mixer_input": "no module is given what all of its mixer reads"})
    return Placed({"mixer_input": site_at(values, entry), **sites}, {})


def mixing_calls(
    model: nn.Module, inputs: Mapping[str, Any], blocks: Sequence[Block], paths: Sequence[Sequence[str]]
) -> list[dict[str, bool]]:
    """Which modules of blocks read more than one position, told by gradients: for each block path -> whether.

    Args:
        model: The model.
        inputs: Its inputs.
        blocks: Blocks.
        paths: For each of them the paths in the model of the modules to ask.
    """
    wanted = {path for of_block in paths for path in of_block}
    hooks = [Hook(module, "input", _cut(module)) for path, module in model.named_modules() if path in wanted]
    if not hooks:
        return [{} for _ in blocks]
    with torch.enable_grad():
        run = trace(model, inputs, gradients=True, extra=hooks)
    return [{path: _mixes(run, path) for path in of_block} for of_block in paths]


def _cut(module: nn.Module) -> Callable[[Passage], None]:
    def cut(passage: Passage) -> None:
        tensor = passage.take("input", None)
        passage.put("input", None, tensor.detach().requires_grad_())

    return cut


def _mixes(run: Trace, path: str) -> bool:
    """Whether one position of a module's output depends on other positions of its input."""
    (call, *_) = run.of(path)
    given, returned = call.main_input, call.main_output
    if given is None or returned is None or not returned.requires_grad:
        return False
    if given.dim() != returned.dim() or given.dim() < 2:
        return False
    axis = given.dim() - 2
    if returned.shape[axis] != given.shape[axis] or given.shape[axis] < 2:
        return True
    for at in (returned.shape[axis] - 1, 0):
        chosen = returned.select(axis, at)
        code = torch.randn(chosen.shape, generator=torch.Generator().manual_seed(at)).to(chosen)
        slopes: Any = torch.autograd.grad((chosen * code).sum(), given, retain_graph=True, allow_unused=True)
        if slopes[0] is None:
            continue
        slope: Tensor = slopes[0]
        others = [other for other in range(given.shape[axis]) if other != at]
        if float(slope.index_select(axis, torch.tensor(others, device=slope.device)).abs().max()) > 0:
            return True
    return False
