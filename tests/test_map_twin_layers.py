"""How many layers a tiny twin has: with many heads each kind is shown once, as every layer is dear."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from intervenable.map_layers import MANY_HEADS, layers_shown


@pytest.mark.parametrize(("heads", "layers"), [(MANY_HEADS, (0, 1, 2)), (MANY_HEADS + 1, (0, 1))])
def test_with_many_heads_two_layers_of_one_kind_will_do(heads: int, layers: tuple[int, ...]) -> None:
    config = LlamaConfig(
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=9,
        vocab_size=40,
        intermediate_size=16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)

    assert layers_shown(model)(9) == layers


def test_with_many_heads_every_kind_is_shown_all_the_same() -> None:
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config())  # 128 heads, three dense layers before the mixtures

    assert layers_shown(model)(61) == (0, 1, 2, 3)
