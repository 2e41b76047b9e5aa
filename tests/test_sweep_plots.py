"""Pictures of sweeps: each value is where its cell is, white is what no patch gives, and both runs can be found."""

from __future__ import annotations

import io
from itertools import pairwise, product

import matplotlib
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Annotation

import intervenable as iv
from intervenable.picture_labels import clipped, drawable, token_label
from intervenable.sweep_result import SweepResult

WORDS = ("The", "capital", "of", "Spain", "is")


def numbers(count):
    return tuple(map(str, range(count)))


def made(values, clean=4.0, corrupted=0.0, metric="logit", labels=None, entries=None, **settings):
    """A result of values `{axis: size}` by component, or of one tensor with its axes."""
    components, axes = values
    components = components if isinstance(components, dict) else {"block_input": components}
    longest = {axis: max(tensor.shape[i] for tensor in components.values()) for i, axis in enumerate(axes)}
    labels = {axis: (labels or {}).get(axis, numbers(size)) for axis, size in longest.items()}
    entries = {axis: (entries or {}).get(axis, tuple(range(size))) for axis, size in longest.items()}
    runs = {"clean": clean, "corrupted": corrupted}
    known = {run: {} if value is None else {metric: torch.tensor(value)} for run, value in runs.items()}
    results = {(component, metric): tensor for component, tensor in components.items()}
    return SweepResult(axes, labels, entries, results, **known, settings={"direction": "denoise"} | settings)


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def maps_of(figure):
    return [axes for axes in figure.axes[:-1] if axes.get_visible()]


def bar_of(figure):
    return figure.axes[-1]


def beside_the_bar(figure):
    return [text.get_text() for text in bar_of(figure).texts if isinstance(text, Annotation)]


def title_of(figure):
    """That of a single map, without line breaks."""
    return figure.axes[0].get_title(loc="left").replace("\n", " ")


def painted(axes, shape):
    """`[rows, columns, 3]` in the order of the matrix."""
    [mesh] = axes.collections
    colours = torch.tensor(mesh.to_rgba(mesh.get_array()), dtype=torch.float32)
    assert colours.shape == (*shape, 4)
    return colours[..., :3]


def at(share):
    return torch.tensor(to_rgb(matplotlib.colormaps["RdBu_r"](share)))


def drawn_values(axes, shape):
    [mesh] = axes.collections
    return torch.tensor(mesh.get_array().filled(torch.nan)).reshape(shape)


# --- what is white, and what the bar says ------------------------------------------------------------------


def test_the_value_of_the_patched_run_is_white_and_equal_changes_are_equally_dark():
    values = torch.tensor([[1.0, 3.0], [-1.0, 0.0]])
    figure = made((values, ("layer", "pos")), clean=3.0, corrupted=1.0).plot()
    drawn = painted(figure.axes[0], (2, 2))
    assert torch.allclose(drawn[0, 0], at(0.5), atol=2e-2)
    assert torch.allclose(drawn[0, 1], at(1.0), atol=2e-2)
    assert torch.allclose(drawn[1, 0], at(0.0), atol=2e-2)
    assert torch.allclose(drawn[1, 1], at(0.25), atol=2e-2)


def test_in_a_clean_run_that_is_patched_the_clean_value_is_white():
    values = torch.tensor([[3.0, 1.0]])
    result = made((values, ("layer", "pos")), clean=3.0, corrupted=1.0, direction="noise")
    drawn = painted(result.plot().axes[0], (1, 2))
    assert torch.allclose(drawn[0, 0], at(0.5), atol=2e-2)
    assert torch.allclose(drawn[0, 1], at(0.0), atol=2e-2)


def test_the_bar_shows_only_the_part_of_the_palette_that_there_are_values_in():
    figure = made((torch.tensor([[-0.5, 4.0]]), ("layer", "pos"))).plot()
    assert bar_of(figure).get_ylim() == (-0.5, 4.0)
    assert torch.allclose(painted(figure.axes[0], (1, 2))[0, 0], at(0.5 - 0.5 / 8), atol=2e-2)


def test_both_unpatched_runs_are_marked_at_their_values():
    figure = made((torch.tensor([[0.0, 4.0]]), ("layer", "pos")), clean=3.0, corrupted=0.5).plot()
    bar = bar_of(figure)
    lines = {tuple(line.get_ydata()) for line in bar.lines}
    assert lines == {(3.0, 3.0), (0.5, 0.5)}
    assert sorted(beside_the_bar(figure)) == ["clean", "corrupted"]
    assert bar.get_ylabel() == "logit"


def test_the_names_of_two_equal_runs_do_not_overlap():
    figure = made((torch.tensor([[0.0, 4.0]]), ("layer", "pos")), clean=1.001, corrupted=1.0).plot()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in bar_of(figure).texts]
    low, high = sorted(boxes, key=lambda box: box.y0)
    assert high.y0 - low.y0 > 0.8 * low.height


def test_small_changes_are_not_pale_because_the_other_run_is_far_away():
    figure = made((torch.tensor([[0.0, 0.1]]), ("layer", "pos")), clean=8.0).plot()
    assert torch.allclose(painted(figure.axes[0], (1, 2))[0, 1], at(1.0), atol=2e-2)
    assert bar_of(figure).get_ylim() == pytest.approx((0.0, 0.1))
    assert "clean 8 ↑" in beside_the_bar(figure)


def test_rounding_errors_are_not_coloured():
    values = torch.full((3, 5), -3.0) + 1e-6 * torch.randn(3, 5)
    figure = made((values, ("layer", "pos")), clean=5.0, corrupted=-3.0).plot()
    drawn = painted(figure.axes[0], (3, 5))
    assert torch.allclose(drawn, at(0.5).expand(3, 5, 3), atol=2e-2)
    assert bar_of(figure).get_ylim() == (-3.0, 5.0)


def test_a_result_of_nothing_but_equal_values_can_be_drawn():
    for clean, corrupted in ((0.0, 0.0), (None, None), (2.0, 2.0), (None, 2.0)):
        made((torch.full((2, 3), 2.0), ("layer", "pos")), clean, corrupted).plot().savefig(io.BytesIO())


def test_normalized_puts_the_corrupted_run_at_zero_and_the_clean_one_at_one():
    figure = made((torch.tensor([[2.0, 5.0]]), ("layer", "pos")), clean=4.0, corrupted=2.0).plot(
        normalized=True
    )
    assert torch.equal(drawn_values(figure.axes[0], (1, 2)), torch.tensor([[0.0, 1.5]]))
    assert {line.get_ydata()[0] for line in bar_of(figure).lines} == {0.0, 1.0}
    assert bar_of(figure).get_ylabel().split() == ["logit,", "normalized"]


def test_where_the_runs_are_equal_there_is_a_warning_and_nothing_but_hatching():
    for axes, values in ((("layer", "pos"), torch.rand(2, 3)), (("pos",), torch.rand(3))):
        with pytest.warns(iv.IntervenableWarning, match="same value on the clean and the corrupted run"):
            figure = made((values, axes), clean=1.0, corrupted=1.0).plot(normalized=True)
        figure.savefig(io.BytesIO())
        assert not figure.axes[0].texts


def test_whole_numbers_can_be_drawn():
    ranks = torch.tensor([[3, 0], [1, 2]])
    figure = made((ranks, ("layer", "pos")), clean=0, corrupted=3).plot()
    assert torch.equal(drawn_values(figure.axes[0], (2, 2)), ranks.float())


def test_without_the_value_of_a_run_there_is_no_mark_for_it():
    assert beside_the_bar(made((torch.rand(2, 3), ("layer", "pos")), None, None).plot()) == []


def test_limits_and_palette_can_be_chosen():
    result = made((torch.tensor([[0.0, 3.0]]), ("layer", "pos")), clean=1.0)
    assert bar_of(result.plot(limits=(-1, 1))).get_ylim() == (-1, 1)
    blues = painted(result.plot(palette="sequential").axes[0], (1, 2))
    assert torch.allclose(blues[0, 1], torch.tensor(to_rgb(matplotlib.colormaps["Blues"](1.0))), atol=1e-6)


def test_what_is_no_number_is_hatched_and_takes_no_colour():
    values = torch.tensor([[0.0, torch.nan, 4.0]])
    figure = made((values, ("layer", "pos"))).plot()
    [mesh] = figure.axes[0].collections
    assert mesh.to_rgba(mesh.get_array())[0, :, 3].tolist() == [1, 0, 1]
    assert figure.axes[0].patch.get_hatch()


# --- where the values are ----------------------------------------------------------------------------------


def numbered(*sizes):
    """A different number in each cell."""
    count = torch.tensor(sizes).prod().item()
    return torch.arange(count, dtype=torch.float32).reshape(sizes)


def test_layers_go_upwards_and_tokens_to_the_right():
    values = numbered(3, 5)
    [axes] = maps_of(made((values, ("layer", "pos")), labels={"pos": WORDS}).plot())
    assert torch.equal(drawn_values(axes, (3, 5)), values)
    assert axes.get_ylim() == (0, 3)
    assert labels(axes.xaxis) == list(WORDS)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("layer", "")


@pytest.mark.parametrize("axes", [("pos", "layer"), ("head", "layer"), ("head", "pos"), ("key", "query")])
def test_the_order_of_the_axes_does_not_change_the_picture(axes):
    values = numbered(3, 4)
    [forth] = maps_of(made((values.T, axes[::-1])).plot())
    [back] = maps_of(made((values, axes)).plot())
    shape = (4, 3) if axes != ("head", "pos") else (3, 4)
    assert torch.equal(drawn_values(forth, shape), drawn_values(back, shape))
    assert (forth.get_ylabel(), forth.get_xlabel()) == (back.get_ylabel(), back.get_xlabel())


def test_positions_without_words_are_called_so():
    [axes] = maps_of(made((numbered(2, 3), ("layer", "pos"))).plot())
    assert axes.get_xlabel() == "position"


def test_each_head_has_its_map():
    values = numbered(3, 5, 6)
    maps = maps_of(made((values, ("layer", "pos", "head"))).plot())
    assert [axes.get_title() for axes in maps] == [f"head {head}" for head in range(6)]
    for head, axes in enumerate(maps):
        assert torch.equal(drawn_values(axes, (3, 5)), values[:, :, head])


def test_queries_and_keys_of_one_layer_make_a_map_for_each_head_with_the_first_query_at_the_top():
    values = numbered(1, 3, 4, 4)
    result = made(
        (values, ("layer", "head", "query", "key")), entries={"layer": (7,)}, labels={"layer": ("7",)}
    )
    figure = result.plot()
    assert figure.get_suptitle() == "block input, clean into corrupted, layer 7"
    for head, axes in enumerate(maps_of(figure)):
        assert torch.equal(drawn_values(axes, (4, 4)), values[0, head])
        assert axes.get_ylim() == (4, 0)


def test_heads_of_few_layers_have_maps_with_both_names():
    values = numbered(2, 2, 3, 3)
    maps = maps_of(made((values, ("layer", "head", "query", "key"))).plot())
    for (layer, head), axes in zip(product(range(2), range(2)), maps, strict=True):
        assert axes.get_title() == f"layer {layer}, head {head}"
        assert torch.equal(drawn_values(axes, (3, 3)), values[layer, head])


def test_queries_and_keys_of_all_layers_become_an_overview():
    values = numbered(12, 9, 3, 3)
    [axes] = maps_of(made((values, ("layer", "head", "query", "key"))).plot())
    assert len(axes.images) == 108
    [found] = [image for image in axes.images if image.get_array().max() == values.max()]
    left, right, bottom, top = found.get_extent()
    assert 8 < left < right < 9
    assert 11 < bottom < top < 12
    assert torch.equal(torch.tensor(found.get_array().data), values[11, 8])


def test_components_stand_side_by_side_on_one_scale():
    parts = {"block_input": numbered(3, 5), "mlp_output": numbered(3, 5) / 14}
    figure = made((parts, ("layer", "pos")), clean=14.0).plot()
    maps = maps_of(figure)
    assert [axes.get_title() for axes in maps] == ["block input", "mlp output"]
    assert torch.allclose(painted(maps[0], (3, 5))[2, 4], at(1.0), atol=2e-2)
    assert torch.allclose(painted(maps[1], (3, 5))[2, 4], at(0.5 + 0.5 / 14), atol=2e-2)
    assert figure.get_suptitle() == "clean into corrupted"


def test_components_of_fewer_heads_have_narrower_maps_with_cells_of_the_same_width():
    parts = {"head_query_output": torch.rand(4, 6), "head_key_output": torch.rand(4, 2)}
    figure = made((parts, ("layer", "head"))).plot()
    figure.draw_without_rendering()
    query, key = maps_of(figure)
    assert labels(key.xaxis) == ["0", "1"]
    wide, narrow = (axes.get_window_extent().width / columns for axes, columns in ((query, 6), (key, 2)))
    assert narrow == pytest.approx(wide, rel=0.05)


def test_one_of_several_components_is_drawn_alone():
    parts = {"block_input": numbered(3, 5), "mlp_output": -numbered(3, 5)}
    figure = made((parts, ("layer", "pos"))).plot(component="mlp_output", layer=[0, 2])
    [axes] = maps_of(figure)
    assert torch.equal(drawn_values(axes, (2, 5)), -numbered(3, 5)[[0, 2]])
    assert labels(axes.yaxis) == ["0", "2"]
    assert axes.get_title(loc="left") == "mlp output, clean into corrupted"


def test_marks_are_cells_by_entry_or_label():
    result = made((numbered(3, 5), ("layer", "pos")), labels={"pos": WORDS}, entries={"layer": (4, 8, 12)})
    [axes] = maps_of(result.plot(marks=[(8, "Spain"), (12, 0)]))
    assert [(patch.get_y(), patch.get_x()) for patch in axes.patches] == [(1, 3), (2, 0)]


def test_marks_are_framed_in_the_map_that_they_belong_to():
    maps = maps_of(made((numbered(3, 5, 2), ("layer", "pos", "head"))).plot(marks=[(1, 4, 1)]))
    assert [len(axes.patches) for axes in maps] == [0, 1]
    assert (maps[1].patches[0].get_y(), maps[1].patches[0].get_x()) == (1, 4)


# --- one axis ----------------------------------------------------------------------------------------------


def test_over_layers_alone_each_component_is_a_curve_between_the_two_runs():
    parts = {"attention_output": torch.tensor([0.0, 1.0, 3.0]), "mlp_output": torch.tensor([0.5, 0.0, 0.0])}
    [axes] = made((parts, ("layer",))).plot().axes
    curves = {line.get_label(): list(line.get_ydata()) for line in axes.lines if len(line.get_xdata()) == 3}
    assert curves == {"attention output": [0.0, 1.0, 3.0], "mlp output": [0.5, 0.0, 0.0]}
    assert {line.get_ydata()[0] for line in axes.lines if len(line.get_xdata()) == 2} == {0.0, 4.0}
    assert [text.get_text() for text in axes.texts] == ["corrupted", "clean"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["attention output", "mlp output"]


def test_over_tokens_alone_bars_stand_on_the_value_of_the_patched_run():
    result = made((torch.tensor([1.0, 3.0, 0.0]), ("pos",)), corrupted=1.0, labels={"pos": ("a", "b", "c")})
    [axes] = result.plot().axes
    assert [(bar.get_y(), bar.get_height()) for bar in axes.patches] == [(1.0, 0.0), (1.0, 2.0), (1.0, -1.0)]
    assert labels(axes.xaxis) == ["a", "b", "c"]
    assert axes.get_legend() is None


def test_what_is_left_after_selecting_is_drawn_over_the_rest():
    [axes] = made((numbered(3, 5), ("layer", "pos"))).plot(pos=4).axes
    [curve] = [line for line in axes.lines if len(line.get_xdata()) == 3]
    assert list(curve.get_ydata()) == [4.0, 9.0, 14.0]
    assert title_of(axes.figure) == "block input, clean into corrupted, pos 4"


# --- what is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "title"),
    [
        ({}, "block input, clean into corrupted"),
        ({"direction": "noise"}, "block input, corrupted into clean"),
        ({"direction": "noise", "value": 0.0}, "block input set to zero in the clean run"),
        ({"direction": "noise", "value": "mean"}, "block input set to its mean in the clean run"),
        ({"direction": "noise", "value": "resample"}, "block input from other examples in the clean run"),
        ({"direction": "denoise", "value": 2.5}, "block input set to 2.5 in the corrupted run"),
        ({"direction": "noise", "value": "Tensor"}, "block input set to other values in the clean run"),
    ],
)
def test_the_title_says_what_was_put_where(settings, title):
    result = made((numbered(2, 3), ("layer", "pos")), **settings)
    assert title_of(result.plot()) == title
    assert result.plot(title="mine").axes[0].get_title(loc="left") == "mine"
    assert result.plot(title="").axes[0].get_title(loc="left") == ""


def test_tokens_are_named_from_ids_if_the_sweep_had_no_tokenizer():
    tokenizer, _ = iv.load_small_lm()
    ids = tokenizer("The capital of Spain is").input_ids
    result = made((numbered(2, 5), ("layer", "pos")), tokens=ids)
    [axes] = maps_of(result.plot(tokenizer))
    assert labels(axes.xaxis) == list(WORDS)


def test_a_sweep_without_a_tokenizer_can_be_drawn_with_its_words_later(tmp_path):
    tokenizer, model = iv.load_small_lm()
    clean, corrupted = (
        tokenizer(f"The capital of {name} is", return_tensors="pt") for name in ("Spain", "Italy")
    )
    metric = iv.metrics.logit_difference(tokenizer, " Madrid", " Rome")
    result = iv.patching.sweep(model, clean, corrupted, metric=metric, layers=[0, 4])
    loaded = SweepResult.load(result.save(tmp_path / "result.safetensors"))
    [axes] = maps_of(loaded.plot(tokenizer))
    assert labels(axes.xaxis) == ["The", "capital", "of", "Italy", "is"]
    assert torch.equal(drawn_values(axes, (2, 5)), result.values)


def test_a_tokenizer_leaves_labels_that_are_words_already():
    tokenizer, _ = iv.load_small_lm()
    result = made((numbered(2, 5), ("layer", "pos")), labels={"pos": WORDS})
    assert labels(maps_of(result.plot(tokenizer))[0].xaxis) == list(WORDS)


def test_tokens_of_any_script_are_written_or_spelled_out():
    odd = (" a", "\n\n", " ", "$x_1$", "\t", "Москва", "東", "\x00", "�", "the", "the")
    result = made((numbered(2, len(odd)), ("layer", "pos")), labels={"pos": odd})
    figure = result.plot()
    figure.savefig(io.BytesIO())  # a missing letter would be a warning, and that an error
    written = labels(figure.axes[0].xaxis)
    assert written[:6] == ["a", "↵↵", "␣", "$x_1$", "⇥", "Москва"]
    assert written[6] == drawable("東")
    assert written[7:] == [r"\x00", "�", "the", "the"]


def test_a_letter_that_no_font_has_is_written_as_an_escape():
    assert drawable("a\U0010fffdb") == r"a\U0010fffdb"


def test_long_tokens_lose_their_middle():
    assert clipped("a" * 18) == "a" * 18
    assert clipped("Rechtsschutzversicherung") == "Rechtssch…sicherung"[:9] + "…" + "icherung"
    assert len(clipped("x" * 500)) == 18


@pytest.mark.parametrize(
    ("text", "label"), [(" Spain", "Spain"), ("  ", "␣␣"), ("\r\n", "↵↵"), ("a\nb", "a↵b"), ("", "")]
)
def test_white_space_of_tokens_is_visible(text, label):
    assert token_label(text) == label


# --- how large it is ---------------------------------------------------------------------------------------

SIZES = [
    ((30, 40), ("layer", "pos")),
    ((3, 2), ("layer", "pos")),
    ((30, 9), ("layer", "head")),
    ((30, 14, 9), ("layer", "pos", "head")),
    ((32, 40, 12), ("layer", "pos", "head")),
    ((1, 4, 14, 14), ("layer", "head", "query", "key")),
    ((30,), ("layer",)),
    ((40,), ("pos",)),
]


@pytest.mark.parametrize(("sizes", "axes"), SIZES, ids=str)
def test_a_picture_fits_a_page_and_nothing_hangs_out(sizes, axes):
    words = (*(f"word{index}" for index in range(39)), "Rechtsschutzversicherungsgesellschaften")
    tokens = {
        axis: words[-size:] for axis, size in zip(axes, sizes, strict=True) if axis in ("pos", "query", "key")
    }
    figure = made((torch.randn(sizes), axes), labels=tokens).plot()
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert 0 <= box.x0 < box.x1 <= figure.get_figwidth() <= 12
    assert 0 <= box.y0 < box.y1 <= figure.get_figheight() <= 17


def test_long_titles_and_names_of_metrics_are_broken_into_lines():
    name = "expanded_head_attention_value_output_of_a_module_with_a_name"
    result = made(({name: torch.randn(3, 2)}, ("layer", "pos")), metric="logarithm_of_the_probability_of_it")
    figure = result.plot(normalized=True)
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert 0 <= box.x0 < box.x1 <= figure.get_figwidth()
    assert 0 <= box.y0 < box.y1 <= figure.get_figheight()


def test_a_title_keeps_clear_of_the_note_above_the_bar():
    parts = {"expanded_head_attention_value_output": torch.rand(6, 6)}
    figure = made(
        (parts, ("layer", "head")), clean=10.6, direction="noise", value=0.25, corrupted=100.0
    ).plot()
    figure.draw_without_rendering()
    [note] = [text for text in bar_of(figure).texts if "↑" in text.get_text()]
    title = figure.axes[0]._left_title.get_window_extent()
    assert not title.overlaps(note.get_window_extent())


def test_thirty_layers_by_forty_tokens_get_a_label_each_and_none_overlap():
    words = tuple(f"word{index}" for index in range(40))
    figure = made((torch.randn(30, 40), ("layer", "pos")), labels={"pos": words}).plot()
    figure.draw_without_rendering()
    [axes] = maps_of(figure)
    assert labels(axes.xaxis) == list(words)
    assert labels(axes.yaxis) == list(numbers(30))
    boxes = sorted((text.get_window_extent() for text in axes.get_yticklabels()), key=lambda box: box.y0)
    assert min(b.y0 - a.y0 for a, b in pairwise(boxes)) > 0.8 * max(box.height for box in boxes)
    x = sorted(axes.transData.transform((place, 0))[0] for place in axes.get_xticks())
    assert (x[1] - x[0]) * 0.82 > axes.get_xticklabels()[0].get_fontsize() / 72 * figure.dpi  # sin 55°


def test_values_are_written_into_small_maps_only():
    small = made((torch.tensor([[0.0, -1.25, torch.nan]]), ("layer", "pos")))
    assert [text.get_text() for text in small.plot().axes[0].texts] == ["0.00", "−1.25"]
    assert not made((torch.rand(30, 40), ("layer", "pos"))).plot().axes[0].texts
    assert not small.plot(show_values=False).axes[0].texts


# --- what cannot be drawn ----------------------------------------------------------------------------------


def test_of_several_metrics_one_must_be_chosen():
    values = {("block_input", "logit"): numbered(2, 3), ("block_input", "rank"): -numbered(2, 3)}
    result = SweepResult(
        ("layer", "pos"),
        {"layer": ("0", "1"), "pos": numbers(3)},
        {"layer": (0, 1), "pos": (0, 1, 2)},
        values,
    )
    with pytest.raises(iv.MetricError) as caught:
        result.plot()
    assert str(caught.value) == (
        "A picture shows one metric, and there are several: 'logit', 'rank'. Choose one: metric='logit'."
    )
    [axes] = maps_of(result.plot(metric="rank"))
    assert torch.equal(drawn_values(axes, (2, 3)), -numbered(2, 3))


def test_of_several_numbers_for_each_cell_the_mean_can_be_drawn():
    result = made((numbered(2, 3, 4), ("layer", "pos")), None, None)
    with pytest.raises(iv.MetricError) as caught:
        result.plot()
    assert str(caught.value) == (
        "'logit' gave values of shape (4,) for each cell, and a cell of a picture shows one number. Draw their mean:"
        " result.mean().plot()."
    )
    assert torch.equal(drawn_values(result.mean().plot().axes[0], (2, 3)), numbered(2, 3, 4).mean(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"marks": [(1,)]},
            "The mark (1,) does not say where a cell is. Give an entry or a label for each of",
        ),
        ({"marks": ["is"]}, "The mark 'is' does not say where a cell is."),
        ({"marks": [(9, 0)]}, "Unknown entry of the axis 'layer': 9."),
        ({"head": 1}, "Unknown axis 'head'."),
        ({"component": "mlp"}, "Unknown component 'mlp'."),
        ({"layer": 0, "pos": 0}, "There is one value and no axis left to draw it over. Select less."),
        ({"palette": "jet"}, "palette='jet' is unknown. Allowed: auto, diverging, sequential."),
        ({"across": -1, "palette": "auto"}, "across=-1: give at least 1 map in a row."),
        ({"pos": 0, "marks": [(1, 0)]}, "The mark (1, 0) does not say where a cell is."),
        ({"pos": 0, "marks": [(1,)]}, "Marks frame cells of maps, and over one axis there are none."),
        ({"limits": (2, 1)}, "limits=(2, 1): the first must be less than the second."),
    ],
)
def test_what_cannot_be_drawn_is_said(options, message):
    parts = {"block_input": numbered(3, 5), "mlp_output": numbered(3, 5)}
    with pytest.raises(iv.IntervenableError) as caught:
        made((parts, ("layer", "pos"))).plot(**options)
    assert str(caught.value).startswith(message)


def test_more_maps_than_a_picture_holds_are_refused_with_the_way_out():
    result = made((torch.rand(2, 3, 70), ("layer", "pos", "head")))
    with pytest.raises(iv.ConfigError) as caught:
        result.plot()
    assert (
        str(caught.value)
        == "This would be 70 maps, and one picture holds 64. Choose some: .plot(head=[0, 1])."
    )


def test_a_tokenizer_is_of_no_use_where_the_tokens_are_not_known():
    tokenizer, _ = iv.load_small_lm()
    with pytest.raises(iv.ConfigError) as caught:
        made((numbered(2, 5), ("layer", "pos"))).plot(tokenizer)
    assert str(caught.value) == (
        "The result does not know its tokens, so a tokenizer cannot name them. Give it to the sweep itself:"
        " sweep(..., tokenizer=tokenizer)."
    )
