"""What users say to take a part of a sweep -> numbers of entries."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from intervenable.errors import ConfigError, UnknownNameError, unknown_name


def chosen(kind: str, wanted: str | Sequence[str] | None, there: Sequence[str]) -> Sequence[str]:
    """The names that are wanted; all if nothing is said.

    Raises:
        UnknownNameError: one is not there.
    """
    if wanted is None:
        return there
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise UnknownNameError(unknown_name(kind, unknown[0], there))
    return names


def index_of(axis: str, wanted: Any, entries: Sequence[Any], labels: Sequence[str]) -> int:
    """Where an entry of an axis is, by itself, by its label, or from the end by a negative number.

    Raises:
        UnknownNameError: there is no such entry.
        ConfigError: several have this label.

    Example:
        >>> index_of("pos", " Spain", (0, 1), ("In", " Spain")), index_of("layer", -1, (4, 8), ("4", "8"))
        (1, 1)
    """
    if not isinstance(wanted, bool) and hasattr(wanted, "__index__"):
        wanted = index(wanted)  # that of numpy or torch, too
    for names in (entries, labels):
        found = [number for number, name in enumerate(names) if type(name) is type(wanted) and name == wanted]
        if len(found) > 1:
            places = ", ".join(repr(entries[number]) for number in found)
            raise ConfigError(
                f"{axis}={wanted!r} is the label of several entries: {places}. Give the entry instead."
            )
        if found:
            return found[0]
    if type(wanted) is int and -len(entries) <= wanted < 0:
        return wanted + len(entries)
    allowed = [*map(str, entries), *(repr(label) for label in labels if label not in map(str, entries))]
    raise UnknownNameError(_unknown_entry(axis, wanted, allowed))


def _unknown_entry(axis: str, wanted: Any, allowed: Sequence[str]) -> str:
    said = unknown_name(f"entry of the axis {axis!r}:", wanted, allowed).split("\n")[0]
    return f"{said}\nAllowed: {', '.join(dict.fromkeys(allowed))}."
