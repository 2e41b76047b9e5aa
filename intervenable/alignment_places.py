"""Where alignments are looked for: positions as people say them, and what they are in each example of a data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from intervenable.config import IntervenableConfig, RepresentationConfig
from intervenable.errors import ConfigError, LocationError
from intervenable.model import IntervenableModel
from intervenable.training_columns import Columns
from intervenable.training_data import SOURCE, read_examples
from intervenable.units import Units
from interventions import VanillaIntervention

BASE_COLUMN, SOURCE_COLUMN = "base_position", "source_position"
"""Columns that say where, in a data set."""


@dataclass(frozen=True)
class Place:
    """One place to look for an alignment."""

    label: str
    """What it is called."""

    unit_locations: Any = None
    """Where, the same for all examples, as `train` takes it; None for what columns say."""

    columns: tuple[str, str] | None = None
    """The columns that say where, in the base and in the source."""

    units: int = 1
    """How many positions it is in each example."""

    def of(self, columns: Columns) -> tuple[Columns, Any]:
        """The data set and the unit locations that mean this place, as `train` takes them."""
        rest = {name: values for name, values in columns.items() if name not in (BASE_COLUMN, SOURCE_COLUMN)}
        if self.columns is None:
            return rest, self.unit_locations
        base, source = self.columns
        return {**rest, BASE_COLUMN: columns[base], SOURCE_COLUMN: columns[source]}, None


def read_places(positions: Any, columns: Columns, name: str = "dataset") -> list[Place]:
    """Places from what a user wrote.

    Args:
        positions: An entry or a list of entries, or entries by label. An entry is what a call takes for a position
            (an int, `"last"`, words, a list of several, a pair `(source, base)`), or the name of a column of
            positions (those of the source are in `source_<name>` if that is there). None: the columns
            `base_position` and `source_position` if they are there, and else the last token.

    Raises:
        ConfigError: no entries, or two of one label.

    Example:
        >>> [place.label for place in read_places(["last", 3, (1, 2)], {"input_ids": [[5, 6, 7]]})]
        ['last', '3', '1 -> 2']
    """
    if positions is None:
        positions = [BASE_COLUMN if BASE_COLUMN in columns else "last"]
    if isinstance(positions, Mapping):
        entries = [(str(label), entry) for label, entry in positions.items()]
    else:
        listed = positions if isinstance(positions, (list, range)) else [positions]
        entries = [(_label(entry), entry) for entry in listed]
    if not entries:
        raise ConfigError("positions is empty. Give at least one, such as 'last'.")
    labels = [label for label, _ in entries]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(
            f"Two positions are called {twice[0]!r}. Give them names: positions={{'name': ...}}."
        )
    return [_place(label, entry, columns, name) for label, entry in entries]


def _place(label: str, entry: Any, columns: Columns, name: str) -> Place:
    if not isinstance(entry, str) or entry not in columns:
        return Place(label, {"sources->base": entry})
    other = SOURCE_COLUMN if entry == BASE_COLUMN else SOURCE + entry
    if entry == SOURCE_COLUMN:
        raise ConfigError(
            f"{entry!r} is where the source is read. Give the column of the base, {BASE_COLUMN!r}, of {name}."
        )
    return Place(
        "position" if label == BASE_COLUMN else label, None, (entry, other if other in columns else entry)
    )


def _label(entry: Any) -> str:
    if isinstance(entry, tuple) and len(entry) == 2:
        return f"{_label(entry[0])} -> {_label(entry[1])}"
    if isinstance(entry, list):
        return ", ".join(map(_label, entry))
    return str(getattr(entry, "text", entry))


def with_units(
    place: Place,
    datasets: Mapping[str, Columns],
    model: nn.Module,
    component: str,
    layer: int | None,
    tokenizer: Any,
) -> Place:
    """The place with the number of its positions, which is found in every example before anything is trained.

    Raises:
        LocationError: there is no such place in an example, or it is of another size in some.
        DatasetError: a column is missing or unusable.
    """
    representation = RepresentationConfig(layer, component)
    swap = IntervenableModel(IntervenableConfig(representation, VanillaIntervention), model, tokenizer)
    counts: dict[int, tuple[str, int]] = {}
    for name, columns in datasets.items():
        missing = [column for column in place.columns or () if column not in columns]
        if missing:
            raise ConfigError(f"{name} has no column {missing[0]!r}, which says where {place.label!r} is.")
        rows, unit_locations = place.of(columns)
        examples = read_examples(rows, swap, unit_locations=unit_locations, name=name)
        batch = examples.batch(range(len(examples)))
        plan = swap._plan(batch.base, batch.sources, batch.unit_locations, None, batch.subspaces, "tokens")
        units = plan.edits[0].units if plan.edits else None
        if isinstance(units, Units):
            for row, count in enumerate(units.counts):
                counts.setdefault(count[0], (name, row))
    if len(counts) > 1:
        told = ", ".join(
            f"{count} in row {row} of {name}" for count, (name, row) in sorted(counts.items())[:3]
        )
        raise LocationError(
            f"{place.label!r} has another number of positions in some examples: {told}. An alignment is of equally"
            " many in all; take one of them, such as the last: iv.Words(..., take='last')."
        )
    return replace(place, units=next(iter(counts), 1))


def layers_of(layers: int | Sequence[int] | slice | None, count: int) -> list[int]:
    """Layers as they are counted from the first, in the given order.

    Raises:
        ConfigError: none, or one twice.
    """
    everything = range(count)
    if layers is None:
        return list(everything)
    listed = (
        [layers] if isinstance(layers, int) else everything[layers] if isinstance(layers, slice) else layers
    )
    found = [layer % count if -count <= layer < count else layer for layer in listed]
    if not found or len(set(found)) < len(found):
        raise ConfigError(f"layers={layers!r}: give each layer once, and at least one of {count}.")
    return found
