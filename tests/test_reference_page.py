"""The page that lists components and interventions is complete and says nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import interventions
from interventions import Intervention
from model_maps import COMPONENTS, is_head_component

PAGE = (Path(__file__).parents[1] / "docs" / "components-and-interventions.md").read_text()
COMPONENT_ROWS, INTERVENTION_ROWS = (
    {row.split("`")[1]: row for row in part.splitlines() if row.startswith("| `")}
    for part in PAGE.split("## Interventions")
)
BUILT_IN = {
    name
    for name in interventions.__all__
    if isinstance(cls := getattr(interventions, name), type)
    and issubclass(cls, Intervention)
    and cls is not Intervention
}


def test_every_component_has_a_row_and_every_row_is_a_component() -> None:
    assert list(COMPONENT_ROWS) == list(COMPONENTS)


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_row_gives_the_shape_and_units_of_its_component(name: str) -> None:
    row = COMPONENT_ROWS[name]
    assert f"`{COMPONENTS[name].shape}`" in row
    assert row.endswith("| `h`, `h.pos` |" if is_head_component(name) else "| `pos` |")
    assert ("no `layer`" in row) == (COMPONENTS[name].scope == "model")


def test_every_intervention_has_a_row_and_every_row_is_an_intervention() -> None:
    assert set(INTERVENTION_ROWS) == BUILT_IN


@pytest.mark.parametrize("name", sorted(BUILT_IN - {"CallableIntervention"}))
def test_a_row_says_whether_its_intervention_takes_a_source(name: str) -> None:
    says = re.split(r"(?<!\\)\|", INTERVENTION_ROWS[name])[3].strip()
    assert says == ("yes" if getattr(interventions, name).needs_source else "no")
