"""Results of sweeps as files: every bit after a round trip, refused if broken, as they were after failed writes."""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import intervenable as iv
from intervenable.sweep_result import SweepResult

ROOT = Path(__file__).parent.parent
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def some_result(dtype=torch.float32, **changes):
    """Words for tokens, a window, heads that one component does not have, numbers that are none."""
    random = torch.Generator().manual_seed(0)
    values = torch.randn(3, 2, 4, generator=random).to(dtype)
    values[0, 0, 0], values[0, 1, 0], values[2, 1, 3] = math.nan, math.inf, -0.0
    several = torch.randn(3, 2, 4, 5, generator=random)
    given = {
        "axes": ("pos", "layer", "head"),
        "labels": {"pos": ("née", " 東京", "\n"), "layer": ("0", "1-3"), "head": ("0", "1", "2", "3")},
        "entries": {"pos": ("subject", (1, 2), -1), "layer": (0, (1, 2, 3)), "head": (0, 1, 2, 3)},
        "results": {
            ("head_query_output", "loss"): values,
            ("head_key_output", "loss"): values[..., :2],
            ("head_query_output", "by example"): several,
            ("head_key_output", "by example"): several[:, :, 2:],
        },
        "clean": {"loss": torch.tensor(0.1, dtype=dtype), "by example": several[0, 0, 0]},
        "corrupted": {},
        "shortcuts": ("All was computed the long way.",),
        "settings": {"direction": "noise", "window": {"layer": 3}, "list": [1, None, 2.5], "model": "Llama"},
    }
    return SweepResult(**{**given, **changes})


def bits(values):
    return values.dtype, values.shape, values.reshape(-1).contiguous().view(torch.uint8).tolist()


def same(one, other):
    """Whether two results are the same in all that can be seen, NaN and the sign of 0 included."""
    for name in ("axes", "labels", "entries", "shortcuts", "settings"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("results", "clean", "corrupted"):
        tables = getattr(one, name), getattr(other, name)
        assert list(tables[0]) == list(tables[1]), name
        assert list(map(bits, tables[0].values())) == list(map(bits, tables[1].values())), name
    return True


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_round_trip_keeps_every_bit_and_every_name(tmp_path, dtype):
    file = some_result(dtype).save(tmp_path / "one.safetensors")
    assert file == tmp_path / "one.safetensors"
    assert same(some_result(dtype), SweepResult.load(file))


def test_a_result_without_axes_or_entries_is_a_result(tmp_path):
    bare = {"axes": (), "labels": {}, "entries": {}, "clean": {}, "shortcuts": (), "settings": {}}
    for results in ({("c", "m"): torch.tensor(2.0)}, {("c", "m"): torch.zeros(0)}):
        result = some_result(**bare, results=results)
        assert same(result, SweepResult.load(result.save(tmp_path)))


def test_a_folder_will_do(tmp_path):
    file = some_result().save(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "sweep.safetensors"
    assert same(some_result(), SweepResult.load(str(tmp_path / "new" / "folder")))
    assert os.listdir(file.parent) == ["sweep.safetensors"]


def test_the_same_result_gives_the_same_bytes(tmp_path):
    contents = {some_result().save(tmp_path / f"{number}.safetensors").read_bytes() for number in range(20)}
    assert len(contents) == 1
    assert SweepResult.load(tmp_path / "0.safetensors").save(tmp_path).read_bytes() in contents


def test_others_can_read_the_tensors(tmp_path):
    file = some_result().save(tmp_path)
    with safe_open(file, framework="pt") as opened:
        kept = opened.get_tensor("results.0000")
    assert bits(kept) == bits(some_result().results["head_query_output", "loss"])


def test_what_json_has_no_form_for_is_refused_and_nothing_is_written(tmp_path):
    for bad in (object(), math.nan, torch.zeros(1)):
        with pytest.raises(
            iv.StorageError, match="the result of a sweep holds something that cannot be written"
        ):
            some_result(settings={"bad": bad}).save(tmp_path / "folder")
    with pytest.raises(iv.StorageError, match=r"cannot hold a tensor of torch.complex128"):
        some_result(corrupted={"loss": torch.tensor(1j, dtype=torch.complex128)}).save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists() or os.listdir(tmp_path / "folder") == []


# --- broken and foreign files -----------------------------------------------------------------------------


def test_no_file_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*sweep.safetensors"):
        SweepResult.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 8, 100, 0.5, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path, keep):
    file = some_result().save(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(
        iv.StorageError, match=r"cannot be read as the result of a sweep: .* Run the sweep again\."
    ):
        SweepResult.load(tmp_path)


def test_no_bit_of_a_file_can_flip_unseen(tmp_path):
    file = some_result().save(tmp_path)
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole), 7):
        content = bytearray(whole)
        content[place] ^= 1 << (place % 8)
        file.write_bytes(content)
        try:
            read = SweepResult.load(tmp_path)
        except iv.StorageError:
            refused += 1
        else:
            assert same(some_result(), read)  # a space, or the case of a letter in "\\u6771"
    assert refused > len(whole) / 7 - 10


def write_pickle(file):
    file.write_bytes(pickle.dumps({"a": 1}))


def write_zip(file):
    torch.save({"a": torch.zeros(1)}, file)


def write_text(file):
    file.write_text("not a tensor", encoding="utf-8")


@pytest.mark.parametrize("write", [write_pickle, write_zip, write_text])
def test_files_of_another_kind_are_refused(tmp_path, write):
    write(tmp_path / "sweep.safetensors")
    with pytest.raises(iv.StorageError, match="cannot be read as the result of a sweep"):
        SweepResult.load(tmp_path)


def test_safetensors_of_others_are_refused_with_what_they_are(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    iv.ActivationCache({"logits": torch.zeros(1, 2, 3)}).save(tmp_path / "cache.safetensors")
    for name, kind in (("model", "pt"), ("cache", "intervenable.ActivationCache")):
        with pytest.raises(iv.StorageError, match=rf"not one that SweepResult.save .* format is '{kind}'\)"):
            SweepResult.load(tmp_path / f"{name}.safetensors")


def test_a_later_version_of_the_format_is_refused(tmp_path):
    header = json.dumps({"format": "intervenable.SweepResult", "version": 99})
    save_file({}, tmp_path / "new.safetensors", {"header": header})
    with pytest.raises(iv.StorageError, match=r"has version 99 of the format, .* reads versions up to 1"):
        SweepResult.load(tmp_path / "new.safetensors")


# --- writes that fail -------------------------------------------------------------------------------------

WRITE = """
import resource, signal, sys, torch
from intervenable.sweep_result import SweepResult
{before}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
SweepResult((), {{}}, {{}}, {{("c", "m"): torch.zeros(1000, 1000)}}).save(sys.argv[1])
"""


def write_in_a_process_that_may_write_little(folder, before):
    return subprocess.run(
        [sys.executable, "-c", WRITE.format(before=before), str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_a_process_killed_in_the_middle_of_a_write_leaves_the_old_file_as_it_was(tmp_path):
    pytest.importorskip("resource")
    some_result().save(tmp_path)
    done = write_in_a_process_that_may_write_little(tmp_path, "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)")
    assert done.returncode < 0  # killed by a signal
    assert len(os.listdir(tmp_path)) > 1  # in the middle indeed
    assert same(some_result(), SweepResult.load(tmp_path))


def test_a_write_that_the_system_refuses_leaves_the_old_file_and_no_other(tmp_path):
    pytest.importorskip("resource")
    some_result().save(tmp_path)
    done = write_in_a_process_that_may_write_little(tmp_path, "")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith(
        "could not be written: File too large. What was there before is as it was."
    )
    assert "StorageError" in done.stderr
    assert os.listdir(tmp_path) == ["sweep.safetensors"]
    assert same(some_result(), SweepResult.load(tmp_path))


def test_who_reads_the_old_file_while_another_takes_its_place_goes_on_reading_it(tmp_path):
    file = some_result().save(tmp_path)
    before = file.read_bytes()
    with file.open("rb") as reader:
        beginning = reader.read(100)
        some_result(shortcuts=()).save(tmp_path)
        assert beginning + reader.read() == before
    assert file.read_bytes() != before


def test_a_full_disk_is_called_so_and_leaves_the_old_file(tmp_path, monkeypatch):
    file = some_result().save(tmp_path)

    def full(
        _descriptor,
    ):  # where file systems say so that take what is written first and look for room later
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(iv.StorageError) as error:
        some_result(shortcuts=()).save(tmp_path)
    assert str(error.value) == (
        f"{file} could not be written: the disk is full (No space left on device). Make room, or choose another"
        " place. What was there before is as it was."
    )
    assert os.listdir(tmp_path) == ["sweep.safetensors"]
    assert same(some_result(), SweepResult.load(tmp_path))


def test_a_place_that_cannot_be_written_to_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(iv.StorageError, match=r"could not be written: (Not a directory|File exists)"):
        some_result().save(tmp_path / "file" / "folder")


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("", encoding="utf-8")
    assert some_result().save(tmp_path).stat().st_mode == (tmp_path / "plain").stat().st_mode
