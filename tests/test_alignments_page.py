"""The examples of docs/alignments.md run as they stand, one after the other, and print what the page speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "alignments.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run_and_print_what_it_speaks_of(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(example, names)
    shape, early, late, title, head, full, pca, das, nothing, *rest = capsys.readouterr().out.splitlines()
    assert shape == "(2, 2, 2) ('the country', 'last')"
    # What the capital is stands at the country first, and at the last token in the end.
    assert early == "layer 0, 'the country', full vector: 1.00 [0.91, 1.00]"
    assert late == "layer 5, 'last', full vector: 1.00 [0.91, 1.00]"
    assert title == "Methods at layer 2 block_output: IIA over 40 examples, 2 seeds, with intervals of 95%."
    assert head.split("  ")[0] == "method"
    assert full.startswith("full vector       120  1.00 [0.91, 1.00] ")
    assert pca.startswith("PCA                16  ")
    assert das.startswith("DAS                16  ")
    assert nothing == "no intervention     0  0.00 [0.00, 0.09]"
    *shortcuts, holds, columns, interval = rest
    assert all(sentence.endswith(".") for sentence in shortcuts)
    assert holds == "True True"
    assert columns == "['method', 'size', 'iia', 'low', 'high']"
    assert interval == "0.94 to 1.00"
