"""Components that no module hands over: what each head adds, and the divisor of the last norm."""

from __future__ import annotations

import by_hand
import pytest
import torch
from declared import at, components_of, main_output, wrapped
from test_block_mid import POST_NORM, two_prompts
from torch.testing import assert_close

import intervenable as iv
from tiny_models import CASES, HEADS, HIDDEN, RECURRENT, tiny, tiny_inputs

LANGUAGE = [case for case in CASES if case[0] not in RECURRENT]
WITH_FINAL_NORM = [
    case for case in LANGUAGE if "final_norm_scale" in components_of(tiny(case[0], variant=case[1]))
]


def collected(model, inputs, *components):
    declared = wrapped(model, *(at(model, name) for name in components), types=iv.CollectIntervention)
    with torch.no_grad():
        return declared(inputs).collected_activations


def intervened(model, inputs, *representations, **call):
    with torch.no_grad():
        return main_output(wrapped(model, *representations)(inputs, **call).intervened)


def projection(model):
    """The output projection of attention: `[in, out]`, and its bias or zero."""
    module, _ = by_hand.module_at(model, "attention_value_output")
    weight = module.weight if type(module).__name__ == "Conv1D" else module.weight.T
    bias = module.bias
    return weight.detach(), torch.zeros(HIDDEN) if bias is None else bias.detach()


# What each head adds to the attention output


@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_what_the_heads_add_sums_to_the_attention_output(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    heads, values = collected(model, inputs, "head_attention_output", "head_attention_value_output")
    with torch.no_grad():
        output = by_hand.seen(model, "attention_output", inputs)
    weight, bias = projection(model)

    assert heads.shape == (2, HEADS, 7, HIDDEN)
    assert_close(heads.sum(1) + bias, output, atol=1e-5, rtol=1e-5)
    for head, rows in enumerate(weight.split(by_hand.head_width(family))):
        assert_close(heads[:, head], values[:, head] @ rows, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("locations", [None, {"base": [[[[1], [3, 0]], [[2, -1], [4]]]]}])
@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_clearing_what_a_head_adds_is_clearing_its_values(family, variant, locations):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    added, values = (
        at(model, name, "h.pos", intervention=iv.ZeroIntervention())
        for name in ("head_attention_output", "head_attention_value_output")
    )
    result = intervened(model, inputs, added, unit_locations=locations)
    expected = intervened(model, inputs, values, unit_locations=locations)

    # Without any head, rounding is all that the norm after attention gets here, and it divides by root epsilon.
    grown = locations is None and family in ("gemma2", "gemma3", "olmo2")
    assert_close(result, expected, atol=2e-3 if grown else 1e-5, rtol=1e-5)
    with torch.no_grad():
        assert (result - main_output(model(**inputs))).abs().max() > 1e-3


@pytest.mark.parametrize(("family", "variant"), LANGUAGE)
def test_a_swap_of_what_a_head_adds_equals_a_hook_written_by_hand(family, variant):
    model = tiny(family, variant=variant)
    base, source = two_prompts(model)
    rows = projection(model)[0].split(by_hand.head_width(family))[2]
    columns = torch.arange(HEADS * by_hand.head_width(family)).split(by_hand.head_width(family))[2]

    with torch.no_grad():
        taken, given = (by_hand.seen(model, "attention_value_output", inputs) for inputs in (source, base))
        change = torch.zeros(2, 7, HIDDEN)
        change[:, 4] = (taken[:, 1, columns] - given[:, 4, columns]) @ rows
        expected = by_hand.run_with(model, "attention_output", lambda value: value + change, base)
    result = intervened(
        model,
        base,
        at(model, "head_attention_output", "h.pos"),
        sources=[source],
        unit_locations={"sources->base": ([[[[2]] * 2, [[1]] * 2]], [[[[2]] * 2, [[4]] * 2]])},
    )
    assert_close(result, main_output(expected), atol=1e-5, rtol=1e-5)


def test_what_a_head_adds_can_be_steered_in_one_example_alone():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    steer = torch.randn(HIDDEN)
    addition = iv.AdditionIntervention(source_representation=steer)
    locations = {"base": [[[[0], [1, 3]], [[5], [2, 4]]]]}
    result = intervened(
        model,
        inputs,
        at(model, "head_attention_output", "h.pos", intervention=addition),
        unit_locations=locations,
    )

    change = torch.zeros(2, 7, HIDDEN)
    change[0, 5] = steer
    change[1, [2, 4]] = 2 * steer  # two heads each add it
    with torch.no_grad():
        expected = by_hand.run_with(model, "attention_output", lambda value: value + change, inputs)
    assert_close(result, main_output(expected), atol=1e-5, rtol=1e-5)


# The divisor of the last norm


def norm_and_input(model, inputs):
    with torch.no_grad():
        return by_hand.module_at(model, "final_norm_output")[0], by_hand.seen(
            model, "final_norm_input", inputs
        )


def scaled_by_hand(norm, values, scale):
    """What the norm gives if it divides by `scale`."""
    if isinstance(norm, torch.nn.LayerNorm):
        return (values - values.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
    gain = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
    return values / scale * gain


def scale_by_hand(norm, values):
    if isinstance(norm, torch.nn.LayerNorm):
        return (values.var(-1, keepdim=True, unbiased=False) + norm.eps).sqrt()
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return (values.pow(2).mean(-1, keepdim=True) + epsilon).sqrt()


@pytest.mark.parametrize(("family", "variant"), WITH_FINAL_NORM)
def test_the_last_norms_divisor_is_what_the_formula_says(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    norm, values = norm_and_input(model, inputs)
    (scale,) = collected(model, inputs, "final_norm_scale")

    assert scale.shape == (2, 7, 1)
    assert_close(scale, scale_by_hand(norm, values), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert_close(norm(values), scaled_by_hand(norm, values, scale), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "variant"), WITH_FINAL_NORM)
def test_a_frozen_divisor_replaces_the_norms_own(family, variant):
    model = tiny(family, variant=variant)
    base, source = two_prompts(model)
    norm, values = norm_and_input(model, base)
    frozen = scale_by_hand(*norm_and_input(model, source))

    scale = scale_by_hand(norm, values)
    scale[0, 2], scale[1, [5, 0]] = frozen[0, 1], frozen[1, [3, 6]]
    with torch.no_grad():
        output = scaled_by_hand(norm, values, scale)
        expected = by_hand.run_with(model, "final_norm_output", lambda _: output, base)
    result = intervened(
        model,
        base,
        at(model, "final_norm_scale"),
        sources=[source],
        unit_locations={"sources->base": ([[[1], [3, 6]]], [[[2], [5, 0]]])},
    )
    assert_close(result, main_output(expected), atol=1e-5, rtol=1e-4)
    assert (result - main_output(model(**base))).abs().max() > 1e-3


def test_the_divisor_is_not_shifted_with_what_the_norm_reads():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    norm, values = norm_and_input(model, inputs)
    (frozen,) = collected(model, inputs, "final_norm_scale")
    shift = torch.randn(HIDDEN)

    with torch.no_grad():
        output = scaled_by_hand(norm, values + shift, frozen)
        expected = by_hand.run_with(model, "final_norm_output", lambda _: output, inputs)
    result = intervened(
        model,
        inputs,
        at(model, "final_norm_input", intervention=iv.AdditionIntervention(source_representation=shift)),
        at(model, "final_norm_scale", source_representation=frozen),
    )
    assert_close(result, main_output(expected), atol=1e-5, rtol=1e-4)


# What attention and MLP add to the stream


@pytest.mark.parametrize(("family", "variant"), [case for case in LANGUAGE if case not in POST_NORM])
def test_a_block_adds_up(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    before, attention, mlp, after = collected(
        model, inputs, "block_input", "attention_contribution", "mlp_contribution", "block_output"
    )
    assert_close(after, before + attention + mlp, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "variant"), [case for case in LANGUAGE if case not in POST_NORM])
def test_without_what_attention_and_mlp_add_a_block_is_the_identity(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    declared = wrapped(
        model,
        *(
            at(model, name, intervention=iv.ZeroIntervention())
            for name in ("attention_contribution", "mlp_contribution")
        ),
        *(at(model, name, intervention=iv.CollectIntervention()) for name in ("block_input", "block_output")),
    )
    with torch.no_grad():
        before, after = declared(inputs).collected_activations
    assert torch.equal(before, after)
