"""The keys of easyroutine against a table of what they mean, and against real models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import intervenable as iv
from intervenable.easyroutine_keys import (
    EXTRACTION_FLAGS,
    KEY_KINDS,
    activation_key,
    extraction_components,
    key_value_head,
    parse_activation_key,
)
from model_maps import Sizes, sizes_of
from tiny_models import HEADS, KEY_VALUE_HEADS, LAYERS, tiny

GROUPED = Sizes(layers=3, query_heads=4, key_value_heads=2)

TABLE = {
    "pattern_L3H8": ("attention_pattern", 3, 8, "h.query.key"),
    "resid_in_0": ("block_input", 0, None, "pos"),
    "resid_out_14": ("block_output", 14, None, "pos"),
    "resid_mid_2": ("block_mid", 2, None, "pos"),
    "attn_in_2": ("attention_input", 2, None, "pos"),
    "resid_in_post_layernorm_2": ("attention_input", 2, None, "pos"),
    "attn_out_2": ("attention_output", 2, None, "pos"),
    "mlp_out_2": ("mlp_output", 2, None, "pos"),
    "values_L12": ("value_output", 12, None, "pos"),
    "keys_L12": ("key_output", 12, None, "pos"),
    "queries_L12": ("query_output", 12, None, "pos"),
    "head_values_L1H10": ("head_value_output", 1, 10, "h.pos"),
    "head_keys_L1H10": ("head_key_output", 1, 10, "h.pos"),
    "head_queries_L1H10": ("head_query_output", 1, 10, "h.pos"),
    "projected_value_L1H10": ("head_value_output", 1, 10, "h.pos"),
    "projected_key_L1H10": ("head_key_output", 1, 10, "h.pos"),
    "projected_query_L1H10": ("head_query_output", 1, 10, "h.pos"),
    "head_out_L1H10": ("head_attention_output", 1, 10, "h.pos"),
    "input_embeddings": ("embedding_output", None, None, "pos"),
    "last_layernorm": ("final_norm_input", None, None, "pos"),
    "logits": ("logits", None, None, "pos"),
}


@pytest.mark.parametrize(("key", "meaning"), TABLE.items(), ids=TABLE)
def test_a_key_says_component_layer_head_and_unit(key, meaning):
    parsed = parse_activation_key(key)
    assert (parsed.component, parsed.layer, parsed.head, parsed.unit) == meaning
    assert str(parsed) == key
    assert parsed == parse_activation_key(key.replace("_", "-"))


def test_the_table_has_every_kind_of_key():
    assert {parse_activation_key(key).kind for key in TABLE} == set(KEY_KINDS)


@given(kind=st.sampled_from(KEY_KINDS), layer=st.integers(0, 200), head=st.integers(0, 200))
def test_keys_are_read_back_as_they_are_written(kind, layer, head):
    key = kind.template.format(layer=layer, head=head)
    parsed = parse_activation_key(key)
    assert parsed.kind is kind
    assert str(parsed) == key
    canonical = activation_key(parsed.component, parsed.layer, parsed.head)
    assert parse_activation_key(canonical).component == parsed.component


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("resid_out_3junk", "resid_out_3"),
        ("junkresid_out_3", "resid_out_3"),
        ("patern_L3H8", "pattern_L3H8"),
        ("pattern_L3", "pattern_L3H8"),
        ("values_L1x", "values_L1"),
        ("head_value_L2H1", "head_values_L2H1"),
        ("resid_out_-1", "resid_out_1"),
    ],
)
def test_a_key_that_is_not_one_from_end_to_end_is_an_error_with_the_nearest(key, nearest):
    with pytest.raises(iv.UnknownNameError) as error:
        parse_activation_key(key)
    assert repr(key) in str(error.value)
    if key != "pattern_L3":
        assert f"Did you mean {nearest!r}?" in str(error.value)
    assert "pattern_L{layer}H{head}" in str(error.value)


def test_token_ids_are_no_activation():
    with pytest.raises(iv.UnknownNameError, match="Token ids are what you give the model"):
        parse_activation_key("input_ids")
    with pytest.raises(iv.ConfigError, match="keys are texts"):
        parse_activation_key(3)


def test_layers_and_heads_are_checked_where_the_model_is_known():
    assert parse_activation_key("head_values_L2H3", GROUPED).head == 3
    with pytest.raises(iv.LayerRangeError, match=r"'resid_out_3' is out of range: .* layers 0 to 2"):
        parse_activation_key("resid_out_3", GROUPED)
    with pytest.raises(iv.LocationRangeError, match=r"'head_values_L0H4' .* query heads 0 to 3"):
        parse_activation_key("head_values_L0H4", GROUPED)


def test_another_name_of_a_component_has_its_key():
    assert activation_key("attention_weight", 1, 2) == "pattern_L1H2"


def test_components_without_a_key_and_keys_without_their_numbers_are_errors():
    with pytest.raises(iv.UnknownNameError, match="no key for 'mlp_hidden'"):
        activation_key("mlp_hidden", 1)
    with pytest.raises(iv.ConfigError, match=r"'pattern_L\{layer\}H\{head\}', needs a head"):
        activation_key("attention_pattern", 1)
    with pytest.raises(iv.ConfigError, match="has no head, and head=2 was given"):
        activation_key("block_output", 1, 2)
    with pytest.raises(iv.ConfigError, match="has no layer"):
        activation_key("logits", 1)


def test_four_query_heads_read_two_key_value_heads_in_pairs():
    values = torch.tensor([0, 1, 2, 3]).view(KEY_VALUE_HEADS, 2)
    keys = [parse_activation_key(f"head_values_L0H{head}", GROUPED) for head in range(4)]
    read = [values[key.component_head(GROUPED)].tolist() for key in keys]
    assert read == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_without_grouping_every_head_reads_its_own():
    plain = Sizes(query_heads=4, key_value_heads=4)
    values = torch.arange(8).view(4, 2)
    key = parse_activation_key("head_values_L0H2", plain)
    assert values[key.component_head(plain)].tolist() == [4, 5]


def test_query_heads_stay_query_heads():
    for name in ("pattern", "head_queries", "head_out"):
        key = parse_activation_key(f"{name}_L0H3", GROUPED)
        assert key.component_head(GROUPED) == 3


def test_shared_heads_cannot_be_told_without_sizes():
    with pytest.raises(iv.ConfigError, match="cannot be told"):
        key_value_head(1, Sizes())


@pytest.mark.parametrize("variant", [None, "full", "single"])
@pytest.mark.parametrize("kind", ["key", "value", "query"])
def test_the_head_a_key_names_is_the_one_that_the_projection_has_there(kind, variant):
    model = tiny("llama", variant=variant)
    sizes = sizes_of(model.config)
    layer = LAYERS - 1
    projection = getattr(model.model.layers[layer].self_attn, f"{kind[0]}_proj")
    kept = []
    handle = projection.register_forward_hook(lambda module, args, output: kept.append(output.detach()))
    inputs = {"input_ids": torch.tensor([[3, 4, 5, 6]])}
    for head in range(HEADS):
        key = parse_activation_key(f"head_{'querie' if kind == 'query' else kind}s_L{layer}H{head}", sizes)
        entry = iv.RepresentationConfig(
            key.layer, key.component, "h", intervention_type=iv.CollectIntervention
        )
        place = {"base": [[[key.component_head(sizes)]]]}
        (reading,) = iv.IntervenableModel([entry], model)(inputs, None, place).collected.values()
        heads = kept[-1].view(1, 4, -1, sizes.head_dim)
        group = HEADS // heads.shape[2]  # how many query heads share one head of this projection
        torch.testing.assert_close(reading[:, 0], heads[:, :, head // group])
    handle.remove()


FLAGS = {
    "extract_embed": "embedding_output",
    "extract_resid_in": "block_input",
    "extract_resid_mid": "block_mid",
    "extract_resid_out": "block_output",
    "extract_attn_in": "attention_input",
    "extract_attn_out": "attention_output",
    "extract_attn_pattern": "attention_pattern",
    "extract_mlp_out": "mlp_output",
    "extract_values": "value_output",
    "extract_head_keys": "head_key_output",
    "extract_head_values_projected": "head_value_output",
    "extract_head_out": "head_attention_output",
    "extract_last_layernorm": "final_norm_input",
    "save_input_ids": "input_ids",
}


@pytest.mark.parametrize(("flag", "component"), FLAGS.items(), ids=FLAGS)
def test_every_flag_of_an_extraction_asks_for_something(flag, component):
    alone = {flag: True, "save_logits": False, "avg": True, "attn_heads": "all"}
    assert extraction_components(alone) == (component,)
    assert extraction_components(SimpleNamespace(**{flag: True})) == (component, "logits")


def test_what_is_asked_for_can_be_collected():
    model = tiny("llama")
    asked = extraction_components(dict.fromkeys(EXTRACTION_FLAGS, True))
    cache = iv.collect(model, {"input_ids": torch.tensor([[3, 4, 5]])}, asked, layers=[1])
    assert set(cache.components) == set(EXTRACTION_FLAGS.values())


def test_a_flag_that_is_not_known_is_an_error():
    with pytest.raises(iv.UnknownNameError, match="Did you mean 'extract_resid_out'"):
        extraction_components({"extract_residout": True})
