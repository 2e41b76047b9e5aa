"""Laws about experts, in mixtures whose routers and experts were made to do something else than they say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_registry
from torch import nn

from intervenable.map_inference import infer_map
from intervenable.map_verification import check_map
from model_maps import Site


class Around(nn.Module):
    """A module, with something done to what it returns or is given."""

    def __init__(self, inside, change):
        super().__init__()
        self.inside, self.change = inside, change

    def forward(self, *args):
        return self.change(self.inside, *args)


def of_the_next_logits(router, hidden):
    logits, _, _ = router(hidden)
    weights, choice = logits.roll(1, -1).softmax(-1).topk(router.top_k, dim=-1)
    return logits, weights, choice


def by_the_logits(router, hidden):
    logits, _, _ = router(hidden)
    weights, choice = logits.softmax(-1).topk(router.top_k, dim=-1)
    return logits, weights, choice


def with_squares(experts, hidden, choice, weights):
    return experts(hidden, choice, weights**2)


def as_they_are(experts, hidden, choice, weights):
    return experts(hidden, choice, weights)


def refused_laws(made, described, name):
    found = check_map(made.model, described, made.inputs)
    return {finding.law for finding in found.findings if finding.component == name and not finding.passed}


@pytest.mark.parametrize(("change", "broken"), [(by_the_logits, False), (of_the_next_logits, True)])
def test_logits_by_which_other_experts_are_chosen_are_not_the_routers(change, broken):
    made = tiny_registry.build("mixtral")
    for layer in made.model.model.layers:
        layer.mlp.gate = Around(layer.mlp.gate, change)
    described = infer_map(made.model, made.inputs)

    for name in ("router_output", "expert_choice"):
        assert described.site(name) is not None
        assert ("chosen" in refused_laws(made, described, name)) == broken


@pytest.mark.parametrize(("change", "broken"), [(as_they_are, False), (with_squares, True)])
def test_what_the_experts_square_is_not_what_their_outputs_are_multiplied_with(change, broken):
    made = tiny_registry.build("mixtral")
    described = infer_map(made.model, made.inputs)
    for layer in made.model.model.layers:
        layer.mlp.experts = Around(layer.mlp.experts, change)

    assert described.site("expert_weight") is not None
    assert ("weighs" in refused_laws(made, described, "expert_weight")) == broken


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "granitemoe"])
def test_a_choice_by_logits_is_looked_at_in_mixtures_of_several_kinds(name):
    made = tiny_registry.build(name)
    found = check_map(made.model, infer_map(made.model, made.inputs), made.inputs)
    laws = {(finding.component, finding.law) for finding in found.findings if finding.passed}

    assert {("router_output", "chosen"), ("expert_choice", "chosen"), ("expert_weight", "weighs")} <= laws
    assert not {"router_output", "expert_choice", "expert_weight", "expert_output"} & found.refused.keys()


@pytest.fixture(scope="module")
def projected():
    """A mixture whose experts work on vectors of another width, between two matrices for all positions alike."""
    made = tiny_registry.build("muse_spark", "image-text-to-text")
    return made, infer_map(made.model, made.inputs)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("expert_input", Site("mlp.pre_expert_proj", "input", flat=True)),
        ("expert_output", Site("mlp.post_expert_proj", flat=True)),
    ],
)
def test_what_lies_beyond_a_matrix_for_all_positions_alike_is_not_the_experts(projected, name, place):
    made, described = projected
    assert check_map(made.model, described, made.inputs, components=[name]).refused == {}

    wrong = with_site(described, name, place)
    assert set(check_map(made.model, wrong, made.inputs, components=[name]).refused) == {name}


def with_site(described, name, place):
    kinds = tuple(
        replace(kind, sites={**kind.sites, name: place}) if name in kind.sites else kind
        for kind in described.kinds
    )
    sites = {**described.sites, name: place} if name in described.sites else described.sites
    return replace(described, sites=sites, kinds=kinds)
