"""The examples of docs/sweeps.md run as they stand, one after the other, and print what the page speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "sweeps.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run_and_print_what_it_speaks_of(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(example, names)
    shape, answer, axes, cell, *rest = capsys.readouterr().out.splitlines()
    assert shape == "torch.Size([6, 5]) ('The', 'capital', 'of', 'Italy', 'is')"
    # Madrid, nearly as in the clean run.
    assert 0.9 < float(answer.removeprefix("tensor(").removesuffix(")")) < 1
    assert axes == "('component', 'layer', 'head', 'metric') (2, 6, 6, 2)"
    assert cell.startswith("head_query_output, layer ")
    assert rest == [
        "(6, 2, 2) ('the country', 'the last token')",
        "('The', 'capital', 'city', 'of', 'Italy', 'is')",
        "tensor(True)",
        "(6, 6) noise",
        "('layer', 'query') (6, 1)",
        "(6,) ('surprise',)",
        "tensor(True)",
    ]
