"""What a sweep found, as text: a table where it is small, else the cells that changed most."""

from __future__ import annotations

from intervenable.sweep_result import SweepResult

TABLE = (40, 14)
"""Rows and columns of the largest table."""
CELLS = 10
"""How many cells are listed where there is no table."""


def told_runs(result: SweepResult, metric: str) -> str:
    """The metric on the runs without a patch."""
    runs = (("clean", result.clean), ("corrupted", result.corrupted))
    known = [f"{name} {values[metric].item():.4g}" for name, values in runs if metric in values]
    return f"{metric.replace('_', ' ')}: {', '.join(known) or 'no unpatched run'}"


def told_cells(result: SweepResult) -> str:
    """A table for one component over one or two axes, if it is small; the cells that changed most otherwise.

    Example:
        >>> import torch
        >>> print(told_cells(SweepResult(
        ...     ("layer", "pos"), {"layer": ("0", "1"), "pos": ("of", "Spain")}, {"layer": (0, 1), "pos": (0, 1)},
        ...     {("block_input", "logit"): torch.tensor([[0.0, 4.0], [1.0, -3.0]])},
        ... )))
        layer     of  Spain
        0       0.00   4.00
        1       1.00  -3.00
    """
    rows, columns = TABLE
    sizes = [len(result.entries[axis]) for axis in result.axes]
    fits = sizes[0] <= rows and (len(sizes) == 1 or sizes[1] <= columns)
    if len(result.components) == 1 and len(sizes) <= 2 and fits:
        return _table(result)
    return "\n".join(["The cells that change most:", *(f"  {cell}" for cell in result.top(CELLS))])


def _table(result: SweepResult) -> str:
    values = result.values
    first, *rest = result.axes
    heads = result.labels[rest[0]] if rest else result.metrics
    lines = values.tolist() if rest else [[value] for value in values.tolist()]
    known = values[values.isfinite()].abs()
    largest = known.max().item() if known.numel() else 0.0
    digits = 4 if largest <= 1 else 2 if largest < 100 else 1
    table = [[first, *heads]]
    for label, line in zip(result.labels[first], lines, strict=True):
        table.append([label, *(f"{value:.{digits}f}" for value in line)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in table
    )
