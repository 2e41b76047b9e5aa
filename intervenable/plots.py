"""Pictures of a sweep: what an intervention does, layer by layer and token by token.

Each function returns a figure and keeps nothing: notebooks show it, `figure.savefig("name.png")` writes it.
They need matplotlib, which comes with `pip install "intervenable[plots]"`.

Colours say which kind of number is shown: one hue from white at 0 upwards for probabilities and other amounts, blue
through white at 0 to red for differences. Both stay apart in every kind of colour vision, and in print.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from intervenable.attention_panels import Head, Panel, panels_of, without_future
from intervenable.errors import InputError, MissingExtraError
from intervenable.token_text import Decodes

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingExtraError(
        f'Pictures need matplotlib, which is not installed ({error}). Run: pip install "intervenable[plots]"'
    ) from error

Palette = Literal["auto", "sequential", "diverging"]
Cell = tuple[int, int]

COLOURS = {"sequential": "Blues", "diverging": "RdBu_r"}
INK, FAINT, MISSING, HIDDEN = "#222222", "#666666", "#e4e4e4", "#efefef"
PAGE = 9.0
"""Inches that the maps of several heads may take side by side."""


class Picture(Figure):
    """A figure that belongs to whoever asked for it: no global state, and a notebook shows it."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=110)
        return file.getvalue()


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
    texts = [tokenizer.decode([int(token)]) for token in tokens]
    return [text.strip() or text.replace("\n", "↵").replace(" ", "␣") for text in texts]


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
        marks: Cells `(row, column)` to put a frame around.
        show_values: Whether to write the values into the cells; by default in matrices of up to 80 cells.

    Raises:
        InputError: values that are no matrix, labels of another number, limits that cannot be, or marks outside.

    Example:
        >>> figure = heat_map(torch.rand(6, 3), column_labels=["The", "capital", "is"], value_label="probability")
        >>> [text.get_text() for text in figure.axes[0].get_xticklabels()]
        ['The', 'capital', 'is']
    """
    matrix = _checked(values, ("rows", "columns"))
    rows, columns = matrix.shape
    row_names = _names(row_labels, rows, "row")
    column_names = _names(column_labels, columns, "column")
    scale = _Scale(matrix, palette, limits)

    slanted = _slanted(column_names, _cell_width(columns))
    width = max(3.6, _cell_width(columns) * columns + 1.9)
    height = max(2.2, _cell_height(rows) * rows + 1.0 + _label_height(column_names, slanted))
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    _draw(axes, matrix, scale, _cell_height(rows))
    _label_rows(axes, row_names, row_axis, _cell_height(rows))
    _label_columns(axes, column_names, column_axis, slanted, _cell_width(columns))
    for row, column in marks:
        if not (-rows <= row < rows and -columns <= column < columns):
            raise InputError(f"The mark {(row, column)} is outside of the {rows} rows and {columns} columns.")
        _frame(axes, row % rows, column % columns)
    if show_values if show_values is not None else rows * columns <= 80:
        _write_values(axes, matrix, scale)
    if title:
        axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    scale.draw_bar(figure, axes, value_label)
    return figure


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
    across: int | None = None,
) -> Picture:
    """Draw one small heat map for each head, all on one scale.

    Args:
        values: `[heads, rows, columns]`, as a rule `[heads, layers, positions]`. What is not a finite number stays
            grey.
        head_labels: One for each head; `head 0`, `head 1`, ... by default.
        across: How many maps stand in a row; by default as many as fit a page, evenly.
        row_labels, column_labels, title, value_label, row_axis, column_axis, palette, limits: See `heat_map`.

    Raises:
        InputError: values of other axes, labels of another number, or limits that cannot be.

    Example:
        >>> figure = head_maps(torch.rand(6, 4, 5) - 0.5, title="by head")
        >>> [axes.get_title() for axes in figure.axes[:3]]
        ['head 0', 'head 1', 'head 2']
    """
    maps = _checked(values, ("heads", "rows", "columns"))
    heads, rows, columns = maps.shape
    row_names = _names(row_labels, rows, "row")
    column_names = _names(column_labels, columns, "column")
    head_names = _names(head_labels, heads, "head", "head {}")
    scale = _Scale(maps, palette, limits)

    cell_width = min(0.3, max(0.11, 1.6 / columns))
    cell_height = min(0.24, max(0.07, 2.2 / rows))
    across = across or _evenly(heads, most=max(1, int(PAGE / (cell_width * columns + 0.2))))
    down = -(-heads // across)
    slanted = _slanted(column_names, cell_width)
    width = max(4.0, across * (cell_width * columns + 0.2) + 1.5)
    height = down * (cell_height * rows + 0.35) + 0.7 + _label_height(column_names, slanted)
    figure = Picture(figsize=(width, height), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= heads:
            axes.set_visible(False)
            continue
        _draw(axes, maps[index], scale, cell_height)
        axes.set_title(head_names[index], fontsize=8, color=INK, pad=3, parse_math=False)
        if index % across == 0:
            _label_rows(axes, row_names, row_axis, cell_height)
        if index + across >= heads:
            _label_columns(axes, column_names, column_axis, slanted, cell_width)
    if title:
        figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left", parse_math=False)
    scale.draw_bar(figure, list(grid.flat), value_label)
    return figure


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
    query_names = _names(tokens if query_tokens is None else query_tokens, queries, "query")
    key_names = _names(tokens if key_tokens is None else key_tokens, keys, "key")
    scale = _Scale(torch.stack([panel.matrix for panel in panels]), palette, limits)
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
    scale: _Scale,
    title: str,
    value_label: str,
    across: int | None,
) -> Picture:
    count, queries, keys = len(panels), len(query_names), len(key_names)
    cell = min(0.3, (PAGE / min(count, across or 3, 3) - 0.15) / max(queries, keys))
    across = across or _evenly(count, most=max(1, int(PAGE / (cell * keys + 0.15))))
    across = min(across, count)
    down = -(-count // across)
    slanted = _slanted(key_names, cell)
    beside = max(map(_longest_line, query_names)) * 0.075
    width = max(4.0, across * (cell * keys + 0.15) + beside + 1.3)
    height = down * (cell * queries + 0.32) + 0.5 + _label_height(key_names, slanted)
    figure = Picture(figsize=(width, height), layout="constrained")
    grid = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    size = min(7.5, 60 * cell) if cell >= 0.08 else 6.0
    step = max(1, round(0.09 / cell))
    for index, axes in enumerate(grid.flat):
        if index >= count:
            axes.set_visible(False)
            continue
        panel = panels[index]
        _draw(axes, panel.matrix, scale, cell)
        axes.set_facecolor(HIDDEN)
        axes.set_ylim(queries, 0)
        axes.set_title(panel.name, fontsize=8, color=INK, pad=3, parse_math=False)
        if index % across == 0:
            shown = range(0, queries, step)
            axes.set_yticks(
                [row + 0.5 for row in shown],
                [query_names[row] for row in shown],
                fontsize=size,
                parse_math=False,
            )
        if index + across >= count:
            _label_columns(axes, key_names, "", slanted, cell, size, step)
    if title:
        figure.suptitle(title, fontsize=10, color=INK, x=0.01, ha="left", parse_math=False)
    scale.draw_bar(figure, list(grid.flat), value_label)
    return figure


def _overview(panels: Sequence[Panel], scale: _Scale, title: str, value_label: str) -> Picture:
    rows = [list(row) for _, row in groupby(panels, key=lambda panel: panel.layer)]
    columns = max(map(len, rows))
    side = max(0.3, min(PAGE / columns, 12.0 / len(rows), 1.2))
    width, height = max(4.0, columns * side + 1.6), max(2.4, len(rows) * side + 1.0)
    figure = Picture(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    colours = colormaps[scale.colours].with_extremes(bad=HIDDEN)
    gap = 0.05
    # One set of axes for all: hundreds of them would take minutes.
    for row, line in enumerate(rows):
        for column, panel in enumerate(line):
            extent = (column + gap, column + 1 - gap, row + gap, row + 1 - gap)
            axes.imshow(panel.matrix.numpy(), cmap=colours, norm=scale.norm, extent=extent, aspect="auto")
    axes.set(xlim=(0, columns), ylim=(0, len(rows)))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=3, labelcolor=INK)
    _label_rows(axes, [str(line[0].layer) for line in rows], "layer", side)
    heads = [[str(panel.head) for panel in line] for line in rows]
    _label_columns(axes, max(heads, key=len), "head", slanted=False, cell=side)
    if title:
        axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    scale.draw_bar(figure, axes, value_label)
    return figure


# --- what was given ---------------------------------------------------------------------------------------


def _checked(values: Tensor, axes: tuple[str, ...]) -> Tensor:
    matrix = torch.as_tensor(values).detach().float().cpu()
    matrix = matrix.masked_fill(~matrix.isfinite(), torch.nan)
    if matrix.dim() != len(axes) or 0 in matrix.shape:
        raise InputError(
            f"The values have shape {tuple(matrix.shape)}; give [{', '.join(axes)}], none of them 0."
        )
    return matrix


def _names(labels: Sequence[object] | None, count: int, kind: str, default: str = "{}") -> list[str]:
    names = [default.format(index) for index in range(count)] if labels is None else list(map(str, labels))
    if len(names) != count:
        things = "queries" if kind == "query" else f"{kind}s"
        raise InputError(f"There are {len(names)} {kind} labels for {count} {things}. Give one for each.")
    return names


class _Scale:
    """From values to colours."""

    def __init__(self, values: Tensor, palette: Palette, limits: tuple[float, float] | None) -> None:
        if palette not in ("auto", *COLOURS):
            raise InputError(f"palette={palette!r} is unknown. Allowed: auto, {', '.join(sorted(COLOURS))}.")
        if limits is not None and not limits[0] < limits[1]:
            raise InputError(f"limits={limits!r}: the first must be less than the second.")
        finite = values[~values.isnan()]
        low = finite.min().item() if finite.numel() else 0.0
        high = finite.max().item() if finite.numel() else 0.0
        diverging = palette == "diverging" or (palette == "auto" and min((low, *(limits or ()))) < 0)
        if limits is None:
            reach = max(-low, high) or 1.0
            limits = (-reach, reach) if diverging else (min(low, 0.0), high if high > min(low, 0.0) else 1.0)
        self.limits = limits
        self.colours = COLOURS["diverging" if diverging else "sequential"]
        self.norm = Normalize(*limits)
        # Ends are marked by an arrow where values lie beyond them.
        self.extend = {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[
            (low < limits[0], high > limits[1])
        ]

    def ink(self, value: float) -> str:
        """Black or white, whichever can be read on the colour of a value."""
        red, green, blue, _ = ScalarMappable(self.norm, self.colours).to_rgba(value)  # type: ignore[arg-type]
        return INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.55 else "white"

    def draw_bar(self, figure: Figure, beside: Axes | list[Axes], label: str) -> None:
        bar = figure.colorbar(
            ScalarMappable(self.norm, self.colours),
            ax=beside,
            extend=self.extend,
            aspect=(figure.get_figheight() - 1.0) / 0.13,
            pad=0.02,
        )
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7.5, length=2, width=0.6, color=FAINT, labelcolor=INK)
        bar.set_label(label, fontsize=8.5, color=INK, parse_math=False)


# --- sizes, in inches -------------------------------------------------------------------------------------


def _cell_width(columns: int) -> float:
    """Wide enough for words when there are few columns, narrow enough for a page when there are many."""
    return min(0.62, max(0.23, 7.0 / columns))


def _cell_height(rows: int) -> float:
    return min(0.34, max(0.15, 4.6 / rows))


def _slanted(names: Sequence[str], cell: float) -> bool:
    """Whether labels are too long to stand side by side."""
    return max(_longest_line(name) for name in names) * 0.075 > cell * 1.05


def _longest_line(name: str) -> int:
    return max(map(len, name.split("\n")))


def _label_height(names: Sequence[str], slanted: bool) -> float:
    if slanted:
        return max(map(_longest_line, names)) * 0.075
    return max(name.count("\n") for name in names) * 0.15


def _evenly(count: int, most: int) -> int:
    """How many of `count` things to put in a row, at most so many, that the rows are about equally full."""
    down = -(-count // most)
    return -(-count // down)


# --- ink --------------------------------------------------------------------------------------------------


def _draw(axes: Axes, matrix: Tensor, scale: _Scale, cell: float) -> None:
    rows, columns = matrix.shape
    gap = min(1.0, 4 * cell)
    axes.pcolormesh(matrix.numpy(), cmap=scale.colours, norm=scale.norm, edgecolors="white", linewidth=gap)
    axes.set_facecolor(MISSING)
    axes.set(xlim=(0, columns), ylim=(0, rows))
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, pad=3, labelcolor=INK)


def _label_rows(axes: Axes, names: Sequence[str], axis: str, cell: float) -> None:
    step = 1 if cell >= 0.13 else 5
    shown = range(0, len(names), step)
    axes.set_yticks(
        [row + 0.5 for row in shown], [names[row] for row in shown], fontsize=7.5, parse_math=False
    )
    axes.set_ylabel(axis, fontsize=8.5, color=INK, parse_math=False)


def _label_columns(
    axes: Axes,
    names: Sequence[str],
    axis: str,
    slanted: bool,
    cell: float,
    size: float | None = None,
    step: int = 1,
) -> None:
    places = [column + 0.5 for column in range(0, len(names), step)]
    options: dict[str, Any] = {"fontsize": size or (8.5 if cell > 0.3 else 7.5), "parse_math": False}
    if slanted:
        options |= {"rotation": 55, "ha": "right", "va": "top", "rotation_mode": "anchor"}
    axes.set_xticks(places, list(names)[::step], **options)
    axes.set_xlabel(axis, fontsize=8.5, color=INK, parse_math=False)
    axes.tick_params(axis="x", labelbottom=True)


def _frame(axes: Axes, row: int, column: int) -> None:
    axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=INK, linewidth=1.4, clip_on=False))


def _write_values(axes: Axes, matrix: Tensor, scale: _Scale) -> None:
    reach = max(map(abs, scale.limits))
    digits = 2 if reach < 10 else 1 if reach < 100 else 0
    for row, line in enumerate(matrix.tolist()):
        for column, value in enumerate(line):
            if value == value:
                text = f"{value:.{digits}f}".replace("-0.00", "0.00")
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    text,
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=scale.ink(value),
                )
