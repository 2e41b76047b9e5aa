"""Checkpoints: what is finished is kept bit by bit, what is broken or of another sweep is refused by name."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import intervenable as iv
from intervenable.sweep_checkpoints import Checkpoints

SWEEP = {"component": "block_input", "inputs": "5f3a", "layers": [0, 1, 2], "value": None, "memory": 1.5}


def wave(number):
    """What wave `number` gave."""
    random = torch.Generator().manual_seed(number)
    return {
        "difference": torch.randn(number + 1, generator=random),
        "by example": torch.randn(number + 1, 2, 3, generator=random, dtype=torch.float64),
    }


def same(one, other):
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def with_waves(folder, *numbers, waves=10):
    with Checkpoints(folder, SWEEP, waves) as kept:
        for number in numbers:
            kept.write(number, wave(number))
    return folder


# --- what is kept -----------------------------------------------------------------------------------------


def test_finished_waves_are_there_again_and_others_are_not(tmp_path):
    folder = with_waves(tmp_path / "new" / "folder", 3, 0, 7)
    with Checkpoints(str(folder), SWEEP, 10) as kept:
        assert kept.finished == (0, 3, 7)
        assert all(same(kept.read(number).results, wave(number)) for number in (0, 3, 7))
        assert kept.read(1) is None
        kept.write(1, wave(1))
        assert kept.finished == (0, 1, 3, 7)
        assert same(kept.read(1).results, wave(1))


def test_bits_dtypes_shapes_and_names_are_kept(tmp_path):
    results = {
        "déjà/vu": torch.tensor([math.nan, -0.0, math.inf]),
        "__metadata__": torch.tensor(2.5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3, dtype=torch.float64),
        "view": torch.arange(12.0).view(3, 4).T,
    }
    with Checkpoints(tmp_path, SWEEP, 1) as kept:
        kept.write(0, results)
        read = kept.read(0).results
    assert list(read) == list(results)
    for name, values in results.items():
        assert (read[name].dtype, read[name].shape) == (values.dtype, values.shape)
        assert (read[name].view(torch.uint8) if values.dim() else read[name]).tolist() == (
            values.contiguous().view(torch.uint8) if values.dim() else values
        ).tolist()


def test_the_ways_in_which_cells_were_computed_are_kept(tmp_path):
    with Checkpoints(tmp_path, SWEEP, 2) as kept:
        kept.write(0, wave(0), {"from its layer on": 3, "each in a pass of its own": 1})
        kept.write(1, wave(1))
        assert kept.read(0).ways == {"from its layer on": 3, "each in a pass of its own": 1}
        assert kept.read(1).ways == {}


def test_a_wave_may_be_written_again(tmp_path):
    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        kept.write(0, wave(0))
        kept.write(0, wave(5))
        assert same(kept.read(0).results, wave(5))
        assert kept.finished == (0,)


@settings(max_examples=15, deadline=None)
@given(done=st.lists(st.integers(0, 12), unique=True), stops=st.lists(st.integers(0, 12)))
def test_any_order_of_waves_and_stops_ends_with_the_same_waves(tmp_path_factory, done, stops):
    folder = tmp_path_factory.mktemp("sweep")
    for count, number in enumerate(done):
        if count in stops or count == 0:
            kept = Checkpoints(folder, SWEEP, 13)
        kept.write(number, wave(number))
        if count + 1 in stops or count + 1 == len(done):
            kept.close()
    with Checkpoints(folder, SWEEP, 13) as kept:
        assert kept.finished == tuple(sorted(done))
        assert all(same(kept.read(number).results, wave(number)) for number in done)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    mine = {".unfinished.txt": "a", "notes.md": "b", "wave-1.txt": "c", "sweep.safetensors": "d"}
    for name, text in mine.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with_waves(tmp_path, 0)
    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        assert kept.finished == (0,)
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in mine} == mine


def test_the_same_sweep_said_in_tuples_and_in_another_order_is_the_same(tmp_path):
    with_waves(tmp_path, 0)
    again = {**dict(reversed(SWEEP.items())), "layers": (0, 1, 2)}
    with Checkpoints(tmp_path, again, 10) as kept:
        assert same(kept.read(0).results, wave(0))


# --- other sweeps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "waves", "message"),
    [
        ({"inputs": "77"}, 10, 'inputs was "5f3a" there and is "77" here'),
        ({"layers": [0, 1]}, 10, "layers was [0, 1, 2] there and is [0, 1] here"),
        ({"value": 0}, 10, "value was null there and is 0 here"),
        ({"seed": 1}, 10, "seed was nothing there and is 1 here"),
        ({}, 9, "waves was 10 there and is 9 here"),
        ({"memory": 2.0, "value": "x" * 200}, 10, f'value was null there and is "{"x" * 96}... here'),
    ],
)
def test_a_folder_of_another_sweep_is_refused_with_what_differs(tmp_path, changes, waves, message):
    with_waves(tmp_path, 0)
    with pytest.raises(iv.StorageError) as error:
        Checkpoints(tmp_path, {**SWEEP, **changes}, waves)
    assert str(error.value) == (
        f"{tmp_path} has the checkpoints of another sweep: {message}. Choose another folder, or delete that one to"
        " start anew."
    )
    with Checkpoints(tmp_path, SWEEP, 10) as kept:  # and it is not locked
        assert kept.finished == (0,)


def test_what_the_folder_knows_and_this_sweep_does_not_is_named_too(tmp_path):
    with_waves(tmp_path)
    fewer = {name: value for name, value in SWEEP.items() if name != "layers"}
    with pytest.raises(iv.StorageError, match=r"layers was \[0, 1, 2\] there and is nothing here"):
        Checkpoints(tmp_path, fewer, 10)


def test_a_sweep_that_json_has_no_form_for_is_refused_before_a_folder_is_made(tmp_path):
    for bad in (object(), math.nan):
        with pytest.raises(iv.StorageError, match="This sweep cannot be described as JSON"):
            Checkpoints(tmp_path / "folder", {"bad": bad}, 1)
    assert not (tmp_path / "folder").exists()


def test_a_wave_copied_from_another_sweep_or_another_place_is_refused(tmp_path):
    with Checkpoints(tmp_path / "other", {**SWEEP, "inputs": "77"}, 10) as kept:
        kept.write(2, wave(2))
    folder = with_waves(tmp_path / "this", 0)
    shutil.copy(tmp_path / "other" / "wave-000002.safetensors", folder)
    shutil.copy(folder / "wave-000000.safetensors", folder / "wave-000001.safetensors")
    with Checkpoints(folder, SWEEP, 10) as kept:
        for number in (1, 2):
            file = folder / f"wave-{number:06d}.safetensors"
            with pytest.raises(iv.StorageError) as error:
                kept.read(number)
            assert str(error.value) == (
                f"{file} is of another sweep, or of another part of this one. Delete this file: the sweep computes"
                " that part again, and takes the others from the folder."
            )
        assert same(kept.read(0).results, wave(0))


# --- damage -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: whole[:-1], lambda whole: whole[:-3] + b"abc"]
)
def test_a_damaged_wave_is_named_and_deleting_it_is_enough(tmp_path, damage):
    with_waves(tmp_path, 0, 1)
    file = tmp_path / "wave-000001.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        with pytest.raises(iv.StorageError) as error:
            kept.read(1)
        assert str(file) in str(error.value)
        assert str(error.value).endswith(
            "Delete this file: the sweep computes that part again, and takes the others from the folder."
        )
        assert same(kept.read(0).results, wave(0))
        file.unlink()
        assert kept.read(1) is None
    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        assert kept.finished == (0,)


def test_no_bit_of_a_wave_can_flip_unseen(tmp_path):
    with_waves(tmp_path, 1)
    file = tmp_path / "wave-000001.safetensors"
    whole = file.read_bytes()
    refused = 0
    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        for place in range(len(whole)):
            content = bytearray(whole)
            content[place] ^= 1 << (place % 8)
            file.write_bytes(content)
            try:
                read = kept.read(1).results
            except iv.StorageError:
                refused += 1
            else:
                assert same(read, wave(1))  # a space at the end of the header
    assert refused > len(whole) - 10


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "intervenable.sweep"}', "\udcff"])
def test_a_damaged_description_is_named_and_deleting_it_keeps_what_is_finished(tmp_path, text):
    with_waves(tmp_path, 0)
    file = tmp_path / "sweep.json"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(iv.StorageError) as error:
        Checkpoints(tmp_path, SWEEP, 10)
    assert str(error.value).startswith(f"{file} is damaged, or no description of a sweep (")
    assert str(error.value).endswith(
        "Delete this file if the folder is of this sweep: what is finished is kept."
    )
    file.unlink()
    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        assert same(kept.read(0).results, wave(0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, r"is no description of a sweep \(its format is 'other'\)"),
        ({"version": 2}, "has version 2 of the format, and this library reads versions up to 1"),
    ],
)
def test_a_description_of_another_kind_or_a_later_version_is_refused(tmp_path, changes, message):
    with_waves(tmp_path, 0)
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    with pytest.raises(iv.StorageError, match=message):
        Checkpoints(tmp_path, SWEEP, 10)


def test_what_a_killed_writer_left_is_ignored_and_cleaned(tmp_path):
    with_waves(tmp_path, 0)
    left = tmp_path / ".unfinished-abc"
    left.mkdir()
    (left / "wave-000001.safetensors").write_bytes(b"half")
    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        assert kept.finished == (0,)
    assert not left.exists()


# --- writes that fail -------------------------------------------------------------------------------------


def test_a_full_disk_is_an_error_and_all_that_is_finished_is_kept(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        kept.write(0, wave(0))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                iv.StorageError, match=r"wave-000001.safetensors .*: the disk is full \(No space"
            ):
                kept.write(1, wave(1))
        assert kept.finished == (0,)
        assert kept.read(1) is None
        assert same(kept.read(0).results, wave(0))
        assert sorted(os.listdir(tmp_path)) == ["sweep.json", "sweep.lock", "wave-000000.safetensors"]
        kept.write(1, wave(1))
    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        assert same(kept.read(1).results, wave(1))


def test_a_write_that_the_system_cuts_off_leaves_the_waves_before_it(tmp_path):
    resource = pytest.importorskip("resource")
    with Checkpoints(tmp_path, SWEEP, 10) as kept:
        kept.write(0, wave(0))
        limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
            with pytest.raises(iv.StorageError, match=r"could not be written: File too large"):
                kept.write(1, {"large": torch.zeros(100_000)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, handler)
        assert kept.finished == (0,)
        assert same(kept.read(0).results, wave(0))
        assert sorted(os.listdir(tmp_path)) == ["sweep.json", "sweep.lock", "wave-000000.safetensors"]


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("", encoding="utf-8")
    for folder in (file, file / "folder"):
        with pytest.raises(iv.StorageError, match=r"cannot be used as a folder: .* Choose another one\."):
            Checkpoints(folder, SWEEP, 1)


# --- two at once ------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_until_it_is_closed(tmp_path):
    with Checkpoints(tmp_path, SWEEP, 1):
        for _ in range(2):
            with pytest.raises(iv.StorageError) as error:
                Checkpoints(tmp_path, SWEEP, 1)
            assert str(error.value) == (
                f"{tmp_path} is in use by this process. Wait until that is done, or choose another folder."
            )
    Checkpoints(tmp_path, SWEEP, 1).close()


def test_a_folder_that_nobody_holds_any_more_is_free(tmp_path):
    kept = Checkpoints(tmp_path, SWEEP, 1)
    del kept
    Checkpoints(tmp_path, SWEEP, 1).close()


HOLD = """
import fcntl, os, sys
file = open(sys.argv[1], "r+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(str(os.getpid()))
file.flush()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_folder_that_another_process_uses_is_refused_and_free_once_that_is_killed(tmp_path):
    pytest.importorskip("fcntl")
    Checkpoints(tmp_path, SWEEP, 1).close()
    (tmp_path / "sweep.lock").write_text("", encoding="utf-8")
    command = [sys.executable, "-S", "-c", HOLD, str(tmp_path / "sweep.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(
            iv.StorageError, match=f"is in use by process {holder.pid}. Wait until that is done"
        ):
            Checkpoints(tmp_path, SWEEP, 1)
        holder.kill()
        holder.wait()
        Checkpoints(tmp_path, SWEEP, 1).close()
