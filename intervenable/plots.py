"""Pictures: what an intervention does, layer by layer and token by token, and who attends to whom.

`plot_sweep` draws the result of a patching sweep, and is its `plot`. The others draw any matrices.
Each function returns a figure and keeps nothing: notebooks show it, `figure.savefig("name.png")` writes it. They need
matplotlib, which comes with `pip install "intervenable[plots]"`.

Colours say which kind of number is shown: one hue from white at 0 upwards for probabilities and other amounts, blue
through white at 0 to red for differences. Both stay apart in every kind of colour vision, and in print.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from intervenable.attention_panels import Head, Panel, panels_of, without_future
from intervenable.colour_scale import Scale
from intervenable.drawing import MISSING, Cell, Palette, Picture, checked, names_of
from intervenable.errors import InputError
from intervenable.map_grids import Map, draw_maps, draw_overview, large_grid, small_grid, square_grid
from intervenable.picture_labels import token_label
from intervenable.sweep_plots import plot_sweep
from intervenable.token_text import Decodes

__all__ = [
    "MISSING",
    "Palette",
    "Picture",
    "attention_maps",
    "head_maps",
    "heat_map",
    "plot_sweep",
    "token_labels",
]


def token_labels(tokenizer: Decodes, tokens: Iterable[int]) -> list[str]:
    r"""Tokens as labels of an axis: without the space before a word, and with spaces and line breaks visible.

    Args:
        tokenizer: Decodes token ids.
        tokens: Ids of one text, such as `inputs.input_ids[0]`.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, _ = load_small_lm()
        >>> token_labels(tokenizer, tokenizer("The capital of Spain is").input_ids)
        ['The', 'capital', 'of', 'Spain', 'is']
    """
    return [token_label(tokenizer.decode([int(token)])) for token in tokens]


def heat_map(
    values: Tensor,
    row_labels: Sequence[object] | None = None,
    column_labels: Sequence[object] | None = None,
    title: str = "",
    value_label: str = "",
    *,
    row_axis: str = "layer",
    column_axis: str = "",
    palette: Palette = "auto",
    limits: tuple[float, float] | None = None,
    centre: float | None = None,
    landmarks: Mapping[str, float] | None = None,
    marks: Iterable[Cell] = (),
    show_values: bool | None = None,
) -> Picture:
    """Draw a matrix, as a rule of layers by tokens, the first row at the bottom: upwards is deeper in the model.

    Args:
        values: `[rows, columns]`. What is not a finite number stays grey.
        row_labels: One for each row; their numbers by default.
        column_labels: One for each column, such as `token_labels` gives; their numbers by default. A label may have
            several lines.
        title: What the picture shows. Empty for none.
        value_label: What the colours mean.
        row_axis: What the rows are.
        column_axis: What the columns are. Empty for none: words explain themselves.
        palette: `sequential`, `diverging`, or `auto`: diverging if any value is negative.
        limits: Values at the ends of the colour bar; by default from the values, from 0 up or symmetric around 0.
        centre: The value that is white, with a diverging palette: what nothing happening looks like.
        landmarks: Values to mark beside the colour bar, by name.
        marks: Cells `(row, column)` to put a frame around.
        show_values: Whether to write the values into the cells; by default in matrices of up to 80 cells.

    Raises:
        InputError: values that are no matrix, labels of another number, limits that cannot be, or marks outside.

    Example:
        >>> figure = heat_map(torch.rand(6, 3), column_labels=["The", "capital", "is"], value_label="probability")
        >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
        ['The', 'capital', 'is']
    """
    matrix = checked(values, ("rows", "columns"))
    rows, columns = matrix.shape
    row_names = names_of(row_labels, rows, "row")
    column_names = names_of(column_labels, columns, "column")
    scale = Scale(matrix, palette, limits, centre, landmarks)
    cells = []
    for row, column in marks:
        if not (-rows <= row < rows and -columns <= column < columns):
            raise InputError(f"The mark {(row, column)} is outside of the {rows} rows and {columns} columns.")
        cells.append((row % rows, column % columns))
    grid = large_grid(rows, column_names, show_values if show_values is not None else rows * columns <= 80)
    panel = Map("", matrix, column_names, cells)
    return draw_maps([panel], row_names, scale, grid, title, value_label, row_axis, column_axis)


def head_maps(
    values: Tensor,
    row_labels: Sequence[object] | None = None,
    column_labels: Sequence[object] | None = None,
    title: str = "",
    value_label: str = "",
    *,
    head_labels: Sequence[object] | None = None,
    row_axis: str = "layer",
    column_axis: str = "",
    palette: Palette = "auto",
    limits: tuple[float, float] | None = None,
    centre: float | None = None,
    landmarks: Mapping[str, float] | None = None,
    across: int | None = None,
) -> Picture:
    """Draw one small heat map for each head, all on one scale.

    Args:
        values: `[heads, rows, columns]`, as a rule `[heads, layers, positions]`. What is not a finite number stays
            grey.
        head_labels: One for each head; `head 0`, `head 1`, ... by default.
        across: How many maps stand in a row; by default as many as fit a page, evenly.
        row_labels, column_labels, title, value_label, row_axis, column_axis: See `heat_map`.
        palette, limits, centre, landmarks: See `heat_map`.

    Raises:
        InputError: values of other axes, labels of another number, or limits that cannot be.

    Example:
        >>> figure = head_maps(torch.rand(6, 4, 5) - 0.5, title="by head")
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['head 0', 'head 1', 'head 2']
    """
    maps = checked(values, ("heads", "rows", "columns"))
    heads, rows, columns = maps.shape
    row_names = names_of(row_labels, rows, "row")
    column_names = names_of(column_labels, columns, "column")
    head_names = names_of(head_labels, heads, "head", "head {}")
    scale = Scale(maps, palette, limits, centre, landmarks)
    panels = [Map(name, matrix, column_names) for name, matrix in zip(head_names, maps, strict=True)]
    grid = small_grid(heads, rows, columns, across)
    return draw_maps(panels, row_names, scale, grid, title, value_label, row_axis, column_axis)


def attention_maps(
    patterns: Tensor | Mapping[Any, Tensor],
    tokens: Sequence[object] | None = None,
    title: str = "",
    value_label: str = "attention weight",
    *,
    query_tokens: Sequence[object] | None = None,
    key_tokens: Sequence[object] | None = None,
    layers: Iterable[int] | None = None,
    heads: Iterable[Head] | None = None,
    example: int = 0,
    palette: Palette = "auto",
    limits: tuple[float, float] | None = None,
    across: int | None = None,
) -> Picture:
    """Draw attention matrices, one small map for each head, all on one scale: who (rows) reads whom (columns).

    The first query is at the top, as in any picture of attention. What a causal mask hides stays grey. Heads of one
    layer, or heads chosen with their layers, have their tokens beside them. All heads of several layers become an
    overview without tokens, a row of maps for each layer, deeper layers higher up.

    Args:
        patterns: `[heads, queries, keys]`, `[layers, heads, queries, keys]`, or an `ActivationCache` with the
            matrices of one component, as `collect` gives.
        tokens: One label for each token, such as `token_labels` gives; their numbers by default.
        title: What the picture shows. Empty for none.
        value_label: What the colours mean.
        query_tokens: Labels of the rows, where they differ from those of the columns.
        key_tokens: Labels of the columns.
        layers: Which layers to show; all by default.
        heads: Which heads to show: numbers, or pairs `(layer, head)` in any order; all by default.
        example: Which example of a cache.
        across: How many maps stand in a row; by default as many as fit a page, evenly. An overview has a column for
            each head instead.
        palette, limits: See `heat_map`. As a rule the first token takes most of what heads have to give, and lower
            limits, such as (0, 0.3), show the rest.

    Raises:
        InputError: patterns of another shape; a layer, head or example that is not there; labels of another number.

    Example:
        >>> import intervenable as iv
        >>> tokenizer, model = iv.load_small_lm()
        >>> cache = iv.collect(model, "The capital of Spain is", "attention_pattern", [3, 4], tokenizer=tokenizer)
        >>> words = ["The", "capital", "of", "Spain", "is"]
        >>> figure = attention_maps(cache, words, heads=[(4, 1), (3, 0)])
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['layer 4, head 1', 'layer 3, head 0']
    """
    chosen = None if heads is None else list(heads)
    panels = without_future(panels_of(patterns, layers, chosen, example))
    shapes = {tuple(panel.matrix.shape) for panel in panels}
    if len(shapes) > 1:
        raise InputError(
            f"The matrices have shapes {sorted(shapes)}. Draw those of one shape in a picture of their own."
        )
    [(queries, keys)] = shapes
    query_names = names_of(tokens if query_tokens is None else query_tokens, queries, "query")
    key_names = names_of(tokens if key_tokens is None else key_tokens, keys, "key")
    scale = Scale(torch.stack([panel.matrix for panel in panels]), palette, limits)
    in_pairs = chosen is not None and isinstance(chosen[0], tuple)
    if in_pairs or len({panel.layer for panel in panels}) == 1:
        return _side_by_side(panels, query_names, key_names, scale, title, value_label, across)
    if across is not None:
        raise InputError(
            f"across={across}: an overview of several layers has a column for each head. Leave it out."
        )
    return _overview(panels, scale, title, value_label)


def _side_by_side(
    panels: Sequence[Panel],
    query_names: list[str],
    key_names: list[str],
    scale: Scale,
    title: str,
    value_label: str,
    across: int | None,
) -> Picture:
    count, queries, keys = len(panels), len(query_names), len(key_names)
    maps = [Map(panel.name, panel.matrix, key_names) for panel in panels]
    return draw_maps(maps, query_names, scale, square_grid(count, queries, keys, across), title, value_label)


def _overview(panels: Sequence[Panel], scale: Scale, title: str, value_label: str) -> Picture:
    rows = [list(row) for _, row in groupby(panels, key=lambda panel: panel.layer)]
    return draw_overview(
        [[panel.matrix for panel in row] for row in rows],
        [str(row[0].layer) for row in rows],
        [str(panel.head) for panel in max(rows, key=len)],
        scale,
        title,
        value_label,
        ("layer", "head"),
    )
