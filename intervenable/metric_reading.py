"""Which logits metrics read, so that no others need to be computed: found out, for any callable.

A metric is shown logits of an unpatched run in which a part is unknown (NaN). If its value stays the same to the bit
and it did not look at what is unknown (`metric_watching`), it does not read that part. In a patched run everything
that no metric reads is NaN again, so that a metric which suddenly reads something else is caught and not believed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from intervenable.errors import MetricError
from intervenable.metric_canvas import Canvas
from intervenable.metric_learning import MOST_TOKENS, Probe, UnpatchedRun
from intervenable.metric_values import Function, as_value, has_nan, plain_value, said
from intervenable.metric_watching import Watch

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
        metrics: Mapping[str, Function],
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
        self._canvas: Canvas | None = None
        positions: set[int] = set()
        tokens: set[int] | None = set() if narrow and shape[2] >= SMALL_VOCABULARY else None
        for probe in probes:
            read_so_far = sorted(positions or set(guess))
            run = UnpatchedRun(self._metrics, shape, probe, read_so_far, self._canvas, learnt=bool(positions))
            for name, value in run.values.items():
                self._in_shape(name, value, "an unpatched run")
            self._choosing |= run.choosing
            self._leaving |= run.leaving
            self._canvas = run.canvas
            positions.update(run.positions)
            if tokens is not None:
                read = run.tokens_read(sorted(tokens))
                tokens = None if read is None or len(tokens | read) > MOST_TOKENS else tokens | read
        self.positions = torch.tensor(sorted(positions))
        self.tokens = None if tokens is None else torch.tensor(sorted(tokens))
        self._all_known = len(positions) == shape[1] and tokens is None
        if self._canvas is not None:
            self._canvas.aim(self.positions, self.tokens)

    def measure(self, logits: Tensor, cell: str) -> dict[str, Tensor]:
        """Each metric's value where the logits that are read are these; the others are NaN to it.

        Args:
            logits: `[b, P, T or V]` at `positions`, for `tokens`.
            cell: What they are of, for messages: `layer 3, pos 2`.

        Raises:
            UnreadError: a metric fails, gives NaN, no number or another shape than before, or looks at logits that
                are not known. It may be for want of these; `measure_whole` tells.
        """
        if self._canvas is None:
            self._canvas = Canvas(self._shape, logits)
            self._canvas.aim(self.positions, self.tokens)
        canvas = self._canvas
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            canvas.write(logits)
            return {name: self._known(name, metric, canvas, cell) for name, metric in self._metrics.items()}

    def measure_whole(self, logits: Tensor, cell: str) -> dict[str, Tensor]:
        """Each metric's value for all logits `[b, s, V]` of a run.

        Raises:
            MetricError: a metric fails, gives NaN, no number, or numbers of another shape than before.
        """
        with torch.no_grad():
            return {
                name: self._in_shape(name, plain_value(metric, logits, name, cell), cell)
                for name, metric in self._metrics.items()
            }

    def _known(self, name: str, metric: Function, canvas: Canvas, cell: str) -> Tensor:
        watch = Watch() if name in self._choosing and not self._all_known else None
        try:
            value = canvas.show(
                lambda shown: as_value(watch.call(metric, shown) if watch else metric(shown), name)
            )
        except Exception as error:
            raise UnreadError(f"The metric {name!r} failed at {cell}: {said(error)}", cell) from error
        if name in self._leaving:
            canvas.renew()
        if value.shape != self.shapes[name] or has_nan(value) or (watch is not None and watch.unknown):
            raise UnreadError(
                f"The metric {name!r} is NaN at {cell}, or reads logits there that it reads in no unpatched run.",
                cell,
            )
        return value

    def _in_shape(self, name: str, value: Tensor, place: str) -> Tensor:
        before = self.shapes.setdefault(name, value.shape)
        if value.shape != before:
            raise MetricError(
                f"The metric {name!r} gave shape {tuple(value.shape)} for {place}, and {tuple(before)} before. Its"
                " shape has to be the same for every run."
            )
        return value
