"""What is declared on a model and what its interventions hold, as JSON and tensors, and back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter, ValidationError
from torch import Tensor, nn

from intervenable._version import __version__
from intervenable.binding import BoundRepresentation
from intervenable.config import IntervenableConfig, RepresentationConfig
from intervenable.errors import (
    ConfigError,
    Fault,
    NotAvailableError,
    StorageError,
    each_named,
    raise_all,
)
from intervenable.saving_files import CONFIG, Contents
from intervenable.saving_interventions import REMEDY, put_together, taken_apart
from intervenable.saving_types import TypeNames
from interventions import CallableIntervention, Intervention

MADE = frozenset(("intervention", "intervention_type", "source_representation"))
"""Fields of a representation that do not go into JSON as they are."""
SETTINGS = frozenset(("low_rank_dimension", "latent_dim", "subspace_partition"))
"""Fields for an intervention that is yet to be made."""
LARGEST_INDEX = 10_000_000
"""A partition is written as ranges, and takes memory for each index in them."""

GivenAs = Literal["type", "instance", "function"]
Names = str | list[str | None]


class Record(BaseModel):
    """A part of `config.json`: exactly these entries, of exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class SavedConstant(Record):
    """A constant source of a representation; its values are among the tensors."""

    field: Literal["source_representation", "intervention_constant_sources"]
    """Where it was declared."""
    trained: Literal["no", "tensor", "parameter"] = "no"
    """Whether it requires gradients, and whether as an `nn.Parameter`."""


class SavedRepresentation(Record):
    """One representation."""

    fields: dict[str, JsonValue]
    """What was declared, but for what follows."""
    intervention: int
    """Which of the interventions it has."""
    given_as: GivenAs
    """How the intervention was declared."""
    intervention_type: str | None = None
    """Its class, if the representation itself says it."""
    constant: SavedConstant | None = None
    """Its constant source, if it has one."""


class SavedIntervention(Record):
    """One intervention, which several representations may share."""

    type: str
    """The name of its class."""
    arguments: dict[str, JsonValue]
    """What to make it of, tensors aside."""
    frozen: list[str] = []
    """Its parameters that do not require gradients."""


class SavedModel(Record):
    """What is known of the wrapped model."""

    class_name: str
    model_type: str | None
    sizes: dict[str, int]
    parameters: int | None
    loader: str | None = None
    """How to load it, where it was saved too."""
    attention: str | None = None
    """How it computes its attention then."""


class SavedWeight(Record):
    """A few values of one weight of the wrapped model."""

    shape: list[int]
    dtype: str
    values: list[float | None]


class Saved(Record):
    """All that `config.json` says but the names of files."""

    library_version: str
    mode: str
    model_type: str | None
    intervention_types: Names
    representations: list[SavedRepresentation]
    interventions: list[SavedIntervention]
    model: SavedModel


@dataclass(frozen=True)
class Restored:
    """What was saved, ready for a model."""

    declared: IntervenableConfig
    """What was declared, as it was."""

    made: IntervenableConfig
    """The same with the interventions themselves, as they were saved."""


# --- to files ---------------------------------------------------------------------------------------------


def described(
    config: IntervenableConfig, bound: Sequence[BoundRepresentation], types: TypeNames
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `config.json` says of a model's interventions, and their tensors.

    Raises:
        ConfigError: with everything found that has no form in a file.
    """
    if len(config.representations) != len(bound) or any(
        now is not then.config for now, then in zip(config.representations, bound, strict=True)
    ):
        raise ConfigError(
            "The configuration was changed since the model was made of it. Make a model of the new one, and save"
            " that."
        )
    faults: list[Fault] = []
    names: Names = []
    representations: list[dict[str, Any]] = []
    interventions: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    numbers: dict[Intervention, int] = {}
    for entry in bound:
        try:
            number = numbers.setdefault(entry.intervention, len(numbers))
            if number == len(interventions):
                interventions.append({})  # which keeps its number, also if it cannot be written
                interventions[number], held = taken_apart(entry.intervention, types)
                tensors |= {f"interventions.{number}.{key}": tensor for key, tensor in held.items()}
            representations.append(_representation(config, entry, number, types))
        except ConfigError as error:
            faults.extend(each_named(error, f"representation {entry.index} ({entry.name})"))
        if entry.constant is not None:
            tensors[f"constants.{entry.index}"] = entry.constant.detach()
    try:
        listed = config.intervention_types
        names = (
            [None if cls is None else types.name_of(cls) for cls in listed]
            if isinstance(listed, list)
            else types.name_of(listed)
        )
    except ConfigError as error:
        faults.extend(each_named(error, "intervention_types"))
    raise_all(faults)
    return {
        "library_version": __version__,
        "mode": config.mode,
        "model_type": config.model_type,
        "intervention_types": names,
        "representations": representations,
        "interventions": interventions,
    }, tensors


def _representation(
    config: IntervenableConfig, entry: BoundRepresentation, number: int, types: TypeNames
) -> dict[str, Any]:
    declared = entry.config
    record: dict[str, Any] = {
        "fields": json.loads(declared.model_dump_json(exclude=set(MADE), exclude_none=True)),
        "intervention": number,
        "given_as": _given_as(declared),
    }
    if declared.intervention_type is not None:
        record["intervention_type"] = types.name_of(declared.intervention_type)
    constant = entry.constant
    if constant is not None:
        own = declared.source_representation is not None
        record["constant"] = {
            "field": "source_representation" if own else "intervention_constant_sources",
            "trained": ("parameter" if isinstance(constant, nn.Parameter) else "tensor")
            if constant.requires_grad
            else "no",
        }
    return record


def _given_as(declared: RepresentationConfig) -> GivenAs:
    if declared.intervention is None:
        return "type"
    return "instance" if isinstance(declared.intervention, Intervention) else "function"


# --- from files -------------------------------------------------------------------------------------------


def checked(folder: Path, contents: Contents) -> tuple[Saved, dict[str, SavedWeight]]:
    """What a folder says, in the form that it must have.

    Raises:
        StorageError: it has another.
    """
    try:
        saved = Saved.model_validate(contents.description)
        weights = TypeAdapter(dict[str, SavedWeight]).validate_python(contents.notes)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        listed = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found[:5])
        raise StorageError(
            f"{folder / CONFIG} does not say what save_pretrained writes there: {listed}. {REMEDY}"
        ) from error
    numbers = [entry.intervention for entry in saved.representations]
    if sorted(set(numbers)) != list(range(len(saved.interventions))):
        raise StorageError(
            f"{folder / CONFIG} has {len(saved.interventions)} interventions, and its representations speak of the"
            f" numbers {sorted(set(numbers))}. {REMEDY}"
        )
    _check_partitions(folder, saved)
    return saved, weights


def restored(folder: Path, saved: Saved, tensors: Mapping[str, Tensor], types: TypeNames) -> Restored:
    """The configurations that were saved, with their interventions.

    Raises:
        StorageError: something in the files does not fit the rest.
        UnknownNameError: a class or a function that is not known here.
    """
    where = str(folder / CONFIG)
    held, constants = _sorted(folder, saved, tensors)
    interventions = [
        put_together(types.named(one.type), one.arguments, held[number], one.frozen, where)
        for number, one in enumerate(saved.interventions)
    ]
    try:
        names = saved.intervention_types
        listed: Any = (
            [None if name is None else types.named(name) for name in names]
            if isinstance(names, list)
            else types.named(names)
        )
        options = {"mode": saved.mode, "model_type": saved.model_type}
        entries = [
            _entries(entry, interventions[entry.intervention], constants.get(index), types)
            for index, entry in enumerate(saved.representations)
        ]
        apart = [
            constants.get(index)
            if entry.constant is not None and entry.constant.field == "intervention_constant_sources"
            else None
            for index, entry in enumerate(saved.representations)
        ]
        common = {
            **options,
            "intervention_constant_sources": None if all(one is None for one in apart) else apart,
        }
        return Restored(
            IntervenableConfig([declared for declared, _ in entries], listed, **common),
            IntervenableConfig([made for _, made in entries], **common),
        )
    except (ConfigError, NotAvailableError) as error:
        if isinstance(error, LookupError):
            raise
        raise StorageError(f"{where} declares something that cannot be: {error} {REMEDY}") from error


def _entries(
    saved: SavedRepresentation, intervention: Intervention, constant: Tensor | None, types: TypeNames
) -> tuple[RepresentationConfig, RepresentationConfig]:
    """A representation as it was declared, and one that has the intervention itself."""
    fields: dict[str, Any] = dict(saved.fields)
    strange = sorted(fields.keys() - (RepresentationConfig.model_fields.keys() - MADE))
    if strange:
        raise ConfigError(f"a representation has the field {strange[0]!r}.")
    if saved.constant is not None and saved.constant.field == "source_representation":
        fields["source_representation"] = constant
    given: dict[str, Any] = {}
    if saved.given_as == "instance":
        given["intervention"] = intervention
    elif saved.given_as == "function":
        if not isinstance(intervention, CallableIntervention):
            raise ConfigError(f"a {type(intervention).__name__} stands where a function was declared.")
        given["intervention"] = intervention.function
    if saved.intervention_type is not None:
        given["intervention_type"] = types.named(saved.intervention_type)
    plain = {name: value for name, value in fields.items() if name not in SETTINGS}
    return RepresentationConfig(**fields, **given), RepresentationConfig(**plain, intervention=intervention)


def _sorted(
    folder: Path, saved: Saved, tensors: Mapping[str, Tensor]
) -> tuple[list[dict[str, Tensor]], dict[int, Tensor]]:
    """The tensors of each intervention, and the constants by representation."""
    held: list[dict[str, Tensor]] = [{} for _ in saved.interventions]
    left = dict(tensors)
    constants: dict[int, Tensor] = {}
    for index, entry in enumerate(saved.representations):
        if entry.constant is not None:
            name = f"constants.{index}"
            if name not in left:
                raise StorageError(f"{folder}: the tensor {name!r} is missing. {REMEDY}")
            constants[index] = _constant(left.pop(name), entry.constant, folder)
    for number, own in enumerate(held):
        prefix = f"interventions.{number}."
        for name in [name for name in left if name.startswith(prefix)]:
            own[name.removeprefix(prefix)] = left.pop(name)
    if left:
        raise StorageError(
            f"{folder} has tensors that belong to nothing: {', '.join(sorted(left)[:3])}. {REMEDY}"
        )
    return held, constants


def _constant(values: Tensor, saved: SavedConstant, folder: Path) -> Tensor:
    if saved.trained == "no":
        return values
    if not (values.is_floating_point() or values.is_complex()):
        raise StorageError(f"{folder}: a constant of {values.dtype} cannot be trained. {REMEDY}")
    return nn.Parameter(values) if saved.trained == "parameter" else values.requires_grad_()


def _check_partitions(folder: Path, saved: Saved) -> None:
    """Refuse parts of a subspace that no memory holds."""
    given = [entry.fields.get("subspace_partition") for entry in saved.representations]
    given += [one.arguments.get("subspace_partition") for one in saved.interventions]
    if any(number > LARGEST_INDEX for partition in given for number in _numbers_in(partition)):
        raise StorageError(
            f"{folder / CONFIG} has a subspace_partition with indices above {LARGEST_INDEX:,}. {REMEDY}"
        )


def _numbers_in(value: JsonValue) -> Iterator[float]:
    if isinstance(value, (int, float)):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _numbers_in(inner)
