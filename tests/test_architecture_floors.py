"""The ground floors import nothing above them and nothing of each other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "model_maps": {"interventions", "intervenable", "torch", "transformers"},
    "interventions": {"model_maps", "intervenable", "transformers"},
}


def imported_by(source: str) -> set[str]:
    """The top-level packages that a module imports, wherever in it."""
    packages = set()
    for node in ast.walk(ast.parse(source)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        packages |= {name.split(".")[0] for name in names}
    return packages


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_ground_floor_imports_nothing_above_it(floor):
    files = sorted((ROOT / floor).rglob("*.py"))
    assert files
    for file in files:
        above = FORBIDDEN[floor] & imported_by(file.read_text(encoding="utf-8"))
        assert not above, f"{file.relative_to(ROOT)} imports {above}"


def test_model_maps_need_only_the_standard_library():
    for file in sorted((ROOT / "model_maps").rglob("*.py")):
        others = imported_by(file.read_text(encoding="utf-8")) - set(sys.stdlib_module_names) - {"model_maps"}
        assert not others, f"{file.relative_to(ROOT)} imports {others}"


@pytest.mark.parametrize(
    "source",
    [
        "import torch",
        "import torch.nn as nn",
        "from torch import nn",
        "def f():\n    from torch.nn import Linear",
    ],
)
def test_the_check_sees_every_way_to_import(source):
    assert imported_by(source) == {"torch"}


def test_the_check_lets_relative_imports_pass():
    assert imported_by("from . import schema\nfrom .torch import x") == set()
