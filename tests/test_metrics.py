"""Metrics against numbers computed by hand, on batches with padding, and what they refuse."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_by_hand import byte_level, metaspace, word_piece
from torch import Tensor
from torch.testing import assert_close

import intervenable as iv
from intervenable.errors import ConfigError, LocationRangeError, MetricError
from intervenable.inputs import RunInputs, read_inputs
from intervenable.metric_reading import MetricReader
from intervenable.metrics import Metric, MetricRun, as_metrics
from tiny_models import tiny, tiny_inputs

SIZE = 7


def inputs_of(*masks: list[int], ids: Tensor | None = None) -> RunInputs:
    mask = torch.tensor(masks)
    return RunInputs((), {}, None, len(masks), len(masks[0]), mask, ids)


def unavailable() -> Tensor:
    raise AssertionError("this run was not asked for")


def run_of(inputs: RunInputs, clean: Tensor | None = None, corrupted: Tensor | None = None) -> MetricRun:
    return MetricRun(
        inputs,
        unavailable if clean is None else lambda: clean,
        unavailable if corrupted is None else lambda: corrupted,
    )


def logits_of(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    """By the definition, in double precision, without torch."""
    powers = [math.exp(number) for number in row]
    return [power / sum(powers) for power in powers]


def divergence(left: list[float], right: list[float]) -> float:
    return sum(p * math.log(p / q) for p, q in zip(softmax(left), softmax(right), strict=True))


# Two examples of five positions, padded on either side: the last real token of the first is at 4 or 2.
LEFT, RIGHT, NONE = ([0, 0, 1, 1, 1], [1] * 5), ([1, 1, 1, 0, 0], [1] * 5), ([1] * 5, [1] * 5)
LAST = {"left": (4, 4), "right": (2, 4), "none": (4, 4)}
BEFORE = {"left": (3, 3), "right": (1, 3), "none": (3, 3)}
FIRST = {"left": (2, 0), "right": (0, 0), "none": (0, 0)}
MASKS = {"left": LEFT, "right": RIGHT, "none": NONE}

BY_HAND = {
    "logit_difference": (iv.metrics.logit_difference, (2, 5), lambda row: row[2] - row[5]),
    "logit": (iv.metrics.logit, (2,), lambda row: row[2]),
    "probability": (iv.metrics.probability, (2,), lambda row: softmax(row)[2]),
    "log_probability": (iv.metrics.log_probability, (2,), lambda row: math.log(softmax(row)[2])),
    "loss": (iv.metrics.loss, (2,), lambda row: -math.log(softmax(row)[2])),
    "rank": (iv.metrics.rank, (2,), lambda row: float(sorted(row, reverse=True).index(row[2]))),
    "accuracy": (iv.metrics.accuracy, (2,), lambda row: float(max(row) == row[2])),
}


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("name", BY_HAND)
def test_a_metric_is_what_is_computed_by_hand_at_the_last_real_token(name, padding):
    make, tokens, by_hand = BY_HAND[name]
    run = run_of(inputs_of(*MASKS[padding]))
    for seed in range(10):  # of ten draws the answer is the largest in some
        logits = logits_of(seed, 2, 5, SIZE)
        expected = [by_hand(logits[row, place].tolist()) for row, place in enumerate(LAST[padding])]
        each = make(None, *tokens, reduce="none").bound(run)(logits)
        assert_close(each, torch.tensor(expected), rtol=1e-5, atol=1e-5)
        mean = make(None, *tokens).bound(run)(logits)
        assert_close(mean, torch.tensor(sum(expected) / 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize(
    ("position", "places"), [(-2, BEFORE), (0, FIRST), ([-1, -1], LAST), (torch.tensor([0, 0]), FIRST)]
)
def test_positions_count_real_tokens(padding, position, places):
    logits = logits_of(0, 2, 5, SIZE)
    metric = iv.metrics.logit(None, 3, position=position, reduce="none")
    expected = [logits[row, place, 3] for row, place in enumerate(places[padding])]
    assert metric.bound(run_of(inputs_of(*MASKS[padding])))(logits).tolist() == expected


def test_each_example_may_have_an_answer_and_a_position_of_its_own():
    logits = logits_of(0, 2, 5, SIZE)
    metric = iv.metrics.logit_difference(None, [1, 2], [3, 4], position=[0, -2], reduce="none")
    found = metric.bound(run_of(inputs_of(*LEFT)))(logits)
    assert found.tolist() == [logits[0, 2, 1] - logits[0, 2, 3], logits[1, 3, 2] - logits[1, 3, 4]]


def test_several_logits_are_a_vector_in_the_order_of_the_tokens():
    logits = logits_of(0, 2, 5, SIZE)
    run = run_of(inputs_of(*RIGHT))
    each = iv.metrics.logits_of(None, [6, 0, 2], reduce="none").bound(run)(logits)
    assert each.tolist() == [logits[0, 2, [6, 0, 2]].tolist(), logits[1, 4, [6, 0, 2]].tolist()]
    mean = iv.metrics.logits_of(None, torch.tensor([6, 0, 2])).bound(run)(logits)
    assert_close(mean, (logits[0, 2, [6, 0, 2]] + logits[1, 4, [6, 0, 2]]) / 2)


def test_equal_logits_do_not_count_for_the_rank():
    logits = torch.tensor([[[1.0, 2.0, 2.0, 3.0, 2.0]]])
    run = run_of(inputs_of([1]))
    assert [iv.metrics.rank(None, token).bound(run)(logits).item() for token in range(5)] == [4, 1, 1, 0, 1]
    assert [iv.metrics.accuracy(None, token).bound(run)(logits).item() for token in range(5)] == [
        0,
        0,
        0,
        1,
        0,
    ]
    top = [iv.metrics.accuracy(None, token, top=2).bound(run)(logits).item() for token in range(5)]
    assert top == [0, 1, 1, 1, 1]


def test_the_rank_of_what_is_no_number_is_none():
    run = run_of(inputs_of([1]))
    for logits in (torch.tensor([[[1.0, math.nan, 2.0]]]), torch.tensor([[[math.nan] * 3]])):
        assert math.isnan(iv.metrics.rank(None, 0).bound(run)(logits))
        assert math.isnan(iv.metrics.accuracy(None, 0).bound(run)(logits))
    infinite = torch.tensor([[[1.0, math.inf, -math.inf]]])
    assert [iv.metrics.rank(None, token).bound(run)(infinite).item() for token in range(3)] == [1, 0, 2]


@given(seed=st.integers(0, 10**6), answer=st.integers(0, SIZE - 1), top=st.integers(1, SIZE))
def test_the_answer_is_among_the_largest_where_topk_has_it(seed, answer, top):
    logits = logits_of(seed, 3, 4, SIZE)
    metric = iv.metrics.accuracy(None, answer, top=top, reduce="none")
    found = metric.bound(run_of(inputs_of(*[[1] * 4] * 3)))(logits)
    assert found.tolist() == [float(answer in row.topk(top).indices) for row in logits[:, -1]]


# --- divergence ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("reference", ["clean", "corrupted", "tensor"])
def test_the_divergence_is_that_of_the_reference_from_the_patched_run(padding, reference):
    other, patched = logits_of(0, 2, 5, SIZE), logits_of(1, 2, 5, SIZE)
    rows = list(enumerate(LAST[padding]))
    given = torch.stack([other[row, place] for row, place in rows]) if reference == "tensor" else reference
    runs = {reference: other} if reference != "tensor" else {}
    run = run_of(inputs_of(*MASKS[padding]), **runs)
    expected = [divergence(other[row, place].tolist(), patched[row, place].tolist()) for row, place in rows]
    each = iv.metrics.kl_divergence(given, reduce="none").bound(run)(patched)
    assert_close(each, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    mean = iv.metrics.kl_divergence(given).bound(run)(patched)
    assert_close(mean, torch.tensor(sum(expected) / 2), rtol=1e-4, atol=1e-5)
    assert iv.metrics.kl_divergence(given).bound(run)(other).abs() < 1e-6


def test_a_reference_of_other_length_is_read_at_its_own_last_token():
    clean, patched = logits_of(0, 2, 3, SIZE), logits_of(1, 2, 5, SIZE)
    run = MetricRun(
        inputs_of(*RIGHT), lambda: clean, unavailable, clean_inputs=inputs_of([0, 1, 1], [1, 1, 0])
    )
    each = iv.metrics.kl_divergence(reduce="none").bound(run)(patched)
    pairs = [(clean[0, 2], patched[0, 2]), (clean[1, 1], patched[1, 4])]
    expected = [divergence(left.tolist(), right.tolist()) for left, right in pairs]
    assert_close(each, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("position", [-1, [-1, -2]])
def test_one_clean_example_is_the_reference_of_all(position):
    clean, patched = logits_of(0, 1, 5, SIZE), logits_of(1, 2, 5, SIZE)
    run = MetricRun(inputs_of(*NONE), lambda: clean, unavailable, clean_inputs=inputs_of([1] * 5))
    each = iv.metrics.kl_divergence(position=position, reduce="none").bound(run)(patched)
    places = [4, 4] if position == -1 else [4, 3]
    expected = [
        divergence(clean[0, place].tolist(), patched[row, place].tolist()) for row, place in enumerate(places)
    ]
    assert_close(each, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_tokens_that_cannot_be_said_add_nothing_to_the_divergence():
    reference = torch.tensor([[0.0, 1.0, -math.inf]])
    patched = torch.tensor([[[1.0, 0.0, -math.inf]]])
    run = run_of(inputs_of([1]))
    found = iv.metrics.kl_divergence(reference).bound(run)(patched)
    assert_close(found, torch.tensor(divergence([0.0, 1.0], [1.0, 0.0])), rtol=1e-5, atol=1e-6)
    impossible = torch.tensor([[[1.0, -math.inf, 0.0]]])
    assert iv.metrics.kl_divergence(reference).bound(run)(impossible) == math.inf


# --- the loss of all tokens ----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_all_next_tokens_leaves_padding_out(side):
    ids = torch.tensor([[3, 1, 4, 1, 5], [2, 6, 5, 3, 5]])
    logits = logits_of(0, 2, 5, SIZE)
    real = [[2, 3, 4] if side == "left" else [0, 1, 2], [0, 1, 2, 3, 4]]
    losses = [
        [-math.log(softmax(logits[row, at].tolist())[ids[row, after]]) for at, after in pairwise(places)]
        for row, places in enumerate(real)
    ]
    run = run_of(inputs_of(*MASKS[side], ids=ids))
    each = iv.metrics.loss(reduce="none").bound(run)(logits)
    assert_close(each, torch.tensor([sum(losses[0]) / 2, sum(losses[1]) / 4]), rtol=1e-5, atol=1e-5)
    mean = iv.metrics.loss().bound(run)(logits)
    assert_close(mean, torch.tensor((sum(losses[0]) + sum(losses[1])) / 6), rtol=1e-5, atol=1e-5)


def test_the_loss_of_all_next_tokens_is_that_of_transformers():
    model = tiny("llama")
    inputs = tiny_inputs(model, padding="right")
    ids = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with torch.no_grad():
        output = model(**inputs, labels=ids)
        found = iv.metrics.loss().bound(run_of(read_inputs(inputs, model, "base")))(output.logits)
    assert_close(found, output.loss)


# --- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BY_HAND)
def test_half_precision_is_computed_in_float32_and_double_stays(name):
    make, tokens, by_hand = BY_HAND[name]
    metric = make(None, *tokens, reduce="none").bound(run_of(inputs_of([1] * 5)))
    logits = logits_of(0, 1, 5, SIZE)
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        found = metric(logits.to(dtype))
        assert found.dtype == kept
        expected = torch.tensor([by_hand(logits.to(dtype)[0, 4].tolist())], dtype=kept)
        assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_probabilities_of_large_logits_are_precise():
    run = run_of(inputs_of([1]))
    logits = torch.tensor([[[1000.0, 1000.0, 990.0]]])
    expected = math.log(math.exp(-10) / (2 + math.exp(-10)))
    assert_close(
        iv.metrics.log_probability(None, 2).bound(run)(logits).item(), expected, rtol=1e-6, atol=1e-5
    )


# --- what they read ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "positions", "tokens"),
    [
        (iv.metrics.logit_difference(None, 4, 2049), [2, 4], [4, 2049]),
        (iv.metrics.logit(None, [4, 9], reduce="none"), [2, 4], [4, 9]),
        (iv.metrics.logits_of(None, [4, 5, 6]), [2, 4], [4, 5, 6]),
        (iv.metrics.probability(None, 4), [2, 4], None),
        (iv.metrics.rank(None, 4, position=0), [0], None),
        (iv.metrics.accuracy(None, 4), [2, 4], None),
        (iv.metrics.kl_divergence("clean"), [2, 4], None),
        (iv.metrics.loss(), [0, 1, 2, 3], None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Metric) else None,
)
def test_a_metric_reads_no_more_than_it_needs(metric, positions, tokens):
    logits = logits_of(0, 2, 5, 2050)
    run = run_of(inputs_of(*RIGHT, ids=torch.randint(0, 2050, (2, 5))), clean=logits_of(1, 2, 5, 2050))
    probe = lambda at: logits if at is None else logits[:, at]  # noqa: E731
    reader = MetricReader({"m": metric.bound(run)}, (2, 5, 2050), [probe], guess=[2, 4], narrow=True)
    assert reader.positions.tolist() == positions
    assert (None if reader.tokens is None else reader.tokens.tolist()) == tokens
    patched = logits_of(2, 2, 5, 2050)
    part = patched[:, positions] if tokens is None else patched[:, positions][..., tokens]
    assert torch.equal(reader.measure(part, "a cell")["m"], metric.bound(run)(patched))


def test_other_runs_are_asked_for_only_by_those_who_read_them():
    run = run_of(inputs_of([1] * 5))
    iv.metrics.logit(None, 3).bound(run)
    with pytest.raises(AssertionError, match=r"this run was not asked for"):
        iv.metrics.kl_divergence("corrupted").bound(run)


# --- tokens as strings ---------------------------------------------------------------------------------------


def small() -> object:
    return iv.load_small_lm()[0]


def test_strings_are_the_tokens_of_the_tokenizer():
    tokenizer = small()
    madrid, rome = (tokenizer.encode(text)[-1] for text in ("in Madrid", "in Rome"))
    assert madrid != rome
    given = iv.metrics.logit_difference(tokenizer, " Madrid", [" Rome", madrid])
    assert given == iv.metrics.logit_difference(None, madrid, [rome, madrid])


def test_a_tokenizer_of_the_tokenizers_package_will_do():
    tokenizer = byte_level().backend_tokenizer
    assert isinstance(tokenizer, tokenizers.Tokenizer)
    assert iv.metrics.logit(tokenizer, "a") == iv.metrics.logit(None, tokenizer.token_to_id("a"))


def test_a_string_of_several_tokens_is_refused_with_its_pieces():
    with pytest.raises(ConfigError) as error:
        iv.metrics.logit(byte_level(), "zebra")
    pieces = [byte_level().decode([one]) for one in byte_level().encode("zebra", add_special_tokens=False)]
    assert len(pieces) > 1
    assert "".join(pieces) == "zebra"
    assert str(error.value) == (
        f"answer='zebra' of logit is {len(pieces)} tokens and not one: {', '.join(map(repr, pieces))}. Give one of"
        " them, or an id."
    )


def test_the_form_with_or_without_a_space_is_suggested_if_it_is_one_token():
    tokenizer = _Only({"Madrid": [4, 5], " Madrid": [6], "a": [3], " a": [1, 3]})
    with pytest.raises(ConfigError) as error:
        iv.metrics.logit(tokenizer, "Madrid")
    assert str(error.value) == (
        "answer='Madrid' of logit is 2 tokens and not one: '<4>', '<5>'. ' Madrid', with a leading space, is one."
    )
    with pytest.raises(ConfigError, match=r"'a', without a leading space, is one\.$"):
        iv.metrics.logit(tokenizer, " a")


@dataclass
class _Only:
    """A tokenizer that knows a few texts."""

    texts: dict[str, list[int]]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return self.texts[text]

    def decode(self, ids: list[int]) -> str:
        return f"<{ids[0]}>"


def test_a_string_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(ConfigError) as error:
        iv.metrics.logit(word_piece(), "жук")
    assert str(error.value) == (
        "answer='жук' of logit is not in the vocabulary: the tokenizer reads it as its unknown token. Give another,"
        " or an id."
    )
    assert iv.metrics.logit(word_piece(), "[UNK]") == iv.metrics.logit(None, word_piece().unk_token_id)
    with pytest.raises(
        ConfigError, match=r"^answer='' of logit is no token: the tokenizer makes nothing of it\."
    ):
        iv.metrics.logit(byte_level(), "")


def test_sentencepiece_tokens_are_read_without_their_sign():
    tokenizer = metaspace()
    assert iv.metrics.logit(tokenizer, "Spain") == iv.metrics.logit(
        None, tokenizer.convert_tokens_to_ids("▁Spain")
    )


def test_all_strings_that_are_not_one_token_are_named_at_once():
    with pytest.raises(ConfigError) as error:
        iv.metrics.logit_difference(byte_level(), ["zebra", "a"], "quagga")
    assert len(error.value.faults) == 2
    assert error.value.faults[0].startswith("answer='zebra' of logit_difference is ")
    assert error.value.faults[1].startswith("other='quagga' of logit_difference is ")


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: iv.metrics.logit(None, " Madrid"),
            "answer=' Madrid' of logit is a string, and there is no tokenizer to read it. Give one:"
            " logit(tokenizer, ' Madrid'), or the id.",
        ),
        (
            lambda: iv.metrics.logit_difference(12, 17),
            "The first argument of logit_difference is the tokenizer, and not 12. Without one, for ids, give None:"
            " logit_difference(None, 7, 7).",
        ),
        (
            lambda: iv.metrics.logit_difference(None, 12),
            "logit_difference needs answer and other; other was not given.",
        ),
        (
            lambda: iv.metrics.rank(None, -3),
            "answer=-3 of rank is no token: give an id (0 or more) or a string.",
        ),
        (
            lambda: iv.metrics.rank(None, [1, 2.5]),
            "answer=2.5 of rank is no token: give an id (0 or more) or a string.",
        ),
        (lambda: iv.metrics.logits_of(None, []), "tokens=[] of logits_of has no tokens. Give at least one."),
        (lambda: iv.metrics.logit(None, 3, reduce="sum"), "reduce='sum' of logit. Allowed: 'mean', 'none'."),
        (
            lambda: iv.metrics.logit(None, 3, position="last"),
            "position='last' of logit. Give an int that counts real tokens (-1 is the last), or a list with one for"
            " each example.",
        ),
        (
            lambda: iv.metrics.accuracy(None, 3, top=0),
            "top=0 of accuracy: give how many tokens the answer has to be among, 1 or more.",
        ),
        (
            lambda: iv.metrics.loss(position=2),
            "position=2 of loss: without an answer it is the loss of all next tokens, of which none can be chosen."
            " Give the answer too.",
        ),
        (
            lambda: iv.metrics.kl_divergence("base"),
            "reference='base' of kl_divergence. Allowed: 'clean', 'corrupted', logits [b, V].",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_when_it_is_declared(make, message):
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            iv.metrics.logit(None, [1, 2, 3]),
            "The metric 'logit' has tokens for 3 examples, and the batch has 2. Give one token for all examples, or"
            " one for each.",
        ),
        (
            iv.metrics.logit(None, 1, position=[0, 1, 2]),
            "The metric 'logit' has positions for 3 examples, and the batch has 2. Give one position for all"
            " examples, or one for each.",
        ),
        (
            iv.metrics.kl_divergence(torch.zeros(3, SIZE)),
            "The reference of the metric 'kl_divergence' has shape (3, 7). Give logits [2, V], a row for each"
            " example.",
        ),
        (
            iv.metrics.loss(),
            "loss() compares with the next tokens, and the run that is patched was given no token ids. Give them, or"
            " an answer: loss(tokenizer, answer).",
        ),
    ],
)
def test_what_does_not_fit_the_run_is_refused_before_anything_is_measured(metric, message):
    with pytest.raises(MetricError) as error:
        metric.bound(run_of(inputs_of(*LEFT)))
    assert str(error.value) == message


def test_a_position_that_an_example_does_not_have_is_refused():
    with pytest.raises(LocationRangeError) as error:
        iv.metrics.logit(None, 1, position=3).bound(run_of(inputs_of(*LEFT)))
    assert str(error.value) == (
        "The metric 'logit' reads position 3 of example 0, which has 3 real tokens: positions 0 to 2, or -3 to -1"
        " from the end."
    )


def test_an_example_without_a_next_token_has_no_loss():
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(
        MetricError, match=r"^loss\(\) compares with next tokens, and example 0 has fewer than two real"
    ):
        iv.metrics.loss().bound(run_of(inputs_of([0, 0, 0, 0, 1], [1] * 5, ids=ids)))


@pytest.mark.parametrize("make", [iv.metrics.logit, iv.metrics.probability, iv.metrics.rank])
def test_a_token_outside_the_vocabulary_is_refused_when_the_logits_are_there(make):
    metric = make(None, SIZE).bound(run_of(inputs_of([1] * 5)))
    with pytest.raises(MetricError) as error:
        metric(logits_of(0, 1, 5, SIZE))
    name = make.__name__
    assert str(error.value) == (
        f"The metric '{name}' asks for token 7, which does not exist: the vocabulary has ids 0 to 6."
    )


def test_logits_of_another_shape_are_refused():
    metric = iv.metrics.logit(None, 3).bound(run_of(inputs_of([1] * 5)))
    with pytest.raises(
        MetricError, match=r"of 1 examples of 5 positions, as in the inputs, and not of shape \(1, 6, 7\)"
    ):
        metric(logits_of(0, 1, 6, SIZE))
    reference = iv.metrics.kl_divergence(torch.zeros(1, 6)).bound(run_of(inputs_of([1] * 5)))
    with pytest.raises(MetricError, match=r"has 6 logits, and the run 7\. Give logits \[1, 7\]\.$"):
        reference(logits_of(0, 1, 5, SIZE))


# --- several -------------------------------------------------------------------------------------------------


def own(logits: Tensor) -> Tensor:
    return logits.sum()


def test_metrics_are_called_by_their_names_and_numbered_where_these_are_the_same():
    one, other = iv.metrics.logit(None, 3), iv.metrics.logit(None, 4)
    anonymous = lambda logits: logits.mean()  # noqa: E731
    named = as_metrics([one, own, other, anonymous, own])
    assert list(named) == ["logit", "own", "logit 2", "metric", "own 2"]
    assert list(named.values()) == [one, own, other, anonymous, own]
    assert as_metrics(one) == {"logit": one}
    assert as_metrics({"mine": own}) == {"mine": own}
    assert list(as_metrics((one,))) == ["logit"]


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ([], "metric=[] has no metrics. Give at least one."),
        ({}, "metric={} has no metrics. Give at least one."),
        ({3: own}, "3 names a metric; names are strings that are not empty."),
        (
            "loss",
            "The metric is 'loss', a str. Allowed: what iv.metrics makes (logit_difference, logit, logits_of,",
        ),
        ({"a": None}, "The metric 'a' is None, a NoneType. Allowed: "),
        (
            iv.metrics.rank,
            "The metric is the function rank, which makes a metric. Call it: iv.metrics.rank(tokenizer, answer), or"
            " what it takes.",
        ),
        (Metric, "The metric is the class Metric. Give one of it, with its settings."),
    ],
)
def test_what_is_no_metric_is_refused(metric, message):
    with pytest.raises(ConfigError) as error:
        as_metrics(metric)
    assert str(error.value).startswith(message)


def test_a_metric_of_ones_own_is_told_of_the_run():
    @dataclass(frozen=True)
    class Moved(Metric):
        name = "moved"

        def bound(self, run):
            clean = run.clean()
            return lambda logits: (logits - clean).abs().max()

    clean = logits_of(0, 1, 5, SIZE)
    measure = Moved().bound(run_of(inputs_of([1] * 5), clean=clean))
    assert measure(clean + 2) == 2
    assert list(as_metrics(Moved())) == ["moved"]


# --- the page ------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run_and_print_what_it_speaks_of(capsys):
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(example, names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("LogitDifference(position=-1, reduce='mean', answer=")
    assert printed[1:] == ["cheap [4]", "dear [0, 1, 2, 3, 4]"]
    logits = names["logits"](None)
    assert list(as_metrics(names["metrics"])) == ["Madrid", "entropy", "first"]
    run = run_of(read_inputs(names["inputs"], names["model"], "base"), clean=logits)
    assert names["Moved"]().bound(run)(logits).tolist() == [0.0]
    assert 0 < names["entropy"](logits) < math.log(logits.shape[-1])


def test_the_page_has_a_row_for_each_metric_and_no_others():
    rows = {
        row.split("`")[1].split("(")[0] for row in PAGE.splitlines() if row.startswith("| `") and "(" in row
    }
    makers = {name for name in iv.metrics.__all__ if name[0].islower() and name != "as_metrics"}
    assert rows == makers
