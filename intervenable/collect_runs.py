"""One run of a model that keeps what passes at the places asked for, and, if asked for, gradients there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.cache import ActivationCache, Key
from intervenable.cache_layout import BATCH, HEAD, POSITION, Layout, TokenAxis, axes_of
from intervenable.collect_requests import (
    INPUT_IDS,
    Located,
    Reading,
    Where,
    axes_over_tokens,
    units_of,
    whole_axis,
)
from intervenable.errors import InputError, LocationError, NotFiredError
from intervenable.hooks import EarlyStop, Hook
from intervenable.mixer_state import with_cache
from intervenable.passage import Passage
from intervenable.plan import Plan
from intervenable.runs import Observers, gather_added, run_base, run_source, without_cache
from intervenable.sites import hook_at
from model_maps import Stack

METRIC = "metric"
"""What the value of a metric is called in a cache."""
GRADIENT = ".gradient"
"""How the name of a gradient ends."""


def kept(value: Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> Tensor:
    """A copy that shares no memory with the model's."""
    dtype = dtype if value.is_floating_point() else None
    return (
        value.detach().to(device=device or value.device, dtype=dtype or value.dtype, copy=True).contiguous()
    )


@dataclass
class _Seen:
    """What one reading has found."""

    value: Tensor | None = None
    gradient: list[Tensor] = field(default_factory=list)


class CollectingRun:
    """One run of the model, and what it is to leave behind.

    Args:
        model: The wrapped model.
        wanted: What to read.
        plan: The inputs, and what interventions do in the run.
        before: Whether to see what the edits at a place find, and not what they leave.
        metric: What to take the gradient of, if anything.
        keep: Makes of a value the copy that is kept.
    """

    def __init__(
        self,
        model: nn.Module,
        wanted: Sequence[Reading],
        plan: Plan,
        *,
        before: bool,
        metric: Callable[[Any], Tensor] | None,
        keep: Callable[[Tensor], Tensor],
    ) -> None:
        self.model = model
        self.wanted = wanted
        self.plan = plan
        self.inputs = plan.base
        self.before = before
        self.metric = metric
        self.keep = keep
        self.seen = [_Seen() for _ in wanted]
        self._anchor = torch.zeros((), requires_grad=True)
        self._located: dict[tuple[str, Stack | None], Located | None] = {}
        self._tokens: dict[tuple[str, Stack | None, int], TokenAxis] = {}

    def locate(self, where: Where, read: Any, ids: bool) -> None:
        """Find the tokens that are asked for, in each stack that is read from.

        Args:
            where: What was asked for.
            read: Reads locations.
            ids: Whether the token ids are wanted too.
        """
        axes = {axis for reading in self.wanted for axis in axes_over_tokens(reading.site)}
        axes |= {(POSITION, None)} if ids else set()
        unused = [name for name in where.given if name not in {axis for axis, _ in axes}]
        if unused:
            raise LocationError(
                "positions say nothing of attention matrices: give queries and keys."
                if unused == [POSITION]
                else "queries and keys are for attention matrices, and none is asked for: give positions."
            )
        for axis, stack in axes:
            self._located[axis, stack] = where.located(axis, self.inputs.of(stack), read)

    def collected(self, ids: bool, info: Mapping[str, Any]) -> ActivationCache:
        """Run the model and hand over what was asked for, with the token ids if they are wanted too."""
        values: dict[Key, Tensor] = {}
        layouts: dict[Key, Layout] = {}
        if ids:
            values[INPUT_IDS, None] = self.keep(self._ids())
            layouts[INPUT_IDS, None] = self._layout(INPUT_IDS, values[INPUT_IDS, None], None)
        if self.wanted:
            numbers = self._run()
            if numbers is not None:
                values[METRIC, None], layouts[METRIC, None] = self.keep(numbers), Layout((BATCH,))
        for reading, seen in zip(self.wanted, self.seen, strict=True):
            component, layer = reading.key
            assert seen.value is not None
            layout = self._layout(component, seen.value, reading)
            values[reading.key], layouts[reading.key] = _without_filler(seen.value, layout), layout
            if self.metric is not None:
                key = (f"{component}{GRADIENT}", layer)
                gradient = seen.gradient[0] if seen.gradient else torch.zeros_like(seen.value)
                values[key], layouts[key] = _without_filler(gradient, layout), layout
        return ActivationCache(values, layouts, info)

    def _run(self) -> Tensor | None:
        """Let the model run, and backward from the metric; returns its value for each example."""
        sites = [reading.site for reading in self.wanted]
        stop = EarlyStop(self.model, [site.path for site in sites]) if self.metric is None else None
        added, gathering = gather_added(sites, self.inputs)
        hooks = [self._hook(number, added, stop) for number in range(len(sites))]
        observers = Observers(hooks if self.before else (), () if self.before else hooks, gathering, stop)
        sources: dict[int, Tensor] = {}
        with torch.no_grad():
            for run in self.plan.source_runs:
                sources |= run_source(self.model, run.inputs, run.captures)
        with torch.set_grad_enabled(self.metric is not None):
            options = without_cache(self.model, self.inputs)
            if any(site.kind == "state" for site in sites):
                options = with_cache(self.model, self.inputs.kwargs)
            output = run_base(self.model, self.plan, sources, options, observers).output
            missing = [
                reading.site.label
                for reading, seen in zip(self.wanted, self.seen, strict=True)
                if seen.value is None
            ]
            if missing:
                raise NotFiredError(f"The run did not reach the place of {', '.join(missing)}.")
            return None if self.metric is None else self._backward(self.metric(output))

    def _hook(self, number: int, added: Mapping[int, Tensor], stop: EarlyStop | None) -> Hook:
        site, seen = self.wanted[number].site, self.seen[number]
        units = units_of(self.wanted[number], self._located, self.inputs)

        def act(passage: Passage) -> None:
            if seen.value is not None:
                return
            index = site.index(units, self.inputs, passage.take(site.side, site.slot).device)
            value = site.read(passage, index, self.inputs, added.get(id(site)))
            seen.value = self.keep(value)  # the model may go on working in its memory
            if self.metric is not None and not value.is_floating_point():
                raise InputError(
                    f"{site.label} has whole numbers, which have no gradient. Collect it in a call of its own."
                )
            if self.metric is not None:
                probed: Tensor = _Probe.apply(value, self._anchor, partial(self._keep_gradient, seen))  # type: ignore[no-untyped-call]
                site.write(passage, index, self.inputs, value, probed)
            if stop is not None and all(one.value is not None for one in self.seen):
                stop.request(site.path)

        return hook_at(site, act, writes=self.metric is not None)

    def _keep_gradient(self, seen: _Seen, gradient: Tensor) -> None:
        seen.gradient.append(self.keep(gradient))

    def _backward(self, numbers: Any) -> Tensor:
        """The gradient of the sum over examples, which is that of each example in its own entries."""
        batch = self.inputs.batch
        if not isinstance(numbers, Tensor) or numbers.shape not in ((batch,), *([()] if batch == 1 else [])):
            got = (
                f"shape {tuple(numbers.shape)}"
                if isinstance(numbers, Tensor)
                else f"a {type(numbers).__name__}"
            )
            raise InputError(
                f"The metric of gradients_of returned {got}; return a tensor with one number for each of the {batch}"
                " example(s)."
            )
        if not numbers.requires_grad:
            raise InputError(
                "The metric of gradients_of returned numbers without a gradient: compute them from the model's"
                " output, without detach(), item() or no_grad()."
            )
        torch.autograd.grad(numbers.sum(), self._anchor, allow_unused=True)
        return numbers.detach().reshape(batch)

    # -- what axes are

    def _ids(self) -> Tensor:
        ids = self.inputs.input_ids
        if ids is None:
            raise InputError("'input_ids' was asked for, and the inputs have none.")
        located = self._located[POSITION, None]
        if located is None:
            return ids
        rows = located.rows
        width = max(map(len, rows))
        index = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows], device=ids.device)
        found = ids.gather(1, index)
        return _without_filler(found, self._layout(INPUT_IDS, found, None))

    def _layout(self, component: str, value: Tensor, reading: Reading | None) -> Layout:
        axes = axes_of(component, value.dim())
        stacks: dict[str, Stack | None] = {POSITION: None}
        if reading is not None:
            stacks = dict(axes_over_tokens(reading.site))
        tokens = {
            name: self._axis(name, stacks[name], value.shape[axis])
            for axis, name in enumerate(axes)
            if name in stacks and value.shape[0] == self.inputs.of(stacks[name]).batch
        }
        return Layout(axes, tokens, reading.heads if reading is not None and HEAD in axes else None)

    def _axis(self, name: str, stack: Stack | None, size: int) -> TokenAxis:
        """The tokens along an axis; one object for all activations, so that it is kept once."""
        if (name, stack, size) not in self._tokens:
            located, inputs = self._located[name, stack], self.inputs.of(stack)
            self._tokens[name, stack, size] = (
                whole_axis(inputs, size) if located is None else located.tokens(inputs)
            )
        return self._tokens[name, stack, size]


def _without_filler(value: Tensor, layout: Layout) -> Tensor:
    """Zeros where an example has fewer units than others; padding that was asked for as it is."""
    for name, tokens in layout.tokens.items():
        if tokens.groups is None or not tokens.filled:  # not located, or all are units
            continue
        at = layout.axes.index(name)
        shape = [1] * value.dim()
        shape[0], shape[at] = tokens.positions.shape
        value = torch.where(tokens.real.view(shape).to(value.device), value, torch.zeros_like(value))
    return value


class _Probe(torch.autograd.Function):
    """The identity, which keeps the gradient that comes back through it.

    The anchor makes backward come here, whether or not anything below requires gradients.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, tell: Callable[[Tensor], None]) -> Tensor:
        ctx.tell = tell
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.tell(gradients[0])
        return gradients[0], torch.zeros(()), None
