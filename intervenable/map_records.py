"""Model maps as JSON: what is written is checked again when it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from intervenable.errors import StorageError
from model_maps import AttentionHeads, Bands, HeadColumns, LayerKind, ModelMap, Site

_INNER = {"columns": HeadColumns, "attention": AttentionHeads}


def to_record(model_map: ModelMap) -> dict[str, Any]:
    """A map as what JSON can hold; what is as by default is left out.

    Raises:
        StorageError: it depends on a config, so it is a family's and not one model's.

    Example:
        >>> to_record(ModelMap(("Tiny",), "layers", {"block_output": Site("", axes=(1, 0))}))
        {'classes': ['Tiny'], 'blocks': 'layers', 'sites': {'block_output': {'path': '', 'axes': [1, 0]}}}
    """
    if model_map.variants:
        raise StorageError(
            f"The map of {model_map.classes[0]} has variants. Only that of one model can be written,"
            " which for_config() gives."
        )
    record: dict[str, Any] = _plain(model_map)
    return record


def from_record(record: Mapping[str, Any]) -> ModelMap:
    """The map that was written.

    Raises:
        StorageError: the record is none of a map, or of another version of it.

    Example:
        >>> tiny = ModelMap(("Tiny",), "layers", {"query_output": Site("q", columns=HeadColumns(2, 4))})
        >>> from_record(to_record(tiny)) == tiny
        True
    """
    try:
        kinds = [
            LayerKind(
                **{
                    **kind,
                    "layers": tuple(kind["layers"]),
                    **({"sites": _sites(kind["sites"])} if "sites" in kind else {}),
                }
            )
            for kind in record.get("kinds", ())
        ]
        given = {**record, "classes": tuple(record["classes"]), "sites": _sites(record.get("sites", {}))}
        return ModelMap(**{"blocks": None, **given, "kinds": tuple(kinds)})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StorageError(f"This is no record of a model map: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    found = {}
    for entry in (field for field in dataclasses.fields(value) if field.init):
        item = getattr(value, entry.name)
        usual = entry.default if entry.default is not dataclasses.MISSING else None
        if item != usual and not (isinstance(item, Mapping) and not item) and item != ():
            found[entry.name] = _plain(item)
    return found


def _sites(record: Mapping[str, Any]) -> dict[str, Site]:
    return {name: _site(site) for name, site in record.items()}


def _site(record: Mapping[str, Any]) -> Site:
    given: dict[str, Any] = dict(record)
    if "bands" in given.get("attention", ()):
        given["attention"] = {**given["attention"], "bands": _bands(given["attention"]["bands"])}
    for name, cls in _INNER.items():
        if name in given:
            given[name] = cls(**given[name])
    if "axes" in given:
        first, second = given["axes"]
        given["axes"] = (first, second)
    return Site(**given)


def _bands(record: Mapping[str, Any]) -> Bands:
    return Bands(**{**record, "axes": tuple(record["axes"])})
