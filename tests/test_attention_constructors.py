"""Named edits of attention matrices: their worked examples on a known pattern, and their laws on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from declared import same_bits
from torch import Tensor
from torch.testing import assert_close

import intervenable as iv
from intervenable import attention
from tiny_models import HEADS, LAYERS, tiny, tiny_inputs

NO_LOOK_AHEAD = torch.ones(7, 7).tril()


# --- a model whose patterns are known ---------------------------------------------------------------------


def uniform(layers: int = LAYERS) -> Any:
    """A tiny Llama whose queries are zero, so that every token reads all before it and itself alike."""
    model = tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.q_proj.weight.zero_()
    return model


THREE = {"input_ids": torch.tensor([[5, 6, 7]])}


def patterns(
    model: Any, inputs: Any, *edits: Any, layer: int = 1, head: int = 2, tokenizer: Any = None
) -> Tensor:
    """`[b, q, k]`: the pattern of one head after the edits."""
    look = iv.RepresentationConfig(
        layer,
        "attention_pattern",
        "h",
        intervention=iv.CollectIntervention(),
        where={"heads": head},
        name="seen",
    )
    wrapped = iv.IntervenableModel([*edits, look], model, tokenizer=tokenizer)
    with torch.no_grad():
        return wrapped(inputs).collected["seen"][:, 0]


def only(*edits: Any) -> Tensor:
    """`[3, 3]`: what the edits make of a uniform causal pattern of three tokens."""
    return patterns(uniform(), THREE, *edits)[0]


def set_scores(rows: list[list[float]]) -> Any:
    """Scores of layer 1, head 2, for the edits after it to work on."""
    return attention.full(1, 2, at="scores", values=torch.tensor(rows))


# --- the worked examples ----------------------------------------------------------------------------------


def test_the_pattern_to_work_on_is_uniform_and_causal():
    assert_close(only(), torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]]))


def test_a_column_is_cleared():
    expected = torch.tensor([[1, 0, 0], [0.5, 0, 0], [1 / 3, 0, 1 / 3]])
    assert_close(only(attention.columns(1, 2, [1])), expected)


def test_a_row_is_halved():
    expected = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [1 / 6, 1 / 6, 1 / 6]])
    assert_close(only(attention.rows(1, 2, [2], factor=0.5)), expected)


def test_a_grid_is_the_entries_where_rows_and_columns_meet():
    expected = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 1 / 3, 1 / 3]])
    assert_close(only(attention.grid(1, 2, [2], [0])), expected)


def test_edited_rows_are_divided_by_their_sum():
    expected = torch.tensor([[1, 0, 0], [1, 0, 0], [0.5, 0, 0.5]])
    assert_close(only(attention.columns(1, 2, [1], renormalize="rows")), expected)


def test_a_row_without_mass_stays_zero_when_renormalised():
    edited = only(attention.columns(1, 2, [0], renormalize="rows"))
    assert_close(edited, torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0.5, 0.5]]))


def test_only_a_tokens_own_entry_is_kept():
    expected = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 1 / 3]])
    assert_close(only(attention.keep_self(1, 2, [2])), expected)
    expected[2] = torch.tensor([0.0, 0, 1])
    assert_close(only(attention.keep_self(1, 2, [2], renormalize="rows")), expected)


def test_the_whole_matrix_of_a_head_is_cleared():
    assert only(attention.full(1, 2)).abs().max() == 0


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"factor": 1.0}, [0.6652, 0.2447, 0.0900]),
        ({"mode": "scale"}, [0.7870, 0.1065, 0.1065]),
        ({"mode": "mask"}, [0.8808, 0, 0.1192]),
        ({}, [0.8808, 0, 0.1192]),
        ({"factor": 2.0}, [0.4683, 0.4683, 0.0634]),
        ({"values": torch.tensor(-1.0)}, [0.8438, 0.0420, 0.1142]),
    ],
    ids=["as it is", "scale", "mask", "default", "double", "set"],
)
def test_a_score_is_scaled_masked_or_set(how, expected):
    scores = set_scores([[0, 0, 0], [0, 0, 0], [2, 1, 0]])
    edited = only(scores, attention.grid(1, 2, [2], [1], at="scores", **how))
    assert_close(edited[2], torch.tensor(expected), atol=5e-5, rtol=0)


def test_a_masked_column_leaves_its_weight_to_the_others_and_never_to_the_future():
    rows = torch.tensor([[1, 1, 1], [0.5, 0.5, 1], [0.2, 0.3, 0.5]])
    edited = only(set_scores(rows.log().tolist()), attention.columns(1, 2, [1], at="scores"))
    assert_close(edited, torch.tensor([[1, 0, 0], [1, 0, 0], [0.2857, 0, 0.7143]]), atol=5e-5, rtol=0)


def test_a_row_with_no_key_left_is_zero():
    edited = only(attention.columns(1, 2, [0], at="scores"))
    assert_close(edited, torch.tensor([[0, 0, 0], [0, 1, 0], [0, 0.5, 0.5]]))


# --- the laws, on attention that is not uniform -----------------------------------------------------------


EDITS = {
    "columns": lambda **how: attention.columns(1, 2, [1, 3], **how),
    "rows": lambda **how: attention.rows(1, 2, [2, 4], **how),
    "grid": lambda **how: attention.grid(1, 2, [3, 5], [1, 4], **how),
    "full": lambda **how: attention.full(1, 2, **how),
    "block": lambda **how: attention.block(1, 2, rows=[3, 5], columns=[0, 1, 4], exclude=[0], **how),
    "keep_self": lambda **how: attention.keep_self(1, 2, [2, 5], **how),
}


def mask_of(name: str) -> Tensor:
    """`[7, 7]`: the entries that each of `EDITS` chooses."""
    mask = torch.zeros(7, 7, dtype=torch.bool)
    if name == "columns":
        mask[:, [1, 3]] = True
    elif name == "rows":
        mask[[2, 4]] = True
    elif name == "full":
        mask[:] = True
    elif name == "keep_self":
        mask[[2, 5]] = True
        mask[[2, 5], [2, 5]] = False
    else:
        mask[3, [1, 4]] = mask[5, [1, 4]] = True
    return mask


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_the_chosen_entries_of_a_pattern_are_scaled_and_no_others(name, factor):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    plain, edited = patterns(model, inputs), patterns(model, inputs, EDITS[name](factor=factor))
    assert_close(edited, torch.where(mask_of(name), plain * factor, plain))
    others = patterns(model, inputs, EDITS[name](factor=factor), head=1)
    assert torch.equal(others, patterns(model, inputs, head=1))


@pytest.mark.parametrize("name", EDITS)
def test_renormalised_rows_sum_to_one_or_are_zero(name):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    plain = patterns(model, inputs)
    edited = patterns(model, inputs, EDITS[name](renormalize="rows"))
    left = torch.where(mask_of(name), torch.zeros(()), plain)
    total = left.sum(-1, keepdim=True)
    assert_close(edited, torch.where(total > 0, left / total, torch.zeros(())), atol=1e-6, rtol=1e-5)
    assert edited.isfinite().all()


@pytest.mark.parametrize("name", EDITS)
def test_masked_scores_are_a_cleared_and_renormalised_pattern(name):
    model = tiny("llama")
    inputs = tiny_inputs(model)
    masked = patterns(model, inputs, EDITS[name](at="scores"))
    assert_close(masked, patterns(model, inputs, EDITS[name](renormalize="rows")), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("how", [{}, {"mode": "scale"}, {"factor": 3.0}, {"values": torch.tensor(7.0)}])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gpt_oss"])
def test_no_edit_of_scores_lets_a_token_read_the_future_or_padding(family, how, padding):
    model = tiny(family)
    inputs = tiny_inputs(model, padding=padding)
    plain = patterns(model, inputs)
    edited = patterns(model, inputs, attention.full(1, 2, at="scores", **how))
    real = inputs["attention_mask"].bool()
    hidden = (plain == 0) & real[:, :, None]
    assert hidden.any()
    assert edited[hidden].abs().max() == 0
    assert edited.isfinite().all()


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("at", ["pattern", "scores"])
def test_a_factor_of_one_changes_nothing(name, at):
    model = tiny("llama", attention="eager")
    inputs = tiny_inputs(model)
    wrapped = iv.IntervenableModel(EDITS[name](at=at, factor=1.0), model)
    with torch.no_grad():
        assert same_bits(wrapped(inputs).intervened, model(**inputs))


def test_values_take_the_place_of_the_chosen_entries():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    plain = patterns(model, inputs)
    given = torch.arange(4.0).view(2, 2) / 10
    edited = patterns(model, inputs, attention.grid(1, 2, [3, 5], [1, 2], values=given))
    expected = plain.clone()
    expected[:, 3, [1, 2]], expected[:, 5, [1, 2]] = given[0], given[1]
    assert_close(edited, expected)


def test_heads_without_patterns_are_heads_without_values():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    pairs = [(0, 1), (2, 3), (0, 2)]
    silent = iv.IntervenableModel(attention.heads(pairs), model)
    zeros = [
        iv.RepresentationConfig(
            layer,
            "head_attention_value_output",
            "h",
            intervention=iv.ZeroIntervention(),
            where={"heads": head},
        )
        for layer, head in pairs
    ]
    with torch.no_grad():
        left = silent(inputs).intervened.logits
        right = iv.IntervenableModel(zeros, model)(inputs).intervened.logits
        assert_close(left, right, atol=1e-5, rtol=1e-5)
        assert (left - model(**inputs).logits).abs().max() > 1e-2


def test_a_knocked_out_edge_is_not_read_in_any_head_of_its_layers():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    edits = attention.knockout([5], [1, 2], range(1, 3))
    for layer in range(LAYERS):
        for head in range(HEADS):
            seen = patterns(model, inputs, *edits, layer=layer, head=head)
            assert ((seen[:, 5, [1, 2]] == 0).all()) == (layer > 0)
            assert_close(seen[:, 5].sum(-1), torch.ones(2))
            assert (seen[:, 6, [1, 2]] > 0).all()


def test_tokens_are_named_by_their_words():
    tokenizer, model = iv.load_small_lm()
    inputs = tokenizer("The capital of Spain is", return_tensors="pt")
    edit = attention.grid(1, 2, "last", "Spain")
    edited = patterns(model, inputs, edit, tokenizer=tokenizer)
    expected = patterns(model, inputs)
    expected[:, 4, 3] = 0
    assert_close(edited, expected)


def test_a_model_that_cannot_read_the_country_does_not_know_its_capital():
    tokenizer, model = iv.load_small_lm()
    inputs = tokenizer("The capital of Spain is", return_tensors="pt")
    madrid = tokenizer.encode(" Madrid", add_special_tokens=False)[0]

    def probability(*edits):
        with torch.no_grad():
            logits = iv.IntervenableModel([*edits], model, tokenizer=tokenizer)(inputs).intervened.logits
        return logits[0, -1].softmax(-1)[madrid]

    assert probability() > 0.5
    assert probability(attention.knockout("last", "Spain", model=model)) < 0.05
    assert probability(attention.knockout("last", "capital", model=model)) > 0.5


# --- what is declared -------------------------------------------------------------------------------------


def test_several_layers_give_a_list_and_one_number_one_declaration():
    model = tiny("llama")
    assert isinstance(attention.columns(1, 2, 0), iv.RepresentationConfig)
    for layers in ([0, 2], range(0, 3, 2), (0, 2), torch.tensor([0, 2])):
        assert [entry.layer for entry in attention.columns(layers, 2, 0)] == [0, 2]
    assert [entry.layer for entry in attention.full("all", "all", model=model)] == [0, 1, 2]
    assert [entry.layer for entry in attention.knockout(5, 1, 2)] == [2]
    assert [entry.layer for entry in attention.knockout(5, 1, model=model)] == [0, 1, 2]
    assert [entry.layer for entry in attention.heads([(2, 0), (1, 3), (2, 1)])] == [2, 1]


def test_all_heads_are_no_heads_named():
    assert attention.full(1, "all").where == {}
    assert attention.columns(1, "all", 3).where == {"keys": 3}
    for heads in (range(2), torch.arange(2)):
        assert attention.columns(1, heads, 3).where == {"heads": [0, 1], "keys": 3}


def test_declarations_go_to_json_and_back():
    made = [
        attention.columns(1, 2, ["Spain", 3], factor=0.5, renormalize="rows"),
        attention.keep_self(1, 2, "last"),
        attention.block(1, 2, rows="all-text", columns="all-image", exclude=[3, "last-image"]),
        attention.grid(1, 2, [1], [0], values=torch.ones(1, 1)),
        *attention.knockout("last", "Spain", range(2)),
    ]
    config = iv.IntervenableConfig(made)
    assert iv.IntervenableConfig.model_validate_json(config.model_dump_json()) == config


def test_the_stack_is_named_where_there_are_two():
    assert attention.columns(1, 2, 0, stack="cross").component == "cross_attention_pattern"
    assert attention.full(1, 2, at="scores", stack="decoder").component == "decoder_attention_scores"


def test_the_decoder_can_be_kept_from_reading_a_token_of_the_encoder():
    model = tiny("t5")
    inputs = tiny_inputs(model)
    cut = attention.columns("all", "all", [2], at="scores", stack="cross", model=model)
    assert len(cut) == len(model.decoder.block)
    unseen = inputs | {"attention_mask": inputs["attention_mask"].clone()}
    with torch.no_grad():
        states = model.encoder(input_ids=inputs["input_ids"])  # which has read it
        unseen["attention_mask"][:, 2] = 0
        expected = model(
            encoder_outputs=states,
            attention_mask=unseen["attention_mask"],
            decoder_input_ids=inputs["decoder_input_ids"],
        ).logits
        result = iv.IntervenableModel(cut, model)(inputs).intervened.logits
    assert_close(result, expected, atol=1e-5, rtol=1e-5)


WRONG = {
    "at": (lambda: attention.full(1, 2, at="patern"), "Unknown at 'patern'. Did you mean 'pattern'"),
    "mode": (lambda: attention.full(1, 2, mode="masked"), "Unknown mode 'masked'. Did you mean 'mask'"),
    "option": (
        lambda: attention.full(1, 2, renormalise="rows"),
        "Unknown option 'renormalise'.*'renormalize'",
    ),
    "stack": (lambda: attention.full(1, 2, stack="cros"), "Unknown stack 'cros'"),
    "mask of a pattern": (lambda: attention.full(1, 2, mode="mask"), "use at='scores'.*renormalize='rows'"),
    "mask with a factor": (
        lambda: attention.full(1, 2, at="scores", mode="mask", factor=0.5),
        "factor=0.5 would not be used",
    ),
    "values with a factor": (
        lambda: attention.full(1, 2, factor=0.5, values=torch.zeros(1)),
        "factor=0.5 would not be used",
    ),
    "values with a mode": (
        lambda: attention.full(1, 2, mode="scale", values=torch.zeros(1)),
        "values were given",
    ),
    "set without values": (lambda: attention.full(1, 2, mode="set"), "no values were given"),
    "factor": (lambda: attention.full(1, 2, factor=float("nan")), "factor=nan is not a finite number"),
    "renormalised scores": (
        lambda: attention.full(1, 2, at="scores", renormalize="rows"),
        "renormalize is for",
    ),
    "heads": (lambda: attention.full(1, "every"), "Unknown heads 'every'"),
    "layers": (lambda: attention.full("every", 1), "Unknown layers 'every'"),
    "layers of another kind": (lambda: attention.full(1.5, 2), "layers are 1.5; give a whole number"),
    "no layers at all": (lambda: attention.knockout(5, 1, None), "layers are None; give a whole number"),
    "heads of another kind": (
        lambda: attention.full(1, [2, 0.5]),
        r"heads are \[2, 0.5\]; give a whole number",
    ),
    "a truth as a layer": (lambda: attention.full(True, 2), "layers are True"),
    "no tokens": (
        lambda: attention.columns(1, 2, None),
        "The keys are None. Say which tokens are meant, or 'all'",
    ),
    "no layer": (lambda: attention.full([], 1), "No layers were given"),
    "a layer twice": (lambda: attention.full([1, 2, 1], 1), "Layers 1 were given more than once"),
    "all layers of no model": (lambda: attention.full("all", 1), "give model=..., or the numbers"),
    "knockout without layers": (lambda: attention.knockout(5, 1), "give model=..., or the numbers"),
    "a head twice": (lambda: attention.heads([(1, 2), (1, 2)]), "Head 2 of layer 1 is given twice"),
    "no heads": (lambda: attention.heads([]), "No heads were given"),
    "a head by name": (lambda: attention.heads([(1, "a")]), r"\(1, 'a'\) is no head"),
    "no pairs": (lambda: attention.heads(3), "3 is no head"),
    "no pair": (lambda: attention.heads([3]), "3 is no head"),
    "values for others": (
        lambda: attention.keep_self(1, 2, 3, values=torch.ones(1)),
        "keep_self takes no values",
    ),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_makes_no_sense_is_an_error_when_it_is_declared(call, message):
    with pytest.raises(iv.ConfigError, match=message):
        call()


def test_the_layers_of_an_unknown_model_cannot_be_counted():
    with pytest.raises(iv.UnsupportedModelError, match="No map describes Linear"):
        attention.full("all", 1, model=torch.nn.Linear(2, 2))
    with pytest.raises(iv.UnsupportedModelError, match="to count"):
        attention.full("all", 1, model=tiny("gru"))
