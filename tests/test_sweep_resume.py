"""A sweep that goes on from a folder: nothing is measured twice, and nothing is taken from another sweep."""

from __future__ import annotations

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
