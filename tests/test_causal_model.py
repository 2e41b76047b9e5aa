"""Causal models: what they compute, what they refuse, and that nothing of one gets into another."""

from __future__ import annotations

import operator
import random
from itertools import product

import numpy as np
import pytest
import torch
from causal_by_hand import Tables, tables
from hypothesis import given, settings
from hypothesis import strategies as st

import intervenable as iv
from intervenable.causal import CausalModel

TRUTH = [False, True]


def sums() -> CausalModel:
    return CausalModel(
        ["X", "Y", "Z", "S", "O"],
        {"X": range(10), "Y": range(10), "Z": range(10), "S": range(19), "O": range(28)},
        {"S": ["X", "Y"], "O": ["S", "Z"]},
        {"S": operator.add, "O": operator.add},
    )


def both() -> CausalModel:
    return CausalModel(
        ["A", "B", "C"], dict.fromkeys("ABC", TRUTH), {"C": ["A", "B"]}, {"C": lambda a, b: a and b}
    )


# --- examples worked out by hand ----------------------------------------------------------------------------


def test_sums_are_computed_and_exchanged():
    model = sums()
    assert model.timesteps == {"X": 0, "Y": 0, "Z": 0, "S": 1, "O": 2}
    run = model.run({"X": 1, "Y": 2, "Z": 3})
    assert run == {"X": 1, "Y": 2, "Z": 3, "S": 3, "O": 6}
    assert model.interchange({"X": 1, "Y": 2, "Z": 3}, {"S": {"X": 4, "Y": 5, "Z": 6}})["O"] == 12
    assert model.input_to_tensor(run).tolist() == [1.0, 2.0, 3.0]
    assert model.output_to_tensor(run).tolist() == [6.0]


def test_a_conjunction_has_one_setting_that_makes_it_true():
    model = both()
    assert model.equivalence_classes == {
        "C": {
            False: [{"A": False, "B": False}, {"A": False, "B": True}, {"A": True, "B": False}],
            True: [{"A": True, "B": True}],
        }
    }
    assert model.interchange({"A": True, "B": False}, {"B": {"A": False, "B": True}})["C"] is True
    assert model.run({"A": False, "B": False, "C": True})["C"] is True


def test_pyvenes_names_do_the_same():
    model = sums()
    assert model.run_forward({"X": 1, "Y": 2, "Z": 3})["O"] == 6
    assert model.run_interchange({"X": 1, "Y": 2, "Z": 3}, {"S": {"X": 4, "Y": 5, "Z": 6}})["O"] == 12
    with pytest.raises(AttributeError) as caught:
        model.print_structure()
    assert str(caught.value) == "CausalModel has no 'print_structure'. Here it is `draw()`."


def test_inputs_without_a_value_take_that_of_their_function():
    model = CausalModel(["A", "B"], {}, {"B": ["A"]}, {"A": lambda: 5, "B": lambda a: a + 1})
    assert model.run() == {"A": 5, "B": 6}
    assert model.run({"A": 1}) == {"A": 1, "B": 2}


def test_outputs_are_computed_last_even_where_they_could_be_earlier():
    model = CausalModel(
        ["A", "B", "C", "D"],
        {},
        {"B": "A", "C": "B", "D": "A"},
        dict.fromkeys("BCD", lambda value: value),
    )
    assert model.timesteps == {"A": 0, "B": 1, "C": 2, "D": 2}
    assert (model.inputs, model.internal, model.outputs) == (("A",), ("B",), ("C", "D"))


def test_time_steps_can_be_given():
    steps = {"X": 0, "Y": 0, "Z": 1, "S": 1, "O": 5}
    model = sums()
    again = CausalModel(model.variables, model.values, model.parents, model.functions, timesteps=steps)
    assert again.timesteps == steps


def test_values_may_be_vectors_of_any_kind():
    for vectors in (
        [(0.0, 1.0), (1.0, 0.0)],
        [np.array([0.0, 1.0]), np.array([1.0, 0.0])],
        [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0])],
    ):
        model = CausalModel(
            ["A", "B", "C"],
            {"A": vectors, "B": vectors, "C": TRUTH},
            {"C": "AB"},
            {"C": lambda a, b: bool((np.asarray(a) == np.asarray(b)).all())},
        )
        run = model.run({"A": vectors[0], "B": np.array([0.0, 1.0])})
        assert run["C"] is True
        assert model.input_to_tensor(run).tolist() == [0, 1, 0, 1]
        assert len(model.equivalence_classes["C"][True]) == 2
        with pytest.raises(iv.InputError, match="'A' cannot be"):
            model.run({"A": np.array([9.0, 9.0]), "B": vectors[0]})


# --- laws ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(made=tables(), data=st.data())
def test_runs_are_what_each_variable_computes_from_its_parents(made: Tables, data: st.DataObject):
    names = list(made.parents)
    order = data.draw(st.permutations(names))
    forced = {name: data.draw(st.integers(0, made.sizes[name] - 1)) for name in made.inputs()}
    for name in data.draw(st.lists(st.sampled_from(names), unique=True)):
        forced[name] = data.draw(st.integers(0, made.sizes[name] - 1))
    run = made.model(order).run(forced)
    assert list(run) == order
    assert run == {name: made.value(name, forced) for name in order}


@settings(deadline=None)
@given(made=tables(), data=st.data())
def test_interchanges_take_each_variable_from_a_run_of_its_source(made: Tables, data: st.DataObject):
    names = list(made.parents)
    every = made.input_settings()
    base = data.draw(st.sampled_from(every))
    chosen = data.draw(st.lists(st.sampled_from(names), unique=True))
    sources = {name: data.draw(st.sampled_from(every)) for name in chosen}
    given_base, given_sources = dict(base), {name: dict(source) for name, source in sources.items()}
    result = made.model().interchange(base, sources)
    assert result == {name: made.interchanged(name, base, sources) for name in names}
    assert (base, sources) == (given_base, given_sources)


@settings(deadline=None)
@given(made=tables(), data=st.data())
def test_an_interchange_with_the_base_itself_changes_nothing(made: Tables, data: st.DataObject):
    base = data.draw(st.sampled_from(made.input_settings()))
    chosen = data.draw(st.lists(st.sampled_from(list(made.parents)), unique=True))
    model = made.model()
    assert model.interchange(base, dict.fromkeys(chosen, base)) == model.run(base)


@settings(deadline=None)
@given(made=tables())
def test_equivalence_classes_are_every_setting_of_the_parents_once(made: Tables):
    classes = made.model().equivalence_classes
    assert set(classes) == {name for name, above in made.parents.items() if above}
    for name, by_value in classes.items():
        above = made.parents[name]
        listed = {
            tuple(row[parent] for parent in above): value for value, rows in by_value.items() for row in rows
        }
        assert listed == made.table[name]
        assert sum(map(len, by_value.values())) == len(made.table[name])
        assert set(by_value) == set(range(made.sizes[name]))


@settings(deadline=None)
@given(made=tables())
def test_inputs_are_listed_once_each(made: Tables):
    assert list(made.model().input_settings()) == made.input_settings()


@settings(deadline=None)
@given(made=tables(most=5), data=st.data())
def test_paths_are_live_where_each_edge_would_carry_a_change(made: Tables, data: st.DataObject):
    inputs = data.draw(st.sampled_from(made.input_settings()))
    names = list(made.parents)

    def felt(parent: str, child: str) -> bool:
        return parent in made.parents[child] and any(
            made.value(child, {**inputs, parent: value}) != made.value(child, inputs)
            for value in range(made.sizes[parent])
        )

    expected = {
        path
        for length in range(2, len(names) + 1)
        for path in product(names, repeat=length)
        if all(felt(path[step], path[step + 1]) for step in range(length - 1))
    }
    found = made.model().live_paths(inputs)
    assert {path for paths in found.values() for path in paths} == expected
    assert all(len(path) == length for length, paths in found.items() for path in paths)
    assert all(found.values())


def test_filters_ask_for_live_paths():
    model = both()
    some, none = model.run({"A": True, "B": False}), model.run({"A": False, "B": False})
    assert model.path_filter("B", "C")(some)
    assert not model.path_filter("A", "C")(some)
    assert model.longest_path_filter(2)(some)
    assert model.longest_path_filter([1, 3])(none)


# --- nothing is shared or changed ---------------------------------------------------------------------------


def test_a_model_with_one_variable_more_leaves_the_other_as_it_is():
    model = both()
    more = model.with_variable("D", TRUTH, ["C"], lambda c: not c)
    assert model.variables == ("A", "B", "C")
    assert model.outputs == ("C",)
    assert more.run({"A": True, "B": True}) == {"A": True, "B": True, "C": True, "D": False}
    assert (more.outputs, more.internal, more.timesteps["D"]) == (("D",), ("C",), 2)


def test_models_share_no_places_and_keep_none_of_what_they_were_given():
    names, parents = ["A", "B", "C"], {"C": ["A", "B"]}
    first = CausalModel(names, {}, parents, {"C": operator.add})
    second = CausalModel(names, {}, parents, {"C": operator.add})
    first.pos["A"] = (3.0, 3.0)
    parents["C"].append("C")
    names.append("D")
    assert second.pos == {}
    assert first.parents["C"] == ("A", "B")
    assert first.variables == ("A", "B", "C")


def test_nothing_is_drawn_or_called_when_a_model_is_made():
    def never() -> int:
        raise AssertionError

    state = random.getstate()
    CausalModel(["A", "B"], {}, {"B": ["A"]}, {"A": never, "B": lambda a: a})
    assert random.getstate() == state


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ([], {}, {}, {}),
            iv.ConfigError,
            "A causal model without variables says nothing. Name at least one.",
        ),
        ((["A", "A"], {}, {}, {}), iv.ConfigError, "The variable 'A' is listed twice. Each may occur once."),
        ((["A", 3], {}, {}, {}), iv.ConfigError, "3 is no name of a variable. Give texts."),
        (
            (["price", "answer"], {}, {"answer": ["prise"]}, {"answer": bool}),
            iv.UnknownNameError,
            "Unknown variable 'prise' among the parents of 'answer'. Did you mean 'price'?\nAllowed: answer, price.",
        ),
        (
            (["A"], {"B": [1]}, {}, {}),
            iv.UnknownNameError,
            "Unknown variable 'B' in `values`.\nAllowed: A.",
        ),
        (
            (["A", "B", "C"], {}, {"A": ["C"], "B": ["A"], "C": ["B"]}, dict.fromkeys("ABC", bool)),
            iv.ConfigError,
            "The variables depend on each other in a circle: A -> B -> C -> A.",
        ),
        (
            (["A"], {}, {"A": ["A"]}, {"A": bool}),
            iv.ConfigError,
            "The variables depend on each other in a circle: A -> A.",
        ),
        (
            (["A", "B"], {}, {"B": ["A"]}, {}),
            iv.ConfigError,
            "Variable 'B' has parents and no function. Give one that takes (A).",
        ),
        (
            (["A", "B"], {}, {"B": ["A"]}, {"B": lambda a, b: a}),
            iv.ConfigError,
            "The function of 'B' takes (a, b), and 'B' has 1 parents. Give one that takes (A).",
        ),
        (
            (["A", "B"], {}, {"B": ["A"]}, {"B": 3}),
            iv.ConfigError,
            "The function of 'B' is 3. Give one that takes (A).",
        ),
        (
            (["A"], {"A": []}, {}, {}),
            iv.ConfigError,
            "Variable 'A' has no values. List what it may be, or None for anything.",
        ),
        (
            (["A"], {"A": [1, 2, True]}, {}, {}),
            iv.ConfigError,
            "Variable 'A' lists the value True twice. Each may occur once.",
        ),
        (
            (["A", "B"], {}, {"B": ["A"]}, {"B": bool}, {"A": 0}),
            iv.ConfigError,
            "No time step for 'B'. Give one for each variable, or none.",
        ),
        (
            (["A", "B"], {}, {"B": ["A"]}, {"B": bool}, {"A": 1, "B": 1}),
            iv.ConfigError,
            "'A' is computed at step 1 and its child 'B' at 1. Parents come first.",
        ),
    ],
)
def test_what_cannot_be_is_refused_when_it_is_declared(arguments, error, message):
    with pytest.raises(error) as caught:
        CausalModel(*arguments)
    assert str(caught.value) == message


def test_all_faults_of_a_declaration_are_told_at_once():
    with pytest.raises(iv.ConfigError) as caught:
        CausalModel(["A", "B", "C"], {"A": []}, {"B": ["A"], "C": ["A"]}, {"C": lambda: 1})
    assert str(caught.value) == (
        "3 faults in the configuration:\n"
        "- Variable 'A' has no values. List what it may be, or None for anything.\n"
        "- Variable 'B' has parents and no function. Give one that takes (A).\n"
        "- The function of 'C' takes (), and 'C' has 1 parents. Give one that takes (A)."
    )


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"X": 1}, iv.InputError, "No value for 'Y', 'Z'. Give one for each input."),
        ({"x": 1}, iv.UnknownNameError, "Unknown variable 'x'.\nAllowed: O, S, X, Y, Z."),
        (
            {"X": 10, "Y": "a", "Z": 1},
            iv.InputError,
            "2 faults in the setting:\n"
            "- 'X' cannot be 10. Its values: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9.\n"
            "- 'Y' cannot be 'a'. Its values: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9.",
        ),
        (
            {"X": 1, "Y": 1, "Z": 1, "O": 28},
            iv.InputError,
            "'O' cannot be 28. Its values: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ... (28 in all).",
        ),
    ],
)
def test_what_cannot_be_set_is_refused_before_anything_is_computed(setting, error, message):
    with pytest.raises(error) as caught:
        sums().run(setting)
    assert str(caught.value) == message


def test_a_function_that_returns_something_undeclared_is_named():
    model = CausalModel(["A", "B"], {"A": range(3), "B": [0, 1]}, {"B": ["A"]}, {"B": lambda a: a})
    assert model.run({"A": 1})["B"] == 1
    with pytest.raises(iv.InputError) as caught:
        model.run({"A": 2})
    assert str(caught.value) == "The function of 'B' returned 2 for A=2: 'B' cannot be 2. Its values: 0, 1."


def test_unknown_variables_of_an_interchange_are_named():
    with pytest.raises(iv.UnknownNameError, match="Unknown variable 'T'"):
        sums().interchange({"X": 1, "Y": 1, "Z": 1}, {"T": {"X": 1, "Y": 1, "Z": 1}})
    with pytest.raises(iv.InputError, match="No value for 'Z'"):
        sums().interchange({"X": 1, "Y": 1, "Z": 1}, {"S": {"X": 1, "Y": 1}})


def test_variables_without_values_cannot_be_listed():
    model = CausalModel(["A", "B"], {}, {"B": ["A"]}, {"B": lambda a: a})
    for ask in (
        model.input_settings,
        lambda: model.equivalence_classes,
        lambda: model.live_paths({"A": 1}),
        model.sample_input,
    ):
        with pytest.raises(
            iv.InputError, match="Variable 'A' was declared without values, which are needed to "
        ):
            ask()


def test_too_many_settings_are_not_listed():
    model = CausalModel(
        ["A", "B", "C"], {"A": range(1000), "B": range(1000), "C": TRUTH}, {"C": "AB"}, {"C": operator.lt}
    )
    with pytest.raises(iv.InputError) as caught:
        model.counterfactual_dataset(1, ["C"])
    assert str(caught.value) == (
        "The parents of 'C' have 1000000 settings, more than 200000. Draw with sampler='uniform', or say in"
        " `equiv_classes` which settings make each value of 'C'."
    )
    assert len(model.counterfactual_dataset(2, ["C"], sampler="uniform")) == 2


def test_classes_can_be_said_instead_of_listed():
    rows = {True: [{"A": 1, "B": 2}], False: [{"A": 5, "B": 2}]}
    model = CausalModel(
        ["A", "B", "C"],
        {"A": range(1000), "B": range(1000), "C": TRUTH},
        {"C": "AB"},
        {"C": operator.lt},
        equiv_classes={"C": rows},
    )
    drawn = [model.sample_input(seed, balanced=True) for seed in range(20)]
    assert {tuple(setting.values()) for setting in drawn} == {(1, 2), (5, 2)}


def test_labels_are_the_numbers_or_the_places_of_values():
    assert both().label({"C": np.True_}) == 1
    colours = CausalModel(["A"], {"A": ["red", "green"]}, {}, {})
    assert [colours.label({"A": colour}) for colour in ("red", "green")] == [0, 1]
    signed = CausalModel(["A"], {"A": [-1, 1]}, {}, {})
    assert [signed.label({"A": value}) for value in (-1, 1)] == [0, 1]
    two = CausalModel(["A", "B"], {}, {}, {})
    with pytest.raises(iv.InputError, match=r"The model has 2 outputs: A, B\. Say which\."):
        two.label({"A": 1, "B": 2})
