"""A training that goes on from its folder ends as one never interrupted; one of another training is refused."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re

import pytest
import torch
from torch import nn
from training_by_hand import WIDTH, das, make_mlp, make_rows

import intervenable as iv
from intervenable import (
    tensor_files,
    training,
    training_checkpoints,
    training_history,
    training_loop,
    training_state,
)
from intervenable.errors import StorageError
from intervenable.tensor_files import read_tensors, write_tensors
from intervenable.training_checkpoints import STATE
from intervenable.training_state import pack, unpack

OPTIONS = {"lr": 0.05, "epochs": 4, "batch_size": 4, "accumulate": 2}


class _StopError(Exception):
    pass


def stopping_at(step):
    def stop(done, total):
        if done == step:
            raise _StopError

    return stop


class Dropping(iv.LowRankRotatedSpaceIntervention):
    """A rotation whose training needs random numbers."""

    def forward(self, base, source=None, subspaces=None):
        return nn.functional.dropout(super().forward(base, source, subspaces), 0.3, self.training)


def state(model, mlp):
    return {**model.state_dict(), **{f"model.{name}": tensor for name, tensor in mlp.state_dict().items()}}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- going on ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (iv.LowRankRotatedSpaceIntervention, {}),
        (Dropping, {}),
        (iv.BoundlessRotatedSpaceIntervention, {"optimizer": "adamw", "schedule": "cosine"}),
        (iv.SigmoidMaskIntervention, {"optimizer": lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9)}),
        (iv.LowRankRotatedSpaceIntervention, {"evaluation": 0.25, "early_stopping": 1, "lr": 0.4}),
        (iv.LowRankRotatedSpaceIntervention, {"precision": "fp16"}),
        (iv.LowRankRotatedSpaceIntervention, {"include_model": True}),
        (
            iv.LowRankRotatedSpaceIntervention,
            {"schedule": lambda optimizer, steps: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)},
        ),
    ],
)
def test_an_interrupted_training_ends_with_the_same_weights_and_history(tmp_path, kind, options, fast):
    options, rows = {**OPTIONS, **options, "fast": fast}, make_rows()

    def made():
        mlp = make_mlp()
        if kind is Dropping:
            with torch.random.fork_rng():
                torch.manual_seed(2)
                swap = Dropping(WIDTH, 2)
            return iv.IntervenableModel(
                [iv.RepresentationConfig(1, "block_output", intervention=swap)], mlp
            ), mlp
        return das(mlp, kind=kind), mlp

    model, mlp = made()
    whole = training.train(model, rows, **options)
    expected = state(model, mlp)
    for step in (2, 5, 6, 11):
        model, mlp = made()
        try:
            training.train(
                model, rows, **options, checkpoint=tmp_path, checkpoint_every=1, progress=stopping_at(step)
            )
        except _StopError:
            assert not same(state(model, mlp), expected)
    model, mlp = made()
    resumed = training.train(model, rows, **options, checkpoint=tmp_path, checkpoint_every=1)
    assert resumed == whole
    assert same(state(model, mlp), expected)


def test_noise_of_a_seed_of_its_own_goes_on_too(tmp_path):
    def made():
        swap, noise = das(make_mlp()), iv.NoiseIntervention(0.5, seed=3)
        first = iv.RepresentationConfig(0, "block_output", intervention=noise)
        (rotation,) = swap.interventions.values()
        second = iv.RepresentationConfig(1, "block_output", intervention=rotation)
        return iv.IntervenableModel([first, second], swap.model)

    whole, first, second = made(), made(), made()
    expected = training.train(whole, make_rows(), **OPTIONS)
    with pytest.raises(_StopError):
        training.train(
            first, make_rows(), **OPTIONS, checkpoint=tmp_path, checkpoint_every=1, progress=stopping_at(5)
        )
    assert training.train(second, make_rows(), **OPTIONS, checkpoint=tmp_path) == expected
    assert same(second.state_dict(), whole.state_dict())


def test_the_state_is_kept_after_an_epoch_and_else_seldom(tmp_path, monkeypatch):
    for number, (often, seldom, step) in enumerate([(0.0, 1e9, 3), (1e9, 0.0, 4), (1e9, 1e9, None)]):
        monkeypatch.setattr(training_checkpoints, "OFTEN", often)
        monkeypatch.setattr(training_checkpoints, "SELDOM", seldom)
        folder = tmp_path / str(number)
        with pytest.raises(_StopError):
            training.train(
                das(make_mlp()), make_rows(), **OPTIONS, checkpoint=folder, progress=stopping_at(5)
            )
        file = folder / "training.safetensors"
        assert (read_tensors(file, STATE)[1]["step"] if file.exists() else None) == step


def test_a_finished_training_gives_its_result_and_weights_at_once(tmp_path):
    rows, first = make_rows(), das(make_mlp())
    done = training.train(first, rows, **OPTIONS, checkpoint=tmp_path)
    steps = []

    def loss(logits, labels):
        steps.append(len(labels))
        return training.cross_entropy(logits, labels)

    second = das(make_mlp(), seed=99)
    again = training.train(second, rows, **OPTIONS, checkpoint=tmp_path)
    assert again == done
    assert same(first.state_dict(), second.state_dict())
    with pytest.raises(StorageError, match="loss was"):
        training.train(second, rows, **OPTIONS, checkpoint=tmp_path, loss=loss)
    assert steps == []


def test_a_training_in_a_folder_is_the_one_without(tmp_path):
    rows, first, second = make_rows(), das(make_mlp()), das(make_mlp())
    assert training.train(first, rows, **OPTIONS) == training.train(
        second, rows, **OPTIONS, checkpoint=tmp_path
    )
    assert same(first.state_dict(), second.state_dict())
    assert sorted(os.listdir(tmp_path)) == ["training.lock", "training.safetensors"]


def test_progress_counts_what_was_done_before(tmp_path):
    rows, told = make_rows(), []
    with pytest.raises(_StopError):
        training.train(
            das(make_mlp()), rows, **OPTIONS, checkpoint=tmp_path, checkpoint_every=5, progress=stopping_at(7)
        )
    training.train(
        das(make_mlp()), rows, **OPTIONS, checkpoint=tmp_path, progress=lambda *numbers: told.append(numbers)
    )
    assert told == [(done, 12) for done in (5, 6, 7, 8, 9, 10, 11, 12)]


# --- refused ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    with pytest.raises(_StopError):
        training.train(
            das(make_mlp()),
            make_rows(),
            **OPTIONS,
            checkpoint=folder,
            checkpoint_every=1,
            progress=stopping_at(6),
        )
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.1}, "lr was 0.05 there and is 0.1 here."),
        ({"epochs": 5}, "epochs was 4 there and is 5 here."),
        ({"batch_size": 8}, "batch_size was 4 there and is 8 here."),
        ({"seed": 3}, "seed was 0 there and is 3 here."),
        ({"schedule": "cosine"}, 'schedule was "linear" there and is "cosine" here.'),
        (
            {"optimizer": "adamw"},
            'optimizer was "Adam" there and is "AdamW" here (and optimizer decoupled_weight_decay).',
        ),
        ({"weight_decay": 0.1}, 'optimizer weight_decay was "0.0" there and is "0.1" here.'),
        ({"clip_norm": 1.0}, "clip_norm was null there and is 1.0 here."),
        ({"metric": "probability"}, 'metric was "iia" there and is "probability" here.'),
        ({"fast": False}, "fast was true there and is false here."),
        ({"early_stopping": 2}, "early_stopping was null there"),
        ({"unit_locations": 0}, "dataset locations was"),
        ({"evaluation": 0.5}, "dataset was"),
    ],
)
def test_a_checkpoint_of_other_options_is_refused(folder, change, message):
    model = das(make_mlp())
    before = model.state_dict()
    with pytest.raises(StorageError) as caught:
        training.train(model, make_rows(), **{**OPTIONS, **change}, checkpoint=folder)
    text = str(caught.value)
    assert text.startswith(f"{folder} has the checkpoint of another training: {message.rstrip('.')}")
    assert text.endswith("Choose another folder, or delete that one to start anew.")
    assert same(model.state_dict(), before)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("weights", lambda: (das(make_mlp(seed=5)), make_rows())),
        ("shapes", lambda: (das(make_mlp(), rank=3), make_rows())),
        ("interventions", lambda: (das(make_mlp(), kind=iv.RotatedSpaceIntervention), make_rows())),
        ("dataset", lambda: (das(make_mlp()), make_rows(seed=8))),
        ("where", lambda: (das(make_mlp(), where="last"), make_rows())),
        ("constants", lambda: (das(make_mlp(), source_representation=torch.ones(WIDTH)), make_rows())),
    ],
)
def test_a_checkpoint_of_another_model_or_other_data_is_refused(folder, name, made):
    model, rows = made()
    with pytest.raises(StorageError, match=f"has the checkpoint of another training: {name} was"):
        training.train(model, rows, **OPTIONS, checkpoint=folder)


def test_a_folder_in_use_is_refused(tmp_path):
    def inside(done, total):
        training.train(das(make_mlp()), make_rows(), **OPTIONS, checkpoint=tmp_path)

    with pytest.raises(StorageError, match="is in use by this process"):
        training.train(das(make_mlp()), make_rows(), **OPTIONS, checkpoint=tmp_path, progress=inside)
    training.train(das(make_mlp()), make_rows(), **OPTIONS, checkpoint=tmp_path)  # it was let go


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        lambda data: b"\x80\x04cposix\nsystem\n",
        lambda data: (10**15).to_bytes(8, "little") + data[8:],
    ],
)
def test_a_damaged_checkpoint_is_refused_and_kept(folder, tmp_path, harm):
    data = (folder / "training.safetensors").read_bytes()
    (tmp_path / "training.safetensors").write_bytes(harm(data))
    with pytest.raises(StorageError, match="Delete this file: the training starts anew"):
        training.train(das(make_mlp()), make_rows(), **OPTIONS, checkpoint=tmp_path)
    assert (tmp_path / "training.safetensors").read_bytes() == harm(data)


@pytest.mark.parametrize("lost", ["step", "optimizer", "schedule"])
def test_a_checkpoint_that_lacks_something_is_refused(folder, tmp_path, lost):
    tensors, content = read_tensors(folder / "training.safetensors", STATE)
    del content[lost]
    write_tensors(tmp_path / "training.safetensors", STATE, tensors, content)
    with pytest.raises(StorageError, match=f"The checkpoint does not hold what this training needs .*{lost}"):
        training.train(das(make_mlp()), make_rows(), **OPTIONS, checkpoint=tmp_path)


def test_a_full_disk_is_told_and_the_last_state_is_kept(tmp_path, monkeypatch):
    with pytest.raises(_StopError):
        training.train(
            das(make_mlp()),
            make_rows(),
            **OPTIONS,
            checkpoint=tmp_path,
            checkpoint_every=1,
            progress=stopping_at(6),
        )
    before = (tmp_path / "training.safetensors").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="the disk is full"):
            training.train(das(make_mlp()), make_rows(), **OPTIONS, checkpoint=tmp_path, checkpoint_every=1)
    assert (tmp_path / "training.safetensors").read_bytes() == before
    model, whole = das(make_mlp()), das(make_mlp())
    assert training.train(model, make_rows(), **OPTIONS, checkpoint=tmp_path) == training.train(
        whole, make_rows(), **OPTIONS
    )
    assert same(model.state_dict(), whole.state_dict())


def test_an_optimizer_whose_state_is_no_tensors_is_refused_before_anything_is_kept(tmp_path):
    class Odd(torch.optim.SGD):
        def state_dict(self):
            return {**super().state_dict(), "odd": object()}

    with pytest.raises(StorageError, match="The state of the optimizer holds a object"):
        training.train(das(make_mlp()), make_rows(), **OPTIONS, optimizer=Odd, checkpoint=tmp_path)
    assert os.listdir(tmp_path) == ["training.lock"]


# --- state as tensors and JSON ----------------------------------------------------------------------------


def test_state_is_the_same_after_packing():
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3), "none": None}, 1: {}},
        "groups": [
            {
                "lr": 0.1,
                "betas": (0.9, 0.999),
                "params": [0, 1],
                "best": float("inf"),
                "name": "a",
                "on": True,
            }
        ],
    }
    tensors = {}
    packed = pack(tree, "optimizer", tensors)
    found = unpack(json.loads(json.dumps(packed)), tensors)
    assert found["groups"] == tree["groups"]
    assert isinstance(found["groups"][0]["betas"], tuple)
    assert found["state"].keys() == tree["state"].keys()
    assert torch.equal(found["state"][0]["exp_avg"], tree["state"][0]["exp_avg"])
    assert found["state"][0]["none"] is None


@pytest.mark.parametrize(
    "module", [training_checkpoints, training_state, training_loop, training_history, tensor_files]
)
def test_nothing_that_reads_a_checkpoint_knows_how_to_execute_it(module):
    assert not re.search(r"torch\.load|pickle|\beval\(|\bexec\(|import_module", inspect.getsource(module))
