"""Two processes that train together end where one does: by themselves, and in a `transformers.Trainer`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from training_by_hand import das, make_mlp, make_rows

import intervenable as iv
from intervenable import training

ROOT = Path(__file__).parent.parent

# What each process does; the launchers set the same variables for it.
WORKER = """
import json, os, sys

sys.path[:0] = sys.argv[1:3]
import torch

torch.set_num_threads(1)
import test_training_processes as here

torch.manual_seed(int(os.environ["RANK"]))  # what is random must not depend on the process
found = {name: getattr(here, name)(sys.argv[3]) for name in sys.argv[4:]}
torch.distributed.destroy_process_group()
with open(f"{sys.argv[3]}/found-{os.environ['RANK']}.json", "w") as file:
    json.dump(found, file)
"""


def plain(folder):
    """A training whose last batch is smaller and leaves one process without examples."""
    model = das(make_mlp(), seed=int(os.environ.get("RANK", 0)))
    shown = []
    result = training.train(
        model,
        make_rows(29),
        lr=0.05,
        epochs=3,
        batch_size=2,
        accumulate=2,
        clip_norm=0.05,
        evaluation=4 / 29,
        early_stopping=9,
        checkpoint=f"{folder}/checkpoint" if folder else None,
        checkpoint_every=4,
        progress=lambda done, total: shown.append(done),
    )
    return told(model, result, len(shown))


def resumed(folder):
    """The same, done already."""
    return plain(folder)


def with_the_model(folder):
    """Interchange intervention training."""
    mlp = make_mlp()
    model = das(mlp, seed=int(os.environ.get("RANK", 0)))
    result = training.train(model, make_rows(), lr=0.05, epochs=2, batch_size=8, include_model=True)
    return {**told(model, result, 0), "score": mlp.score.weight.tolist()}


def failing(folder):
    """A loss that is no number in one process alone."""
    rows = make_rows(8)
    rows["input_ids"][3] = torch.nan
    try:
        training.train(das(make_mlp()), rows, epochs=1, batch_size=8, checkpoint=f"{folder}/failed")
    except iv.TrainingError as error:
        return str(error).split(" in step")[0]
    return "nothing"


def told(model, result, shown):
    evaluation = training.evaluate(model, make_rows(31, seed=4), batch_size=5)
    (weight,) = model.get_trainable_parameters()
    return {
        "weight": weight.tolist(),
        "losses": [row["loss"] for row in result.history],
        "final": dict(result.final),
        "loss": result.loss,
        "evaluation": evaluation.per_example.tolist(),
        "shown": shown,
    }


def in_a_trainer(folder):
    """The `Trainer` of transformers, with as many examples in a step, whatever the number of processes."""
    import datasets
    import transformers

    model = das(make_mlp())
    model.disable_model_gradients()
    rows = datasets.Dataset.from_dict({name: values.tolist() for name, values in make_rows(24).items()})
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    arguments = transformers.TrainingArguments(
        f"{folder}/trainer",
        max_steps=4,
        per_device_train_batch_size=12 // int(os.environ.get("WORLD_SIZE", 1)),
        gradient_accumulation_steps=2,
        remove_unused_columns=False,
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=training.Collator(model),
        compute_loss_func=training.compute_loss,
        compute_metrics=training.compute_metrics,
        optimizers=(optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)),
    )
    trainer.train()
    (weight,) = model.get_trainable_parameters()
    measured = trainer.evaluate()
    return {"weight": weight.tolist(), "loss": measured["eval_loss"], "iia": measured["eval_iia"]}


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def in_two_processes(folder, *names):
    """What the functions of these names give in each of two processes."""
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, "-c", WORKER, str(ROOT), str(ROOT / "tests"), str(folder), *names]
    logs = [folder / f"said-{rank}.txt" for rank in range(2)]
    workers = []
    for rank, log in enumerate(logs):
        with log.open("w") as said:
            own = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(subprocess.Popen(command, env=own, cwd=ROOT, stdout=said, stderr=said))
    try:
        for worker, log in zip(workers, logs, strict=True):
            assert worker.wait(timeout=400) == 0, log.read_text()[-3000:]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return in_two_processes(folder, "plain", "resumed", "with_the_model", "failing", "in_a_trainer")


@pytest.mark.parametrize("task", [plain, with_the_model])
def test_two_processes_end_with_the_weights_of_one(both, task):
    alone = task(None)
    for found in (process[task.__name__] for process in both):
        assert_close(torch.tensor(found["weight"]), torch.tensor(alone["weight"]), atol=1e-6, rtol=0)
        assert_close(found["losses"], alone["losses"], atol=1e-5, rtol=0)
        assert_close(found["final"], alone["final"], atol=1e-5, rtol=0)
        assert_close(found["loss"], alone["loss"], atol=1e-5, rtol=0)
        assert found["evaluation"] == alone["evaluation"]
        if task is with_the_model:
            assert_close(torch.tensor(found["score"]), torch.tensor(alone["score"]), atol=1e-5, rtol=0)
    assert both[0][task.__name__]["weight"] == both[1][task.__name__]["weight"]


def test_the_first_process_alone_shows_progress(both):
    assert both[0]["plain"]["shown"] > 10
    assert both[1]["plain"]["shown"] == 0


def test_all_take_up_what_the_first_has_kept(both):
    for process in both:
        plain, resumed = process["plain"], process["resumed"]
        assert {**plain, "shown": 0} == {**resumed, "shown": 0}
    assert both[0]["resumed"]["shown"] == 1  # all at once


def test_a_loss_that_is_no_number_in_one_stops_all(both):
    assert [process["failing"] for process in both] == ["The loss is nan"] * 2


def test_a_trainer_in_two_processes_ends_with_the_weights_of_a_trainer_in_one_and_with_ours(both, tmp_path):
    alone = in_a_trainer(tmp_path)
    ours = das(make_mlp())
    training.train(ours, make_rows(24), lr=0.05, schedule="constant", warmup=0, epochs=4, batch_size=24)
    (weight,) = ours.get_trainable_parameters()
    measured = training.evaluate(ours, make_rows(24))
    loss = training.evaluate(ours, make_rows(24), metric="cross_entropy")
    for found in (alone, both[0]["in_a_trainer"], both[1]["in_a_trainer"]):
        assert_close(torch.tensor(found["weight"]), weight.detach(), atol=1e-5, rtol=0)
        assert_close(found["loss"], loss.value, atol=1e-5, rtol=0)
        assert_close(found["iia"], measured.value, atol=1e-6, rtol=0)
