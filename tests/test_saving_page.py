"""The examples of docs/saving.md run as they stand, one after the other, and print what the page speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "saving.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run_and_print_what_it_speaks_of(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(example, names)
    assert capsys.readouterr().out.splitlines() == [
        "('layer_2.block_output.pos',) True",
        "- its class was 'LlamaForCausalLM' and is 'MLPClassifier'",
        "LlamaForCausalLM",
        "Unknown intervention class 'Steer'.",
        "2.0",
    ]


def test_the_methods_of_the_page_are_there() -> None:
    import intervenable as iv

    methods = set(re.findall(r"(?:IntervenableModel|das)\.(\w+)\(", PAGE))
    assert {"save_pretrained", "from_pretrained", "push_to_hub", "from_pyvene"} <= methods
    assert all(hasattr(iv.IntervenableModel, name) for name in methods)
