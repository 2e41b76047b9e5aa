"""Ready-made tasks: what their data sets say is so, and the networks that solve them do so for the known reason."""

from __future__ import annotations

import re
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import intervenable as iv
from intervenable.causal import (
    arithmetic_carry,
    boolean_logic,
    capital_facts,
    filled,
    hierarchical_equality,
    indirect_objects,
    price_tagging,
)
from intervenable.small_lm import CAPITALS, NAMES, fact_prompts, indirect_object_prompts, price_prompts


def rows_of(dataset) -> list[dict]:
    return [dataset[index] for index in range(len(dataset))]


# --- hierarchical equality ----------------------------------------------------------------------------------


def pairs_alike(numbers: torch.Tensor) -> torch.Tensor:
    """`[rows, 2]`: whether both vectors of each pair are equal."""
    w, x, y, z = numbers.chunk(4, dim=-1)
    return torch.stack([(w == x).all(-1), (y == z).all(-1)], dim=-1)


@pytest.mark.parametrize(("width", "entities"), [(4, None), (2, None), (4, 10), (6, 3)])
def test_equality_is_seen_in_the_vectors_themselves(width, entities):
    task = hierarchical_equality(width, entities)
    factual = task.factual(200, seed=1).with_format("torch")[:]
    assert factual["input_ids"].shape == (200, 4 * width)
    alike = pairs_alike(factual["input_ids"])
    assert torch.equal(factual["labels"], (alike[:, 0] == alike[:, 1]).long())
    for place, name in enumerate(("WX", "YZ")):
        rows = task.counterfactual(200, name, seed=2).with_format("torch")[:]
        base, source = pairs_alike(rows["input_ids"]), pairs_alike(rows["source_input_ids"])
        assert torch.equal(rows["labels"], (source[:, place] == base[:, 1 - place]).long())
        assert torch.equal(rows["base_labels"], (base[:, 0] == base[:, 1]).long())
        assert torch.equal(rows["source_labels"], (source[:, 0] == source[:, 1]).long())


def test_examples_have_vectors_of_their_own_or_share_a_few():
    fresh = hierarchical_equality(4).factual(100).with_format("torch")["input_ids"][:]
    assert len(fresh.reshape(-1, 4).unique(dim=0)) > 200
    few = hierarchical_equality(4, entities=10).factual(100).with_format("torch")["input_ids"][:]
    assert len(few.reshape(-1, 4).unique(dim=0)) == 10
    again = hierarchical_equality(4, entities=10).factual(100, seed=9).with_format("torch")["input_ids"][:]
    both = torch.cat([few, again]).reshape(-1, 4)
    assert len(both.unique(dim=0)) == 10


def test_changes_of_the_answer_are_even_so_that_doing_nothing_is_right_half_the_time():
    rows = hierarchical_equality().counterfactual(200, "WX").with_format("torch")[:]
    assert (rows["labels"] == rows["base_labels"]).sum() == 100
    assert rows["labels"].sum() == 100


def share_right(
    model: iv.IntervenableModel, rows: dict, sources: list[torch.Tensor], subspaces=None
) -> float:
    _, output = model(rows["input_ids"], sources, subspaces=subspaces)
    return (output.argmax(-1) == rows["labels"]).double().mean().item()


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("name", ["WX", "YZ"])
def test_the_network_made_by_hand_answers_interchanges_exactly_at_its_known_neuron(name, width):
    task = hierarchical_equality(width)
    network = task.solved_by_hand()
    factual = task.factual(500, seed=3).with_format("torch")[:]
    assert torch.equal(network.model(factual["input_ids"]).argmax(-1), factual["labels"])
    rows = task.counterfactual(500, name, seed=4).with_format("torch")[:]
    model = iv.IntervenableModel(iv.RepresentationConfig(network.layer, where=0), network.model)
    sources = [rows["source_input_ids"]]
    [neuron], [other] = network.neurons[name], network.neurons["YZ" if name == "WX" else "WX"]
    assert share_right(model, rows, sources, [[[neuron]] * 500]) == 1.0
    # The other variable, and the whole layer, are something else.
    assert share_right(model, rows, sources, [[[other]] * 500]) < 0.8
    assert share_right(model, rows, sources) < 0.8


@pytest.mark.parametrize("name", ["WX", "YZ"])
def test_the_spread_network_answers_interchanges_exactly_along_its_known_direction_alone(name):
    task = hierarchical_equality()
    network = task.solved_by_hand(distributed=True, seed=5)
    rows = task.counterfactual(500, name, seed=6).with_format("torch")[:]
    sources = [rows["source_input_ids"]]
    assert network.neurons == {"WX": (), "YZ": ()}
    neurons = iv.IntervenableModel(iv.RepresentationConfig(network.layer, where=0), network.model)
    best = max(share_right(neurons, rows, sources, [[[neuron]] * 500]) for neuron in range(16))
    assert best < 0.8
    das = iv.IntervenableModel(
        iv.RepresentationConfig(
            network.layer,
            where=0,
            low_rank_dimension=1,
            intervention_type=iv.LowRankRotatedSpaceIntervention,
        ),
        network.model,
    )
    [intervention] = das.interventions.values()
    with torch.no_grad():
        intervention.rotation.weight.copy_(network.directions[name][:, None])
        assert share_right(das, rows, sources) == 1.0
        intervention.rotation.weight.copy_(torch.eye(16)[:, :1])
        assert share_right(das, rows, sources) < 0.8


def test_both_variables_at_once_are_two_neurons_with_sources_of_their_own():
    task = hierarchical_equality()
    network = task.solved_by_hand()
    rows = task.counterfactual(300, ["WX", "YZ"], seed=7).with_format("torch")[:]
    places = [iv.RepresentationConfig(network.layer, where=0, group_key=group) for group in (0, 1)]
    model = iv.IntervenableModel(iv.IntervenableConfig(places), network.model)
    sources = list(rows["source_input_ids"].unbind(1))
    assert share_right(model, rows, sources, [[[0]] * 300, [[1]] * 300]) == 1.0


def test_the_network_made_by_hand_is_the_same_each_time_and_frozen():
    first, second = (hierarchical_equality().solved_by_hand(distributed=True) for _ in range(2))
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width=0: a vector has 1 coordinate or more."),
        ({"entities": 1}, "entities=1: there are at least 2, or None for new ones in each example."),
        (
            {"width": 1, "entities": 50},
            "There is no room for 50 vectors of 1 coordinates 0.25 apart. Give a larger width.",
        ),
    ],
)
def test_equality_that_cannot_be_is_refused(arguments, message):
    with pytest.raises(iv.InputError) as caught:
        hierarchical_equality(**arguments)
    assert str(caught.value) == message


# --- Boolean logic ------------------------------------------------------------------------------------------

FORMULAS = st.recursive(
    st.sampled_from(["a", "b", "c", "d"]),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["and", "or", "==", "!=", "^"]), inner).map(
            lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
        ),
        inner.map(lambda part: f"(not {part})"),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=60)
@given(formula=FORMULAS.filter(lambda text: len(text) > 1))
def test_formulas_are_as_true_as_python_says(formula: str):
    model = boolean_logic(formula).model
    for values in product([False, True], repeat=len(model.inputs)):
        setting = dict(zip(model.inputs, values, strict=True))
        run = model.run(setting)
        for part in (*model.internal, model.output):
            assert run[part] == bool(eval(part, dict(setting))), part
    assert set(re.findall(r"\b[abcd]\b", formula)) == set(model.inputs)


def test_parts_of_a_formula_can_be_exchanged():
    task = boolean_logic("(a and b) or (c and d)")
    assert task.model.internal == ("a and b", "c and d")
    for row in rows_of(task.counterfactual(50, "a and b")):
        (a, b, c, d), source = row["input_ids"], row["source_input_ids"]
        assert row["base_labels"] == ((a and b) or (c and d))
        assert row["labels"] == ((source[0] and source[1]) or (c and d))


def test_a_part_that_occurs_twice_is_one_variable():
    model = boolean_logic("(a and b) ^ (a and b)").model
    assert model.internal == ("a and b",)
    assert model.run({"a": True, "b": True})[model.output] is False


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (
            "a and",
            "'a and' is no formula: invalid syntax. Use words with and, or, not, ==, !=, ^ and brackets.",
        ),
        ("a", "'a' has nothing to compute. Use words with and, or, not, ==, !=, ^ and brackets."),
        (
            "a and f(b)",
            "'f(b)' in 'a and f(b)' is not known here. Use words with and, or, not, ==, !=, ^ and brackets.",
        ),
        ("a == b == c", "'a == b == c' in 'a == b == c' is not known here."),
        ("__import__('os')", "is not known here"),
        ("", "is no formula"),
    ],
)
def test_what_is_no_formula_is_refused(formula, message):
    with pytest.raises(iv.InputError) as caught:
        boolean_logic(formula)
    assert message in str(caught.value)


# --- addition -----------------------------------------------------------------------------------------------


def number(digits: list[float]) -> int:
    tens, ones = digits[:10], digits[10:]
    assert sorted(tens) == sorted(ones) == [0.0] * 9 + [1.0]
    return 10 * tens.index(1) + ones.index(1)


def test_sums_are_right_and_another_carry_changes_the_tens_alone():
    task = arithmetic_carry()
    kinds = Counter()
    for row in rows_of(task.counterfactual(300)):
        first, second = number(row["input_ids"][:20]), number(row["input_ids"][20:])
        other = [number(row["source_input_ids"][start : start + 20]) for start in (0, 20)]
        assert row["base_labels"] == first + second
        assert row["source_labels"] == sum(other)
        carried = (first % 10 + second % 10) >= 10
        there = (other[0] % 10 + other[1] % 10) >= 10
        assert row["labels"] == first + second + 10 * (there - carried)
        kinds[there - carried] += 1
    assert set(kinds) == {-1, 0, 1}


def test_sums_in_words_are_the_same_sums():
    for row in rows_of(arithmetic_carry().in_words("{a} plus {b} is").counterfactual(50)):
        first, second = map(int, re.fullmatch(r"(\d+) plus (\d+) is", row["base"]).groups())
        assert row["base_label"] == f" {first + second}"
        start, end = row["base_places"]["b"]
        assert row["base"][start:end] == str(second)
    with pytest.raises(iv.InputError, match=r"give a prompt with {a} and {b} in it"):
        arithmetic_carry().in_words("{a} + 1 =")


# --- prices -------------------------------------------------------------------------------------------------


def prices(text: str) -> list[int]:
    return [int(found.replace(".", "")) for found in re.findall(r"\d\.\d\d", text)]


@pytest.mark.parametrize("name", ["left", "right"])
def test_prices_are_judged_by_the_numbers_in_the_prompt(name):
    words = {True: " yes", False: " no"}
    rows = rows_of(price_tagging().counterfactual(200, name))
    for row in rows:
        low, high, amount = prices(row["base"])
        other_low, other_high, other_amount = prices(row["source"])
        left, right = amount >= low, amount <= high
        assert row["base_label"] == words[left and right]
        assert row["source_label"] == words[other_low <= other_amount <= other_high]
        if name == "left":
            left = other_amount >= other_low
        else:
            right = other_amount <= other_high
        assert row["label"] == words[left and right]
        for place, value in zip(("low", "high", "amount"), (low, high, amount), strict=True):
            start, end = row["base_places"][place]
            assert row["base"][start:end] == f"{value / 100:.2f}"
    changes = Counter((row["base_label"], row["label"]) for row in rows)
    assert set(changes.values()) == {50}


def test_held_out_prices_are_those_of_the_shipped_model():
    """The two draw from the same brackets: none of the one kind is among the other."""

    def brackets(texts) -> set[tuple[int, ...]]:
        return {tuple(prices(text)[:2]) for text in texts}

    held_out = brackets(price_tagging(held_out=True).factual(2000)["base"])
    seen = brackets(price_tagging(held_out=False).factual(2000)["base"])
    trained = brackets(prompt.text for prompt in price_prompts(4000, held_out=False))
    assert not held_out & seen
    assert not held_out & trained
    assert seen & trained


# --- capitals -----------------------------------------------------------------------------------------------


def test_the_answer_is_the_capital_of_the_sources_country():
    task = capital_facts(phrasings=["The capital of {country} is", "{country} has a capital called"])
    rows = rows_of(task.counterfactual(300))
    country_of = {f" {capital}": country for country, capital in CAPITALS.items()}
    assert len({(row["base"], row["source"]) for row in rows}) == 300
    for row in rows:
        base, source = country_of[row["base_label"]], country_of[row["source_label"]]
        assert row["label"] == row["source_label"]
        assert base != source
        assert row["base"].replace(base, source) == row["source"]
        start, end = row["source_places"]["country"]
        assert row["source"][start:end] == source
    assert len({row["base"].startswith("The") for row in rows}) == 2


def test_countries_are_split_so_that_none_is_in_both_parts():
    train, test = capital_facts().split(20, seed=3)
    assert (len(train.countries), len(test.countries)) == (72, 20)
    assert set(train.countries) | set(test.countries) == set(CAPITALS)

    def asked(task) -> set[str]:
        rows = task.counterfactual(300)
        return {text for side in ("base", "source") for text in rows[side]}

    assert not asked(train) & asked(test)
    again = capital_facts().split(20, seed=3)[1].countries
    assert again == test.countries != capital_facts().split(20, seed=4)[1].countries


def test_capitals_of_ones_own_can_be_asked_for():
    task = capital_facts(capitals={"Bhutan": "Thimphu", "Samoa": "Apia"})
    assert task.countries == ("Bhutan", "Samoa")
    assert set(task.factual(20)["label"]) == {" Thimphu", " Apia"}


def test_all_pairs_can_be_had_and_no_more():
    task = capital_facts(["Spain", "Italy", "Peru"])
    assert len(task.counterfactual(6)) == 6
    with pytest.raises(iv.InputError) as caught:
        task.counterfactual(7)
    assert str(caught.value) == (
        "After 6 counterfactuals, 10000 draws in a row gave no other one about 'capital' that is not there yet. Ask"
        " for fewer, or for less."
    )


def test_countries_are_kept_where_the_model_tells_their_capital():
    tokenizer, model = iv.load_small_lm()
    countries = list(CAPITALS)[:20]
    texts = [f"The capital of {country} is" for country in countries]
    told = {
        prompt.text
        for prompt in fact_prompts() + fact_prompts(held_out=False)
        if prompt.text in texts
        and tokenizer.decode(model(**tokenizer(prompt.text, return_tensors="pt")).logits[0, -1].argmax())
        == prompt.answer
    }
    known = capital_facts(countries).known_by(model, tokenizer)
    assert {f"The capital of {country} is" for country in known.countries} == told
    unanswered = "{country} and {country} went to the store"
    both = capital_facts(["Spain", "Italy", "Peru"], [unanswered, "The capital of {country} is"])
    with pytest.raises(iv.InputError, match="there must be 2"):  # told in one phrasing is not told in each
        both.known_by(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    with pytest.raises(iv.InputError, match="there must be 2"):
        capital_facts(["Spain", "Italy"]).known_by(model, tokenizer)


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (
            lambda: capital_facts(["Spain", "Portugel"]),
            iv.UnknownNameError,
            "Unknown country 'Portugel'. Did you mean 'Portugal'?",
        ),
        (lambda: capital_facts(["Spain"]), iv.InputError, "countries=['Spain']: there must be 2"),
        (
            lambda: capital_facts(phrasings="The capital is"),
            iv.InputError,
            "phrasings=['The capital is']: give prompts, each with {country} in it.",
        ),
        (lambda: capital_facts(phrasings=[]), iv.InputError, "phrasings=[]: give prompts"),
        (
            lambda: capital_facts(["Spain", "Italy", "Peru"]).split(0.5),
            iv.InputError,
            "test=0.5 leaves 1 countries to train and 2 to test with. Each needs 2.",
        ),
    ],
)
def test_capitals_that_cannot_be_asked_for_are_refused(ask, error, message):
    with pytest.raises(error) as caught:
        ask()
    assert str(caught.value).startswith(message)


# --- indirect objects ---------------------------------------------------------------------------------------


def people(text: str) -> list[str]:
    return re.findall("|".join(NAMES), text)


def test_the_receiver_is_a_place_and_the_answer_a_person():
    rows = rows_of(indirect_objects().counterfactual(200))
    for row in rows:
        first, second, giver = people(row["base"])
        there_first, _, there_giver = people(row["source"])
        assert row["base_label"] == f" {second if giver == first else first}"
        assert row["label"] == f" {second if there_giver == there_first else first}"
        for name, person in zip(
            ("first_person", "second_person", "giver"), (first, second, giver), strict=True
        ):
            start, end = row["base_places"][name]
            assert row["base"][start:end] == person
    changed = sum(row["label"] != row["base_label"] for row in rows) / 200
    assert changed == pytest.approx(0.5, abs=0.12)


def test_a_source_has_the_phrasing_of_its_base():
    for row in rows_of(indirect_objects().counterfactual(60)):
        assert (
            re.sub("|".join(NAMES), "*", row["base"]).split()[:4][::3]
            == (re.sub("|".join(NAMES), "*", row["source"]).split()[:4][::3])
        )


def test_the_whole_answer_can_be_exchanged_too():
    for row in rows_of(indirect_objects().counterfactual(30, "answer")):
        assert row["label"] == row["source_label"]


def test_held_out_people_are_those_of_the_shipped_model():
    def pairs(texts) -> set[frozenset[str]]:
        return {frozenset(people(text)) for text in texts}

    held_out = pairs(indirect_objects(held_out=True).factual(1000)["base"])
    assert not held_out & pairs(prompt.text for prompt in indirect_object_prompts(2000, held_out=False))
    assert held_out & pairs(prompt.text for prompt in indirect_object_prompts(2000))


def test_phrasings_name_all_three_people():
    with pytest.raises(iv.InputError, match=r"each with {first}, {second}, {giver} in it"):
        indirect_objects("When {first} and {second} met, they gave a {object} to")
    rows = indirect_objects("{first} met {second}. {giver} waved to").factual(5)
    assert all(len(people(text)) == 3 for text in rows["base"])


# --- prompts ------------------------------------------------------------------------------------------------


@given(words=st.lists(st.text(max_size=5), min_size=3, max_size=3))
def test_places_of_a_prompt_are_where_its_words_are(words: list[str]):
    named = dict(zip("xyz", words, strict=True))
    written = filled("a {x}{y} {{b}} {z}.{x}", named)
    assert written.text == f"a {words[0]}{words[1]} {{b}} {words[2]}.{words[0]}"
    for name, (start, end) in written.places.items():
        assert written.text[start:end] == named[name]


def test_words_that_a_prompt_lacks_are_named():
    with pytest.raises(iv.InputError) as caught:
        filled("The capital of {land}", {"country": "Spain"})
    assert str(caught.value) == "'The capital of {land}' asks for {land}. Allowed: {country}."


@pytest.mark.parametrize(
    "task",
    [
        hierarchical_equality(),
        hierarchical_equality(entities=5),
        boolean_logic(),
        arithmetic_carry(),
        arithmetic_carry().in_words(),
        price_tagging(),
        capital_facts(),
        indirect_objects(),
    ],
    ids=["equality", "entities", "logic", "digits", "sums", "prices", "capitals", "people"],
)
def test_every_task_gives_the_same_rows_for_the_same_seed_and_others_for_another(task):
    for make in (task.factual, task.counterfactual):
        assert rows_of(make(12, seed=1)) == rows_of(make(12, seed=1))
        assert rows_of(make(12, seed=1)) != rows_of(make(12, seed=2))
        assert len(make(7)) == 7
