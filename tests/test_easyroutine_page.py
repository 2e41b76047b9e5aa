"""The page on moving from easyroutine: its example runs, its keys are the table's, and its rows name tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

from intervenable.easyroutine_keys import KEY_KINDS

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs" / "migration-from-easyroutine.md").read_text()


def rows(title: str) -> list[list[str]]:
    """The cells of the tables in one part of the page, without their heads."""
    part = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[1:]]


DIFFERENCES = ("Attention matrices", "Vectors, keys and heads", "Positions", "Extraction", "Patching")


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
        assert all(len(cell) > 5 for cell in row), row
        assert row[-1].strip("`") in known, row[-1]


def test_no_test_holds_two_rows():
    named = [row[-1] for title in DIFFERENCES for row in rows(title)]
    assert len(named) > 40
    assert len(named) == len(set(named))


def test_the_keys_of_the_page_are_those_of_the_table():
    written = [tuple(cell.strip("`") for cell in row[:2]) for row in rows("Keys")]
    assert written == [(kind.template, kind.component) for kind in KEY_KINDS]
    for row, kind in zip(rows("Keys"), KEY_KINDS, strict=True):
        assert row[2].startswith("read") == bool(kind.read_only)


def test_the_example_runs_and_its_two_ways_are_one():
    code = PAGE.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(compile(code, "migration-from-easyroutine.md", "exec"), names)
    left, right = names["intervened"].logits, names["same"].logits
    assert torch.equal(left, right)
    with torch.no_grad():
        plain = names["lm"](**names["inputs"]).logits
    assert (left - plain).abs().max() > 1e-3
    assert names["cache"]["block_output", 4].shape == (1, 1, 120)
