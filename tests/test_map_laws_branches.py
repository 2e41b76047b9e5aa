"""What a branch of a block returns, and where the stream is between two branches: what tells them from others."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import tiny_registry
from map_sabotage_found import proved_map

from intervenable.map_verification import check_map
from model_maps import LayerKind


@cache
def of_type(model_type, task="causal-lm"):
    made = tiny_registry.build(model_type, task)
    return made, proved_map(made)


def refused(model_type, component, path, side="output", task="causal-lm"):
    """Why a component is refused that is said to be at another place; nothing, if it is not."""
    made, right = of_type(model_type, task)
    site = replace(right.site(component, 1), path=path, side=side)
    assert site != right.site(component, 1)
    wrong = replace(right, sites={**right.sites, component: site}, kinds=_without(right.kinds, component))
    return check_map(made.model, wrong, made.inputs).refused.get(component, "")


def _without(kinds, component):
    return tuple(
        replace(kind, sites={name: site for name, site in kind.sites.items() if name != component})
        for kind in kinds
    )


@pytest.mark.parametrize(
    ("component", "path"),
    [
        ("mlp_output", "feed_forward.value"),
        ("mlp_output", "feed_forward.receptance"),
        ("mixer_output", "attention.key"),
        ("mixer_output", "attention.value"),
    ],
)
def test_a_factor_of_what_a_branch_returns_is_not_its_output(component, path):
    assert refused("rwkv", component, path)


def test_an_mlp_whose_stream_goes_through_it_keeps_its_output():
    made, right = of_type("xlnet")
    assert right.site("mlp_output").path == "ff.layer_2"
    assert "mlp_input" in right.absent  # the same tensor is what it is added to
    found = check_map(made.model, right, made.inputs)
    assert found.refused == {}
    # The law has nothing to say where the sum does.
    assert not [one for one in found.findings if (one.component, one.law) == ("mlp_output", "only")]


def test_the_hidden_vector_of_an_mlp_comes_after_its_nonlinearity():
    reason = refused("xlnet", "mlp_hidden", "ff.layer_1", "input")
    assert "'elementwise'" in reason
    assert "it follows from mlp_activation" in reason


@pytest.mark.parametrize(
    ("model_type", "task", "path"),
    [
        ("xlnet", "causal-lm", "rel_attn.layer_norm"),
        ("bert", "masked-lm", "attention.output.LayerNorm"),
        ("distilbert", "masked-lm", "sa_layer_norm"),
    ],
)
def test_the_stream_between_is_what_the_mlp_is_added_to_and_not_the_sum_before_its_norm(
    model_type, task, path
):
    assert "'residual'" in refused(model_type, "block_mid", path, "input", task)


@pytest.mark.parametrize("path", ["mlp.gate_proj", "mlp.down_proj"])
def test_an_activation_is_what_the_nonlinearity_makes(path):
    assert refused("llama", "mlp_activation", path)


@pytest.mark.parametrize(("side", "told"), [("output", ""), ("input", "with what the MLP adds held")])
def test_a_router_reaches_the_stream_through_its_mlp_alone(side, told):
    made, right = of_type("flex_olmo")
    found = check_map(made.model, right, made.inputs)
    assert any((one.component, one.law) == ("router_input", "only") for one in found.findings)
    reason = refused(
        "flex_olmo", "router_input", "", side
    )  # the block's input is multiplied with weights as well
    assert reason
    assert told in reason


def test_a_map_that_does_not_say_where_blocks_begin_is_looked_at_all_the_same():
    made, right = of_type("gemma2")
    words = ("block_output", "attention_output", "attention_contribution", "mlp_output", "mlp_contribution")
    described = replace(right, sites={word: right.sites[word] for word in words})
    found = check_map(made.model, described, made.inputs)
    assert {*words} <= {*found.components, *found.refused}


@pytest.mark.parametrize(
    ("model_type", "task", "component", "path"),
    [
        ("fnet", "masked-lm", "mixer_output", "fourier.self"),  # what mixes has no weights, and is no norm
        ("xmod", "masked-lm", "block_mid", "attention.output.LayerNorm"),  # its MLPs cannot be told apart
        ("zaya", "causal-lm", "router_input", "mlp.gate.router_mlp.fc1"),  # the router is an MLP itself
    ],
)
def test_what_goes_into_a_later_or_an_earlier_module_is_refused(model_type, task, component, path):
    assert refused(model_type, component, path, side="input", task=task)


def test_attention_is_added_before_the_mlp_where_nothing_else_tells_it_from_that():
    made, right = of_type("prophetnet", "seq2seq-lm")
    names = ("decoder_attention_output", "decoder_mlp_output")
    assert {*names} <= {*right.components()}
    assert "decoder_attention_pattern" not in right.components()
    sites = {**right.sites, names[0]: right.sites[names[1]], names[1]: right.sites[names[0]]}

    found = check_map(made.model, replace(right, sites=sites), made.inputs).refused

    assert {*names} <= {*found}


def test_one_module_that_attends_to_both_stacks_is_no_cross_attention():
    made, right = of_type("t5gemma2", "seq2seq-lm")
    added = {
        "cross_attention_output": right.sites["decoder_attention_output"],
        "cross_block_mid": replace(right.sites["decoder_attention_output"], path="post_self_attn_layernorm"),
    }

    found = check_map(made.model, replace(right, sites={**right.sites, **added}), made.inputs).refused

    assert {*added} <= {*found}


def test_where_attention_is_given_two_things_neither_is_its_input():
    _, right = of_type("mobilebert", "masked-lm")

    assert "attention_input" not in right.components()
    assert "nothing else that attention is given" in right.reason("attention_input")


def test_a_view_by_heads_has_the_numbers_of_what_it_is_a_view_of():
    made, right = of_type("bitnet")
    before = right.site("attention_value_output")
    behind = replace(before, path="self_attn.o_proj")  # a norm lies between
    sites = {"attention_value_output": behind, "head_attention_value_output": before}

    found = check_map(made.model, replace(right, sites={**right.sites, **sites}), made.inputs).refused

    assert "has the numbers of" in found["attention_value_output"]


def test_what_a_norm_over_all_heads_returns_is_no_longer_what_they_attend_to():
    made, right = of_type("bitnet")
    behind = {
        name: replace(right.site(name), path="self_attn.o_proj")
        for name in ("attention_value_output", "head_attention_value_output")
    }

    found = check_map(made.model, replace(right, sites={**right.sites, **behind}), made.inputs).refused

    assert "'heads'" in found["attention_value_output"]


def test_what_attention_adds_is_not_what_the_mlp_adds():
    made, right = of_type("axk1")
    site = right.site("attention_contribution", 1)
    wrong = replace(
        right,
        sites={**right.sites, "mlp_contribution": site},
        kinds=_without(right.kinds, "mlp_contribution"),
    )

    assert "mlp_contribution" in check_map(made.model, wrong, made.inputs).refused


def test_what_the_norm_behind_a_mixer_returns_is_not_the_mixers_output():
    made, right = of_type("lfm3")
    behind = replace(right.site("mixer_output", 2), path="post_operator_norm")
    assert behind == right.site("mixer_contribution", 2)
    kinds = (*right.kinds, LayerKind((2,), sites={"mixer_output": behind}))

    found = check_map(made.model, replace(right, kinds=kinds), made.inputs)

    assert "no norm returns it" in found.refused["mixer_output"]
    assert found.map.site("mixer_output", 0) == right.site("mixer_output", 0)
    assert found.map.site("mixer_output", 2) is None


@pytest.mark.parametrize("path", ["mlp", "q_input_layernorm"])
def test_the_last_block_has_its_own_output_where_blocks_are_given_those_of_all_before(path):
    made, right = of_type("inkling2_text")
    wrong = LayerKind((3,), sites={"block_output": replace(right.site("block_output", 3), path=path)})

    found = check_map(made.model, replace(right, kinds=(*right.kinds, wrong)), made.inputs).refused

    assert "'ends'" in found["block_output"]


def test_attention_to_itself_is_added_before_that_to_the_encoder():
    made, right = of_type("prophetnet", "seq2seq-lm")
    own = ("decoder_attention_output", "decoder_attention_contribution")
    cross = ("cross_attention_output", "cross_attention_contribution")
    exchanged = {
        **{name: replace(right.site(name), path="cross_attn") for name in own},
        **{name: replace(right.site(name), path="self_attn") for name in cross},
    }

    found = check_map(made.model, replace(right, sites={**right.sites, **exchanged}), made.inputs).refused

    assert {*own, *cross} <= {*found}
    assert "before cross_attention_contribution" in found["decoder_attention_contribution"]


def test_heads_of_which_nothing_tells_how_many_they_are_are_not_offered():
    _, right = of_type("videoprism", "zero-shot")  # its blocks are given a picture at a time, of one position

    assert "vision_attention_value_output" in right.components()
    assert "none of the laws" in right.reason("vision_head_attention_value_output")


def test_an_attention_with_a_nonlinearity_in_it_is_no_mlp():
    made, right = of_type("levit", "image-classification")
    words = ("mlp_input", "mlp_pre_activation", "mlp_activation", "mlp_output")
    wrong = LayerKind((0,), sites={name: right.site(name, 1) for name in words})

    found = check_map(made.model, replace(right, kinds=(*right.kinds, wrong)), made.inputs)

    assert {name: found.map.site(name, 0) for name in words} == dict.fromkeys(words)
    assert {name: found.map.site(name, 1) for name in words} == {name: right.site(name, 1) for name in words}


def test_what_is_added_tells_nothing_of_a_mixer_that_is_not_there():
    made, right = of_type("lfm3")
    kinds = tuple(
        replace(kind, layers=(0, 2)) if "attention_input" in kind.sites else kind for kind in right.kinds
    )

    found = check_map(made.model, replace(right, kinds=kinds), made.inputs)

    assert {"attention_contribution", "mixer_contribution"} <= {*found.refused}
    assert found.map.site("attention_contribution", 0) is None
    assert found.map.site("mixer_contribution", 1) is None


def test_by_how_much_a_contribution_is_multiplied_is_told_by_the_sum_alone():
    made, right = of_type("reformer")  # no block after the last is given what it returns
    twice = replace(right.site("mlp_contribution", 1), scale=2.0)
    kinds = (*right.kinds, LayerKind((1,), sites={"mlp_contribution": twice}))

    found = check_map(made.model, replace(right, kinds=kinds), made.inputs).map

    assert found.site("mlp_contribution", 0) == right.site("mlp_contribution", 0)
    assert found.site("mlp_contribution", 1) is None
