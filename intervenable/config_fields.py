"""The fields of a configuration, one by one: what is accepted, what is kept, and what becomes of it in JSON."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Hashable, Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, PlainSerializer, ValidationInfo, WithJsonSchema
from torch import Tensor

import interventions
import model_maps
from intervenable.errors import (
    ConfigError,
    NotAvailableError,
    UnknownNameError,
    unknown_component,
    unknown_name,
)
from intervenable.position_entries import entry_from_json, entry_to_json, is_json_of_entry
from interventions import Intervention
from interventions.signatures import pattern_of_function
from interventions.subspaces import parse_partition, partition_to_config
from model_maps import ALIASES, COMPONENTS

UNITS = tuple(dict.fromkeys(unit for units in model_maps.UNITS.values() for unit in units))

MODULE_PATH = re.compile(r"[A-Za-z_]\w*(\[-?\d+\]|\.\w+)*\.(input|output)")
"""A component given as a module path: `model.layers[3].mlp.output`."""

LATER_UNITS = {"t": "steps of a recurrent net"}


def is_module_path(component: str) -> bool:
    """Whether a component is a module path ending in `.input` or `.output` and not a name."""
    return MODULE_PATH.fullmatch(component) is not None


# --- names and numbers ------------------------------------------------------------------------------------


def _component_from(component: object) -> str:
    if not isinstance(component, str):
        raise ConfigError(f"component is {component!r}; it must be a name or a module path.")
    component = ALIASES.get(component, component)
    if component not in COMPONENTS and not is_module_path(component):
        raise UnknownNameError(unknown_component(component, COMPONENTS))
    return component


def _unit_from(unit: object) -> str:
    if not isinstance(unit, str):
        raise ConfigError(f"unit is {unit!r}; it must be one of: {', '.join(UNITS)}.")
    if unit in LATER_UNITS:
        raise NotAvailableError(
            f"Unit {unit!r} ({LATER_UNITS[unit]}) is not available yet. Allowed: {', '.join(UNITS)}."
        )
    if unit not in UNITS:
        raise UnknownNameError(unknown_name("unit", unit, UNITS))
    return unit


def _whole_number(value: Any, info: ValidationInfo) -> int | None:
    """An int, also as numpy or torch have it; not a bool, not a text, not a float."""
    if value is None:
        return None
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{info.field_name} is {value!r}; it must be a whole number.") from None


def _count(value: Any, info: ValidationInfo) -> int | None:
    number = _whole_number(value, info)
    if number is not None and number < 1:
        raise ConfigError(f"{info.field_name} is {number}; it must be 1 or more.")
    return number


def _name_from(name: object) -> str | None:
    if name is not None and (not isinstance(name, str) or not name or "/" in name):
        raise ConfigError(f"name is {name!r}; it must be a text, not empty and without '/'.")
    return name


def _model_type_from(value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, type):
        return value.__name__
    raise ConfigError(f"model_type is {value!r}; it must be a model class or its name.")


def _mode_from(value: object) -> str:
    if value == "serial":
        raise NotAvailableError("mode='serial' is not available yet. Allowed: 'parallel'.")
    if value != "parallel":
        raise UnknownNameError(unknown_name("mode", value, ["parallel"]))
    return "parallel"


def _key_from(key: Any) -> Any:
    """Any hashable value; lists, as JSON has them for tuples, become tuples."""
    if isinstance(key, list):
        key = tuple(map(_key_from, key))
    try:
        hash(key)
    except TypeError:
        raise ConfigError(f"{key!r} cannot be a key: give a text, a number or a tuple of them.") from None
    return key


def _key_json(key: Hashable) -> object:
    if isinstance(key, tuple):
        return [_key_json(item) for item in key]
    if not isinstance(key, (str, int, float)):
        raise ConfigError(f"The key {key!r} does not go into JSON: use a text, a number or a tuple of them.")
    return key


RENORMALIZE = ("none", "rows", "check")


def _renormalize_from(value: object) -> str:
    if value not in RENORMALIZE:
        raise UnknownNameError(unknown_name("renormalize", value, RENORMALIZE))
    return str(value)


# --- where ------------------------------------------------------------------------------------------------


def _where_from(value: Any) -> Any:
    """Locations as they are written; a pair or entries that are in the form of JSON, as what they stand for."""
    if isinstance(value, Mapping) and value and set(value) <= {"source", "base"}:
        return (_side_from(value.get("source")), _side_from(value.get("base")))
    if isinstance(value, tuple) and len(value) != 2:
        raise ConfigError(
            f"where is {value!r}, a tuple of {len(value)}, and a tuple is a (source, base) pair."
            " Write a list for a set of positions."
        )
    return tuple(map(_side_from, value)) if isinstance(value, tuple) else _side_from(value)


def _side_from(side: Any) -> Any:
    if isinstance(side, list) or is_json_of_entry(side):
        return entry_from_json(side)
    if isinstance(side, Mapping):
        return {level: entry_from_json(entry) for level, entry in side.items()}
    return side


def _where_json(value: Any) -> object:
    if isinstance(value, tuple):
        return {"source": _side_json(value[0]), "base": _side_json(value[1])}
    return _side_json(value)


def _side_json(side: Any) -> object:
    if isinstance(side, Mapping):
        return {level: entry_to_json(entry) for level, entry in side.items()}
    return entry_to_json(side)


# --- interventions ----------------------------------------------------------------------------------------


def _registered(kind: Callable[[str], Any], name: object) -> Any:
    """What is registered under a name, or an error of ours."""
    if not isinstance(name, str):
        raise ConfigError(f"{name!r} is no name of an intervention or a function.")
    try:
        return kind(name)
    except interventions.UnknownInterventionError as error:
        raise UnknownNameError(str(error)) from error


def type_from(value: object) -> type[Intervention] | None:
    """An intervention class, from itself or from the name it is registered under.

    Raises:
        ConfigError: anything else.
        UnknownNameError: no class is registered under that name.
    """
    if isinstance(value, str):
        found: type[Intervention] = _registered(interventions.intervention_named, value)
        return found
    if value is None or (isinstance(value, type) and issubclass(value, Intervention)):
        return value
    if isinstance(value, Intervention):
        raise ConfigError(
            f"An instance of {type(value).__name__} was given where a class is meant;"
            " instances go into `intervention`."
        )
    raise ConfigError(
        f"{value!r} is not an intervention class: give a subclass of Intervention or the name of a registered one."
    )


def type_json(value: type[Intervention]) -> str:
    """The name under which a class is registered."""
    try:
        return interventions.name_of(value)
    except interventions.UnknownInterventionError as error:
        raise UnknownNameError(str(error)) from error


def types_from(value: object) -> object:
    """One intervention class for all, or a list with one (or None) for each.

    Raises:
        ConfigError: None, or anything else that is no class.
    """
    if value is None:
        raise ConfigError(
            "intervention_types is None: give an intervention class, or leave it out for VanillaIntervention."
        )
    if isinstance(value, (list, tuple)):
        return [type_from(item) for item in value]
    return type_from(value)


def _types_json(value: Any) -> object:
    if isinstance(value, list):
        return [None if item is None else type_json(item) for item in value]
    return type_json(value)


def _intervention_from(value: object) -> object:
    """An intervention object or a function, from itself or from what `_intervention_json` made of it."""
    if isinstance(value, Mapping):
        return _intervention_of(value)
    if isinstance(value, type) and issubclass(value, Intervention):
        raise ConfigError(
            f"The class {value.__name__} was given where an instance is meant; classes go into `intervention_type`."
        )
    if value is None or isinstance(value, Intervention):
        return value
    if callable(value):
        try:
            pattern_of_function(value)
        except interventions.InterventionError as error:
            raise ConfigError(str(error)) from error
        return value
    raise ConfigError(
        f"{value!r} is neither an intervention nor a function of (base), (base, source) or"
        " (base, source, subspaces)."
    )


def _intervention_of(fields: Mapping[Any, Any]) -> object:
    if set(fields) == {"function"}:
        return _registered(interventions.callable_named, fields["function"])
    arguments = fields.get("arguments", {})
    if "type" not in fields or set(fields) - {"type", "arguments"} or not isinstance(arguments, Mapping):
        raise ConfigError(
            f'intervention is {dict(fields)!r}; in JSON it is {{"function": name}} or'
            ' {"type": name, "arguments": {...}}.'
        )
    cls = _registered(interventions.intervention_named, fields["type"])
    try:
        return cls(**arguments)
    except (interventions.InterventionError, TypeError) as error:
        raise ConfigError(f"{cls.__name__} cannot be made of {dict(arguments)!r}: {error}") from error


def _intervention_json(value: Any) -> object:
    try:
        if not isinstance(value, Intervention):
            return {"function": interventions.name_of_callable(value)}
        name, arguments = interventions.name_of(type(value)), value.to_config()
    except interventions.UnknownInterventionError as error:
        raise UnknownNameError(str(error)) from error
    except interventions.InterventionError as error:
        raise ConfigError(str(error)) from error
    if value.state_dict():
        raise ConfigError(
            f"This {name} holds tensors ({', '.join(value.state_dict())}), which do not go into"
            " JSON: declare it by `intervention_type`, and keep its weights in a file of their own."
        )
    return {"type": name, "arguments": arguments}


# --- tensors and partitions -------------------------------------------------------------------------------


def _tensor_from(value: Any) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, Mapping):
            dtype = getattr(torch, value["dtype"])
            return (
                torch.tensor([float(item) for item in value["values"]], dtype=torch.float64)
                .to(dtype)
                .reshape(value["shape"])
            )
        return torch.as_tensor(value)
    except (KeyError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{value!r} is no constant source: give a tensor, nested lists of numbers, or a mapping of dtype, shape"
            " and values."
        ) from error


def _tensor_json(value: Tensor) -> dict[str, object]:
    numbers = value.detach().flatten().tolist()
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        # JSON has no infinities and no NaN.
        "values": [number if math.isfinite(number) else str(number) for number in numbers],
    }


def _partition_from(value: Any) -> object:
    """A partition in the form that JSON has too, so that it is the same whichever way it was written."""
    try:
        return partition_to_config(parse_partition(value))
    except interventions.SubspaceError as error:
        raise ConfigError(str(error)) from error


# --- types ------------------------------------------------------------------------------------------------


def in_json(serialize: Callable[[Any], object]) -> PlainSerializer:
    """Serialize what is given by a function, and None as null."""
    return PlainSerializer(lambda value: None if value is None else serialize(value), when_used="json")


def _schema(description: str, *types: str, **more: object) -> WithJsonSchema:
    return WithJsonSchema({"type": [*types], "description": description, **more})


ComponentName = Annotated[
    str,
    BeforeValidator(_component_from),
    WithJsonSchema(
        {
            "type": "string",
            "anyOf": [{"enum": sorted(COMPONENTS)}, {"pattern": f"^{MODULE_PATH.pattern}$"}],
            "description": "name of a component, or module path ending in .input or .output",
        }
    ),
]
UnitName = Annotated[
    str, BeforeValidator(_unit_from), WithJsonSchema({"type": "string", "enum": list(UNITS)})
]
WholeNumber = Annotated[int | None, BeforeValidator(_whole_number)]
Count = Annotated[int, BeforeValidator(_count), WithJsonSchema({"type": "integer", "minimum": 1})]
CountIfAny = Annotated[
    int | None, BeforeValidator(_count), WithJsonSchema({"type": ["integer", "null"], "minimum": 1})
]
Name = Annotated[
    str | None,
    BeforeValidator(_name_from),
    WithJsonSchema({"type": ["string", "null"], "pattern": "^[^/]+$"}),
]
Renormalize = Annotated[
    str, BeforeValidator(_renormalize_from), WithJsonSchema({"type": "string", "enum": list(RENORMALIZE)})
]
Where = Annotated[
    Any,
    BeforeValidator(_where_from),
    in_json(_where_json),
    _schema("locations", "integer", "string", "array", "object", "null"),
]
Mode = Annotated[str, BeforeValidator(_mode_from), WithJsonSchema({"type": "string", "enum": ["parallel"]})]
ModelType = Annotated[str | None, BeforeValidator(_model_type_from)]
Key = Annotated[
    Any,
    BeforeValidator(_key_from),
    in_json(_key_json),
    _schema("text, number or list of them", "string", "number", "array", "null"),
]
InterventionType = Annotated[
    type[Intervention] | None,
    BeforeValidator(type_from),
    in_json(type_json),
    _schema("name of a registered intervention class", "string", "null"),
]
InterventionTypes = Annotated[
    Any,
    BeforeValidator(types_from),
    in_json(_types_json),
    _schema(
        "name of a registered class, or one each",
        "string",
        "array",
        items={"type": ["string", "null"]},
        default="VanillaIntervention",
    ),
]
InterventionObject = Annotated[
    Any,
    BeforeValidator(_intervention_from),
    in_json(_intervention_json),
    _schema("registered function, or class with arguments", "object", "null"),
]
Values = Annotated[
    Any,
    BeforeValidator(_tensor_from),
    in_json(_tensor_json),
    _schema("dtype, shape and values, or nested lists", "object", "array", "null"),
]
Partition = Annotated[
    Any,
    BeforeValidator(_partition_from),
    _schema(
        "[start, end) pairs, longer index lists or {index_set}",
        "array",
        "null",
        items={"type": ["array", "object"]},
    ),
]
