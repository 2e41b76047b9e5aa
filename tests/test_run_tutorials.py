"""The script that runs the tutorials notices a cell that raises, and writes only when asked to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).resolve().parents[1]


def run_tutorials(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "run_tutorials.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def notebook(path: Path, *cells: str) -> Path:
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), path)
    return path


def test_outputs_are_stored_only_with_write(tmp_path):
    # A name from the checkout, which the kernel finds although it runs in another folder.
    path = notebook(tmp_path / "good.ipynb", "import model_maps", "print(len('four'), model_maps.__name__)")
    before = path.read_text()

    assert run_tutorials(path).returncode == 0
    assert path.read_text() == before

    assert run_tutorials("--write", path).returncode == 0
    assert nbformat.read(path, as_version=4).cells[1].outputs[0].text == "4 model_maps\n"


def test_what_goes_to_standard_error_is_not_stored(tmp_path):
    path = notebook(tmp_path / "bar.ipynb", "import sys", "print('50 %', file=sys.stderr); print('done')")
    assert run_tutorials("--write", path).returncode == 0
    assert [output.text for output in nbformat.read(path, as_version=4).cells[1].outputs] == ["done\n"]


def test_a_cell_that_raises_fails_the_run_and_is_shown(tmp_path):
    path = notebook(tmp_path / "bad.ipynb", "1 + 1", "raise ValueError('no such layer')")
    before = path.read_text()

    done = run_tutorials("--write", path)

    assert done.returncode == 1
    assert "bad.ipynb: failed" in done.stderr
    assert "no such layer" in done.stderr
    assert path.read_text() == before


def test_a_cell_that_takes_too_long_fails_the_run_and_is_shown(tmp_path):
    path = notebook(tmp_path / "slow.ipynb", "import time", "time.sleep(600)")
    done = run_tutorials("--timeout", "5", path)
    assert done.returncode == 1
    assert "slow.ipynb: failed" in done.stderr
    assert "time.sleep(600)" in done.stderr


def test_of_several_at_a_time_the_others_run_to_their_end(tmp_path):
    bad = notebook(tmp_path / "bad.ipynb", "raise ValueError('no such layer')")
    good = [notebook(tmp_path / f"{name}.ipynb", f"print('{name}')") for name in ("one", "two")]

    done = run_tutorials("--write", "--jobs", "2", good[0], bad, good[1])

    assert done.returncode == 1
    assert "no such layer" in done.stderr
    for path in good:
        assert nbformat.read(path, as_version=4).cells[0].outputs[0].text == f"{path.stem}\n"
