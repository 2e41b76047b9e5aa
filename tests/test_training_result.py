"""What a training shows of itself: history, table, picture, bar."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from training_by_hand import das, make_mlp, make_rows

import intervenable as iv
from intervenable import training


@pytest.fixture(scope="module")
def result():
    return training.train(das(make_mlp()), make_rows(), evaluation=0.25, epochs=3, batch_size=9, lr=0.05)


def test_the_history_has_a_row_for_each_step_and_evaluation(result):
    steps = [row for row in result.history if row["kind"] == "step"]
    assert [(row["step"], row["epoch"]) for row in steps] == [(0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert set(steps[0]) == {"kind", "step", "epoch", "loss", "iia", "lr", "temperature", "gradient_norm"}
    found = [row for row in result.history if row["kind"] == "evaluation"]
    assert [(row["step"], row["epoch"]) for row in found] == [(1, 0), (3, 1), (5, 2)]
    assert set(found[0]) == {"kind", "step", "epoch", "loss", "iia"}
    assert "history" not in repr(result)


def test_the_history_is_a_table(result):
    table = result.to_pandas()
    assert list(table.columns[:5]) == ["kind", "step", "epoch", "loss", "iia"]
    assert len(table) == 9
    assert table.loc[table.kind == "evaluation", "iia"].tolist()[-1] == result.final["iia"]


def test_the_picture_has_the_steps_the_means_and_the_evaluations_of_each_metric(result):
    figure = result.plot(title="a title")
    loss, iia = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["loss", "IIA"]
    batches, means, held_out = loss.lines
    steps = [row for row in result.history if row["kind"] == "step"]
    assert list(batches.get_ydata()) == [row["loss"] for row in steps]
    assert list(means.get_xdata()) == [0.5, 2.5, 4.5]
    assert list(held_out.get_xdata()) == [1, 3, 5]
    assert list(iia.lines[2].get_ydata())[-1] == result.final["iia"]
    assert figure.get_suptitle() == "a title"
    assert len(training.train(das(make_mlp()), make_rows(), epochs=1).plot().axes[0].lines) == 2


def test_the_bar_shows_loss_and_iia(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    result = training.train(das(make_mlp()), make_rows(), epochs=2, batch_size=12, progress=True)
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("training: 100%")
    assert "4/4" in last
    row = result.history[-1]
    assert f"loss {row['loss']:.3g}, iia {row['iia']:.3g}" in last


def test_a_function_is_told_of_each_step():
    told = []
    training.train(
        das(make_mlp()), make_rows(), epochs=2, batch_size=12, progress=lambda *numbers: told.append(numbers)
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_shortcuts_are_told_and_none_are_taken_where_none_are_wanted():
    fast = training.train(das(make_mlp()), make_rows(), epochs=1)
    plain = training.train(das(make_mlp()), make_rows(), epochs=1, fast=False)
    assert fast.shortcuts
    assert plain.shortcuts == ()
    assert all(isinstance(note, str) for note in fast.shortcuts)


def test_parameters_that_train_are_counted_once():
    """Low rank 3 on two units of width 24: 48 x 3."""
    mlp = iv.MLPClassifier(width=24, layers=2, classes=2)
    entries = [
        iv.RepresentationConfig(
            layer, "block_output", low_rank_dimension=3, max_number_of_units=2, intervention_link_key="one"
        )
        for layer in (0, 1)
    ]
    model = iv.IntervenableModel(iv.IntervenableConfig(entries, iv.LowRankRotatedSpaceIntervention), mlp)
    assert model.count_parameters() == 144
    of_model = 2 * (24 * 24 + 24) + 24 * 2 + 2
    assert model.count_parameters(include_model=True) == 144 + of_model
    assert [tuple(parameter.shape) for parameter in model.get_trainable_parameters()] == [(48, 3)]
    model.disable_model_gradients()
    assert not any(parameter.requires_grad for parameter in mlp.parameters())
    assert model.count_parameters(include_model=True) == 144
    model.enable_model_gradients()
    assert all(parameter.requires_grad for parameter in mlp.parameters())


def test_a_loop_by_hand_leaves_no_gradients_on_the_model():
    mlp = make_mlp()
    model, rows = das(mlp), make_rows()
    model.disable_model_gradients()
    output = model({"inputs": rows["input_ids"]}, [{"inputs": rows["source_input_ids"]}]).intervened
    torch.nn.functional.cross_entropy(output, rows["labels"]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in mlp.parameters())


def test_labels_of_a_call_go_to_the_model():
    from tiny_models import tiny

    lm = tiny("llama")
    model = iv.IntervenableModel(
        [iv.RepresentationConfig(1, "block_output", intervention=iv.ZeroIntervention())], lm
    )
    ids = torch.tensor([[5, 6, 7]])
    output = model({"input_ids": ids}, unit_locations={"base": 0}, labels=ids).intervened
    log = output.logits[0].log_softmax(-1)
    torch.testing.assert_close(output.loss, -(log[0, 6] + log[1, 7]) / 2)
