"""Results of sweeps and comparisons of alignments: figures, tables, pictures, files."""

from __future__ import annotations

import math

import pytest
import torch

import intervenable as iv
from intervenable.alignment_comparison_result import ControlResult, MethodComparison, MethodResult
from intervenable.alignment_plots import plot_alignments
from intervenable.alignment_statistics import bootstrap_difference, bootstrap_interval
from intervenable.alignment_sweep_result import AlignmentSweep

EXAMPLES = 20


def made_sweep(
    layers=(0, 2), positions=("the country", "last"), ranks=(1, "full"), seeds=(0, 1)
) -> AlignmentSweep:
    """A sweep with random figures."""
    generator = torch.Generator().manual_seed(0)
    shape = tuple(map(len, (layers, positions, ranks, seeds)))
    chances = torch.rand(*shape, 1, generator=generator)
    right = torch.rand(*shape, EXAMPLES, generator=generator) < chances
    loss = torch.rand(shape, generator=generator, dtype=torch.float64)
    if "full" in ranks:
        loss[:, :, ranks.index("full")] = torch.nan
    return AlignmentSweep(
        layers,
        positions,
        ranks,
        seeds,
        right.float(),
        loss,
        ("A note.",),
        {"component": "block_output", "epochs": 3},
    )


def made_comparison() -> MethodComparison:
    """A comparison with random figures."""
    generator = torch.Generator().manual_seed(0)

    def right(chance: float, seeds: int) -> torch.Tensor:
        return (torch.rand(seeds, EXAMPLES, generator=generator) < chance).float()

    def held(chance: float, size: float, seeds: int = 2) -> ControlResult:
        return ControlResult(right(chance, seeds), torch.full((seeds,), size), torch.full((seeds,), math.nan))

    full = MethodResult(
        "full",
        right(0.9, 1),
        torch.tensor([16.0]),
        torch.tensor([math.nan]),
        0.5,
        {"untrained": held(0.1, 16.0)},
    )
    das = MethodResult(
        "das",
        right(0.95, 2),
        torch.tensor([4.0, 4.0]),
        torch.tensor([0.1, 0.2]),
        3.0,
        {"untrained": held(0.1, 4.0), "random": held(0.4, 4.0)},
    )
    dbm = MethodResult(
        "dbm",
        right(0.6, 2),
        torch.tensor([3.0, 7.0]),
        torch.tensor([0.5, 0.7]),
        2.0,
        {"random": held(0.3, 5.0)},
    )
    settings = {"component": "block_output", "layer": 3, "seeds": [0, 1]}
    return MethodComparison((full, das, dbm), right(0.1, 1), settings, ("A note.",))


# --- sweeps -----------------------------------------------------------------------------------------------


def test_the_figures_of_a_sweep_are_means_over_seeds_and_examples_with_their_intervals():
    sweep = made_sweep()
    assert sweep.iia.shape == sweep.low.shape == sweep.high.shape == (2, 2, 2)
    assert sweep.by_seed.shape == (2, 2, 2, 2)
    values = sweep.per_example[1, 0, 1]
    cell = sweep.cell(layer=2, pos="the country", rank="full")
    assert cell.iia.value == pytest.approx(values.mean().item()) == sweep.iia[1, 0, 1].item()
    low, high = bootstrap_interval(values)
    assert (cell.iia.low, cell.iia.high) == (low, high)
    assert (sweep.low[1, 0, 1].item(), sweep.high[1, 0, 1].item()) == pytest.approx((low, high))
    assert sweep.by_seed[1, 0, 1].tolist() == pytest.approx(values.mean(1).tolist())


def test_the_interval_of_a_sweep_has_its_confidence():
    sweep = made_sweep()
    sure = AlignmentSweep(
        sweep.layers,
        sweep.positions,
        sweep.ranks,
        sweep.seeds,
        sweep.per_example,
        sweep.loss,
        (),
        {"confidence": 0.5},
    )
    assert bool((sure.high - sure.low < sweep.high - sweep.low).all())


def test_the_table_of_a_sweep_has_a_row_for_each_cell_and_one_for_each_seed():
    sweep = made_sweep()
    table = sweep.to_pandas()
    assert list(table.columns) == ["layer", "pos", "rank", "iia", "low", "high", "loss", "examples"]
    assert len(table) == 8
    row = table[(table.layer == 2) & (table.pos == "last") & (table["rank"] == 1)].iloc[0]
    assert row.iia == pytest.approx(sweep.iia[1, 1, 0].item())
    assert row.loss == pytest.approx(sweep.loss[1, 1, 0].mean().item())
    by_seed = sweep.to_pandas(by_seed=True)
    assert len(by_seed) == 16
    row = by_seed[
        (by_seed.layer == 2) & (by_seed.pos == "last") & (by_seed["rank"] == 1) & (by_seed.seed == 1)
    ].iloc[0]
    assert row.iia == pytest.approx(sweep.per_example[1, 1, 0, 1].mean().item())
    assert row.loss == sweep.loss[1, 1, 0, 1].item()


def test_the_highest_cells_come_first():
    sweep = made_sweep()
    found = [cell.iia.value for cell in sweep.top(8)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(sweep.iia.max().item())
    assert len(sweep.top(3)) == 3


def test_a_sweep_shows_itself():
    sweep = made_sweep()
    assert repr(sweep).splitlines() == [
        "AlignmentSweep of block_output: 2 layers, 2 positions, 2 ranks, 2 seeds",
        "  iia over 20 examples, with intervals of 95%; the highest:",
        *(f"    {cell}" for cell in sweep.top(3)),
        "  A note.",
    ]


def test_a_cell_that_is_not_there_is_refused():
    sweep = made_sweep()
    with pytest.raises(iv.UnknownNameError, match=r"Unknown pos 'lst'. Did you mean 'last'?"):
        sweep.cell(layer=0, pos="lst", rank=1)
    with pytest.raises(iv.ConfigError, match=r"There are 2 entries of 'rank'. Name one: rank=1."):
        sweep.cell(layer=0, pos="last")


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(iv.ConfigError, match=r"There are \(1, 1, 1, 1\) layers, positions, ranks and seeds"):
        AlignmentSweep((0,), ("last",), (1,), (0,), torch.ones(1, 1, 1, 2, 3), torch.ones(1, 1, 1, 1))


# --- comparisons ------------------------------------------------------------------------------------------


def test_a_method_is_above_its_controls_by_the_paired_difference():
    das = made_comparison()["das"]
    random = das.controls["random"].per_example
    assert das.iia.value == pytest.approx(das.per_example.mean().item())
    assert das.control("random").value == pytest.approx(random.mean().item())
    above = das.above("random")
    assert above.value == pytest.approx((das.per_example - random).mean().item())
    assert (above.low, above.high) == bootstrap_difference(das.per_example, random)
    assert das.above() == above  # the better of the two


def test_the_table_of_a_comparison_has_every_control_and_difference():
    found = made_comparison()
    table = found.to_pandas().set_index("method")
    assert list(table.index) == ["full", "das", "dbm"]
    assert table.loc["dbm", "size"] == 5
    assert table.loc["das", "iia"] == pytest.approx(found["das"].iia.value)
    assert table.loc["das", "random"] == pytest.approx(found["das"].control("random").value)
    assert table.loc["das", "above_random_low"] == pytest.approx(found["das"].above("random").low)
    assert table.loc["das", "loss"] == pytest.approx(0.15)
    assert table.loc["das", ["seconds", "seeds", "examples"]].tolist() == [3.0, 2, 20]
    assert math.isnan(table.loc["full", "random"])
    assert math.isnan(table.loc["full", "loss"])


def test_a_comparison_shows_itself_as_a_table():
    found = made_comparison()
    lines = repr(found).splitlines()
    assert (
        lines[0] == "Methods at layer 3 block_output: IIA over 20 examples, 2 seeds, with intervals of 95%."
    )
    assert lines[1].split("  ")[0] == "method"
    assert [line.split("  ")[0] for line in lines[2:6]] == ["full vector", "DAS", "DBM", "no intervention"]
    assert lines[3].split() == [
        "DAS",
        "4",
        *str(found["das"].iia).split(),
        *str(found["das"].control("random")).split(),
        *str(found["das"].control("untrained")).split(),
        *str(found["das"].above()).split(),
    ]
    assert " 3–7 " in lines[4]
    assert lines[6] == "A note."
    columns = [
        lines[1].index(name) for name in ("IIA", "random subspace", "untrained model", "above the best")
    ]
    assert all(lines[3][at - 1] == " " and lines[3][at].isdigit() for at in columns)


def test_methods_and_controls_that_are_not_there_are_refused():
    found = made_comparison()
    with pytest.raises(
        iv.UnknownNameError, match=r"Unknown method 'dass' in this comparison. Did you mean 'das'?"
    ):
        found["dass"]
    with pytest.raises(iv.UnknownNameError, match=r"Unknown control 'shuffled' of 'full'."):
        found["full"].control("shuffled")
    with pytest.raises(iv.UnknownNameError, match=r"Unknown control 'random' of 'alone'."):
        MethodResult("alone", torch.ones(1, 3), torch.ones(1), torch.ones(1), 0.0).above()


def test_methods_on_other_examples_are_refused():
    das = MethodResult("das", torch.ones(1, 3), torch.ones(1), torch.ones(1), 0.0)
    with pytest.raises(iv.ConfigError, match=r"'das' has values of shape \(1, 3\). Give \[seeds, 4\]"):
        MethodComparison((das,), torch.ones(1, 4))


# --- files ------------------------------------------------------------------------------------------------


def test_a_sweep_comes_back_from_its_file_bit_by_bit(tmp_path):
    sweep = made_sweep(ranks=(1, "full", None))
    file = sweep.save(tmp_path / "found")
    assert file == tmp_path / "found" / "alignments.safetensors"
    back = AlignmentSweep.load(tmp_path / "found")
    for name in ("layers", "positions", "ranks", "seeds", "shortcuts", "settings"):
        assert getattr(back, name) == getattr(sweep, name), name
    assert torch.equal(back.per_example, sweep.per_example)
    assert torch.equal(back.loss.view(torch.int64), sweep.loss.view(torch.int64))
    assert file.read_bytes() == back.save(tmp_path / "again.safetensors").read_bytes()


def test_a_comparison_comes_back_from_its_file_bit_by_bit(tmp_path):
    found = made_comparison()
    file = found.save(tmp_path)
    assert file.name == "methods.safetensors"
    back = MethodComparison.load(file)
    assert repr(back) == repr(found)
    assert back.to_pandas().equals(found.to_pandas())
    assert back.settings == found.settings
    assert file.read_bytes() == back.save(tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("made", "noun"), [(made_sweep, "AlignmentSweep"), (made_comparison, "MethodComparison")]
)
def test_damaged_and_foreign_files_are_refused(tmp_path, made, noun):
    result = made()
    file = result.save(tmp_path / "whole.safetensors")
    content = file.read_bytes()
    for end in (0, 7, 100, len(content) // 2, len(content) - 1):
        cut = tmp_path / "cut.safetensors"
        cut.write_bytes(content[:end])
        with pytest.raises(iv.StorageError):
            type(result).load(cut)
    turned = bytearray(content)
    turned[-3] ^= 255
    (tmp_path / "turned.safetensors").write_bytes(bytes(turned))
    with pytest.raises(iv.StorageError, match=r"is damaged: what it holds is not what was written"):
        type(result).load(tmp_path / "turned.safetensors")
    other = MethodComparison if noun == "AlignmentSweep" else AlignmentSweep
    with pytest.raises(iv.StorageError, match=f"its format is 'intervenable.{noun}'"):
        other.load(file)
    with pytest.raises(FileNotFoundError):
        type(result).load(tmp_path / "nowhere.safetensors")


# --- pictures ---------------------------------------------------------------------------------------------


def texts_of(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_a_map_for_each_rank_has_the_layers_upwards_and_values_with_intervals_in_the_cells():
    sweep = made_sweep()
    figure = sweep.plot()
    maps = figure.axes[:2]
    assert [axes.get_title() for axes in maps] == ["rank 1", "full vector"]
    assert [label.get_text() for label in maps[0].get_yticklabels()] == ["0", "2"]
    assert [label.get_text() for label in maps[0].get_xticklabels()] == ["the country", "last"]
    for index, axes in enumerate(maps):
        colours = axes.collections[0].get_array()
        assert torch.equal(torch.as_tensor(colours.data).reshape(2, 2), sweep.iia[:, :, index])
        shown = texts_of(axes)
        cell = sweep.cell(layer=2, pos="last", rank=sweep.ranks[index]).iia
        assert shown[-2:] == [f"{cell.value:.2f}", f"{cell.low:.2f}–{cell.high:.2f}"]
    assert figure.axes[-1].get_ylabel() == "IIA"


def test_large_maps_have_no_values_in_their_cells():
    sweep = made_sweep(layers=tuple(range(30)), positions=tuple("abcdef"))
    assert texts_of(sweep.plot().axes[0]) == []
    shown = made_sweep(layers=tuple(range(4)), positions=tuple("abcdef"))
    assert len(texts_of(shown.plot().axes[0])) == 48
    assert texts_of(shown.plot(show_values=False).axes[0]) == []


def test_over_one_position_there_is_a_curve_with_bars_for_each_rank():
    sweep = made_sweep(layers=(0, 1, 4), positions=("last",), ranks=(1, 2))
    axes = sweep.plot().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "4"]
    curves = list(axes.containers)
    assert len(curves) == 2
    for index, container in enumerate(curves):
        assert container.lines[0].get_ydata() == pytest.approx(sweep.iia[:, 0, index].tolist())
        ends = [segment[:, 1].tolist() for segment in container.lines[2][0].get_segments()]
        expected = list(zip(sweep.low[:, 0, index].tolist(), sweep.high[:, 0, index].tolist(), strict=True))
        assert [tuple(end) for end in ends] == [pytest.approx(pair, abs=1e-6) for pair in expected]


def test_over_one_layer_there_are_dots_over_the_positions():
    axes = made_sweep(layers=(3,)).plot().axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["the country", "last"]
    assert axes.get_title(loc="left") == "block output, layer 3"


def test_marked_cells_have_a_frame_in_every_map_or_in_that_of_their_rank():
    sweep = made_sweep()
    figure = sweep.plot(marks=[(2, "last")])
    assert [len(axes.patches) for axes in figure.axes[:2]] == [1, 1]
    figure = plot_alignments(sweep, marks=[(2, "last", "full")])
    assert [len(axes.patches) for axes in figure.axes[:2]] == [0, 1]
    with pytest.raises(iv.UnknownNameError, match=r"Unknown layer 1."):
        sweep.plot(marks=[(1, "last")])
    with pytest.raises(iv.ConfigError, match=r"The mark 'last' does not say where a cell is."):
        sweep.plot(marks=["last"])


def test_a_comparison_has_a_filled_dot_for_each_method_and_open_marks_for_its_controls():
    found = made_comparison()
    figure = found.plot()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "full vector\n16 dims",
        "DAS\nrank 4",
        "DBM\n3–7 dims",
    ]
    dots = [container.lines[0] for container in axes.containers]
    filled = [dot for dot in dots if dot.get_markerfacecolor() != "white"]
    assert [dot.get_xdata()[0] for dot in filled] == pytest.approx([method.iia.value for method in found])
    assert len(dots) - len(filled) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "method",
        "random subspace",
        "untrained model",
        "no intervention",
    ]
    lines = [line for line in axes.lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in lines] == pytest.approx([found.unpatched.value])
