"""The result of a sweep: named axes, parts of it, the normalized scale, tables and words. Numbers by hand."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import intervenable as iv
from intervenable.sweep_result import SweepResult

VALUES = torch.tensor([[1.0, 3.0, 1.0], [1.0, 2.0, 0.5]])


def by_layer_and_token(**changes):
    """Two layers by the three tokens of "In Spain in": the clean run has 3, the corrupted 1."""
    given = {
        "axes": ("layer", "pos"),
        "labels": {"layer": ("4", "8"), "pos": ("In", " Spain", "In")},
        "entries": {"layer": (4, 8), "pos": (0, 1, 2)},
        "results": {("block_input", "difference"): VALUES},
        "clean": {"difference": torch.tensor(3.0)},
        "corrupted": {"difference": torch.tensor(1.0)},
        "settings": {"direction": "denoise"},
    }
    return SweepResult(**{**given, **changes})


def heads_of_two_components():
    """Four query heads and two key heads in each of two layers; a number and a pair for each cell."""
    query, key = torch.arange(8.0).view(2, 4), 10 + torch.arange(4.0).view(2, 2)
    return SweepResult(
        axes=("layer", "head"),
        labels={"layer": ("0", "1"), "head": ("0", "1", "2", "3")},
        entries={"layer": (0, 1), "head": (0, 1, 2, 3)},
        results={
            ("head_query_output", "one"): query,
            ("head_query_output", "two"): -query.double(),
            ("head_key_output", "one"): key,
            ("head_key_output", "two"): -key.double(),
        },
        clean={"one": torch.tensor(1.0), "two": torch.tensor(2.0, dtype=torch.float64)},
        corrupted={"one": torch.tensor(0.0), "two": torch.tensor(0.0, dtype=torch.float64)},
    )


def by_example():
    """One axis, and a number for each of two examples in every cell."""
    return SweepResult(
        axes=("layer",),
        labels={"layer": ("0", "1-2")},
        entries={"layer": (0, (1, 2))},
        results={("block_input", "accuracy"): torch.tensor([[0.0, 1.0], [1.0, 1.0]])},
        clean={"accuracy": torch.tensor([1.0, 1.0])},
        corrupted={"accuracy": torch.tensor([0.0, 1.0])},
    )


# --- axes and values --------------------------------------------------------------------------------------


def test_one_component_and_one_metric_have_the_axes_of_the_cells():
    result = by_layer_and_token()
    assert result.all_axes == result.axes == ("layer", "pos")
    assert torch.equal(result.values, VALUES)
    assert (result.baseline_clean.item(), result.baseline_corrupted.item()) == (3, 1)
    assert (result.components, result.metrics) == (("block_input",), ("difference",))


def test_several_components_come_first_and_several_metrics_last():
    result = heads_of_two_components()
    assert result.all_axes == ("component", "layer", "head", "metric")
    assert result.values.shape == (2, 2, 4, 2)
    assert result.values.dtype == torch.float64
    assert result.values[0, 1, 3].tolist() == [7, -7]
    assert result.values[1, 1, 1].tolist() == [13, -13]
    assert result.baseline_clean.tolist() == [1, 2]


def test_heads_that_a_component_does_not_have_are_nan():
    values = heads_of_two_components().values[1, ..., 0]
    assert values[:, :2].tolist() == [[10, 11], [12, 13]]
    assert values[:, 2:].isnan().all()


def test_what_a_metric_gives_for_each_cell_has_the_last_axes():
    result = by_example()
    assert result.all_axes == ("layer", "item")
    assert result.values.shape == (2, 2)
    assert result.baseline_corrupted.tolist() == [0, 1]
    matrix = by_layer_and_token(
        results={("block_input", "m"): torch.zeros(2, 3, 5, 7)}, clean={}, corrupted={}
    )
    assert matrix.all_axes == ("layer", "pos", "item_0", "item_1")


def test_metrics_of_different_shapes_have_no_values_together():
    both = {("block_input", "a"): VALUES, ("block_input", "b"): torch.zeros(2, 3, 5)}
    result = by_layer_and_token(results=both, clean={}, corrupted={})
    with pytest.raises(iv.MetricError) as error:
        _ = result.values
    assert str(error.value) == (
        "The metrics give values of different shapes: 'a' (), 'b' (5,). Take one: .select(metric='a')."
    )
    with pytest.raises(iv.MetricError, match="different shapes"):
        _ = result.all_axes
    assert result.select(metric="b").values.shape == (2, 3, 5)


def test_a_baseline_that_is_not_known_says_how_to_have_it():
    result = by_layer_and_token(clean={})
    for ask in (lambda: result.baseline_clean, result.normalized):
        with pytest.raises(iv.MetricError) as error:
            ask()
        assert str(error.value) == (
            "The value of 'difference' on the clean run is not known. Give the sweep the clean inputs themselves:"
            " it runs them once, unpatched."
        )
    assert result.baseline_corrupted.item() == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"layer": ("4",), "pos": ("a", "b", "c")}}, "'layer' has 2 entries and 1 labels"),
        ({"entries": {"layer": (4, 8)}}, "'pos' has 0 entries and 3 labels"),
        ({"results": {}}, "needs at least one component and metric"),
        (
            {"results": {("c", "difference"): VALUES.T}},
            r"the shape \(3, 2\), .* begin with the sizes \(2, 3\)",
        ),
        (
            {"results": {("c", "difference"): VALUES[0]}},
            r"the shape \(3,\), .* begin with the sizes \(2, 3\)",
        ),
        (
            {"clean": {"difference": torch.zeros(2)}},
            r"has the shape \(\) for each cell of block_input, .*\(2,\)",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(iv.ConfigError, match=message):
        by_layer_and_token(**changes)


# --- parts ------------------------------------------------------------------------------------------------


def test_an_entry_drops_its_axis_and_a_list_keeps_it():
    result = by_layer_and_token()
    column = result.select(pos=1)
    assert (column.axes, column.values.tolist()) == (("layer",), [3, 2])
    assert column.settings["selected"] == {"pos": " Spain"}
    columns = result.select(pos=[2, 0], layer=8)
    assert (columns.axes, columns.entries, columns.labels) == (
        ("pos",),
        {"pos": (2, 0)},
        {"pos": ("In", "In")},
    )
    assert columns.values.tolist() == [0.5, 1]
    assert result.axes == ("layer", "pos")  # itself unchanged
    assert result.values is VALUES


def test_entries_are_numbers_of_layers_and_not_of_rows():
    result = by_layer_and_token()
    assert torch.equal(result.select(layer=4).values, VALUES[0])
    assert torch.equal(result.select(layer=torch.tensor(8)).values, VALUES[1])
    assert torch.equal(result.select(layer="8").values, VALUES[1])


def test_a_negative_number_counts_from_the_end_unless_it_is_an_entry():
    assert by_layer_and_token().select(layer=-2).values.tolist() == VALUES[0].tolist()
    relative = by_layer_and_token(entries={"layer": (4, 8), "pos": (-1, -2, -3)})
    assert relative.select(pos=-1).values.tolist() == VALUES[:, 0].tolist()


def test_a_window_is_one_entry():
    assert by_example().select(layer=(1, 2)).values.tolist() == [1, 1]
    assert by_example().select(layer="1-2").values.tolist() == [1, 1]


def test_no_axis_is_left_when_all_are_selected():
    one = by_layer_and_token().select(layer=4, pos=1)
    assert (one.axes, one.values.item(), one.all_axes) == ((), 3, ())
    assert [cell.value for cell in one.top()] == [3]
    assert len(one.to_pandas()) == 1


def test_components_and_metrics_are_selected_with_their_heads_and_baselines():
    result = heads_of_two_components()
    keys = result.select(component="head_key_output", metric="one")
    assert keys.values.tolist() == [[10, 11], [12, 13]]
    assert keys.entries["head"] == (0, 1)
    assert list(keys.clean) == list(keys.corrupted) == ["one"]
    assert result.select(metric=["two", "one"]).metrics == ("one", "two")
    third = result.select(head=2, metric="one")
    assert third.values[0].tolist() == [2, 6]
    assert third.values[1].isnan().all()


def test_a_label_of_several_tokens_is_refused_with_their_places():
    with pytest.raises(iv.ConfigError) as error:
        by_layer_and_token().select(pos="In")
    assert str(error.value) == "pos='In' is the label of several entries: 0, 2. Give the entry instead."


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"layer": 5}, "Unknown entry of the axis 'layer': 5.\nAllowed: 4, 8."),
        ({"layer": -3}, "Unknown entry of the axis 'layer': -3.\nAllowed: 4, 8."),
        ({"layer": True}, "Unknown entry of the axis 'layer': True.\nAllowed: 4, 8."),
        (
            {"pos": " Spai"},
            "Unknown entry of the axis 'pos': ' Spai'. Did you mean \"' Spain'\"?\n"
            "Allowed: 0, 1, 2, 'In', ' Spain'.",
        ),
        ({"posi": 1}, "Unknown axis 'posi'. Did you mean 'pos'?\nAllowed: component, layer, metric, pos."),
        (
            {"component": "block_inptu"},
            "Unknown component 'block_inptu'. Did you mean 'block_input'?\nAllowed: block_input.",
        ),
        ({"metric": ["loss"]}, "Unknown metric 'loss'.\nAllowed: difference."),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(where, message):
    with pytest.raises(iv.UnknownNameError) as error:
        by_layer_and_token().select(**where)
    assert str(error.value) == message


# --- scales -----------------------------------------------------------------------------------------------


def test_normalized_is_zero_where_corrupted_and_one_where_clean():
    result = by_layer_and_token().normalized()
    assert result.values.tolist() == [[0, 1, 0], [0, 0.5, -0.25]]
    assert (result.baseline_clean.item(), result.baseline_corrupted.item()) == (1, 0)
    assert result.settings["normalized"] is True
    assert torch.equal(result.normalized().values, result.values)


def test_normalized_turns_round_a_metric_that_is_lower_on_the_clean_run():
    loss = {"clean": {"difference": torch.tensor(1.0)}, "corrupted": {"difference": torch.tensor(3.0)}}
    assert by_layer_and_token(**loss).normalized().values.tolist() == [[1, 0, 1], [1, 0.5, 1.25]]


def test_normalized_where_the_runs_are_equal_is_nan_with_a_warning():
    with pytest.warns(iv.IntervenableWarning, match="'accuracy' has the same value on the clean and the"):
        result = by_example().normalized()
    assert result.values[:, 0].tolist() == [0, 1]
    assert result.values[:, 1].isnan().all()


def test_mean_is_over_what_a_metric_gave_for_each_cell():
    result = by_example().mean()
    assert (result.all_axes, result.values.tolist()) == (("layer",), [0.5, 1])
    assert (result.baseline_clean.item(), result.baseline_corrupted.item()) == (1, 0.5)
    assert torch.equal(by_layer_and_token().mean().values, VALUES)


# --- cells and tables -------------------------------------------------------------------------------------


def test_top_has_the_cells_that_changed_most_against_the_patched_run():
    cells = by_layer_and_token().top(3)
    assert [(cell.entries["layer"], cell.entries["pos"], cell.value, cell.change) for cell in cells] == [
        (4, 1, 3.0, 2.0),
        (8, 1, 2.0, 1.0),
        (8, 2, 0.5, -0.5),
    ]
    noised = by_layer_and_token(settings={"direction": "noise"}).top(1)
    assert (noised[0].value, noised[0].change) == (0.5, -2.5)
    unknown = by_layer_and_token(corrupted={}).top(2)
    assert [(cell.value, cell.change) for cell in unknown] == [(3, None), (2, None)]


def test_top_leaves_out_what_is_no_number_and_asks_which_metric():
    holes = VALUES.clone()
    holes[0, 1] = math.nan
    assert by_layer_and_token(results={("b", "difference"): holes}).top(1)[0].value == 2
    with pytest.raises(iv.MetricError) as error:
        heads_of_two_components().top()
    assert str(error.value) == "There are several metrics. Name one: metric='one'."
    best = heads_of_two_components().top(2, metric="two")
    assert [(cell.component, cell.entries, cell.value) for cell in best] == [
        ("head_key_output", {"layer": 1, "head": 1}, -13),
        ("head_key_output", {"layer": 1, "head": 0}, -12),
    ]


def test_the_words_of_a_result_name_axes_baselines_best_cells_and_shortcuts():
    result = by_layer_and_token(shortcuts=("3 of 6 cells change nothing.",))
    assert repr(result).splitlines() == [
        "SweepResult of block_input: layer 2 x pos 3",
        "  difference: clean 3, corrupted 1",
        "    block_input, layer 4, pos 1 ' Spain': 3 (+2)",
        "    block_input, layer 8, pos 1 ' Spain': 2 (+1)",
        "    block_input, layer 8, pos 2 'In': 0.5 (-0.5)",
        "  3 of 6 cells change nothing.",
    ]
    assert "accuracy, means over (2,): clean 1, corrupted 0.5" in repr(by_example())


def test_a_table_has_a_row_for_each_cell():
    table = by_layer_and_token().to_pandas()
    assert list(table) == ["component", "layer", "pos", "layer_label", "pos_label", "metric", "value"]
    assert table.values.tolist()[:2] == [
        ["block_input", 4, 0, "4", "In", "difference", 1.0],
        ["block_input", 4, 1, "4", " Spain", "difference", 3.0],
    ]
    assert table.pivot(index="layer", columns="pos", values="value").values.tolist() == VALUES.tolist()


def test_a_table_has_no_rows_for_heads_that_are_not_there():
    table = heads_of_two_components().to_pandas()
    assert table.groupby(["component", "metric"]).size().to_dict() == {
        ("head_query_output", "one"): 8,
        ("head_query_output", "two"): 8,
        ("head_key_output", "one"): 4,
        ("head_key_output", "two"): 4,
    }
    assert not table["value"].isna().any()


def test_a_table_has_a_row_for_each_number_of_a_cell():
    table = by_example().to_pandas()
    assert table[["layer", "item", "value"]].values.tolist() == [
        [0, 0, 0.0],
        [0, 1, 1.0],
        [(1, 2), 0, 1.0],
        [(1, 2), 1, 1.0],
    ]
    both = {("block_input", "a"): VALUES, ("block_input", "b"): torch.zeros(2, 3, 5)}
    mixed = by_layer_and_token(results=both, clean={}, corrupted={}).to_pandas()
    assert mixed.groupby("metric")["item"].count().to_dict() == {"a": 0, "b": 30}


def test_pandas_is_needed_for_tables_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    result = by_layer_and_token()
    assert result.top(1)
    assert repr(result)
    with pytest.raises(ImportError):
        result.to_pandas()
