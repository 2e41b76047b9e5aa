"""The page on moving from TransformerLens: its example runs, its names are the table's, and its rows name tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from intervenable import patching
from intervenable.transformer_lens_names import HOOK_NAMES
from intervenable.transformer_lens_patching import NAMED_SWEEPS
from model_maps import COMPONENTS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "migration-from-transformer-lens.md").read_text()
DIFFERENCES = ("Sweeps", "Tables of indices", "Direct paths", "Short names")


def rows(title: str) -> list[list[str]]:
    """The cells of the tables in one part of the page, without their heads."""
    part = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def known_tests() -> set[str]:
    """The names of all tests of the suite."""
    return {
        node.name
        for file in TESTS.glob("test_*.py")
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@pytest.mark.parametrize("title", DIFFERENCES)
def test_every_difference_says_why_and_is_held_by_a_test(title):
    known = known_tests()
    for row in rows(title):
        assert len(row) == 4, row
        assert row[-1].strip("`") in known, row[-1]


def test_no_test_holds_two_rows():
    named = [row[-1] for title in DIFFERENCES for row in rows(title)]
    assert len(named) > 15
    assert len(named) == len(set(named))


def test_the_names_of_the_page_are_those_of_the_table():
    written = [[cell.strip("`") for cell in row] for row in rows("Names")]
    assert written == [
        [
            row.component,
            *(
                ("" if COMPONENTS[row.component].scope == "model" else "blocks.{layer}.") + name
                if name
                else "–"
                for name in (row.hooked, row.bridge)
            ),
        ]
        for row in HOOK_NAMES
    ]


def test_every_function_that_the_page_names_is_there():
    named = set(re.findall(r"get_act_patch_\w*[a-z]|make_df_from_ranges|\w+_patch_setter", PAGE)) - {
        "patch_setter"
    }
    assert len(named) > 5
    assert all(hasattr(patching, name) for name in named)
    assert all(hasattr(patching, name) for name in NAMED_SWEEPS)


def test_the_example_runs_and_its_two_ways_are_one():
    code = PAGE.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(compile(code, "migration-from-transformer-lens.md", "exec"), names)
    by_name, same = names["by_name"], names["same"]
    assert by_name.shape == (6, 5)
    torch.testing.assert_close(by_name, same)
    assert by_name.std() > 0.1
