"""How sure a mean over examples is: bootstrap intervals, over seeds too, and for the difference of two methods."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from intervenable.errors import ConfigError, MetricError

SAMPLES = 2000
"""Resamples of a bootstrap by default."""
AT_ONCE = 1 << 20
"""Numbers that are drawn at a time."""


class Interval(NamedTuple):
    """Where a mean lies with some confidence."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A mean, and where it lies with some confidence.

    Example:
        >>> print(Estimate(0.931, 0.876, 0.968))
        0.93 [0.88, 0.97]
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        value, low, high = (_rounded(number) for number in self)
        return f"{value} [{low}, {high}]"

    @classmethod
    def of(cls, per_example: Tensor, confidence: float = 0.95, seed: int = 0) -> Estimate:
        """The mean over `(examples,)` or `(seeds, examples)` with its `bootstrap_interval`."""
        mean = per_example.double().mean().item()
        return cls(mean, *bootstrap_interval(per_example, confidence, seed))

    @classmethod
    def of_difference(
        cls, first: Tensor, second: Tensor, confidence: float = 0.95, seed: int = 0
    ) -> Estimate:
        """The mean of `first - second` with its `bootstrap_difference`."""
        mean = first.double().mean().item() - second.double().mean().item()
        return cls(mean, *bootstrap_difference(first, second, confidence, seed))


def bootstrap_interval(
    per_example: Tensor, confidence: float = 0.95, seed: int = 0, samples: int = SAMPLES
) -> Interval:
    """Where the mean over examples lies: a percentile bootstrap, for zeros and ones never narrower than Wilson's.

    Examples are drawn with replacement `samples` times, and the interval holds the central share `confidence` of the
    means. With several seeds these are drawn too, independently of the examples, which all seeds share. Of zeros and
    ones that are all equal every resample is equal too, and the bootstrap would be sure after three examples;
    the score interval of as many examples is not, so the two are joined: 60 right of 60 give 0.94 to 1.

    Efron (1979), "Bootstrap Methods: Another Look at the Jackknife"; for seeds Owen (2007), "The Pigeonhole
    Bootstrap", https://doi.org/10.1214/07-AOAS122; Wilson (1927), "Probable Inference, the Law of Succession, and
    Statistical Inference", which Brown, Cai and DasGupta (2001) recommend, https://doi.org/10.1214/ss/1009213286.

    Args:
        per_example: What each example gave, such as 1 where it was right and 0 where it was not.
        confidence: Between 0 and 1.
        seed: Of the draws. The same values give the same interval, in whatever order the examples are.
        samples: How many draws.

    Shape:
        per_example: `(examples,)` or `(seeds, examples)`.

    Raises:
        MetricError: no examples, another shape, or values that are no numbers.
        ConfigError: `confidence` or `samples` out of range.

    Example:
        >>> low, high = bootstrap_interval(torch.tensor([1.0] * 54 + [0.0] * 6))
        >>> f"{low:.2f} to {high:.2f}"
        '0.80 to 0.97'
        >>> low, high = bootstrap_interval(torch.ones(60))
        >>> f"{low:.2f} to {high:.2f}"
        '0.94 to 1.00'
    """
    values = _checked(per_example, "per_example")
    low, high = _percentiles(_resampled_means(values, seed, samples), confidence)
    if _is_binary(values):
        mean = values.mean().item()
        score = wilson_interval(mean, values.shape[1], confidence)
        low, high = min(low, score.low), max(high, score.high)
    return Interval(low, high)


def bootstrap_difference(
    first: Tensor, second: Tensor, confidence: float = 0.95, seed: int = 0, samples: int = SAMPLES
) -> Interval:
    """Where the mean of `first - second` lies, both measured on the same examples.

    Pairs are drawn, so that what makes an example hard for both does not count. Where one has several seeds and the
    other one, the one is held against each. As in `bootstrap_interval` the result is joined with the score interval
    where all values are zeros and ones: that of Newcombe for paired proportions (1998, "Improved Confidence Intervals
    for the Difference Between Binomial Proportions Based on Paired Data", method 10).

    Shape:
        first, second: `(examples,)` or `(seeds, examples)`, of equally many examples.

    Raises:
        MetricError: no examples, values that are no numbers, or shapes that do not fit each other.
        ConfigError: `confidence` or `samples` out of range.

    Example:
        >>> low, high = bootstrap_difference(torch.tensor([1.0] * 40), torch.tensor([1.0] * 20 + [0.0] * 20))
        >>> f"{low:.2f} to {high:.2f}"
        '0.33 to 0.65'
    """
    one, other = _checked(first, "first"), _checked(second, "second")
    if one.shape[1] != other.shape[1]:
        raise MetricError(
            f"first has {one.shape[1]} examples and second {other.shape[1]}. A paired difference needs both for the"
            " same examples."
        )
    if one.shape[0] != other.shape[0] and 1 not in (one.shape[0], other.shape[0]):
        raise MetricError(
            f"first has {one.shape[0]} seeds and second {other.shape[0]}. Give equally many, or one of either."
        )
    low, high = _percentiles(_resampled_means(one - other, seed, samples), confidence)
    if _is_binary(one) and _is_binary(other):
        score = _paired_score_interval(one, other, confidence)
        low, high = min(low, score.low), max(high, score.high)
    return Interval(low, high)


def _rounded(number: float) -> str:
    text = f"{number:.2f}"
    return text if text.strip("-0.") else text.lstrip("-")


def wilson_interval(share: float, count: int, confidence: float = 0.95) -> Interval:
    """The score interval of a share of `count` examples, which has a width at 0 and 1 too.

    `(p + z^2 / 2n ± z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`

    Raises:
        ConfigError: `confidence` out of range.

    Example:
        >>> low, high = wilson_interval(1.0, 60)
        >>> f"{low:.3f} to {high:.3f}"
        '0.940 to 1.000'
    """
    _check_confidence(confidence)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = share + z**2 / (2 * count)
    reach = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    scale = 1 + z**2 / count
    return Interval(
        max(0.0, min(share, (centre - reach) / scale)), min(1.0, max(share, (centre + reach) / scale))
    )


def _paired_score_interval(first: Tensor, second: Tensor, confidence: float) -> Interval:
    one, other = (values.mean().item() for values in (first, second))
    count = first.shape[1]
    (low, high), (other_low, other_high) = (
        wilson_interval(share, count, confidence) for share in (one, other)
    )
    spread = (one * (1 - one) * other * (1 - other)) ** 0.5
    both = (first * second).mean().item()
    correlation = (both - one * other) / spread if spread > 0 else 0.0

    def reach(own: float, others: float) -> float:
        return float(max(0.0, own**2 - 2 * correlation * own * others + others**2) ** 0.5)

    difference = one - other
    return Interval(
        max(-1.0, difference - reach(one - low, other_high - other)),
        min(1.0, difference + reach(high - one, other - other_low)),
    )


def _resampled_means(values: Tensor, seed: int, samples: int) -> Tensor:
    """`[samples]` means over examples, and seeds, drawn with replacement."""
    if samples < 1:
        raise ConfigError(f"samples={samples!r}: give a whole number from 1 on, such as {SAMPLES}.")
    seeds, examples = values.shape
    if seeds == 1:
        values = values.sort(dim=1).values  # in whatever order the examples came
    drawing = (seed, samples, seeds, examples)
    draws = _few_draws(*drawing) if samples * examples <= AT_ONCE else _draws(*drawing)
    return torch.cat([(rows @ values * drawn).sum(1) for rows, drawn in draws]) / (seeds * examples)


def _draws(seed: int, samples: int, seeds: int, examples: int) -> Iterator[tuple[Tensor, Tensor]]:
    """How often each seed `[n, seeds]` and each example `[n, examples]` was drawn, for `n` samples at a time."""
    generator = torch.Generator().manual_seed(seed)
    step = max(1, AT_ONCE // examples)
    for start in range(0, samples, step):
        size = min(step, samples - start)
        drawn = _counts(size, examples, generator)
        yield _counts(size, seeds, generator) if seeds > 1 else torch.ones_like(drawn[:, :1]), drawn


@lru_cache(maxsize=4)
def _few_draws(*drawing: int) -> list[tuple[Tensor, Tensor]]:
    """The same, kept for the next of many cells."""
    return list(_draws(*drawing))


def _counts(samples: int, among: int, generator: torch.Generator) -> Tensor:
    """`[samples, among]` how often each was drawn."""
    drawn = torch.randint(among, (samples, among), generator=generator)
    counts = torch.zeros(samples, among, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def _percentiles(means: Tensor, confidence: float) -> Interval:
    _check_confidence(confidence)
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64)
    low, high = torch.quantile(means, ends).tolist()
    return Interval(low, high)


def _checked(values: Tensor, name: str) -> Tensor:
    """`[seeds, examples]` in float64."""
    values = torch.as_tensor(values).detach().to(device="cpu", dtype=torch.float64)
    shape = tuple(values.shape)
    if values.dim() not in (1, 2) or 0 in shape:
        raise MetricError(
            f"{name} has the shape {shape}. Give a value for each example: [examples] or [seeds, examples]."
        )
    if not bool(values.isfinite().all()):
        wrong = values[~values.isfinite()]
        raise MetricError(
            f"{name} has {len(wrong)} value(s) that are no numbers, the first {wrong[0].item()}: there is no interval"
            " of them."
        )
    return values.reshape(-1, shape[-1])


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence={confidence!r}: give a number between 0 and 1, such as 0.95.")


def _is_binary(values: Tensor) -> bool:
    return bool(((values == 0) | (values == 1)).all())
