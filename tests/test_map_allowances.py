"""Laws in architectures in which more comes together than usual: what is right is offered, what is wrong refused."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from tiny_registry import build

from intervenable.map_inference import infer_map
from intervenable.map_laws import deviation
from intervenable.map_verification import check_map
from intervenable.map_verification_result import Verification
from model_maps import HeadColumns, LayerKind, ModelMap


@cache
def verified(model_type: str, task: str = "causal-lm") -> Verification:
    made = build(model_type, task)
    return check_map(made.model, infer_map(made.model, made.inputs), made.inputs)


def checked(model_type: str, model_map: ModelMap, task: str = "causal-lm") -> Verification:
    made = build(model_type, task)
    return check_map(made.model, model_map, made.inputs)


def with_columns(found: ModelMap, name: str, layer: int, columns: HeadColumns) -> ModelMap:
    """A map that says of one layer that heads have other columns."""
    site = replace(found.site(name, layer), columns=columns)
    return replace(found, kinds=(*found.kinds, LayerKind((layer,), sites={name: site})))


# --- keys that no query reads -------------------------------------------------------------------------------

SPARSE, LAYER = "dots3_note_text", 1


def test_heads_of_keys_are_told_where_a_sparse_pattern_hides_some_keys_from_all_queries():
    found = verified(SPARSE)
    assert {"head_key_output", "rotary_key", "expanded_head_key"} <= {*found.components}
    config = build(SPARSE).model.config
    width, beside = config.qk_nope_head_dim, config.v_head_dim
    # As the model's own code splits them: of each head the keys, then the values.
    expected = HeadColumns(config.num_attention_heads, width, 0, width + beside)
    assert found.map.site("head_key_output", LAYER).columns == expected


def test_columns_of_another_head_are_refused_there():
    found = verified(SPARSE).map
    right = found.site("key_output", LAYER).columns
    turned = HeadColumns(right.heads, right.width, right.start + 3 * right.stride, -right.stride)
    wrong = with_columns(found, "key_output", LAYER, turned)
    assert "'heads'" in checked(SPARSE, wrong).refused["head_key_output"]


# --- what comes behind the weighted values, before the projection -------------------------------------------

BEHIND = (
    ("muse_spark", "image-text-to-text"),  # a norm of each head, then a gate
    ("neomme", "masked-lm"),  # less its part along the position's own value, then a gate
)


@pytest.mark.parametrize(("model_type", "task"), BEHIND)
def test_values_and_heads_are_told_where_more_than_a_gate_follows(model_type, task):
    found = verified(model_type, task)
    views = ("value_output", "attention_value_output", "head_value_output", "head_attention_value_output")
    assert {*views} <= {*found.components}
    config = build(model_type, task).model.config.get_text_config()
    width = config.head_dim
    columns = found.map.site("value_output", 0).columns
    assert (columns.heads, columns.width) == (config.num_key_value_heads, width)


def test_keys_are_not_taken_for_values_there():
    model_type, task = BEHIND[0]
    found = verified(model_type, task).map
    value = found.site("value_output")
    keys = replace(value, path=value.path.replace("v_proj", "k_proj"))
    wrong = replace(found, sites={**found.sites, "value_output": keys})
    assert "value_output" in checked(model_type, wrong, task).refused


# --- blocks that read what earlier blocks returned, beside the stream ---------------------------------------

KEPT = "inkling2_text"


def test_what_blocks_keep_of_earlier_ones_is_held_with_the_stream():
    found = verified(KEPT)
    config = build(KEPT).model.config
    last = config.num_hidden_layers - 1
    kept_of = [layer for layer in range(1, last) if layer % config.n_layers_per_attn_res_block == 0]
    assert kept_of  # so the last layer reads an output that experiments in the layer before it change
    views = ("head_query_output", "head_key_output", "head_value_output", "head_attention_value_output")
    for name in ("block_input", "block_output", "attention_scores", "attention_pattern", *views):
        assert name in found.components
        assert found.map.site(name, last) is not None


def test_the_block_behind_is_not_taken_for_the_block_where_more_is_kept():
    found = verified(KEPT).map
    wrong = replace(
        found, sites={**found.sites, "block_output": replace(found.site("block_output"), side="input")}
    )
    assert "block_output" in checked(KEPT, wrong).refused


def test_a_map_from_which_wrong_places_were_taken_is_right():
    # Without the attention's input, which is not the only one in the last layer, the rest is told all the same.
    found = verified(KEPT)
    assert "attention_input" in found.refused
    assert checked(KEPT, found.map).refused == {}


# --- tokens that may not be said ----------------------------------------------------------------------------


def test_what_a_mask_puts_in_place_of_numbers_does_not_hide_the_others():
    least = torch.finfo(torch.float32).min
    before, after = torch.tensor([[least, 1.0]]), torch.tensor([[least, 2.0]])
    assert deviation(after, before) == 1.0
    assert deviation(before, before) == 0.0
    assert deviation(torch.tensor([[3.0, 1.0]]), before) > 1e30


def test_writes_are_seen_to_move_logits_of_which_some_are_masked():
    task = "image-text-to-text"
    found = verified("chameleon", task)
    made = build("chameleon", task)
    with torch.no_grad():
        logits = made.model(**made.inputs).logits
    assert (logits == torch.finfo(logits.dtype).min).any()
    assert {"block_input", "block_output", "logits"} <= {*found.components}
