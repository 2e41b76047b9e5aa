"""Folders that pyvene 0.1 has saved: a `config.json`, and pickled tensors in `intkey_<key>.bin`.

Pickles are read by torch's `weights_only` reader, which makes tensors and nothing else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from intervenable.config import IntervenableConfig, RepresentationConfig
from intervenable.config_fields import is_module_path
from intervenable.errors import (
    IntervenableWarning,
    MissingFileError,
    ModelMismatchError,
    NotAvailableError,
    StorageError,
)
from intervenable.saving_files import CONFIG, read_json
from intervenable.saving_pyvene_classes import COUNTERPARTS, Counterpart, State, counterpart_of
from interventions import Intervention, NoiseIntervention
from interventions.fixed import CoordinatewiseIntervention

FIELDS = (
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
    "latent_dim",
)
"""The fields of a representation in the order in which pyvene writes them."""
NOT_OURS = frozenset(
    ("intervention_type", "intervention", "source_representation", "hidden_source_representation")
)
REMEDY = "Save it anew with pyvene 0.1, or declare it here and train it."


# --- reading ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One representation in a folder of pyvene's."""

    declared: RepresentationConfig
    """The same in our words."""

    counterpart: Counterpart
    """What its class is here."""

    file: Path
    """Where its tensors are, if it has any."""

    state: State
    """Its tensors, under pyvene's names."""

    swapped: int | None
    """How many coordinates it swaps where a call names none."""


def read_pyvene(folder: str | Path) -> tuple[IntervenableConfig, list[Entry]]:
    """What pyvene has saved in a folder.

    Raises:
        MissingFileError: a file or the folder is not there.
        StorageError: it is damaged, of another kind, or speaks of something that has no counterpart.
    """
    folder = Path(folder).expanduser()
    if not (folder / CONFIG).is_file():
        raise MissingFileError(
            f"There is no {CONFIG} in {str(folder)!r}. Give a folder that pyvene has saved."
        )
    content = read_json(folder / CONFIG)
    kinds, listed = content.get("intervention_types"), content.get("representations")
    if not isinstance(kinds, list) or not isinstance(listed, list) or len(kinds) != len(listed):
        raise StorageError(
            f"{folder / CONFIG} has no list of representations with one of intervention_types beside it, as pyvene"
            " writes them. What save_pretrained has written is read by from_pretrained."
        )
    dims = content.get("intervention_dimensions") or [None] * len(listed)
    if not isinstance(dims, list) or len(dims) != len(listed):
        raise StorageError(f"{folder / CONFIG}: intervention_dimensions is not one for each. {REMEDY}")
    entries: list[Entry] = []
    used: dict[str, int] = {}
    for index, (kind, fields, dim) in enumerate(zip(kinds, listed, dims, strict=True)):
        where = f"{folder / CONFIG}, representation {index}"
        entries.append(_entry(folder, where, _counterpart(kind, where), _named(fields, where), dim, used))
    wanted = {entry.file.name for entry in entries}
    strange = sorted(file.name for file in folder.glob("intkey_*.bin") if file.name not in wanted)
    if strange:
        raise StorageError(f"{folder}: {strange[0]} belongs to none of its representations. {REMEDY}")
    if (folder / "pytorch_model.bin").exists():
        warnings.warn(
            f"{folder / 'pytorch_model.bin'} has trained weights of the wrapped model, which are not loaded: give a"
            " model that has them already.",
            IntervenableWarning,
            stacklevel=3,
        )
    mode = content.get("mode", "parallel")
    return IntervenableConfig([entry.declared for entry in entries], mode=mode), entries


def _counterpart(kind: object, where: str) -> Counterpart:
    found = counterpart_of(kind)
    if found is None:
        raise StorageError(
            f"{where} is a {kind!r}, which has no counterpart to load. Those that have one:"
            f" {', '.join(COUNTERPARTS)}."
        )
    return found


def _named(fields: object, where: str) -> dict[str, Any]:
    if isinstance(fields, Mapping) and set(fields) <= set(FIELDS):
        return dict(fields)
    if isinstance(fields, list) and len(fields) <= len(FIELDS):
        return dict(zip(FIELDS, fields, strict=False))
    raise StorageError(f"{where} is {fields!r}, not the fields of a representation. {REMEDY}")


def _entry(
    folder: Path,
    where: str,
    counterpart: Counterpart,
    fields: dict[str, Any],
    dim: object,
    used: dict[str, int],
) -> Entry:
    key = _key(fields, used)
    constant = bool(fields.get("hidden_source_representation"))
    kept = {name: value for name, value in fields.items() if name not in NOT_OURS and value is not None}
    if is_module_path(str(kept.get("component", ""))):
        kept.pop("layer", None)  # pyvene's default for it, which says nothing
    if counterpart.cls is NoiseIntervention:  # pyvene's noise, which is the same for all
        kept["intervention"] = NoiseIntervention(seed=1, shape="fixed")
    else:
        kept["intervention_type"] = counterpart.cls
    try:
        RepresentationConfig(**kept)  # before its words become the name of a file
    except NotAvailableError as error:
        raise NotAvailableError(f"{where}: {error}") from error
    except (ValueError, TypeError) as error:
        raise StorageError(f"{where}: {error} {REMEDY}") from error
    file = folder / f"intkey_{key}.bin"
    state: State = {}
    if counterpart.state is not None or constant:
        state = _unpickled(file)
    if constant:
        if "source_representation" not in state:
            raise StorageError(f"{file} has no source_representation, which {where} says. {REMEDY}")
        kept["source_representation"] = state.pop("source_representation")
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or dim < 1):
        raise StorageError(
            f"{where}: its intervention_dimension is {dim!r}; it must be a whole number. {REMEDY}"
        )
    for name in ("embed_dim", "interchange_dim"):
        state.pop(name, None)
    return Entry(RepresentationConfig(**kept), counterpart, file, state, dim)


def _key(fields: Mapping[str, Any], used: dict[str, int]) -> str:
    """How pyvene calls a representation; those that would have the same name are numbered."""
    component, unit = str(fields.get("component", "block_output")), str(fields.get("unit", "pos"))
    place = component.replace(".", "_") if "." in component else f"{fields.get('layer', 0)}_comp_{component}"
    start = "comp" if "." in component else "layer"
    key = f"{start}_{place}_unit_{unit.replace('.', '_')}_nunit_{fields.get('max_number_of_units', 1)}"
    used[key] = used.get(key, -1) + 1
    return f"{key}#{used[key]}"


def _unpickled(file: Path) -> State:
    """The tensors of a file, by the reader that makes tensors alone."""
    if not file.is_file():
        raise MissingFileError(
            f"There is no {file.name} in {str(file.parent)!r}, which {CONFIG} needs. {REMEDY}"
        )
    try:
        state: object = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, of zip files, of what is in them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise StorageError(
            f"{file} cannot be read as tensors alone: {reason} Nothing in it was run. {REMEDY}"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise StorageError(f"{file} holds something else than tensors with names. {REMEDY}")
    for name, value in state.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise StorageError(f"{file}: {name!r} claims more values than the file has. {REMEDY}")
    return dict(state)


# --- into interventions -----------------------------------------------------------------------------------


def fill(entries: Sequence[Entry], interventions: Sequence[Intervention]) -> None:
    """Give the interventions of a newly made model what was read, each what is its representation's.

    Raises:
        StorageError: the tensors are not those of such an intervention.
        ModelMismatchError: they are for a model of another size.
    """
    filled: list[Intervention] = []
    for entry, intervention in zip(entries, interventions, strict=True):
        if intervention in filled:  # linked to another, whose file holds the same
            continue
        filled.append(intervention)
        if entry.counterpart.state is not None:
            _load(entry, entry.counterpart.state, intervention)
        _limit(entry, intervention)


def _load(entry: Entry, convert: Callable[[State], State], intervention: Intervention) -> None:
    wanted = intervention.state_dict()
    try:
        state = convert(entry.state)
    except (RuntimeError, StorageError) as error:
        raise StorageError(
            f"{entry.file} does not hold a {type(intervention).__name__}: {error} {REMEDY}"
        ) from error
    if state.keys() != wanted.keys():
        raise StorageError(
            f"{entry.file} has {', '.join(sorted(state))}, and a {type(intervention).__name__} is made of"
            f" {', '.join(sorted(wanted))}. {REMEDY}"
        )
    wrong = [name for name in wanted if state[name].shape != wanted[name].shape]
    if wrong:
        raise ModelMismatchError(
            f"{entry.file}: {wrong[0]!r} has the shape {tuple(state[wrong[0]].shape)}, and in this model it is"
            f" {tuple(wanted[wrong[0]].shape)}. Give the model that it was trained for."
        )
    intervention.load_state_dict(state)


def _limit(entry: Entry, intervention: Intervention) -> None:
    """What pyvene's `interchange_dim` says, where it says something."""
    if entry.swapped is None:
        return
    if isinstance(intervention, CoordinatewiseIntervention):
        if intervention.embed_dim is None or entry.swapped < intervention.embed_dim:
            intervention.embed_dim = entry.swapped
        return
    size = entry.counterpart.first_only(intervention)
    if size is not None and entry.swapped < size:
        warnings.warn(
            f"{entry.file.name}: pyvene swaps the first {entry.swapped} of {size} coordinates where a call names"
            f" none; here all are swapped. Give subspaces=list(range({entry.swapped})) in calls for the same.",
            IntervenableWarning,
            stacklevel=4,
        )
