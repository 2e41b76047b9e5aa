"""The benchmark of maps: that it runs, and reports what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import maps


def test_a_quick_run_measures_every_step_and_writes_it_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    maps.main(["--quick", "--models", "GPT-2 XL", "--markdown", "--json", str(tmp_path / "times.json")])

    (times,) = json.loads((tmp_path / "times.json").read_text())
    assert times["components"] > 25
    assert all(times[step] > 0 for step in maps.STEPS)
    table = capsys.readouterr().out.splitlines()
    assert table[0].startswith(
        "| model | components | load | twin | infer | prove | fit | new map | kept map |"
    )
    assert [line.split(" | ")[0] for line in table[2:]] == ["| GPT-2 XL", "| all"]


def test_the_time_for_a_new_map_is_that_of_all_its_steps() -> None:
    times = maps.Times("a", load=9.0, twin=1.0, infer=2.0, prove=3.0, fit=4.0, kept=0.5, components=1)

    assert times.new == 10.0
    assert maps.as_table([times, times], markdown=False).splitlines()[-1].split()[-1] == "20x"


def test_what_is_neither_a_model_nor_a_folder_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        maps.main(["--models", "GPT-9"])

    assert "GPT-9: neither a folder nor one of GPT-2 XL" in capsys.readouterr().err
