"""Which logits metrics read, so that no others need to be computed: found out, for any callable.

A metric is shown logits of an unpatched run in which a part is unknown (NaN). If its value stays the same to the bit
and it did not look at what is unknown (`metric_watching`), it does not read that part. In a patched run everything
that no metric reads is NaN again, so that a metric which suddenly reads something else is caught and not believed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from intervenable.errors import IntervenableError, MetricError
from intervenable.metric_canvas import Canvas
from intervenable.metric_values import as_value, has_nan
from intervenable.metric_watching import Watch

Metric = Callable[[Tensor], Any]
"""A function of logits `[b, s, V]`."""

Probe = Callable[[Tensor | None], Tensor]
"""Gives logits `[b, P, V]` of a run at tensor positions, or at all of them (None)."""

MOST_TOKENS = 256
"""With more tokens than this nothing is gained over all of the vocabulary."""

SMALL_VOCABULARY = 2048
"""Of a vocabulary smaller than this it is not worth asking which tokens are read."""


class UnreadError(MetricError):
    """A metric read logits that it did not read before, and that were not computed: they are needed after all."""

    def __init__(self, message: str, cell: str) -> None:
        super().__init__(message)
        self.cell = cell
        """The cell that it happened in."""


class MetricReader:
    """Finds out which logits metrics read, and measures runs of which only these are known.

    Args:
        metrics: Functions of logits `[b, s, V]`, by name.
        shape: `(b, s, V)`.
        probes: Each gives logits `[b, P, V]` of an unpatched run at tensor positions, or at all of them (None).
        guess: Tensor positions that are probably all that is read.
        narrow: Whether to ask which tokens are read.

    Raises:
        MetricError: a metric fails, gives no number or NaN for an unpatched run, or another shape for another run.

    Example:
        >>> run = torch.arange(12.0).view(1, 3, 4)
        >>> reader = MetricReader({"difference": lambda z: z[0, -1, 1] - z[0, 0, 2]}, (1, 3, 4),
        ...                       [lambda at: run if at is None else run[:, at]], guess=[2], narrow=False)
        >>> reader.positions, reader.measure(torch.ones(1, 2, 4), "cell 0")
        (tensor([0, 2]), {'difference': tensor(0.)})
    """

    positions: Tensor
    """`[P]` sorted tensor positions that some metric reads; at least one."""

    tokens: Tensor | None
    """`[T]` sorted tokens that some metric reads, at least one; None for all of the vocabulary."""

    shapes: dict[str, torch.Size]
    """The shape of each metric's value."""

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        shape: tuple[int, int, int],
        probes: Sequence[Probe],
        *,
        guess: Sequence[int],
        narrow: bool,
    ) -> None:
        self._metrics = dict(metrics)
        self._shape = shape
        self.shapes = {}
        self._choosing: set[str] = set()
        self._leaving: set[str] = set()
        positions: set[int] = set()
        tokens: set[int] | None = set() if narrow and shape[2] >= SMALL_VOCABULARY else None
        for probe in probes:
            run = _UnpatchedRun(
                self._metrics, shape, probe, sorted(positions) or sorted(guess), bool(positions)
            )
            for name, value in run.values.items():
                self._in_shape(name, value, "an unpatched run")
            self._choosing |= run.choosing
            self._leaving |= run.leaving
            positions.update(run.positions)
            if tokens is not None:
                read = run.tokens_read(sorted(tokens))
                tokens = None if read is None or len(tokens | read) > MOST_TOKENS else tokens | read
        self.positions = torch.tensor(sorted(positions))
        self.tokens = None if tokens is None else torch.tensor(sorted(tokens))
        self._all_known = len(positions) == shape[1] and tokens is None
        self._canvas: Canvas | None = None

    def measure(self, logits: Tensor, cell: str) -> dict[str, Tensor]:
        """Each metric's value where the logits that are read are these; the others are NaN to it.

        Args:
            logits: `[b, P, T or V]` at `positions`, for `tokens`.
            cell: What they are of, for messages: `layer 3, pos 2`.

        Raises:
            UnreadError: a metric fails or gives NaN, or looks at logits that are not known.
            MetricError: a metric gives no number, or numbers of another shape than before.
        """
        if self._canvas is None:
            self._canvas = Canvas(
                lambda: logits.new_full(self._shape, torch.nan), self.positions, self.tokens
            )
        with torch.no_grad():
            self._canvas.write(logits)
            return {
                name: self._known(name, metric, self._canvas, cell) for name, metric in self._metrics.items()
            }

    def measure_whole(self, logits: Tensor, cell: str) -> dict[str, Tensor]:
        """Each metric's value for all logits `[b, s, V]` of a run.

        Raises:
            MetricError: a metric fails, gives NaN, no number, or numbers of another shape than before.
        """
        with torch.no_grad():
            return {
                name: self._in_shape(name, _plain_value(name, metric, logits, cell), cell)
                for name, metric in self._metrics.items()
            }

    def _known(self, name: str, metric: Metric, canvas: Canvas, cell: str) -> Tensor:
        watch = Watch() if name in self._choosing and not self._all_known else None
        try:
            value = canvas.show(lambda shown: as_value(_call(metric, shown, watch), name))
        except MetricError:
            raise
        except Exception as error:  # which NaN may have led it to
            raise UnreadError(f"The metric {name!r} failed at {cell}: {_said(error)}", cell) from error
        if name in self._leaving:
            canvas.renew()
        if has_nan(value) or (watch is not None and watch.unknown):
            raise UnreadError(
                f"The metric {name!r} is NaN at {cell}, or reads logits there that it reads in no unpatched run.",
                cell,
            )
        return self._in_shape(name, value, cell)

    def _in_shape(self, name: str, value: Tensor, place: str) -> Tensor:
        before = self.shapes.setdefault(name, value.shape)
        if value.shape != before:
            raise MetricError(
                f"The metric {name!r} gave shape {tuple(value.shape)} for {place}, and {tuple(before)} before. Its"
                " shape has to be the same for every run."
            )
        return value


class _UnpatchedRun:
    """What one unpatched run teaches about what metrics read."""

    positions: list[int]
    """Positions that are read, in this run or (as far as it was asked for them) in others."""

    values: dict[str, Tensor]
    """Each metric's value."""

    choosing: set[str]
    """Metrics of which what they read may depend on what they have read."""

    leaving: set[str]
    """Metrics that take logits out of torch: they may keep or change them unseen."""

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        shape: tuple[int, int, int],
        probe: Probe,
        guess: list[int],
        learnt: bool,
    ) -> None:
        self._metrics = metrics
        self._vocabulary = range(shape[2])
        self.values, self.choosing, self.leaving = {}, set(), set()
        rest = sorted(set(range(shape[1])) - set(guess))
        self.positions = guess
        if rest:
            known = probe(torch.tensor(guess))
            logits = known.new_full(shape, torch.nan).index_copy_(
                1, torch.tensor(guess, device=known.device), known
            )
            if self._see(logits) and not self._changes(rest, self._vocabulary, thorough=True):
                self.positions = guess if learnt else self._positions_read(guess)
                return
        self._readable = self._see_all(probe(None))
        self.positions = list(range(shape[1]))
        if self._readable:
            self.positions = self._positions_read(self.positions)

    def tokens_read(self, found: Sequence[int]) -> set[int] | None:
        """Tokens that are read at the positions, at least one; None for all of the vocabulary.

        Args:
            found: Tokens that are read in other runs. If no others are read, it is them.
        """
        if not self._readable:
            return None
        if found and not self._changes(self.positions, self._vocabulary, but=found, thorough=True):
            return set(found)

        def changes(tokens: Sequence[int]) -> bool:
            return self._changes(self.positions, tokens)

        read = None if _seem_many(self._vocabulary, changes) else _members(self._vocabulary, changes)
        if read is None:
            return None
        read = read or [0]
        return None if self._changes(self.positions, self._vocabulary, but=read, thorough=True) else set(read)

    def _positions_read(self, among: list[int]) -> list[int]:
        """Those of some positions, beside which none is read, that are read; at least one."""
        if len(among) == 1:
            return among
        found = _members(among, lambda some: self._changes(some, self._vocabulary), len(among)) or []
        read = sorted(found) or among[-1:]
        rest = sorted(set(among) - set(read))
        return among if rest and self._changes(rest, self._vocabulary, thorough=True) else read

    def _see(self, logits: Tensor) -> bool:
        """Take logits of which some are unknown. False if a metric is NaN, fails, or looks at what is unknown."""
        self._logits, self._canvas, self._readable = logits, Canvas(logits.clone), True
        for name, metric in self._metrics.items():
            value, watch = self._ask(name, metric)
            if value is None or watch.unknown or has_nan(value):
                return False
            self._learn(name, value, watch)
        return True

    def _see_all(self, logits: Tensor) -> bool:
        """Take logits that are all known. False if what metrics read cannot be found out."""
        self._logits, self._canvas = logits, Canvas(logits.clone)
        readable = True
        for name, metric in self._metrics.items():
            value, watch = self._ask(name, metric)
            if value is None or watch.unknown or has_nan(value):
                readable = False
                with torch.no_grad():
                    value = _plain_value(name, metric, logits, "an unpatched run")
            self._learn(name, value, watch)
        return readable

    def _learn(self, name: str, value: Tensor, watch: Watch) -> None:
        self.values[name] = value
        if watch.depends:
            self.choosing.add(name)
        if watch.leaves:
            self.leaving.add(name)

    def _ask(self, name: str, metric: Metric) -> tuple[Tensor | None, Watch]:
        """What a metric gives for what the canvas shows, and what it looks at; None if it fails."""
        watch = Watch()
        value: Tensor | None = None
        # What it fails with may come of NaN or of being watched. If it does not, it fails again with all known.
        with torch.no_grad(), suppress(Exception):
            value = self._canvas.show(lambda shown: as_value(_call(metric, shown, watch), name))
        if watch.leaves:
            self._canvas.renew()
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
        at = torch.tensor(positions, device=self._logits.device)
        large = min(1e30, torch.finfo(self._logits.dtype).max / 4)

        def differs(name: str, fill: float) -> bool:
            _fill(self._canvas.tensor, at, tokens, fill)
            if but:
                _copy(self._canvas.tensor, at, but, self._logits)
            value, watch = self._ask(name, self._metrics[name])
            return value is None or watch.unknown or not torch.equal(value, self.values[name])

        fills = (torch.nan, large, -large) if thorough else (torch.nan,)
        changed = any(differs(name, fill) for fill in fills for name in self._metrics)
        _copy(self._canvas.tensor, at, tokens, self._logits)
        return changed


# --- searching -----------------------------------------------------------------------------------------------


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
    some = among[len(among) // 32 :: len(among) // 16]
    if not changes(list(some)):
        return False
    return sum(changes([one]) for one in some) > len(some) // 2


# --- logits --------------------------------------------------------------------------------------------------


def _fill(logits: Tensor, positions: Tensor, tokens: Sequence[int], value: float) -> None:
    """Write one value to positions and tokens of logits `[b, s, V]`."""
    if isinstance(tokens, range):
        logits[..., tokens.start : tokens.stop].index_fill_(1, positions, value)
    else:
        logits[:, positions[:, None], torch.tensor(tokens, device=logits.device)] = value


def _copy(logits: Tensor, positions: Tensor, tokens: Sequence[int], source: Tensor) -> None:
    """Write what others have there to positions and tokens of logits `[b, s, V]`."""
    if isinstance(tokens, range):
        part = slice(tokens.start, tokens.stop)
        logits[..., part].index_copy_(1, positions, source[..., part].index_select(1, positions))
    else:
        at = positions[:, None], torch.tensor(tokens, device=logits.device)
        logits[:, at[0], at[1]] = source[:, at[0], at[1]]


# --- asking --------------------------------------------------------------------------------------------------


def _call(metric: Metric, logits: Tensor, watch: Watch | None) -> Any:
    if watch is None:
        return metric(logits)
    with watch:
        return metric(logits)


def _plain_value(name: str, metric: Metric, logits: Tensor, place: str) -> Tensor:
    """What a metric gives for logits that are all known.

    Raises:
        MetricError: it fails, or gives NaN or no number.
    """
    try:
        value = as_value(metric(logits.detach().clone()), name)
    except IntervenableError:
        raise
    except Exception as error:
        raise MetricError(f"The metric {name!r} failed at {place}: {_said(error)}") from error
    if has_nan(value):
        shown = f" ({value.tolist()})" if 1 < value.numel() < 10 else ""
        some = bool(logits.isnan().any())
        raise MetricError(
            f"The metric {name!r} is NaN at {place}{shown}, where"
            + (" some of the logits are NaN: the model gave them." if some else " all logits are numbers.")
            + ("" if some else " Look at what it divides by, and at infinities that it subtracts.")
        )
    return value


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(".") + "."
