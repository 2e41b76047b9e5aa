"""The benchmark of maps: that it runs, and reports what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import maps, maps_of_types


def test_a_quick_run_measures_every_step_and_writes_it_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps.main(["--quick", "--models", "GPT-2 XL", "--markdown", "--json", str(tmp_path / "times.json")])

    (times,) = json.loads((tmp_path / "times.json").read_text())
    assert times["components"] > 25
    assert all(times[step] > 0 for step in maps.STEPS)
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith(
        "| model | components | load | twin | infer | prove | towers | fit | new map | kept map |"
    )
    assert [line.split(" | ")[0] for line in table[2:]] == ["| GPT-2 XL", "| all"]


def test_the_time_for_a_new_map_is_that_of_all_its_steps() -> None:
    steps = {"load": 9.0, "twin": 1.0, "infer": 2.0, "prove": 2.5, "towers": 0.5, "fit": 4.0, "kept": 0.5}
    times = maps.Times("a", components=1, **steps)

    assert times.new == 10.0
    assert maps.as_table([times, times], markdown=False).splitlines()[-1].split()[-1] == "20x"


def test_what_is_neither_a_model_nor_a_folder_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        maps.main(["--models", "GPT-9"])

    assert "GPT-9: neither a folder nor one of GPT-2 XL" in capsys.readouterr().err


def test_types_that_have_no_map_are_told_apart_from_those_that_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps_of_types.main(["--types", "gpt2", "reformer", "bert", "--json", str(tmp_path / "times.json")])

    gpt2, reformer, bert = json.loads((tmp_path / "times.json").read_text())
    assert min(gpt2["components"], bert["components"]) > 25
    assert min(gpt2["seconds"], bert["seconds"]) > 0
    assert reformer["why"].startswith("its default config builds no model")
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("2 maps of 3 types")
    assert {line.split()[-1] for line in out[2:]} == {"gpt2", "bert"}


def test_a_type_that_transformers_lacks_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        maps_of_types.main(["--types", "gpt9"])

    assert "gpt9: transformers" in capsys.readouterr().err
