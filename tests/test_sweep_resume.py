"""A sweep that goes on from a folder: nothing is measured twice, and nothing is taken from another sweep."""

from __future__ import annotations

import errno
import os

import pytest
import torch

import intervenable as iv
from tiny_models import tiny

CLEAN, CORRUPTED = torch.arange(1, 8)[None], torch.arange(2, 9)[None]
PATCHED = {"component": "block_input", "axes": ("layer", "pos")}


def difference(logits):
    return logits[0, -1, 5] - logits[0, -1, 7]


MODEL = tiny("llama")


def swept(folder, model=MODEL, clean=CLEAN, metric=difference, **options):
    given = {**PATCHED, **options}
    return iv.patching.sweep(model, clean, CORRUPTED, metric=metric, checkpoint=folder, **given)


def test_the_same_call_measures_nothing_again_and_ends_with_the_same_bytes(tmp_path):
    calls = []

    def counted(logits):
        calls.append(logits.shape)
        return difference(logits)

    whole = swept(tmp_path / "folder", metric={"difference": counted})
    first = len(calls)
    again = swept(tmp_path / "folder", metric={"difference": counted})
    assert len(calls) - first <= first - whole.values.numel()
    plain = swept(None, metric={"difference": difference})
    files = [result.save(tmp_path / str(number)) for number, result in enumerate((whole, again, plain))]
    assert len({file.read_bytes() for file in files}) == 1


def test_only_the_part_that_is_missing_is_computed(tmp_path):
    whole = swept(tmp_path, memory=40_000)
    waves = sorted(tmp_path.glob("wave-*"))
    assert len(waves) > 2
    kept = {wave: wave.stat().st_mtime_ns for wave in waves}
    waves[1].unlink()
    assert torch.equal(swept(tmp_path, memory=40_000).values, whole.values)
    changed = [wave for wave in waves if wave.stat().st_mtime_ns != kept[wave]]
    assert changed == [waves[1]]


REFERENCES = {"input_ids": torch.arange(1, 15).view(2, 7)}, {"input_ids": torch.arange(2, 16).view(2, 7)}
SAME, TURNED = [(i, i) for i in range(7)], [(i, 6 - i) for i in range(7)]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ({"value": torch.ones(16)}, {"value": torch.zeros(16)}),
        ({"value": 1.0}, {"value": 2.0}),
        ({"value": "zero"}, {"value": "source", "direction": "noise"}),
        ({"value": "mean", "reference": REFERENCES[0]}, {"value": "mean", "reference": REFERENCES[1]}),
        (
            {"value": "resample", "reference": REFERENCES[0], "seed": 0},
            {"value": "resample", "reference": REFERENCES[1], "seed": 0},
        ),
        ({"align": SAME}, {"align": TURNED}),
        ({"positions": [1, 2, 3]}, {"positions": [2, 3, 4]}),
        ({"layers": [0, 1]}, {"layers": [1, 2]}),
        ({}, {"window": {"layer": 3}}),
        ({}, {"component": "mlp_output"}),
        ({}, {"metric": lambda logits: logits[0, -1, 5]}),
        ({}, {"clean": torch.arange(3, 10)[None]}),
        ({}, {"model": tiny("llama", seed=1)}),
        ({}, {"memory": 100_000}),
    ],
)
def test_what_another_sweep_has_finished_is_refused(tmp_path, first, then):
    swept(tmp_path, **first)
    with pytest.raises(iv.StorageError, match="has the checkpoints of another sweep: "):
        swept(tmp_path, **then)
    again = swept(tmp_path, **first)
    assert torch.equal(again.values, swept(None, **first).values)


def test_a_damaged_part_is_named_and_the_sweep_goes_on_once_it_is_deleted(tmp_path):
    whole = swept(tmp_path, memory=40_000)
    damaged = sorted(tmp_path.glob("wave-*"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(iv.StorageError, match=f"{damaged.name} cannot be read as a finished part of a sweep"):
        swept(tmp_path, memory=40_000)
    damaged.unlink()
    assert torch.equal(swept(tmp_path, memory=40_000).values, whole.values)


def test_a_disk_that_gets_full_keeps_what_is_finished_and_the_sweep_goes_on_once_there_is_room(
    tmp_path, monkeypatch
):
    flush, flushed = os.fsync, []

    def full_in_the_end(descriptor):
        flushed.append(descriptor)
        if len(flushed) > 4:  # two flushes each, for a file and for its name
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_in_the_end)
        with pytest.raises(iv.StorageError, match="could not be written: the disk is full"):
            swept(tmp_path, memory=40_000)
    finished = {wave: wave.read_bytes() for wave in tmp_path.glob("wave-*")}
    assert len(finished) == 1
    assert torch.equal(swept(tmp_path, memory=40_000).values, swept(None, memory=40_000).values)
    assert all(wave.read_bytes() == content for wave, content in finished.items())


def test_a_metric_that_fails_keeps_what_is_finished_and_leaves_the_folder_free(tmp_path):
    calls = []

    def fails_in_the_end(logits):
        calls.append(logits)
        if len(calls) > 25:
            raise RuntimeError("no more")
        return difference(logits)

    with pytest.raises(Exception, match="no more") as error:
        swept(tmp_path, metric={"difference": fails_in_the_end}, memory=40_000)
    assert error.value is not None  # kept, and with it all that was at work
    finished = {wave: wave.stat().st_mtime_ns for wave in tmp_path.glob("wave-*")}
    assert finished
    again = swept(tmp_path, metric={"difference": difference}, memory=40_000)
    assert torch.equal(again.values, swept(None, memory=40_000).values)
    assert {wave: wave.stat().st_mtime_ns for wave in finished} == finished
