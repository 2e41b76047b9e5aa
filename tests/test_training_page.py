"""The examples of docs/training.md run as they stand, one after the other, and print what the page speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "training.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run_and_print_what_it_speaks_of(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(example, names)
    # The Trainer prints what it logs.
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert said[0] == "48 ['iia', 'loss']"
    assert re.fullmatch(r"[01]\.\d\d \[[01]\.\d\d, [01]\.\d\d\] of 40", said[1])
    assert said[2:] == ["7", "True", "True"]


def test_the_page_names_every_option_of_train() -> None:
    import inspect

    from intervenable import training

    for name in inspect.signature(training.train).parameters:
        assert name in ("model", "dataset", "subspaces", "max_steps", "progress") or f"{name}" in PAGE, name
