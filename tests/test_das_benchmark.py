"""The benchmark of training compares like with like: the same losses, gradients and answers, and fair turns."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrize
from torch.testing import assert_close

from benchmarks import das, das_contenders, das_memory, das_report, das_turns
from benchmarks.das_contenders import HAND, LIMIT, OURS, Learned
from benchmarks.das_task import BATCH, DATA, DISTINCT, FEW, MODELS, RANKS, RECURRING, VERBS, Task, task_on

BY_LABEL = {contender.label: contender for contender in das_contenders.CONTENDERS}


def tiny_task(rank: str = "rank 4", data: str = DISTINCT, pairs: int = 64, steps: int = 2) -> Task:
    return task_on("tiny-llama", MODELS["tiny-llama"](), data, rank, pairs=pairs, steps=steps)


def learned(label: str, task: Task) -> Learned:
    return BY_LABEL[label].prepare(task)(lambda: None)


# --- the task ---


def test_prompts_are_distinct_or_few_and_labels_are_the_answers_after_the_source():
    distinct = tiny_task(data=DISTINCT)
    few = tiny_task(data=RECURRING)

    for task, most in ((distinct, 128), (few, FEW)):
        prompts = torch.cat([task.pairs.base, task.pairs.source])
        assert len(prompts.unique(dim=0)) in ((128,) if most == 128 else range(40, FEW + 1))
        with torch.no_grad():
            answers = task.model(task.pairs.source).logits[:, -1].argmax(-1)
        assert torch.equal(task.pairs.labels, answers)


def test_no_held_out_prompt_is_trained_on():
    task = tiny_task()
    trained = {tuple(row) for row in torch.cat([task.pairs.base, task.pairs.source]).tolist()}
    assert not trained & {
        tuple(row) for row in torch.cat([task.held_out.base, task.held_out.source]).tolist()
    }


def test_an_epoch_of_batches_has_every_pair_once():
    task = tiny_task(steps=4)
    first, second = (
        torch.cat([batch.base for batch in task.batches()[part]]) for part in (slice(2), slice(2, 4))
    )

    assert len(first) == len(second) == 64
    for epoch in (first, second):
        assert sorted(epoch.tolist()) == sorted(task.pairs.base.tolist())
    assert not torch.equal(first, second)


@pytest.mark.smollm2
@pytest.mark.parametrize("data", DATA)
def test_verbs_go_on_as_the_labels_say_and_base_and_source_differ(data):
    model = MODELS["smollm2"]()
    task = task_on("smollm2", model, data, "rank 4", steps=40)
    prompts = torch.cat([task.pairs.base, task.pairs.source])
    with torch.no_grad():
        answers = model(task.held_out.source).logits[:, -1].argmax(-1)

    held_out = torch.cat([task.held_out.base, task.held_out.source])
    assert prompts.shape == (512, 8)
    assert not {tuple(row) for row in prompts.tolist()} & {tuple(row) for row in held_out.tolist()}
    assert len(prompts.unique(dim=0)) == (512 if data == DISTINCT else FEW)
    assert len(task.pairs.labels.unique()) == len(VERBS)
    assert (task.pairs.base[:, -1] != task.pairs.source[:, -1]).all()
    assert (answers == task.held_out.labels).float().mean() > 0.95


# --- what is compared ---


@pytest.mark.parametrize("rank", RANKS)
def test_the_gradient_by_hand_is_the_slope_along_every_rotation(rank):
    task = replace(tiny_task(rank), model=MODELS["tiny-llama"]().double().requires_grad_(False))
    task = replace(task, start=task.start.double(), steps=1)
    gradient = learned(HAND, task).gradient
    batch = task.batches()[0]
    model, block = task.model, task.model.model.layers[task.layer]
    source = das_contenders.last_of(model, block, batch.source)

    def loss(basis):
        swap = basis[:, : task.swapped]
        change = lambda base: das_contenders.swapped(base, source, swap)  # noqa: E731
        return cross_entropy(das_contenders.logits_with(model, block, batch.base, change), batch.labels)

    inner = task.start.mT @ gradient
    assert_close(inner, -inner.mT)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    turn = (noise - noise.mT) * 1e-3  # the model's norms round to single precision
    slope = (loss(torch.matrix_exp(turn) @ task.start) - loss(torch.matrix_exp(-turn) @ task.start)) / 2
    assert_close((gradient * (turn @ task.start)).sum(), slope, rtol=1e-3, atol=0)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("rank", RANKS)
def test_this_library_begins_with_the_loss_and_the_gradient_of_the_hooks(rank, data, fast):
    task = tiny_task(rank, data)
    by_hand, ours = learned(HAND, task), das_contenders.intervenable(task, fast=fast)(lambda: None)

    assert ours.losses[0] == pytest.approx(by_hand.losses[0], rel=1e-6)
    assert (ours.gradient - by_hand.gradient).norm() < 1e-5 * by_hand.gradient.norm()


class PositiveQR(nn.Module):
    """The orthonormal factor of a matrix, as this library makes it, written by hand."""

    def forward(self, weight):
        columns, upper = torch.linalg.qr(weight)
        return columns * upper.diagonal().sign()

    def right_inverse(self, columns):
        return columns


def by_qr(start):
    module = nn.Module()
    module.weight = nn.Parameter(start.clone())
    parametrize.register_parametrization(module, "weight", PositiveQR())
    return module


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("rank", RANKS)
def test_with_the_same_decomposition_the_hooks_take_the_steps_of_this_library(rank, data):
    task = tiny_task(rank, data, steps=6)
    by_hand, ours = das_contenders.by_hand(task, by_qr)(lambda: None), learned(OURS, task)

    assert ours.losses == pytest.approx(by_hand.losses, rel=1e-4)
    begun, one, other = (
        basis @ basis.mT for basis in (task.start[:, : task.swapped], ours.basis, by_hand.basis)
    )
    assert (one - other).norm() < 0.01 * (one - begun).norm()


@pytest.mark.parametrize("rank", RANKS)
def test_the_suffix_alone_computes_the_loss_of_the_hooks(rank):
    task = tiny_task(rank, steps=1)
    assert learned(LIMIT, task).losses[0] == pytest.approx(learned(HAND, task).losses[0], rel=1e-6)


@pytest.mark.parametrize("label", [HAND, OURS])
def test_a_training_lowers_the_loss_and_keeps_the_basis_orthonormal(label):
    found = learned(label, tiny_task(data=RECURRING, steps=12))

    assert len(found.losses) == 12
    assert sum(found.losses[-3:]) < sum(found.losses[:3])
    assert_close(found.basis.mT @ found.basis, torch.eye(4), atol=1e-5, rtol=0)


def test_swapping_the_whole_space_gives_every_answer_of_a_swap_by_hand():
    task = tiny_task()
    model, block = task.model, task.model.model.layers[task.layer]
    with torch.no_grad():
        source = das_contenders.last_of(model, block, task.held_out.source)
        logits = das_contenders.logits_with(model, block, task.held_out.base, lambda base: source)

    right = das_contenders.accuracy(task, torch.eye(64))
    assert torch.equal(right, logits.argmax(-1) == task.held_out.labels)
    assert right.any()
    assert not right.all()


def test_the_wilson_interval_is_that_of_the_textbook():
    found = das_report.Accuracy.of(torch.tensor([True] * 9 + [False]))
    assert (found.share, round(found.low, 4), round(found.high, 4)) == (0.9, 0.5958, 0.9821)
    assert das_report.Accuracy.of(torch.ones(10)).high == pytest.approx(1.0)


# --- the turns ---


def noting(name: str, steps: int, seen: list[str]) -> das_contenders.Training:
    def train(pause):
        for _ in range(steps):
            seen.append(name)
            pause()
        return Learned([0.0])

    return train


def test_trainings_take_a_step_each_and_another_one_begins_each_time():
    seen: list[str] = []
    runs = das_turns.take_turns({name: noting(name, 2, seen) for name in "abc"})

    assert seen == list("bcacab")
    assert [len(run.seconds) for run in runs.values()] == [3, 3, 3]  # and what comes after the last step


def test_the_seconds_of_a_turn_are_those_of_its_own_training(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(das_turns.time, "process_time", lambda: clock[0])

    def lasting(seconds):
        def train(pause):
            for factor in (1, 2):
                clock[0] += factor * seconds
                pause()
            return Learned([0.0])

        return train

    runs = das_turns.take_turns({"one": lasting(1.0), "ten": lasting(10.0)})
    assert {name: run.seconds for name, run in runs.items()} == {"one": [1, 2, 0], "ten": [10, 20, 0]}


def test_an_error_in_one_training_is_raised_and_the_others_are_ended():
    ended = []

    def failing(pause):
        pause()
        raise RuntimeError("no more")

    def waiting(pause):
        try:
            while True:
                pause()
        finally:
            ended.append(True)

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="no more"):
        das_turns.take_turns({"waiting": waiting, "failing": failing})
    assert ended == [True]
    assert threading.active_count() == before


def test_steady_steps_are_those_after_the_first_epoch():
    assert das_turns.steady([9, 8, 2, 3, 4, 99], steps_per_epoch=2) == [2, 3, 4]
    assert das_turns.steady([9, 8, 99], steps_per_epoch=2) == [8]


def test_steps_that_were_not_taken_are_as_long_as_the_steady_ones():
    assert das_turns.whole([9, 8, 2, 3, 4, 1], steps=5, steps_per_epoch=2) == 27
    assert das_turns.whole([9, 8, 2, 3, 4, 1], steps=15, steps_per_epoch=2) == 27 + 10 * 3


def test_others_that_stop_early_have_the_same_steps_as_those_that_do_not():
    task = tiny_task(steps=6)
    short, whole = (learned(HAND, replace(task, taken=taken)) for taken in (3, None))

    assert (len(short.losses), len(whole.losses)) == (3, 6)
    assert short.losses == whole.losses[:3]


# --- the report ---


def test_the_report_has_every_contender_and_fails_where_something_differs(capsys, monkeypatch):
    options = ["--models=tiny-llama", f"--data={DISTINCT}", "--ranks=rank 4", "--parts=speed", "--quick"]
    options += ["--only=intervenable", "--steps=2"]

    assert das.main([*options, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["contender"] for result in results] == [HAND, OURS, LIMIT]
    assert all(result["milliseconds"]["median"] > 0 for result in results)
    assert results[1]["ratio"] is None
    assert results[0]["ratio"]["median"] > 0

    monkeypatch.setattr(das, "TOLERANCE", -1.0)
    assert das.main([*options, "--markdown"]) == 1
    output = capsys.readouterr()
    assert f"| tiny-llama, {DISTINCT}, rank 4 | hooks by hand | " in output.out
    assert (
        f"intervenable on tiny-llama, {DISTINCT}, rank 4: the first loss differs from the hooks'"
        in output.err
    )


def test_a_ratio_is_to_the_same_step_of_this_library():
    task = tiny_task(steps=4)
    run = lambda *seconds: das_turns.Run(Learned([1.0], gradient=torch.ones(1)), list(seconds))  # noqa: E731
    rounds = [{HAND: run(9, 8, 6, 12, 0), OURS: run(5, 4, 2, 3, 1)}]
    by_hand, ours = das_report.results_of("tiny", "rank 4", task, rounds, {HAND: torch.ones(4)})

    assert by_hand.ratio.median == 3.5  # of 6 / 2 and 12 / 3
    assert by_hand.whole_ratio == 35 / 15
    assert (ours.ratio, ours.seconds.median, ours.accuracy) == (None, 15, None)


def test_answers_that_do_not_agree_are_a_fault():
    result = das_report.results_of(
        "tiny",
        "rank 4",
        tiny_task(),
        [{HAND: das_turns.Run(Learned([1.0]), [1, 1, 1]), OURS: das_turns.Run(Learned([1.0]), [1, 1, 1])}],
        {HAND: torch.ones(100), OURS: torch.cat([torch.ones(50), torch.zeros(50)])},
    )
    assert das.faults(result) == [
        f"intervenable on tiny, {DISTINCT}, rank 4: IIA is 0.50 [0.40, 0.60], and the hooks' 1.00 [0.96, 1.00]."
    ]


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    found = das_memory.memory("tiny-llama", DISTINCT, "rank 4", das_memory.PLAIN)
    assert 50 < found.before <= found.peak < 2000  # megabytes


def test_a_batch_of_the_task_is_as_large_as_that_of_the_benchmark():
    assert {len(batch) for batch in tiny_task().batches()} == {BATCH}
