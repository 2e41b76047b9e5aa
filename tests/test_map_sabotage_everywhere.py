"""Every mistake in the maps of many families is found: long, so apart from the rest (`make maps-sabotage`)."""

from __future__ import annotations

import pytest
from map_sabotage_found import missed, smallest
from written_maps import find_map

from tiny_models import CASES, ENCODER_DECODER_CASES, RECURRENT, tiny, tiny_inputs

pytestmark = pytest.mark.registry

ROWS = [
    *(case for case in CASES if case[0] not in RECURRENT),
    *ENCODER_DECODER_CASES,
]

DECODERS = """
    apertus arcee axk1 biogpt bitnet bloom codegen cohere deepseek_v3 exaone4 falcon falcon_h1 gemma2 glm4 gpt2
    gpt_bigcode gpt_neo gpt_neox gpt_oss granite granitemoe granitemoehybrid jamba kimi_linear llama
    mamba2 minicpm3 minimax_m2 mixtral mpt nemotron olmo2 olmoe opt persimmon phi phi3 qwen3_moe
    qwen3_next recurrent_gemma roberta rwkv stablelm starcoder2 xglm xlnet xmod zamba2 zaya
"""
"""Fused and latent heads, layers of several kinds, norms behind, experts, sinks, states, no softmax at all."""

OTHERS = (
    ("bert", "masked-lm"),
    ("deberta-v2", "masked-lm"),
    ("distilbert", "masked-lm"),
    ("fnet", "masked-lm"),
    ("mobilebert", "masked-lm"),
    ("squeezebert", "masked-lm"),
    ("xlm", "masked-lm"),
    ("bart", "seq2seq-lm"),
    ("t5", "seq2seq-lm"),
    ("whisper", "speech-seq2seq"),
    ("clip", "zero-shot"),
    ("paligemma", "image-text-to-text"),
    ("qwen2_5_vl", "image-text-to-text"),
    ("swinv2", "image-classification"),
    ("vit", "image-classification"),
    ("wav2vec2", "audio-classification"),
)
"""Encoders, two stacks, towers."""


@pytest.mark.parametrize(("family", "variant"), ROWS)
def test_every_mistake_in_a_row_is_found(family, variant):
    model = tiny(family, variant=variant)
    row = find_map([base.__name__ for base in type(model).__mro__], model.config).for_config(model.config)
    assert missed(model, row, tiny_inputs(model)) == {}


@pytest.mark.parametrize(
    ("model_type", "task"), [*((name, "causal-lm") for name in DECODERS.split()), *OTHERS]
)
def test_every_mistake_in_a_map_that_was_inferred_is_found(model_type, task):
    made, described = smallest(model_type, task)
    assert missed(made.model, described, made.inputs) == {}
