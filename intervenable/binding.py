"""A configuration bound to one model: every representation with its place and its intervention.

Everything that can be known without a run is checked here, and all faults are reported at once.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from intervenable.attention_mode import SCORES
from intervenable.config import IntervenableConfig, RepresentationConfig
from intervenable.config_fields import is_module_path
from intervenable.errors import (
    ConfigError,
    Fault,
    LayerRangeError,
    MapError,
    ModelMismatchError,
    UnsupportedModelError,
    each_named,
    raise_all,
)
from intervenable.maps import map_of
from intervenable.site_binding import bind_path, bind_site, module_at
from intervenable.sites import BoundSite
from intervenable.unwrapping import class_names, config_of
from interventions import CallableIntervention, Intervention, InterventionError, KnockoutIntervention
from interventions.fixed import CoordinatewiseIntervention
from model_maps import (
    COMPONENTS,
    AbsentComponentError,
    ModelMap,
    Site,
    Sizes,
    UnmappedModelError,
    component_site,
    layer_lists,
    path_in_layer,
    sizes_of,
)

ROUTED = "router_output"
"""What can be knocked out beside attention scores: the logits of experts."""


@dataclass(frozen=True, eq=False)
class BoundRepresentation:
    """One declared representation in one model."""

    index: int
    """Its place in the configuration."""

    name: str
    """Its unique name."""

    config: RepresentationConfig
    """What was declared."""

    site: BoundSite
    """Where it is."""

    intervention: Intervention
    """What is done to it; linked representations have the same."""

    constant: Tensor | None
    """Its constant source, if one was declared."""

    group: int
    """Which source it takes its value from, counted in the order in which groups first appear."""

    @property
    def source_site(self) -> BoundSite:
        """Where its value is read in a source run."""
        return self.site if self.intervention.source_side == "site" else self.site.input_of_module()


def bind(config: IntervenableConfig, model: nn.Module) -> tuple[BoundRepresentation, ...]:
    """Resolve every representation of a configuration in a model.

    Raises:
        ConfigError: a declaration that does not fit this model; several are listed together.
        UnsupportedModelError: no map for the model, or no such component in it.
    """
    _check_model_type(config, model)
    faults: list[Fault] = []
    sites: list[BoundSite | None] = []
    places = Places(model)
    for index, entry in enumerate(config.representations):
        try:
            sites.append(places.site(entry))
        except _NoMapError as error:
            raise UnsupportedModelError(str(error)) from error
        except (ConfigError, UnsupportedModelError) as error:
            sites.append(None)
            faults.extend(each_named(error, f"representation {index}"))
    names = _names(config.representations, sites)
    groups = _groups(config.representations)
    made: list[Intervention | None] = []
    constants: list[Tensor | None] = []
    for index, site in enumerate(sites):
        intervention = constant = None
        try:
            if site is not None:
                intervention = _intervention(config, index, site, made)
                if isinstance(intervention, KnockoutIntervention) and site.word not in (*SCORES, ROUTED):
                    raise ConfigError(
                        "KnockoutIntervention makes scores -inf, which the softmax gives no weight, and"
                        f" {site.label} has no scores. Use it at 'attention_scores', or ZeroIntervention here."
                    )
                if site.read_only and not intervention.collects:
                    raise ConfigError(
                        f"{site.label} can be read and not written in {type(model).__name__}: {site.read_only}."
                    )
                constant = _constant(config, index, site, intervention)
        except ConfigError as error:
            faults.extend(each_named(error, f"representation {index}"))
        made.append(intervention)
        constants.append(constant)
    raise_all(faults)
    return tuple(
        BoundRepresentation(index, names[index], entry, site, intervention, constants[index], groups[index])
        for index, (entry, site, intervention) in enumerate(
            zip(config.representations, sites, made, strict=True)
        )
        if site is not None and intervention is not None
    )


class _NoMapError(UnsupportedModelError):
    """No map for the model: one fault, however many representations meet it."""


def _check_model_type(config: IntervenableConfig, model: nn.Module) -> None:
    names = [type(model).__name__, *class_names(model)]
    if config.model_type is not None and config.model_type not in names:
        raise ModelMismatchError(
            f"The configuration is for {config.model_type}, and the model is a {type(model).__name__}."
            " Give a model of that class, or leave model_type out."
        )


# --- where ------------------------------------------------------------------------------------------------


class Places:
    """Finds sites in one model; what they share is looked up once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._map: ModelMap | None = None
        self._counts: dict[str, int] = {}
        config = config_of(model)
        self.sizes = sizes_of(config) if config is not None else Sizes()

    def site(self, entry: RepresentationConfig) -> BoundSite:
        if entry.moe_key is not None:
            raise ConfigError(
                f"moe_key={entry.moe_key}: a component is of all experts at once. Leave it out; to switch an expert"
                " off use iv.experts.switched_off, and name one that is a module by its path."
            )
        return self.at(entry.component, entry.layer or 0)

    def at(self, component: str, layer: int | None) -> BoundSite:
        """The site of a component or a module path; `layer` counts for what is inside the blocks alone."""
        if is_module_path(component):
            return bind_path(self.model, component, self._map_if_any)
        inside = COMPONENTS[component].scope == "block"
        return self._component(component, self._layer(component, layer or 0) if inside else None)

    @property
    def known(self) -> bool:
        """Whether the model has a map."""
        return self._map_if_any is not None

    @property
    def owner(self) -> str:
        """The class of a model that has a map; "" of one that has none."""
        return type(self.model).__name__ if self.known else ""

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components the model has; of one without a map all there are."""
        known = self._map_if_any
        return tuple(COMPONENTS) if known is None else known.components()

    @property
    def layers(self) -> int:
        """How many blocks the model has; 1 if it is one itself. Of two stacks those of the deeper one."""
        one = self.map.blocks
        paths = [*self.map.stacks.values()] if one is None else [one]
        return max(map(self._blocks_at, paths), default=0)

    def layers_of(self, component: str) -> int:
        """How many blocks a component is in: those of its stack, in a model of two."""
        blocks = self.map.blocks_of(component)
        if blocks is None:
            self._site_of(component)  # of the other kind of model: its error says which name to take
            raise UnsupportedModelError(f"{type(self.model).__name__} has no blocks.")
        return self._blocks_at(blocks)

    def layers_with(self, component: str) -> tuple[int, ...]:
        """The layers that have a component, in order: not all, where layers are of several kinds.

        Raises:
            UnsupportedModelError: none has it.
        """
        everywhere = range(self.layers_of(component))
        self._site_of(component)
        if not self.map.kinds:
            return tuple(everywhere)
        return tuple(layer for layer in everywhere if self.map.site(component, layer) is not None)

    def _blocks_at(self, path: str) -> int:
        """How many blocks there are in a list of them."""
        if path not in self._counts:
            found = module_at(self.model, layer_lists(path)[0], "the list of blocks") if path else None
            self._counts[path] = 1 if found is None else len(found)  # type: ignore[arg-type]  # a ModuleList
        return self._counts[path]

    def _component(self, component: str, layer: int | None) -> BoundSite:
        site = self._site_of(component, layer)
        self._check_sum(component, layer, site)
        plus = None if site.plus is None else self._component(site.plus, layer)
        blocks = self.map.blocks_of(component)
        bound = bind_site(
            self.model,
            component,
            replace(site, path=path_in_layer(blocks, layer, site.path)),
            layer,
            self._sizes_for(component),
            plus,
            causal=self.map.causal_at(component),
            stack=self.map.stack_of(component),
            block=_block_path(blocks, layer),
        )
        if bound.word == "expanded_head_value":  # values may be of another width than queries and keys
            bound = replace(bound, width=self._value_width(component, layer, bound))
        return bound

    def _check_sum(self, component: str, layer: int | None, site: Site) -> None:
        """Refuse a sum of streams in which one of them comes twice: it would never end."""
        names = [component]
        added = site.plus
        while added is not None:
            if added in names:
                raise MapError(
                    f"In the map of {type(self.model).__name__} the streams that are added have no end:"
                    f" {' + '.join([*names, added])}. The `plus` of a site is a stream before it."
                )
            names.append(added)
            added = self._site_of(added, layer).plus

    def _value_width(self, component: str, layer: int | None, bound: BoundSite) -> int | None:
        mixed = component.replace("expanded_head_value", "head_attention_value_output")
        if self.map.site(mixed, layer) is None:
            return None if self._site_of(component, layer).attention is not None else bound.width
        return self._component(mixed, layer).width

    def _sizes_for(self, component: str) -> Sizes:
        """The sizes of the stack that a component is in."""
        prefix = COMPONENTS[component].prefix
        part = self.map.configs.get("decoder" if prefix == "cross" else prefix) if prefix else None
        config = None if part is None else getattr(config_of(self.model), part, None)
        return self.sizes if config is None else sizes_of(config)

    def _site_of(self, component: str, layer: int | None = None) -> Site:
        try:
            return component_site(self.map, component, layer)
        except AbsentComponentError as error:
            raise UnsupportedModelError(str(error)) from error

    @property
    def _map_if_any(self) -> ModelMap | None:
        try:
            return self.map
        except _NoMapError:
            return None

    @property
    def map(self) -> ModelMap:
        if self._map is None:
            try:
                self._map = map_of(self.model)
            except UnmappedModelError as error:
                raise _NoMapError(str(error)) from error
        return self._map

    def _layer(self, component: str, layer: int) -> int:
        count = self.layers_of(component)
        if not -count <= layer < count:
            stack = self.map.stack_of(component)
            holder = f"the {'decoder' if component.startswith('cross_') else stack} of " if stack else ""
            raise LayerRangeError(
                f"Layer {layer} is out of range: {holder}{type(self.model).__name__} has layers 0 to {count - 1}."
            )
        return layer % count


def _block_path(blocks: str | None, layer: int | None) -> str:
    """Path of a block; that of the model where a layer is no one module."""
    if blocks is None or layer is None or len(layer_lists(blocks)) > 1:
        return ""
    return path_in_layer(blocks, layer, "").rstrip(".")


# --- names and groups -------------------------------------------------------------------------------------


def _names(entries: Sequence[RepresentationConfig], sites: Sequence[BoundSite | None]) -> list[str]:
    """The given names; for the others one made of layer, component and unit, numbered where several are alike."""
    keys = []
    for entry, site in zip(entries, sites, strict=True):
        layer = None if site is None else site.layer
        parts = [] if layer is None else [f"layer_{layer}"]
        keys.append(".".join([*parts, entry.component, entry.unit]))
    names = []
    for index, (entry, key) in enumerate(zip(entries, keys, strict=True)):
        alike = [other for other, at in enumerate(keys) if at == key and entries[other].name is None]
        names.append(entry.name or (key if len(alike) == 1 else f"{key}#{alike.index(index)}"))
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"The name {twice[0]!r} is also the default name of another representation; choose another."
        )
    return names


def _groups(entries: Sequence[RepresentationConfig]) -> list[int]:
    """For each representation the number of its group; one without a key is a group of its own."""
    numbers: dict[object, int] = {}
    for index, entry in enumerate(entries):
        key: object = ("key", entry.group_key) if entry.group_key is not None else ("alone", index)
        numbers.setdefault(key, len(numbers))
    return [
        numbers[("key", entry.group_key) if entry.group_key is not None else ("alone", index)]
        for index, entry in enumerate(entries)
    ]


# --- what -------------------------------------------------------------------------------------------------


def _intervention(
    config: IntervenableConfig, index: int, site: BoundSite, made: Sequence[Intervention | None]
) -> Intervention:
    """The intervention of one representation: shared if it is linked, given, or newly made."""
    entry = config.representations[index]
    link = entry.intervention_link_key
    if link is not None:
        for earlier, other in enumerate(config.representations[:index]):
            shared = made[earlier]
            if other.intervention_link_key == link and shared is not None:
                _check_link(config, index, earlier, site, shared)
                return shared
    if isinstance(entry.intervention, Intervention):
        _check_width(entry.intervention, entry, site)
        return entry.intervention
    if entry.intervention is not None:
        return CallableIntervention(entry.intervention)
    cls = config.type_of(index)
    if cls is None:
        raise ConfigError("it has no intervention.")
    return _make(cls, entry, site)


def _make(cls: type[Intervention], entry: RepresentationConfig, site: BoundSite) -> Intervention:
    """An intervention of a class, with the declared settings that its constructor takes."""
    width = _seen_width(cls.sees, entry, site)
    declared = {
        "low_rank_dimension": entry.low_rank_dimension,
        "latent_dim": entry.latent_dim,
        "subspace_partition": entry.subspace_partition,
    }
    settings = {name: value for name, value in declared.items() if value is not None}
    parameters = inspect.signature(cls.__init__).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    refused = [name for name in settings if name not in parameters and not open_ended]
    if refused:
        raise ConfigError(f"{cls.__name__} takes no {', '.join(refused)}.")
    if "embed_dim" in parameters or open_ended:
        settings["embed_dim"] = width
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        and name != "self"
        and settings.get(name) is None
    ]
    if required:
        fields = all(name in RepresentationConfig.model_fields for name in required)
        remedy = "Give it there, or pass" if fields else "Pass"
        arguments = ", ".join(f"{name}=..." for name in required)
        raise ConfigError(
            f"{cls.__name__} needs {', '.join(required)}, which the representation does not give"
            f"{_why_no_width(width, site) if 'embed_dim' in required else ''}."
            f" {remedy} an instance as `intervention`: {cls.__name__}({arguments})."
        )
    try:
        intervention = cls(**settings)
    except (InterventionError, TypeError) as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error
    device = next((p.device for p in site.module.parameters()), None)
    return intervention if device in (None, torch.device("meta")) else intervention.to(device)


def _why_no_width(width: int | None, site: BoundSite) -> str:
    return f" (the width of {site.label} cannot be told without a run)" if width is None else ""


def _seen_width(sees: str, entry: RepresentationConfig, site: BoundSite) -> int | None:
    """Size of the last axis an intervention is given at a site."""
    if sees == "raw" or site.width is None:
        return None
    return site.width * entry.max_number_of_units if sees == "concatenated" else site.width


def _check_width(intervention: Intervention, entry: RepresentationConfig, site: BoundSite) -> None:
    width = _seen_width(intervention.sees, entry, site)
    made_for = intervention.embed_dim
    if width is None or made_for is None or made_for == width:
        return
    if isinstance(intervention, CoordinatewiseIntervention) and made_for < width:
        return
    units = ""
    if intervention.sees == "concatenated":
        units = f" ({entry.max_number_of_units} unit(s) of {site.width}, concatenated)"
    raise ModelMismatchError(
        f"{type(intervention).__name__} was made for embed_dim={made_for}, and {site.label} is {width} wide here"
        f"{units}. Was it declared for a model of another size?"
    )


def _check_link(
    config: IntervenableConfig, index: int, earlier: int, site: BoundSite, shared: Intervention
) -> None:
    """That a linked representation asks for nothing else than what it shares."""
    entry, first = config.representations[index], config.representations[earlier]
    link = f"linked to representation {earlier} by the key {entry.intervention_link_key!r}"
    cls, other = config.type_of(index), config.type_of(earlier)
    if entry.intervention is not first.intervention and entry.intervention is not None:
        raise ConfigError(f"it is {link}, and brings an intervention of its own. Give one of the two.")
    if cls is not None and cls is not other and other is not None:
        raise ConfigError(f"it is {link}, which is a {other.__name__}, and asks for a {cls.__name__}.")
    for field in ("low_rank_dimension", "latent_dim", "subspace_partition"):
        own, shares = getattr(entry, field), getattr(first, field)
        if own is not None and own != shares:
            raise ConfigError(f"it is {link}, whose {field} is {shares!r}, and asks for {own!r}.")
    width = _seen_width(shared.sees, entry, site)
    if shared.embed_dim is not None and width is not None and width != shared.embed_dim:
        raise ConfigError(
            f"it is {link}, which is made for {shared.embed_dim} columns, and {site.label} gives it {width}."
            " Linked representations must have one shape."
        )


def _constant(
    config: IntervenableConfig, index: int, site: BoundSite, intervention: Intervention
) -> Tensor | None:
    constant = config.constant_of(index)
    if constant is None:
        return None
    if not intervention.accepts_source:
        raise ConfigError(
            f"{type(intervention).__name__} uses no source, so its source_representation would be ignored."
            " Leave it out."
        )
    width = _seen_width(intervention.sees, config.representations[index], site)
    if width is not None and tuple(constant.shape[-1:]) != (width,):
        raise ModelMismatchError(
            f"its source_representation has shape {tuple(constant.shape)}, and {site.label} is {width} wide here:"
            f" the last axis must be {width}."
        )
    # The configuration is read once: what is written into its tensor later does not count. (One that requires
    # gradients is being trained and stays what it is.)
    return constant if constant.requires_grad else constant.clone()
