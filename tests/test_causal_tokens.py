"""Texts of tasks as tokens: what the tokenizer writes, answers as the tokens that follow, places where they stand."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from tokenizers_by_hand import byte_level, metaspace, word_piece

import intervenable as iv
from intervenable.causal import arithmetic_carry, capital_facts, price_tagging, tokenized
from intervenable.causal_tokens import answer_token
from scripts.fetch_smollm2 import smollm2_folder

KINDS = {"byte level": byte_level, "metaspace": metaspace}


class Slow:
    """A tokenizer that does not say which letters its tokens write."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pad_token_id = None
        self.eos_token_id = None

    def __call__(self, texts, add_special_tokens=True):
        return {"input_ids": self.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]}

    def decode(self, ids) -> str:
        return self.tokenizer.decode(ids)


@pytest.fixture(scope="module")
def small():
    return iv.load_small_lm()


def countries() -> Dataset:
    return capital_facts(["Spain", "Italy"]).counterfactual(2)


def real(row, side="") -> list[int]:
    pairs = zip(row[f"{side}input_ids"], row[f"{side}attention_mask"], strict=True)
    return [token for token, there in pairs if there]


# --- ids ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", [*KINDS, "slow"])
def test_ids_are_those_of_the_tokenizer_padded_on_its_side(kind, padding_side):
    tokenizer = Slow(byte_level()) if kind == "slow" else KINDS[kind]()
    plain = byte_level() if kind == "slow" else tokenizer
    data = capital_facts(
        ["Spain", "Italy", "Liechtenstein"],
        capitals={"Spain": "Madrid", "Italy": "Rome", "Liechtenstein": "Vaduz"},
    ).counterfactual(6)
    before = plain.padding_side
    tokenizer.padding_side = padding_side
    try:
        rows = tokenized(data, tokenizer, labels="first")
    finally:
        plain.padding_side = before
    lengths = set()
    for row in rows:
        for side, text in (("", row["base"]), ("source_", row["source"])):
            assert real(row, side) == plain(text)["input_ids"]
            lengths.add(len(row[f"{side}input_ids"]))
            mask = row[f"{side}attention_mask"]
            assert mask == sorted(mask, reverse=padding_side == "right")
    assert len(lengths) == 1
    assert 0 in {there for row in rows for there in row["attention_mask"]}


def test_padding_can_be_left_out_or_given(small):
    tokenizer, _ = small
    data = Dataset.from_dict({"base": ["The capital of Spain is", "Spain's capital is"]})
    ragged = tokenized(data, tokenizer, padding=False)
    assert ragged["input_ids"][:] == tokenizer(data["base"][:])["input_ids"]
    assert {len(ids) for ids in tokenized(data, tokenizer, padding=9)["input_ids"]} == {9}
    with pytest.raises(iv.InputError) as caught:
        tokenized(data, tokenizer, padding=4)
    assert str(caught.value) == "padding=4, and the longest text has 5 tokens. Give at least as many."


def test_what_comes_out_are_tensors_that_the_model_takes(small):
    tokenizer, model = small
    data = tokenized(price_tagging().factual(30), tokenizer).with_format("torch")[:]
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[:, -1]
    assert (logits.argmax(-1) == data["labels"]).float().mean() > 0.9


def test_several_sources_are_one_beside_the_other(small):
    tokenizer, _ = small
    rows = tokenized(price_tagging().counterfactual(5, ["left", "right"]), tokenizer, positions="high")
    tensors = rows.with_format("torch")[:]
    assert tensors["source_input_ids"].shape == (5, 2, 32)
    assert tensors["source_labels"].shape == (5, 2)
    assert tensors["source_position"].shape == (5, 2, 1)
    assert tensors["base_position"].shape == (5, 1)
    for row in rows:
        for text, ids, label, answer in zip(
            row["source"], row["source_input_ids"], row["source_labels"], row["source_label"], strict=True
        ):
            assert ids == tokenizer(text)["input_ids"]
            assert tokenizer.decode([label]) == answer


def test_texts_stay_and_columns_of_ones_own_too(small):
    tokenizer, _ = small
    data = countries().add_column("mine", [3, 4])
    rows = tokenized(data, tokenizer)
    assert rows["mine"][:] == [3, 4]
    assert rows["base"][:] == data["base"][:]
    assert "base_places" not in rows.column_names
    assert "base_position" not in rows.column_names
    assert data.column_names[-1] == "mine"


# --- answers ------------------------------------------------------------------------------------------------


def test_answers_are_the_tokens_that_follow(small):
    tokenizer, _ = small
    for row in tokenized(capital_facts().counterfactual(30), tokenizer):
        for text, answer, token in (
            (row["base"], row["label"], row["labels"]),
            (row["base"], row["base_label"], row["base_labels"]),
            (row["source"], row["source_label"], row["source_labels"]),
        ):
            assert [*tokenizer(text)["input_ids"], token] == tokenizer(text + answer)["input_ids"]


def test_an_answer_in_a_text_may_be_another_token_than_alone():
    """Metaspace tokenizers put a sign for a space before whatever they are given."""
    tokenizer = metaspace()
    token = answer_token(tokenizer, "The capital of Spain is", ",")
    assert tokenizer.convert_ids_to_tokens(token) == ","
    assert tokenizer.convert_ids_to_tokens(tokenizer(",")["input_ids"][1]) == "▁"


def test_answers_of_several_tokens_are_refused_or_stand_for_their_first():
    with pytest.raises(iv.InputError) as caught:
        answer_token(metaspace(), "The capital of Spain is", " Madrid")
    assert str(caught.value) == (
        "The answer ' Madrid' of row 0 is 2 tokens: 'Mad', 'rid'. Choose answers of one token, or have the first"
        " stand for them: labels='first'."
    )
    assert metaspace().convert_ids_to_tokens(answer_token(metaspace(), "The", " Madrid", "first")) == "▁Mad"


def test_an_answer_that_runs_into_its_text_is_refused():
    tokenizer = byte_level()
    whole, alone = (tokenizer(text)["input_ids"] for text in ("The capital", "The cap"))
    assert whole[: len(alone)] != alone
    with pytest.raises(iv.InputError) as caught:
        answer_token(tokenizer, "The cap", "ital")
    assert str(caught.value) == (
        "The answer 'ital' of row 0 runs into the last token of its text 'The cap', so that no token begins it. Give"
        " it a leading space: ' ital'."
    )
    for text, answer in (("The cap", "ital of Spain is"), ("The capital", "")):
        with pytest.raises(iv.InputError, match="no token begins it"):
            answer_token(tokenizer, text, answer, "first")


# --- positions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "slow", "slow with a token before"])
@pytest.mark.parametrize("place", ["a", "b"])
def test_places_are_the_tokens_that_write_them(kind, place):
    """Numbers of one and two digits, some of which occur within others."""
    slow = {"slow": byte_level, "slow with a token before": metaspace}
    tokenizer = Slow(slow[kind]()) if kind in slow else KINDS[kind]()
    data = arithmetic_carry().in_words("{a} + {b} =").counterfactual(40)
    found = tokenized(data, tokenizer, positions=place, take="all", labels="first")
    first, last = (
        tokenized(data, tokenizer, positions=place, take=end, labels="first") for end in ("first", "last")
    )
    for index, row in enumerate(found):
        for side, text, column in (
            ("base", row["base"], "input_ids"),
            ("source", row["source"], "source_input_ids"),
        ):
            start, end = data[index][f"{side}_places"][place]
            chosen = row[f"{side}_position"]
            tokens = real(row, column.removesuffix("input_ids"))
            written = tokenizer.decode([tokens[position] for position in chosen])
            assert written.strip() == text[start:end]
            assert first[index][f"{side}_position"] == chosen[0]
            assert last[index][f"{side}_position"] == chosen[-1]


def test_positions_count_real_tokens_whatever_the_padding():
    data = Dataset.from_dict(
        {"base": ["Spain is", "The capital of Spain is"], "base_places": [{"it": [0, 5]}, {"it": [15, 20]}]}
    )
    rows = []
    for side in ("left", "right"):
        tokenizer = word_piece()
        tokenizer.padding_side = side
        rows.append(tokenized(data, tokenizer, positions="it", take="first")["base_position"][:])
    assert rows[0] == rows[1]
    tokens = word_piece().convert_ids_to_tokens(word_piece()(data["base"][1])["input_ids"])
    assert tokens[rows[0][1]].startswith("s")  # written without capitals
    assert tokens[0] == "[CLS]"


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("last", 4),
        (1, 1),
        (-2, 3),
        (iv.Words("capital"), 1),
        (["country", "last"], [3, 4]),
        ([iv.Except("all", ["country", 0])], [1, 2, 4]),
        (["first", "last"], [0, 4]),
    ],
)
def test_positions_may_be_said_in_any_of_the_usual_ways(small, entry, expected):
    tokenizer, _ = small
    rows = tokenized(countries(), tokenizer, positions=entry)
    assert rows["base_position"][:] == rows["source_position"][:] == [expected] * 2


def test_a_place_that_the_task_does_not_have_is_named_with_those_it_has(small):
    with pytest.raises(iv.LocationError) as caught:
        tokenized(countries(), small[0], positions="capitol")
    assert str(caught.value).startswith(
        "Row 0: 'capitol' is no name, and does not occur in the text of example 0"
    )
    assert str(caught.value).endswith(" Places of the task: 'country'.")


def test_where_some_places_are_longer_each_example_has_a_list():
    data = arithmetic_carry().in_words().factual(30)
    rows = tokenized(data, byte_level(), positions="a", take="all", labels="first")["base_position"][:]
    assert {len(chosen) for chosen in rows} == {1, 2}
    assert tokenized(data, byte_level(), positions="a", labels="first")["base_position"][:] == [
        chosen[-1] for chosen in rows
    ]


def test_a_name_that_everyone_knows_keeps_its_meaning():
    data = Dataset.from_dict({"base": ["The capital"], "base_places": [{"last": [0, 3]}]})
    [found] = tokenized(data, byte_level(), positions="last")["base_position"]
    assert found == len(byte_level()("The capital")["input_ids"]) - 1


def test_names_of_a_resolver_are_known(small):
    tokenizer, _ = small
    resolver = iv.PositionResolver(tokenizer, names={"relation": iv.Words("capital")})
    assert tokenized(countries(), resolver, positions="relation")["base_position"][:] == [1, 1]


def test_a_place_that_no_token_writes_is_an_error():
    data = Dataset.from_dict({"base": ["Spain"], "base_places": [{"it": [5, 5]}]})
    with pytest.raises(iv.LocationError, match="no token that writes ''"):
        tokenized(data, byte_level(), positions="it")


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ({"text": ["a"]}, {}, "The data set has no column 'base' of texts, but text."),
        ({"base": ["a"]}, {"take": "middle"}, "take='middle' is unknown. Allowed: 'all', 'first', 'last'."),
        ({"base": ["a"]}, {"labels": "all"}, "labels='all' is unknown. Allowed: 'single', 'first'."),
        ({"base": ["a"]}, {"padding": -1}, "padding=-1: give True, False, or a number of tokens."),
        (
            {"base": ["a"]},
            {"padding": "longest"},
            "padding='longest': give True, False, or a number of tokens.",
        ),
    ],
)
def test_what_cannot_be_tokenized_is_said(small, data, options, message):
    with pytest.raises(iv.InputError) as caught:
        tokenized(Dataset.from_dict(data), small[0], **options)
    assert str(caught.value).startswith(message)


def test_a_tokenizer_that_only_decodes_is_refused():
    class Decodes:
        def decode(self, ids) -> str:
            return ""

    with pytest.raises(iv.InputError, match=r"Decodes does not encode text\. Give the model's tokenizer\."):
        tokenized(countries(), Decodes())


# --- the way to a result ------------------------------------------------------------------------------------


def test_the_capital_of_the_source_is_answered_where_the_country_is_swapped(small):
    """What all of this is for: at the country's token, early on, the swap is the interchange."""
    tokenizer, lm = small
    data = tokenized(capital_facts().counterfactual(60), tokenizer, positions="country").with_format("torch")[
        :
    ]
    model = iv.IntervenableModel(iv.RepresentationConfig(0, "block_input"), lm)
    where = {
        "sources->base": (
            [[[position] for position in data["source_position"].tolist()]],
            [[[position] for position in data["base_position"].tolist()]],
        )
    }
    base, source = (
        {name: data[f"{side}{name}"] for name in ("input_ids", "attention_mask")} for side in ("", "source_")
    )
    with torch.no_grad():
        _, output = model(base, [source], where)
    answers = output.logits[:, -1].argmax(-1)
    assert (answers == data["labels"]).float().mean() > 0.9
    assert (answers == data["base_labels"]).float().mean() < 0.1


@pytest.mark.smollm2
def test_smollm2_tells_more_than_sixty_capitals_that_begin_with_tokens_of_their_own():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = str(smollm2_folder(download=False))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    task = capital_facts(phrasings="The capital and largest city of {country} is")
    assert len(task.apart_in(tokenizer).countries) == 90
    known = task.known_by(model, tokenizer)
    assert len(known.countries) >= 60
    train, test = known.split(0.25)
    data = tokenized(test.counterfactual(20), tokenizer, positions="country", labels="first")
    for row in data:
        country = row["base"].removeprefix("The capital and largest city of ").removesuffix(" is")
        tokens = tokenizer.convert_ids_to_tokens(row["input_ids"])
        assert country.endswith(tokens[row["base_position"]].strip("Ġ"))
        assert country not in train.countries
