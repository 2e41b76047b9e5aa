"""The script that maps the capital's country in SmolLM2, on the small model: pairs, the loss, a map of one layer."""

from __future__ import annotations

import argparse

import pytest
import torch

import intervenable as iv
from scripts import capital_map


@pytest.fixture(scope="module")
def small():
    return iv.load_small_lm()


def countries_of(dataset):
    return {text.split(" of ")[1] for side in ("base", "source") for text in dataset[side]}


@pytest.fixture(scope="module")
def facts(small):
    """Pairs of countries that the small model has words for."""
    tokenizer, _ = small
    train, test = iv.causal.capital_facts(phrasings="The capital of {country} is").split(10)
    return tuple(
        iv.causal.tokenized(task.counterfactual(12, seed=0), tokenizer, positions="country", labels="first")
        for task in (train, test)
    )


def test_no_country_of_the_test_pairs_is_trained_on(small):
    train, test = capital_map.pairs(small[0], 60, 40)
    assert (len(train), len(test)) == (60, 40)
    assert not countries_of(train) & countries_of(test)


def test_the_loss_is_nothing_where_the_answer_is_the_source_s_own_and_more_for_the_base_s(small, facts):
    _, lm = small
    loss = capital_map.LikeTheSource(lm, facts[0])
    labels = torch.tensor(facts[0]["labels"])
    with torch.no_grad():
        own, other = (
            torch.stack([lm(torch.tensor([ids])).logits[0, -1] for ids in facts[0][f"{side}input_ids"]])
            for side in ("source_", "")
        )
    assert loss(own, labels).abs().max() < 1e-4
    assert loss(other, labels).min() > 1.0
    assert repr(loss) == "LikeTheSource()"


def test_the_maps_of_a_layer_are_drawn_side_by_side_and_random_subspaces_are_not_trained(
    small, facts, tmp_path
):
    options = argparse.Namespace(
        layers=[1], processes=1, rank=8, lr=1e-2, epochs=1, folder=tmp_path / "cells", picture=None
    )
    learned, random = capital_map.sweeps(small[1], *facts, options)
    assert learned.ranks == (8, "full")
    assert learned.iia.shape == (1, 2, 2)
    assert (learned.settings["training"]["lr"], random.settings["training"]["lr"]) == (1e-2, 0.0)
    labels = [text.get_text() for text in capital_map.draw(learned, random).axes[0].get_xticklabels()]
    assert labels[0] == "DAS, rank 8\nthe country"
    assert len(labels) == 6
