"""What is measured of a run's logits: how far an answer is ahead, how likely it is, how far from another run.

    iv.patching.sweep(model, clean, corrupted, metric=iv.metrics.logit_difference(tokenizer, " Madrid", " Rome"))

Tokens are ids, or strings if there is a tokenizer; one for all examples, or a list with one for each. Metrics read at
the last real token (`position=-1`) and give the mean over the examples, or one value each with `reduce="none"`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from intervenable.errors import ConfigError
from intervenable.metric_kinds import (
    Accuracy,
    AnswerLoss,
    KLDivergence,
    Logit,
    LogitDifference,
    Logits,
    LogProbability,
    Metric,
    MetricRun,
    NextTokenLoss,
    Probability,
    Rank,
    Reduce,
)
from intervenable.metric_tokens import MetricArguments

__all__ = [
    "Metric",
    "MetricRun",
    "accuracy",
    "as_metrics",
    "kl_divergence",
    "log_probability",
    "logit",
    "logit_difference",
    "logits_of",
    "loss",
    "probability",
    "rank",
]

Token = int | str
"""A token by its id, or by its text if there is a tokenizer."""

Tokens = Token | Sequence[Token] | Tensor
"""A token for all examples, or one for each."""


def logit_difference(
    tokenizer: Any = None,
    answer: Tokens | None = None,
    other: Tokens | None = None,
    *,
    position: int | Sequence[int] = -1,
    reduce: Reduce = "mean",
) -> Metric:
    """How far the logit of an answer is ahead of that of another token: `z[answer] - z[other]`.

    Args:
        tokenizer: Reads tokens that are strings; None if all are ids.
        answer: Token, or one for each example.
        other: Token, or one for each example.
        position: Which real token's logits are read; a list has one for each example.
        reduce: `"mean"` over the examples, or `"none"`: `[b]`.

    Raises:
        ConfigError: a string is not one token, or something is missing.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, _ = load_small_lm()
        >>> logit_difference(tokenizer, " Madrid", " Rome").name
        'logit_difference'
        >>> logit_difference(None, 12, 17)
        LogitDifference(position=-1, reduce='mean', answer=12, other=17)
    """
    read = MetricArguments("logit_difference", tokenizer)
    ids = read.tokens(answer=answer, other=other)
    return LogitDifference(**ids, **read.common(position, reduce))


def logit(
    tokenizer: Any = None,
    answer: Tokens | None = None,
    *,
    position: int | Sequence[int] = -1,
    reduce: Reduce = "mean",
) -> Metric:
    """The logit of an answer: `z[answer]`. For arguments and errors see `logit_difference`.

    Example:
        >>> logit(answer=[3, 5], reduce="none")
        Logit(position=-1, reduce='none', answer=(3, 5))
    """
    read = MetricArguments("logit", tokenizer)
    return Logit(**read.tokens(answer=answer), **read.common(position, reduce))


def logits_of(
    tokenizer: Any = None,
    tokens: Sequence[Token] | Tensor | None = None,
    *,
    position: int | Sequence[int] = -1,
    reduce: Reduce = "mean",
) -> Metric:
    """The logits of `k` tokens, `z[tokens]`: `[k]`, or `[b, k]` with `reduce="none"`.

    For arguments and errors see `logit_difference`.

    Example:
        >>> logits_of(None, [3, 5, 8]).tokens
        (3, 5, 8)
    """
    read = MetricArguments("logits_of", tokenizer)
    ids = read.tokens(tokens=tokens)["tokens"]
    return Logits(tokens=ids if isinstance(ids, tuple) else (ids,), **read.common(position, reduce))


def probability(
    tokenizer: Any = None,
    answer: Tokens | None = None,
    *,
    position: int | Sequence[int] = -1,
    reduce: Reduce = "mean",
) -> Metric:
    """The probability of an answer: `softmax(z)[answer]`. For arguments and errors see `logit_difference`.

    Example:
        >>> probability(None, 7).name
        'probability'
    """
    read = MetricArguments("probability", tokenizer)
    return Probability(**read.tokens(answer=answer), **read.common(position, reduce))


def log_probability(
    tokenizer: Any = None,
    answer: Tokens | None = None,
    *,
    position: int | Sequence[int] = -1,
    reduce: Reduce = "mean",
) -> Metric:
    """The log-probability of an answer: `log_softmax(z)[answer]`. For arguments and errors see `logit_difference`.

    Example:
        >>> log_probability(None, 7).name
        'log_probability'
    """
    read = MetricArguments("log_probability", tokenizer)
    return LogProbability(**read.tokens(answer=answer), **read.common(position, reduce))


def rank(
    tokenizer: Any = None,
    answer: Tokens | None = None,
    *,
    position: int | Sequence[int] = -1,
    reduce: Reduce = "mean",
) -> Metric:
    """How many tokens have a larger logit than an answer: 0 if none has. Equal ones do not count.

    For arguments and errors see `logit_difference`.

    Example:
        >>> rank(None, 7).name
        'rank'
    """
    read = MetricArguments("rank", tokenizer)
    return Rank(**read.tokens(answer=answer), **read.common(position, reduce))


def accuracy(
    tokenizer: Any = None,
    answer: Tokens | None = None,
    *,
    top: int = 1,
    position: int | Sequence[int] = -1,
    reduce: Reduce = "mean",
) -> Metric:
    """1 where the answer has the largest logit, or one of the `top` largest, and 0 elsewhere.

    That is where its `rank` is below `top`. For the other arguments and errors see `logit_difference`.

    Example:
        >>> accuracy(None, 7, top=5).top
        5
    """
    read = MetricArguments("accuracy", tokenizer)
    given: Any = top
    if not isinstance(given, int) or given < 1:
        raise ConfigError(
            f"top={top!r} of accuracy: give how many tokens the answer has to be among, 1 or more."
        )
    return Accuracy(top=top, **read.tokens(answer=answer), **read.common(position, reduce))


def loss(
    tokenizer: Any = None,
    answer: Tokens | None = None,
    *,
    position: int | Sequence[int] = -1,
    reduce: Reduce = "mean",
) -> Metric:
    """The cross entropy of an answer, `-log_softmax(z)[answer]`, or without one that of all next tokens of the input.

    That of all next tokens is the mean over all of them, as in transformers, or (`reduce="none"`) over those of each
    example; padding does not count. For arguments and errors see `logit_difference`.

    Example:
        >>> loss(), loss(answer=7).name
        (NextTokenLoss(reduce='mean'), 'loss')
    """
    read = MetricArguments("loss", tokenizer)
    common = read.common(position, reduce)
    if answer is not None:
        return AnswerLoss(**read.tokens(answer=answer), **common)
    if common.pop("position") != -1:
        raise ConfigError(
            f"position={position!r} of loss: without an answer it is the loss of all next tokens, of which none can"
            " be chosen. Give the answer too."
        )
    return NextTokenLoss(**common)


def kl_divergence(
    reference: Literal["clean", "corrupted"] | Tensor = "clean",
    *,
    position: int | Sequence[int] = -1,
    reduce: Reduce = "mean",
) -> Metric:
    """How far the patched run's next token is from a reference: `KL(reference || patched) = sum p (log p - log q)`.

    Args:
        reference: The unpatched `"clean"` or `"corrupted"` run at the same position, counted in its own real tokens,
            or logits `[b, V]`.
        position: Which real token's logits are read; a list has one for each example.
        reduce: `"mean"` over the examples, or `"none"`: `[b]`.

    Raises:
        ConfigError: the reference is none of these.

    Example:
        >>> kl_divergence("corrupted").reference
        'corrupted'
    """
    read = MetricArguments("kl_divergence", None)
    if not isinstance(reference, Tensor) and reference not in ("clean", "corrupted"):
        raise ConfigError(
            f"reference={reference!r} of kl_divergence. Allowed: 'clean', 'corrupted', logits [b, V]."
        )
    return KLDivergence(reference=reference, **read.common(position, reduce))


def as_metrics(metric: Any) -> dict[str, Metric | Callable[[Tensor], Any]]:
    """Metrics by name: of one, of a sequence, or of a mapping that gives the names.

    Others are called by the name of the metric or function, with a number where there are several of one name.

    Raises:
        ConfigError: something else was given, or none.

    Example:
        >>> list(as_metrics([logit(None, 3), logit(None, 5), lambda logits: logits.mean()]))
        ['logit', 'logit 2', 'metric']
    """
    if isinstance(metric, Mapping):
        for name, one in metric.items():
            if not isinstance(name, str) or not name:
                raise ConfigError(f"{name!r} names a metric; names are strings that are not empty.")
            _check_metric(one, f"metric {name!r}")
        found = dict(metric)
    else:
        many = isinstance(metric, Sequence) and not isinstance(metric, str)
        found = {}
        for one in metric if many else [metric]:
            _check_metric(one, "metric")
            base = name = _name_of(one)
            count = 1
            while name in found:
                count += 1
                name = f"{base} {count}"
            found[name] = one
    if not found:
        raise ConfigError(f"metric={metric!r} has no metrics. Give at least one.")
    return found


def _check_metric(metric: Any, what: str) -> None:
    if any(metric is maker for maker in _MAKERS):
        raise ConfigError(
            f"The {what} is the function {metric.__name__}, which makes a metric. Call it:"
            f" iv.metrics.{metric.__name__}(tokenizer, answer), or what it takes."
        )
    if isinstance(metric, type) and issubclass(metric, Metric):
        raise ConfigError(f"The {what} is the class {metric.__name__}. Give one of it, with its settings.")
    if not isinstance(metric, Metric) and not callable(metric):
        names = ", ".join(maker.__name__ for maker in _MAKERS)
        raise ConfigError(
            f"The {what} is {metric!r:.60}, a {type(metric).__name__}. Allowed: what iv.metrics makes ({names}), a"
            " function of logits [batch, position, vocabulary], or a mapping or list of these."
        )


def _name_of(metric: Any) -> str:
    name = metric.name if isinstance(metric, Metric) else getattr(metric, "__name__", "")
    return name if isinstance(name, str) and name and name != "<lambda>" else "metric"


_MAKERS = (
    logit_difference,
    logit,
    logits_of,
    probability,
    log_probability,
    rank,
    accuracy,
    loss,
    kl_divergence,
)
