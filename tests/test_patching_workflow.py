"""The patching workflow against runs with hooks written by hand."""

from __future__ import annotations

from types import SimpleNamespace

import by_hand
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import intervenable as iv
from intervenable.patching import PatchingComparison, compare_patched
from tiny_models import HEAD_DIM, LAYERS, tiny, tiny_inputs


def two_prompts(model, padding=None):
    return tiny_inputs(model, seed=1, padding=padding), tiny_inputs(model, seed=2, padding=padding)


def patched_by_hand(model, component, layer, source, base, read, write):
    """Logits of the base with the source's vectors at `read` put at `write`."""
    given = by_hand.seen(model, component, source, layer=layer)

    def change(value):
        value = value.clone()
        value[:, write] = given[:, read]
        return value

    return by_hand.run_with(model, component, change, base, layer=layer).logits


def test_the_worked_example():
    result = PatchingComparison(
        layers=((0,),),
        source_logits=torch.zeros(1, 2),
        clean_logits=torch.tensor([[2.0, 1.0]]),
        patched_logits=torch.tensor([[[0.0, 3.0]]]),
        tokens=torch.tensor([[0, 1]]),
    )
    assert result.clean_difference.tolist() == [-1]
    assert result.patched_difference.tolist() == [[3]]
    assert result.variation.tolist() == [4]


@pytest.mark.parametrize(("family", "component"), [("llama", "block_output"), ("gpt2", "mlp_output")])
def test_each_layer_is_patched_in_a_run_of_its_own(family, component):
    model = tiny(family)
    source, base = two_prompts(model)
    pairs = [(3, 5), (7, 4)]
    result = compare_patched(model, base, source, component, range(LAYERS), ([1, 2], [4, 6]), pairs)
    with torch.no_grad():
        clean, given = model(**base).logits[:, -1], model(**source).logits[:, -1]
        expected = torch.stack(
            [
                patched_by_hand(model, component, layer, source, base, [1, 2], [4, 6])[:, -1]
                for layer in range(LAYERS)
            ]
        )
    assert result.layers == ((0,), (1,), (2,))
    assert_close(result.source_logits, given)
    assert_close(result.clean_logits, clean)
    assert_close(result.patched_logits, expected, atol=1e-5, rtol=1e-5)

    def difference(logits):  # of the vocabulary, not of positions
        return torch.stack([logits[..., 0, 5] - logits[..., 0, 3], logits[..., 1, 4] - logits[..., 1, 7]], -1)

    assert_close(result.clean_difference, difference(clean))
    assert_close(result.patched_difference, difference(expected), atol=1e-5, rtol=1e-5)
    change = (difference(expected) - difference(clean)).mean(-1)
    assert_close(result.variation, change, atol=1e-5, rtol=1e-5)
    assert result.variation.abs().min() > 1e-3


def test_divergences_are_those_of_torch_and_directed():
    model = tiny("llama")
    source, base = two_prompts(model)
    result = compare_patched(model, base, source, "block_output", [0, 1], -1)

    def divergence(left, right):
        return nn.functional.kl_div(
            right.log_softmax(-1), left.log_softmax(-1), log_target=True, reduction="batchmean"
        )

    given, clean = result.source_logits, result.clean_logits
    for run, patched in enumerate(result.patched_logits):
        assert_close(result.kl_source_patched[run], divergence(given, patched))
        assert_close(result.kl_clean_patched[run], divergence(clean, patched))
    assert_close(result.kl_source_clean, divergence(given, clean))
    assert_close(result.kl_change, result.kl_source_patched - result.kl_source_clean)
    assert (result.kl_source_clean - divergence(clean, given)).abs() > 1e-3


def test_tokens_that_cannot_be_said_make_no_divergence_infinite():
    logits = torch.tensor([[1.0, 0.0, -torch.inf]])
    result = PatchingComparison(((0,),), logits, logits, logits[None])
    assert result.kl_source_patched.tolist() == [0]


def test_everything_patched_in_the_last_layer_gives_the_answer_of_the_base():
    model = tiny("llama")
    source, base = two_prompts(model)
    result = compare_patched(model, base, source, "block_output", LAYERS - 1)
    assert_close(result.patched_logits[0], result.source_logits)
    assert_close(result.kl_change[0], -result.kl_source_clean)


def test_layers_given_together_are_patched_in_one_run():
    model = tiny("llama")
    source, base = two_prompts(model)
    result = compare_patched(model, base, source, "mlp_output", [(0, 1), 2], 3)
    with torch.no_grad():
        given = [by_hand.seen(model, "mlp_output", source, layer=layer) for layer in (0, 1)]

        def change(layer):
            def put(value):
                value = value.clone()
                value[:, 3] = given[layer][:, 3]
                return value

            return put

        handles = [by_hand.hook(model, "mlp_output", change(layer), layer=layer) for layer in (0, 1)]
        expected = model(**base).logits[:, -1]
        for handle in handles:
            handle.remove()
    assert result.layers == ((0, 1), (2,))
    assert_close(result.patched_logits[0], expected, atol=1e-5, rtol=1e-5)


def test_one_head_alone_is_patched():
    model = tiny("llama")
    source, base = two_prompts(model)
    result = compare_patched(model, base, source, "head_attention_value_output", 1, 4, heads=2)
    columns = slice(2 * HEAD_DIM, 3 * HEAD_DIM)
    with torch.no_grad():
        given = by_hand.seen(model, "attention_value_output", source)

        def change(value):
            value = value.clone()
            value[:, 4, columns] = given[:, 4, columns]
            return value

        expected = by_hand.run_with(model, "attention_value_output", change, base).logits[:, -1]
    assert_close(result.patched_logits[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_and_batches_change_nothing(padding):
    model = tiny("llama")
    source, base = two_prompts(model, padding)
    assert (base["attention_mask"] == 0).any()
    together = compare_patched(model, base, source, "block_output", [0, 1], -2, [(3, 5)])
    for example in range(2):
        real = base["attention_mask"][example].bool()
        alone = compare_patched(
            model,
            *({"input_ids": inputs["input_ids"][example : example + 1, real]} for inputs in (base, source)),
            "block_output",
            [0, 1],
            -2,
            [(3, 5)],
        )
        for name in ("source_logits", "clean_logits"):
            assert_close(getattr(together, name)[example], getattr(alone, name)[0], atol=1e-5, rtol=1e-5)
        assert_close(together.patched_logits[:, example], alone.patched_logits[:, 0], atol=1e-5, rtol=1e-5)
        assert_close(
            together.patched_difference[:, example], alone.patched_difference[:, 0], atol=1e-5, rtol=1e-5
        )


def test_prompts_of_different_length_are_patched_where_each_says():
    model = tiny("llama")
    source, base = tiny_inputs(model, length=5, seed=1), tiny_inputs(model, length=7, seed=2)
    result = compare_patched(model, base, source, "block_output", 1, (-1, -1))
    assert_close(result.patched_logits[0].shape, result.source_logits.shape)
    with torch.no_grad():
        expected = patched_by_hand(model, "block_output", 1, source, base, 4, 6)[:, -1]
    assert_close(result.patched_logits[0], expected, atol=1e-5, rtol=1e-5)


def test_the_place_may_lie_outside_the_blocks():
    model = tiny("llama")
    source, base = two_prompts(model)
    result = compare_patched(model, base, source, "embedding_output", positions=2)
    with torch.no_grad():
        mixed = base["input_ids"].clone()
        mixed[:, 2] = source["input_ids"][:, 2]
        expected = model(input_ids=mixed).logits[:, -1]
    assert result.layers == ((),)
    assert_close(result.patched_logits[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_model_of_two_stacks_answers_in_its_decoder(padding):
    model = tiny("t5")
    source, base = two_prompts(model, padding)
    last = [int(row.nonzero().max()) for row in base["decoder_attention_mask"]]
    everything = compare_patched(model, base, source, "encoder_block_output", LAYERS - 1)
    assert compare_patched(model, base, source, "decoder_mlp_output", "all").layers == (
        (0,),
        (1,),
        (2,),
        (3,),
    )
    with torch.no_grad():
        clean = model(**base).logits[[0, 1], last]
        read = {name: source[name] for name in ("input_ids", "attention_mask")}
        expected = model(**{**base, **read}).logits[[0, 1], last]  # all of the encoder is the source's
    assert_close(everything.clean_logits, clean, atol=1e-5, rtol=1e-5)
    assert_close(everything.patched_logits[0], expected, atol=1e-5, rtol=1e-5)
    assert (clean - expected).abs().max() > 1e-2


def test_tokens_may_be_texts_of_one_token():
    tokenizer, model = iv.load_small_lm()
    source, base = (
        tokenizer(f"The capital of {country} is", return_tensors="pt") for country in ("Italy", "Spain")
    )
    answers = [(" Rome", " Madrid")]
    named = compare_patched(model, base, source, layers=2, positions=3, tokens=answers, tokenizer=tokenizer)
    ids = [tokenizer.encode(city, add_special_tokens=False)[0] for city in answers[0]]
    assert named.tokens.tolist() == [ids]
    assert named.variation[0] < -5  # the answer turns from Madrid to Rome
    assert "variation" in str(named)
    assert str(named).splitlines()[1].split()[0] == "2"
    with pytest.raises(iv.ConfigError, match=r"'Rome and Madrid' is \d tokens and not one"):
        compare_patched(
            model, base, source, layers=2, tokens=[("Rome and Madrid", " Rome")], tokenizer=tokenizer
        )
    with pytest.raises(iv.ConfigError, match="give the tokenizer, or its id"):
        compare_patched(model, base, source, layers=2, tokens=answers)


def test_what_makes_no_sense_is_said_before_any_run():
    model = tiny("llama")
    source, base = two_prompts(model)
    calls = SimpleNamespace(count=0)
    model.register_forward_pre_hook(lambda *_: setattr(calls, "count", calls.count + 1))
    wrong = [
        ({"layers": []}, "No layers were given"),
        ({"layers": [(), 1]}, "a run without layers"),
        ({"layers": 1, "tokens": [(1, 2)] * 3}, "one for each of the 2"),
        ({"layers": 1, "tokens": [1, 2]}, "give pairs"),
        ({"layers": 1, "tokens": [(1, 2.5)]}, "2.5 is no token"),
        ({"layers": 1.5}, "layer is 1.5"),
        ({"layers": 1, "heads": 2}, "heads=2 makes no sense for 'block_output'"),
        ({"layers": LAYERS}, "layers 0 to 2"),
        ({"layers": 1, "component": "block_ouput"}, "Did you mean 'block_output'"),
    ]
    for options, message in wrong:
        with pytest.raises(iv.ConfigError, match=message):
            compare_patched(model, base, source, **options)
    with pytest.raises(iv.ConfigError, match="Which logits"):
        _ = PatchingComparison(((0,),), torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, 1, 2)).variation
    assert calls.count == 0
    with pytest.raises(iv.ConfigError, match="Token 999 does not exist"):
        compare_patched(model, base, source, layers=1, tokens=[(1, 999)])
    headless = tiny("llama", head="base")
    with pytest.raises(iv.UnsupportedModelError, match="gives no logits"):
        compare_patched(headless, base, source, layers=1)


def test_the_model_and_the_inputs_stay_as_they_were():
    model = tiny("llama").train()
    source, base = two_prompts(model)
    before = {
        name: value.clone() for name, value in {**source, **{f"t{k}": v for k, v in base.items()}}.items()
    }
    result = compare_patched(model, base, source, layers=[0, 1], positions=1)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not result.patched_logits.requires_grad
    after = {**source, **{f"t{k}": v for k, v in base.items()}}
    assert all(torch.equal(before[name], after[name]) for name in before)
