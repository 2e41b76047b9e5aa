"""`block_mid`: the stream after attention is added, which both the MLP and the residual read."""

from __future__ import annotations

import by_hand
import pytest
import torch
from declared import at, hooks_of, main_output, map_of, wrapped
from torch.testing import assert_close

import intervenable as iv
from tiny_models import CASES, RECURRENT, tiny, tiny_inputs

PARALLEL = [("gptj", None), ("gpt_neox", None), *(("falcon", name) for name in (None, "grouped", "one_norm"))]
SEQUENTIAL = [case for case in CASES if case[0] not in RECURRENT and case not in PARALLEL]
POST_NORM = [("bert", None), ("opt", "post_norm"), ("bloom", "post_norm")]


def two_prompts(model):
    return tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)


@pytest.mark.parametrize(("family", "variant"), SEQUENTIAL)
def test_the_sources_middle_at_all_positions_gives_the_sources_output(family, variant):
    model = tiny(family, variant=variant)
    base, source = two_prompts(model)
    with torch.no_grad():
        expected, plain = main_output(model(**source)), main_output(model(**base))
        result = main_output(wrapped(model, at(model, "block_mid"))(base, [source]).intervened)

    assert_close(result, expected, atol=1e-5, rtol=1e-5)
    assert (result - plain).abs().max() > 0.1


@pytest.mark.parametrize(("family", "variant"), [case for case in SEQUENTIAL if case not in POST_NORM])
def test_the_middle_is_the_blocks_input_and_what_attention_adds(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        before = by_hand.seen(model, "block_input", inputs)
        added = by_hand.seen(model, "attention_contribution", inputs)
        declared = wrapped(model, at(model, "block_mid"), types=iv.CollectIntervention)
        (middle,) = declared(inputs).collected_activations
    assert_close(middle, before + added, atol=1e-6, rtol=1e-6)


def llama_block_after(block, middle):
    return middle + block.mlp(block.post_attention_layernorm(middle))


def gpt2_block_after(block, middle):
    return middle + block.mlp(block.ln_2(middle))


def gemma2_block_after(block, middle):
    return middle + block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(middle)))


def bert_block_after(block, middle):
    return block.output.LayerNorm(block.output.dense(block.intermediate(middle)) + middle)


@pytest.mark.parametrize(
    ("family", "block_after"),
    [
        ("gpt2", gpt2_block_after),
        ("llama", llama_block_after),
        ("gemma2", gemma2_block_after),
        ("bert", bert_block_after),
    ],
)
@pytest.mark.parametrize("unit_locations", [[[[2, 0], [5, 1]]], [[[3], [0, 6, 4]]]])
def test_a_block_with_another_middle_is_the_block_computed_from_it(family, block_after, unit_locations):
    model = tiny(family)
    inputs = tiny_inputs(model)
    other = torch.randn(16)
    declared = wrapped(model, at(model, "block_mid", source_representation=other))
    reading = wrapped(model, at(model, "block_mid"), types=iv.CollectIntervention)
    after = []
    with torch.no_grad():
        (middle,) = reading(inputs).collected_activations
        for row, positions in enumerate(unit_locations[0]):
            middle[row, positions] = other
        expected = block_after(by_hand.block_of(model), middle)

        handle = by_hand.hook(model, "block_output", lambda value: after.append(value.clone()))
        declared(inputs, unit_locations={"base": unit_locations})
        handle.remove()

    assert_close(after[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "variant"), PARALLEL)
def test_a_parallel_block_has_no_middle_and_says_so(family, variant):
    model = tiny(family, variant=variant)
    with pytest.raises(iv.UnsupportedModelError, match="adds attention and MLP in parallel"):
        wrapped(model, at(model, "block_mid"))


@pytest.mark.parametrize(("family", "variant"), SEQUENTIAL)
def test_the_middle_sees_edits_of_what_it_is_the_sum_of(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    added = "attention_contribution"
    if map_of(model).site("block_mid").plus is None:  # a norm's output, or the module adds the stream itself
        pytest.skip("the middle is handed over by a module")
    with torch.no_grad():
        before = by_hand.seen(model, "block_input", inputs)
        declared = wrapped(
            model,
            at(model, "block_input", intervention=lambda base: 2 * base),
            at(model, added, intervention=iv.ZeroIntervention()),
            at(model, "block_mid", intervention=iv.CollectIntervention()),
        )
        (middle,) = declared(inputs).collected_activations
    assert_close(middle, 2 * before, atol=1e-6, rtol=1e-6)
    assert hooks_of(model) == {}
