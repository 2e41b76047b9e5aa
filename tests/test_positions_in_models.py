"""Positions as people say them, where interventions take them: by words, names and roles, in source and base."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import intervenable as iv
from tiny_models import tiny, tiny_inputs

SPAIN, ITALY = "The capital of Spain is", "The capital of Italy is"
LONGER = "After the capital of Italy is"
PLACE = "layer_0.block_output.pos"


@pytest.fixture(scope="module")
def small_lm():
    return iv.load_small_lm()


def encoded(tokenizer, *texts: str, side: str = "left"):
    return tokenizer(list(texts), return_tensors="pt", padding=True, padding_side=side)


def swap(small_lm, tokenizer="its own", **fields) -> iv.IntervenableModel:
    entry = iv.RepresentationConfig(0, intervention_type=iv.VanillaIntervention, **fields)
    return iv.IntervenableModel(
        entry, small_lm[1], tokenizer=small_lm[0] if tokenizer == "its own" else tokenizer
    )


def zeroing(small_lm, tokenizer="its own", **fields) -> iv.IntervenableModel:
    entry = iv.RepresentationConfig(0, intervention_type=iv.ZeroIntervention, **fields)
    return iv.IntervenableModel(
        entry, small_lm[1], tokenizer=small_lm[0] if tokenizer == "its own" else tokenizer
    )


def said(small_lm, output, inputs) -> list[str]:
    mask = inputs["attention_mask"]
    last = (mask * torch.arange(mask.shape[1])).argmax(-1)
    return [
        small_lm[0].decode([token]) for token in output.logits[range(len(last)), last].argmax(-1).tolist()
    ]


def chosen(output) -> list[tuple[int, ...]]:
    return [line.positions for line in output.receipt]


# --- one swap ---------------------------------------------------------------------------------------------


def test_the_word_is_swapped_and_the_answer_turns(small_lm):
    tokenizer, model = small_lm
    base, source = encoded(tokenizer, SPAIN), encoded(tokenizer, ITALY)
    with torch.no_grad():
        assert said(small_lm, model(**base), base) == [" Madrid"]
        output = swap(small_lm)(base, [source], {"sources->base": ("Italy", "Spain")})
    assert said(small_lm, output.intervened, base) == [" Rome"]
    assert chosen(output) == [(3,)]


def test_words_mean_what_their_positions_mean(small_lm):
    base, source = encoded(small_lm[0], SPAIN), encoded(small_lm[0], LONGER)
    model = swap(small_lm)
    by_words = model(base, [source], {"sources->base": ("Italy", "Spain")})[1].logits
    by_ints = model(base, [source], {"sources->base": (4, 3)})[1].logits
    assert_close(by_words, by_ints, rtol=0, atol=0)


def test_one_entry_is_looked_up_in_the_text_of_each_side(small_lm):
    base, source = encoded(small_lm[0], SPAIN), encoded(small_lm[0], LONGER)
    model = swap(small_lm)
    explanation = model.explain(base, [source], {"sources->base": "capital"}, file=io.StringIO())
    assert explanation[0]["touches"] == "positions 1 ' capital'"
    assert explanation[0]["fed by"] == "source 0: positions 2 ' capital'"


@pytest.mark.parametrize("side", ["left", "right"])
def test_each_example_is_searched_by_itself_whatever_its_padding(small_lm, side):
    texts = [SPAIN, "After the capital of Spain is", "Brazil the capital of Italy is"]
    base = encoded(small_lm[0], *texts, side=side)
    assert not base["attention_mask"].all()
    entry = iv.Regex(r"of (\w+)", group=1)
    output = zeroing(small_lm)(base, None, {"base": [entry, "last"]})
    assert chosen(output) == [(3, 4), (4, 5), (4, 5)]
    assert [line.tokens for line in output.receipt] == [
        (" Spain", " is"),
        (" Spain", " is"),
        (" Italy", " is"),
    ]
    for example, text in enumerate(texts):
        alone = zeroing(small_lm)(encoded(small_lm[0], text), None, {"base": [entry, "last"]})
        real = output.intervened.logits[example][base["attention_mask"][example].bool()]
        assert_close(real, alone.intervened.logits[0], rtol=0, atol=1e-4)


def test_padding_can_be_counted_and_words_are_found_all_the_same(small_lm):
    base = encoded(small_lm[0], SPAIN, LONGER)
    model = zeroing(small_lm)
    by_words = model(base, None, {"base": iv.Regex("Spain|Italy")}, relative_to="tensor")
    by_ints = model(base, None, {"base": 4}, relative_to="tensor")
    assert_close(by_words.intervened.logits, by_ints.intervened.logits, rtol=0, atol=0)
    assert chosen(by_words) == [(3,), (4,)]


def test_the_full_form_takes_words_and_skips_with_none(small_lm):
    base = encoded(small_lm[0], SPAIN, ITALY)
    entries = [iv.RepresentationConfig(layer, intervention_type=iv.ZeroIntervention) for layer in (0, 1)]
    model = iv.IntervenableModel(entries, small_lm[1], tokenizer=small_lm[0])
    output = model(base, None, {"base": [[["Spain"], ["Italy", "last"]], None]})
    assert chosen(output) == [(3,), (3, 4)]
    assert output.receipt.skipped == ("layer_1.block_output.pos",)


@pytest.mark.parametrize(
    ("entry", "positions"),
    [
        (iv.PerExample(["Spain", ["Italy", "first"]]), [(3,), (4, 0)]),
        (lambda view: len(view) - 4 + view.example, [(1,), (3,)]),
        (iv.Span(1, -1), [(1, 2, 3), (1, 2, 3, 4)]),
        (range(1, 3), [(1, 2), (1, 2)]),
        (iv.Segment(0, pivots=["of"]), [(0, 1), (0, 1, 2)]),
        ("last-2", [(3,), (4,)]),
        ("all", [(0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5)]),
    ],
)
def test_every_kind_of_entry_is_taken(small_lm, entry, positions):
    base = encoded(small_lm[0], SPAIN, LONGER)
    output = zeroing(small_lm)(base, None, {"base": entry})
    assert chosen(output) == positions


# --- source and base together -----------------------------------------------------------------------------


def test_aligned_positions_go_to_their_counterparts(small_lm):
    base, source = encoded(small_lm[0], SPAIN), encoded(small_lm[0], "In Madrid the capital of Italy is")
    model = swap(small_lm)
    explanation = model.explain(base, [source], {"sources->base": iv.Aligned()}, file=io.StringIO())
    assert explanation[0]["touches"].startswith("positions 0,1,2,3,4 ")
    assert explanation[0]["fed by"].startswith("source 0: positions 2,3,4,5,6 ")
    by_alignment = model(base, [source], {"sources->base": iv.Aligned(["Spain", "is"])})[1].logits
    by_ints = model(base, [source], {"sources->base": ([5, 6], [3, 4])})[1].logits
    assert_close(by_alignment, by_ints, rtol=0, atol=0)


def test_an_alignment_needs_a_source_example_for_each_base_example(small_lm):
    base, source = encoded(small_lm[0], SPAIN, ITALY), encoded(small_lm[0], ITALY)
    with pytest.raises(
        iv.LocationError, match="pairs each base example with a source example of its own, and there"
    ):
        swap(small_lm)(base, [source], {"sources->base": iv.Aligned()})


def test_an_alignment_without_a_source_is_an_error(small_lm):
    with pytest.raises(iv.LocationError, match="is about a source and a base together"):
        zeroing(small_lm)(encoded(small_lm[0], SPAIN), None, {"base": iv.Aligned()})


# --- attention matrices -----------------------------------------------------------------------------------


def test_an_entry_of_attention_is_cut_by_its_words(small_lm):
    tokenizer, model = small_lm
    entry = iv.RepresentationConfig(
        1,
        "attention_pattern",
        "h.query.key",
        intervention=iv.ZeroIntervention(),
        where={"heads": 1, "queries": "last", "keys": iv.Regex("Spain|Italy")},
    )
    cut = iv.IntervenableModel(entry, model, tokenizer=tokenizer)
    base = encoded(tokenizer, SPAIN, LONGER)
    output = cut(base)
    lines = [(line.heads, line.queries, line.keys, line.query_tokens, line.tokens) for line in output.receipt]
    assert lines == [
        ((1,), (4,), (3,), (" is",), (" Spain",)),
        ((1,), (5,), (4,), (" is",), (" Italy",)),
    ]
    by_ints = iv.IntervenableModel(
        iv.RepresentationConfig(1, "attention_pattern", "h.query.key", intervention=iv.ZeroIntervention()),
        model,
    )(base, None, {"base": [[[[1], [1]], [[4], [5]], [[3], [4]]]]})[1]
    assert_close(output.intervened.logits, by_ints.logits, rtol=0, atol=0)


def test_heads_are_all_first_or_last_and_have_no_other_names(small_lm):
    base = encoded(small_lm[0], SPAIN)
    entry = iv.RepresentationConfig(
        0, "head_attention_value_output", "h", intervention_type=iv.ZeroIntervention
    )
    model = iv.IntervenableModel(entry, small_lm[1], tokenizer=small_lm[0])
    count = small_lm[1].config.num_attention_heads
    for name, heads in (("all", tuple(range(count))), ("last", (count - 1,))):
        assert model(base, None, {"base": {"heads": name}}).receipt[0].heads == heads
    with pytest.raises(
        iv.LocationError, match=r"'Spain' in the base locations of '.*' is not a head: give ints"
    ):
        model(base, None, {"base": {"heads": "Spain"}})


def test_a_word_behind_every_query_is_refused_and_a_class_of_words_is_not(small_lm):
    entry = iv.RepresentationConfig(1, "attention_pattern", "h.query.key", intervention=iv.ZeroIntervention())
    model = iv.IntervenableModel(entry, small_lm[1], tokenizer=small_lm[0])
    base = encoded(small_lm[0], SPAIN)
    with pytest.raises(iv.LocationError, match="which the causal mask hides"):
        model(base, None, {"base": {"queries": "capital", "keys": "Spain"}})
    words = iv.Words("a", occurrence="all")
    assert model(base, None, {"base": {"queries": "capital", "keys": words}}).receipt[0].keys == (1, 3)


# --- what is said in a declaration ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where",
    [
        "Spain",
        ["Spain", "last"],
        iv.Words("Spain", take="last"),
        [iv.Regex("S"), slice(0, 1)],
        ("Italy", "Spain"),
        (iv.Words("Italy"), iv.Words("Spain")),
        iv.Aligned("Spain", "skip"),
        {"positions": iv.Words("Spain")},
    ],
)
def test_where_goes_to_json_and_back(where):
    config = iv.IntervenableConfig(iv.RepresentationConfig(0, where=where), iv.VanillaIntervention)
    again = iv.IntervenableConfig.model_validate_json(config.model_dump_json())
    assert again.representations[0].where == where
    assert again == config


def test_levels_of_where_go_to_json_and_back():
    where = {"heads": 3, "queries": "last", "keys": iv.Words("Spain", occurrence="all")}
    entry = iv.RepresentationConfig(0, "attention_pattern", "h.query.key", where=where)
    assert iv.RepresentationConfig.model_validate_json(entry.model_dump_json()).where == where


def test_a_function_in_where_does_not_go_to_json():
    entry = iv.RepresentationConfig(0, where=len)
    with pytest.raises(
        iv.ConfigError, match=r"is a function, which JSON cannot hold\. Say it by name or object"
    ):
        entry.model_dump_json()


def test_a_declared_pair_of_words_swaps(small_lm):
    base, source = encoded(small_lm[0], SPAIN), encoded(small_lm[0], ITALY)
    output = swap(small_lm, where=("Italy", "Spain"))(base, [source])
    assert said(small_lm, output.intervened, base) == [" Rome"]


# --- names of one's own -----------------------------------------------------------------------------------


def test_a_resolver_takes_the_place_of_a_tokenizer(small_lm):
    resolver = iv.PositionResolver(
        small_lm[0], names={"country": iv.Regex(r"of (\w+)", group=1)}, pivots=["of"]
    )
    model = zeroing(small_lm, tokenizer=resolver)
    base = encoded(small_lm[0], SPAIN, LONGER)
    output = model(base, None, {"base": ["country", "inputs-partition-0"]})
    assert [line.tokens for line in output.receipt] == [
        (" Spain", "The", " capital"),
        (" Italy", "After", " the", " capital"),
    ]
    assert "' Spain'" in str(output.receipt)


# --- what goes wrong, before any run ----------------------------------------------------------------------


@pytest.fixture
def stopped(small_lm):
    """The small model, which must not be run."""
    tokenizer, model = small_lm
    handle = model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    yield tokenizer, model
    handle.remove()


def test_a_word_without_a_tokenizer_says_what_to_give(stopped):
    base = encoded(stopped[0], SPAIN)
    with pytest.raises(iv.LocationError) as caught:
        zeroing(stopped, tokenizer=None)(base, None, {"base": "Spain"})
    assert str(caught.value) == (
        f"'Spain' in the base locations of '{PLACE}' is looked for in the text of example 0, and there is no"
        " tokenizer to tell it. Give one: IntervenableModel(config, model, tokenizer=...), or say where by ints."
    )


def test_names_need_no_tokenizer(small_lm):
    base = encoded(small_lm[0], SPAIN, LONGER)
    assert chosen(zeroing(small_lm, tokenizer=None)(base, None, {"base": ["first", "last-2"]})) == [
        (0, 3),
        (0, 4),
    ]


def test_embeddings_have_no_text_but_positions():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    entry = iv.RepresentationConfig(0, intervention_type=iv.ZeroIntervention)
    wrapped = iv.IntervenableModel(entry, model, tokenizer=iv.load_small_lm()[0])
    assert chosen(wrapped(embedded, None, {"base": "first"}))[0] == (0,)
    with pytest.raises(iv.LocationError, match=r"which has no token ids and so no text\. Say where by ints"):
        wrapped(embedded, None, {"base": "Spain"})


def test_all_faults_are_told_at_once_each_with_its_side_and_example(stopped):
    base, source = encoded(stopped[0], ITALY, SPAIN), encoded(stopped[0], SPAIN, SPAIN)
    with pytest.raises(iv.LocationError) as caught:
        swap(stopped)(base, [source], {"sources->base": ("Itly", "Italy")})
    message = str(caught.value)
    assert message.startswith("2 faults in the locations:\n- 'Itly' in the source locations of ")
    assert (
        f"\n- 'Italy' in the base locations of '{PLACE}' is no name, and does not occur in the text of example 1"
        in message
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("capital of", r"'capital of' in the base locations of '.*' occurs 2 times in example 0"),
        ("last-40", r"Position -40 in the base locations of '.*' is out of range for example 0"),
        (["Spain", 3], r"name positions 3 more than once for example 0"),
        (
            iv.PerExample([1, 2]),
            r"PerExample in the base locations of '.*' has 2 entries, and the batch has 1",
        ),
        (iv.Role("user"), "has no chat template"),
        (2.5, "2.5 among the base locations is not a position: give ints"),
    ],
)
def test_what_cannot_be_found_is_told_before_any_run(stopped, entry, message):
    base = encoded(stopped[0], f"{SPAIN} Madrid. {ITALY}")
    with pytest.raises(iv.LocationError, match=message):
        zeroing(stopped)(base, None, {"base": entry})


def test_a_resolver_without_a_tokenizer_serves_numbers(small_lm):
    base = encoded(small_lm[0], SPAIN)
    resolver = iv.PositionResolver(None, names={"middle": lambda view: len(view) // 2})
    output = zeroing(small_lm, tokenizer=resolver)(base, None, {"base": "middle"})
    assert (output.receipt[0].positions, output.receipt[0].tokens) == ((2,), None)


# --- the page ---------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_do_what_it_says(capsys):
    page = (Path(__file__).parents[1] / "docs" / "positions.md").read_text()
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(example, names)
    printed = capsys.readouterr().out
    assert "positions 3  ' Spain'" in printed
    assert printed.endswith("example 0: The capital of[ Spain] is\n  3  ' Spain'\n")


def test_the_page_has_every_object():
    page = (Path(__file__).parents[1] / "docs" / "positions.md").read_text()
    for name in ("Aligned", "PerExample", "Regex", "Role", "Sampled", "Segment", "Span", "Words"):
        assert f"| `{name}(" in page or f", `{name}(" in page


# --- two stacks -------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer with a letter for each id."""

    def decode(self, token_ids) -> str:
        return "".join(chr(ord("a") + int(token)) for token in token_ids)


def test_words_are_looked_up_in_the_stack_that_a_level_is_in():
    model = tiny("t5")
    inputs = {
        "input_ids": torch.tensor([[3, 4, 5, 6, 7]]),  # d e f g h
        "decoder_input_ids": torch.tensor([[9, 6, 8]]),  # j g i
    }
    entry = iv.RepresentationConfig(
        0,
        "cross_attention_pattern",
        "h.query.key",
        intervention=iv.ZeroIntervention(),
        where={"keys": "fg", "queries": "g"},
    )
    line = iv.IntervenableModel(entry, model, tokenizer=Letters())(inputs).receipt[0]
    assert (line.queries, line.keys) == ((1,), (2, 3))
    assert (line.query_tokens, line.tokens) == (("g",), ("f", "g"))
