"""Representation finetuning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import interventions as iv
from interventions.reft import ACTIVATIONS, ReftIntervention

law = settings(deadline=None, max_examples=15)
KINDS = (
    iv.ConsreftIntervention,
    iv.DireftIntervention,
    iv.LobireftIntervention,
    iv.LoreftIntervention,
    iv.NodireftIntervention,
    iv.NoreftIntervention,
)
every_kind = pytest.mark.parametrize("kind", KINDS)


def by_hand(edit: ReftIntervention, hidden: Tensor) -> Tensor:
    """Compute the published formula vector by vector, with rows as in the paper."""
    state = edit.state_dict()
    R = edit.rotation().detach().mT if "rotation.weight" in state else state["projection.weight"]
    W, b = state.get("learned_source.weight"), state.get("learned_source.bias", state.get("learned_source"))
    assert b is not None
    rows = []
    for h in hidden.view(-1, hidden.shape[-1]):
        learned = b if W is None else torch.mv(W, h) + b
        kept = isinstance(edit, (iv.LoreftIntervention, iv.NoreftIntervention, iv.ConsreftIntervention))
        rows.append(h + torch.mv(R.mT, learned - torch.mv(R, h) if kept else learned))
    return torch.stack(rows).view_as(hidden)


@every_kind
@law
@given(data=st.data(), seed=st.integers(0, 100))
def test_the_result_is_the_published_formula(
    kind: type[ReftIntervention], data: st.DataObject, seed: int
) -> None:
    torch.manual_seed(seed)
    width = data.draw(st.integers(1, 6))
    edit = kind(width, data.draw(st.integers(1, width)))
    hidden = torch.randn(2, 3, width)

    assert_close(edit(hidden).detach(), by_hand(edit, hidden), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [iv.LoreftIntervention, iv.ConsreftIntervention])
def test_replacing_edits_put_what_was_learned_in_the_subspace_and_keep_the_rest(
    kind: type[ReftIntervention],
) -> None:
    edit, hidden = kind(6, 2), torch.randn(4, 6)
    columns = edit.directions().detach()

    result = edit(hidden).detach()

    assert_close(result @ columns, edit.learned(hidden).detach().expand(4, 2), atol=1e-5, rtol=1e-4)
    outside = torch.eye(6) - columns @ columns.mT
    assert_close(result @ outside, hidden @ outside, atol=1e-5, rtol=1e-4)


@every_kind
def test_only_chosen_directions_are_edited(kind: type[ReftIntervention]) -> None:
    edit, hidden = kind(6, 3, subspace_partition=[[0, 1], [1, 3]]), torch.randn(2, 4, 6)
    columns = edit.directions().detach()

    change = edit(hidden, subspaces=1).detach() - hidden

    assert torch.linalg.matrix_rank(torch.cat([columns[:, 1:], change.view(-1, 6).mT], 1), atol=1e-4) == 2
    assert torch.equal(edit(hidden, subspaces=[]), hidden)
    assert_close(edit(hidden, subspaces=[0, 1]), edit(hidden))


@every_kind
def test_it_learns_without_a_source(kind: type[ReftIntervention]) -> None:
    torch.manual_seed(0)
    edit, hidden = kind(5, 2), torch.randn(64, 5)
    direction = nn.functional.normalize(torch.randn(5), dim=0)
    wanted = hidden + 2.0 * direction
    optimizer = torch.optim.Adam(edit.parameters(), lr=0.05)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = (edit(hidden) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.5 * losses[0]
    if edit.orthonormal:
        columns = edit.directions().detach()
        assert_close(columns.mT @ columns, torch.eye(2), atol=1e-5, rtol=0)


@every_kind
def test_it_needs_no_source_and_sees_each_unit_alone(kind: type[ReftIntervention]) -> None:
    assert not kind.needs_source
    assert kind(4, 2).sees == "per_unit"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_function_is_applied_to_what_was_learned_and_saved_by_name(name: str) -> None:
    reference = {
        "gelu": nn.GELU(),
        "relu": nn.ReLU(),
        "sigmoid": nn.Sigmoid(),
        "silu": nn.SiLU(),
        "tanh": nn.Tanh(),
    }[name]
    edit, hidden = iv.DireftIntervention(4, 2, act_fn=name), torch.randn(3, 4)
    learned = reference(edit.learned_source(hidden))  # type: ignore[operator]

    assert_close(edit(hidden), hidden + learned @ edit.directions().mT)
    assert edit.to_config()["act_fn"] == name
    assert iv.DireftIntervention(4, 2, act_fn=ACTIVATIONS[name]).to_config()["act_fn"] == name


def test_an_activation_function_without_a_name_works_but_cannot_be_saved() -> None:
    edit = iv.DireftIntervention(4, 2, act_fn=lambda x: x * 0)

    assert torch.equal(edit(torch.ones(4)), torch.ones(4))
    with pytest.raises(iv.UnknownInterventionError, match="Only registered functions can be saved"):
        edit.to_config()


def test_dropout_drops_entries_of_the_result_in_training_only() -> None:
    torch.manual_seed(0)
    edit, hidden = iv.LoreftIntervention(64, 2, dropout=0.5), torch.randn(32, 64)

    trained = edit.train()(hidden)
    evaluated = edit.eval()(hidden)

    dropped = trained == 0
    assert 0.4 < dropped.float().mean().item() < 0.6
    assert_close(trained[~dropped], 2 * evaluated[~dropped])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"low_rank_dimension": 5},
            "low_rank_dimension=5 is out of range; give a whole number from 1 to 4 (embed_dim=4).",
        ),
        (
            {"low_rank_dimension": 2, "dropout": 1.0},
            "dropout=1.0 is out of range; give a share from 0 to below 1.",
        ),
        (
            {"low_rank_dimension": 2, "act_fn": "mish"},
            "act_fn='mish' is unknown; allowed: gelu, relu, sigmoid, silu, tanh, or a function.",
        ),
    ],
)
@every_kind
def test_arguments_that_cannot_work_are_refused(
    kind: type[ReftIntervention], arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(iv.InterventionArgumentError) as caught:
        kind(4, **arguments)  # type: ignore[arg-type]
    assert str(caught.value) == message
