"""What a call gives back, what it tells about itself, and how the model of interventions behaves as a module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import intervenable as iv
from tiny_models import HIDDEN, LAYERS, tiny, tiny_inputs

FIRST, SECOND = "layer_0.block_output.pos", "layer_1.block_output.pos"


class Words:
    """A tokenizer as far as receipts need one."""

    WORDS = ("<pad>", "The", " capital", " of", " Spain", " is", " Italy")

    def decode(self, token_ids) -> str:
        return "".join(self.WORDS[int(token)] for token in token_ids)


SPAIN = {"input_ids": torch.tensor([[1, 2, 3, 4, 5]])}
ITALY = {"input_ids": torch.tensor([[1, 2, 3, 6, 5]])}


class Passage(nn.Module):
    """A model whose one part hands on what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.stream = nn.Identity()

    def forward(self, inputs: Tensor) -> Tensor:
        return self.stream(inputs)


@pytest.fixture(scope="module")
def gpt2():
    return tiny("gpt2")


@pytest.fixture(scope="module")
def base(gpt2):
    return tiny_inputs(gpt2)


@pytest.fixture(scope="module")
def source(gpt2):
    return tiny_inputs(gpt2, seed=1)


def low_rank(layer: int = 0, **fields):
    return iv.RepresentationConfig(
        layer, low_rank_dimension=2, intervention_type=iv.LowRankRotatedSpaceIntervention, **fields
    )


def collect(layer: int = 0, component: str = "block_output", **fields):
    return iv.RepresentationConfig(layer, component, intervention_type=iv.CollectIntervention, **fields)


# --- the pair ---------------------------------------------------------------------------------------------


def test_the_output_unpacks_and_indexes_as_the_pair_of_original_and_intervened(gpt2, base, source):
    model = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2)
    out = model(base, [source], {"sources->base": 1}, output_original_output=True)
    original, intervened = out

    assert original is out[0] is out.original is out.original_outputs
    assert intervened is out[1] is out[-1] is out.intervened is out.intervened_outputs
    assert len(out) == 2
    assert type(intervened) is type(original) is type(gpt2(**base))
    with torch.no_grad():
        assert_close(original.logits, gpt2(**base).logits, rtol=0, atol=0)
    assert not torch.allclose(original.logits, intervened.logits)
    with pytest.raises(IndexError):
        out[2]


def test_the_original_is_none_unless_it_is_asked_for(gpt2, base, source):
    model = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2)
    runs = []
    watch = gpt2.register_forward_pre_hook(lambda *_: runs.append(1))
    original, _ = model(base, [source], {"sources->base": 1})
    assert (original, len(runs)) == (None, 2)
    original, _ = model(base, [source], {"sources->base": 1}, output_original_output=True)
    watch.remove()
    assert original is not None
    assert len(runs) == 5


@pytest.mark.parametrize("return_dict", [None, True, False])
def test_return_dict_is_accepted_and_the_output_has_both_forms(gpt2, base, source, return_dict):
    model = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2)
    out = model(base, [source], {"sources->base": 1}, return_dict=return_dict)
    assert out[1] is out.intervened_outputs
    assert out.intervened.logits.shape == (2, 7, 72)


def test_options_of_the_model_pass_through(gpt2, base, source):
    model = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2)
    call = (base, [source], {"sources->base": 1})

    out = model(*call, labels=base["input_ids"], output_original_output=True)
    expected = nn.functional.cross_entropy(
        out.intervened.logits[:, :-1].flatten(0, 1), base["input_ids"][:, 1:].flatten()
    )
    assert_close(out.intervened.loss, expected)
    assert_close(out.original.loss, gpt2(**base, labels=base["input_ids"]).loss)

    assert model(*call, use_cache=False).intervened.past_key_values is None
    assert model(*call, use_cache=True).intervened.past_key_values.get_seq_length() == 7
    assert len(model(*call, output_hidden_states=True).intervened.hidden_states) == LAYERS + 1
    assert model(*call, logits_to_keep=1).intervened.logits.shape == (2, 1, 72)


def test_models_that_return_tensors_or_tuples_do_so_here():
    classifier = iv.MLPClassifier(width=4, layers=2, classes=3)
    out = iv.IntervenableModel({"layer": 0}, classifier)(torch.ones(2, 4), [torch.zeros(2, 4)])
    assert isinstance(out.intervened, Tensor)
    recurrent = tiny("gru")
    inputs = tiny_inputs(recurrent)
    out = iv.IntervenableModel({"component": "block_output", "layer": 0}, recurrent)(inputs, [inputs])
    assert isinstance(out.intervened, tuple)


def test_no_interventions_give_the_plain_output(gpt2, base):
    for config in (iv.IntervenableConfig(), [], {"representations": []}):
        model = iv.IntervenableModel(config, gpt2)
        out = model(base)
        assert torch.equal(out.intervened.logits, gpt2(**base).logits)
        assert (out.original, dict(out.collected), list(out.receipt)) == (None, {}, [])
        assert (model.names, dict(model.interventions), list(model.parameters())) == ((), {}, [])
    with pytest.raises(iv.SourceError) as caught:
        model(base, [base])
    assert str(caught.value) == "Source 0 would not be used: no intervention here takes one. Leave it out."


# --- readings ---------------------------------------------------------------------------------------------


def test_readings_are_named_and_ordered_as_declared(gpt2, base):
    entries = [collect(2), collect(0, "mlp_output", name="mine"), collect(2)]
    out = iv.IntervenableModel(entries, gpt2)(base, unit_locations={"base": [0, 2]})
    assert list(out.collected) == ["layer_2.block_output.pos#0", "mine", "layer_2.block_output.pos#1"]
    assert [value.shape for value in out.collected_activations] == [(2, 2, HIDDEN)] * 3
    assert all(a is b for a, b in zip(out.collected_activations, out.collected.values(), strict=True))
    assert dict(out.collected_mask) == {}
    with torch.no_grad():
        hidden = gpt2(**base, output_hidden_states=True).hidden_states
    # The last hidden state has passed the final norm: compare one that has not.
    first = iv.IntervenableModel(collect(1), gpt2)(base).collected[SECOND]
    assert_close(first, hidden[2], rtol=0, atol=0)


def test_a_reading_sees_the_edits_declared_before_it(gpt2, base):
    zero = iv.RepresentationConfig(0, intervention_type=iv.ZeroIntervention)
    entries = [collect(name="before"), zero, collect(name="after")]
    out = iv.IntervenableModel(entries, gpt2)(base, unit_locations={"base": 1})
    with torch.no_grad():
        plain = gpt2(**base, output_hidden_states=True).hidden_states[1][:, 1:2]
    assert_close(out.collected["before"], plain, rtol=0, atol=0)
    assert_close(out.collected["after"], torch.zeros(2, 1, HIDDEN), rtol=0, atol=0)


def test_readings_of_different_numbers_of_units_are_padded_with_zeros_and_a_mask(gpt2, base):
    out = iv.IntervenableModel(collect(), gpt2)(base, unit_locations={"base": [[[3], [0, 5, 2]]]})
    with torch.no_grad():
        hidden = gpt2(**base, output_hidden_states=True).hidden_states[1]
    found, mask = out.collected[FIRST], out.collected_mask[FIRST]
    assert torch.equal(mask, torch.tensor([[True, False, False], [True, True, True]]))
    assert_close(
        found[0], torch.stack([hidden[0, 3], torch.zeros(HIDDEN), torch.zeros(HIDDEN)]), rtol=0, atol=0
    )
    assert_close(found[1], hidden[1, [0, 5, 2]], rtol=0, atol=0)


def test_reading_changes_nothing(gpt2, base):
    out = iv.IntervenableModel([collect(layer) for layer in range(LAYERS)], gpt2)(base)
    assert torch.equal(out.intervened.logits, gpt2(**base).logits)


# --- receipts ---------------------------------------------------------------------------------------------


def test_a_receipt_says_what_was_touched_how_often_and_by_how_much():
    inputs = torch.tensor([[[3.0, 4.0], [1.0, 0.0]], [[0.0, 0.0], [5.0, 12.0]]])
    entries = [
        iv.RepresentationConfig(
            component="stream.output", intervention_type=iv.ZeroIntervention, name="clear"
        ),
        iv.RepresentationConfig(component="stream.output", intervention=torch.neg, name="turn"),
    ]
    out = iv.IntervenableModel(entries, Passage())(
        inputs, unit_locations={"base": [[[0], [0, 1]], [[1], [1]]]}
    )
    lines = out.receipt.lines
    assert [(line.name, line.intervention, line.example) for line in lines] == [
        ("clear", "ZeroIntervention", 0),
        ("clear", "ZeroIntervention", 1),
        ("turn", "CallableIntervention", 0),
        ("turn", "CallableIntervention", 1),
    ]
    assert [(line.positions, line.fired, line.change) for line in lines] == [
        ((0,), 1, 5.0),
        ((0, 1), 1, 13.0),
        ((1,), 1, 2.0),
        ((1,), 1, 0.0),
    ]
    assert str(out.receipt) == (
        "intervention  example  site           units          tokens  fired  change\n"
        "------------  -------  -------------  -------------  ------  -----  ------\n"
        "clear         0        stream.output  positions 0    -       1      5\n"
        "clear         1        stream.output  positions 0,1  -       1      13\n"
        "turn          0        stream.output  positions 1    -       1      2\n"
        "turn          1        stream.output  positions 1    -       1      0"
    )
    assert repr(out.receipt) == str(out.receipt)
    assert out.receipt[0] == lines[0]
    assert out.receipt[1:3] == lines[1:3]
    assert len(out.receipt) == 4


def test_a_receipt_shows_the_tokens_if_a_tokenizer_is_known(gpt2):
    model = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2, tokenizer=Words())
    (line,) = model(SPAIN, [ITALY], {"sources->base": [3, -1]}).receipt
    assert line.tokens == (" Spain", " is")
    assert line.site == "transformer.h.0.output"
    assert line.change > 0
    (line,) = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2)(SPAIN, [ITALY]).receipt
    assert (line.tokens, line.positions) == (None, None)


def test_a_receipt_counts_positions_in_real_tokens_and_names_heads(gpt2):
    padded = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5], [0, 0, 1, 2, 3]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
    }
    entry = iv.RepresentationConfig(1, "head_value_output", "h.pos", intervention_type=iv.ZeroIntervention)
    model = iv.IntervenableModel(entry, gpt2, tokenizer=Words())
    receipt = model(padded, unit_locations={"base": iv.get_loc(([0, 2], -1), batch_size=2)}).receipt
    assert [(line.heads, line.positions, line.tokens) for line in receipt] == [
        ((0, 2), (4,), (" is",)),
        ((0, 2), (2,), (" of",)),
    ]


def test_a_receipt_names_what_was_skipped(gpt2, base, source):
    model = iv.IntervenableModel([iv.RepresentationConfig(0), iv.RepresentationConfig(1)], gpt2)
    receipt = model(base, [None, source], {"sources->base": 1}).receipt
    assert receipt.skipped == (FIRST,)
    assert str(receipt).splitlines()[-1] == f"skipped: {FIRST}"


# --- explanations -----------------------------------------------------------------------------------------


def test_explain_prints_the_plan_as_a_table_and_runs_nothing(gpt2, capsys):
    entries = [
        iv.RepresentationConfig(0),
        iv.RepresentationConfig(1, "mlp_output", source_representation=torch.zeros(HIDDEN)),
        iv.RepresentationConfig(2, "head_value_output", "h", intervention_type=iv.ZeroIntervention),
        iv.RepresentationConfig(component="logits", name="unused"),
    ]
    model = iv.IntervenableModel(entries, gpt2, tokenizer=Words())
    runs = []
    watch = gpt2.register_forward_pre_hook(lambda *_: runs.append(1))
    locations = {"sources->base": ([[[3]], None, None, None], [[[-1]], [[0]], [[1, 2]], None])}
    explanation = model.explain(SPAIN, [ITALY, None, None, None], locations)
    watch.remove()

    printed = capsys.readouterr().out
    assert [
        " | ".join(cell.strip() for cell in line.split("  ") if cell.strip()) for line in printed.splitlines()
    ] == [
        "name | intervention | layer | component | module | unit | touches | fed by",
        printed.splitlines()[1].replace("  ", " | "),
        "layer_0.block_output.pos | VanillaIntervention | 0 | block_output | transformer.h.0.output | pos"
        " | positions 4 ' is' | source 0: positions 3 ' Italy'",
        "layer_1.mlp_output.pos | VanillaIntervention | 1 | mlp_output | transformer.h.1.mlp.output | pos"
        " | positions 0 'The' | constant",
        "layer_2.head_value_output.h | ZeroIntervention | 2 | head_value_output | transformer.h.2.attn.c_attn.output"
        " | h | heads 1,2 x all positions | nothing",
        "unused | VanillaIntervention | - | logits | lm_head.output | pos | (skipped) | -",
    ]
    assert printed == f"{explanation}\n"
    assert runs == []
    assert [row["fed by"] for row in explanation] == [
        "source 0: positions 3 ' Italy'",
        "constant",
        "nothing",
        "-",
    ]


def test_the_exact_text_of_an_explanation(gpt2):
    model = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2, tokenizer=Words())
    file = io.StringIO()
    model.explain(SPAIN, [ITALY], {"sources->base": 3}, file=file)
    assert file.getvalue() == (
        "name                      intervention         layer  component     module                  unit"
        "  touches               fed by\n"
        "------------------------  -------------------  -----  ------------  ----------------------  ----"
        "  --------------------  ------------------------------\n"
        "layer_0.block_output.pos  VanillaIntervention  0      block_output  transformer.h.0.output  pos "
        "  positions 3 ' Spain'  source 0: positions 3 ' Italy'\n"
    )


def test_the_main_story_on_the_small_language_model():
    """One swap turns the answer, and explanation and receipt say where, with the tokens."""
    tokenizer, language_model = iv.load_small_lm()
    spain, italy = (
        tokenizer(f"The capital of {name} is", return_tensors="pt") for name in ("Spain", "Italy")
    )
    model = iv.IntervenableModel(
        iv.RepresentationConfig(4, "block_output", "pos", 1), language_model, tokenizer=tokenizer
    )
    call = (spain, [italy], {"sources->base": ([[[4]]], [[[4]]])})
    file = io.StringIO()
    model.explain(*call, file=file)
    assert file.getvalue() == (
        "name                      intervention         layer  component     module                 unit"
        "  touches            fed by\n"
        "------------------------  -------------------  -----  ------------  ---------------------  ----"
        "  -----------------  ---------------------------\n"
        "layer_4.block_output.pos  VanillaIntervention  4      block_output  model.layers.4.output  pos "
        "  positions 4 ' is'  source 0: positions 4 ' is'\n"
    )
    out = model(*call, output_original_output=True)
    said = [
        iv.top_vals(tokenizer, one.logits[0, -1].softmax(-1), 1, return_results=True)[0][0] for one in out
    ]
    assert said == ["_Madrid", "_Rome"]
    (line,) = out.receipt
    assert (line.positions, line.tokens, line.fired) == ((4,), (" is",), 1)
    states = language_model.model(**spain).last_hidden_state[0, -1]
    (top,) = iv.top_vals(tokenizer, iv.embed_to_distrib(language_model, states), 1, return_results=True)
    assert top[0] == "_Madrid"


def test_explain_finds_the_faults_that_a_call_would(gpt2, base):
    model = iv.IntervenableModel(iv.RepresentationConfig(0), gpt2)
    with pytest.raises(iv.SourceError) as of_explain:
        model.explain(base)
    with pytest.raises(iv.SourceError) as of_call:
        model(base)
    assert str(of_explain.value) == str(of_call.value)


def test_explain_writes_examples_apart_where_they_differ(gpt2, base):
    model = iv.IntervenableModel(iv.RepresentationConfig(0, intervention_type=iv.ZeroIntervention), gpt2)
    (row,) = model.explain(base, unit_locations={"base": [[[1], [2, 3]]]}, file=io.StringIO())
    assert row["touches"] == "[0] positions 1; [1] positions 2,3"


# --- the module -------------------------------------------------------------------------------------------


def test_interventions_are_a_read_only_mapping_in_which_linked_names_share_a_module(gpt2):
    entries = [low_rank(0, intervention_link_key=1), low_rank(1, intervention_link_key=1), low_rank(2)]
    model = iv.IntervenableModel(entries, gpt2)
    names = [FIRST, SECOND, "layer_2.block_output.pos"]
    assert list(model.interventions) == names == list(model.names)
    first, second, third = model.interventions.values()
    assert first is second
    assert first is not third
    with pytest.raises(TypeError):
        model.interventions[FIRST] = third
    assert len(list(model.parameters())) == 2


def test_default_names_survive_reordering(gpt2):
    entries = [low_rank(1), collect(0, "mlp_output"), low_rank(0)]
    one = iv.IntervenableModel(entries, gpt2)
    other = iv.IntervenableModel(entries[::-1], gpt2)
    assert set(one.state_dict()) == set(other.state_dict())
    other.load_state_dict(one.state_dict())
    for name in one.names:
        for mine, theirs in zip(
            one.interventions[name].parameters(), other.interventions[name].parameters(), strict=True
        ):
            assert torch.equal(mine, theirs)


def test_parameters_state_and_mode_are_those_of_the_interventions_alone(gpt2):
    gpt2.eval()
    model = iv.IntervenableModel([low_rank(), iv.RepresentationConfig(1)], gpt2)
    (rotation,) = model.parameters()
    assert rotation is model.interventions[FIRST].rotation.weight
    assert [tuple(value.shape) for value in model.state_dict().values()] == [(HIDDEN, 2)]
    wrapped = set(map(id, gpt2.modules()))
    assert not any(id(module) in wrapped for module in model.modules())

    assert model.train().training
    assert model.interventions[FIRST].training
    assert not gpt2.training
    model.requires_grad_(False)
    assert not rotation.requires_grad
    assert all(parameter.requires_grad for parameter in gpt2.parameters())
    model.requires_grad_(True)
    gpt2.lm_head.weight.grad = torch.ones_like(gpt2.lm_head.weight)
    model.zero_grad()
    assert gpt2.lm_head.weight.grad is not None
    gpt2.lm_head.weight.grad = None


def test_a_state_dict_carries_the_weights_over(gpt2, base, source):
    one, other = (iv.IntervenableModel(low_rank(), gpt2) for _ in range(2))
    call = (base, [source], {"sources->base": 2})
    before = other(*call).intervened.logits
    other.load_state_dict(one.state_dict())
    assert torch.equal(one(*call).intervened.logits, other(*call).intervened.logits)
    assert not torch.allclose(before, one(*call).intervened.logits)


def test_conversions_move_both():
    language_model = tiny("gpt2")
    model = iv.IntervenableModel(low_rank(), language_model)
    base, source = tiny_inputs(language_model), tiny_inputs(language_model, seed=1)
    for convert, dtype in (
        (lambda: model.to(torch.float64), torch.float64),
        (lambda: model.bfloat16(), torch.bfloat16),
        (lambda: model.float(), torch.float32),
    ):
        assert convert() is model
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert {parameter.dtype for parameter in language_model.parameters()} == {dtype}
        assert model(base, [source], {"sources->base": 1}).intervened.logits.dtype == dtype


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_stands_by_itself(copied):
    language_model = tiny("gpt2")
    linked = [low_rank(0, intervention_link_key=1), low_rank(1, intervention_link_key=1)]
    model = iv.IntervenableModel(linked, language_model)
    call = (tiny_inputs(language_model), [tiny_inputs(language_model, seed=1)], {"sources->base": 1})
    expected = model(*call).intervened.logits

    twin = copied(model)
    assert twin.model is not language_model
    assert twin.interventions[FIRST] is twin.interventions[SECOND]
    assert torch.equal(twin(*call).intervened.logits, expected)

    with torch.no_grad():
        next(twin.parameters()).add_(torch.randn(HIDDEN, 2))
        twin.model.transformer.wte.weight.mul_(2)
    assert not torch.allclose(twin(*call).intervened.logits, expected)
    assert torch.equal(model(*call).intervened.logits, expected)


@pytest.mark.parametrize("name", ["values", "clear", "forward", "training", "weight.1", "type", "_modules"])
def test_any_name_without_a_slash_will_do(gpt2, base, source, name):
    model = iv.IntervenableModel([low_rank(name=name), low_rank(1, name=f"{name}2")], gpt2)
    twin = iv.IntervenableModel([low_rank(name=name), low_rank(1, name=f"{name}2")], gpt2)
    assert model.names == (name, f"{name}2")
    twin.load_state_dict(model.state_dict())
    call = (base, [source], {"sources->base": 1})
    assert torch.equal(twin(*call).intervened.logits, model(*call).intervened.logits)


def test_the_text_of_a_model_names_what_it_wraps_and_its_interventions(gpt2):
    text = str(iv.IntervenableModel([low_rank(), iv.RepresentationConfig(1)], gpt2))
    assert text.startswith("IntervenableModel(\n  model=GPT2LMHeadModel\n")
    assert "LowRankRotatedSpaceIntervention" in text
    assert "GPT2Block" not in text
    assert len(text.splitlines()) < 12


def test_wrapping_leaves_the_model_as_it_was():
    language_model = tiny("gpt2")
    language_model.train()
    before = {name: value.clone() for name, value in language_model.state_dict().items()}
    model = iv.IntervenableModel([low_rank(), iv.RepresentationConfig(1)], language_model)
    assert model.model is language_model
    assert language_model.training
    assert all(parameter.requires_grad for parameter in language_model.parameters())
    assert all(torch.equal(before[name], value) for name, value in language_model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in language_model.modules())


def test_a_temperature_reaches_every_intervention_that_has_one() -> None:
    kinds = [iv.SigmoidMaskIntervention, iv.BoundlessRotatedSpaceIntervention, iv.VanillaIntervention]
    places = [iv.RepresentationConfig(layer, "block_output") for layer in range(3)]
    model = iv.IntervenableModel(iv.IntervenableConfig(places, kinds), iv.MLPClassifier(4, 3, 2))
    model.set_temperature(0.25)
    mask, boundless, _ = model.interventions.values()
    assert mask.temperature.item() == boundless.temperature.item() == 0.25


def test_a_temperature_that_nothing_has_cannot_be_set() -> None:
    model = iv.IntervenableModel(iv.RepresentationConfig(0), iv.MLPClassifier(4, 1, 2))
    with pytest.raises(iv.ConfigError) as error:
        model.set_temperature(1.0)
    assert str(error.value) == (
        "No intervention of this model has a temperature. It has: VanillaIntervention."
    )
