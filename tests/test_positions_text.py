"""Which characters each token makes, which tokens correspond, and who says what."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers_by_hand import (
    CHATML,
    INSTRUCTION,
    NO_SYSTEM,
    THINKS_AT_THE_END,
    WRITES_A_SYSTEM_PROMPT,
    byte_level,
    metaspace,
    word_piece,
)

import intervenable as iv
from intervenable.token_text import decoder, token_spans

TOKENIZERS = {
    "word level": lambda: iv.load_small_lm()[0],
    "byte level": byte_level,
    "word piece": word_piece,
    "metaspace": metaspace,
}
TEXT = "The capital of Spain is naïve 😀😀 embeddings, Madrid 日本"


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def view_of(tokenizer, text: str) -> iv.TokenView:
    return iv.TokenView(tuple(tokenizer(text)["input_ids"]), tokenizer)


# --- characters of tokens ---------------------------------------------------------------------------------


def characters_by_prefixes(tokenizer, ids) -> list[set[int]]:
    """By definition: what the text up to a token has more than the text before it. Slow; for whole characters."""
    texts = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
    return [set(range(len(before), len(after))) for before, after in itertools.pairwise(texts)]


def test_a_token_makes_the_characters_that_the_text_has_more_with_it(tokenizer):
    plain = "The capital of Spain, embeddings is Madrid."
    ids = tokenizer(plain)["input_ids"]
    view = iv.TokenView(tuple(ids), tokenizer)
    assert view.text == tokenizer.decode(ids)
    assert [set(range(*span)) for span in view.spans] == characters_by_prefixes(tokenizer, ids)


def test_a_character_of_several_tokens_belongs_to_each_of_them():
    view = view_of(byte_level(), "a 😀ï")
    assert view.text == "a 😀ï"
    assert [view.text[start:end] for start, end in view.spans] == ["a", " ", *["😀"] * 4, *["ï"] * 2]
    assert view.covering(2, 3) == (2, 3, 4, 5)


def test_bytes_of_sentencepiece_belong_to_their_characters():
    view = view_of(metaspace(), "😀😀 is")
    assert view.text == "<s> 😀😀 is"
    assert view.covering(4, 5) == (2, 3, 4, 5)
    assert view.covering(5, 6) == (6, 7, 8, 9)
    assert view.text[slice(*view.spans[10])] == " is"


def test_tokens_are_those_of_the_ids_one_by_one(tokenizer):
    view = view_of(tokenizer, TEXT)
    assert view.tokens == tuple(tokenizer.decode([token]) for token in view.ids)
    assert len(view) == len(view.ids) == len(view.spans)


def test_bytes_that_are_no_character_have_places_of_their_own():
    tokenizer = byte_level()
    byte = tokenizer("😀")["input_ids"][1]  # the second of four
    a = tokenizer("a")["input_ids"][0]
    text, spans = token_spans(decoder(tokenizer), [byte, byte, a])
    assert text == "\ufffd\ufffda"
    assert spans == ((0, 1), (1, 2), (2, 3))


@settings(deadline=None, max_examples=60)
@given(
    ids=st.lists(st.integers(0, 300), max_size=40),
    kind=st.sampled_from(["byte level", "metaspace", "word piece"]),
)
@example(ids=[3, 250, 250, 3], kind="byte level")
def test_tokens_of_any_ids_cover_the_text_without_a_gap(ids, kind):
    tokenizer = TOKENIZERS[kind]()
    ids = [token % len(tokenizer) for token in ids]
    text, spans = token_spans(decoder(tokenizer), ids)
    assert text == tokenizer.decode(ids)
    assert len(spans) == len(ids)
    assert [start for start, _ in spans] == sorted(start for start, _ in spans)
    assert {place for start, end in spans for place in range(start, end)} == set(range(len(text)))


WORDS = st.sampled_from(["Spain", "capital", "naïve", "😀", "日本", "is", "Madrid,", "embeddings", "x"])


@settings(deadline=None, max_examples=60)
@given(
    words=st.lists(WORDS, min_size=1, max_size=8),
    data=st.data(),
    kind=st.sampled_from(["byte level", "metaspace"]),
)
def test_the_tokens_of_a_part_of_the_text_decode_to_text_with_that_part(words, data, kind):
    tokenizer = TOKENIZERS[kind]()
    text = view_of(tokenizer, " ".join(words)).text
    start = data.draw(st.integers(0, len(text) - 1))
    part = text[start : data.draw(st.integers(start + 1, len(text)))]
    ids = tokenizer(" ".join(words))["input_ids"]
    chosen = iv.positions(tokenizer, ids, iv.Words(part, occurrence=0))
    assert chosen == list(range(chosen[0], chosen[-1] + 1))
    assert part.strip() in tokenizer.decode(ids[chosen[0] : chosen[-1] + 1])
    if len(chosen) > 2:  # and no token of it is there for nothing
        assert part.strip() not in tokenizer.decode(ids[chosen[1] : chosen[-1]])


def test_each_token_is_decoded_a_few_times_only(tokenizer):
    ids = tokenizer(TEXT * 20)["input_ids"]
    decoded = []

    def decode(part):
        decoded.extend(part)
        return tokenizer.decode(part)

    token_spans(decode, ids)
    assert len(ids) > 200
    assert len(decoded) < 30 * len(ids)


class OnlyDecodes:
    """A tokenizer that looks far back: the first token decides how all others are written."""

    def decode(self, token_ids) -> str:
        return ("-" if token_ids and token_ids[0] == 0 else "+") * len(token_ids)


def test_a_decoder_that_looks_far_back_is_still_followed():
    text, spans = token_spans(OnlyDecodes().decode, [0, *range(1, 30)])
    assert text == "-" * 30
    assert spans == tuple((place, place + 1) for place in range(30))


def test_only_decode_is_asked_of_a_tokenizer():
    assert iv.positions(OnlyDecodes(), [0, 1, 2], "--") == [0, 1]


# --- counterparts -----------------------------------------------------------------------------------------


def test_runs_of_one_length_are_paired_one_to_one():
    assert iv.align([1, 2, 3, 4], [1, 8, 9, 4]) == ((0, 0), (1, 1), (2, 2), (3, 3))


@pytest.mark.parametrize(
    ("unequal", "pairs"), [("last", ((0, 0), (1, 2), (2, 3))), ("skip", ((0, 0), (2, 3)))]
)
def test_runs_of_unequal_length_are_paired_at_their_ends_or_left_out(unequal, pairs):
    assert iv.align([1, 2, 3], [1, 8, 9, 3], unequal=unequal) == pairs


def test_tokens_that_only_one_has_are_left_out():
    assert iv.align([1, 2, 3], [1, 3]) == ((0, 0), (2, 1))
    assert iv.align([1, 3], [1, 2, 3]) == ((0, 0), (1, 2))


def test_unequal_runs_can_be_an_error():
    with pytest.raises(iv.LocationError) as caught:
        iv.align([1, 2, 3], [1, 8, 9, 3], unequal="error")
    assert str(caught.value) == (
        "From base position 1 on there are 1 tokens where the source has 2 (from position 1 on). unequal='last' pairs"
        " the last ones, unequal='skip' leaves such tokens out."
    )
    with pytest.raises(iv.LocationError, match="unequal='first' is unknown"):
        iv.align([1], [1], unequal="first")


@settings(deadline=None)
@given(
    base=st.lists(st.integers(0, 5), max_size=20),
    source=st.lists(st.integers(0, 5), max_size=20),
    unequal=st.sampled_from(["last", "skip"]),
)
def test_pairs_are_in_order_and_every_token_is_in_one_at_most(base, source, unequal):
    pairs = iv.align(base, source, unequal=unequal)
    for side in (0, 1):
        places = [pair[side] for pair in pairs]
        assert places == sorted(set(places))
    if base == source:
        assert pairs == tuple((place, place) for place in range(len(base)))


# --- roles ------------------------------------------------------------------------------------------------

CHAT = [
    {"role": "user", "content": "Is it Spain?"},
    {"role": "assistant", "content": "Rome 😀."},
    {"role": "user", "content": "Madrid"},
]


def chat(template: str, messages: list[dict[str, str]], prompted: bool = False):
    tokenizer = byte_level(template)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompted)
    ids = tokenizer(text)["input_ids"]

    def said(*role) -> str:
        return tokenizer.decode([ids[place] for place in iv.positions(tokenizer, ids, iv.Role(*role))])

    return said


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("template", [CHATML, INSTRUCTION, NO_SYSTEM, WRITES_A_SYSTEM_PROMPT])
def test_a_role_chooses_what_it_says_and_nothing_of_the_template(template, prompted):
    said = chat(template, CHAT, prompted)
    assert said("user", 0).strip() == "Is it Spain?"
    assert said("user", -1).strip() == "Madrid"
    assert said("assistant").strip() == said("assistant", -1).strip() == "Rome 😀."
    assert [word for word in said("user").split() if word] in (
        ["Is", "it", "Spain?Madrid"],
        ["Is", "it", "Spain?", "Madrid"],
    )


@pytest.mark.parametrize("template", [CHATML, INSTRUCTION, WRITES_A_SYSTEM_PROMPT])
def test_a_system_prompt_is_not_taken_for_the_user(template):
    said = chat(template, [{"role": "system", "content": "Be brief."}, *CHAT])
    assert said("system").strip() == "Be brief."
    assert said("user", 0).strip() == "Is it Spain?"


def test_a_thought_that_the_template_writes_is_nobodys_words():
    said = chat(THINKS_AT_THE_END, CHAT[:2])
    assert said("assistant").strip() == "Rome 😀."
    assert chat(THINKS_AT_THE_END, [*CHAT, CHAT[1]])("assistant", 0).strip() == "Rome 😀."


def test_a_system_prompt_that_the_template_writes_belongs_to_the_system():
    assert chat(WRITES_A_SYSTEM_PROMPT, CHAT)("system") == "Be kind."


@pytest.mark.parametrize(
    ("role", "message"),
    [
        (iv.Role("system"), r"Nobody speaks as 'system' in the text of example 0, "),
        (
            iv.Role("user", 5),
            r"Turn 5 of 'user' is out of range for example 0, which has turns 0 to 1 \(or -2 to -1\)",
        ),
    ],
)
def test_who_does_not_speak_is_missed(role, message):
    tokenizer = byte_level(CHATML)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    with pytest.raises(iv.LocationError, match=message):
        iv.positions(tokenizer, text, role)


def test_roles_need_a_chat_template_and_a_text_made_with_it():
    with pytest.raises(iv.LocationError, match="has no chat template"):
        iv.positions(byte_level(), "Spain", iv.Role("user"))
    with pytest.raises(iv.LocationError, match="'Spain' is not laid out by the tokenizer's chat template"):
        iv.positions(byte_level(CHATML), "Spain", iv.Role("user"))
    with pytest.raises(
        iv.LocationError, match=r"Role 'bot' is unknown\. Allowed: 'user', 'assistant', 'system'"
    ):
        iv.Role("bot")
