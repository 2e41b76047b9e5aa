"""Pictures of causal models: every variable and dependence is there once, and lines keep clear of boxes."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from causal_by_hand import Tables, tables
from hypothesis import given, settings
from matplotlib.patches import Rectangle

import intervenable as iv
from intervenable.causal import CausalModel, hierarchical_equality, indirect_objects
from intervenable.causal_layout import laid_out

ROOT = Path(__file__).parents[1]


def boxes(figure) -> dict[str, Rectangle]:
    """The box of each variable, found by where its name is written."""
    [axes] = figure.axes
    found = {}
    for text in axes.texts:
        x, y = text.get_position()
        for box in axes.patches:
            if isinstance(box, Rectangle) and box.get_bbox().contains(x, y) and text.get_text():
                found[text.get_text()] = box
    return found


def written(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts if text.get_text()]


# --- where everything is ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(made=tables(most=8))
def test_parents_stand_to_the_left_and_no_two_things_in_one_place(made: Tables):
    model = made.model()
    layout = laid_out(model)
    assert len(set(layout.places.values())) == len(layout.places)
    for name, above in model.parents.items():
        for parent in above:
            assert layout.places[parent][0] < layout.places[name][0]
    ends = [(route[0], route[-1]) for route in layout.routes]
    assert sorted(ends) == sorted((parent, name) for name, above in model.parents.items() for parent in above)
    for route in layout.routes:  # a step from each column to the next
        columns = [layout.places[node][0] for node in route]
        assert columns == [columns[0] + step for step in range(len(route))]
    by_column: dict[float, list[float]] = {}
    for column, row in layout.places.values():
        by_column.setdefault(column, []).append(row)
    for rows in by_column.values():
        assert all(abs(one - other) > 0.999 for one, other in combinations(rows, 2))


def test_lines_of_a_tree_do_not_cross_whatever_the_order_of_its_inputs():
    parents = {"p": ["a", "d"], "q": ["b", "e"], "r": ["c", "f"], "o": ["p", "q", "r"]}
    model = CausalModel([*"abcdefpqro"], {}, parents, {name: lambda *values: 0 for name in parents})
    layout = laid_out(model)
    lines = [(layout.places[route[0]][1], layout.places[route[-1]][1]) for route in layout.routes]
    inputs = lines[:-3]
    assert all((a - c) * (b - d) >= 0 for (a, b), (c, d) in combinations(inputs, 2))


def test_a_child_stands_at_the_height_of_the_middle_of_its_parents():
    places = laid_out(hierarchical_equality().model).places
    rows = {name: row for name, (_, row) in places.items()}
    assert rows["WX"] == (rows["W"] + rows["X"]) / 2
    assert rows["O"] == (rows["WX"] + rows["YZ"]) / 2


def test_places_that_the_model_says_are_kept():
    model = CausalModel(
        ["A", "B", "C"],
        {},
        {"B": "A", "C": "AB"},
        {"B": bool, "C": max},
        pos={"A": (3, 1), "B": (0, 0), "C": (1, 5)},
    )
    layout = laid_out(model)
    assert layout.places == {"A": (3, 1), "B": (0, 0), "C": (1, 5)}
    assert set(layout.routes) == {("A", "B"), ("A", "C"), ("B", "C")}
    assert model.draw().axes


# --- what is drawn ------------------------------------------------------------------------------------------


def test_every_variable_has_a_box_and_every_dependence_a_line():
    model = indirect_objects().model
    figure = model.draw()
    assert set(boxes(figure)) == set(model.variables)
    heads = [text for text in figure.axes[0].texts if not text.get_text()]
    assert len(heads) == sum(len(above) for above in model.parents.values()) == 7


def test_boxes_do_not_touch_and_hold_their_names():
    figure = indirect_objects().model.draw(
        {
            "first": "Mary",
            "second": "John",
            "named_again": "first",
            "phrasing": 0,
            "place": "store",
            "object": "book",
        }
    )
    figure.canvas.draw()
    found = [patch.get_bbox() for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    assert not any(one.overlaps(other) for one, other in combinations(found, 2))
    across = [patch.get_window_extent() for patch in figure.axes[0].patches if isinstance(patch, Rectangle)]
    for text in figure.axes[0].texts:
        if text.get_text():
            extent = text.get_window_extent()
            assert any(box.x0 < extent.x0 and extent.x1 < box.x1 for box in across), text
            assert any(box.y0 <= extent.y0 and extent.y1 <= box.y1 for box in across), text


def test_values_are_written_below_the_names_and_what_is_set_has_a_bold_frame():
    model = hierarchical_equality().model
    figure = model.draw({"W": 1, "X": 2, "Y": 3, "Z": 3, "WX": True}, title="WX set")
    assert written(figure) == [
        text
        for name, value in (("W", 1), ("X", 2), ("Y", 3), ("Z", 3), ("WX", True), ("YZ", True), ("O", True))
        for text in (name, str(value))
    ]
    widths = {name: box.get_linewidth() for name, box in boxes(figure).items() if name in model.variables}
    assert [name for name, width in widths.items() if width > 1] == ["WX"]
    assert figure.get_suptitle() == "WX set"


def test_inputs_inner_variables_and_outputs_have_colours_of_their_own():
    found = boxes(hierarchical_equality().model.draw())
    colours = {name: box.get_facecolor() for name, box in found.items()}
    assert colours["W"] == colours["Z"] != colours["WX"] == colours["YZ"] != colours["O"] != colours["W"]


def test_long_names_and_values_are_shortened():
    name = "whether the amount is above the lower bound"
    model = CausalModel([name], {}, {}, {})
    texts = written(model.draw({name: "x" * 300}))
    assert all(len(text) <= 24 and "…" in text for text in texts)


def test_what_cannot_be_set_is_not_drawn():
    with pytest.raises(iv.UnknownNameError, match="Unknown variable 'V'"):
        hierarchical_equality().model.draw({"V": 1})


def test_without_matplotlib_it_is_said_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from intervenable.causal import hierarchical_equality\n"
        "model = hierarchical_equality().model\n"
        "try: model.draw()\n"
        "except ImportError as error: print(type(error).__name__, 'intervenable[plots]' in str(error))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, timeout=300, capture_output=True, text=True
    )
    assert done.stdout.split() == ["MissingExtraError", "True"]
