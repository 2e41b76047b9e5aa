"""What users declare: which representations to intervene on, and how.

Both records are pydantic models: they are checked when they are made, go to JSON and back, and describe
themselves as a JSON Schema. Whether the model at hand has such a layer or component is checked when the
configuration is bound to it (`IntervenableModel`); the configuration is read then and not again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
)
from torch import Tensor, nn

from intervenable.config_base import Declared, SeveralFaultsError
from intervenable.config_fields import (
    ComponentName,
    Count,
    CountIfAny,
    InterventionObject,
    InterventionType,
    InterventionTypes,
    Key,
    Mode,
    ModelType,
    Name,
    Partition,
    Renormalize,
    UnitName,
    Values,
    Where,
    WholeNumber,
    is_module_path,
    types_from,
)
from intervenable.errors import (
    ConfigError,
    Fault,
    NotAvailableError,
    each_named,
)
from intervenable.locations import level_faults
from interventions import Intervention, VanillaIntervention
from model_maps import ALIASES, COMPONENTS

# --- one representation -----------------------------------------------------------------------------------


class RepresentationConfig(Declared):
    """One representation to intervene on: where it is, in which units, and what is done to it.

    The fields may be given by position, in the order below, or by name:

    Example:
        >>> RepresentationConfig(0, "block_output", "pos", 1, group_key=0).component
        'block_output'

    Raises:
        ConfigError: with every fault found.
        NotAvailableError: a unit or component that is known and not there yet.
    """

    model_config = ConfigDict(frozen=True)

    layer: WholeNumber = None
    """Index of the block, negative from the end. Left out, it is 0 for components of a block; it must be left out
    for components outside the blocks and for module paths."""

    component: ComponentName = "block_output"
    """Component name (`model_maps.COMPONENTS`), or a module path ending in `.input` or `.output`."""

    unit: UnitName = "pos"
    """What is exchanged: positions (`pos`), heads (`h`), positions of heads (`h.pos`); of attention matrices those of
    heads (`h`), their rows (`h.query`) or their entries (`h.query.key`)."""

    max_number_of_units: Count = 1
    """How many units an intervention that sees them concatenated is made for. No limit for the others."""

    low_rank_dimension: CountIfAny = None
    """Directions of a low-rank rotation; latents of a JumpReLU autoencoder."""

    intervention_type: InterventionType = None
    """Class of the intervention, or its registered name."""

    intervention: InterventionObject = None
    """The intervention itself: an instance, or a function of `(base)`, `(base, source)` or
    `(base, source, subspaces)`. Not together with `intervention_type` or with settings for one."""

    subspace_partition: Partition = None
    """Parts of the subspace that `subspaces` then counts: `[start, end)` pairs, longer index lists, slices, ranges,
    or `IndexSet` for a set of two."""

    group_key: Key = None
    """Representations of one key take their values from one source."""

    intervention_link_key: Key = None
    """Representations of one key share one intervention, and so its weights."""

    moe_key: WholeNumber = None
    """Index of an expert, for maps whose experts are modules of their own."""

    source_representation: Values = None
    """Constant value instead of a source run; its last axis is as wide as the component."""

    latent_dim: CountIfAny = None
    """Latents of an autoencoder."""

    name: Name = None
    """Unique name; by default made from layer, component and unit."""

    where: Where = None
    """Locations that hold unless a call gives `unit_locations`: for `pos` an entry or a list of them, for the other
    units a mapping such as `{"heads": 3, "queries": "last", "keys": "Spain"}`, where what is left out is all. A pair
    `(source, base)` where the two differ."""

    renormalize: Renormalize = "none"
    """What becomes of the edited rows of an attention pattern: nothing (`none`), they are divided by their sum
    (`rows`), or it is an error if one does not sum to one (`check`)."""

    # Type checkers would otherwise take pydantic's fields, by name and just as annotated, for all there is.
    if TYPE_CHECKING:

        def __init__(self, *args: Any, **fields: Any) -> None: ...

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
        "where",
        "renormalize",
    )
    RENAMED: ClassVar[Mapping[str, str]] = {
        "intervenable_layer": "layer",
        "intervenable_representation_type": "component",
        "intervenable_unit": "unit",
        "intervenable_low_rank_dimension": "low_rank_dimension",
    }

    @classmethod
    def _faults_between(cls, fields: Mapping[str, Any]) -> Iterable[ConfigError]:
        component, unit = fields.get("component"), fields.get("unit")
        if component is not None:
            component = ALIASES.get(component, component)  # as it was given, where another field is wrong
            if fields.get("layer") is not None:
                yield from _layer_faults(fields["layer"], component)
            if unit is not None:
                yield from _unit_faults(unit, component)
            word = COMPONENTS[component].word if component in COMPONENTS else component
            if fields.get("renormalize", "none") != "none" and word != "attention_pattern":
                yield ConfigError(
                    f"renormalize is for rows of 'attention_pattern', and not for {component!r}."
                )
        if unit is not None:
            yield from _where_faults(fields.get("where"), unit)
        yield from _object_faults(fields)

    def __hash__(self) -> int:
        return hash((self.layer, self.component, self.unit, self.max_number_of_units, self.name))


def _layer_faults(layer: object, component: str) -> Iterable[ConfigError]:
    if is_module_path(component):
        yield ConfigError(
            f"layer {layer} makes no sense with the module path {component!r}, which names its layer itself:"
            " leave layer out."
        )
    elif COMPONENTS[component].scope == "model":
        yield ConfigError(f"layer {layer} makes no sense: a model has one {component!r}. Leave layer out.")


def _unit_faults(unit: str, component: str) -> Iterable[ConfigError]:
    if is_module_path(component):
        if unit != "pos":
            yield ConfigError(
                f"unit {unit!r} needs heads, and the module path {component!r} names none: use 'pos'."
            )
        return
    known = COMPONENTS[component]
    if unit in known.units:
        return
    fitting = " or ".join(map(repr, known.units))
    if known.axes == "heads":
        yield ConfigError(
            f"unit {unit!r} does not fit {component!r}, which is split into heads: use {fitting}."
        )
    elif known.axes == "matrix":
        yield ConfigError(
            f"unit {unit!r} does not fit {component!r}, a matrix of queries by keys for each head: use {fitting}."
        )
    else:
        by_heads = f"head_{component}"
        hint = f", or the component {by_heads!r}" if by_heads in COMPONENTS else ""
        yield ConfigError(f"unit {unit!r} does not fit {component!r}, which has no heads: use 'pos'{hint}.")


def _where_faults(where: Any, unit: str) -> Iterable[ConfigError]:
    """Levels that a unit does not have, on either side."""
    for side in where if isinstance(where, tuple) else (where,):
        if isinstance(side, Mapping):
            yield from (ConfigError(fault) for fault in level_faults(side, unit))


def _object_faults(fields: Mapping[str, Any]) -> Iterable[ConfigError]:
    """What is given for a class beside an intervention that is there already."""
    given = fields.get("intervention")
    if given is None:
        return
    what = type(given).__name__ if isinstance(given, nn.Module) else getattr(given, "__name__", repr(given))
    cls = fields.get("intervention_type")
    if cls is not None:
        yield ConfigError(
            f"Both an intervention ({what}) and an intervention_type"
            f" ({cls if isinstance(cls, str) else cls.__name__}) were given; give one of the two."
        )
    settings = ("low_rank_dimension", "subspace_partition", "latent_dim")
    for name in (name for name in settings if fields.get(name) is not None):
        yield ConfigError(
            f"{name} is for an intervention that is to be made of intervention_type, and {what} is made already:"
            " leave it out."
        )


# --- all of them ------------------------------------------------------------------------------------------


def _listed(value: object) -> list[object]:
    """The representations one by one, from any form in which one or several may be written."""
    if isinstance(value, (RepresentationConfig, Mapping)):
        return [value]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(
            "representations are RepresentationConfigs, dicts or positional lists, one or a list of them,"
            f" not of type {type(value).__name__}."
        )
    if value and not isinstance(value[0], (RepresentationConfig, Mapping, list, tuple)):
        return [value]  # the fields of one, by position
    listed: list[object] = []
    for item in value:
        several = (
            isinstance(item, (list, tuple)) and item and isinstance(item[0], (RepresentationConfig, Mapping))
        )
        listed.extend(item if several else [item])  # what a function of `attention` gives for several layers
    return listed


def _representations_from(value: object) -> list[RepresentationConfig]:
    """Every representation, or the faults of all of them."""
    made: list[RepresentationConfig] = []
    faults: list[Fault] = []
    for index, item in enumerate(_listed(value)):
        try:
            made.append(_representation_from(item))
        except NotAvailableError as error:
            raise NotAvailableError(f"representation {index}: {error}") from error
        except ConfigError as error:
            faults.extend(each_named(error, f"representation {index}"))
    if faults:
        raise SeveralFaultsError(faults)
    return made


def _representation_from(value: Any) -> RepresentationConfig:
    if isinstance(value, RepresentationConfig):
        return value
    if isinstance(value, Mapping):
        return RepresentationConfig(**value)
    if isinstance(value, (list, tuple)):
        return RepresentationConfig(*value)
    raise ConfigError(f"{value!r} is no RepresentationConfig, no dict of its fields and no list of them.")


class IntervenableConfig(Declared):
    """All that is declared for one `IntervenableModel`: its representations and their interventions.

    Example:
        >>> config = IntervenableConfig([RepresentationConfig(0, "block_output", "pos", 1)], VanillaIntervention)
        >>> IntervenableConfig.model_validate_json(config.model_dump_json()) == config
        True

    Raises:
        ConfigError: with every fault found, each with the entry at fault.
        NotAvailableError: something that is known and not there yet (`mode="serial"`).
    """

    representations: Annotated[
        list[RepresentationConfig],
        BeforeValidator(_representations_from, json_schema_input_type=list[RepresentationConfig]),
    ] = Field(default_factory=list)
    """The representations, applied in this order where several meet at one place."""

    intervention_types: InterventionTypes = Field(default_factory=lambda: VanillaIntervention)
    """Class for the representations that name none, or a list with one for each representation."""

    mode: Mode = "parallel"
    """`parallel`: every source is run by itself and all edits meet in the base run."""

    model_type: ModelType = None
    """Model class, or its name, that the declaration is for; checked when a model is bound."""

    intervention_constant_sources: list[Values] | None = None
    """A constant source (or None) for each representation, instead of `source_representation` in each."""

    # Type checkers would otherwise take pydantic's fields, by name and just as annotated, for all there is.
    if TYPE_CHECKING:

        def __init__(self, *args: Any, **fields: Any) -> None: ...

    POSITIONAL: ClassVar[tuple[str, ...]] = ("representations", "intervention_types", "mode", "model_type")
    RENAMED: ClassVar[Mapping[str, str]] = {
        "intervenable_representations": "representations",
        "intervenable_interventions_type": "intervention_types",
        "intervenable_model_type": "model_type",
    }
    IGNORED: ClassVar[Mapping[str, str]] = {
        "use_fast": "every path is fast here, with locations of any shape.",
    }

    @property
    def use_cache(self) -> None:
        """Nothing of ours: `transformers.Trainer` sets it on what it takes for the config of a model of its own."""

    @use_cache.setter
    def use_cache(self, value: object) -> None:
        pass

    @classmethod
    def _faults_between(cls, fields: Mapping[str, Any]) -> Iterable[ConfigError]:
        if "representations" not in fields:
            return
        entries = _representations_from(fields["representations"])
        types = types_from(fields.get("intervention_types", VanillaIntervention))
        if isinstance(types, list):
            yield from _type_faults(entries, types)
        constants = fields.get("intervention_constant_sources")
        if constants is not None:
            yield from _constant_faults(entries, constants)
        names = [entry.name for entry in entries if entry.name is not None]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            yield ConfigError(
                f"Names must be unique, and {', '.join(map(repr, twice))} is given more than once."
            )

    def add_intervention(self, representations: Any) -> None:
        """Append one or several representations, in any form that the constructor takes, in place.

        Raises:
            ConfigError: with every fault found; the configuration is then as it was before.
        """
        added = _listed(representations)
        types, constants = self.intervention_types, self.intervention_constant_sources
        if isinstance(types, list):
            types = [*types, *(None if _brings_its_own(item) else VanillaIntervention for item in added)]
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
        """The constant source declared for one representation, or None."""
        own: Tensor | None = self.representations[index].source_representation
        listed = self.intervention_constant_sources
        return listed[index] if own is None and listed is not None else own


def _type_faults(
    entries: Sequence[RepresentationConfig], types: Sequence[type[Intervention] | None]
) -> Iterable[ConfigError]:
    if len(types) != len(entries):
        yield ConfigError(
            f"intervention_types has {len(types)} entries for {len(entries)} representations:"
            " give one class for all or one for each."
        )
    for index, (entry, listed) in enumerate(zip(entries, types, strict=False)):
        own = entry.intervention_type
        if own is not None and listed is not None and own is not listed:
            yield ConfigError(
                f"representation {index} says {own.__name__} and intervention_types says"
                f" {listed.__name__}: give one of the two."
            )
        if entry.intervention is not None and listed is not None:
            yield ConfigError(
                f"representation {index} has an intervention of its own and intervention_types says"
                f" {listed.__name__}: put None there."
            )
        if listed is None and own is None and entry.intervention is None:
            yield ConfigError(
                f"representation {index} has no intervention, and intervention_types says None for it."
            )


def _constant_faults(
    entries: Sequence[RepresentationConfig], constants: Sequence[Any]
) -> Iterable[ConfigError]:
    if len(constants) != len(entries):
        yield ConfigError(
            f"intervention_constant_sources has {len(constants)} entries for {len(entries)}"
            " representations: give one for each, None where there is none."
        )
    for index, (entry, constant) in enumerate(zip(entries, constants, strict=False)):
        if entry.source_representation is not None and constant is not None:
            yield ConfigError(
                f"representation {index} has a source_representation and an entry in"
                " intervention_constant_sources: give one of the two."
            )


def _brings_its_own(item: Any) -> bool:
    """Whether a representation, in any form, says which intervention it has; one that is wrong does not."""
    try:
        entry = _representation_from(item)
    except ConfigError:
        return False
    return entry.intervention is not None or entry.intervention_type is not None


def config_from(value: Any) -> IntervenableConfig:
    """A new `IntervenableConfig` from another, from a dict of its fields, or from representations in any form."""
    if isinstance(value, IntervenableConfig):
        return IntervenableConfig(**{name: getattr(value, name) for name in IntervenableConfig.model_fields})
    if isinstance(value, Mapping) and value.keys() & (
        IntervenableConfig.model_fields.keys() | IntervenableConfig.RENAMED.keys()
    ):
        return IntervenableConfig(**value)
    return IntervenableConfig(representations=value)
