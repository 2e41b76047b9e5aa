"""The examples of the README run as they stand, one after the other, and print what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def _without_numbers(text: str) -> list[str]:
    """The lines of an output but for the digits of its probabilities, which differ from processor to processor."""
    return [re.sub(r"\d\.[\de-]+", "_", line) for line in text.strip().splitlines()]


def test_the_examples_print_what_the_readme_shows(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    examples = _blocks("python")
    exec(examples[0], names)
    assert _without_numbers(capsys.readouterr().out) == _without_numbers(_blocks("text")[0])
    for example in examples[1:]:
        exec(example, names)
    assert tuple(names["values"].shape) == (2, 2, 1, 24)
    printed = capsys.readouterr().out
    assert "source 0: positions 4 ' is'" in printed
    table = next(block for block in _blocks("text") if block.startswith("Methods at"))
    assert [line[:15] for line in table.splitlines()] == [
        line[:15] for line in printed[printed.index("Methods at") :].splitlines()[: len(table.splitlines())]
    ]
    trained = [names["iv"].training.evaluate(names[model], names["test"]).value for model in ("das", "again")]
    assert trained[0] == trained[1] > 0.8


def test_the_error_that_the_readme_shows_is_the_one_that_is_raised() -> None:
    call, first, *rest = _blocks("text")[-1].strip().splitlines()
    names: dict[str, object] = {}
    exec("import intervenable as iv; _, lm = iv.load_small_lm()", names)
    kind, message = first.split(": ", 1)
    with pytest.raises(ValueError, match=r".") as error:
        exec(call.removeprefix(">>> "), names)
    assert type(error.value).__name__ == kind
    assert str(error.value) == "\n".join([message, *rest])
