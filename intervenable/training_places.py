"""Where the interventions of a training are: the same for all examples, or as the columns of a data set say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from intervenable.binding import BoundRepresentation
from intervenable.errors import DatasetError, LocationError
from intervenable.model import IntervenableModel
from intervenable.training_columns import Columns, plain
from intervenable.units import LEVELS

BASE, SOURCE = "base_position", "source_position"


@dataclass(frozen=True)
class Places:
    """Unit locations for all examples of a data set, and those of some of its rows."""

    unit_locations: Any
    """As in a call."""

    count: int
    """How many examples there are."""

    levels: tuple[int, ...]
    """How many levels the units of each representation have."""

    def of(self, rows: Sequence[int]) -> Any:
        """The locations of these rows: of the full form those rows, of a short one all of it."""
        if self.unit_locations is None:
            return None
        ((key, value),) = self.unit_locations.items()
        if isinstance(value, tuple):
            return {key: tuple(self._side(side, rows) for side in value)}
        return {key: self._side(value, rows)}

    def _side(self, side: Any, rows: Sequence[int]) -> Any:
        if not isinstance(side, list) or len(side) != len(self.levels):
            return side
        return [self._slot(slot, levels, rows) for slot, levels in zip(side, self.levels, strict=True)]

    def _slot(self, slot: Any, levels: int, rows: Sequence[int]) -> Any:
        if not isinstance(slot, list):
            return slot
        if levels > 1:
            return [self._rows(level, rows) for level in slot]
        return self._rows(slot, rows)

    def _rows(self, values: Any, rows: Sequence[int]) -> Any:
        if not isinstance(values, list) or len(values) != self.count or not isinstance(values[0], list):
            return values
        return [values[row] for row in rows]


def given_places(given: Any, model: IntervenableModel, count: int, masks: Tensor | None) -> Places:
    """Locations that were given beside a data set: as in a call, or what a call has under its one key.

    Raises:
        LocationError: source and base locations differ, where some examples leave an intervention out.
    """
    if not isinstance(given, Mapping):
        takes_source = any(entry.intervention.accepts_source for entry in model._bound)
        given = {"sources->base": given} if takes_source else {"base": given}
    given = {key: plain_sides(value) for key, value in given.items()}
    if masks is not None and any(isinstance(value, tuple) for value in given.values()):
        raise _unlike()
    return Places(given, count, _levels(model))


def plain_sides(value: Any) -> Any:
    """Locations with lists for tensors and arrays, and a pair still a pair."""
    return tuple(plain(side) for side in value) if isinstance(value, tuple) else plain(value)


def places_of_columns(columns: Columns, model: IntervenableModel, name: str, masks: Tensor | None) -> Places:
    """The locations that columns say, or None for what the declarations say.

    Raises:
        DatasetError: a column that says something else than positions.
        LocationError: units that are no positions.
    """
    count = len(next(iter(columns.values())))
    if BASE not in columns:
        if SOURCE in columns:
            raise DatasetError(
                f"{name} has {SOURCE!r} and no {BASE!r}. Give both, or the latter alone for both."
            )
        if masks is not None and any(isinstance(entry.config.where, tuple) for entry in model._bound):
            raise _unlike()
        return Places(None, count, _levels(model))
    base = _by_intervention(columns[BASE], BASE, model, name)
    source = _by_intervention(columns[SOURCE], SOURCE, model, name) if SOURCE in columns else base
    sides: list[list[Any]] = [[], []]
    for entry, own, other in zip(model._bound, base, source, strict=True):
        if masks is not None:
            asked = masks[:, entry.group].tolist()
            other = [
                there if there_is else here for here, there, there_is in zip(own, other, asked, strict=True)
            ]
        sides[0].append(_in_levels(entry, other))
        sides[1].append(_in_levels(entry, own))
    if any(entry.intervention.accepts_source for entry in model._bound):
        return Places({"sources->base": tuple(sides)}, count, _levels(model))
    return Places({"base": sides[1]}, count, _levels(model))


def _by_intervention(
    column: Sequence[Any], key: str, model: IntervenableModel, name: str
) -> list[list[list[Any]]]:
    """`[representations][examples][positions]`."""
    found: list[list[list[Any]]] = [[] for _ in model._bound]
    groups = [entry.group for entry in model._bound]
    for index, given in enumerate(column):
        value = plain(given)
        if isinstance(value, (int, str)) and not isinstance(value, bool):
            value = [value]
        nested = isinstance(value, list) and any(isinstance(item, list) for item in value)
        each = value if nested else [value] * len(found)
        if nested and len(value) == 1 + max(groups) != len(found):  # one for each source
            each = [value[group] for group in groups]
        if not isinstance(value, list) or not value or len(each) != len(found):
            raise DatasetError(
                f"{key} of row {index} of {name} is {value!r}. Give a position, a list of them, or a list for each of"
                f" the {len(found)} representation{'s' * (len(found) > 1)}, or for each group of them."
            )
        for rows, item in zip(found, each, strict=True):
            rows.append(item if isinstance(item, list) else [item])
    return found


def _in_levels(entry: BoundRepresentation, rows: list[list[Any]]) -> list[Any]:
    """The full form of positions: below all heads, where there are heads."""
    levels = LEVELS[entry.config.unit]
    if levels == ("positions",):
        return rows
    if levels == ("heads", "positions"):
        return [[list(range(entry.site.heads or 1))] * len(rows), rows]
    raise LocationError(
        f"{entry.name!r} has the unit {entry.config.unit!r}, and columns of positions say nothing of"
        f" {' and '.join(levels)}. Give unit_locations, or say where in the declaration."
    )


def _levels(model: IntervenableModel) -> tuple[int, ...]:
    return tuple(len(LEVELS[entry.config.unit]) for entry in model._bound)


def _unlike() -> LocationError:
    return LocationError(
        "Source and base locations differ, and source_mask leaves interventions of some examples out, whose source is"
        f" then the base. Give the columns {BASE!r} and {SOURCE!r}, or one location for both."
    )
