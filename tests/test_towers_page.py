"""The examples of docs/towers.md run as they stand, one after the other, and print what the page speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "towers.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run_and_print_what_it_speaks_of(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(example, names)
    said = capsys.readouterr().out.splitlines()
    assert said == ["(3, 5)", "(1, 2, 3, 4)", "(1, 5, 12)", "[0, 5, 6]"]
