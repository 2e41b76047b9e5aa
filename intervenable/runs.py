"""The forward passes: source runs, which stop as soon as they have what they are for, and the base run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.compiled import uncompiled
from intervenable.errors import EditError, ModelMismatchError, NotFiredError
from intervenable.hooks import EarlyStop, Hook, hooked
from intervenable.input_caches import with_own_caches
from intervenable.inputs import RunInputs
from intervenable.padding import with_position_ids
from intervenable.passage import Passage
from intervenable.plan import Capture, Edit, Plan, error_of
from intervenable.signatures import takes
from intervenable.sites import BoundSite, hook_at
from intervenable.unit_index import UnitIndex, broadcasts
from intervenable.units import Units, Whole
from interventions import InterventionError


@dataclass
class Fired:
    """What became of one edit in a base run."""

    times: int = 0
    """How often it was applied."""

    collected: Tensor | None = None
    """What it read, if it collects."""

    norms: Callable[[], Tensor] | None = None
    """Computes the norm of its change; None if it has changed nothing."""

    def change(self, batch: int) -> Tensor:
        """`[batch]` norm of what it changed, all units of an example together."""
        return torch.zeros(batch) if self.norms is None else self.norms()


@dataclass(frozen=True)
class Observers:
    """What looks on in a base run."""

    before: Sequence[Hook] = ()
    """What sees each place as the edits there find it."""

    after: Sequence[Hook] = ()
    """What sees each place as the edits there leave it."""

    gathering: Sequence[Hook] = ()
    """What keeps streams that are read as a part of another."""

    stop: EarlyStop | None = None
    """Ends the run when all has been seen."""


@dataclass
class BaseRun:
    """The outcome of a base run."""

    output: Any
    fired: list[Fired] = field(default_factory=list)


def plain_run(model: nn.Module, inputs: RunInputs, options: Mapping[str, Any]) -> Any:
    """The wrapped model on these inputs, with nothing of ours but the position ids that padding calls for."""
    kwargs = with_own_caches(with_position_ids(inputs, model))
    with uncompiled(model):  # to the bit what it is compared with
        return model(*inputs.args, **kwargs, **with_own_caches(options))


# --- source runs ------------------------------------------------------------------------------------------


def run_source(model: nn.Module, inputs: RunInputs, captures: Sequence[Capture]) -> dict[int, Tensor]:
    """Run one source as far as its captures lie, and keep their units alone.

    Returns:
        The captured units by the index of their representation.

    Raises:
        NotFiredError: a site was not reached.
    """
    found: dict[int, Tensor] = {}
    sites = [what.bound.source_site for what in captures]
    stop = EarlyStop(model, [site.path for site in sites])

    def capture(what: Capture) -> Callable[[Passage], None]:
        site = what.bound.source_site

        def act(passage: Passage) -> None:
            if what.bound.index in found:
                return
            index = site.index(what.units, inputs, _device(passage, site))
            units = site.read(passage, index, inputs, added.get(id(site)))
            # A slice would change with the stream, which some models edit in place later on.
            found[what.bound.index] = units if isinstance(what.units, Units) else units.clone()
            if len(found) == len(captures):
                stop.request(site.path)

        return act

    hooks = [hook_at(site, capture(what)) for site, what in zip(sites, captures, strict=True)]
    added, gathering = gather_added(sites, inputs)
    # Before any hook is there, since it may take runs of the model to tell.
    kwargs = with_own_caches(with_position_ids(inputs, model))
    with stop, hooked([*gathering, *hooks, *stop.hooks], model):
        model(*inputs.args, **kwargs, **without_cache(model, inputs))
    missing = [what.bound.name for what in captures if what.bound.index not in found]
    if missing:
        raise NotFiredError(f"The source run did not reach the place of {', '.join(map(repr, missing))}.")
    return found


def without_cache(model: nn.Module, inputs: RunInputs) -> dict[str, Any]:
    """Options that keep a run which only reads from filling a key-value cache."""
    return {"use_cache": False} if takes(model, "use_cache") and "use_cache" not in inputs.kwargs else {}


def gather_added(sites: Sequence[BoundSite], inputs: RunInputs) -> tuple[dict[int, Tensor], list[Hook]]:
    """Hooks that keep, for each site read as a sum, the stream to add, and where they keep it."""
    streams: dict[int, Tensor] = {}

    def keep(site: BoundSite, plus: BoundSite) -> Callable[[Passage], None]:
        def act(passage: Passage) -> None:
            stream = plus.stream(passage, inputs)
            stream = stream if plus.scale == 1.0 else stream * plus.scale
            streams[id(site)] = stream if plus.plus is None else stream + streams[id(plus)]

        return act

    chained = list(sites)  # what is added may be such a sum itself
    for site in chained:
        if site.plus is not None:
            chained.append(site.plus)
    hooks = [hook_at(site.plus, keep(site, site.plus)) for site in chained if site.plus]
    return streams, hooks


def _device(passage: Passage, site: BoundSite) -> torch.device:
    return passage.take(site.side, site.slot).device


# --- the base run -----------------------------------------------------------------------------------------


def run_base(
    model: nn.Module,
    plan: Plan,
    sources: Mapping[int, Tensor],
    options: Mapping[str, Any],
    observers: Observers | None = None,
    cache: Any = None,
) -> BaseRun:
    """Run the base with all edits of the plan, in declared order where several meet.

    A `cache` of keys and values is given to the model as it is, where one among the options is copied. Where
    observers end the run early there is no output, and edits further on are not applied.

    Raises:
        NotFiredError: an edit was not applied exactly once.
        EditError: an intervention gave back something that does not fit.
    """
    inputs = plan.base
    fired = [Fired() for _ in plan.edits]
    sites = [edit.bound.site for edit in plan.edits]
    added, gathering = gather_added(sites, inputs)

    def edit_hook(edit: Edit, record: Fired) -> Callable[[Passage], None]:
        site = edit.bound.site
        source = sources.get(edit.bound.index) if edit.from_source else edit.constant

        def act(passage: Passage) -> None:
            index = site.index(edit.units, inputs, _device(passage, site))
            old = site.read(passage, index, inputs, added.get(id(site)))
            new = applied(edit, old, _located(source, old, index, passage, edit))
            record.times += not passage.repeated
            if edit.bound.intervention.collects:
                if not passage.repeated:
                    record.collected = new
                return
            new = site.protected(old, new)
            norms = partial(_norm_of_change, old.detach(), new.detach(), index.real)
            # Located units are few, and most receipts are never read; whole activations are not kept for them.
            record.norms = partial(_same_tensor, norms()) if isinstance(edit.units, Whole) else norms
            before = passage.take(site.side, site.slot)
            site.write(passage, index, inputs, old, new)
            if edit.bound.config.renormalize != "none":
                site.renormalize(passage, index, before, edit.bound.config.renormalize == "rows")

        return act

    hooks = [
        hook_at(site, edit_hook(edit, record), writes=not edit.bound.intervention.collects)
        for site, edit, record in zip(sites, plan.edits, fired, strict=True)
    ]
    # What is added is read after the edits at its own place, which are hooked first.
    kwargs = with_own_caches(with_position_ids(inputs, model))
    look = observers or Observers()
    stop = look.stop or EarlyStop(model, ())
    everything = [*look.before, *hooks, *look.after, *gathering, *look.gathering, *stop.hooks]
    output = None
    with stop, hooked(everything, model, recomputed=True) as recomputation:
        given = {} if cache is None else {"past_key_values": cache}
        output = model(*inputs.args, **kwargs, **with_own_caches(options), **given)
        output = recomputation.until_freed(output)
        for record in fired:
            record.collected = recomputation.until_freed(record.collected)
    wrong = [
        f"{edit.bound.name!r} ({edit.bound.site.path or type(model).__name__}) was applied {record.times} times"
        for edit, record in zip(plan.edits, fired, strict=True)
        if record.times != 1 and not (stop.ended and record.times == 0)
    ]
    if wrong:
        raise NotFiredError(f"Each intervention is to be applied once in a run; {'; '.join(wrong)}.")
    return BaseRun(output, [replace(record) for record in fired])  # a recomputation counts on in the others


def _located(
    source: Tensor | None, units: Tensor, index: UnitIndex, passage: Passage, edit: Edit
) -> Tensor | None:
    """A source for the units: of a constant that is given for whole attention matrices, what is at the units."""
    site = edit.bound.site
    if source is None or edit.from_source or not site.matrix or broadcasts(source.shape, units.shape):
        return source
    whole = passage.take(site.side, site.slot)
    return index.read(source.to(whole.device).expand(whole.shape))


def applied(edit: Edit, units: Tensor, source: Tensor | None) -> Tensor:
    """What an intervention makes of its units, in their own layout.

    Shape:
        units, result: `[b, n, d]`, by heads `[b, heads, n, dh]` (a reading may have another last axis).

    Raises:
        EditError: the result does not fit where it belongs.
        ModelMismatchError: the units are not as wide as the config says.
    """
    intervention, site = edit.bound.intervention, edit.bound.site
    if intervention.embed_dim is not None and site.width not in (None, units.shape[-1]):
        raise ModelMismatchError(
            f"{edit.bound.name!r}: {site.label} is {units.shape[-1]} wide, where the model's config says"
            f" {site.width}. Give the model the config that its weights were made with."
        )
    given = units.clone()  # a class of the user's may work in place; what was there must stay what it was
    if source is not None:
        source = source.to(units.device)
        if edit.from_source and source.dim() == units.dim():
            source = source.expand(
                [u if s == 1 else s for u, s in zip(units.shape, source.shape, strict=True)]
            )
    if intervention.sees == "concatenated":
        given = _concatenated(given)
        source = _concatenated(source) if edit.from_source and source is not None else source
    try:
        new: Any = intervention(given, source, edit.subspaces)
    except InterventionError as error:
        raise error_of(error, edit.bound) from error
    if intervention.collects:
        return new  # type: ignore[no-any-return]
    if not isinstance(new, Tensor) or new.shape != given.shape:
        got = f"shape {tuple(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
        raise EditError(
            f"{edit.bound.name!r}: {type(intervention).__name__} returned {got} for units of shape"
            f" {tuple(given.shape)}. Return a tensor of that shape."
        )
    if new.dtype != given.dtype:
        new = new.to(given.dtype)
    return _separated(new, units.shape) if intervention.sees == "concatenated" else new


def _concatenated(units: Tensor) -> Tensor:
    """`[b, n, d]` as `[b, n*d]`; by heads `[b, h, n, dh]` as `[b, n, h*dh]`."""
    return units.flatten(1) if units.dim() == 3 else units.transpose(1, 2).flatten(2)


def _separated(joined: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `_concatenated`."""
    if len(shape) == 3:
        return joined.reshape(shape)
    batch, heads, positions, width = shape
    return joined.reshape(batch, positions, heads, width).transpose(1, 2)


def _norm_of_change(old: Tensor, new: Tensor, real: Tensor | None) -> Tensor:
    change = (new - old).float()
    norms = _norm(change, real)
    if norms.isfinite().all():
        return norms
    return _norm(
        torch.where(new == old, torch.zeros_like(change), change), real
    )  # masked scores: -inf in both


def _norm(change: Tensor, real: Tensor | None) -> Tensor:
    if real is not None:
        mask = real if real.dim() == change.dim() else real[..., None]
        change = torch.where(mask, change, torch.zeros_like(change))
    return change.flatten(1).norm(dim=1) if change.dim() > 1 else change.abs()


def _same_tensor(tensor: Tensor) -> Tensor:
    return tensor
