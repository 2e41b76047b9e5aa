"""Noise falls on the named tokens and on nothing else, is as strong as asked for, and leaves the model alone."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import DynamicCache

import intervenable as iv
from intervenable.patching import noised, sweep
from tiny_models import ENCODER_DECODERS, LANGUAGE_MODELS, MULTIMODAL, tiny, tiny_inputs


@contextmanager
def hooked(module, hook):
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("family", [*LANGUAGE_MODELS, *ENCODER_DECODERS, MULTIMODAL])
def test_the_model_runs_as_if_a_hook_had_added_the_noise_to_its_embedding(family):
    model = tiny(family)
    inputs = tiny_inputs(model, batch=2)
    blurred = noised(model, inputs, [1, 3], samples=2)
    repeated = {name: value.repeat_interleave(2, 0) for name, value in inputs.items()}
    encoder = getattr(model, "encoder", None)  # which has a module of its own, with the same weights
    embedding = model.get_input_embeddings() if encoder is None else encoder.embed_tokens
    plain = embedding(repeated["input_ids"])
    assert torch.equal(blurred["inputs_embeds"][:, [0, 2, 4, 5, 6]], plain[:, [0, 2, 4, 5, 6]])
    assert bool((blurred["inputs_embeds"][:, [1, 3]] != plain[:, [1, 3]]).all())
    changed = []

    def swap(module, args, output):
        if (
            output.shape == plain.shape and not changed
        ):  # a decoder of a model of two embeds its own tokens too
            changed.append(True)
            return blurred["inputs_embeds"]
        return None

    with torch.no_grad(), hooked(embedding, swap):
        expected = model(**repeated).logits
    with torch.no_grad():
        assert torch.equal(model(**blurred).logits, expected)
        assert not torch.equal(expected, model(**repeated).logits)


@pytest.mark.parametrize(
    ("family", "gain"), [("llama", 1.0), ("gemma2", 4.0), ("gemma3", 4.0)]
)  # these two multiply what they read from the matrix by the root of 16
def test_the_noise_is_three_deviations_of_the_embedding_matrix(family, gain):
    model = tiny(family)
    inputs = tiny_inputs(model)
    expected = 3 * gain * model.get_input_embeddings().weight.std().item()
    blurred = noised(model, inputs, "all", samples=400)["inputs_embeds"]
    plain = model.get_input_embeddings()(inputs["input_ids"]).repeat_interleave(400, 0)
    noise = (blurred - plain).detach()
    assert_close(noise.std().item(), expected, rtol=0.01, atol=0)
    assert_close(noise.mean().item(), 0.0, rtol=0, atol=0.01 * expected)
    other = noised(model, inputs, "all", 1.5, samples=400)["inputs_embeds"]
    assert_close((other - plain).detach(), noise / 2, rtol=1e-4, atol=1e-5 * expected)
    absolute = noised(model, inputs, "all", std=0.25, samples=400)["inputs_embeds"]
    assert_close((absolute - plain).detach().std().item(), 0.25, rtol=0.01, atol=0)


def test_every_sample_and_every_token_has_noise_of_its_own():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    plain = model.get_input_embeddings()(inputs["input_ids"]).repeat_interleave(3, 0)
    noise = (
        (noised(model, inputs, [0, 4], samples=3)["inputs_embeds"] - plain).detach()[:, [0, 4]].flatten(0, 1)
    )
    distances = torch.cdist(noise, noise) + torch.eye(len(noise))
    assert float(distances.min()) > 0.1


def test_real_tokens_are_counted_and_padding_stays_as_it_is():
    model = tiny("llama")
    inputs = tiny_inputs(model, batch=3, padding="left")
    blurred = noised(model, inputs, [0, -1], samples=2)
    plain = model.get_input_embeddings()(inputs["input_ids"])
    for row in range(6):
        example = row // 2
        touched = (blurred["inputs_embeds"][row] != plain[example]).any(-1)
        assert touched.nonzero().flatten().tolist() == [example, 6]
        assert torch.equal(blurred["attention_mask"][row], inputs["attention_mask"][example])


def test_words_are_found_in_the_text_of_each_example():
    tokenizer, lm = iv.load_small_lm()
    tokenizer.padding_side = "left"
    texts = ["The capital of Spain is", "Everyone knows that the capital of Italy is"]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    blurred = noised(lm, inputs, iv.PerExample(["Spain", "Italy"]), samples=2, tokenizer=tokenizer)
    plain = lm.get_input_embeddings()(inputs["input_ids"])
    for row in range(4):
        touched = (blurred["inputs_embeds"][row] != plain[row // 2]).any(-1)
        assert (
            tokenizer.decode(inputs["input_ids"][row // 2][touched]).strip() == ["Spain", "Italy"][row // 2]
        )
    through = iv.IntervenableModel([], lm, tokenizer=tokenizer)
    again = noised(through, inputs, iv.PerExample(["Spain", "Italy"]), samples=2)
    assert torch.equal(again["inputs_embeds"], blurred["inputs_embeds"])


def test_a_seed_gives_the_same_noise_and_leaves_the_random_state_of_torch_alone():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    before = torch.get_rng_state()
    first, same = (noised(model, inputs, 2, seed=5)["inputs_embeds"] for _ in range(2))
    other = noised(model, inputs, 2, seed=6)["inputs_embeds"]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_model_and_the_inputs_are_left_as_they_were():
    model = tiny("gpt2").train()  # dropout: two runs differ, and that is no fault of the embeddings
    model.transformer.h[1].eval()
    inputs = tiny_inputs(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    ids = inputs["input_ids"].clone()
    blurred = noised(model, inputs, 0)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert torch.equal(inputs["input_ids"], ids)
    assert not blurred["inputs_embeds"].requires_grad


def test_inputs_by_place_and_inputs_of_other_kinds_go_with_them():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    ids = inputs["input_ids"]
    assert list(noised(model, ids, 0)) == ["inputs_embeds"]
    counted = torch.arange(7)[None].expand(2, -1)
    given = {**inputs, "position_ids": counted, "use_cache": False}
    blurred = noised(model, given, 0, samples=3)
    assert list(blurred) == ["attention_mask", "position_ids", "use_cache", "inputs_embeds"]
    assert torch.equal(blurred["position_ids"], counted.repeat_interleave(3, 0))
    assert blurred["use_cache"] is False


def test_embeddings_keep_the_type_of_the_model():
    model = tiny("llama", dtype=torch.bfloat16)
    blurred = noised(model, tiny_inputs(model), 1)
    assert blurred["inputs_embeds"].dtype == torch.bfloat16
    with torch.no_grad():
        assert bool(model(**blurred).logits.isfinite().all())


# --- causal tracing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_clean_states_given_back_undo_the_noise_where_it_was_put_and_nowhere_else(family):
    model = tiny(family)
    clean = tiny_inputs(model, batch=1)
    blurred = noised(model, clean, 2, samples=3)
    metric = {"each": lambda z: z[:, -1, 5]}
    result = sweep(model, clean, blurred, "block_input", ("layer", "pos"), metric)
    with torch.no_grad():
        known, unknown = (model(**run).logits[:, -1, 5] for run in (clean, blurred))
    assert_close(result.baseline_clean, known.expand(3))
    assert_close(result.baseline_corrupted, unknown)
    assert_close(result.values[0, 2], known.expand(3), atol=1e-5, rtol=1e-5)
    for position in (0, 1, 3, 4, 5, 6):
        assert_close(result.values[0, position], unknown, atol=1e-5, rtol=1e-5)
    upper = result.values[1:, 3] - unknown  # later tokens have read the noise by then
    assert bool((upper.abs() > 1e-4).all())


def test_tokens_without_ids_are_called_as_those_of_the_clean_run():
    tokenizer, lm = iv.load_small_lm()
    clean = tokenizer("The capital of Spain is", return_tensors="pt")
    blurred = noised(lm, clean, "Spain", samples=2, tokenizer=tokenizer)
    metric = iv.metrics.logit_difference(tokenizer, " Madrid", " Rome")
    options = {"layers": [0], "tokenizer": tokenizer}
    whole = sweep(lm, clean, blurred, "block_input", ("layer", "pos"), metric, **options)
    assert whole.labels["pos"] == ("The", "capital", "of", "Spain", "is")
    named = sweep(
        lm, clean, blurred, "block_input", ("layer", "pos"), metric, positions={"subject": "Spain"}, **options
    )
    assert named.labels["pos"] == ("subject",)
    assert_close(named.values[0, 0], named.baseline_clean, atol=1e-4, rtol=1e-4)
    assert_close(named.values[0, 0], whole.values[0, 3], atol=1e-4, rtol=1e-4)


# --- what cannot be ---------------------------------------------------------------------------------------


class Marked(nn.Module):
    """Embeds tokens, and marks those with an odd id where it is given ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids=None, inputs_embeds=None):
        if inputs_embeds is None:
            return self.embed(input_ids) + (input_ids % 2)[..., None]
        return inputs_embeds


class WithoutEmbeds(nn.Module):
    def forward(self, input_ids):
        return input_ids.float()[..., None]


class Nameless(Marked):
    get_input_embeddings = None


def refused(error, model, inputs, *arguments, **options):
    with pytest.raises(error) as caught:
        noised(model, inputs, *arguments, **options)
    return str(caught.value)


def test_a_model_that_treats_embeddings_otherwise_is_refused():
    ids = {"input_ids": torch.tensor([[1, 2, 3]])}
    assert refused(iv.UnsupportedModelError, Marked(), ids, 0) == (
        "Marked gives something else for the embeddings of these tokens than for the tokens themselves, so that noise"
        " on them would not be all that is changed. Put noise where the model has its tokens instead:"
        " NoiseIntervention at 'embedding_output'."
    )
    even = {"input_ids": torch.tensor([[2, 4]])}
    assert noised(Marked(), even, 0, samples=2)["inputs_embeds"].shape == (2, 2, 4)
    assert "takes no inputs_embeds" in refused(iv.UnsupportedModelError, WithoutEmbeds(), ids, 0)
    assert "does not say which of its modules" in refused(iv.UnsupportedModelError, Nameless(), ids, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 2.0, "std": 0.1}, "scale=2.0 and std=0.1 both say how strong the noise is"),
        ({"scale": -1.0}, "scale=-1.0 is no strength of noise. Give a number from 0 up"),
        ({"scale": "strong"}, "scale='strong' is no strength of noise"),
        ({"std": float("nan")}, "std=nan is no strength of noise"),
        ({"samples": 0}, "samples=0 makes no sense. Give a whole number from 1 up"),
        ({"seed": 1.5}, "seed=1.5 makes no sense. Give a whole number from 0 up"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    model = tiny("gpt2")
    assert message in refused(iv.ConfigError, model, tiny_inputs(model), 0, **options)


def test_inputs_without_ids_or_with_a_cache_and_positions_that_are_not_there_are_refused():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    vectors = {"inputs_embeds": torch.zeros(1, 3, 16)}
    assert "no token ids to embed" in refused(iv.InputError, model, vectors, 0)
    cached = {**inputs, "past_key_values": DynamicCache()}
    assert "inputs have past_key_values" in refused(iv.InputError, model, cached, 0)
    assert "positions is None" in refused(iv.ConfigError, model, inputs, None)
    assert "7" in refused(iv.LocationRangeError, model, inputs, 7)
    assert "no tokenizer" in refused(iv.LocationError, model, inputs, "Spain")
