"""Laws about what reaches a place: which tokens a stack is about, and whether a module mixes positions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_registry
from map_sabotage import spoilt

from intervenable.map_inference import infer_map
from intervenable.map_trace import trace
from intervenable.map_verification import check_map
from model_maps import COMPONENTS, LayerKind


def found_out(name, task="causal-lm"):
    made = tiny_registry.build(name, task)
    return made, check_map(made.model, infer_map(made.model, made.inputs), made.inputs).map


def failed(made, described, law):
    findings = check_map(made.model, described, made.inputs).findings
    return {finding.component for finding in findings if finding.law == law and not finding.passed}


def test_towers_that_are_taken_for_each_other_are_refused_with_all_that_is_in_them():
    made, described = found_out("clip", "zero-shot")
    assert failed(made, described, "about") == set()

    mistakes = spoilt(made.model, described, trace(made.model, made.inputs))
    exchanged = next(one for one in mistakes if one.mistake == "vision and text exchanged")
    in_towers = {name for name in exchanged.map.components() if COMPONENTS[name].prefix in ("vision", "text")}
    assert failed(made, exchanged.map, "about") == in_towers


def test_the_input_of_the_last_matrix_is_not_that_of_what_mixes_positions():
    made, described = found_out("falcon_h1")
    assert failed(made, described, "mixes") == set()

    wrong = replace(described.sites["mixer_input"], path="mamba.out_proj", side="input", slot=None)
    spoiled = replace(described, sites={**described.sites, "mixer_input": wrong})
    assert failed(made, spoiled, "mixes") == {"mixer_input", "mixer_output", "mixer_contribution"}


def test_a_branch_of_a_mixer_that_mixes_nothing_is_not_its_output():
    made, described = found_out("recurrent_gemma")
    assert failed(made, described, "mixes") == set()

    wrong = replace(described.site("mixer_output"), path="temporal_block.linear_x", slot=None)
    spoiled = replace(described, sites={**described.sites, "mixer_output": wrong})
    assert "mixer_output" in failed(made, spoiled, "mixes")


def test_the_vector_before_the_last_matrix_of_an_mlp_is_not_its_input():
    made, described = found_out("gemma2")
    wrong = replace(described.sites["mlp_hidden"], columns=None)
    spoiled = replace(described, sites={**described.sites, "mlp_input": wrong})

    assert "mlp_input" in check_map(made.model, spoiled, made.inputs).refused
    assert "mlp_input" in failed(made, spoiled, "apart")
    without = {name: site for name, site in spoiled.sites.items() if name != "mlp_hidden"}
    assert "mlp_input" in failed(made, replace(spoiled, sites=without), "determines")


def test_an_output_that_does_not_follow_from_the_last_matrix_is_refused():
    made, described = found_out("clip", "zero-shot")
    for word in ("vision_attention_output", "text_attention_output"):
        wrong = replace(described.sites[word], path="self_attn.q_proj", slot=None)
        spoiled = replace(described, sites={**described.sites, word: wrong})
        assert word in failed(made, spoiled, "linear")


@pytest.mark.parametrize("model_type", ["nemotron_h", "bamba"])
def test_what_attends_is_no_mixer_and_a_mixer_is_no_attention(model_type):
    made, described = found_out(model_type)
    assert failed(made, described, "reads") == set()

    of_attention = next(at for at in range(9) if described.site("attention_input", at) is not None)
    of_mixer = next(at for at in range(9) if described.site("mixer_input", at) is not None)
    for true, false, layer in (("mixer", "attention", of_mixer), ("attention", "mixer", of_attention)):
        sites = {f"{false}_{part}": described.site(f"{true}_{part}", layer) for part in ("input", "output")}
        spoiled = replace(described, kinds=(*described.kinds, LayerKind((layer,), sites=sites)))
        assert failed(made, spoiled, "reads") >= {*sites}
        assert {*sites} <= check_map(made.model, spoiled, made.inputs).refused.keys()
