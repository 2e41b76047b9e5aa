"""The language model that ships with the library knows what its card says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import intervenable.small_lm
from intervenable.small_lm import (
    CAPITALS,
    NAMES,
    Prompt,
    fact_prompts,
    indirect_object_prompts,
    load_small_lm,
    price_prompts,
)

FOLDER = Path(intervenable.small_lm.__file__).parent
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
HELD_OUT = {
    "facts": fact_prompts(),
    "indirect objects": indirect_object_prompts(1000),
    "prices": price_prompts(1000),
}


@pytest.fixture(scope="module")
def small_lm():
    return load_small_lm()


def answers(small_lm, texts: list[str], padding_side: str = "left") -> list[str]:
    """The most likely next token of each text, read at its last real token."""
    tokenizer, model = small_lm
    said = []
    for start in range(0, len(texts), 250):
        batch = tokenizer(
            texts[start : start + 250], return_tensors="pt", padding=True, padding_side=padding_side
        )
        length = batch["attention_mask"].shape[1]
        last = (batch["attention_mask"] * torch.arange(length)).argmax(-1)
        with torch.inference_mode():
            logits = model(**batch).logits
        said += tokenizer.batch_decode(logits[torch.arange(len(last)), last].argmax(-1)[:, None])
    return said


def accuracy(small_lm, prompts: list[Prompt]) -> float:
    said = answers(small_lm, [prompt.text for prompt in prompts])
    return sum(word == prompt.answer for word, prompt in zip(said, prompts, strict=True)) / len(prompts)


@pytest.mark.parametrize("task", HELD_OUT)
def test_held_out_accuracy_is_high_and_is_what_the_card_says(small_lm, task):
    measured = accuracy(small_lm, HELD_OUT[task])
    count, stated = re.search(rf"^\| {task} \|.*\| (\d+) \| ([\d.]+) \|$", CARD, re.MULTILINE).groups()
    assert measured >= 0.95
    assert len(HELD_OUT[task]) == int(count)
    # One prompt in a thousand may fall the other way on another processor.
    assert measured == pytest.approx(float(stated), abs=0.003)


def test_every_capital_is_known_in_the_phrasing_of_the_tutorials(small_lm):
    said = answers(small_lm, [f"The capital of {country} is" for country in CAPITALS])
    assert said == [f" {capital}" for capital in CAPITALS.values()]


def test_no_held_out_prompt_is_a_training_prompt():
    assert not {prompt.text for prompt in fact_prompts()} & {
        prompt.text for prompt in fact_prompts(held_out=False)
    }
    for make in (indirect_object_prompts, price_prompts):
        trained = {prompt.text for prompt in make(5000, seed=1, held_out=False)}
        assert not {prompt.text for prompt in make(5000, seed=2)} & trained


def test_held_out_names_and_brackets_never_occur_together_in_training():
    def pairs(prompts: list[Prompt]) -> set[frozenset[str]]:
        return {frozenset((prompt.answer, prompt.foil)) for prompt in prompts}

    def brackets(prompts: list[Prompt]) -> set[str]:
        return {re.search(r"between (\S+ and \S+) ", prompt.text)[1] for prompt in prompts}

    assert not pairs(indirect_object_prompts(5000)) & pairs(indirect_object_prompts(5000, held_out=False))
    assert not brackets(price_prompts(5000)) & brackets(price_prompts(5000, held_out=False))


def test_each_country_is_held_out_of_some_phrasings_and_seen_in_most():
    for country, capital in CAPITALS.items():
        for answer in (f" {country}", f" {capital}"):
            held_out = sum(prompt.answer == answer for prompt in fact_prompts())
            seen = sum(prompt.answer == answer for prompt in fact_prompts(held_out=False))
            assert 1 <= held_out <= 2
            assert seen >= 5


def test_price_answers_follow_from_the_prices():
    prompts = price_prompts(2000) + price_prompts(2000, held_out=False)
    for prompt in prompts:
        low, high, amount = map(float, re.findall(r"\d\.\d\d", prompt.text))
        assert prompt.answer == (" yes" if low <= amount <= high else " no")
        assert prompt.foil == (" no" if low <= amount <= high else " yes")
    assert 0.45 < sum(prompt.answer == " yes" for prompt in prompts) / len(prompts) < 0.55


def test_the_indirect_object_is_named_once_and_the_giver_twice():
    for prompt in indirect_object_prompts(500):
        words = re.findall(r"\w+", prompt.text)
        assert words.count(prompt.answer.strip()) == 1
        assert words.count(prompt.foil.strip()) == 2


def test_the_same_seed_gives_the_same_prompts_and_another_seed_others():
    for make in (indirect_object_prompts, price_prompts):
        assert make(20, seed=3) == make(20, seed=3)
        assert make(20, seed=3) != make(20, seed=4)


def test_names_countries_and_capitals_are_one_token_with_their_space_and_without(small_lm):
    tokenizer, _ = small_lm
    for word in (*NAMES, *CAPITALS, *CAPITALS.values(), *("yes", "no")):
        for spelled in (word, f" {word}") if word not in ("yes", "no") else (f" {word}",):
            ids = tokenizer(spelled)["input_ids"]
            assert len(ids) == 1
            assert tokenizer.decode(ids) == spelled


def test_decoding_gives_the_text_back(small_lm):
    tokenizer, _ = small_lm
    for prompts in HELD_OUT.values():
        for prompt in prompts[:200]:
            text = f"{prompt.text}{prompt.answer}."
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_subject_is_the_fourth_of_five_tokens(small_lm):
    tokenizer, _ = small_lm
    ids = tokenizer("The capital of Spain is")["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["The", " capital", " of", " Spain", " is"]


def test_padding_on_either_side_changes_no_answer(small_lm):
    texts = ["The capital of Spain is", "Paris is the capital of", *(p.text for p in HELD_OUT["prices"][:3])]
    alone = [answers(small_lm, [text])[0] for text in texts]
    assert alone[:2] == [" Madrid", " France"]
    assert answers(small_lm, texts, "left") == alone
    assert answers(small_lm, texts, "right") == alone


def test_generation_ends_the_sentence_and_stops(small_lm):
    tokenizer, model = small_lm
    ids = model.generate(
        **tokenizer("The capital of Spain is", return_tensors="pt"), max_new_tokens=10, do_sample=False
    )
    assert tokenizer.decode(ids[0], skip_special_tokens=True).startswith("The capital of Spain is Madrid.")
    assert ids.shape[1] < 15
    assert ids[0, -1] == tokenizer.eos_token_id


def test_plain_transformers_loads_the_folder(small_lm):
    tokenizer, model = small_lm
    plain = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)
    batch = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)(
        " Mary and John went to the store.", return_tensors="pt"
    )
    assert (
        batch["input_ids"].tolist()
        == tokenizer(" Mary and John went to the store.", return_tensors="pt")["input_ids"].tolist()
    )
    with torch.inference_mode():
        assert torch.equal(plain(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("shows_bars", [True, False])
def test_loading_draws_no_progress_bar_and_leaves_the_setting_as_it_was(capfd, shows_bars):
    def choose(shows: bool) -> None:
        (logging.enable_progress_bar if shows else logging.disable_progress_bar)()

    before = logging.is_progress_bar_enabled()
    choose(shows_bars)
    try:
        load_small_lm()
        assert "Loading" not in capfd.readouterr().err
        assert logging.is_progress_bar_enabled() == shows_bars
        AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True)
        assert ("Loading" in capfd.readouterr().err) == shows_bars
    finally:
        choose(before)


def test_the_model_is_small_and_its_widths_differ(small_lm):
    _, model = small_lm
    attention = model.model.layers[0].self_attn
    widths = {
        model.config.hidden_size,
        attention.q_proj.out_features,
        attention.k_proj.out_features,
        model.config.intermediate_size,
        model.config.vocab_size,
    }
    assert len(widths) == 5
    assert (FOLDER / "model.safetensors").stat().st_size <= 5_000_000
    assert model.dtype == torch.float32
    assert not model.training


def swap_share(small_lm, layer: int, position: int) -> float:
    """How often a swap of one block output, between countries, makes the model say the other's capital."""
    tokenizer, model = small_lm
    batch = tokenizer([f"The capital of {country} is" for country in CAPITALS], return_tensors="pt")

    def swap(_module, _args, output):
        result = output.clone()
        result[:, position] = output[:, position].roll(-1, dims=0)
        return result

    handle = model.model.layers[layer].register_forward_hook(swap)
    with torch.inference_mode():
        said = model(**batch).logits[:, -1].argmax(-1)
    handle.remove()
    capitals = list(CAPITALS.values())
    wanted = [f" {capital}" for capital in capitals[1:] + capitals[:1]]
    return sum(tokenizer.decode([a]) == b for a, b in zip(said.tolist(), wanted, strict=True)) / len(wanted)


def test_a_fact_moves_from_the_subject_to_the_last_token_as_the_card_shows(small_lm):
    stated = re.findall(r"^\| (\d+) \| ([\d.]+) \| ([\d.]+) \|$", CARD, re.MULTILINE)
    assert len(stated) == len(small_lm[1].model.layers)
    for layer, subject, last in stated:
        assert swap_share(small_lm, int(layer), 3) == pytest.approx(float(subject), abs=0.03)
        assert swap_share(small_lm, int(layer), 4) == pytest.approx(float(last), abs=0.03)
    # Early the fact is with its subject, late with the last token: a map of it has a turn in the middle.
    for layer in (0, 1, 2):
        assert swap_share(small_lm, layer, 3) > 0.95 > 0.05 > swap_share(small_lm, layer, 4)
    for layer in (4, 5):
        assert swap_share(small_lm, layer, 4) > 0.95 > 0.05 > swap_share(small_lm, layer, 3)
