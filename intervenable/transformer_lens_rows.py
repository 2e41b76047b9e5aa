"""Tables of indices as TransformerLens has them: a row for each patch, a column for each axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any

from intervenable.errors import ConfigError
from intervenable.sweep_axes import AXES, SPOKEN

if TYPE_CHECKING:
    import pandas as pd

Row = tuple[int, ...]
Box = tuple[tuple[int, ...], ...]
"""Along each axis the entries that are combined with all those of the others."""

OVERHEAD = 32
"""What it costs to begin one more sweep, in cells."""


def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> pd.DataFrame:
    """A table with a row for each combination of indices below these maxima, the last column fastest.

    Raises:
        ConfigError: another number of names than of maxima, or a maximum that is no number of entries.

    Example:
        >>> make_df_from_ranges([2, 2], ["layer", "pos"]).values.tolist()
        [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    sizes, names = list(column_max_ranges), list(column_names)
    if len(sizes) != len(names):
        raise ConfigError(f"There are {len(sizes)} maxima and {len(names)} names. Give each column both.")
    wrong = [size for size in sizes if isinstance(size, bool) or not hasattr(size, "__index__") or size < 0]
    if wrong:
        raise ConfigError(f"The maximum {wrong[0]!r} is no number of entries: give an int, 0 or more.")
    return table_of(product(*(range(size) for size in sizes)), names)


def table_of(rows: Iterable[Sequence[Any]], names: Sequence[str]) -> pd.DataFrame:
    """A table with these rows."""
    import pandas as pd

    return pd.DataFrame(list(rows), columns=list(names))


def axis_named(name: Any, axes: Sequence[str] = AXES) -> str | None:
    """The axis of a sweep that a column's name means, TransformerLens' names among them; None if it means none."""
    known = str(SPOKEN.get(name, name)) if isinstance(name, str) else ""
    if known == "pos" and "query" in axes and "pos" not in axes:
        return "query"  # attention patterns have but one axis that is called so
    return known if known in AXES else None


def read_rows(index_df: Any, axes: Sequence[str]) -> list[Row]:
    """The rows of a table as indices along these axes.

    Columns are found by their names, and others are left alone. Where no column has the name of an axis they are
    taken in order, as many as there are axes.

    Raises:
        ConfigError: no table, columns that do not fit, or something in them that is no whole number.
    """
    columns = columns_of(index_df)
    named = [axis_named(column, axes) for column in columns]
    wanted = ", ".join(axes)
    if not any(named):
        if len(columns) != len(axes):
            raise ConfigError(
                f"index_df has the columns {_listed(columns)}, and a patch is told by {wanted}. Name them so."
            )
        places = list(range(len(axes)))
    else:
        missing = [axis for axis in axes if axis not in named]
        surplus = [column for column, axis in zip(columns, named, strict=True) if axis and axis not in axes]
        twice = [axis for axis in axes if named.count(axis) > 1]
        if missing or surplus or twice:
            raise ConfigError(
                f"index_df has the columns {_listed(columns)}, and a patch is told by {wanted}."
            )
        places = [named.index(axis) for axis in axes]
    return [
        tuple(whole_number(row[place], columns[place], number) for place in places)
        for number, row in enumerate(index_df.itertuples(index=False, name=None))
    ]


def columns_of(index_df: Any) -> list[Any]:
    """The columns of a table.

    Raises:
        ConfigError: it is none.
    """
    if not hasattr(index_df, "itertuples") or not hasattr(index_df, "columns"):
        raise ConfigError(
            f"index_df is a {type(index_df).__name__}. Give a pandas DataFrame with a row for each patch."
        )
    return list(index_df.columns)


def whole_number(value: Any, column: Any, row: int) -> int:
    """An index, also where a column of other numbers has made it a float.

    Raises:
        ConfigError: it is no whole number.
    """
    if hasattr(value, "__index__") and not isinstance(value, bool):
        return int(value.__index__())
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ConfigError(
        f"Row {row} of index_df has {value!r} in the column {column!r}, which is no whole number."
    )


def boxes(rows: Iterable[Row]) -> list[Box]:
    """Grids that together have these rows: one around all of them, or several without any other.

    Whichever costs less cells, where each grid costs some by itself.

    Example:
        >>> boxes([(0, 0), (0, 1), (1, 0), (1, 1), (0, 0)]), len(boxes([(i, 7 * i) for i in range(40)]))
        ([((0, 1), (0, 1))], 40)
    """
    distinct = list(dict.fromkeys(rows))
    if not distinct:
        return []
    around = tuple(tuple(dict.fromkeys(column)) for column in zip(*distinct, strict=True))
    exact = _exact(distinct)
    cost = sum(prod(map(len, box)) + OVERHEAD for box in exact)
    return [around] if prod(map(len, around)) + OVERHEAD <= cost else exact


def _exact(rows: Sequence[Row]) -> list[Box]:
    """Grids that have these rows and no others."""
    if not rows[0]:
        return [()]
    rest: dict[int, list[Row]] = {}
    for first, *others in rows:
        rest.setdefault(first, []).append(tuple(others))
    alike: dict[frozenset[Row], list[int]] = {}
    for first, belonging in rest.items():
        alike.setdefault(frozenset(belonging), []).append(first)
    return [(tuple(firsts), *box) for firsts in alike.values() for box in _exact(rest[firsts[0]])]


def _listed(columns: Sequence[Any]) -> str:
    return ", ".join(map(repr, columns)) or "none"
