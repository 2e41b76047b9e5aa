"""`train`: the same steps as a loop written by hand, and a model that is as it was afterwards."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from training_by_hand import (
    CLASSES,
    LAYER,
    WIDTH,
    das,
    intervened,
    make_mlp,
    make_rows,
    orthonormal,
    planted,
    trained_by_hand,
    weight_of,
)

import intervenable as iv
from intervenable import training
from intervenable.tensor_files import read_tensors
from intervenable.training_failure import FAILED
from intervenable.training_loop import order_of

STEADY = {"schedule": "constant", "warmup": 0, "lr": 0.05}


@pytest.fixture
def mlp():
    return make_mlp()


# --- steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
def test_training_takes_the_steps_of_a_loop_written_by_hand(mlp, fast):
    rows, model = make_rows(), das(mlp)
    expected, losses = trained_by_hand(mlp, weight_of(model), rows, lr=0.05, steps=8)
    result = training.train(model, rows, **STEADY, batch_size=24, epochs=8, fast=fast)
    assert_close([row["loss"] for row in result.history], losses, atol=1e-5, rtol=1e-5)
    assert_close(weight_of(model), expected, atol=1e-4, rtol=1e-4)
    assert losses[-1] < losses[0]
    assert result.steps == 8


def test_each_epoch_sees_every_example_once_in_an_order_that_the_seed_decides(mlp):
    rows = make_rows(10)
    seen = []

    def watched(logits, labels):
        seen.extend(labels.tolist())
        return training.cross_entropy(logits, labels)

    rows["labels"] = torch.arange(10) % CLASSES
    for seed in (0, 0, 1):
        training.train(das(mlp), rows, loss=watched, epochs=2, batch_size=4, seed=seed, max_steps=6)
    runs = [seen[start : start + 20] for start in (0, 30, 60)]  # ten more each, for what it came to
    for run in runs:
        assert sorted(run[:10]) == sorted(run[10:]) == sorted(rows["labels"].tolist())
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    orders = [order_of(10, 0, epoch) for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3


@pytest.mark.parametrize(
    "loss", ["cross_entropy", lambda logits, labels: training.cross_entropy(logits, labels).mean()]
)
def test_accumulated_batches_are_one_large_batch_also_where_the_last_is_smaller(mlp, loss):
    """14 examples: a step of 12 and one of 2, as batches of 5, 5, 2 and 2."""
    rows = make_rows(14)
    models = [das(mlp), das(mlp)]
    large, small = (
        training.train(model, rows, **STEADY, loss=loss, epochs=3, **sizes)
        for model, sizes in zip(models, ({"batch_size": 12}, {"batch_size": 4, "accumulate": 3}), strict=True)
    )
    assert large.steps == small.steps == 6
    assert_close(weight_of(models[0]), weight_of(models[1]), atol=1e-5, rtol=1e-5)
    for name in ("loss", "iia"):
        assert_close(
            [row[name] for row in large.history], [row[name] for row in small.history], atol=1e-5, rtol=0
        )


def test_a_step_of_fewer_examples_takes_the_mean_over_those(mlp):
    rows, model = make_rows(17), das(mlp)
    weight, order = weight_of(model), order_of(17, 0, 0)
    for some in (order[:12], order[12:]):
        weight.requires_grad_()
        logits = intervened(mlp, weight, rows["input_ids"][some], rows["source_input_ids"][some])
        (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(logits, rows["labels"][some]), [weight])
        weight = (weight - 0.1 * gradient).detach()
        assert gradient.norm() > 1e-2
    steady = {"optimizer": "sgd", "schedule": "constant", "warmup": 0, "lr": 0.1}
    training.train(model, rows, **steady, epochs=1, batch_size=4, accumulate=3)
    assert_close(weight_of(model), weight, atol=1e-6, rtol=1e-5)


def test_a_direction_that_was_planted_is_found(mlp):
    mlp, rows, direction = planted()
    model = das(mlp, rank=1)
    assert training.evaluate(model, rows).value < 0.8
    result = training.train(model, rows, lr=0.05, epochs=12, batch_size=32)
    assert result.final["iia"] > 0.95
    basis = orthonormal(weight_of(model))
    assert abs(float(basis[:, 0] @ direction)) > 0.97


def test_max_steps_ends_a_training(mlp):
    result = training.train(das(mlp), make_rows(), batch_size=4, epochs=3, max_steps=8)
    assert (result.steps, result.epochs) == (8, 2)


def test_gradients_are_clipped_to_their_norm(mlp):
    rows, model = make_rows(), das(mlp)
    before = weight_of(model)
    result = training.train(
        model,
        rows,
        optimizer="sgd",
        schedule="constant",
        warmup=0,
        lr=1.0,
        clip_norm=1e-3,
        batch_size=24,
        epochs=1,
    )
    assert result.history[0]["gradient_norm"] > 1e-2
    assert_close((weight_of(model) - before).norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_runs_the_model_low_and_keeps_weights_high(mlp, precision):
    rows, model = make_rows(), das(mlp)
    plain = training.train(das(mlp), rows, **STEADY, batch_size=24, epochs=3)
    dtypes = []

    def watched(logits, labels):
        dtypes.append(logits.dtype)
        return training.cross_entropy(logits, labels)

    low = training.train(
        model, rows, **STEADY, loss=watched, batch_size=24, epochs=3, precision=precision, fast=False
    )
    assert set(dtypes) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    assert weight_of(model).dtype == torch.float32
    assert_close(low.final["loss"], plain.final["loss"], atol=0.05, rtol=0)
    assert low.final["loss"] != plain.final["loss"]


# --- losses and metrics -----------------------------------------------------------------------------------


def test_losses_and_metrics_are_their_formulas():
    logits = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 0.5, 3.0]], [[0.0, 0.0, 1.0], [5.0, 0.0, 0.0]]])
    labels = torch.tensor([[0, 1], [2, -100]])
    log = logits.log_softmax(-1)
    first = -(log[0, 0, 0] + log[0, 1, 1]) / 2
    assert_close(training.cross_entropy(logits, labels), torch.stack([first, -log[1, 0, 2]]))
    assert_close(training.margin(logits, labels), torch.tensor([(0 + 3.5) / 2, 0.0]))
    assert training.iia(logits, labels).tolist() == [0.0, 1.0]
    assert_close(
        training.probability(logits, labels),
        torch.stack([(log[0, 0, 0] + log[0, 1, 1]).exp(), log[1, 0, 2].exp()]),
    )
    assert training.iia(logits[:, 0], labels[:, 0]).tolist() == [1.0, 1.0]
    assert_close(training.cross_entropy(logits[:, 0], labels[:, 0]), -log[torch.arange(2), 0, labels[:, 0]])


def test_metrics_are_measured_on_the_batch_of_each_step_and_at_the_end(mlp):
    rows, model = make_rows(), das(mlp)
    first = intervened(mlp, weight_of(model), rows["input_ids"], rows["source_input_ids"])
    result = training.train(
        model,
        rows,
        batch_size=24,
        epochs=2,
        metric={"right": "iia", "largest": lambda logits, labels: logits.amax(-1)},
    )
    assert_close(result.history[0]["right"], (first.argmax(-1) == rows["labels"]).float().mean().item())
    assert_close(result.history[0]["largest"], first.amax(-1).mean().item(), rtol=1e-5, atol=0)
    last = intervened(mlp, weight_of(model), rows["input_ids"], rows["source_input_ids"])
    assert_close(result.final["largest"], last.amax(-1).mean().item(), rtol=1e-5, atol=0)
    assert_close(
        result.final["loss"], nn.functional.cross_entropy(last, rows["labels"]).item(), rtol=1e-5, atol=0
    )


def test_the_loss_of_a_result_is_the_mean_over_the_examples_of_the_last_epoch(mlp):
    """Of 10 examples in batches of 4: the last batch counts half."""
    result = training.train(das(mlp), make_rows(10), batch_size=4, epochs=2)
    four, other_four, two = (row["loss"] for row in result.history[-3:])
    assert_close(result.loss, (4 * four + 4 * other_four + 2 * two) / 10, rtol=1e-6, atol=0)


# --- evaluation -------------------------------------------------------------------------------------------


def test_an_evaluation_is_the_share_of_right_answers_with_an_interval(mlp):
    rows, model = make_rows(), das(mlp)
    logits = intervened(mlp, weight_of(model), rows["input_ids"], rows["source_input_ids"])
    right = (logits.argmax(-1) == rows["labels"]).float()
    found = training.evaluate(model, rows, batch_size=7)
    assert found.per_example.tolist() == right.tolist()
    assert_close(found.value, right.mean().item())
    assert found.low <= found.value <= found.high
    assert found.count == 24
    assert str(found) == f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}] of 24"
    wider = training.evaluate(model, rows, confidence=0.99)
    assert wider.low <= found.low
    assert wider.high >= found.high


def test_examples_put_aside_are_not_trained_on_and_are_measured_after_each_epoch(mlp):
    rows = make_rows(20)
    rows["labels"] = torch.arange(20) % CLASSES
    seen = []

    def watched(logits, labels):
        if torch.is_grad_enabled():
            seen.append(len(labels))
        return training.cross_entropy(logits, labels)

    result = training.train(das(mlp), rows, evaluation=0.25, loss=watched, epochs=3, batch_size=100)
    assert seen == [15] * 3
    kinds = [row["kind"] for row in result.history]
    assert kinds == ["step", "evaluation"] * 3
    assert result.final == {name: result.history[-1][name] for name in ("loss", "iia")}


def test_another_data_set_is_evaluated_as_evaluate_does(mlp):
    model, other = das(mlp), make_rows(30, seed=9)
    result = training.train(model, make_rows(), evaluation=other, epochs=2)
    assert_close(result.final["iia"], training.evaluate(model, other).value)
    assert_close(
        result.final["loss"], training.evaluate(model, other, metric="cross_entropy").value, rtol=1e-5, atol=0
    )


def test_without_an_evaluation_the_last_epoch_says_how_good_it_is(mlp):
    result = training.train(das(mlp), make_rows(10), evaluation=False, batch_size=4, epochs=2)
    four, other_four, two = (row["iia"] for row in result.history[-3:])
    assert_close(result.final["iia"], (4 * four + 4 * other_four + 2 * two) / 10)
    assert result.final["loss"] == result.loss


def test_early_stopping_ends_with_the_best_weights(mlp):
    """A rate that is far too large: the loss on the other examples rises after a while."""
    model, other, values, weights = das(mlp), make_rows(30, seed=9), [], []

    def note(done, total):
        weights.append(weight_of(model))

    result = training.train(
        model,
        make_rows(),
        evaluation=other,
        lr=0.3,
        epochs=40,
        batch_size=24,
        early_stopping=training.EarlyStopping("loss", 3),
        progress=note,
    )
    values = [row["loss"] for row in result.history if row["kind"] == "evaluation"]
    best = values.index(min(values))
    assert result.stopped_early
    assert len(values) == best + 4
    assert_close(result.final["loss"], values[best])
    assert torch.equal(weight_of(model), weights[best])
    assert_close(result.loss, [row["loss"] for row in result.history if row["kind"] == "step"][best])


def test_early_stopping_without_other_examples_watches_the_loss(mlp):
    result = training.train(
        das(mlp),
        make_rows(),
        lr=0.0,
        epochs=9,
        early_stopping=training.EarlyStopping(patience=2, minimum=1e-4),
    )
    assert result.stopped_early
    assert result.epochs == 3


def test_a_smallest_improvement_is_asked_for():
    stopping = training.EarlyStopping("iia", minimum=0.1)
    assert stopping.better("iia", 0.5, None)
    assert not stopping.better("iia", 0.59, 0.5)
    assert stopping.better("iia", 0.61, 0.5)
    assert training.EarlyStopping("loss").better("loss", 0.4, 0.5)
    assert training.EarlyStopping("mine", lower_is_better=True).better("mine", 0.4, 0.5)


# --- schedules --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [0.5, 1.0, 1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
@pytest.mark.parametrize("warmup", [2, 0.34])
def test_the_learning_rate_rises_over_the_warmup_and_falls_to_zero(mlp, schedule, rates, warmup):
    result = training.train(
        das(mlp), make_rows(), lr=0.1, schedule=schedule, warmup=warmup, epochs=6, batch_size=24
    )
    assert_close([row["lr"] for row in result.history], [0.1 * rate for rate in rates])


def test_a_schedule_may_be_any_of_torch(mlp):
    result = training.train(
        das(mlp), make_rows(), lr=0.1, epochs=3, batch_size=24, max_steps=3,
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.ExponentialLR(optimizer, 1 / steps),
    )  # fmt: skip
    assert_close([row["lr"] for row in result.history], [0.1, 0.1 / 3, 0.1 / 9])


@pytest.mark.parametrize(
    ("kind", "given", "ends"),
    [
        (iv.BoundlessRotatedSpaceIntervention, None, (50.0, 0.1)),
        (iv.SigmoidMaskRotatedSpaceIntervention, None, (50.0, 0.1)),
        (iv.SigmoidMaskIntervention, None, (1.0, 0.01)),
        (iv.SigmoidMaskIntervention, (5.0, 0.5), (5.0, 0.5)),
        (iv.SigmoidMaskIntervention, lambda share: 3.0 - 2 * share, (3.0, 1.0)),
    ],
)
def test_temperatures_go_evenly_from_start_to_end(mlp, kind, given, ends):
    model = das(mlp, kind=kind)
    result = training.train(model, make_rows(), temperature=given, epochs=4, batch_size=24)
    start, end = ends
    expected = [start + (end - start) * step / 4 for step in range(4)]
    assert_close([row["temperature"] for row in result.history], expected)
    (intervention,) = model.interventions.values()
    assert_close(intervention.temperature.item(), end)


def test_a_temperature_that_trains_is_left_alone(mlp):
    mask = iv.SigmoidMaskIntervention(WIDTH, temperature=2.0, trainable_temperature=True)
    model = iv.IntervenableModel([iv.RepresentationConfig(LAYER, "block_output", intervention=mask)], mlp)
    result = training.train(model, make_rows(), epochs=1, batch_size=24, lr=1e-3)
    assert result.history[0]["temperature"] is None
    assert 1.9 < mask.temperature.item() < 2.1


@pytest.mark.parametrize(
    "optimizer",
    [
        "adam",
        "adamw",
        "sgd",
        "rmsprop",
        "adagrad",
        torch.optim.NAdam,
        lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
    ],
)
def test_optimizers_by_name_class_and_function_lower_the_loss(mlp, optimizer):
    result = training.train(das(mlp), make_rows(), optimizer=optimizer, lr=0.05, epochs=10, batch_size=24)
    losses = [row["loss"] for row in result.history]
    assert losses[-1] < losses[0]


def test_an_optimizer_of_the_users_own_is_used(mlp):
    model = das(mlp)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training.train(
        model, make_rows(), optimizer=optimizer, schedule="constant", warmup=0, epochs=1, batch_size=24
    )
    other = das(mlp)
    training.train(
        other, make_rows(), optimizer="sgd", lr=0.1, schedule="constant", warmup=0, epochs=1, batch_size=24
    )
    assert torch.equal(weight_of(model), weight_of(other))


# --- what trains ------------------------------------------------------------------------------------------


def test_linked_interventions_train_one_basis_whose_gradients_add_up(mlp):
    """Two layers share a basis: its gradient is the sum of those of two bases with the same values."""
    rows = make_rows()
    shared = iv.IntervenableModel(
        [
            iv.RepresentationConfig(
                layer, "block_output", low_rank_dimension=2, intervention_link_key=0,
                intervention_type=iv.LowRankRotatedSpaceIntervention,
            )
            for layer in (0, 1)
        ],
        mlp,
    )  # fmt: skip
    assert shared.count_parameters() == 2 * WIDTH
    start = weight_of(shared)
    bases = [start.clone().requires_grad_() for _ in range(2)]
    base, source = rows["input_ids"], rows["source_input_ids"]
    sources = [mlp.layers[0](source)]
    sources.append(mlp.layers[1](sources[0]))
    hidden = base
    for layer in (0, 1):
        columns = orthonormal(bases[layer])
        hidden = mlp.layers[layer](hidden)
        hidden = hidden + (sources[layer] - hidden) @ columns @ columns.T
    loss = nn.functional.cross_entropy(mlp.score(mlp.layers[2](hidden)), rows["labels"])
    gradients = torch.autograd.grad(loss, bases)
    assert all(gradient.norm() > 1e-3 for gradient in gradients)

    for fast in (True, False):
        with torch.no_grad():
            shared.get_trainable_parameters()[0].copy_(start)
        training.train(
            shared,
            rows,
            optimizer="sgd",
            lr=0.1,
            schedule="constant",
            warmup=0,
            batch_size=24,
            epochs=1,
            fast=fast,
        )
        assert_close(weight_of(shared), start - 0.1 * sum(gradients), atol=1e-5, rtol=1e-4)


HALVES = [[0, 1, 2], [3, 4, 5]]


def halves(mlp, *groups):
    """Two swaps at one place, each of one half of the coordinates."""
    entries = [
        iv.RepresentationConfig(0, "block_output", group_key=group, subspace_partition=HALVES)
        for group in groups
    ]
    return iv.IntervenableModel(iv.IntervenableConfig(entries, iv.VanillaIntervention), mlp)


def first_logit(logits, labels):
    return logits[:, 0]


@pytest.mark.parametrize("fast", [True, False])
def test_grouped_interventions_share_a_source_and_others_have_their_own(mlp, fast):
    rows = {**make_rows(), "subspaces": [[[0], [1]]] * 24}
    first, second = rows["source_input_ids"], make_rows(seed=5)["source_input_ids"]

    def found(model, sources):
        return training.evaluate(
            model, {**rows, "source_input_ids": sources}, metric=first_logit, fast=fast
        ).per_example

    def expected(left, right):
        with torch.no_grad():
            mixed = torch.cat([mlp.layers[0](left)[:, :3], mlp.layers[0](right)[:, 3:]], dim=1)
            return mlp.score(mlp.layers[2](mlp.layers[1](mixed)))[:, 0]

    both = torch.stack([first, second], 1)
    assert_close(found(halves(mlp, 0, 0), first), expected(first, first), atol=1e-5, rtol=1e-5)
    assert_close(found(halves(mlp, 0, 1), first), expected(first, first), atol=1e-5, rtol=1e-5)
    assert_close(found(halves(mlp, 0, 1), both), expected(first, second), atol=1e-5, rtol=1e-5)
    assert_close(
        found(halves(mlp, 1, 0), both), expected(first, second), atol=1e-5, rtol=1e-5
    )  # in declared order
    assert not torch.allclose(expected(first, second), expected(first, first), atol=0.1)


@pytest.mark.parametrize("fast", [True, False])
def test_a_variable_that_is_not_intervened_on_keeps_the_base(mlp, fast):
    rows = {**make_rows(), "subspaces": [[[0], [1]]] * 24}
    rows["source_input_ids"] = torch.stack([rows["source_input_ids"], torch.zeros(24, WIDTH)], 1)
    mask = torch.tensor([[True, False]] * 12 + [[False, True]] * 6 + [[False, False]] * 6)
    with torch.no_grad():
        base = mlp.layers[0](rows["input_ids"])
        first, second = (mlp.layers[0](rows["source_input_ids"][:, group]) for group in (0, 1))
        left = torch.where(mask[:, :1], first, base)[:, :3]
        right = torch.where(mask[:, 1:], second, base)[:, 3:]
        expected = mlp.score(mlp.layers[2](mlp.layers[1](torch.cat([left, right], 1))))[:, 0]
    masked = training.evaluate(
        halves(mlp, 0, 1), {**rows, "source_mask": mask}, metric=first_logit, fast=fast
    )
    assert_close(masked.per_example, expected, atol=1e-5, rtol=1e-5)
    without = training.evaluate(halves(mlp, 0, 1), rows, metric=first_logit, fast=fast)
    assert not torch.allclose(without.per_example, expected, atol=0.1)


def test_interchange_intervention_training_trains_the_model_too(mlp):
    rows, model = make_rows(), das(mlp)
    before = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    alone = training.train(das(mlp), rows, lr=0.02, epochs=40, batch_size=24)
    assert all(torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())
    result = training.train(model, rows, include_model=True, lr=0.02, epochs=40, batch_size=24)
    assert result.final["loss"] < alone.final["loss"] - 0.1
    assert all(not torch.equal(tensor, before[name]) for name, tensor in mlp.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in mlp.parameters())


def test_parts_of_the_model_that_their_owner_froze_stay_frozen(mlp):
    mlp.score.requires_grad_(False)
    before = mlp.score.weight.clone()
    training.train(das(mlp), make_rows(), include_model=True, lr=0.02, epochs=2)
    assert torch.equal(mlp.score.weight, before)
    assert not mlp.score.weight.requires_grad


# --- the model afterwards ---------------------------------------------------------------------------------


class _StopError(Exception):
    pass


def _stop(done, total):
    raise _StopError


@pytest.mark.parametrize("progress", [None, _stop])
@pytest.mark.parametrize("include_model", [False, True])
def test_the_model_is_as_it_was_whatever_is_raised(mlp, progress, include_model):
    model = das(mlp)
    mlp.train()
    mlp.layers[0].eval()
    mlp.layers[1].requires_grad_(False)
    mlp.score.weight.grad = torch.ones_like(mlp.score.weight)
    model.eval()
    modes = {name: module.training for name, module in mlp.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in mlp.named_parameters()}
    gradient, before = mlp.score.weight.grad, torch.get_rng_state()
    weights = {name: tensor.clone() for name, tensor in mlp.state_dict().items()}
    try:
        training.train(model, make_rows(), epochs=1, progress=progress, include_model=include_model)
    except _StopError:
        assert progress is _stop
    assert {name: module.training for name, module in mlp.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in mlp.named_parameters()} == wanted
    assert not model.training
    assert mlp.score.weight.grad is gradient
    assert bool((gradient == 1).all())
    assert all(parameter.grad is None for name, parameter in mlp.named_parameters() if name != "score.weight")
    assert torch.equal(torch.get_rng_state(), before)
    if not include_model:
        assert all(torch.equal(tensor, weights[name]) for name, tensor in mlp.state_dict().items())


def test_the_model_is_in_evaluation_mode_and_the_interventions_are_not_while_they_train(mlp):
    modes = []

    class Watched(iv.LowRankRotatedSpaceIntervention):
        def forward(self, base, source=None, subspaces=None):
            modes.append(
                (self.training, mlp.training, torch.is_grad_enabled(), mlp.score.weight.requires_grad)
            )
            return super().forward(base, source, subspaces)

    swap = Watched(WIDTH, 2)
    model = iv.IntervenableModel([iv.RepresentationConfig(LAYER, "block_output", intervention=swap)], mlp)
    training.train(model, make_rows(), epochs=1, batch_size=24, fast=False)
    assert modes == [(True, False, True, False), (False, False, False, False)]


def test_what_is_random_comes_from_the_seed_alone(mlp):
    class Dropping(iv.LowRankRotatedSpaceIntervention):
        def forward(self, base, source=None, subspaces=None):
            return nn.functional.dropout(super().forward(base, source, subspaces), 0.5, self.training)

    weights = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(weights))
        with torch.random.fork_rng():
            torch.manual_seed(7)
            swap = Dropping(WIDTH, 2)
        model = iv.IntervenableModel([iv.RepresentationConfig(LAYER, "block_output", intervention=swap)], mlp)
        training.train(model, make_rows(), epochs=2, batch_size=24, seed=seed, lr=0.1)
        weights.append(weight_of(model))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


# --- what cannot be ---------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_with_the_step_the_rows_and_the_weights_before_it(mlp, tmp_path):
    model, rows, weights = das(mlp), make_rows(8), []
    rows["input_ids"][5, 2] = torch.nan

    def note(done, total):
        weights.append(weight_of(model))

    start = weight_of(model)
    with pytest.raises(iv.TrainingError) as caught:
        training.train(model, rows, batch_size=2, epochs=2, progress=note, checkpoint=tmp_path)
    order = order_of(8, 0, 0)
    step = order.index(5) // 2
    batch = order[2 * step : 2 * step + 2]
    assert str(caught.value) == (
        f"The loss is nan in step {step} (epoch 0, rows {batch[0]}, {batch[1]}). The weights are those before the"
        f" step. Its batch is kept in {tmp_path / 'failed-batch.safetensors'}. A smaller lr, a warmup or"
        " clip_norm may help."
    )
    assert torch.equal(weight_of(model), weights[-1] if weights else start)
    tensors, _ = read_tensors(tmp_path / "failed-batch.safetensors", FAILED)
    assert tensors["rows"].tolist() == batch
    assert torch.equal(tensors["base.inputs"].nan_to_num(), rows["input_ids"][batch].nan_to_num())
    assert torch.equal(tensors["source_0.inputs"], rows["source_input_ids"][batch])
    assert tensors["labels"].tolist() == rows["labels"][batch].tolist()


def test_without_a_checkpoint_the_batch_goes_to_a_temporary_file(mlp):
    rows = make_rows(4)
    rows["input_ids"][:] = torch.nan
    with pytest.raises(iv.TrainingError, match="The loss is nan in step 0") as caught:
        training.train(das(mlp), rows)
    file = Path(re.search(r"kept in (\S+\.safetensors)\.", str(caught.value))[1])
    assert read_tensors(file, FAILED)[0]["rows"].tolist() == order_of(4, 0, 0)


def test_gradients_that_are_no_numbers_stop_too(mlp):
    model = das(mlp)
    start = weight_of(model)

    def steep(logits, labels):
        return (logits * 0).sum(-1).sqrt()  # 0, with an infinite slope

    with pytest.raises(iv.TrainingError, match="The norm of the gradients is nan in step 0"):
        training.train(model, make_rows(), loss=steep)
    assert torch.equal(weight_of(model), start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs=0: give a whole number from 1 on."),
        ({"batch_size": 2.5}, "batch_size=2.5: give a whole number from 1 on."),
        ({"lr": -1}, "lr=-1: give a number from 0 on."),
        ({"clip_norm": 0}, "clip_norm=0: give a number above 0, or None."),
        ({"precision": "bf61"}, "Unknown precision 'bf61'. Did you mean 'bf16'?\nAllowed: bf16, fp16, fp32."),
        (
            {"loss": "crossentropy"},
            "Unknown loss 'crossentropy'. Did you mean 'cross_entropy'?\nAllowed: cross_entropy, margin.",
        ),
        (
            {"metric": 3},
            "metric=3 is a int. Give one of iia, accuracy, probability, cross_entropy, margin, or a"
            " function of (logits, labels).",
        ),
        ({"metric": {}}, "metric is an empty mapping. Give at least one metric, such as 'iia'."),
        (
            {"optimizer": "adm"},
            "Unknown optimizer 'adm'. Did you mean 'adam'?\nAllowed: adagrad, adam, adamw, rmsprop, sgd.",
        ),
        (
            {"optimizer": 3},
            "optimizer=3 is a int. Give one of adam, adamw, sgd, rmsprop, adagrad, a class or an"
            " instance of torch.optim, or a function of the parameters.",
        ),
        (
            {"optimizer": torch.optim.LBFGS},
            "LBFGS measures the loss itself, several times a step. Give another optimizer.",
        ),
        (
            {"schedule": "linaer"},
            "Unknown schedule 'linaer'. Did you mean 'linear'?\nAllowed: constant, cosine, linear.",
        ),
        (
            {"warmup": -0.1},
            "warmup=-0.1: give a share of the 10 steps (from 0 to below 1), or a number of steps.",
        ),
        (
            {"warmup": 11},
            "warmup=11: give a share of the 10 steps (from 0 to below 1), or a number of steps.",
        ),
        (
            {"temperature": (5, 1)},
            "temperature=(5, 1): no intervention has one. There are: LowRankRotatedSpaceIntervention.",
        ),
        ({"early_stopping": "soon"}, "early_stopping='soon': give a number of epochs, or an EarlyStopping."),
        (
            {"early_stopping": training.EarlyStopping("iaa")},
            "early_stopping watches 'iaa', and there are: loss, iia.",
        ),
        (
            {"evaluation": 1.5},
            "evaluation=1.5: give another data set, or a share of the 24 examples"
            " that leaves some on both sides.",
        ),
        ({"memory": "much"}, "memory='much' is no amount. Give bytes, or text such as '500MB' or '2GB'."),
        ({"seed": -1}, "seed=-1: give a whole number from 0 on."),
    ],
)
def test_options_that_cannot_be_are_refused(mlp, options, message):
    with pytest.raises(iv.ConfigError) as caught:
        training.train(das(mlp), make_rows(), **options)
    assert str(caught.value) == message


def test_all_wrong_numbers_are_told_at_once(mlp):
    with pytest.raises(
        iv.ConfigError, match=r"^3 faults in the options of the training:\n- epochs=0"
    ) as caught:
        training.train(das(mlp), make_rows(), epochs=0, accumulate=-1, lr="fast")
    assert len(caught.value.faults) == 3


def test_temperatures_that_are_none_are_refused(mlp):
    model = das(mlp, kind=iv.SigmoidMaskIntervention)
    for given in ((1.0,), (0.0, 1.0), 3.0):
        with pytest.raises(iv.ConfigError, match=r"give \(start, end\), both above 0"):
            training.train(model, make_rows(), temperature=given)
    with pytest.raises(iv.ConfigError, match=r"temperature gave -1.0 at 0.00 of the training"):
        training.train(model, make_rows(), temperature=lambda share: -1.0)


def test_an_intervention_with_nothing_to_train_is_refused(mlp):
    swap = iv.IntervenableModel([iv.RepresentationConfig(LAYER, "block_output")], mlp)
    with pytest.raises(iv.ConfigError) as caught:
        training.train(swap, make_rows())
    assert str(caught.value) == (
        "There is nothing to train: no parameter of VanillaIntervention requires gradients. Declare an intervention"
        " that learns, such as LowRankRotatedSpaceIntervention."
    )
    assert training.train(swap, make_rows(), include_model=True, epochs=1).steps == 1
    with pytest.raises(iv.ConfigError, match=r"^model is a MLPClassifier\. Give an IntervenableModel"):
        training.train(mlp, make_rows())


def test_a_frozen_parameter_in_the_optimizer_is_refused(mlp):
    model = das(mlp)
    with pytest.raises(iv.ConfigError) as caught:
        training.train(
            model, make_rows(), optimizer=torch.optim.SGD([*model.parameters(), mlp.score.bias], lr=0.1)
        )
    assert str(caught.value) == (
        "The optimizer has 'model.score.bias', which is part of the wrapped model, which is frozen while its"
        " interventions train. Leave it out, or train the model too: include_model=True."
    )
    two = iv.IntervenableModel(
        iv.IntervenableConfig(
            [iv.RepresentationConfig(layer, "block_output", low_rank_dimension=2) for layer in (0, 1)],
            iv.LowRankRotatedSpaceIntervention,
        ),
        mlp,
    )
    first, second = two.parameters()
    first.requires_grad_(False)
    with pytest.raises(
        iv.ConfigError, match=r"which is frozen \(requires_grad is False\). Leave it out, or unfreeze it\."
    ):
        training.train(two, make_rows(), optimizer=torch.optim.SGD([first, second], lr=0.1))
    with pytest.raises(iv.ConfigError, match=r"has a parameter of shape \(3,\) that is none of this model's"):
        training.train(model, make_rows(), optimizer=torch.optim.SGD([nn.Parameter(torch.zeros(3))], lr=0.1))
    assert all(parameter.requires_grad for parameter in mlp.parameters())


def test_a_loss_or_metric_of_another_shape_is_refused(mlp):
    with pytest.raises(iv.MetricError, match=r"loss gave a tensor of shape \(24, 3\) for 24 examples"):
        training.train(das(mlp), make_rows(), loss=lambda logits, labels: logits)
    with pytest.raises(iv.ConfigError, match="evaluate measures one metric"):
        training.evaluate(das(mlp), make_rows(), metric=["iia", "probability"])
