"""The examples of docs/causal-models.md run as they stand, one after the other, and print what the page speaks of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import intervenable as iv

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "causal-models.md").read_text(encoding="utf-8")


def test_the_examples_of_the_page_run_and_print_what_it_speaks_of(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        exec(example, names)
    (
        run,
        forced,
        exchanged,
        columns,
        unchanged,
        neuron,
        exact,
        whole,
        split,
        texts,
        tokens,
        swapped,
        colour,
    ) = capsys.readouterr().out.splitlines()
    assert run == "{'W': 1, 'X': 2, 'Y': 3, 'Z': 3, 'WX': False, 'YZ': True, 'O': False}"
    assert (forced, exchanged) == ("True", "True")
    assert set(re.findall(r"'(\w+)'", columns)) == {
        *("input_ids", "source_input_ids", "labels", "base_labels", "source_labels", "intervention_id")
    }
    assert unchanged == "50"
    assert neuron == "(0,)"
    assert exact.startswith("1.00 ")
    assert 0.4 < float(whole.split()[0]) < 0.6
    assert split == "69 23 set()"
    base, source, label = texts.split(" | ")
    assert base != source
    assert label == f" {iv.small_lm.CAPITALS[source.split()[3]]}"
    assert tokens.startswith("3 [")
    assert float(swapped.split()[0]) > 0.9
    assert re.fullmatch(r"The colour of (\w+) is \| The colour of (?!\1)\w+ is \|  \w+", colour)


def test_the_tables_name_every_task_and_what_is_there():
    for name in re.findall(r"`(\w+)\(", PAGE):
        assert (
            hasattr(iv.causal, name) or hasattr(iv.causal.CausalModel, name) or hasattr(iv.causal.Task, name)
        ), name
    tasks = [name for name in iv.causal.__all__ if name.islower() and name not in ("filled", "tokenized")]
    assert all(f"`{name}(" in PAGE for name in tasks)


def test_what_the_namespace_exports_is_sorted_there_and_documented():
    names = iv.causal.__all__
    assert names == sorted(names, key=lambda name: (not name[0].isupper(), name))
    for name in names:
        assert getattr(iv.causal, name).__doc__, name


def test_the_picture_of_the_page_is_there():
    [picture] = re.findall(r"\]\((images/\S+\.png)\)", PAGE)
    assert (ROOT / "docs" / picture).stat().st_size > 5000
