"""Inputs that are made up for models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import intervenable as iv
from intervenable.map_inputs import example_inputs


def shapes(inputs: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in inputs.items()}


def tiny_gpt2(**fields: Any) -> nn.Module:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, **fields))


def test_a_language_model_gets_tokens_of_its_vocabulary_that_are_not_special() -> None:
    model = tiny_gpt2(vocab_size=20, bos_token_id=12, eos_token_id=15)

    tokens = example_inputs(model, batch=50)["input_ids"]

    assert set(tokens.flatten().tolist()) == {10, 11, 13, 14, 16, 17, 18, 19}


def test_another_seed_gives_another_prompt_of_the_same_shape() -> None:
    model = tiny_gpt2(vocab_size=99)

    base, source = example_inputs(model), example_inputs(model, seed=1)

    assert shapes(base) == shapes(source) == {"input_ids": (2, 7)}
    assert not torch.equal(base["input_ids"], source["input_ids"])
    assert torch.equal(base["input_ids"], example_inputs(model)["input_ids"])


def test_a_decoder_gets_fewer_positions_than_the_encoder() -> None:
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)

    inputs = example_inputs(transformers.T5ForConditionalGeneration(config))

    assert shapes(inputs) == {"input_ids": (2, 7), "decoder_input_ids": (2, 6)}


def test_two_towers_get_text_and_pictures() -> None:
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**text, "image_size": 28, "patch_size": 14}
    )

    inputs = example_inputs(transformers.CLIPModel(config))

    assert shapes(inputs) == {"input_ids": (2, 7), "pixel_values": (2, 3, 28, 28)}


def test_a_model_without_a_config_gets_tokens_that_its_embedding_has() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 2)

        def forward(self, input_ids: Tensor) -> Tensor:
            result: Tensor = self.embed(input_ids)
            return result

    model = Small()

    model(**example_inputs(model))


def test_what_cannot_be_guessed_is_named() -> None:
    with pytest.raises(iv.InputError) as raised:
        example_inputs(nn.Bilinear(2, 2, 2))

    assert str(raised.value) == (
        "What Bilinear runs on cannot be guessed: it needs 'input1', 'input2'."
        "\nPass example_inputs=, a mapping of its keyword inputs with at least two examples."
    )
