"""Maps made on a tiny twin, held to the laws on the model that they are for, of other sizes and more layers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import intervenable as iv
from intervenable.map_inputs import example_inputs
from intervenable.map_making import make_map
from intervenable.map_twin import spread_weights

SMALL: dict[str, Any] = {
    "vocab_size": 200,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "factor from the number of layers": (
        "MiniCPM3ForCausalLM",
        {
            **SMALL,
            "q_lora_rank": 48,
            "kv_lora_rank": 32,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
    "divisor from the number of layers": ("EsmcForMaskedLM", SMALL),
    "projections inside of others": (
        "MoshiForCausalLM",
        {**SMALL, "num_hidden_layers": 4, "ffn_dim": 128, "max_position_embeddings": 64},
    ),
    "state kept by modules": (
        "RecurrentGemmaForCausalLM",
        {**SMALL, "num_hidden_layers": 6, "num_key_value_heads": 1, "lru_width": 128, "head_dim": 32},
    ),
}
FOUND = {
    "factor from the number of layers": {"block_mid", "head_query_output"},
    "divisor from the number of layers": {"block_mid", "head_query_output"},
    "projections inside of others": {"head_query_output", "head_key_output", "head_value_output"},
    "state kept by modules": {"mixer_input", "mixer_output", "mixer_state", "head_query_output"},
}


def live(kind: str) -> nn.Module:
    name, fields = MODELS[kind]
    cls: Any = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = cls(cls.config_class(**fields)).eval()
    spread_weights(model)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_what_a_twin_showed_holds_for_the_model(kind: str) -> None:
    model = live(kind)
    made = make_map(model)

    assert set(made.components()) >= FOUND[kind]
    found = iv.verify(model, model_map=made)
    assert found.passed, str(found)


def test_a_factor_that_a_block_works_out_is_that_of_the_models_own_blocks() -> None:
    site = make_map(live("factor from the number of layers")).site("attention_contribution", 0)
    assert site is not None
    assert site.scale == pytest.approx(1.4 / math.sqrt(5), rel=1e-6)
    site = make_map(live("divisor from the number of layers")).site("attention_contribution", 0)
    assert site is not None
    assert site.scale == pytest.approx(math.sqrt(36 / 5), rel=1e-6)


def test_a_model_that_was_run_has_the_map_of_one_that_was_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERVENABLE_CACHE", "")  # so that each is made
    model = live("state kept by modules")
    before = make_map(model)
    with torch.no_grad():
        model(**example_inputs(model))
    assert make_map(model) == before
