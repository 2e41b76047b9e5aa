"""Alignments of hierarchical equality: exact where the network is known, and learned where it has learned."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from torch import nn

import intervenable as iv

TASK = iv.causal.hierarchical_equality()
PLACE = "second.output"


def exchange(
    model: nn.Module, component: str, first: iv.Intervention, second: iv.Intervention
) -> iv.IntervenableModel:
    """WX from the first source, YZ from the second."""
    representations = [
        iv.RepresentationConfig(component=component, group_key=variable, intervention=intervention)
        for variable, intervention in {"WX": first, "YZ": second}.items()
    ]
    return iv.IntervenableModel(iv.IntervenableConfig(representations), model)


def counterfactuals(count: int, seed: int) -> Dataset:
    return TASK.counterfactual(count, ["WX", "YZ"], seed=seed)


def parts(data: Dataset, first: int = 0, second: int = 1) -> list[list[list[int]]]:
    return [[[first]] * len(data), [[second]] * len(data)]


@pytest.mark.parametrize("fast", [True, False])
def test_the_neurons_of_a_network_made_by_hand_give_an_accuracy_of_exactly_one(fast):
    known, data = TASK.solved_by_hand(), counterfactuals(120, seed=5)
    swap = exchange(
        known.model, f"layers[{known.layer}].output", iv.VanillaIntervention(), iv.VanillaIntervention()
    )
    (first,), (second,) = known.neurons["WX"], known.neurons["YZ"]

    assert iv.training.evaluate(swap, data, subspaces=parts(data, first, second), fast=fast).value == 1.0
    # Exchanged for each other, an answer is right only by chance; other neurons change nothing.
    assert iv.training.evaluate(swap, data, subspaces=parts(data, second, first), fast=fast).value < 0.8
    assert iv.training.evaluate(swap, data, subspaces=parts(data, 2, 3), fast=fast).value == 0.5


@pytest.mark.parametrize("fast", [True, False])
def test_variables_that_are_spread_over_all_neurons_are_directions_and_no_neurons(fast):
    spread, data = TASK.solved_by_hand(distributed=True), counterfactuals(120, seed=6)
    place = f"layers[{spread.layer}].output"
    plane = iv.LowRankRotatedSpaceIntervention(16, 2)
    with torch.no_grad():
        plane.rotation.weight.copy_(torch.stack([spread.directions["WX"], spread.directions["YZ"]], dim=1))
    along = exchange(spread.model, place, plane, plane)
    by_neuron = exchange(spread.model, place, iv.VanillaIntervention(), iv.VanillaIntervention())

    assert iv.training.evaluate(along, data, subspaces=parts(data), fast=fast).value == 1.0
    for first in range(0, 16, 2):
        found = iv.training.evaluate(by_neuron, data, subspaces=parts(data, first, first + 1), fast=fast)
        assert found.value < 0.8


def test_training_finds_the_directions_of_a_network_made_by_hand():
    torch.manual_seed(0)
    spread, data = TASK.solved_by_hand(distributed=True), counterfactuals(600, seed=7)
    plane = iv.LowRankRotatedSpaceIntervention(16, 2)
    search = exchange(spread.model, f"layers[{spread.layer}].output", plane, plane)

    result = iv.training.train(
        search, data, subspaces=parts(data), lr=0.05, epochs=20, batch_size=100, progress=False
    )

    unseen = counterfactuals(200, seed=8)
    assert result.final["iia"] > 0.95
    assert iv.training.evaluate(search, unseen, subspaces=parts(unseen)).value > 0.95
    for column, variable in enumerate(("WX", "YZ")):
        cosine = plane.rotation().detach()[:, column] @ spread.directions[variable]
        assert cosine.abs() > 0.95


@pytest.mark.slow
def test_a_rotation_finds_in_a_trained_network_what_neurons_and_controls_do_not():
    """The protocol of the tutorial, for one of its five networks."""
    factual = TASK.factual(30_000, seed=3).with_format("torch")
    network = trained(factual["input_ids"][:], factual["labels"][:], seed=0)
    pairs, unseen = counterfactuals(4000, seed=1), counterfactuals(1000, seed=2)
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0)).tolist()
    dealt_anew = [pairs["labels"][row] for row in order]
    shuffled = pairs.remove_columns("labels").add_column("labels", dealt_anew)

    def rotated(seed):
        torch.manual_seed(seed)
        rotation = iv.RotatedSpaceIntervention(32, subspace_partition=[(0, 16), (16, 32)])
        return exchange(network, PLACE, rotation, rotation)

    def learn(model, data, given):
        options = {"lr": 0.03, "epochs": 12, "batch_size": 128, "progress": False}
        iv.training.train(model, data, subspaces=given, **options)
        return model

    def iia(model, given):
        return iv.training.evaluate(model, unseen, subspaces=given, batch_size=250).value

    das = iia(learn(rotated(0), pairs, parts(pairs)), parts(unseen))
    masks = exchange(network, PLACE, iv.SigmoidMaskIntervention(32), iv.SigmoidMaskIntervention(32))
    others = {
        "neurons": iia(learn(masks, pairs, None), None),
        "random": iia(rotated(0), parts(unseen)),
        "shuffled": iia(learn(rotated(0), shuffled, parts(shuffled)), parts(unseen)),
    }

    assert das >= 0.95
    assert max(others.values()) <= das - 0.2, others


def trained(inputs: torch.Tensor, answers: torch.Tensor, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential()
    for name, width in (("first", 16), ("second", 32), ("third", 32)):
        network.add_module(name, nn.Linear(width, 32))
        network.add_module(f"{name}_relu", nn.ReLU())
    network.add_module("score", nn.Linear(32, 2))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=2000, pct_start=0.1)
    for _ in range(2000):
        rows = torch.randint(len(inputs), (512,))
        loss = nn.functional.cross_entropy(network(inputs[rows]), answers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network
