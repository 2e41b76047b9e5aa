"""TransformerLens' names for components, both ways."""

from __future__ import annotations

import pytest

import intervenable as iv
from intervenable.transformer_lens_names import HOOK_NAMES, from_tl_name, get_act_name, tl_name
from model_maps import COMPONENTS

STYLES = ("hooked", "bridge")
NAMED = {
    style: [row.component for row in HOOK_NAMES if (row.hooked if style == "hooked" else row.bridge)]
    for style in STYLES
}
CASES = [(component, style) for style in STYLES for component in NAMED[style]]
# The list of the specification, by hand.
WRITTEN = {
    "hook_embed": ("embedding_output", None),
    "blocks.4.hook_resid_pre": ("block_input", 4),
    "blocks.4.hook_resid_mid": ("block_mid", 4),
    "blocks.4.hook_resid_post": ("block_output", 4),
    "blocks.4.hook_attn_out": ("attention_contribution", 4),
    "blocks.4.hook_mlp_out": ("mlp_contribution", 4),
    "blocks.4.attn.hook_q": ("head_query_output", 4),
    "blocks.4.attn.hook_k": ("head_key_output", 4),
    "blocks.4.attn.hook_v": ("head_value_output", 4),
    "blocks.4.attn.hook_rot_q": ("rotary_query", 4),
    "blocks.4.attn.hook_rot_k": ("rotary_key", 4),
    "blocks.4.attn.hook_attn_scores": ("attention_scores_masked", 4),
    "blocks.4.attn.hook_pattern": ("attention_pattern", 4),
    "blocks.4.attn.hook_z": ("head_attention_value_output", 4),
    "blocks.4.attn.hook_result": ("head_attention_output", 4),
    "blocks.4.mlp.hook_pre": ("mlp_pre_activation", 4),
    "blocks.4.mlp.hook_post": ("mlp_hidden", 4),
    "ln_final.hook_scale": ("final_norm_scale", None),
    "hook_unembed": ("logits", None),
    "blocks.4.hook_in": ("block_input", 4),
    "blocks.4.ln2.hook_in": ("block_mid", 4),
    "blocks.4.hook_out": ("block_output", 4),
    "blocks.4.attn.hook_in": ("attention_input", 4),
    "blocks.4.attn.q.hook_out": ("head_query_output", 4),
    "blocks.4.attn.k.hook_out": ("head_key_output", 4),
    "blocks.4.attn.v.hook_out": ("head_value_output", 4),
    "blocks.4.attn.o.hook_in": ("head_attention_value_output", 4),
    "blocks.4.attn.hook_out": ("attention_output", 4),
    "blocks.4.ln1_post.hook_in": ("attention_output", 4),
    "blocks.4.ln1_post.hook_out": ("attention_contribution", 4),
    "blocks.4.ln2_post.hook_out": ("mlp_contribution", 4),
    "blocks.4.mlp.hook_in": ("mlp_input", 4),
    "blocks.4.mlp.out.hook_in": ("mlp_hidden", 4),
    "blocks.4.mlp.hook_out": ("mlp_output", 4),
    "embed.hook_out": ("embedding_output", None),
    "ln_final.hook_in": ("final_norm_input", None),
    "ln_final.hook_out": ("final_norm_output", None),
    "unembed.hook_out": ("logits", None),
}


@pytest.mark.parametrize(("name", "place"), WRITTEN.items())
def test_a_hook_is_read_as_the_component_it_holds(name, place):
    assert from_tl_name(name) == place


@pytest.mark.parametrize(("component", "style"), CASES)
def test_every_name_leads_back_to_its_component(component, style):
    layer = None if COMPONENTS[component].scope == "model" else 11
    assert from_tl_name(tl_name(component, layer, style)) == (component, layer)


def test_no_name_stands_for_two_components():
    for style in STYLES:
        names = [
            tl_name(component, None if COMPONENTS[component].scope == "model" else 0, style)
            for component in NAMED[style]
        ]
        assert len(set(names)) == len(names) > 18


@pytest.mark.parametrize(
    ("component", "style"),
    [(name, style) for style in STYLES for name in COMPONENTS if name not in NAMED[style]],
)
def test_a_component_without_a_name_has_an_error_that_says_why(component, style):
    with pytest.raises(
        iv.UnknownNameError, match=rf"'{component}' has no name in the style '{style}'.*\. \w+"
    ):
        tl_name(component, 0, style)


def test_other_names_of_components_are_read():
    assert tl_name("attention_weight", 2) == "blocks.2.attn.hook_pattern"


# Examples of the specification.
@pytest.mark.parametrize(
    ("given", "name"),
    [
        (("k", 6, "a"), "blocks.6.attn.hook_k"),
        (("pre", 2), "blocks.2.mlp.hook_pre"),
        (("embed",), "hook_embed"),
        (("normalized", 27, "ln2"), "blocks.27.ln2.hook_normalized"),
        (("k6",), "blocks.6.attn.hook_k"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("pre5",), "blocks.5.mlp.hook_pre"),
        (("resid_pre", 0), "blocks.0.hook_resid_pre"),
        (("resid_pre5",), "blocks.5.hook_resid_pre"),
        (("rot_q12",), "blocks.12.attn.hook_rot_q"),
        (("attn", 3), "blocks.3.attn.hook_pattern"),
        (("attn_logits", 3), "blocks.3.attn.hook_attn_scores"),
        (("query", 3), "blocks.3.attn.hook_q"),
        (("key3",), "blocks.3.attn.hook_k"),
        (("value", 3, "attention"), "blocks.3.attn.hook_v"),
        (("mlp_pre", 3), "blocks.3.mlp.hook_pre"),
        (("mlp_mid", 3, "m"), "blocks.3.mlp.hook_mid"),
        (("mlp_post", 3), "blocks.3.mlp.hook_post"),
        (("pre_linear", 3), "blocks.3.mlp.hook_pre_linear"),
        (("resid_mid", 3, "b"), "blocks.3.hook_resid_mid"),
        (("resid_mid", 3, "block"), "blocks.3.hook_resid_mid"),
        (("scale",), "ln_final.hook_scale"),
        (("normalized",), "ln_final.hook_normalized"),
        (("scale", None, "ln_final"), "ln_final.hook_scale"),
        (("out", 3, "a"), "blocks.3.attn.hook_out"),
        (("in", 3), "blocks.3.hook_in"),
        (("k",), "attn.hook_k"),
        (("blocks.3.attn.hook_k",), "blocks.3.attn.hook_k"),
        (("hook_embed",), "hook_embed"),
    ],
)
def test_short_names_are_completed(given, name):
    assert get_act_name(*given) == name


def test_short_names_are_components_too():
    assert from_tl_name("z7") == ("head_attention_value_output", 7)
    assert from_tl_name("mlp_post2") == ("mlp_hidden", 2)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.1.hook_resid_per", "Did you mean 'blocks.1.hook_resid_pre'?"),
        ("hook_embd", "Did you mean 'hook_embed'?"),
        ("blocks.1.hook_embed", "'hook_embed' is outside the blocks: 'hook_embed'"),
        ("hook_resid_pre", "in every block: 'blocks.<layer>.hook_resid_pre'"),
        (
            "blocks.1.ln1.hook_normalized",
            "before its weight and bias. What comes out of the norm is 'attention_input'",
        ),
        ("blocks.1.hook_q_input", "get_act_patch_direct_path"),
        ("blocks.1.mlp.hook_pre_linear", "the up projection"),
        ("blocks.1.mlp.in.hook_out", "another thing in plain and in gated MLPs"),
        ("hook_pos_embed", "no component here"),
        ("resid_per3", "Did you mean 'resid_pre'?"),
        ("embed3", "outside the blocks"),
    ],
)
def test_a_hook_that_is_no_component_has_an_error_that_says_what_it_is(name, words):
    with pytest.raises(iv.ConfigError) as error:
        from_tl_name(name)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("block_inptu", 1), "Did you mean 'block_input'?"),
        (("block_input",), "layer=None makes no name of 'hook_resid_pre'"),
        (("block_input", -1), "counted from 0"),
        (("block_input", True), "counted from 0"),
        (("logits", 1), "no layer 1: leave it out"),
        (("block_input", 1, "briddge"), "Did you mean 'bridge'?"),
        (("query_output", 1), "'head_query_output'"),
        (("mlp_output", 1), "'mlp_contribution'"),
    ],
)
def test_a_slip_in_asking_for_a_name_is_explained(arguments, words):
    with pytest.raises(iv.ConfigError) as error:
        tl_name(*arguments)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("paterrn", 1), "Did you mean 'pattern'?"),
        (
            ("scale", 1),
            "belongs to a norm, and layer_type=None is none. Give one of ln1, ln2, ln1_post, ln2_post;",
        ),
        (("scale", 1, "attn"), "layer_type='attn' is none"),
        (("scale", 1, "ln3"), "Did you mean 'ln2'?"),
        (("scale", 1, "ln_final"), "no layer 1"),
        (("k6", 3), "'k6' says the layer itself: leave out layer=3"),
        (("k", -1), "counted from 0"),
        (("resid_pre", 1, "attn"), "'resid_pre' is not inside 'attn'"),
        ((3,), "3 is no name"),
    ],
)
def test_a_short_name_of_nothing_is_explained(arguments, words):
    with pytest.raises(iv.ConfigError) as error:
        get_act_name(*arguments)
    assert words in str(error.value)
