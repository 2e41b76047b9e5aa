"""The residual stream through one block: what is added to it, by which modules, and where it is between."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from intervenable.map_modules import Key, has_matrix, holds, is_convolution, is_norm, key_of
from intervenable.map_trace import Call
from intervenable.map_values import BlockValues, Seen

NEAR = 2e-5
"""Two sides of a sum are equal up to this part of the largest value: float32 is rounded at each step."""

DISTINCT = 1e-3
"""Tensors are sums of one another if their directions come nearer than this to one less."""

MOST = 6
"""Most contributions that one sum is searched for."""

MOST_SUBSETS = 30_000
"""Most sums of so many contributions that are tried."""


@dataclass(frozen=True, eq=False)
class Contribution:
    """One tensor that a block adds to the stream."""

    seen: Seen
    """The last module that returns it, after norm and dropout."""

    scale: float
    """What the model multiplies it with as it adds."""

    core: Seen
    """The module that computes it, before norm and dropout."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A sum: a base, and what is added to it."""

    base: Seen | None
    """The module that returns the base; None: it is the block's input."""

    base_scale: float
    contributions: tuple[Contribution, ...]
    """In the order in which they are computed."""


@dataclass(frozen=True, eq=False)
class Residual:
    """How a block's output is made of its input."""

    stages: tuple[Stage, ...]
    """One sum, or where norms follow the additions, one for each norm."""

    @property
    def contributions(self) -> list[Contribution]:
        """All that is added, in order."""
        return [part for stage in self.stages for part in stage.contributions]


def residual_of(values: BlockValues, entering: Tensor, leaving: Tensor) -> Residual | None:
    """How a block's output is a sum, or sums with norms between; None if it is not.

    Args:
        values: What passed the modules of the block.
        entering: The stream as it enters.
        leaving: The stream as it leaves.
    """
    source, target = key_of(entering), key_of(leaving)
    stages: list[Stage] = []
    for _ in range(6):
        normed = _norm_that_returns(values, target)
        if normed is not None and normed.call.main_input is not None:
            target_value = normed.call.main_input
            stage = _stage(values, target_value, entering, source, before=normed.call.left)
        else:
            before = values.call.left + 1 if target == key_of(leaving) else None
            value = leaving if target == key_of(leaving) else values.returned_like(target)[0].tensor
            stage = _stage(values, value, entering, source, before=before or values.call.left)
        if stage is None:
            return None
        stages.insert(0, stage)
        if stage.base is None:
            return Residual(tuple(stages))
        target = stage.base.key
        if stage.base.call.main_input is not None and key_of(stage.base.call.main_input) == source:
            # The base is the norm of the block's input.
            return Residual(tuple(stages))
    return None


def _norm_that_returns(values: BlockValues, key: Key) -> Seen | None:
    """The norm whose output is a value, if it is a norm's."""
    return next((seen for seen in values.returned_like(key) if is_norm(seen.call)), None)


def _stage(values: BlockValues, target: Tensor, entering: Tensor, source: Key, before: int) -> Stage | None:
    """The fewest contributions that, with a base, sum up to a value."""
    bases: list[Seen | None] = [None]
    for seen in values.returned:
        alike = seen.tensor.numel() == entering.numel() and seen.tensor.shape[-1] == entering.shape[-1]
        if alike and seen.call.left < before and is_norm(seen.call):
            bases.insert(1, seen)
    goal = target.detach().flatten().double()
    found: Stage | None = None
    for base in bases:
        value = entering if base is None else base.tensor
        banned = {source, key_of(target), *(() if base is None else (base.key,))}
        for unread in (True, False):
            candidates = _candidates(values, entering, banned, before, unread)
            stage = _solved(values, goal, value, base, candidates)
            if stage is not None and (found is None or len(stage.contributions) < len(found.contributions)):
                found = stage
            if stage is not None:
                break
        if found is not None and (base is None or found.contributions):
            break
    return found


def _candidates(
    values: BlockValues, entering: Tensor, banned: set[Key], before: int, unread: bool
) -> list[Seen]:
    """Tensors of the stream's size that modules of the block return, each where it is returned last.

    Args:
        values: What passed the modules of the block.
        entering: The stream as it enters.
        banned: Values that are no contributions.
        before: When the sum was there at the latest.
        unread: Whether those are left out that another module of the block is given.
    """
    found: dict[Key, Seen] = {}
    for seen in values.returned:
        if seen.call is values.call or seen.call.left >= before or seen.key in banned:
            continue
        if seen.key in found and seen.call.module in values.repeated:
            continue
        if seen.tensor.numel() != entering.numel() or seen.key[0] != entering.shape[-1]:
            continue
        if seen.tensor.is_floating_point():
            known = found.get(seen.key)
            # A dropout after a module counts, another module that happens to return the same does not.
            if known is None or _follows(seen.call, known.call):
                found[seen.key] = seen
    if not unread:
        return list(found.values())
    return [seen for seen in found.values() if not _is_read(values, seen.key)]


def _follows(call: Call, other: Call) -> bool:
    """Whether a call hands on what another returned: it holds it, or takes it and gives it back."""
    given = call.main_input
    taken = given is not None and other.main_output is not None and key_of(given) == key_of(other.main_output)
    return taken or holds(call, other)


def _is_read(values: BlockValues, key: Key) -> bool:
    """Whether a module is given a value and makes something else of it."""
    return any(
        all(key_of(tensor) != key for tensor in seen.call.outputs.values()) for seen in values.given_like(key)
    )


def _solved(
    values: BlockValues, goal: Tensor, base: Tensor, base_seen: Seen | None, candidates: Sequence[Seen]
) -> Stage | None:
    """The fewest candidates of which, with the base, a value is a linear sum."""
    start = base.detach().flatten().double()
    columns = torch.stack([start, *(seen.tensor.detach().flatten().double() for seen in candidates)])
    gram, wanted = columns @ columns.T, columns @ goal
    total = float(goal @ goal)
    for size in range(MOST + 1):
        subsets = list(itertools.combinations(range(1, len(columns)), size))
        if not subsets or len(subsets) > MOST_SUBSETS:
            break
        index = torch.tensor([(0, *subset) for subset in subsets])
        grams = gram[index[:, :, None], index[:, None, :]]
        scales = grams.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-30)
        grams = grams / scales[:, :, None] / scales[:, None, :] + 1e-13 * torch.eye(size + 1).double()
        right = wanted[index] / scales
        solutions = torch.linalg.solve(grams, right)
        left_over = (total - (solutions * right).sum(-1)) / max(total, 1e-30)
        for at in torch.argsort(left_over)[:8].tolist():
            if left_over[at] > 1e-7:
                break
            stage = _confirmed(values, goal, columns, candidates, index[at].tolist(), base_seen)
            if stage is not None:
                return stage
    return None


def _confirmed(
    values: BlockValues,
    goal: Tensor,
    columns: Tensor,
    candidates: Sequence[Seen],
    index: Sequence[int],
    base: Seen | None,
) -> Stage | None:
    """The sum of these columns if it really gives the value, with all of them in it."""
    chosen = columns[list(index)]
    # Of tensors that are sums of one another there are many sums.
    if float(torch.linalg.svdvals(nn.functional.normalize(chosen, dim=1))[-1]) < DISTINCT:
        return None
    scales = [_plain(scale) for scale in torch.linalg.lstsq(chosen.T, goal[:, None]).solution[:, 0].tolist()]
    summed = torch.tensor(scales).double() @ chosen
    if float((summed - goal).abs().max()) > NEAR * float(goal.abs().max()) or min(map(abs, scales)) < 1e-3:
        return None
    parts = [
        Contribution(candidates[number - 1], scale, core_of(values, candidates[number - 1]))
        for number, scale in zip(index[1:], scales[1:], strict=True)
    ]
    parts.sort(key=lambda part: part.seen.call.left)
    return Stage(base, scales[0], tuple(parts))


def _plain(scale: float) -> float:
    """A factor as a person would have written it, where it is one of these up to rounding."""
    for digits in (0, 1, 2, 3, 4):
        if abs(scale - round(scale, digits)) < 2e-6 * abs(scale):
            return round(scale, digits)
    return scale


# --- modules on the way -----------------------------------------------------------------------------------


def core_of(values: BlockValues, seen: Seen) -> Seen:
    """The module that computes what norms and dropouts then hand on: the outermost that returns just that.

    Args:
        values: What passed the modules of the block.
        seen: The contribution, where it was returned last.
    """
    while True:
        alike = [other for other in values.returned_like(seen.key) if other.call is not values.call]
        holders = [other for other in alike if has_matrix(other.call.module) and not is_norm(other.call)]
        if holders:
            inner = min(holders, key=lambda other: other.call.left)
            found = _outermost(values, inner, holders)
            behind = _convolved(values, found)
            if behind is None:
                return found
            seen = behind
            continue
        first = alike[0] if alike else seen
        before = first.call.main_input
        back = [] if before is None else values.returned_like(key_of(before))
        back = [other for other in back if other.call.left < first.call.entered]
        if not back or not (is_norm(first.call) or not has_matrix(first.call.module)):
            return first
        seen = back[-1]


def _convolved(values: BlockValues, seen: Seen) -> Seen | None:
    """The result that a convolution behind a branch is given, if a module is one."""
    given = seen.call.main_input
    if not is_convolution(seen.call.module) or given is None:
        return None
    makers = [other for other in values.returned_like(key_of(given)) if other.call.left < seen.call.entered]
    return next(
        (other for other in makers if has_matrix(other.call.module) and not is_norm(other.call)), None
    )


def _outermost(values: BlockValues, inner: Seen, holders: Sequence[Seen]) -> Seen:
    """The outermost module around one that returns the same, and is not given the stream before a norm of its own."""
    found = inner
    by_call = {seen.call: seen for seen in holders}
    around = inner.call.parent
    while around is not None and around in by_call:
        given = around.main_input
        if given is not None and any(
            is_norm(child) and child.main_input is not None and key_of(child.main_input) == key_of(given)
            for child in around.children
        ):
            break
        found = by_call[around]
        around = around.parent
    return found


def seen_as(values: BlockValues, wanted: Tensor) -> list[Seen]:
    """Where a value passed a module, up to rounding."""
    goal = wanted.detach().flatten()
    limit = NEAR * float(goal.abs().max())
    return [
        seen
        for seen in (*values.given, *values.returned)
        if seen.tensor.numel() == goal.numel()
        and seen.key[0] == wanted.shape[-1]
        and seen.tensor.is_floating_point()
        and float((seen.tensor.detach().flatten().double() - goal).abs().max()) <= limit
    ]
