"""Caches as files: a round trip keeps everything, a broken file is refused, a killed write leaves the old file."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import intervenable as iv
from intervenable.cache_layout import Layout
from tiny_models import tiny, tiny_inputs

ROOT = Path(__file__).parent.parent


def collected(**options):
    model = tiny("llama", dtype=options.pop("model_dtype", torch.float32))
    inputs = tiny_inputs(model, padding="left")
    names = ["block_output", "attention_pattern", "head_value_output", "logits", "input_ids"]
    where = {"positions": {"first": 0, "rest": [[1, 2], [3]]}, "queries": -1, "heads": {0: [1]}}
    return iv.collect(model, inputs, names, [0, 2], **where, **options)


def same(one, other):
    """Whether two caches are the same in all that can be seen."""
    assert list(one) == list(other)
    assert one.info == other.info
    for key, layout in one.layouts.items():
        value, twin = one[key], other[key]
        values = value if isinstance(value, tuple) else (value,)
        twins = twin if isinstance(twin, tuple) else (twin,)
        assert [v.dtype for v in values] == [t.dtype for t in twins]
        assert all(map(torch.equal, values, twins))
        assert (layout.axes, layout.heads) == (other.layouts[key].axes, other.layouts[key].heads)
        assert layout.tokens.keys() == other.layouts[key].tokens.keys()
        for name, tokens in layout.tokens.items():
            twin_tokens = other.layouts[key].tokens[name]
            assert tokens.labels == twin_tokens.labels
            assert all(map(torch.equal, tokens.tensors(), twin_tokens.tensors()))
    return True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_keeps_values_axes_tokens_heads_and_info(tmp_path, dtype):
    cache = collected(model_dtype=dtype) + iv.ActivationCache({}, info={"note": "déjà vu", "list": [1, None]})
    file = cache.save(tmp_path / "one.safetensors")
    assert file == tmp_path / "one.safetensors"
    assert same(cache, iv.ActivationCache.load(file))


def test_a_folder_will_do(tmp_path):
    file = collected().save(tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / "activations.safetensors"
    assert same(collected(), iv.ActivationCache.load(tmp_path / "new" / "folder"))
    assert os.listdir(file.parent) == ["activations.safetensors"]


def test_odd_shapes_and_lists_go_to_disk_too(tmp_path):
    ragged = iv.ActivationCache({("block_output", 0): torch.rand(2, 3, 4)}).cat(
        iv.ActivationCache({("block_output", 0): torch.rand(1, 5, 4)}), ragged="list"
    )
    shared = torch.rand(4, 6)
    cache = ragged + iv.ActivationCache(
        {
            "scalar": torch.tensor(3.5),
            "empty": torch.zeros(0, 3),
            "transposed": shared.T,
            "expanded": torch.rand(1, 3).expand(2, 3),
            "same": shared,
            "mask": torch.tensor([True, False]),
        },
        {"scalar": Layout(())},
    )
    cache.save(tmp_path)
    assert same(cache, iv.ActivationCache.load(tmp_path))


def test_an_empty_cache_is_a_cache(tmp_path):
    iv.ActivationCache({}, info={"a": 1}).save(tmp_path)
    assert iv.ActivationCache.load(tmp_path).info == {"a": 1}


def test_a_file_can_be_loaded_to_another_device(tmp_path):
    collected().save(tmp_path)
    assert iv.ActivationCache.load(tmp_path, device="meta")["logits"].device.type == "meta"


def test_what_json_has_no_form_for_is_refused_and_nothing_is_written(tmp_path):
    for bad in (object(), float("nan")):
        with pytest.raises(iv.StorageError, match="info holds something that cannot be written as JSON"):
            iv.ActivationCache({}, info={"bad": bad}).save(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# --- broken and foreign files -----------------------------------------------------------------------------


def test_no_file_is_a_file_not_found(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no file .*activations.safetensors"):
        iv.ActivationCache.load(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 0.5, -1])
def test_a_file_that_was_cut_off_is_refused(tmp_path, keep):
    file = collected().save(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(iv.StorageError, match="cannot be read as an activation cache: it is damaged"):
        iv.ActivationCache.load(tmp_path)


def test_a_flipped_bit_in_a_tensor_is_found(tmp_path):
    file = collected().save(tmp_path)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(iv.StorageError, match=r"is damaged: what it holds is not what was written. Collect"):
        iv.ActivationCache.load(tmp_path)


def write_pickle(file):
    file.write_bytes(pickle.dumps({"a": 1}))


def write_zip(file):
    torch.save({"a": torch.zeros(1)}, file)
    assert zipfile.is_zipfile(file)


def write_text(file):
    file.write_text("not a tensor", encoding="utf-8")


@pytest.mark.parametrize("write", [write_pickle, write_zip, write_text])
def test_files_of_another_kind_are_refused(tmp_path, write):
    write(tmp_path / "activations.safetensors")
    with pytest.raises(iv.StorageError, match="cannot be read as an activation cache"):
        iv.ActivationCache.load(tmp_path)


def test_safetensors_of_others_are_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(iv.StorageError, match=r"not one that .* has written \(its format is 'pt'\)"):
        iv.ActivationCache.load(tmp_path / "model.safetensors")


def test_a_later_version_of_the_format_is_refused(tmp_path):
    header = json.dumps({"activations": [], "info": {}, "checksums": {}})
    metadata = {"format": "intervenable.ActivationCache", "version": "99", "header": header}
    save_file({}, tmp_path / "new.safetensors", metadata)
    with pytest.raises(iv.StorageError, match=r"has version 99 of the format, .* reads versions up to 1"):
        iv.ActivationCache.load(tmp_path / "new.safetensors")


# --- interrupted writes -----------------------------------------------------------------------------------

WRITE = """
import resource, signal, sys, torch
import intervenable as iv
{before}
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
iv.ActivationCache({{"logits": torch.zeros(1, 1000, 1000)}}).save(sys.argv[1])
"""


def write_in_a_process_that_may_write_a_megabyte(folder, before):
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
    old = collected()
    old.save(tmp_path)
    done = write_in_a_process_that_may_write_a_megabyte(
        tmp_path, "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)"
    )
    assert done.returncode < 0  # killed by a signal
    assert len(os.listdir(tmp_path)) > 1  # it was killed in the middle indeed
    assert same(old, iv.ActivationCache.load(tmp_path))


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    pytest.importorskip("resource")
    old = collected()
    old.save(tmp_path)
    done = write_in_a_process_that_may_write_a_megabyte(tmp_path, "")
    assert done.returncode == 1
    assert "Error" in done.stderr
    assert os.listdir(tmp_path) == ["activations.safetensors"]
    assert same(old, iv.ActivationCache.load(tmp_path))


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("", encoding="utf-8")
    file = collected().save(tmp_path)
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
