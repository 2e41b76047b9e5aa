"""Positions as people say them: every form, what it chooses, and what is said where it chooses nothing."""

from __future__ import annotations

import io
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_by_hand import byte_level, word_piece

import intervenable as iv
from intervenable.position_entries import entry_from_json, entry_to_json
from intervenable.position_reading import resolve, resolve_aligned

TEN = list(range(10))
TEXT = "The capital of Spain is Madrid. The capital of Italy is Rome."


@pytest.fixture(scope="module")
def tokenizer():
    return iv.load_small_lm()[0]


def chosen(entry, ids=TEN, **options) -> list[int]:
    return iv.PositionResolver(None, **options).positions(ids, entry)


# --- numbers and names: the table of A.6, ten tokens ------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "positions"),
    [
        (3, [3]),
        (-1, [9]),
        (-10, [0]),
        (torch.tensor(3), [3]),
        (slice(2, 5), [2, 3, 4]),
        (slice(None, None, 4), [0, 4, 8]),
        (range(7, 10), [7, 8, 9]),
        (iv.Span(2, 5), [2, 3, 4]),
        (iv.Span(7, 10), [7, 8, 9]),
        (iv.Span(2, -1), [2, 3, 4, 5, 6, 7, 8]),
        (iv.Span(-3, 10), [7, 8, 9]),
        ("first", [0]),
        ("last", [9]),
        ("last-1", [9]),
        ("last-2", [8]),
        ("last-3", [7]),
        ("last-4", [6]),
        ("last-10", [0]),
        ("all", TEN),
        ([0, "last", slice(3, 5)], [0, 9, 3, 4]),
        (iv.Segment(0, pivots=[4]), [0, 1, 2, 3]),
        (iv.Segment(1, pivots=(4,)), [4, 5, 6, 7, 8, 9]),
        (iv.Segment(-1, pivots=[8, 2, 2]), [8, 9]),
        (iv.Segment(1, pivots=[2, -2]), [2, 3, 4, 5, 6, 7]),
        (iv.Segment(0, pivots=[]), TEN),
        (lambda view: len(view) // 2, [5]),
        (lambda view: [0, -1], [0, 9]),
        (lambda view: slice(8, None), [8, 9]),
        (iv.PerExample([4]), [4]),
    ],
)
def test_an_entry_chooses_among_ten_tokens(entry, positions):
    assert chosen(entry) == positions


@pytest.mark.parametrize(
    ("request_", "group"),
    [
        ((2, 5), (2, 3, 4)),
        ((7, 10), (7, 8, 9)),
        ((2, -1), (2, 3, 4, 5, 6, 7, 8)),
        ("last-3", (7,)),
        ("inputs-partition-0", (0, 1, 2, 3)),
        ("inputs-partition-1", (4, 5, 6, 7, 8, 9)),
        (4, (4,)),
        (-10, (0,)),
        ([1, 3], (1, 3)),
    ],
)
def test_requests_are_groups_in_the_order_of_the_requests(request_, group):
    resolver = iv.PositionResolver(None, pivots=[4])
    assert resolver.groups([request_, 0, request_], TEN) == [(group, (0,), group)]


def test_groups_are_told_for_each_example_by_itself():
    inputs = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]]),
    }
    assert iv.PositionResolver(None).groups(["last", (0, 2)], inputs) == [((1,), (0, 1)), ((3,), (0, 1))]


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (
            [(1, 2, 3)],
            r"The request (1, 2, 3) is no half-open range (a, b). Write a list for a set of positions: [1, 2, 3].",
        ),
        ("last", "'last' is no list of requests. Give one: ['last']."),
    ],
)
def test_requests_that_say_nothing_are_refused(requests, message):
    with pytest.raises(iv.LocationError) as caught:
        iv.PositionResolver(None).groups(requests, TEN)
    assert str(caught.value) == message


RANGE = "is out of range for example 0, which has positions 0 to 9 (or -10 to -1)"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (10, f"Position 10 {RANGE}."),
        (-11, f"Position -11 {RANGE}."),
        ("last-11", f"Position -11 {RANGE}."),
        (range(9, 11), f"Position 10 {RANGE}."),
        (iv.Span(2, 11), f"Span(start=2, stop=11) {RANGE}; the stop, which is left out, may be 10."),
        (
            iv.Segment(2, pivots=[4]),
            "Segment 2 is out of range for example 0, which its pivots 4 divide into segments 0 to 1.",
        ),
    ],
)
def test_what_does_not_exist_is_out_of_range(entry, message):
    with pytest.raises(iv.LocationRangeError) as caught:
        chosen(entry)
    assert str(caught.value) == message


NOTHING = "chooses nothing for example 0, which has positions 0 to 9 (or -10 to -1)."


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (slice(20, None), f"slice(20, None, None) {NOTHING}"),
        (iv.Span(5, 5), f"Span(start=5, stop=5) {NOTHING}"),
        ([], f"[] {NOTHING}"),
        (iv.Segment(0, pivots=[0]), f"Segment(index=0, pivots=(0,)) {NOTHING}"),
        (
            (2, 5),
            "(2, 5) is not a position. A tuple is a (source, base) pair of whole locations. Write a list for a set of"
            " positions, and Span(2, 5) for a half-open range.",
        ),
        (
            True,
            "True is not a position. Give an int (-1 is the last), a slice, a name such as 'last', a part of the"
            " text, or a list of them.",
        ),
        (
            2.0,
            "2.0 is not a position. Give an int (-1 is the last), a slice, a name such as 'last', a part of the text,"
            " or a list of them.",
        ),
        (None, "None is not a position. Write 'all' for all of them."),
        ("", "'' is not a position. Give a name such as 'last', or a part of the text."),
        ("last-0", "'last-0' is no position: 'last' is the last one, 'last-2' that before."),
        (iv.PerExample([1, 2]), "PerExample has 2 entries, and the batch has 1 examples. Give one for each."),
        (
            "Spain",
            "'Spain' is looked for in the text of example 0, and there is no tokenizer to tell it. Give one:"
            " IntervenableModel(config, model, tokenizer=...), or say where by ints.",
        ),
        (
            "lst",
            "'lst' is looked for in the text of example 0, and there is no tokenizer to tell it. Did you mean 'last'?"
            " Give one: IntervenableModel(config, model, tokenizer=...), or say where by ints.",
        ),
        (
            "all-image",
            "'all-image' speaks of classes of tokens, and no class is known. Declare it: PositionResolver(tokenizer,"
            " classes={'image': (start, special, end)}).",
        ),
        (
            iv.Aligned("all"),
            "Aligned(entry='all', unequal='last') is about a source and a base together: give it for both of them, as"
            " {'sources->base': ...} without a pair.",
        ),
    ],
)
def test_what_chooses_nothing_is_an_error(entry, message):
    with pytest.raises(iv.LocationError) as caught:
        chosen(entry)
    assert str(caught.value) == message


def test_an_error_says_what_the_entry_was_about():
    view = iv.TokenView(tuple(TEN), example=3)
    with pytest.raises(iv.LocationRangeError) as caught:
        resolve(12, view, where="base locations of 'x'")
    assert str(caught.value) == (
        "Position 12 in the base locations of 'x' is out of range for example 3, which has positions 0 to 9 (or -10"
        " to -1)."
    )


@given(st.integers(1, 12), st.data())
def test_ints_slices_and_ranges_mean_what_they_mean_for_lists(size, data):
    index = data.draw(st.integers(-size, size - 1))
    bounds = st.none() | st.integers(-15, 15)
    part = slice(data.draw(bounds), data.draw(bounds), data.draw(st.sampled_from([None, 1, 2, -1])))
    places = list(range(size))
    assert chosen(index, places) == [places[index]]
    if places[part]:
        assert chosen(part, places) == places[part]


# --- text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "tokens"),
    [
        ("Spain", [" Spain"]),
        (" Spain", [" Spain"]),
        ("Spain ", [" Spain"]),
        ("pai", [" Spain"]),
        ("of Spain is", [" of", " Spain", " is"]),
        (iv.Words("of Spain", take="first"), [" of"]),
        (iv.Words("of Spain", take="last"), [" Spain"]),
        (iv.Words("capital", occurrence=0), [" capital"]),
        (iv.Words("capital of", occurrence="all"), [" capital", " of", " capital", " of"]),
        (iv.Words("capital of", occurrence="all", take="last"), [" of", " of"]),
        (iv.Regex(r"of (\w+)", occurrence=1, group=1), [" Italy"]),
        (iv.Regex(r"(?P<city>[A-Z]\w+)\.", occurrence=-1, group="city"), [" Rome"]),
        (
            iv.Regex(r"[A-Z]\w+", occurrence="all", take="first"),
            ["The", " Spain", " Madrid", " The", " Italy", " Rome"],
        ),
        (iv.Segment(0, pivots=["."]), ["The", " capital", " of", " Spain", " is", " Madrid"]),
        (iv.Segment(1, pivots=["."]), [" The", " capital", " of", " Italy", " is", " Rome"]),
        (iv.Segment(1, pivots=["Spain", 5]), [" is"]),
        (lambda view: [place for place, token in enumerate(view.tokens) if token == "."], [".", "."]),
        (lambda view: "Spain", [" Spain"]),
        (["Spain", iv.Words("Rome")], [" Spain", " Rome"]),
        ("first", ["The"]),
    ],
)
def test_an_entry_chooses_tokens_of_a_text(tokenizer, entry, tokens):
    places = iv.positions(tokenizer, TEXT, entry)
    ids = tokenizer(TEXT)["input_ids"]
    assert [tokenizer.decode([ids[place]]) for place in places] == tokens


def test_an_occurrence_counts_from_either_end(tokenizer):
    assert iv.positions(tokenizer, TEXT, iv.Words("capital", occurrence=-1)) == [8]
    assert iv.positions(tokenizer, TEXT, iv.Words("capital", occurrence=1)) == [8]
    with pytest.raises(iv.LocationRangeError) as caught:
        iv.positions(tokenizer, TEXT, iv.Words("capital", occurrence=2))
    assert str(caught.value) == (
        "Occurrence 2 of 'capital' is out of range for example 0, which has occurrences 0 to 1 (or -2 to -1)."
    )


def test_a_word_of_several_tokens_is_all_of_them():
    tokenizer = byte_level()
    view = iv.TokenView(tuple(tokenizer("a 😀 b")["input_ids"]), tokenizer)
    assert resolve("😀", view) == (2, 3, 4, 5)
    assert resolve(iv.Words("😀", take="last"), view) == (5,)


def test_special_tokens_are_of_the_text_and_have_a_name():
    tokenizer = word_piece()
    assert iv.positions(tokenizer, "the capital", "special") == [0, 3]
    assert iv.positions(tokenizer, "the capital", "[SEP]") == [3]
    assert iv.positions(tokenizer, "the capital of embeddings", "embeddings")[0] == 4


class Thirds:
    """A tokenizer whose tokens are parts of one text."""

    def decode(self, token_ids) -> str:
        return "".join("all last x"[3 * token :][:3] for token in token_ids)


def test_a_name_wins_over_the_text_and_words_are_always_of_the_text(tokenizer):
    view = iv.TokenView((0, 1, 2), Thirds())
    assert view.text == "all last "
    assert resolve("last", view) == (2,)
    assert resolve(iv.Words("last"), view) == (1, 2)


@pytest.mark.parametrize(
    ("text", "entry", "message"),
    [
        (
            "The capital of Spain is",
            "Spian",
            "'Spian' is no name, and does not occur in the text of example 0, 'The capital of Spain is'. Did you mean"
            " 'Spain'?\nNames: all, first, last, special, last-n, inputs-partition-i, random-inputs-partition-i-n.",
        ),
        (
            "The capital of Spain is",
            "frist",
            "'frist' is no name, and does not occur in the text of example 0, 'The capital of Spain is'. Did you mean"
            " 'first'?\nNames: all, first, last, special, last-n, inputs-partition-i, random-inputs-partition-i-n.",
        ),
        (
            "The capital of Spain is",
            iv.Words("spain"),
            "'spain' does not occur in the text of example 0, 'The capital of Spain is'. Did you mean 'Spain'?",
        ),
        (
            "The capital of Spain is",
            iv.Words("of spain"),
            "'of spain' does not occur in the text of example 0, 'The capital of Spain is'. Did you mean 'of Spain'?",
        ),
        (
            "The capital of Spain is",
            iv.Regex(r"\d+"),
            r"The pattern '\\d+' matches nothing in the text of example 0, 'The capital of Spain is'.",
        ),
        (
            TEXT,
            "capital",
            "'capital' occurs 2 times in example 0: 'The [capital] of Spain is...', '...Madrid. The [capital] of"
            " Italy is...'. Say which: Words('capital', occurrence=0) (to 1; -1 is the last), or occurrence='all'.",
        ),
    ],
)
def test_a_part_of_the_text_that_is_not_there_once_is_an_error(tokenizer, text, entry, message):
    with pytest.raises(iv.LocationError) as caught:
        iv.positions(tokenizer, text, entry)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: iv.Words(""), r"Words\(''\) looks for nothing"),
        (lambda: iv.Words("a", occurrence=True), "occurrence=True of Words is unknown"),
        (lambda: iv.Words("a", take="second"), "take='second' is unknown"),
        (lambda: iv.Regex("("), r"'\(' is not a regular expression: "),
        (lambda: iv.Regex("a", group=1), "'a' has no group 1. It has 0 to 0"),
        (lambda: iv.Segment("1"), r"Segment\('1'\) counts no part"),
        (lambda: iv.Segment(0, pivots=[1.5]), "pivot 1.5 is neither a position nor the text of a token"),
        (lambda: iv.Sampled("all", 0), "count=0 positions cannot be drawn"),
        (lambda: iv.Sampled("all", seed=0, generator=torch.Generator()), "Both seed and generator"),
        (lambda: iv.PerExample("ab"), r"PerExample\('ab'\) is no list"),
        (lambda: iv.Aligned(unequal="first"), "unequal='first' is unknown"),
        (lambda: iv.PositionResolver(None, names={"last": 3}), "The name 'last' has a meaning already"),
        (
            lambda: iv.PositionResolver(None, names={"all-image": 3}),
            "The name 'all-image' has a meaning already",
        ),
        (
            lambda: iv.PositionResolver(None, classes={"text": (1, 2, 3)}),
            "'text' cannot be a class of tokens",
        ),
        (
            lambda: iv.PositionResolver(None, classes={"image": (1, 2)}),
            r"The class 'image' is given by \(1, 2\)",
        ),
    ],
)
def test_what_says_nothing_is_refused_when_it_is_made(make, message):
    with pytest.raises(iv.LocationError, match=message):
        make()


# --- what is drawn ----------------------------------------------------------------------------------------


def test_a_draw_is_of_its_candidates_in_order_without_repeats():
    for seed in range(30):
        drawn = chosen(iv.Sampled(slice(2, 8), count=3, seed=seed))
        assert drawn == sorted(set(drawn))
        assert len(drawn) == 3
        assert set(drawn) <= set(range(2, 8))


def test_a_draw_is_the_same_for_the_same_seed_and_another_for_others():
    draws = {tuple(chosen(iv.Sampled("all", count=3, seed=seed))) for seed in range(20)}
    assert len(draws) > 10
    assert (
        chosen(iv.Sampled("all", 3)) == chosen(iv.Sampled("all", 3)) == chosen(iv.Sampled("all", 3, seed=0))
    )
    assert chosen(iv.Sampled("all", 3), seed=7) == chosen(iv.Sampled("all", 3, seed=7))
    examples = iv.PositionResolver(None).positions([TEN] * 20, iv.Sampled("all", 3))
    assert len(set(map(tuple, examples))) > 10


def test_a_draw_leaves_the_global_generators_alone_and_moves_on_its_own():
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(5)
    draws = {tuple(chosen(iv.Sampled("all", 3, generator=generator))) for _ in range(20)}
    chosen("random-inputs-partition-0-3", generator=generator)
    chosen(iv.Sampled("all"))
    assert len(draws) > 10
    assert torch.equal(torch.get_rng_state(), before)


def test_no_more_can_be_drawn_than_there_are():
    with pytest.raises(iv.LocationError, match="draws 11 of the 10 positions there are in example 0"):
        chosen(iv.Sampled("all", 11))


@pytest.mark.parametrize(
    ("of", "exclude", "left"),
    [
        ("all", [0, -1], [1, 2, 3, 4, 5, 6, 7, 8]),
        (slice(2, 6), iv.Span(4, 9), [2, 3]),
        ([5, 1, 3], 3, [5, 1]),
        ([5, 1], "last", [5, 1]),
        (iv.Except("all", slice(1, 9)), 0, [9]),
    ],
)
def test_some_positions_are_left_out_of_others(of, exclude, left):
    assert chosen(iv.Except(of, exclude)) == left


def test_something_has_to_be_left():
    with pytest.raises(iv.LocationError, match=r"Except\(of=\[1, 2\], exclude='all'\).* chooses nothing"):
        chosen(iv.Except([1, 2], "all"))


def test_partitions_are_drawn_from_by_name():
    drawn = chosen("random-inputs-partition-1-3", pivots=[4])
    assert len(drawn) == 3
    assert set(drawn) <= set(range(4, 10))
    assert len(chosen("random-inputs-partition-1", pivots=[4])) == 1


# --- classes of tokens ------------------------------------------------------------------------------------

T, S, P, B, E = 9, 1, 2, 3, 4  # text, start, part of an image, break, end
IMAGES = [T, S, P, B, P, E, T, T, S, P, E, T]


@pytest.mark.parametrize(
    ("name", "positions"),
    [
        ("all-image", [1, 2, 3, 4, 5, 8, 9, 10]),
        ("all-text", [0, 6, 7, 11]),
        ("start-image", [1, 8]),
        ("end-image", [5, 10]),
        ("last-image", [4, 9]),
        ("special-image", [3]),
    ],
)
def test_names_of_a_class_are_told_by_its_markers(name, positions):
    assert chosen(name, IMAGES, classes={"image": (S, B, E)}) == positions


def test_a_start_marker_may_be_the_image_token_itself():
    ids = [T, P, P, B, P, P, E, T]
    assert chosen("all-image", ids, classes={"image": (P, B, E)}) == [1, 2, 3, 4, 5, 6]
    assert chosen("start-image", ids, classes={"image": (P, B, E)}) == [1]


@pytest.mark.parametrize(
    ("ids", "image", "text"),
    [
        ([T, P, P, P, P, T], [2, 3], [0, 5]),
        ([T, P, P, T], [1, 2], [0, 3]),
        ([T, P, T], [1], [0, 2]),
        ([P, P, P, T, P, P], [1, 2, 4], [3]),
    ],
)
def test_where_one_marker_starts_and_ends_the_markers_are_the_image(ids, image, text):
    classes = {"image": (P, None, P)}
    assert chosen("all-image", ids, classes=classes) == image
    assert chosen("all-text", ids, classes=classes) == text


def test_markers_may_be_texts_of_tokens():
    tokenizer = byte_level()
    ids = tokenizer("a[IMG][IMG][BREAK][IMG][END] b")["input_ids"]
    resolver = iv.PositionResolver(tokenizer, classes={"image": ("[IMG]", "[BREAK]", "[END]")})
    assert resolver.positions(ids, "all-image") == [1, 2, 3, 4, 5]
    assert resolver.positions(ids, "special-image") == [3]
    assert resolver.positions(ids, "all-text") == [0, 6, 7]


def test_tokens_of_a_class_and_of_text_are_drawn_by_name():
    classes = {"image": (S, B, E)}
    for seed in range(10):
        drawn = chosen("random-text-3", IMAGES, classes=classes, seed=seed)
        assert len(drawn) == 3
        assert set(drawn) <= {0, 6, 7, 11}
        assert chosen("random-image", IMAGES, classes=classes, seed=seed)[0] in {1, 2, 3, 4, 5, 8, 9, 10}


def test_several_classes_have_their_own_names():
    classes = {"image": (S, B, E), "audio": (5, None, 6)}
    ids = [T, 5, 7, 6, T, S, P, E]
    assert chosen("all-audio", ids, classes=classes) == [1, 2, 3]
    assert chosen("all-text", ids, classes=classes) == [0, 4]


def test_an_example_without_images_is_all_text():
    assert chosen("all-text", TEN[5:], classes={"image": (S, B, E)}) == [0, 1, 2, 3, 4]
    with pytest.raises(iv.LocationError, match="'all-image' chooses nothing for example 0"):
        chosen("all-image", TEN[5:], classes={"image": (S, B, E)})


def test_an_image_that_does_not_end_is_an_error():
    with pytest.raises(iv.LocationError) as caught:
        chosen("all-image", [T, S, P], classes={"image": (S, B, E)})
    assert str(caught.value) == (
        "The tokens of class 'image' begin in example 0 and do not end: there is no 4 after the last 1."
    )


# --- names of one's own -----------------------------------------------------------------------------------


def test_names_stand_for_entries_and_functions(tokenizer):
    resolver = iv.PositionResolver(
        tokenizer,
        names={
            "country": iv.Regex(r"of (\w+)", group=1),
            "both": ["country", "last"],
            "middle": lambda v: len(v) // 2,
        },
    )
    texts = ["The capital of Spain is", "In Rome the capital of Italy is"]
    assert resolver.positions(texts, "country") == [[3], [5]]
    assert resolver.positions(texts, "both") == [[3, 4], [5, 6]]
    assert resolver.positions(texts, "middle") == [[2], [3]]
    assert resolver.decode([tokenizer("Spain")["input_ids"][0]]) == "Spain"


def test_a_name_that_stands_for_itself_is_an_error():
    with pytest.raises(iv.LocationError, match="The name 'a' stands for itself: a -> b -> a"):
        chosen("a", names={"a": ["b"], "b": "a"})


def test_a_name_can_be_used_twice_in_a_list():
    assert chosen(["end", "end"], names={"end": "last"}) == [9, 9]


# --- batches ----------------------------------------------------------------------------------------------


def test_padding_is_not_seen(tokenizer):
    texts = ["The capital of Spain is", "Spain"]
    expected = [[3], [0]]
    assert iv.positions(tokenizer, texts, "Spain") == expected
    for side in ("left", "right"):
        tokenizer.padding_side = side
        inputs = tokenizer(texts, return_tensors="pt", padding=True)
        assert iv.positions(tokenizer, inputs, "Spain") == expected
        assert iv.positions(tokenizer, inputs, "last") == [[4], [0]]


def test_each_example_can_have_an_entry_of_its_own(tokenizer):
    texts = ["The capital of Spain is", "The capital of Italy is"]
    assert iv.positions(tokenizer, texts, iv.PerExample(["Spain", ["Italy", "last"]])) == [[3], [3, 4]]
    with pytest.raises(iv.LocationError, match="PerExample has 3 entries, and the batch has 2 examples"):
        iv.positions(tokenizer, texts, iv.PerExample([0, 1, 2]))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"inputs_embeds": 3}, "The inputs have no input_ids, but inputs_embeds."),
        ([], r"\[\] is no text and no token ids"),
        (3.5, "3.5 is no text and no token ids"),
    ],
)
def test_inputs_without_tokens_are_refused(inputs, message):
    with pytest.raises(iv.InputError, match=message):
        iv.positions(None, inputs, "last")


def test_text_needs_a_tokenizer_that_encodes():
    with pytest.raises(iv.InputError, match="NoneType does not encode text"):
        iv.positions(None, "Spain", "last")


# --- source and base together -----------------------------------------------------------------------------


def test_aligned_positions_are_counterparts_in_source_and_base(tokenizer):
    base, source = (
        iv.TokenView(tuple(tokenizer(text)["input_ids"]), tokenizer)
        for text in ("The capital of Spain is", "In Rome the capital of Italy is")
    )
    assert resolve_aligned(iv.Aligned(), base, source) == ((2, 3, 4, 5, 6), (0, 1, 2, 3, 4))
    assert resolve_aligned(iv.Aligned("Spain"), base, source) == ((5,), (3,))
    assert resolve_aligned(iv.Aligned(unequal="skip"), base, source) == ((3, 4, 5, 6), (1, 2, 3, 4))
    with pytest.raises(iv.LocationError, match="none of its positions 0 has a counterpart in the source"):
        resolve_aligned(iv.Aligned(0, unequal="skip"), base, source)


# --- showing ----------------------------------------------------------------------------------------------


def test_what_is_chosen_is_shown_token_by_token(tokenizer):
    out = io.StringIO()
    texts = ["The capital of Spain is", "Spain"]
    entry = iv.PerExample(["of Spain", 0])
    rows = iv.PositionResolver(tokenizer).explain(texts, entry, file=out)
    assert rows == [[(2, " of"), (3, " Spain")], [(0, "Spain")]]
    assert out.getvalue() == (
        "example 0: The capital[ of Spain] is\n  2  ' of'\n  3  ' Spain'\nexample 1: [Spain]\n  0  'Spain'\n"
    )


def test_a_character_of_several_tokens_is_shown_once():
    out = io.StringIO()
    iv.PositionResolver(byte_level()).explain("a 😀 b", "😀", file=out)
    assert out.getvalue().splitlines()[0] == "example 0: a [😀] b"


# --- JSON -------------------------------------------------------------------------------------------------

WRITTEN = [
    (3, 3),
    ("Spain", "Spain"),
    (["last", 0], ["last", 0]),
    (slice(1, None), {"slice": [1, None, None]}),
    (range(1, 4), {"range": [1, 4, 1]}),
    (iv.Span(2, -1), {"span": [2, -1]}),
    (iv.Words("Spain"), {"words": "Spain"}),
    (iv.Words("Spain", "all", "last"), {"words": "Spain", "occurrence": "all", "take": "last"}),
    (iv.Regex("(a)", 0, group=1), {"regex": "(a)", "occurrence": 0, "group": 1}),
    (iv.Segment(1), {"segment": 1}),
    (iv.Segment(1, (4, ".")), {"segment": 1, "pivots": [4, "."]}),
    (iv.Role("user", -1), {"role": "user", "turn": -1}),
    (iv.Sampled(iv.Words("a"), 2, seed=3), {"sampled": {"words": "a"}, "count": 2, "seed": 3}),
    (iv.Except("all", [1, iv.Words("a")]), {"all_of": "all", "exclude": [1, {"words": "a"}]}),
    (iv.PerExample([1, ["last", slice(2)]]), {"per_example": [1, ["last", {"slice": [None, 2, None]}]]}),
    (iv.Aligned("Spain", "skip"), {"aligned": "Spain", "unequal": "skip"}),
]


@pytest.mark.parametrize(("entry", "written"), WRITTEN)
def test_an_entry_goes_to_json_and_back(entry, written):
    assert entry_to_json(entry) == written
    assert entry_from_json(json.loads(json.dumps(written))) == entry


def test_every_object_is_among_those_written():
    objects = {
        iv.Aligned,
        iv.Except,
        iv.PerExample,
        iv.Regex,
        iv.Role,
        iv.Sampled,
        iv.Segment,
        iv.Span,
        iv.Words,
    }
    assert objects <= {type(entry) for entry, _ in WRITTEN}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (len, r"is a function, which JSON cannot hold. Say it by name or object."),
        (
            iv.Sampled("all", generator=torch.Generator()),
            "holds a generator, which JSON cannot hold. Give a seed.",
        ),
        ([iv.Sampled(len)], r"is a function"),
        (2.5, r"The entry 2.5 is a float"),
    ],
)
def test_what_json_cannot_hold_is_refused(entry, message):
    with pytest.raises(iv.ConfigError, match=message):
        entry_to_json(entry)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            {"word": "Spain"},
            "{'word': 'Spain'} stands for no positions: its first key must be one of 'words', ",
        ),
        ({"words": ""}, r"stands for no positions: Words\(''\) looks for nothing"),
        ({"words": "a", "takes": "last"}, "stands for no positions: .* unexpected keyword"),
        ({"span": [1]}, "stands for no positions: "),
        ({}, "stands for no positions"),
    ],
)
def test_json_that_stands_for_nothing_is_refused(written, message):
    with pytest.raises(iv.ConfigError, match=message):
        entry_from_json(written)
