"""Models whose linear layers are of other classes: quantised, with adapters."""

from __future__ import annotations

import copy

import pytest
import torch
from declared import at, everything, hooks_of, located, main_output, same_bits, stored, tensors_of, wrapped
from quantised_by_hand import Linear4bit, Linear8bitLt, quantised, unpacked
from torch import nn
from torch.testing import assert_close

import intervenable as iv
from intervenable.binding import Places
from tiny_models import tiny, tiny_inputs

LEARNING = iv.metrics.logit_difference(None, 5, 6)


def prompts(model, batch=2):
    return [tiny_inputs(model, batch=batch, seed=seed) for seed in (0, 1)]


def assert_all_components_give_the_same(here, model, exactly=True):
    """Swaps at every component of `model` give what they give at the same component of `here`."""
    base, source = prompts(here)
    assert Places(model).components == Places(here).components
    for place in everything(here):
        where = [located(here, *place, "ragged")]
        with torch.no_grad():
            expected, result = (
                wrapped(one, at(here, *place))(base, [source], {"sources->base": (where, where)}).intervened
                for one in (here, model)
            )
        if exactly and place[0] != "head_attention_output":  # whose matrix is measured
            assert same_bits(result, expected), place
        else:
            assert_close(tensors_of(result), tensors_of(expected), atol=2e-5, rtol=1e-4, msg=f"{place}")
    assert hooks_of(model) == {}


# --- quantised --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bitLt])
@pytest.mark.parametrize("family", ["llama", "opt", "mixtral"])
def test_a_model_with_packed_weights_has_all_components_with_the_values_of_the_unpacked_one(family, kind):
    model = quantised(tiny(family), kind)
    here = unpacked(copy.deepcopy(model))
    assert_all_components_give_the_same(here, model)


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bitLt])
def test_widths_are_those_of_the_unpacked_weights(kind):
    here, model = tiny("llama"), quantised(tiny("llama"), kind)
    for component in ("query_output", "key_output", "mlp_hidden", "attention_value_output", "logits"):
        widths = [Places(one).at(component, 1).width for one in (here, model)]
        assert widths[0] == widths[1] is not None, component


@pytest.mark.parametrize("kind", [Linear4bit, Linear8bitLt])
@pytest.mark.parametrize("component", ["block_input", "mlp_output", "head_attention_output"])
def test_a_packed_model_is_swept_and_trained_on_like_the_unpacked_one(kind, component):
    model = quantised(tiny("llama"), kind)
    here = unpacked(copy.deepcopy(model))
    clean, corrupted = prompts(here, batch=1)
    axes = ("layer", "head") if component.startswith("head") else ("layer", "pos")
    values = [
        iv.patching.sweep(one, clean, corrupted, component=component, axes=axes, metric=LEARNING).values
        for one in (here, model)
    ]
    assert_close(values[1], values[0], atol=2e-5, rtol=1e-4)

    if axes[1] == "head":
        return
    losses = []
    for one in (here, model):
        torch.manual_seed(0)
        das = wrapped(
            one,
            at(one, component, low_rank_dimension=2),
            types=iv.LowRankRotatedSpaceIntervention,
        )
        loss = main_output(das(clean, [corrupted], {"sources->base": 3}).intervened).pow(2).mean()
        loss.backward()
        losses.append((loss.detach(), next(iter(das.get_trainable_parameters())).grad))
    assert_close(losses[1], losses[0], atol=2e-4, rtol=1e-3)


@pytest.mark.filterwarnings("ignore")  # torch means to give these up
def test_torchs_dynamically_quantised_layers_have_all_components_but_those_that_need_a_matrix():
    here = tiny("llama")
    model = torch.ao.quantization.quantize_dynamic(tiny("llama"), {nn.Linear}, dtype=torch.qint8).eval()
    base, source = prompts(here)
    assert Places(model).components == Places(here).components
    assert Places(model).at("query_output", 1).width == Places(here).at("query_output", 1).width
    with torch.no_grad():
        plain = model(**base)
        for place in everything(here):
            declared = wrapped(model, at(here, *place))
            if place[0] == "head_attention_output":
                with pytest.raises(iv.UnsupportedModelError, match=r"o_proj as a matrix.* is no linear map"):
                    declared(base, [source])
                continue
            assert not torch.equal(declared(base, [source]).intervened.logits, plain.logits), place
            if place in stored(here):
                assert same_bits(declared(base, [base]).intervened, plain), place


# --- adapters ---------------------------------------------------------------------------------------------


adapted = pytest.mark.filterwarnings("ignore")  # of peft and transformers among themselves


def with_adapter(model, **options):
    """A model with low-rank changes of some layers that are not zero."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, lora).eval()


LORA = {
    "llama": ["q_proj", "v_proj", "gate_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "bert": ["query", "dense"],
    "mixtral": ["q_proj", "o_proj", "lm_head"],
}


@adapted
@pytest.mark.parametrize("family", LORA)
def test_a_model_with_an_adapter_gives_what_the_merged_model_gives_at_every_component(family):
    model = with_adapter(tiny(family), target_modules=LORA[family], fan_in_fan_out=family == "gpt2")
    here = copy.deepcopy(model).merge_and_unload()
    assert_all_components_give_the_same(here, model, exactly=False)
    base, _ = prompts(here)
    with torch.no_grad():
        assert not torch.allclose(main_output(model(**base)), main_output(tiny(family)(**base)), atol=1e-2)


@adapted
def test_a_model_whose_adapter_is_off_gives_what_the_plain_model_gives_to_the_bit():
    model = with_adapter(tiny("llama"), target_modules=LORA["llama"])
    with model.disable_adapter():
        assert_all_components_give_the_same(tiny("llama"), model)


@adapted
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_a_model_with_an_adapter_is_collected_from_swept_and_trained_on_like_the_merged_one(task):
    model = with_adapter(tiny("llama"), target_modules=LORA["llama"], task_type=task)
    here = copy.deepcopy(model).merge_and_unload()
    clean, corrupted = prompts(here, batch=1)
    padded = tiny_inputs(here, batch=3, padding="left")
    names = Places(here).components
    caches = [iv.collect(one, padded, names) for one in (here, model)]
    assert caches[0].keys() == caches[1].keys()
    assert_close(dict(caches[1].items()), dict(caches[0].items()), atol=2e-5, rtol=1e-4)
    for component in ("block_input", "mlp_output"):
        values = [
            iv.patching.sweep(one, clean, corrupted, component, axes=("layer", "pos"), metric=LEARNING).values
            for one in (here, model)
        ]
        assert_close(values[1], values[0], atol=2e-5, rtol=1e-4)

    trains = {name: weight.requires_grad for name, weight in model.named_parameters()}
    assert any(trains.values())
    gradients = []
    for one in (here, model):
        torch.manual_seed(0)
        entry = at(here, "block_output", low_rank_dimension=2)
        das = wrapped(one, entry, types=iv.LowRankRotatedSpaceIntervention)
        das.disable_model_gradients()
        main_output(das(clean, [corrupted], {"sources->base": 3}).intervened).pow(2).mean().backward()
        gradients.append(das.get_trainable_parameters()[0].grad)
    assert_close(gradients[1], gradients[0], atol=2e-4, rtol=1e-3)
    assert all(weight.grad is None for weight in model.parameters())


@adapted
def test_an_adapter_that_adds_positions_is_refused_until_it_is_off():
    peft = pytest.importorskip("peft")
    inside = tiny("llama")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, token_dim=16)
    model = peft.get_peft_model(inside, prompt).eval()
    base, source = prompts(inside)
    declared = wrapped(model, at(inside, "block_output"))
    with pytest.raises(iv.UnsupportedModelError) as error:
        declared(base, [source])
    assert str(error.value) == (
        "PeftModelForCausalLM puts 3 virtual tokens before every prompt, so that positions would not be those of"
        " base. Give the model inside, model.get_base_model(), or switch them off: with model.disable_adapter()."
    )
    with torch.no_grad():
        expected = wrapped(tiny("llama"), at(inside, "block_output"))(base, [source]).intervened
        with model.disable_adapter():
            assert same_bits(declared(base, [source]).intervened, expected)
