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
