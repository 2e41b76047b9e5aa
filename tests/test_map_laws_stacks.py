"""Two stacks, or two kinds of layers, taken for each other with all that is in them: what tells them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny_registry
from map_sabotage_found import proved_map

from intervenable.map_verification import check_map
from model_maps import HeadColumns, LayerKind, Site


@cache
def t5():
    made = tiny_registry.build("t5", "seq2seq-lm")
    return made, proved_map(made)


def broken(made, described, law):
    findings = check_map(made.model, described, made.inputs).findings
    return {finding.component for finding in findings if finding.law == law and not finding.passed}


def test_attention_to_the_encoder_taken_for_that_of_the_decoder_to_itself_does_not_read_the_encoder():
    made, right = t5()
    words = ("attention_input", "query_output", "key_output", "value_output", "attention_value_output")
    words += ("attention_output", "attention_contribution")
    words = [word for word in words if f"decoder_{word}" in right.sites]
    exchanged = {f"cross_{word}": right.sites[f"decoder_{word}"] for word in words}
    exchanged |= {f"decoder_{word}": right.sites[f"cross_{word}"] for word in words}
    assert broken(made, right, "attends") == set()
    assert set(exchanged) <= broken(made, replace(right, sites={**right.sites, **exchanged}), "attends"), (
        "an attention is taken for the other"
    )


@pytest.mark.parametrize(
    ("component", "path"),
    [
        ("decoder_final_norm_output", "encoder.final_layer_norm"),
        ("encoder_final_norm_output", "decoder.final_layer_norm"),
    ],
)
def test_the_last_norm_of_a_stack_changes_with_that_stack_and_not_with_a_later_one(component, path):
    made, right = t5()
    assert broken(made, right, "follows") == set()
    wrong = replace(right, sites={**right.sites, component: Site(path)})
    assert broken(made, wrong, "follows") == {component}


def test_a_mixer_that_is_alone_in_its_layer_is_not_taken_for_an_mlp_nor_an_mlp_for_a_mixer():
    made = tiny_registry.build("nemotron_h", "causal-lm")
    right = proved_map(made)
    mixers = [layer for layer in range(4) if right.site("mixer_output", layer) is not None]
    dense = [layer for layer in range(4) if right.site("mlp_output", layer) is not None]
    assert mixers
    assert dense
    assert not set(mixers) & set(dense), "every layer has one part"
    assert broken(made, right, "mixes") == set()
    mixer, mlp = (
        {
            f"{part}_{side}": Site("mixer", "input" if side == "input" else "output")
            for side in ("input", "output", "contribution")
        }
        for part in ("mixer", "mlp")
    )
    kinds = (
        LayerKind((mixers[-1],), sites=mlp, absent=dict.fromkeys((*mixer, "mixer_state"), "it has none")),
        LayerKind((dense[-1],), sites=mixer, absent=dict.fromkeys(mlp, "it has none")),
    )
    wrong = replace(right, kinds=(*right.kinds, *kinds))
    assert {*mixer, *mlp} <= broken(made, wrong, "mixes")


def test_what_a_branch_returns_is_not_read_with_the_stream_added():
    made, right = t5()
    site = replace(right.sites["cross_attention_output"], plus="decoder_block_mid")
    wrong = replace(right, sites={**right.sites, "cross_attention_output": site})
    assert broken(made, right, "bound") == set()
    assert "cross_attention_output" in broken(made, wrong, "bound")


def test_a_part_of_the_first_block_is_not_taken_for_what_enters_it():
    made = tiny_registry.build("deepseek_v3", "causal-lm")
    right = proved_map(made)
    late = LayerKind((0,), sites={"block_input": Site("post_attention_layernorm")})
    assert broken(made, right, "chain") == set()
    assert "block_input" in broken(made, replace(right, kinds=(*right.kinds, late)), "chain")


def test_heads_of_values_are_as_wide_as_what_is_summed_of_them():
    made = tiny_registry.build("prophetnet", "seq2seq-lm")
    right = proved_map(made)
    site = right.site("encoder_value_output", 1)
    columns = HeadColumns(site.columns.heads // 2, 2 * site.columns.width)
    half = LayerKind((1,), "encoder", {"encoder_value_output": replace(site, columns=columns)})
    assert broken(made, right, "heads") == set()
    wrong = replace(right, kinds=(*right.kinds, half))
    assert broken(made, wrong, "heads") == {"encoder_head_value_output"}
