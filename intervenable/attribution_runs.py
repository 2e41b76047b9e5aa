"""Runs with gradients: how a metric changes with what passes at the places of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import MetricError, NotFiredError
from intervenable.hooks import Hook
from intervenable.passage import Passage
from intervenable.plan import Plan
from intervenable.runs import Observers, gather_added, run_base, without_cache
from intervenable.sites import BoundSite, hook_at
from intervenable.sweep_runs import Unpatched
from intervenable.sweep_values import Place
from intervenable.units import Whole
from intervenable.wave_readout import logits_of

Gradients = dict[Place, list[Tensor]]
"""At each place, passage by passage, the gradient with respect to what passes: `[b, s, d]`, by heads and so on."""


class Probes:
    """Hooks that put a leaf of the graph under what passes at places, and keep what passed.

    With `delta = 0` a leaf, the model goes on with `a + delta`, which is `a`; the gradient at the leaf is that with
    respect to the activation. Where a value is given, that is put in the place of `a` first.

    Args:
        sites: The places.
        plan: The run.
        put: What to put in instead of what passes, by place, passage by passage.
    """

    def __init__(
        self,
        sites: Mapping[Place, BoundSite],
        plan: Plan,
        put: Mapping[Place, Sequence[Tensor]] | None = None,
    ) -> None:
        self.values: dict[Place, list[Tensor]] = {place: [] for place in sites}
        """What passed at each place, one for each passage, before anything was put in."""
        self.leaves: dict[Place, list[Tensor]] = {place: [] for place in sites}
        self._inputs = plan.base
        self._put = put or {}
        self._added, gathering = gather_added(tuple(sites.values()), plan.base)
        # What is added is read where it passes, before the place that needs it.
        hooks = (hook_at(site, self._probe(place, site), writes=True) for place, site in sites.items())
        self.hooks: list[Hook] = [*hooks, *gathering]

    def _probe(self, place: Place, site: BoundSite) -> Callable[[Passage], None]:
        def act(passage: Passage) -> None:
            device = passage.take(site.side, site.slot).device
            index = site.index(Whole(), self._inputs, device)
            value = site.read(passage, index, self._inputs, self._added.get(id(site)))
            put = self._put.get(place)
            new = value if put is None else put[len(self.leaves[place])].to(value)
            leaf = torch.zeros_like(value, requires_grad=True)
            self.values[place].append(value.detach().clone())
            self.leaves[place].append(leaf)
            site.write(passage, index, self._inputs, value, new + leaf)

        return act


@dataclass(frozen=True, eq=False)
class ProbedRun:
    """A run whose graph is kept: the logits, what passed at the places, and the leaves there."""

    model: nn.Module
    plan: Plan
    logits: Tensor
    """`[b, s, V]`, with a graph."""

    probes: Probes

    @property
    def unpatched(self) -> Unpatched:
        """The same as a run like any other."""
        batch, length, vocabulary = self.logits.shape
        shape = (batch, length, vocabulary)
        return Unpatched(self.model, self.plan, self.probes.values, shape, None, self.logits.detach())

    def backward(self, gradient: Tensor, again: bool) -> Gradients:
        """The gradients at all places from one at the logits, `[b, s, V]`; zeros where none comes.

        Args:
            gradient: The gradient at the logits.
            again: Whether the graph is needed once more.
        """
        leaves = [leaf for leaves in self.probes.leaves.values() for leaf in leaves]
        found: Sequence[Tensor] = [torch.zeros_like(leaf) for leaf in leaves]
        if self.logits.requires_grad:
            found = torch.autograd.grad(
                self.logits, leaves, gradient.to(self.logits), retain_graph=again, materialize_grads=True
            )
        rest = iter(found)
        return {place: [next(rest) for _ in passed] for place, passed in self.probes.leaves.items()}


def run_probed(
    model: nn.Module,
    plan: Plan,
    sites: Mapping[Place, BoundSite],
    put: Mapping[Place, Sequence[Tensor]] | None = None,
) -> ProbedRun:
    """Run a model with leaves at the places; the user's parameters get no gradients.

    Raises:
        NotFiredError: a place was not reached.
        UnsupportedModelError: the model gives no logits, or computes without a graph.
    """
    probes = Probes(sites, plan, put)
    # Whatever the caller has switched off is switched on for this run, and off again after it.
    with torch.inference_mode(False), torch.enable_grad():
        output = run_base(
            model, plan, {}, without_cache(model, plan.base), Observers(after=probes.hooks)
        ).output
        logits = logits_of(output, model)
    missing = [sites[place].label for place, values in probes.values.items() if not values]
    if missing:
        raise NotFiredError(f"The run did not reach {missing[0]}. Leave it out: layers=...")
    return ProbedRun(model, plan, logits, probes)


# --- metrics ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Part:
    """Numbers of a metric's value whose gradients can be told apart in one backward pass: each has its examples."""

    gradient: Tensor
    """`[b, s, V]` the gradient of their sum at the logits."""

    examples: Mapping[int, Tensor]
    """By number (of the value, flattened) `[b]` 1 where it depends on an example, 0 elsewhere."""


def parts_of(name: str, metric: Callable[[Tensor], Any], logits: Tensor) -> tuple[Tensor, Iterator[Part]]:
    """A metric's value, and its gradient at the logits, in as few parts as backward passes are needed.

    The model computes examples each by itself, so that numbers which depend on different examples need one pass
    together.

    Raises:
        MetricError: the metric gives something without a gradient, or NaN.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaf = logits.detach().clone().requires_grad_()
        value = metric(leaf.clone())  # a metric may work in place in what it is given
        if not isinstance(value, Tensor) or not value.requires_grad or not value.is_floating_point():
            got = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise MetricError(
                f"The metric {name!r} gave {got} without a gradient, and attribution patching needs one. Compute a"
                " tensor from the logits without detach(), item(), argmax or comparisons, such as a difference of"
                " logits or a log-probability; iv.patching.sweep takes any metric."
            )
        if bool(value.isnan().any()):
            raise MetricError(f"The metric {name!r} gives NaN on the unpatched run.")
        return value.detach(), _parts(value.flatten(), leaf)


def _parts(value: Tensor, leaf: Tensor) -> Iterator[Part]:
    def gradient(numbers: Sequence[int]) -> Tensor:
        chosen = torch.zeros_like(value)
        chosen[list(numbers)] = 1
        return torch.autograd.grad(value, leaf, chosen, retain_graph=True, materialize_grads=True)[0]

    if len(value) == 1:
        yield Part(gradient([0]), {0: torch.ones(len(leaf))})
        return
    reads = [gradient([number]).flatten(1).ne(0).any(1).cpu() for number in range(len(value))]
    waiting = dict(enumerate(reads))
    while waiting:
        taken: dict[int, Tensor] = {}
        covered = torch.zeros(len(leaf), dtype=torch.bool)
        for number, examples in waiting.items():
            if not bool((examples & covered).any()):
                taken[number], covered = examples.float(), covered | examples
        waiting = {number: examples for number, examples in waiting.items() if number not in taken}
        yield Part(gradient(list(taken)), taken)
