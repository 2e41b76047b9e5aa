"""What a model map is made of: frozen records that a person can check against the model's printout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from model_maps.vocabulary import COMPONENTS

Side = Literal["input", "output"]
Part = Literal["query", "key", "value"]
Layout = Literal["concatenated", "grouped"]
Width = Literal["hidden", "query", "key_value", "mlp", "vocabulary", "experts", "embedding", "any"]


@dataclasses.dataclass(frozen=True, slots=True)
class HeadColumns:
    """Where the heads lie in the last axis of a tensor.

    Head `i` has the `width` columns from
    `start + (i // per_group) * group_stride + (i % per_group) * stride` on.
    """

    heads: int
    """How many heads there are."""

    width: int
    """Columns of one head."""

    start: int = 0
    """First column of head 0."""

    stride: int = 0
    """Columns from one head to the next of its group; 0 means `width`."""

    per_group: int = 1
    """Heads in one group."""

    group_stride: int = 0
    """Columns from one group to the next; 0 means `per_group` heads side by side."""

    def first_column(self, head: int) -> int:
        """The first column of one head."""
        stride = self.stride or self.width
        group_stride = self.group_stride or self.per_group * stride
        return self.start + head // self.per_group * group_stride + head % self.per_group * stride

    @property
    def contiguous(self) -> bool:
        """Whether all heads lie side by side in order, so that one slice holds them all."""
        return all(self.first_column(head) == self.start + head * self.width for head in range(self.heads))


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """The place of one component: a side of a module, and how to read what is there."""

    path: str
    """Module path, from the block for components of a block, from the model for the others; "" is itself."""

    side: Side = "output"
    """Whether the tensor goes into the module or comes out of it."""

    slot: str | int | None = None
    """Keyword or index of the tensor among the inputs or outputs. None is the usual place: the first positional
    input, else `hidden_states`, else what is given by keyword first; the output itself, else its first item."""

    width: Width = "hidden"
    """Which size the component's last axis has."""

    heads: Literal["query", "key_value"] | None = None
    """Which heads lie side by side in the last axis, if any do."""

    part: Part | None = None
    """Which part of a fused query-key-value projection this is."""

    layout: Layout = "concatenated"
    """How a fused projection lies: all queries, all keys, all values; or for each key-value head its queries,
    its key, its value."""

    columns: HeadColumns | None = None
    """Explicit columns, which win over `heads`, `part` and `layout`."""

    flat: bool = False
    """Whether batch and positions are one axis here: `[b*s, ...]`."""

    plus: str | None = None
    """A component of the same block to be added to read this one; a write then goes to this site alone, as
    the change. (`block_mid` is the attention's contribution plus the block's input.)"""

    read_only: str = ""
    """Why a value written here would not reach the rest of the model, if it would not."""


@dataclasses.dataclass(frozen=True, slots=True)
class Variant:
    """What is different where a config field has a certain value."""

    field: str
    """Name of the config field."""

    value: object
    """The value that makes the difference."""

    sites: Mapping[str, Site] = dataclasses.field(default_factory=dict)
    """Components that lie elsewhere then."""

    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Components that do not exist then, each with the reason."""

    sequential: bool | None = None
    """Whether the MLP reads the stream after attention was added then; None: as without the variant."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelMap:
    """Where the components of one architecture are: all that the library knows about it."""

    classes: tuple[str, ...]
    """Names of the model classes it describes."""

    blocks: str | None
    """Path of the list of blocks; "" if the model is itself its only block; None if it has no blocks."""

    sites: Mapping[str, Site]
    """Component -> where it is. Views by heads and derived components follow and are not listed."""

    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Component -> why this architecture has none, for the error message."""

    sequential: bool = True
    """Whether the MLP reads the stream after attention was added, so that `block_mid` exists."""

    variants: tuple[Variant, ...] = ()
    """Differences that depend on the config."""

    positions_derived_from_mask: bool | None = None
    """Whether the model derives positions from the attention mask; None: to be found out by a run."""

    def __post_init__(self) -> None:
        for name in (*self.sites, *self.absent):
            if name not in COMPONENTS:
                raise ValueError(
                    f"The map of {', '.join(self.classes)} names {name!r}, which is no component."
                    f"\nAllowed: {', '.join(sorted(COMPONENTS))}."
                )
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))
        object.__setattr__(self, "absent", MappingProxyType(dict(self.absent)))

    def __reduce__(self) -> tuple[type[ModelMap], tuple[object, ...]]:
        # A read-only view of a dict can be neither copied nor pickled; models that hold a map should be both.
        values = (getattr(self, entry.name) for entry in dataclasses.fields(self))
        return ModelMap, tuple(dict(value) if isinstance(value, Mapping) else value for value in values)

    def for_config(self, config: object) -> ModelMap:
        """The map with the variants that this config calls for applied."""
        result = self
        for variant in self.variants:
            if getattr(config, variant.field, None) == variant.value:
                sites = {k: v for k, v in result.sites.items() if k not in variant.absent}
                absent = {k: v for k, v in result.absent.items() if k not in variant.sites}
                result = dataclasses.replace(
                    result,
                    sites={**sites, **variant.sites},
                    absent={**absent, **variant.absent},
                    sequential=result.sequential if variant.sequential is None else variant.sequential,
                )
        return dataclasses.replace(result, variants=())

    def site(self, component: str) -> Site | None:
        """The site to hook for a component, or None if this architecture has no such thing.

        Views by heads and derived components are answered with the site they are made from.
        """
        if component in self.sites:
            return self.sites[component]
        if component in self.absent:
            return None
        known = COMPONENTS[component]
        if known.heads_of or known.derived_from:
            return self.site(known.heads_of or known.derived_from or "")
        if known.inside:
            around = self.site(known.inside)
            return None if around is None else Site(around.path, width="any")
        if component == "block_mid":
            added = self.site("attention_contribution")
            return dataclasses.replace(added, plus="block_input") if self.sequential and added else None
        return self.site(known.fallback) if known.fallback else None

    def reason(self, component: str) -> str:
        """Why this architecture lacks a component, as the end of a sentence; "" if it has it."""
        if self.site(component) is not None:
            return ""
        known = COMPONENTS[component]
        below = known.heads_of or known.derived_from or known.inside or known.fallback
        if component in self.absent:
            return self.absent[component]
        if component == "block_mid" and not self.sequential:
            return "it adds attention and MLP in parallel, so there is no stream between them"
        return self.reason(below) if below else "its map does not place it"

    def components(self) -> tuple[str, ...]:
        """Every component this architecture has, in the order of the vocabulary."""
        return tuple(name for name in COMPONENTS if self.site(name) is not None)
