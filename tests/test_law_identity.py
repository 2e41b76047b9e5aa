"""Law 1: an identity intervention, or none, leaves every output of the model bit for bit as it is.

Inside an attention module that a fused kernel computes, it leaves them so to the kernel's rounding.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from declared import at, exact, hooks_of, insides, located, main_output, same_bits, wrapped
from torch import nn

import intervenable as iv
from tiny_models import CASES, FAMILIES, LANGUAGE_MODELS, MULTIMODAL, RECURRENT, tiny, tiny_inputs

FORMS = ("whole", "located", "negative", "ragged")
PLACED = [(*case, form) for case in CASES for form in FORMS if form in ("whole", "ragged") or case[1] is None]
"""Variants differ in what is at a place, and not in how places are written."""


def run(model, inputs):
    extra = {} if isinstance(model, nn.RNNBase) else {"output_hidden_states": True}
    with torch.no_grad():
        return model(**inputs, **extra)


def intervened(model, places, form, inputs, types, sources=None):
    """The output with interventions at all these places at once."""
    declared = wrapped(model, *(at(model, component, unit) for component, unit in places), types=types)
    slots = [located(model, component, unit, form) for component, unit in places]
    key, value = ("base", slots) if sources is None else ("sources->base", (slots, slots))
    locations = None if form == "whole" else {key: value}
    extra = {} if isinstance(model, nn.RNNBase) else {"output_hidden_states": True}
    with torch.no_grad():
        return declared(inputs, sources, locations, **extra).intervened


class Identity(iv.Intervention):
    def forward(self, base):
        return base


class Rebuilt(iv.Intervention):
    """The same values in a new tensor."""

    def forward(self, base):
        return base.clone()


def places_that_differ(model, form, inputs, types, sources=None):
    """The places whose intervention alone changes the output, looked for only if all together do."""
    expected, places = run(model, inputs), exact(model)
    if same_bits(intervened(model, places, form, inputs, types, sources), expected):
        return []
    return [
        place
        for place in places
        if not same_bits(intervened(model, [place], form, inputs, types, sources), expected)
    ] or ["all of them together"]


@pytest.mark.parametrize(("family", "variant", "form"), PLACED)
def test_an_identity_at_every_component_leaves_all_outputs_bit_identical(family, variant, form):
    model = tiny(family, variant=variant, attention="eager")
    assert places_that_differ(model, form, tiny_inputs(model), Rebuilt) == []


UNFUSED = (*RECURRENT, "bloom", "gemma2", "gpt_neo", "gptj", "gpt_oss")
FUSED = [name for name in FAMILIES if name not in UNFUSED]
"""Families that a fused kernel computes."""


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", FUSED)
def test_under_a_fused_kernel_an_identity_inside_attention_changes_outputs_by_rounding_alone(family, padding):
    model = tiny(family, attention="sdpa")
    inputs = tiny_inputs(model, padding=padding)
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = main_output(run(model, inputs))
    for form in ("whole", "ragged"):
        edited = main_output(intervened(model, insides(model), form, inputs, Rebuilt))
        assert (edited - expected).abs().max() <= 1e-6 * expected.abs().max()


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("family", FUSED)
def test_a_reading_inside_attention_leaves_a_fused_kernel_in_place(family, padding):
    model = tiny(family, attention="sdpa")
    inputs = tiny_inputs(model, padding=padding)
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = run(model, inputs)
    assert same_bits(intervened(model, insides(model), "ragged", inputs, iv.CollectIntervention), expected)


@pytest.mark.parametrize("head", ["base", "classifier"])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_an_identity_is_bit_identical_in_models_with_other_heads(family, head):
    model = tiny(family, head=head, attention="eager")
    form = "whole" if (family, head) == ("bert", "classifier") else "ragged"  # its logits have no positions
    assert places_that_differ(model, form, tiny_inputs(model), Identity) == []


@pytest.mark.parametrize("form", FORMS)
def test_an_identity_is_bit_identical_in_the_language_tower_of_a_multimodal_model(form):
    model = tiny(MULTIMODAL, attention="eager")
    assert places_that_differ(model, form, tiny_inputs(model), Rebuilt) == []


def test_a_position_that_a_pooled_output_lacks_is_an_error_of_ours():
    model = tiny("bert", head="classifier")
    declared = wrapped(model, at(model, "logits"), types=Rebuilt)
    with pytest.raises(iv.LocationRangeError, match=r"Position 3 is out of range in logits: .* 1 position"):
        declared(tiny_inputs(model), unit_locations={"base": 3})
    assert hooks_of(model) == {}


@pytest.mark.parametrize(("family", "variant", "form"), PLACED)
def test_swapping_in_the_base_itself_leaves_all_outputs_bit_identical(family, variant, form):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    assert places_that_differ(model, form, inputs, iv.VanillaIntervention, sources=[inputs]) == []


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("family", "variant"), [case for case in CASES if case[0] not in RECURRENT])
def test_an_identity_is_bit_identical_under_padding_given_the_same_position_ids(family, variant, padding):
    model = tiny(family, variant=variant, attention="eager")
    inputs = tiny_inputs(model, padding=padding)
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert places_that_differ(model, "ragged", inputs, Rebuilt) == []


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("family", LANGUAGE_MODELS)
def test_an_identity_is_bit_identical_in_the_first_and_in_the_last_block(family, layer):
    model = tiny(family, attention="eager")
    inputs = tiny_inputs(model)
    declared = wrapped(
        model,
        *(at(model, component, unit, layer=layer) for component, unit in exact(model)),
        types=Rebuilt,
    )
    with torch.no_grad():
        assert same_bits(declared(inputs).intervened, model(**inputs))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "opt", "bert"])
def test_an_identity_is_bit_identical_under_either_attention(family, attention):
    model = tiny(family, attention=attention)
    assert places_that_differ(model, "located", tiny_inputs(model), Rebuilt) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_without_interventions_the_outputs_are_the_models_own(family):
    model = tiny(family)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        original, intervened = wrapped(model)(inputs, output_original_output=True)
        expected = model(**inputs)
    assert same_bits(intervened, expected)
    assert same_bits(original, expected)
    assert type(intervened) is type(expected)


def test_a_change_of_one_bit_is_seen():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    declared = wrapped(model, at(model, "block_output", intervention=lambda base: base * (1 + 1e-6)))
    with torch.no_grad():
        assert not same_bits(declared(inputs, unit_locations={"base": 3}).intervened, model(**inputs))
    assert hooks_of(model) == {}
