"""What follows from activations and weights: head vectors and the statistics of norms."""

from __future__ import annotations

import by_hand
import pytest
import torch
from torch.testing import assert_close
from transformers import GPT2Config, GPT2Model

import intervenable as iv
from tiny_models import tiny, tiny_inputs

FAMILIES = ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "llama", "qwen2", "phi3", "gpt_oss", "bert")


def two_heads():
    """A model whose one block has two heads of two columns, the identity for its projection, and a known bias."""
    model = GPT2Model(GPT2Config(vocab_size=8, n_positions=8, n_embd=4, n_layer=1, n_head=2)).eval()
    with torch.no_grad():
        model.h[0].attn.c_proj.weight.copy_(torch.eye(4))
        model.h[0].attn.c_proj.bias.copy_(torch.tensor([1.0, 2, 3, -1]))
    return model


def test_the_bias_is_left_out_or_split_over_heads_without_rounding():
    ones = torch.ones(1, 2, 1, 2)
    bare = iv.head_vectors(two_heads(), 0, ones)
    assert bare[0, :, 0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    split = iv.head_vectors(two_heads(), 0, ones, bias="split")
    assert split[0, :, 0].tolist() == [[1.5, 2, 1.5, -0.5], [0.5, 1, 2.5, 0.5]]
    assert split.sum(1)[0, 0].tolist() == [2, 3, 4, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_vectors_with_their_share_of_the_bias_add_up_to_the_attention_output(family):
    model = tiny(family)
    inputs = tiny_inputs(model)
    cache = iv.collect(model, inputs, ["head_attention_value_output", "head_attention_output"], layers=1)
    vectors = iv.head_vectors(model, 1, cache["head_attention_value_output", 1], bias="split")
    assert_close(vectors.sum(1), by_hand.seen(model, "attention_output", inputs, 1), atol=1e-5, rtol=1e-4)
    bare = iv.head_vectors(model, 1, cache["head_attention_value_output", 1])
    assert_close(bare, cache["head_attention_output", 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2"])
def test_values_through_the_projection_and_the_pattern_give_the_attention_output(family):
    model = tiny(family, attention="eager")
    inputs = tiny_inputs(model)
    cache = iv.collect(model, inputs, ["head_value_output", "attention_pattern"], layers=2)
    projected = iv.head_vectors(model, 2, cache["head_value_output", 2])
    assert projected.shape == (2, 4, 7, 16)  # one for each query head, though some share their values
    read = (cache["attention_pattern", 2] @ projected).sum(1)
    bias = by_hand.module_at(model, "attention_value_output", 2)[0].bias
    expected = by_hand.seen(model, "attention_output", inputs, 2) - (0 if bias is None else bias)
    assert_close(read, expected, atol=1e-5, rtol=1e-4)


def test_some_heads_go_through_their_own_part_of_the_projection():
    model = tiny("llama")
    cache = iv.collect(model, tiny_inputs(model), "head_attention_value_output", 1, heads=[3, 0])
    some = iv.head_vectors(model, 1, cache["head_attention_value_output", 1], heads=[3, 0])
    whole = iv.collect(model, tiny_inputs(model), "head_attention_output", 1)["head_attention_output", 1]
    assert_close(some, whole[:, [3, 0]], atol=1e-5, rtol=1e-4)


def test_vectors_that_do_not_fit_are_refused():
    model = tiny("llama")
    with pytest.raises(
        iv.InputError, match=r"The vectors have shape \(1, 4, 2, 5\), and the heads of .* \(b, heads, n, 6\)"
    ):
        iv.head_vectors(model, 0, torch.zeros(1, 4, 2, 5))
    with pytest.raises(iv.CacheError, match="3 key-value heads cannot serve 4 query heads"):
        iv.head_vectors(model, 0, torch.zeros(1, 3, 2, 6))
    with pytest.raises(iv.LocationRangeError, match="Head 4 is out of range"):
        iv.head_vectors(model, 0, torch.zeros(1, 1, 2, 6), heads=[4])
    with pytest.raises(iv.InputError, match="2 heads are named, and the vectors have 1"):
        iv.head_vectors(model, 0, torch.zeros(1, 1, 2, 6), heads=[0, 1])
    with pytest.raises(iv.UnknownNameError, match="Unknown bias 'all'"):
        iv.head_vectors(model, 0, torch.zeros(1, 4, 2, 6), bias="all")


def test_statistics_of_a_norm_are_mean_second_moment_and_biased_variance():
    mean, second_moment, variance = iv.norm_statistics(torch.tensor([[1.0, 2, 3, 4], [0, 0, 0, 4]]))
    assert mean.tolist() == [2.5, 1]
    assert second_moment.tolist() == [7.5, 4]
    assert variance.tolist() == [1.25, 3]


@pytest.mark.parametrize(("family", "moment"), [("gpt2", "variance"), ("llama", "second_moment")])
def test_the_scale_of_the_final_norm_follows_from_its_statistics(family, moment):
    model = tiny(family)
    cache = iv.collect(model, tiny_inputs(model), ["final_norm_input", "final_norm_scale"])
    statistics = iv.norm_statistics(cache["final_norm_input"])
    epsilon = 1e-5 if family == "gpt2" else 1e-6
    expected = (getattr(statistics, moment) + epsilon).sqrt()
    assert_close(cache["final_norm_scale"][..., 0], expected, atol=1e-5, rtol=1e-5)


def test_statistics_of_half_precision_are_not_rounded_to_it():
    values = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    values[0, 0] = 2
    assert iv.norm_statistics(values).mean.dtype == torch.float32
    assert_close(iv.norm_statistics(values).mean, torch.tensor([4097 / 4096]))
