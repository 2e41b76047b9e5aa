"""What users declare: which representations to intervene on, and how.

Both records are pydantic models: they are checked when they are made, go to JSON and back, and describe
themselves as a JSON Schema. Whether the model at hand has such a layer or component is checked when the
configuration is bound to it (`IntervenableModel`); the configuration is read then and not again.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from torch import Tensor, nn

import interventions
from intervenable.errors import (
    ConfigError,
    IntervenableWarning,
    NotAvailableError,
    RenamedWarning,
    unknown_name,
)
from interventions import Intervention, VanillaIntervention
from interventions.subspaces import parse_partition, partition_to_config
from model_maps import COMPONENTS, is_head_component

Unit = Literal["pos", "h", "h.pos"]
UNITS: tuple[str, ...] = get_args(Unit)

MODULE_PATH = re.compile(r"[A-Za-z_]\w*(\[-?\d+\]|\.\w+)*\.(input|output)")
"""A component given as a module path: `model.layers[3].mlp.output`."""


def is_module_path(component: str) -> bool:
    """Whether a component is a module path ending in `.input` or `.output` and not a name."""
    return MODULE_PATH.fullmatch(component) is not None


# --- fields that JSON has no type for ---------------------------------------------------------------------


def _type_from(value: object) -> object:
    """An intervention class, from itself or from the name it is registered under."""
    if isinstance(value, str):
        return interventions.intervention_named(value)
    if value is None or (isinstance(value, type) and issubclass(value, Intervention)):
        return value
    if isinstance(value, Intervention):
        raise ValueError(
            f"an instance of {type(value).__name__} was given where a class is meant;"
            " instances go into `intervention`"
        )
    raise ValueError(
        f"{value!r} is not an intervention class: give a subclass of Intervention or the name of a registered one"
    )


def _type_name(value: type[Intervention]) -> str:
    return interventions.name_of(value)


def _intervention_from(value: object) -> object:
    """An intervention object or a function, from itself or from what `_intervention_json` made of it."""
    if isinstance(value, Mapping):
        if set(value) == {"function"}:
            return interventions.callable_named(value["function"])
        if set(value) <= {"type", "arguments"} and "type" in value:
            return interventions.intervention_named(value["type"])(**value.get("arguments", {}))
        raise ValueError(
            'an intervention in JSON is {"function": name} or {"type": name, "arguments": {...}}'
        )
    if isinstance(value, type) and issubclass(value, Intervention):
        raise ValueError(
            f"the class {value.__name__} was given where an instance is meant; classes go into `intervention_type`"
        )
    if value is None or callable(value):
        return value
    raise ValueError(
        f"{value!r} is neither an intervention nor a function of (base), (base, source) or"
        " (base, source, subspaces)"
    )


def _intervention_json(value: Any) -> object:
    if isinstance(value, Intervention):
        if value.state_dict():
            raise ValueError(
                f"this {type(value).__name__} holds tensors ({', '.join(value.state_dict())}), which do not go into"
                " JSON: declare it by `intervention_type`, and keep its weights in a file of their own"
            )
        return {"type": interventions.name_of(type(value)), "arguments": value.to_config()}
    return {"function": interventions.name_of_callable(value)}


def _tensor_from(value: object) -> object:
    if value is None or isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        return torch.tensor(value["values"], dtype=getattr(torch, _DTYPES[value["dtype"]]))
    return torch.as_tensor(value)


_DTYPES = {name: name for name in ("float16", "bfloat16", "float32", "float64")}


def _tensor_json(value: Tensor) -> dict[str, object]:
    return {"dtype": str(value.dtype).removeprefix("torch."), "values": value.tolist()}


def _partition_from(value: object) -> object:
    parse_partition(value)  # type: ignore[arg-type]  # it says what is wrong with anything else
    return value


def _partition_json(value: Any) -> object:
    return partition_to_config(parse_partition(value))


def _if_given(serialize: Callable[[Any], object]) -> PlainSerializer:
    return PlainSerializer(lambda value: None if value is None else serialize(value), when_used="json")


InterventionType = Annotated[
    type[Intervention] | None,
    BeforeValidator(_type_from),
    _if_given(_type_name),
    WithJsonSchema({"type": ["string", "null"], "description": "name of a registered intervention class"}),
]
InterventionObject = Annotated[
    Any,
    BeforeValidator(_intervention_from),
    _if_given(_intervention_json),
    WithJsonSchema(
        {"type": ["object", "null"], "description": "registered function, or class with arguments"}
    ),
]
Values = Annotated[
    Any,
    BeforeValidator(_tensor_from),
    _if_given(_tensor_json),
    WithJsonSchema({"type": ["object", "array", "null"], "description": "dtype and nested values"}),
]
Partition = Annotated[
    Any,
    BeforeValidator(_partition_from),
    _if_given(_partition_json),
    WithJsonSchema(
        {"type": ["array", "null"], "description": "[start, end) pairs, index lists or {index_set}"}
    ),
]
Key = str | int


# --- the two records --------------------------------------------------------------------------------------


def _all_faults(subject: str, error: ValidationError) -> ConfigError:
    """Pydantic's findings as one error of ours, a line for each."""
    faults = []
    for found in error.errors():
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"])
        cause = found.get("ctx", {}).get("error")
        text = str(cause) if cause is not None else f"{found['msg']} (given: {found['input']!r})"
        faults.append(f"{place.lstrip('.')}: {text}" if place else text)
    if len(faults) == 1:
        return ConfigError(f"{subject}: {faults[0]}", faults)
    listed = "\n".join(f"- {fault}" for fault in faults)
    return ConfigError(f"{subject}: {len(faults)} faults.\n{listed}", faults)


class _Declared(BaseModel):
    """What both records share: fields by position, old names, and faults reported all at once."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    POSITIONAL: ClassVar[tuple[str, ...]] = ()
    RENAMED: ClassVar[Mapping[str, str]] = {}
    IGNORED: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *args: Any, **fields: Any) -> None:
        subject = type(self).__name__
        if len(args) > len(self.POSITIONAL):
            raise ConfigError(
                f"{subject} takes at most {len(self.POSITIONAL)} positional fields"
                f" ({', '.join(self.POSITIONAL)}), not {len(args)}."
            )
        placed = dict(zip(self.POSITIONAL, args, strict=False))
        twice = sorted(placed.keys() & fields.keys())
        if twice:
            raise ConfigError(f"{subject} was given {', '.join(twice)} both by position and by name.")
        try:
            super().__init__(**placed, **fields)
        except ValidationError as error:
            for found in error.errors():
                cause = found.get("ctx", {}).get("error")
                if isinstance(cause, NotYetError):
                    raise NotAvailableError(str(cause)) from error
            raise _all_faults(subject, error) from error

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        fields = dict(data)
        for old, new in cls.RENAMED.items():
            if old in fields:
                warnings.warn(f"{cls.__name__}: {old!r} is now called {new!r}.", RenamedWarning, stacklevel=4)
                if new in fields:
                    raise ValueError(f"both {old!r} and its new name {new!r} were given")
                fields[new] = fields.pop(old)
        for name, reason in cls.IGNORED.items():
            if name in fields:
                warnings.warn(
                    f"{cls.__name__}: {name!r} has no effect: {reason}", IntervenableWarning, stacklevel=4
                )
                del fields[name]
        unknown = [name for name in fields if name not in cls.model_fields]
        if unknown:
            raise ValueError("\n".join(unknown_name("field", name, cls.model_fields) for name in unknown))
        return fields

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in type(self).model_fields)

    __hash__ = object.__hash__


def _same(left: object, right: object) -> bool:
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        if not (isinstance(left, Tensor) and isinstance(right, Tensor)):
            return False
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, Intervention) and isinstance(right, Intervention):
        return left is right or (
            type(left) is type(right) and left.to_config() == right.to_config() and not left.state_dict()
        )
    return bool(left == right)


class NotYetError(ValueError):
    """A known value of a field that is not available yet (inside validators, where pydantic wants ValueError)."""


class RepresentationConfig(_Declared):
    """One representation to intervene on: where it is, in which units, and what is done to it.

    The fields may be given by position, in the order below, or by name:

    Example:
        >>> RepresentationConfig(0, "block_output", "pos", 1, group_key=0).component
        'block_output'

    Raises:
        ConfigError: with every fault found, each with its field.
        NotAvailableError: a unit that is known and not there yet.
    """

    model_config = ConfigDict(frozen=True)

    layer: int | None = None
    """Index of the block, negative from the end. Left out, it is 0 for components of a block; it must be left out
    for components outside the blocks and for module paths."""

    component: str = "block_output"
    """Component name (`model_maps.COMPONENTS`), or a module path ending in `.input` or `.output`."""

    unit: str = "pos"
    """What is exchanged: positions (`pos`), heads (`h`), or positions of heads (`h.pos`)."""

    max_number_of_units: int = 1
    """How many units an intervention that sees them concatenated is made for. No limit for the others."""

    low_rank_dimension: int | None = None
    """Directions of a low-rank rotation; latents of a JumpReLU autoencoder."""

    intervention_type: InterventionType = None
    """Class of the intervention, or its registered name."""

    intervention: InterventionObject = None
    """The intervention itself: an instance, or a function of `(base)`, `(base, source)` or
    `(base, source, subspaces)`. Not together with `intervention_type`."""

    subspace_partition: Partition = None
    """Parts of the subspace that `subspaces` then counts: `[start, end)` pairs, longer index lists, slices, ranges,
    or `IndexSet` for a set of two."""

    group_key: Key | None = None
    """Representations of one key take their values from one source."""

    intervention_link_key: Key | None = None
    """Representations of one key share one intervention, and so its weights."""

    moe_key: int | None = None
    """Index of an expert, for maps whose experts are modules of their own."""

    source_representation: Values = None
    """Constant value instead of a source run; its last axis is as wide as the component."""

    latent_dim: int | None = None
    """Latents of an autoencoder."""

    name: str | None = None
    """Unique name; by default made from layer, component and unit."""

    POSITIONAL: ClassVar[tuple[str, ...]] = (
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
        "latent_dim",
        "name",
    )
    RENAMED: ClassVar[Mapping[str, str]] = {
        "intervenable_layer": "layer",
        "intervenable_representation_type": "component",
        "intervenable_unit": "unit",
        "intervenable_low_rank_dimension": "low_rank_dimension",
    }

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = [*self._component_faults(), *self._number_faults()]
        if self.intervention is not None and self.intervention_type is not None:
            faults.append(
                f"both an intervention ({_described(self.intervention)}) and an intervention_type"
                f" ({self.intervention_type.__name__}) were given; give one of the two"
            )
        if self.name is not None and (not self.name or "/" in self.name):
            faults.append(f"name {self.name!r} must not be empty and must not contain '/'")
        if self.unit == "t":
            raise NotYetError(
                "Unit 't' (steps of a recurrent net) is not available yet. Allowed: pos, h, h.pos."
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _component_faults(self) -> Iterable[str]:
        if self.unit not in UNITS and self.unit != "t":
            yield unknown_name("unit", self.unit, UNITS)
            return
        if is_module_path(self.component):
            if self.layer is not None:
                yield f"layer {self.layer} makes no sense with the module path {self.component!r}: leave it out"
            if self.unit != "pos":
                yield f"unit {self.unit!r} needs heads, and the module path {self.component!r} names none: use 'pos'"
            return
        if self.component not in COMPONENTS:
            yield (
                unknown_name("component", self.component, COMPONENTS)
                + " A module path ending in .input or .output is a component too."
            )
            return
        if COMPONENTS[self.component].scope == "model" and self.layer is not None:
            yield f"layer {self.layer} makes no sense: there is one {self.component!r} in a model: leave layer out"
        if is_head_component(self.component):
            if self.unit == "pos":
                yield f"unit 'pos' does not fit {self.component!r}, which is split into heads: use 'h' or 'h.pos'"
        elif self.unit != "pos":
            by_heads = f"head_{self.component}"
            hint = f", or the component {by_heads!r}" if by_heads in COMPONENTS else ""
            yield f"unit {self.unit!r} does not fit {self.component!r}, which has no heads: use 'pos'{hint}"

    def _number_faults(self) -> Iterable[str]:
        for field in ("max_number_of_units", "low_rank_dimension", "latent_dim"):
            value = getattr(self, field)
            if value is not None and value < 1:
                yield f"{field} is {value}; it must be 1 or more"


def _described(intervention: object) -> str:
    return type(intervention).__name__ if isinstance(intervention, nn.Module) else repr(intervention)


def _representations_from(value: object) -> object:
    """A list of representations, from any form in which one or several may be written."""
    if isinstance(value, (RepresentationConfig, Mapping)):
        return [_representation_from(value)]
    if isinstance(value, (list, tuple)):
        forms = (RepresentationConfig, Mapping, list, tuple)
        if value and not all(isinstance(item, forms) for item in value):
            return [_representation_from(value)]
        return [_representation_from(item) for item in value]
    raise ValueError(
        f"representations are RepresentationConfigs, dicts or positional lists, one or a list of them, not {value!r}"
    )


def _representation_from(value: object) -> RepresentationConfig:
    if isinstance(value, RepresentationConfig):
        return value
    if isinstance(value, Mapping):
        return RepresentationConfig(**value)
    return RepresentationConfig(*value)  # type: ignore[misc]


def _faults_of_each(value: object) -> object:
    """`_representations_from`, with the faults of all entries and not of the first alone."""
    if not isinstance(value, (list, tuple)):
        return _representations_from(value)
    if any(not isinstance(item, (RepresentationConfig, Mapping, list, tuple)) for item in value):
        return _representations_from(value)
    made, faults = [], []
    for position, item in enumerate(value):
        try:
            made.append(_representation_from(item))
        except NotAvailableError as error:
            raise NotYetError(str(error)) from error
        except ConfigError as error:
            faults.append(f"representation {position}: {error}")
    if faults:
        raise ValueError("; ".join(faults))
    return made


def _types_from(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_type_from(item) for item in value]
    return _type_from(value)


def _types_json(value: Any) -> object:
    return [_type_name(item) for item in value] if isinstance(value, list) else _type_name(value)


def _model_type_from(value: object) -> object:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, type):
        return value.__name__
    raise ValueError(f"model_type is a model class or its name, not {value!r}")


class IntervenableConfig(_Declared):
    """All that is declared for one `IntervenableModel`: its representations and their interventions.

    Example:
        >>> config = IntervenableConfig([RepresentationConfig(0, "block_output", "pos", 1)], VanillaIntervention)
        >>> IntervenableConfig.model_validate_json(config.model_dump_json()) == config
        True

    Raises:
        ConfigError: with every fault found, each with the entry at fault.
        NotAvailableError: `mode="serial"`.
    """

    representations: Annotated[
        list[RepresentationConfig],
        BeforeValidator(_faults_of_each, json_schema_input_type=list[RepresentationConfig]),
    ] = []
    """The representations, applied in this order where several meet at one place."""

    intervention_types: Annotated[
        Any,
        BeforeValidator(_types_from),
        _if_given(_types_json),
        WithJsonSchema(
            {"type": ["string", "array"], "description": "registered class name, one or one each"}
        ),
    ] = VanillaIntervention
    """Class for the representations that name none, or a list with one for each representation."""

    mode: str = "parallel"
    """`parallel`: every source is run by itself and all edits meet in the base run."""

    model_type: Annotated[str | None, BeforeValidator(_model_type_from)] = None
    """Model class, or its name, that the declaration is for; checked when a model is bound."""

    intervention_constant_sources: list[Values] | None = None
    """A constant source (or None) for each representation, instead of `source_representation` in each."""

    POSITIONAL: ClassVar[tuple[str, ...]] = ("representations", "intervention_types", "mode", "model_type")
    RENAMED: ClassVar[Mapping[str, str]] = {
        "intervenable_representations": "representations",
        "intervenable_interventions_type": "intervention_types",
        "intervenable_model_type": "model_type",
    }
    IGNORED: ClassVar[Mapping[str, str]] = {
        "use_fast": "every path is fast here, with locations of any shape.",
    }

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mode == "serial":
            raise NotYetError("mode='serial' is not available yet. Allowed: 'parallel'.")
        faults = []
        if self.mode != "parallel":
            faults.append(unknown_name("mode", self.mode, ["parallel"]))
        faults.extend(self._type_faults())
        constants = self.intervention_constant_sources
        if constants is not None and len(constants) != len(self.representations):
            faults.append(
                f"intervention_constant_sources has {len(constants)} entries for {len(self.representations)}"
                " representations: give one for each, None where there is none"
            )
        names = [entry.name for entry in self.representations if entry.name is not None]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            faults.append(f"names must be unique, and {', '.join(map(repr, twice))} is given more than once")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _type_faults(self) -> Iterable[str]:
        types = self.intervention_types
        if types is None:
            yield "intervention_types is None: give an intervention class, or leave it out for VanillaIntervention"
        if not isinstance(types, list):
            return
        if len(types) != len(self.representations):
            yield (
                f"intervention_types has {len(types)} entries for {len(self.representations)} representations:"
                " give one class for all or one for each"
            )
        for position, (entry, listed) in enumerate(zip(self.representations, types, strict=False)):
            own = entry.intervention_type
            if own is not None and listed is not None and own is not listed:
                yield (
                    f"representation {position} says {own.__name__} and intervention_types says"
                    f" {listed.__name__}: give one of the two"
                )
            if entry.intervention is not None and listed is not None:
                yield (
                    f"representation {position} has an intervention of its own and intervention_types says"
                    f" {listed.__name__}: put None there"
                )
            if listed is None and own is None and entry.intervention is None:
                yield f"representation {position} has no intervention: intervention_types says None for it"

    def add_intervention(self, representations: Any) -> None:
        """Append one or several representations, in any form that the constructor takes, in place.

        Raises:
            ConfigError: with every fault found; the configuration is then as it was before.
        """
        added = IntervenableConfig(representations=representations).representations
        types = self.intervention_types
        if isinstance(types, list):
            types = [*types, *(None if _own(entry) else VanillaIntervention for entry in added)]
        constants = self.intervention_constant_sources
        if constants is not None:
            constants = [*constants, *(None for _ in added)]
        grown = IntervenableConfig(
            representations=[*self.representations, *added],
            intervention_types=types,
            mode=self.mode,
            model_type=self.model_type,
            intervention_constant_sources=constants,
        )
        self.representations = grown.representations
        self.intervention_types = grown.intervention_types
        self.intervention_constant_sources = grown.intervention_constant_sources

    def type_of(self, index: int) -> type[Intervention] | None:
        """The class for one representation; None if it has an intervention of its own."""
        entry = self.representations[index]
        if entry.intervention is not None:
            return None
        listed = self.intervention_types
        chosen = listed[index] if isinstance(listed, list) else listed
        result: type[Intervention] = entry.intervention_type or chosen
        return result

    def constant_of(self, index: int) -> Tensor | None:
        """The constant source declared for one representation, or None.

        Raises:
            ConfigError: one is given in the representation and another in `intervention_constant_sources`.
        """
        own: Tensor | None = self.representations[index].source_representation
        listed = self.intervention_constant_sources
        from_list: Tensor | None = None if listed is None else listed[index]
        if own is not None and from_list is not None:
            raise ConfigError(
                f"representation {index} has a source_representation and an entry in"
                " intervention_constant_sources: give one of the two."
            )
        return own if own is not None else from_list


def _own(entry: RepresentationConfig) -> bool:
    return entry.intervention is not None or entry.intervention_type is not None


def config_from(value: Any) -> IntervenableConfig:
    """An `IntervenableConfig` from itself, from a dict of its fields, or from representations in any form."""
    if isinstance(value, IntervenableConfig):
        return value
    if isinstance(value, Mapping) and value.keys() & (
        IntervenableConfig.model_fields.keys() | IntervenableConfig.RENAMED.keys()
    ):
        return IntervenableConfig(**value)
    return IntervenableConfig(representations=value)
