"""The page that lists components and interventions is complete and says nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import interventions
from interventions import Intervention
from model_maps import COMPONENTS, WORDS

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
    assert list(COMPONENT_ROWS) == list(WORDS)


@pytest.mark.parametrize("name", WORDS)
def test_a_row_gives_the_shape_and_units_of_its_component(name: str) -> None:
    known, row = COMPONENTS[name], COMPONENT_ROWS[name]
    assert f"`{known.shape}`" in row
    assert row.endswith("| " + ", ".join(f"`{unit}`" for unit in known.units) + " |")
    assert ("no `layer`" in row) == (known.scope == "model")


def test_the_page_says_which_words_take_which_prefix() -> None:
    part = PAGE.split("## Models of several stacks")[1].split("\n## ")[0]
    crossing = {name.removeprefix("cross_") for name in COMPONENTS if name.startswith("cross_")}
    said = part.split("`cross_` goes before")[1].split(".\n")[0]
    assert set(re.findall(r"`(\w+)`", said)) == crossing
    for prefix in ("encoder", "decoder"):
        assert {name for name in COMPONENTS if name.startswith(f"{prefix}_")} == {
            f"{prefix}_{word}" for word in WORDS if word != "logits"
        }


def test_every_intervention_has_a_row_and_every_row_is_an_intervention() -> None:
    assert set(INTERVENTION_ROWS) == BUILT_IN


@pytest.mark.parametrize("name", sorted(BUILT_IN - {"CallableIntervention"}))
def test_a_row_says_whether_its_intervention_takes_a_source(name: str) -> None:
    says = re.split(r"(?<!\\)\|", INTERVENTION_ROWS[name])[3].strip()
    assert says == ("yes" if getattr(interventions, name).needs_source else "no")
