"""What metrics are: something measured of logits, told of the run before it is used on it.

Users make them with the functions of `intervenable.metrics`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from intervenable.errors import LocationRangeError, MetricError
from intervenable.inputs import RunInputs

Reduce = Literal["mean", "none"]
"""What becomes of the values of the examples: their mean, or nothing."""

Measure = Callable[[Tensor], Tensor]
"""A function of logits `[b, s, V]`."""


@dataclass(frozen=True)
class MetricRun:
    """What a metric may know of the runs it is used on."""

    inputs: RunInputs
    """Inputs of the run that is patched."""

    clean: Callable[[], Tensor]
    """Gives the logits `[b, s, V]` of the unpatched clean run."""

    corrupted: Callable[[], Tensor]
    """Gives the logits `[b, s, V]` of the unpatched corrupted run."""

    clean_inputs: RunInputs | None = None
    """Inputs of the clean run, if its positions are not those of the run that is patched."""

    corrupted_inputs: RunInputs | None = None
    """Inputs of the corrupted run, if its positions are not those of the run that is patched."""


class Metric(ABC):
    """Something measured of logits, which is told of the run before it is used on it.

    Example:
        >>> @dataclass(frozen=True)
        ... class Largest(Metric):
        ...     name = "largest"
        ...     def bound(self, run):
        ...         return lambda logits: logits[:, -1].amax(-1).mean()
        >>> Largest().bound(run=None)(torch.tensor([[[1.0, 3.0]]]))
        tensor(3.)
    """

    name: ClassVar[str]
    """What it is called in results."""

    @abstractmethod
    def bound(self, run: MetricRun) -> Measure:
        """The function of logits `[b, s, V]` for these runs.

        Raises:
            MetricError: it does not fit the run.
        """


@dataclass(frozen=True, kw_only=True)
class _AtPosition(Metric):
    """Measured of the logits at one position of each example."""

    position: int | tuple[int, ...] = -1
    """Which real token's logits are read; one for all examples or one for each."""

    reduce: Reduce = "mean"
    """`mean` over the examples, or `none`."""

    def bound(self, run: MetricRun) -> Measure:
        """The function of logits `[b, s, V]` for these runs."""
        inputs = run.inputs.decoder or run.inputs
        examples = _Examples(
            self.name, inputs.batch, inputs.length, _places(self.position, inputs, self.name)
        )
        values = self._of(examples, run)

        def measure(logits: Tensor) -> Tensor:
            examples.check(logits)
            found = values(logits)
            return found.mean(0) if self.reduce == "mean" else found

        return measure

    @abstractmethod
    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        """The function from logits `[b, s, V]` to the value of each example, `[b]` or `[b, k]`."""


@dataclass(frozen=True)
class _Examples:
    """The examples of a run, and where their logits are read."""

    name: str
    """Of the metric, for messages."""

    batch: int
    """How many there are."""

    length: int
    """Positions of the run."""

    places: Tensor
    """`[b]` tensor positions."""

    def check(self, logits: Tensor) -> None:
        """That these are logits of the run.

        Raises:
            MetricError: they are not.
        """
        if logits.dim() != 3 or logits.shape[0] != self.batch or logits.shape[1] != self.length:
            raise MetricError(
                f"The metric {self.name!r} reads logits [batch, positions, vocabulary] of {self.batch} examples of"
                f" {self.length} positions, as in the inputs, and not of shape {tuple(logits.shape)}. For a model"
                " whose logits are others, give a function of them: metric=lambda logits: ..."
            )

    def each(self, tokens: int | tuple[int, ...]) -> Tensor:
        """`[b]` the token of each."""
        ids = torch.tensor(tokens)
        if ids.dim() == 1 and len(ids) != self.batch:
            raise MetricError(
                f"The metric {self.name!r} has tokens for {len(ids)} examples, and the batch has {self.batch}. Give"
                " one token for all examples, or one for each."
            )
        return ids.expand(self.batch)

    def all_at(self, logits: Tensor) -> Tensor:
        """`[b, V]` the logits at the position, float32 at least."""
        return _wide(logits[torch.arange(self.batch), self.places])

    def reader(self, tokens: Tensor) -> Measure:
        """Reads the logits of tokens `[b, k]` at the position, `[b, k]`, float32 at least."""
        rows, places = torch.arange(self.batch)[:, None], self.places[:, None]
        most = int(tokens.max())

        def read(logits: Tensor) -> Tensor:
            _check_vocabulary(most, logits, self.name)
            return _wide(logits[rows, places, tokens])

        return read

    def picker(self, tokens: Tensor) -> Measure:
        """Reads the numbers of tokens `[b]` out of `[b, V]`."""
        rows, most = torch.arange(self.batch), int(tokens.max())

        def pick(numbers: Tensor) -> Tensor:
            _check_vocabulary(most, numbers, self.name)
            return numbers[rows, tokens]

        return pick


@dataclass(frozen=True, kw_only=True)
class LogitDifference(_AtPosition):
    """`z[answer] - z[other]`; see `logit_difference`."""

    name: ClassVar[str] = "logit_difference"

    answer: int | tuple[int, ...]
    """Token id, or one for each example."""

    other: int | tuple[int, ...]
    """Token id, or one for each example."""

    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        pair = examples.reader(torch.stack([examples.each(self.answer), examples.each(self.other)], -1))

        def values(logits: Tensor) -> Tensor:
            answer, other = pair(logits).unbind(-1)
            return answer - other

        return values


@dataclass(frozen=True, kw_only=True)
class Logits(_AtPosition):
    """The logits of several tokens; see `logits_of`."""

    name: ClassVar[str] = "logits"

    tokens: tuple[int, ...]
    """Token ids."""

    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        return examples.reader(torch.tensor(self.tokens).expand(examples.batch, -1))


@dataclass(frozen=True, kw_only=True)
class _OfAnswer(_AtPosition):
    """Measured of how an answer stands among all tokens."""

    answer: int | tuple[int, ...]
    """Token id, or one for each example."""


class Logit(_OfAnswer):
    """`z[answer]`; see `logit`."""

    name = "logit"

    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        read = examples.reader(examples.each(self.answer)[:, None])
        return lambda logits: read(logits)[:, 0]


class LogProbability(_OfAnswer):
    """`log_softmax(z)[answer]`; see `log_probability`."""

    name = "log_probability"

    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        pick = examples.picker(examples.each(self.answer))
        return lambda logits: pick(examples.all_at(logits).log_softmax(-1))


class Probability(_OfAnswer):
    """`softmax(z)[answer]`; see `probability`."""

    name = "probability"

    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        pick = examples.picker(examples.each(self.answer))
        return lambda logits: pick(examples.all_at(logits).softmax(-1))


class AnswerLoss(_OfAnswer):
    """`-log_softmax(z)[answer]`; see `loss`."""

    name = "loss"

    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        pick = examples.picker(examples.each(self.answer))
        return lambda logits: -pick(examples.all_at(logits).log_softmax(-1))


class Rank(_OfAnswer):
    """How many tokens are above `z[answer]`; see `rank`."""

    name = "rank"

    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        return _ranks(examples, self.answer)


@dataclass(frozen=True, kw_only=True)
class Accuracy(_OfAnswer):
    """Whether fewer than `top` tokens are above `z[answer]`; see `accuracy`."""

    name: ClassVar[str] = "accuracy"

    top: int = 1
    """How many tokens it has to be among."""

    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        ranks = _ranks(examples, self.answer)
        # A step from 1 to 0 between top - 1 and top, in which NaN stays NaN.
        return lambda logits: (self.top - ranks(logits)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class KLDivergence(_AtPosition):
    """`KL(reference || patched)`; see `kl_divergence`."""

    name: ClassVar[str] = "kl_divergence"

    reference: Literal["clean", "corrupted"] | Tensor = "clean"
    """Which run, or its logits `[b, V]`."""

    def _of(self, examples: _Examples, run: MetricRun) -> Measure:
        p = self._reference(examples, run).log_softmax(-1)
        weights, possible = p.exp(), p.exp() > 0

        def values(logits: Tensor) -> Tensor:
            q = examples.all_at(logits).log_softmax(-1)
            if q.shape[-1] != p.shape[-1]:
                raise MetricError(
                    f"The reference of the metric 'kl_divergence' has {p.shape[-1]} logits, and the run"
                    f" {q.shape[-1]}. Give logits [{examples.batch}, {q.shape[-1]}]."
                )
            # What the reference holds impossible adds nothing, where 0 * inf would be no number.
            terms = weights.to(q.device) * (p.to(q.device) - q)
            return terms.where(possible.to(q.device), terms.new_zeros(())).sum(-1)

        return values

    def _reference(self, examples: _Examples, run: MetricRun) -> Tensor:
        """`[b, V]` or `[1, V]` logits."""
        if isinstance(self.reference, Tensor):
            logits = self.reference[None] if self.reference.dim() == 1 else self.reference
        else:
            whole = run.clean() if self.reference == "clean" else run.corrupted()
            inputs = (run.clean_inputs if self.reference == "clean" else run.corrupted_inputs) or run.inputs
            inputs = inputs.decoder or inputs
            positions = self.position
            if inputs.batch == 1 and isinstance(positions, tuple):
                whole, inputs = whole.expand(len(positions), -1, -1), replace(inputs, batch=len(positions))
            there = _Examples(self.name, inputs.batch, inputs.length, _places(positions, inputs, self.name))
            there.check(whole)
            logits = there.all_at(whole)
        if logits.dim() != 2 or logits.shape[0] not in (1, examples.batch):
            raise MetricError(
                f"The reference of the metric 'kl_divergence' has shape {tuple(logits.shape)}. Give logits"
                f" [{examples.batch}, V], a row for each example."
            )
        return _wide(logits.detach())


@dataclass(frozen=True, kw_only=True)
class NextTokenLoss(Metric):
    """Cross entropy of all next tokens; see `loss`."""

    name: ClassVar[str] = "loss"

    reduce: Reduce = "mean"
    """`mean` over all tokens, or `none` for the mean of each example."""

    def bound(self, run: MetricRun) -> Measure:
        """The function of logits `[b, s, V]` for these runs."""
        inputs = run.inputs.decoder or run.inputs
        if inputs.input_ids is None:
            raise MetricError(
                "loss() compares with the next tokens, and the run that is patched was given no token ids. Give them,"
                " or an answer: loss(tokenizer, answer)."
            )
        real = inputs.real_positions or [list(range(inputs.length))] * inputs.batch
        short = [str(row) for row, places in enumerate(real) if len(places) < 2]
        if short:
            raise MetricError(
                f"loss() compares with next tokens, and example {', '.join(short)} has fewer than two real tokens."
            )
        steps = [(row, *step) for row, places in enumerate(real) for step in pairwise(places)]
        rows, places, following = torch.tensor(steps).T
        targets = inputs.input_ids.cpu()[rows, following]
        counts = torch.tensor([len(places) - 1 for places in real])
        examples = _Examples(self.name, inputs.batch, inputs.length, places)
        most = int(targets.max())

        def measure(logits: Tensor) -> Tensor:
            examples.check(logits)
            _check_vocabulary(most, logits, self.name)
            losses = cross_entropy(_wide(logits[rows, places]), targets.to(logits.device), reduction="none")
            if self.reduce == "mean":
                return losses.mean()
            sums = losses.new_zeros(inputs.batch).index_add(0, rows.to(losses.device), losses)
            return sums / counts.to(losses.device)

        return measure


def _ranks(examples: _Examples, answer: int | tuple[int, ...]) -> Measure:
    """The function from logits `[b, s, V]` to how many tokens are above the answer, `[b]`."""
    pick = examples.picker(examples.each(answer))

    def ranks(logits: Tensor) -> Tensor:
        row = examples.all_at(logits)
        above = (row > pick(row)[:, None]).sum(-1).to(row.dtype)
        # Nothing is above NaN, and it is above nothing: 0 / 0 makes no number of such ranks, 0 / 1 leaves others.
        known = (~row.isnan().any(-1)).to(row.dtype)
        return above + torch.zeros_like(known) / known

    return ranks


def _wide(logits: Tensor) -> Tensor:
    """Logits in float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _check_vocabulary(most: int, logits: Tensor, name: str) -> None:
    if most >= logits.shape[-1]:
        raise MetricError(
            f"The metric {name!r} asks for token {most}, which does not exist: the vocabulary has ids 0 to"
            f" {logits.shape[-1] - 1}."
        )


def _places(position: int | tuple[int, ...], inputs: RunInputs, name: str) -> Tensor:
    """`[b]` the tensor position of a real token of each example."""
    wanted = position if isinstance(position, tuple) else (position,) * inputs.batch
    if len(wanted) != inputs.batch:
        raise MetricError(
            f"The metric {name!r} has positions for {len(wanted)} examples, and the batch has {inputs.batch}. Give"
            " one position for all examples, or one for each."
        )
    places = []
    for example, index in enumerate(wanted):
        count = inputs.count(example)
        if not -count <= index < count:
            raise LocationRangeError(
                f"The metric {name!r} reads position {index} of example {example}, which has {count} real tokens:"
                f" positions 0 to {count - 1}, or -{count} to -1 from the end."
            )
        places.append(
            index % count if inputs.real_positions is None else inputs.real_positions[example][index]
        )
    return torch.tensor(places)
