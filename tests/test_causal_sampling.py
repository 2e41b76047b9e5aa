"""Inputs drawn at random: from a seed, of every kind equally often, and such as were asked for."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest
from causal_by_hand import Tables, tables
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import intervenable as iv
from intervenable.causal import CausalModel, arithmetic_carry

TRUTH = [False, True]


def both() -> CausalModel:
    return CausalModel(
        ["A", "B", "C"], dict.fromkeys("ABC", TRUTH), {"C": ["A", "B"]}, {"C": lambda a, b: a and b}
    )


@settings(deadline=None)
@given(made=tables(), seed=st.integers(0, 999), balanced=st.booleans())
def test_what_is_drawn_depends_on_the_seed_alone(made: Tables, seed: int, balanced: bool):
    model = made.model()
    random.seed(0)
    state = random.getstate()
    drawn = model.sample_input(seed, balanced=balanced)
    assert random.getstate() == state
    assert drawn == model.sample_input(seed, balanced=balanced)
    assert drawn in made.input_settings()


@settings(deadline=None)
@given(made=tables(), data=st.data(), balanced=st.booleans())
def test_what_must_hold_holds(made: Tables, data: st.DataObject, balanced: bool):
    runs = [{name: made.value(name, setting) for name in made.parents} for setting in made.input_settings()]
    wanted = data.draw(st.sampled_from(runs))
    chosen = data.draw(st.lists(st.sampled_from(list(made.parents)), unique=True))
    where = {name: wanted[name] for name in chosen}
    drawn = made.model().sample_input(data.draw(st.integers(0, 99)), where=where, balanced=balanced)
    assert all(made.value(name, drawn) == value for name, value in where.items())


@settings(deadline=None)
@given(made=tables())
def test_a_condition_may_be_a_function(made: Tables):
    output = list(made.parents)[-1]
    found = Counter(made.value(output, setting) for setting in made.input_settings())
    assume(found[0])
    drawn = made.model().sample_input(where=lambda setting: setting[output] == 0)
    assert made.value(output, drawn) == 0


def test_a_balanced_draw_has_each_output_equally_often():
    model, rng = both(), random.Random(0)
    plain = [model.run(model.sample_input(rng))["C"] for _ in range(2000)]
    even = [model.run(model.sample_input(rng, balanced=True))["C"] for _ in range(2000)]
    assert sum(plain) / 2000 == pytest.approx(0.25, abs=0.04)
    assert sum(even) / 2000 == pytest.approx(0.5, abs=0.04)


def test_a_balanced_draw_agrees_where_variables_share_parents():
    """The carry and the ones of a sum come from the same two digits."""
    model = arithmetic_carry().model
    for seed in range(50):
        drawn = model.sample_input(seed, where={"carry": True, "ones": 3}, balanced=True)
        assert drawn["ones_a"] + drawn["ones_b"] == 13


def test_a_balanced_draw_is_even_where_variables_share_parents():
    model = CausalModel(
        ["A", "P", "Q", "O"],
        {"A": range(4), "P": TRUTH, "Q": TRUTH, "O": TRUTH},
        {"P": "A", "Q": "A", "O": "PQ"},
        {"P": lambda a: a >= 2, "Q": lambda a: a % 2 == 1, "O": lambda p, q: p and q},
    )
    rng = random.Random(0)
    drawn = [model.run(model.sample_input(rng, balanced=True))["O"] for _ in range(1000)]
    assert sum(drawn) / 1000 == pytest.approx(0.5, abs=0.06)


def test_outputs_that_cannot_come_about_are_not_asked_for():
    model = CausalModel(
        ["A", "B", "C"],
        {"A": TRUTH, "B": ["no", "yes", "never"], "C": [0, 1, 2]},
        {"B": "A", "C": "B"},
        {"B": lambda a: "yes" if a else "no", "C": lambda b: ["no", "yes", "never"].index(b)},
    )
    drawn = [model.run(model.sample_input(seed, balanced=True))["C"] for seed in range(200)]
    assert set(drawn) == {0, 1}
    rows = model.counterfactual_dataset(200, "B", balance=True)
    assert Counter(zip(rows["base_labels"], rows["labels"], strict=True)) == dict.fromkeys(
        [(0, 0), (0, 1), (1, 0), (1, 1)], 50
    )


def test_what_cannot_hold_is_said():
    with pytest.raises(
        iv.InputError, match=r"Of 10000 inputs that were drawn, none fits .*\. Is there one\?"
    ):
        both().sample_input(where={"A": False, "C": True})
    with pytest.raises(iv.InputError, match=r"none fits {'A': False, 'C': True}"):
        both().sample_input(where={"A": False, "C": True}, balanced=True)
    with pytest.raises(iv.UnknownNameError, match="Unknown variable 'D'"):
        both().sample_input(where={"D": True})
    with pytest.raises(iv.InputError, match="'C' cannot be 7"):
        both().sample_input(where={"C": 7})


def test_interventions_are_every_combination_of_internal_variables():
    model = arithmetic_carry().model
    rng = random.Random(0)
    drawn = [model.sample_intervention(rng) for _ in range(3000)]
    kinds = Counter(tuple(sorted(one)) for one in drawn)
    inner = ("carry", "ones", "tens")
    assert set(kinds) == {subset for count in (1, 2, 3) for subset in combinations(inner, count)}
    assert all(value in model.values[name] for one in drawn for name, value in one.items())
    assert model.sample_intervention(4) == model.sample_intervention(4)


def test_where_nothing_lies_between_there_is_no_intervention_to_draw():
    with pytest.raises(iv.InputError) as caught:
        both().sample_intervention()
    assert str(caught.value) == (
        "There is nothing between inputs and outputs to set by hand. Name variables: 'A', 'B', 'C'."
    )
    assert set(both().sample_intervention(variables=["C"])) == {"C"}
