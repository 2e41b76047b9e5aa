"""From hidden states to tokens that people can read."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import intervenable as iv
from tiny_models import HIDDEN, LANGUAGE_MODELS, VARIANTS, VOCABULARY, tiny, tiny_inputs

CASES = [(family, variant) for family in LANGUAGE_MODELS for variant in (None, *VARIANTS[family])]
UNTIED = ("llama", "mistral", "gpt_neox", "phi3")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 20}


class Words:
    """A tokenizer as far as it is needed."""

    WORDS = (" a", "b\n", " c d")

    def decode(self, token_ids) -> str:
        return "".join(self.WORDS[int(token)] for token in token_ids)


def last_hidden_state(model, inputs):
    return model.base_model(**inputs).last_hidden_state


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_the_distribution_is_the_models_own(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        logits, states = model(**inputs).logits, last_hidden_state(model, inputs)
        assert_close(iv.embed_to_distrib(model, states), logits.softmax(-1), rtol=0, atol=1e-6)
        assert_close(iv.embed_to_distrib(model, states, log=True), logits.log_softmax(-1), rtol=0, atol=1e-5)
        assert_close(iv.embed_to_distrib(model, states, logits=True), logits, rtol=0, atol=1e-5)
        assert_close(iv.embed_to_distrib(model, states[0, 3]), logits[0, 3].softmax(-1), rtol=0, atol=1e-6)


def test_a_soft_cap_of_the_logits_is_part_of_the_head():
    model = tiny("gemma2")
    assert model.config.final_logit_softcapping == 30.0
    states = 100 * torch.randn(5, HIDDEN)
    logits = iv.embed_to_distrib(model, states, logits=True)
    assert 25 < logits.abs().max() <= 30


def test_a_masked_language_models_head_is_more_than_a_matrix():
    model = tiny("bert")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        states = last_hidden_state(model, inputs)
        matrix = nn.functional.linear(states, model.get_output_embeddings().weight).softmax(-1)
        assert not torch.allclose(iv.embed_to_distrib(model, states), matrix, atol=1e-3)


def test_a_headless_model_with_tied_embeddings_has_a_head_all_the_same():
    with_head, base = tiny("gpt2"), tiny("gpt2", head="base")
    base.load_state_dict(with_head.transformer.state_dict())
    states = torch.randn(2, 3, HIDDEN)
    assert_close(iv.embed_to_distrib(base, states), iv.embed_to_distrib(with_head, states), rtol=0, atol=0)


@pytest.mark.parametrize("family", UNTIED)
def test_a_headless_model_without_tied_embeddings_is_refused(family):
    base = tiny(family, head="base")
    with pytest.raises(iv.UnsupportedModelError) as caught:
        iv.embed_to_distrib(base, torch.randn(1, HIDDEN))
    assert str(caught.value) == (
        f"{type(base).__name__} has no head, and its input embeddings are not tied to one: give the model that"
        " has the head."
    )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DistilBert", {"vocab_size": 72, "dim": 16, "hidden_dim": 20, "n_layers": 1, "n_heads": 2}),
        ("Granite", {**SIZES, "vocab_size": 72, "logits_scaling": 4.0}),
    ],
)
def test_a_head_that_does_more_is_refused_and_not_guessed(name, options):
    config = getattr(transformers, f"{name}Config")(**options)
    ending = "ForMaskedLM" if name == "DistilBert" else "ForCausalLM"
    model = getattr(transformers, name + ending)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    with pytest.raises(iv.UnsupportedModelError) as caught:
        iv.embed_to_distrib(model, torch.randn(1, 16))
    assert str(caught.value) == (
        f"The head of {name}{ending} does more with hidden states than can be redone here. Take the logits of a"
        " run of the model instead: model(...).logits.softmax(-1)."
    )


def test_finding_out_about_the_head_leaves_the_model_as_it_was():
    model = tiny("bert").train()
    model.bert.eval()
    iv.embed_to_distrib(model, torch.randn(1, HIDDEN))
    assert model.training
    assert model.cls.training
    assert not model.bert.training
    assert not model.bert.encoder.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_flow_to_the_hidden_states():
    states = torch.randn(2, HIDDEN, requires_grad=True)
    iv.embed_to_distrib(tiny("llama"), states)[:, 3].sum().backward()
    assert states.grad.abs().max() > 0


def test_half_precision_models_take_states_of_any_precision():
    model = tiny("llama", dtype=torch.bfloat16)
    distribution = iv.embed_to_distrib(model, torch.randn(2, HIDDEN))
    assert distribution.dtype == torch.bfloat16
    assert distribution.shape == (2, VOCABULARY)


@pytest.mark.parametrize("shape", [(3, HIDDEN + 1), (HIDDEN, 1), ()])
def test_states_of_another_width_are_refused(shape):
    with pytest.raises(iv.InputError) as caught:
        iv.embed_to_distrib(tiny("llama"), torch.zeros(shape))
    assert str(caught.value) == (
        f"The hidden states have shape {shape}, and the head of LlamaForCausalLM takes {HIDDEN} columns."
    )


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(iv.UnsupportedModelError) as caught:
        iv.embed_to_distrib(nn.Linear(2, 2), torch.zeros(2))
    assert str(caught.value) == "Linear has neither output nor input embeddings."


# --- tokens -----------------------------------------------------------------------------------------------


def test_tokens_are_written_as_one_visible_word():
    assert [iv.format_token(Words(), token) for token in range(3)] == ["_a", "b\\n", "_c_d"]
    assert iv.format_token(Words(), torch.tensor(2)) == "_c_d"


VALUES = torch.tensor([0.2, 0.5, 0.3])


def test_the_highest_values_come_first():
    assert iv.top_vals(Words(), VALUES, n=2, return_results=True) == [
        ("b\\n", pytest.approx(0.5)),
        ("_c_d", pytest.approx(0.3)),
    ]


def test_there_are_no_more_values_than_tokens():
    assert [token for token, _ in iv.top_vals(Words(), VALUES, return_results=True)] == ["b\\n", "_c_d", "_a"]


def test_values_are_printed_behind_tokens_of_one_width(capsys):
    assert iv.top_vals(Words(), torch.tensor([0.25, 0.5, 0.125]), n=2) is None
    assert capsys.readouterr().out == "b\\n                  0.5\n_a                   0.25\n"


def test_axes_of_length_one_do_not_matter():
    assert iv.top_vals(Words(), VALUES[None, None], n=1, return_results=True) == [
        ("b\\n", pytest.approx(0.5))
    ]


def test_values_of_several_positions_are_refused():
    with pytest.raises(iv.InputError) as caught:
        iv.top_vals(Words(), torch.zeros(2, 3))
    assert str(caught.value) == "The values have shape (2, 3); give those of one position, (vocabulary,)."
