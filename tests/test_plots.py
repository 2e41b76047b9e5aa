"""Pictures: what is drawn is what was given, and it is said what cannot be drawn."""

from __future__ import annotations

import io
import subprocess
import sys
from itertools import pairwise

import matplotlib
import pytest
import torch
from matplotlib.colors import to_rgb

import intervenable as iv

WORDS = ["The", "capital", "of", "Spain", "is"]


def colours(axes, shape):
    """The colours that the cells of a map are painted in, `[rows, columns, 3]`."""
    [mesh] = axes.collections
    painted = torch.tensor(mesh.to_rgba(mesh.get_array()), dtype=torch.float32)
    assert painted.shape == (*shape, 4)
    return painted[..., :3]


def at(palette, share):
    return torch.tensor(to_rgb(matplotlib.colormaps[palette](share)))


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def maps_of(figure):
    """Its axes without the colour bar."""
    return [axes for axes in figure.axes[:-1] if axes.get_visible()]


def bar_of(figure):
    return figure.axes[-1]


# --- one map ----------------------------------------------------------------------------------------------


def test_amounts_go_from_pale_at_zero_to_dark_at_the_highest():
    figure = iv.plots.heat_map(torch.tensor([[0.0, 0.2], [0.1, 0.4]]))
    drawn = colours(figure.axes[0], (2, 2))
    assert torch.allclose(drawn[0, 0], at("Blues", 0.0), atol=1e-6)
    assert torch.allclose(drawn[1, 1], at("Blues", 1.0), atol=1e-6)
    assert drawn[0, 0].sum() > drawn[1, 0].sum() > drawn[0, 1].sum() > drawn[1, 1].sum()


def test_differences_are_white_at_zero_and_as_red_as_they_could_be_blue():
    figure = iv.plots.heat_map(torch.tensor([[-1.0, 0.0, 4.0]]))
    drawn = colours(figure.axes[0], (1, 3))
    assert torch.allclose(drawn[0, 1], at("RdBu_r", 0.5), atol=1e-6)
    assert torch.allclose(drawn[0, 2], at("RdBu_r", 1.0), atol=1e-6)
    assert torch.allclose(drawn[0, 0], at("RdBu_r", 0.375), atol=1e-2)


def test_the_palette_can_be_chosen():
    figure = iv.plots.heat_map(torch.tensor([[0.0, 4.0]]), palette="diverging")
    assert torch.allclose(colours(figure.axes[0], (1, 2))[0, 0], at("RdBu_r", 0.5), atol=1e-6)


def test_limits_are_the_ends_of_the_colour_bar():
    figure = iv.plots.heat_map(torch.tensor([[0.0, 0.5]]), limits=(0, 1))
    assert bar_of(figure).get_ylim() == (0, 1)
    assert torch.allclose(colours(figure.axes[0], (1, 2))[0, 1], at("Blues", 0.5), atol=1e-2)


def test_the_first_row_is_at_the_bottom():
    figure = iv.plots.heat_map(torch.rand(3, 5))
    axes = figure.axes[0]
    assert labels(axes.yaxis) == ["0", "1", "2"]
    assert list(axes.get_yticks()) == [0.5, 1.5, 2.5]
    assert axes.get_ylim() == (0, 3)


def test_labels_title_and_meaning_of_the_colours_are_written():
    figure = iv.plots.heat_map(
        torch.rand(2, 5), ["low", "high"], WORDS, "a title", "a value", column_axis="token"
    )
    axes = figure.axes[0]
    assert labels(axes.xaxis) == WORDS
    assert labels(axes.yaxis) == ["low", "high"]
    assert axes.get_title(loc="left") == "a title"
    assert axes.get_xlabel() == "token"
    assert bar_of(figure).get_ylabel() == "a value"


def test_thirty_layers_by_forty_tokens_get_a_label_each_and_none_overlap():
    words = [f"word{index}" for index in range(40)]
    figure = iv.plots.heat_map(torch.rand(30, 40), column_labels=words)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    assert labels(axes.xaxis) == words
    heights = sorted(text.get_window_extent().y0 for text in axes.get_yticklabels())
    tallest = max(text.get_window_extent().height for text in axes.get_yticklabels())
    assert len(heights) == 30
    assert min(b - a for a, b in pairwise(heights)) > 0.8 * tallest
    # Slanted text overlaps its neighbour if the lines are nearer to each other than they are high.
    x = sorted(axes.transData.transform((place, 0))[0] for place in axes.get_xticks())
    size = axes.get_xticklabels()[0].get_fontsize() / 72 * figure.dpi
    assert (x[1] - x[0]) * 0.82 > size  # sin 55°


def test_everything_stays_within_the_picture():
    long = ["Netherlands\n← Liechtenstein"] * 5
    for figure in (
        iv.plots.heat_map(torch.rand(4, 5), column_labels=long, title="t", value_label="v"),
        iv.plots.head_maps(torch.rand(5, 4, 5), column_labels=long, title="t", value_label="v"),
    ):
        figure.draw_without_rendering()
        box = figure.get_tightbbox()
        assert 0 <= box.x0 < box.x1 <= figure.get_figwidth()
        assert 0 <= box.y0 < box.y1 <= figure.get_figheight()


def test_dollar_signs_are_letters_and_not_mathematics():
    figure = iv.plots.heat_map(torch.rand(1, 2), ["$r$"], ["$x_$", "$5"], "$t_$", "$v_$")
    figure.savefig(io.BytesIO())
    assert labels(figure.axes[0].xaxis) == ["$x_$", "$5"]


def test_values_are_written_into_the_cells_of_a_small_map_only():
    small, large = torch.full((2, 2), 0.25), torch.rand(30, 40)
    assert [text.get_text() for text in iv.plots.heat_map(small).axes[0].texts] == ["0.25"] * 4
    assert not iv.plots.heat_map(large).axes[0].texts
    assert not iv.plots.heat_map(small, show_values=False).axes[0].texts


def test_what_is_no_number_stays_grey_and_without_a_value():
    figure = iv.plots.heat_map(torch.tensor([[0.5, torch.nan, torch.inf]]))
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.50"]
    [mesh] = axes.collections
    assert mesh.to_rgba(mesh.get_array())[0, :, 3].tolist() == [1, 0, 0]  # opacity
    assert to_rgb(axes.get_facecolor()) == to_rgb(iv.plots.MISSING)


def test_marks_frame_their_cells():
    figure = iv.plots.heat_map(torch.rand(3, 5), marks=[(2, 4), (-3, 0)])
    frames = [(patch.get_y(), patch.get_x()) for patch in figure.axes[0].patches]
    assert frames == [(2, 4), (0, 0)]


def test_gradients_and_half_precision_can_be_drawn():
    values = torch.rand(2, 2, dtype=torch.bfloat16, requires_grad=True)
    iv.plots.heat_map(values).savefig(io.BytesIO())


def test_a_matrix_of_zeros_has_a_scale():
    figure = iv.plots.heat_map(torch.zeros(2, 2))
    assert bar_of(figure).get_ylim() == (0, 1)


def test_a_figure_shows_itself_in_a_notebook_and_no_global_state_keeps_it():
    figure = iv.plots.heat_map(torch.rand(2, 2))
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


# --- a map for each head ----------------------------------------------------------------------------------


def test_each_head_has_its_map_and_all_have_one_scale():
    values = torch.zeros(6, 3, 5)
    values[1, 2, 4], values[5, 0, 0] = 1.0, 2.0
    maps = maps_of(iv.plots.head_maps(values, column_labels=WORDS))
    assert [axes.get_title() for axes in maps] == [f"head {head}" for head in range(6)]
    assert torch.allclose(colours(maps[5], (3, 5))[0, 0], at("Blues", 1.0), atol=1e-6)
    assert torch.allclose(colours(maps[1], (3, 5))[2, 4], at("Blues", 0.5), atol=1e-2)
    assert torch.allclose(colours(maps[1], (3, 5))[0, 0], at("Blues", 0.0), atol=1e-6)


@pytest.mark.parametrize(("heads", "across"), [(5, 3), (6, 3), (1, None), (9, None)])
def test_every_column_of_maps_has_words_below_it(heads, across):
    maps = maps_of(iv.plots.head_maps(torch.rand(heads, 3, 5), column_labels=WORDS, across=across))
    assert len(maps) == heads
    columns = {}
    for axes in maps:  # the last of each column is the lowest
        columns[axes.get_subplotspec().colspan.start] = axes
    for axes in columns.values():
        assert labels(axes.xaxis) == WORDS
        assert axes.xaxis.get_tick_params()["labelbottom"]


def test_many_heads_keep_to_the_width_of_a_page_and_become_small():
    figure = iv.plots.head_maps(torch.rand(32, 30, 14))
    assert figure.get_figwidth() < 12
    assert figure.get_figheight() < 20
    assert len(maps_of(figure)) == 32


# --- attention --------------------------------------------------------------------------------------------


def causal(*shape):
    """Attention patterns of a causal model, `[..., heads, queries, keys]`."""
    scores = torch.rand(shape)
    above = torch.ones(shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(above, -torch.inf).softmax(-1)


def test_the_first_query_is_at_the_top_and_the_first_key_at_the_left():
    patterns = torch.zeros(1, 3, 5)
    patterns[0, 0, 4] = 1.0
    [axes] = maps_of(iv.plots.attention_maps(patterns, query_tokens=["a", "b", "c"], key_tokens=WORDS))
    assert axes.get_ylim() == (3, 0)
    assert labels(axes.yaxis) == ["a", "b", "c"]
    assert labels(axes.xaxis) == WORDS
    assert torch.allclose(colours(axes, (3, 5))[0, 4], at("Blues", 1.0), atol=1e-6)


def test_heads_of_attention_have_one_scale_from_zero():
    patterns = causal(4, 5, 5) * torch.tensor([1.0, 0.5, 0.25, 0.125]).view(4, 1, 1)
    figure = iv.plots.attention_maps(patterns, WORDS)
    assert bar_of(figure).get_ylim() == (0, 1)
    assert [axes.get_title() for axes in maps_of(figure)] == ["head 0", "head 1", "head 2", "head 3"]
    for axes, share in zip(maps_of(figure), (1.0, 0.5, 0.25, 0.125), strict=True):
        assert torch.allclose(colours(axes, (5, 5))[0, 0], at("Blues", share), atol=1e-2)


def drawn(axes, shape):
    """Which cells have a colour."""
    [mesh] = axes.collections
    return torch.tensor(mesh.to_rgba(mesh.get_array()))[..., 3].view(shape).bool()


def test_what_a_causal_mask_hides_stays_empty():
    [axes] = maps_of(iv.plots.attention_maps(causal(1, 5, 5), WORDS))
    assert torch.equal(drawn(axes, (5, 5)), torch.ones(5, 5, dtype=torch.bool).tril())


def test_a_model_that_looks_ahead_has_its_whole_matrices_drawn():
    patterns = causal(2, 5, 5)
    patterns[1, 0, 4] = 0.01
    for axes in maps_of(iv.plots.attention_maps(patterns, WORDS)):
        assert drawn(axes, (5, 5)).all()


def test_scores_that_are_hidden_stay_empty_and_negative_ones_are_blue():
    scores = torch.tensor([[[-2.0, -torch.inf], [1.0, 0.0]]])
    [axes] = maps_of(iv.plots.attention_maps(scores))
    assert drawn(axes, (2, 2)).tolist() == [[True, False], [True, True]]
    assert torch.allclose(colours(axes, (2, 2))[0, 0], at("RdBu_r", 0.0), atol=1e-6)


def test_heads_are_chosen_with_their_layers_and_keep_the_given_order():
    patterns = torch.zeros(3, 4, 2, 2)
    patterns[2, 1, 1, 0], patterns[0, 3, 0, 0] = 1.0, 1.0
    maps = maps_of(iv.plots.attention_maps(patterns, heads=[(2, 1), (0, 3)]))
    assert [axes.get_title() for axes in maps] == ["layer 2, head 1", "layer 0, head 3"]
    for axes, cell in zip(maps, ((1, 0), (0, 0)), strict=True):
        assert torch.allclose(colours(axes, (2, 2))[cell], at("Blues", 1.0), atol=1e-6)


def test_attention_is_drawn_from_a_cache_for_one_of_its_examples():
    tokenizer, lm = iv.load_small_lm()
    texts = ["The capital of Spain is", "The capital of Italy is"]
    cache = iv.collect(lm, texts, "attention_pattern", layers=[2, 4], tokenizer=tokenizer)
    [axes] = maps_of(iv.plots.attention_maps(cache, WORDS, layers=[4], heads=[3], example=1, limits=(0, 1)))
    assert axes.get_title() == "layer 4, head 3"
    wanted = cache["attention_pattern", 4][1, 3]
    for query, key in ((4, 3), (4, 4), (3, 1)):
        shade = at("Blues", wanted[query, key].item())
        assert torch.allclose(colours(axes, (5, 5))[query, key], shade, atol=1e-2)


def test_all_layers_make_an_overview_with_the_deepest_at_the_top():
    patterns = torch.zeros(3, 2, 4, 4)
    patterns[2, 1, 3, 0] = 1.0
    [axes] = maps_of(iv.plots.attention_maps(patterns))
    assert labels(axes.yaxis) == ["0", "1", "2"]
    assert labels(axes.xaxis) == ["0", "1"]
    assert axes.get_ylim() == (0, 3)
    [found] = [image for image in axes.images if image.get_array().max() == 1.0]
    assert found.origin == "upper"
    left, right, bottom, top = found.get_extent()
    assert 1 < left < right < 2
    assert 2 < bottom < top < 3
    assert found.get_array()[3, 0] == 1.0
    assert found.get_array().mask.sum() == 6  # above the diagonal


def test_an_overview_of_270_heads_fits_a_page():
    figure = iv.plots.attention_maps(causal(30, 9, 6, 6))
    assert figure.get_figwidth() < 12
    assert figure.get_figheight() < 15
    assert len(figure.axes[0].images) == 270


def test_nine_heads_of_thirty_tokens_have_words_that_can_be_told_apart():
    words = [f"word{index}" for index in range(30)]
    figure = iv.plots.attention_maps(causal(9, 30, 30), words)
    figure.draw_without_rendering()
    assert figure.get_figwidth() < 12
    assert figure.get_figheight() < 12
    first = figure.axes[0]
    assert labels(first.yaxis) == words
    boxes = sorted((text.get_window_extent() for text in first.get_yticklabels()), key=lambda box: box.y0)
    assert min(b.y0 - a.y0 for a, b in pairwise(boxes)) > 0.8 * max(box.height for box in boxes)
    lowest = figure.axes[6]
    assert labels(lowest.xaxis) == words
    x = sorted(lowest.transData.transform((place, 0))[0] for place in lowest.get_xticks())
    assert (x[1] - x[0]) * 0.82 > lowest.get_xticklabels()[0].get_fontsize() / 72 * figure.dpi


def test_of_very_many_tokens_some_are_named():
    words = [f"word{index}" for index in range(120)]
    figure = iv.plots.attention_maps(causal(4, 120, 120), words)
    shown = labels(figure.axes[0].yaxis)
    assert 1 < len(shown) < 120
    assert shown == words[:: 120 // len(shown)]
    assert figure.get_figwidth() < 12


# --- labels and faults ------------------------------------------------------------------------------------


class Letters:
    """A tokenizer of single characters."""

    def decode(self, token_ids):
        return "".join(map(chr, token_ids))


def test_tokens_of_white_space_are_made_visible():
    assert iv.plots.token_labels(Letters(), map(ord, "a \n")) == ["a", "␣", "↵"]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: iv.plots.heat_map(torch.rand(2, 3, 4)),
            "The values have shape (2, 3, 4); give [rows, columns], none of them 0.",
        ),
        (
            lambda: iv.plots.heat_map(torch.rand(0, 3)),
            "The values have shape (0, 3); give [rows, columns], none of them 0.",
        ),
        (
            lambda: iv.plots.head_maps(torch.rand(3, 4)),
            "The values have shape (3, 4); give [heads, rows, columns], none of them 0.",
        ),
        (
            lambda: iv.plots.heat_map(torch.rand(2, 3), column_labels=WORDS),
            "There are 5 column labels for 3 columns. Give one for each.",
        ),
        (
            lambda: iv.plots.heat_map(torch.rand(2, 3), row_labels=["one"]),
            "There are 1 row labels for 2 rows. Give one for each.",
        ),
        (
            lambda: iv.plots.head_maps(torch.rand(2, 3, 1), head_labels=["one"]),
            "There are 1 head labels for 2 heads. Give one for each.",
        ),
        (
            lambda: iv.plots.heat_map(torch.rand(2, 3), palette="jet"),
            "palette='jet' is unknown. Allowed: auto, diverging, sequential.",
        ),
        (
            lambda: iv.plots.heat_map(torch.rand(2, 3), limits=(1, 0)),
            "limits=(1, 0): the first must be less than the second.",
        ),
        (
            lambda: iv.plots.heat_map(torch.rand(2, 3), marks=[(2, 0)]),
            "The mark (2, 0) is outside of the 2 rows and 3 columns.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(3, 4)),
            "The patterns have shape (3, 4); give [heads, queries, keys] or [layers, heads, queries, keys], none of"
            " them 0.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(6, 5, 5), WORDS[:3]),
            "There are 3 query labels for 5 queries. Give one for each.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(6, 5, 5), heads=[6]),
            "There is no head 6: heads are 0 to 5.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(2, 6, 5, 5), heads=[(1, 7)]),
            "There is no head 7 of layer 1: heads are 0 to 5.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(2, 6, 5, 5), layers=[2]),
            "There is no layer 2 in the patterns. They have: 0, 1.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(6, 5, 5), layers=[2]),
            "There is no layer 2 in the patterns. They have none.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(2, 6, 5, 5), layers=[]),
            "layers=[] and heads=None leave nothing to draw. Give at least one.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(6, 5, 5), heads=[(1, 2)]),
            "heads=[(1, 2)] names layers, and the patterns [heads, queries, keys] have none. Give numbers of heads.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(2, 6, 5, 5), heads=[(1, 2), 3]),
            "heads=[(1, 2), 3] names heads with their layers. Give pairs (layer, head) alone, and no layers, or"
            " numbers of heads that hold for each layer.",
        ),
        (
            lambda: iv.plots.attention_maps(torch.rand(2, 6, 5, 5), across=2),
            "across=2: an overview of several layers has a column for each head. Leave it out.",
        ),
        (
            lambda: iv.plots.attention_maps({("block_output", 1): torch.rand(1, 5, 16)}),
            "A picture shows the attention matrices of one component, and the mapping has none. Give one with"
            " ('attention_pattern', layer), or a tensor.",
        ),
        (
            lambda: iv.plots.attention_maps({("attention_pattern", 1): torch.rand(2, 6, 5, 5)}, example=2),
            "There is no example 2: 'attention_pattern' of layer 1 has 2 example(s).",
        ),
        (
            lambda: iv.plots.attention_maps(
                {
                    ("attention_pattern", 0): torch.rand(1, 6, 5, 5),
                    ("attention_pattern", 1): torch.rand(1, 6, 5, 4),
                }
            ),
            "The matrices have shapes [(5, 4), (5, 5)]. Draw those of one shape in a picture of their own.",
        ),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, message):
    with pytest.raises(iv.InputError) as caught:
        draw()
    assert str(caught.value) == message


# --- the extra --------------------------------------------------------------------------------------------


def in_a_new_process(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_library_loads_no_plotting():
    found = in_a_new_process(
        "import sys, intervenable as iv\n"
        "print(sorted({'matplotlib', 'pandas', 'plotnine', 'intervenable.plots'} & set(sys.modules)))\n"
        "iv.plots.heat_map\n"
        "print('intervenable.plots' in sys.modules)"
    )
    assert found.stdout == "[]\nTrue\n", found.stderr


def test_without_the_extra_a_picture_says_which_one_brings_it():
    found = in_a_new_process(
        "import sys; sys.modules['matplotlib'] = None\n"
        "import intervenable as iv\n"
        "try: iv.plots\n"
        "except iv.MissingExtraError as error: print(isinstance(error, ImportError), error)"
    )
    assert found.stdout.startswith("True Pictures need matplotlib, which is not installed ("), found.stderr
    assert found.stdout.endswith(' Run: pip install "intervenable[plots]"\n')
