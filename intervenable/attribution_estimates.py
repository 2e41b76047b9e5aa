"""From gradients at places to estimates for cells: differences times gradients, summed over what a cell patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from intervenable.attribution_runs import ProbedRun, parts_of
from intervenable.sweep_cells import levels_of
from intervenable.sweep_values import Edits, Place, gathered

Metrics = Mapping[str, Callable[[Tensor], Any]]
"""Functions of logits `[b, s, V]` by name."""


class Estimates:
    """What each cell adds to each metric, summed up part by part.

    Args:
        count: How many cells there are.
        metrics: The metrics.
        logits: `[b, s, V]` of the run that is patched.
    """

    def __init__(self, count: int, metrics: Metrics, logits: Tensor) -> None:
        self._metrics = metrics
        self.baseline: dict[str, Tensor] = {}
        """The value of each metric without a patch."""
        self._added: dict[str, Tensor] = {}
        for name, metric in metrics.items():
            value, _ = parts_of(name, metric, logits)
            self.baseline[name] = as_found(value)
            self._added[name] = self.baseline[name].new_zeros(count, value.numel())

    def add(self, run: ProbedRun, edits: Sequence[tuple[Place, Edits, Tensor]], weight: float) -> None:
        """Add what the gradients of one run say.

        Args:
            run: The run.
            edits: What cells put at its places, each with what is there without a patch.
            weight: How much this run counts.
        """
        differences = [difference(one, own) for _, one, own in edits]
        parts = [
            (name, part)
            for name, metric in self._metrics.items()
            for part in parts_of(name, metric, run.logits)[1]
        ]
        for number, (name, part) in enumerate(parts):
            gradients = run.backward(part.gradient, again=number < len(parts) - 1)
            for (place, one, _), change in zip(edits, differences, strict=True):
                by_example = _first_order(one, change, gradients[place][one.passage])
                for entry, examples in part.examples.items():
                    total = (by_example * examples).sum(1)
                    self._added[name][list(one.cells), entry] += weight * total.to(self._added[name].dtype)

    def values(self) -> dict[str, Tensor]:
        """`[cells, *shape of the metric]`: the estimates of each metric."""
        return {
            name: value + self._added[name].view(-1, *value.shape) for name, value in self.baseline.items()
        }


def as_found(value: Tensor) -> Tensor:
    """A metric's value as results keep it: on the CPU, in float32 at least."""
    return value.detach().to("cpu", torch.promote_types(value.dtype, torch.float32))


def difference(edits: Edits, own: Tensor) -> Tensor:
    """What cells change in what is there: `[c, b, n, d]` and so on, 0 where a patch changes nothing.

    Scores under the mask are -inf and stay so, whatever is put there.
    """
    there = gathered(own, levels_of(edits.site), edits.base.get("heads"), edits.base)
    same = (edits.values == there) | (there == -torch.inf)
    change = torch.where(same, torch.zeros_like(there), edits.values - there)
    if edits.real is None:
        return change
    real = edits.real if edits.site.matrix else edits.real[..., None]
    return torch.where(real.to(change.device), change, torch.zeros_like(change))


def _first_order(edits: Edits, change: Tensor, gradient: Tensor) -> Tensor:
    """`[c, b]`: change times gradient, summed over the units of each cell."""
    at_units = gathered(gradient, levels_of(edits.site), edits.base.get("heads"), edits.base)
    wide = torch.promote_types(change.dtype, torch.float32)
    products = change.to(wide) * at_units.to(wide)
    # Nothing is changed there, whatever the gradient: none comes through a score of -inf.
    products = torch.where(change == 0, torch.zeros_like(products), products)
    return products.flatten(2).sum(2).cpu()


def line(edits: Sequence[tuple[Place, Edits, Tensor]]) -> list[Tensor]:
    """Where the line of integrated gradients goes at one place: all that its cells change there, at once.

    Args:
        edits: What cells put at the place, each with what is there without a patch.

    Returns:
        For each passage the change, as long as the line: `[b, s, d]`, by heads `[b, heads, s, dh]` and so on.
    """
    owns = {one.passage: own for _, one, own in edits}
    changes = [torch.zeros_like(owns[passage]) for passage in sorted(owns)]
    for _, one, own in edits:
        change = difference(one, own)
        levels = levels_of(one.site)
        # Several cells may patch one unit, all with the same value: where it goes is looked up, and not added up.
        flat = torch.arange(own[..., 0].numel() if not one.site.matrix else own.numel(), device=own.device)
        whole = flat.view(own.shape if one.site.matrix else own.shape[:-1])
        where = gathered(whole, levels, one.base.get("heads"), one.base)
        meant = torch.ones_like(where, dtype=torch.bool) if one.real is None else one.real.to(where.device)
        meant = meant.expand(where.shape)
        if one.site.matrix:
            changes[one.passage].view(-1)[where[meant]] = change[meant]
        else:
            changes[one.passage].view(-1, own.shape[-1])[where[meant]] = change[meant]
    return changes
