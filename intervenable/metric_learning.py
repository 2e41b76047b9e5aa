"""What one unpatched run teaches about which logits metrics read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from intervenable.metric_canvas import Canvas
from intervenable.metric_values import Function, as_value, has_nan, plain_value
from intervenable.metric_watching import Watch

Probe = Callable[[Tensor | None], Tensor]
"""Gives logits `[b, P, V]` of a run at tensor positions, or at all of them (None)."""

Place = tuple[slice, slice, slice | Tensor]
"""An index of logits `[b, s, V]`."""

MOST_TOKENS = 256
"""With more tokens than this nothing is gained over all of the vocabulary."""


class UnpatchedRun:
    """What one unpatched run teaches about which logits metrics read.

    Args:
        metrics: Functions of logits `[b, s, V]`, by name.
        shape: `(b, s, V)`.
        probe: Gives the run's logits.
        guess: Positions that are probably all that is read.
        canvas: To show logits on, if there is one already.
        learnt: Whether other runs have taught that all of the guess is read, so that it need not be asked of it.

    Raises:
        MetricError: a metric fails, gives no number, or gives NaN.

    Example:
        >>> logits = torch.arange(12.0).view(1, 3, 4)
        >>> probe = lambda at: logits if at is None else logits[:, at]
        >>> run = UnpatchedRun({"metric": lambda z: z[0, 1, 2] + z[0, 2, 2]}, (1, 3, 4), probe, [2])
        >>> run.positions, run.tokens_read()
        ([1, 2], {2})
    """

    positions: list[int]
    """Sorted positions that are read, in this run or in those that taught the guess; at least one."""

    values: dict[str, Tensor]
    """Each metric's value."""

    choosing: set[str]
    """Metrics whose reading may depend on what they have read."""

    leaving: set[str]
    """Metrics that take logits out of torch: they may keep or change them unseen."""

    canvas: Canvas
    """What metrics are shown."""

    def __init__(
        self,
        metrics: Mapping[str, Function],
        shape: tuple[int, int, int],
        probe: Probe,
        guess: Sequence[int],
        canvas: Canvas | None = None,
        *,
        learnt: bool = False,
    ) -> None:
        self._metrics, self._shape, self._vocabulary = metrics, shape, range(shape[2])
        self.values, self.choosing, self.leaving = {}, set(), set()
        everywhere = range(shape[1])
        rest = [position for position in everywhere if position not in guess]
        if rest:
            known = probe(torch.tensor(guess))
            canvas = canvas or Canvas(shape, known)
            if self._sees(known, guess, canvas) and not self._changes(rest, self._vocabulary, thorough=True):
                self.positions = list(guess) if learnt else self._positions_read(guess)
                return
        whole = probe(None)
        settled = self._sees(whole, everywhere, canvas or Canvas(shape, whole))
        self.positions = self._positions_read(everywhere) if settled else list(everywhere)

    def tokens_read(self, found: Sequence[int] = ()) -> set[int] | None:
        """Tokens that are read at the positions, at least one; None for all of the vocabulary.

        Args:
            found: Tokens that other runs have taught are read. If nothing beside them is, it is them.
        """
        if not self._settled:
            return None
        found = found or self._suspects()
        if found and not self._changes(self.positions, self._vocabulary, but=found, thorough=True):
            return set(found)

        def changes(tokens: Sequence[int]) -> bool:
            return self._changes(self.positions, tokens)

        read = None if _seem_many(self._vocabulary, changes) else _members(self._vocabulary, changes)
        if read is None:
            return None
        read = read or [0]
        return None if self._changes(self.positions, self._vocabulary, but=read, thorough=True) else set(read)

    def _suspects(self) -> list[int]:
        """Tokens on which gradients say that the values depend; none where they say nothing, or name many.

        It may be too few of them: what only compares has no gradient.
        """
        found: set[int] = set()
        for metric in self._metrics.values():
            logits = self.canvas.tensor.detach().clone().requires_grad_()
            gradient = None
            with torch.enable_grad(), suppress(Exception):  # as in `_ask`: it may fail for what is unknown
                value = metric(logits)
                (gradient,) = torch.autograd.grad(value.sum(), logits, allow_unused=True)
            if gradient is None:
                return []
            found.update((gradient != 0).flatten(0, 1).any(0).nonzero().flatten().tolist())
        return sorted(found) if len(found) <= MOST_TOKENS else []

    def _positions_read(self, among: Sequence[int]) -> list[int]:
        """Those of some positions, beside which none is read, that are read; at least one."""
        if len(among) == 1:
            return list(among)
        found = _members(among, lambda some: self._changes(some, self._vocabulary), len(among)) or []
        read = sorted(found) or [among[-1]]
        rest = [position for position in among if position not in read]
        return list(among) if rest and self._changes(rest, self._vocabulary, thorough=True) else read

    def _sees(self, known: Tensor, positions: Sequence[int], canvas: Canvas) -> bool:
        """Take logits `[b, P, V]` at positions. False if what metrics read cannot be found out of them."""
        self._known, self._rows = known, {position: row for row, position in enumerate(positions)}
        self.canvas = canvas
        canvas.aim(torch.tensor(positions))
        canvas.write(known)
        self._settled = True
        for name, metric in self._metrics.items():
            value, watch = self._ask(name)
            if value is None or watch.unknown or has_nan(value):
                self._settled = False
                if len(positions) < self._shape[1]:
                    return False
                with torch.no_grad():
                    value = plain_value(metric, known, name, "an unpatched run")
            self.values[name] = value
            self.choosing |= {name} if watch.depends else set()
            self.leaving |= {name} if watch.leaves else set()
        return self._settled

    def _told(self, name: str) -> Tensor | None:
        """What a metric gives for what is on the canvas, where nothing is unknown; None if it fails."""
        metric, value = self._metrics[name], None
        with torch.no_grad(), suppress(Exception):
            value = self.canvas.show(lambda logits: as_value(metric(logits), name))
        if name in self.leaving:
            self.canvas.renew()
        return value

    def _ask(self, name: str) -> tuple[Tensor | None, Watch]:
        """What a metric gives for what is on the canvas, and what it looks at; None if it fails."""
        metric, watch = self._metrics[name], Watch()
        value: Tensor | None = None
        # It may fail for NaN, or for being watched. If it does not, it fails again where everything is known.
        with torch.no_grad(), suppress(Exception):
            value = self.canvas.show(lambda logits: as_value(watch.call(metric, logits), name))
        if watch.leaves:
            self.canvas.renew()
        return value, watch

    def _changes(
        self,
        positions: Sequence[int],
        tokens: Sequence[int],
        *,
        but: Sequence[int] = (),
        thorough: bool = False,
    ) -> bool:
        """Whether any value depends on logits, or might.

        Args:
            positions: Positions of theirs.
            tokens: Their tokens there.
            but: Tokens that are left out.
            thorough: Do not only make them unknown; try large numbers of both signs too.
        """
        large = min(1e30, torch.finfo(self._known.dtype).max / 4)
        hidden, shown = self._places(positions, tokens), self._places(positions, but)
        rest_is_known = tokens == self._vocabulary and len({*positions, *self._rows}) == self._shape[1]

        def differs(name: str, fill: float) -> bool:
            for place, _ in hidden:
                self.canvas.tensor[place] = fill
            for place, source in shown:
                self.canvas.tensor[place] = source
            if rest_is_known and fill == fill:
                value, unknown = self._told(name), False
            else:
                value, watch = self._ask(name)
                unknown = watch.unknown
            return value is None or unknown or not torch.equal(value, self.values[name])

        fills = (torch.nan, large, -large) if thorough else (torch.nan,)
        changed = any(differs(name, fill) for fill in fills for name in self._metrics)
        for place, source in hidden:
            self.canvas.tensor[place] = source
        return changed

    def _places(self, positions: Sequence[int], tokens: Sequence[int]) -> list[tuple[Place, Tensor | float]]:
        """Where these tokens at these positions are on the canvas, piece by piece, and what is written there."""
        if not tokens:
            return []
        which = slice(tokens.start, tokens.stop) if isinstance(tokens, range) else torch.tensor(tokens)
        places: list[tuple[Place, Tensor | float]] = []
        for run in _neighbours(positions):
            row = self._rows.get(run.start)
            known = torch.nan if row is None else self._known[:, row : row + run.stop - run.start, which]
            places.append(((slice(None), run, which), known))
        return places


def _neighbours(positions: Sequence[int]) -> list[slice]:
    """Sorted positions as slices, which are written faster than single ones."""
    cuts = [index for index in range(1, len(positions)) if positions[index] != positions[index - 1] + 1]
    parts = zip([0, *cuts], [*cuts, len(positions)], strict=True)
    return [slice(positions[start], positions[end - 1] + 1) for start, end in parts]


def _members(
    among: Sequence[int], changes: Callable[[Sequence[int]], bool], most: int = MOST_TOKENS
) -> list[int] | None:
    """Those that change something, found by halves; None if they are more than `most`."""
    parts, found = [among] if changes(among) else [], list[int]()
    while parts:
        halves: list[Sequence[int]] = []
        for part in parts:
            if len(part) == 1:
                found.append(part[0])
                continue
            left, right = part[: len(part) // 2], part[len(part) // 2 :]
            in_left = changes(left)
            halves += [left] * in_left
            # What changes with the whole and not with its left half has something in its right half.
            halves += [right] * (not in_left or changes(right))
        parts = halves
        if len(found) + len(parts) > most:
            return None
    return found


def _seem_many(among: Sequence[int], changes: Callable[[Sequence[int]], bool]) -> bool:
    """Whether half of some, spread evenly, change something by themselves: then to search would take long."""
    some = among[len(among) // 32 :: max(len(among) // 16, 1)]
    if not changes(list(some)):
        return False
    return sum(changes([one]) for one in some) > len(some) // 2
