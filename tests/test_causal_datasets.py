"""Data sets of causal models: every row says what the model says, and they are as many and as even as asked."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from causal_by_hand import Tables, tables
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import intervenable as iv
from intervenable.causal import CausalModel, Counterfactual

ROOT = Path(__file__).parents[1]
TRUTH = [False, True]


def equality() -> CausalModel:
    truth = {"WX": TRUTH, "YZ": TRUTH, "O": TRUTH}
    equal = dict.fromkeys(truth, lambda left, right: left == right)
    return CausalModel(
        ["W", "X", "Y", "Z", "WX", "YZ", "O"],
        {**dict.fromkeys("WXYZ", range(4)), **truth},
        {"WX": "WX", "YZ": "YZ", "O": ["WX", "YZ"]},
        equal,
    )


def rows_of(dataset) -> list[dict]:
    return [dataset[index] for index in range(len(dataset))]


# --- rows ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(made=tables(), seed=st.integers(0, 99), sampler=st.sampled_from(["uniform", "balanced"]))
def test_factual_rows_are_inputs_with_their_answers(made: Tables, seed: int, sampler: str):
    model = made.model()
    assume(len(model.outputs) == 1)
    dataset = model.factual_dataset(5, seed, sampler=sampler)
    assert dataset.column_names == ["input_ids", "labels"]
    assert len(dataset) == 5
    for row in rows_of(dataset):
        inputs = dict(zip(made.inputs(), map(int, row["input_ids"]), strict=True))
        assert row["labels"] == made.value(model.output, inputs)


@settings(deadline=None, max_examples=30)
@given(made=tables(), data=st.data())
def test_counterfactual_rows_are_what_an_interchange_gives(made: Tables, data: st.DataObject):
    model = made.model()
    assume(len(model.outputs) == 1)
    names = data.draw(st.lists(st.sampled_from(list(made.parents)), unique=True, min_size=1, max_size=3))
    sampler = data.draw(st.sampled_from(["uniform", "balanced"]))
    dataset = model.counterfactual_dataset(6, names, data.draw(st.integers(0, 99)), sampler=sampler)
    assert len(dataset) == 6

    def inputs(numbers) -> dict[str, int]:
        return dict(zip(made.inputs(), map(int, numbers), strict=True))

    for row in rows_of(dataset):
        several = len(names) > 1
        assert ("source_mask" in row) == several
        given_sources = row["source_input_ids"] if several else [row["source_input_ids"]]
        answers = row["source_labels"] if several else [row["source_labels"]]
        mask = row["source_mask"] if several else [True]
        base, sources = inputs(row["input_ids"]), [inputs(numbers) for numbers in given_sources]
        asked = {name: source for name, source, there in zip(names, sources, mask, strict=True) if there}
        assert asked
        assert row["labels"] == made.interchanged(model.output, base, asked)
        assert row["base_labels"] == made.value(model.output, base)
        assert answers == [made.value(model.output, source) for source in sources]
        assert all(source == base for source, there in zip(sources, mask, strict=True) if not there)
        if not any(made.is_behind(name, other) for name in names for other in names):
            # Those that are left out have the base, with which an interchange changes nothing.
            everywhere = dict(zip(names, sources, strict=True))
            assert row["labels"] == made.interchanged(model.output, base, everywhere)


@settings(deadline=None, max_examples=20)
@given(made=tables(), seed=st.integers(0, 9))
def test_data_sets_depend_on_the_seed_alone(made: Tables, seed: int):
    model = made.model()
    assume(len(model.outputs) == 1)
    name = model.output
    first, again = (model.counterfactual_dataset(8, name, seed, sampler="uniform") for _ in range(2))
    assert rows_of(first) == rows_of(again)


def test_another_seed_gives_other_rows():
    first, second = (rows_of(equality().counterfactual_dataset(20, seed=seed)) for seed in (0, 1))
    assert first != second


def test_numbers_are_float32_and_whole_numbers():
    features = equality().counterfactual_dataset(2).features
    assert features["input_ids"].feature.dtype == "float32"
    assert features["source_input_ids"].feature.feature.dtype == "float32"
    assert features["labels"].dtype == features["source_labels"].feature.dtype == "int64"
    assert features["source_mask"].feature.dtype == "bool"
    tensors = equality().counterfactual_dataset(3, "WX").with_format("torch")[:]
    assert tensors["source_input_ids"].shape == (3, 4)


# --- which interventions ------------------------------------------------------------------------------------


def test_examples_are_about_every_combination_of_variables():
    dataset = equality().counterfactual_dataset(900)
    masks = Counter(map(tuple, dataset["source_mask"]))
    assert set(masks) == {(True, False), (False, True), (True, True)}
    assert min(masks.values()) > 240
    numbered = {0: (True, False), 1: (False, True), 2: (True, True)}
    pairs = zip(dataset["intervention_id"], map(tuple, dataset["source_mask"]), strict=True)
    assert all(numbered[which] == mask for which, mask in pairs)


def test_combinations_can_be_chosen():
    dataset = equality().counterfactual_dataset(50, subsets=[["YZ"], ["WX"]])
    assert {
        (which, *mask) for which, mask in zip(dataset["intervention_id"], dataset["source_mask"], strict=True)
    } == {
        (0, True, False),
        (1, False, True),
    }  # the variables are in the order of the subsets


def test_consecutive_examples_are_about_the_same_variables_and_there_are_no_more_than_asked_for():
    which = equality().counterfactual_dataset(50, batch_size=8)["intervention_id"]
    assert len(which) == 50
    batches = [set(which[start : start + 8]) for start in range(0, 50, 8)]
    assert all(len(batch) == 1 for batch in batches)
    assert len(set.union(*batches)) > 1


# --- how even -----------------------------------------------------------------------------------------------


def test_balanced_examples_have_each_change_of_the_answer_equally_often():
    dataset = equality().counterfactual_dataset(103, balance=True)
    pairs = list(zip(dataset["base_labels"], dataset["labels"], strict=True))
    assert sorted(Counter(pairs).values()) == [25, 26, 26, 26]
    assert pairs[:8] != pairs[8:16]  # in no order that could be learned


def test_each_value_of_a_variable_is_set_equally_often():
    dataset = equality().counterfactual_dataset(1000, "WX")
    equal = [numbers[0] == numbers[1] for numbers in dataset["source_input_ids"]]
    assert sum(equal) / 1000 == pytest.approx(0.5, abs=0.06)
    plain = equality().counterfactual_dataset(1000, "WX", sampler="uniform")
    assert sum(numbers[0] == numbers[1] for numbers in plain["source_input_ids"]) / 1000 == pytest.approx(
        0.25, abs=0.06
    )


def test_filters_keep_what_they_say():
    def changes(it: Counterfactual) -> bool:
        return it.result["O"] != it.base["O"]

    dataset = equality().counterfactual_dataset(40, filter=changes)
    assert all(one != other for one, other in zip(dataset["labels"], dataset["base_labels"], strict=True))
    factual = equality().factual_dataset(40, filter=lambda setting: setting["WX"])
    assert all(numbers[0] == numbers[1] for numbers in factual["input_ids"])


def test_a_sampler_of_ones_own_draws_and_is_asked_again_until_it_fits():
    model = equality()
    asked = []

    def sampler(rng, goal):
        asked.append(dict(goal))
        return {name: rng.choice([0, 3]) for name in "WXYZ"}

    dataset = model.counterfactual_dataset(30, "WX", sampler=sampler, balance=True)
    assert {number for numbers in dataset["input_ids"] for number in numbers} == {0, 3}
    assert len(asked) > 60
    with pytest.raises(iv.InputError, match="No value for 'X', 'Y', 'Z'"):
        model.factual_dataset(1, sampler=lambda rng, goal: {"W": 1})


def test_encodings_of_ones_own_write_base_and_sources():
    """pyvene's generator wrote sources its own way, whatever it was given for the base."""
    dataset = equality().counterfactual_dataset(
        10,
        encode=lambda setting: [setting[name] + 100.0 for name in "WXYZ"],
        label=lambda setting: 7 + setting["O"],
    )
    assert min(number for row in dataset["input_ids"] for number in row) >= 100
    assert min(number for row in dataset["source_input_ids"] for source in row for number in source) >= 100
    assert set(dataset["labels"]) == {7, 8}


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (
            lambda m: m.counterfactual_dataset(0),
            iv.InputError,
            "size=0: it must be a whole number, 1 or more.",
        ),
        (lambda m: m.factual_dataset(2.5), iv.InputError, "size=2.5: it must be a whole number, 1 or more."),
        (
            lambda m: m.counterfactual_dataset(1, "WY"),
            iv.UnknownNameError,
            "Unknown variable 'WY'. Did you mean 'Y'?\nAllowed: O, W, WX, X, Y, YZ, Z.",
        ),
        (
            lambda m: m.counterfactual_dataset(1, ["WX", "WX"]),
            iv.InputError,
            "variables=['WX', 'WX'] names one twice. Each has one source.",
        ),
        (
            lambda m: m.counterfactual_dataset(1, subsets=["WX"]),
            iv.InputError,
            "subsets=['WX'] is no list of lists of variables, such as [['WX'], ['YZ']].",
        ),
        (
            lambda m: m.counterfactual_dataset(1, ["WX"], subsets=[["YZ"]]),
            iv.InputError,
            "subsets=[['YZ']] names 'YZ', which is not among them. Combine 'WX', at least one each.",
        ),
        (
            lambda m: m.counterfactual_dataset(1, ["WX"], subsets=[[]]),
            iv.InputError,
            "subsets=[[]] leaves one without variables. Combine 'WX', at least one each.",
        ),
        (
            lambda m: m.counterfactual_dataset(1, batch_size=0),
            iv.InputError,
            "batch_size=0: it must be 1 or more.",
        ),
        (
            lambda m: m.factual_dataset(1, sampler="even"),
            iv.InputError,
            "sampler='even' is unknown. Allowed: 'balanced', 'uniform', or a function of a random.Random and the"
            " values that must come out.",
        ),
        (
            lambda m: m.factual_dataset(1, filter=lambda setting: False),
            iv.InputError,
            "Of 10000 inputs that were drawn in a row, the filter keeps none. Is there one?",
        ),
        (
            lambda m: m.counterfactual_dataset(1, "WX", filter=lambda it: False),
            iv.InputError,
            "After 0 counterfactuals, 10000 draws in a row gave no other one about 'WX'. Ask for fewer, or for less.",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(ask, error, message):
    with pytest.raises(error) as caught:
        ask(equality())
    assert str(caught.value) == message


def test_answers_that_no_intervention_gives_are_said():
    model = CausalModel(
        ["A", "B", "C"],
        dict.fromkeys("ABC", TRUTH),
        {"B": "A", "C": "AB"},
        {"B": lambda a: a, "C": lambda a, b: a and b},
    )
    with pytest.raises(iv.InputError) as caught:  # without A there is no C
        model.counterfactual_dataset(8, "B", balance=True)
    assert str(caught.value).endswith(
        "draws in a row gave no other one about 'B' that takes C from False to True. Ask for fewer, or for less,"
        " without balance=True."
    )


def test_words_must_be_encoded_by_who_knows_how():
    model = CausalModel(["A"], {"A": ["red", "green"]}, {}, {})
    with pytest.raises(iv.InputError, match="cannot be written as numbers"):
        model.factual_dataset(1)
    dataset = model.factual_dataset(4, encode=lambda setting: [float(setting["A"] == "red")])
    assert all(
        bool(numbers[0]) == (label == 0)
        for numbers, label in zip(dataset["input_ids"], dataset["labels"], strict=True)
    )


def test_causal_models_need_neither_data_sets_nor_pictures_until_these_are_asked_for():
    code = (
        "import sys, torch, intervenable.causal as causal;"
        "causal.hierarchical_equality().model.sample_input(balanced=True);"
        "assert not {'datasets', 'matplotlib', 'networkx', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300)
