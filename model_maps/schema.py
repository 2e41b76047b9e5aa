"""What a model map is made of: frozen records that a person can check against the model's printout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal

from model_maps.sites import Side, Site
from model_maps.vocabulary import COMPONENTS, OF_KEYS, PREFIXED, WORDS, Component, Stack, in_short


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

    causal: bool | None = None
    """Whether positions read nothing of later ones then; None: as without the variant."""


@dataclasses.dataclass(frozen=True, slots=True)
class LayerKind:
    """What is different in some layers of a stack: a hybrid's layers without attention, a mixture's dense ones."""

    layers: tuple[int, ...]
    """The layers, counted from 0."""

    stack: Stack | None = None
    """The stack they are in; None for the blocks of a model of one."""

    sites: Mapping[str, Site] = dataclasses.field(default_factory=dict)
    """Components that lie elsewhere in these layers, or are in these alone."""

    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Components that these layers do not have, each with the reason."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))
        object.__setattr__(self, "absent", MappingProxyType(dict(self.absent)))

    def __reduce__(self) -> tuple[type[LayerKind], tuple[object, ...]]:
        return LayerKind, (self.layers, self.stack, dict(self.sites), dict(self.absent))


@dataclasses.dataclass(frozen=True, slots=True)
class ModelMap:
    """Where the components of one architecture are: all that the library knows about it."""

    classes: tuple[str, ...]
    """Names of the model classes it describes."""

    blocks: str | None
    """Path of the list of blocks; "" if the model is itself its only block; None if it has no blocks.

    Where a layer is an entry of each of several lists, these are named in braces and paths of its sites begin with a
    list's name: in `"model.{attentions,norms}"` `Site("norms")` is the output of `model.norms.2` in layer 2."""

    sites: Mapping[str, Site]
    """Component -> where it is. Views by heads and derived components follow and are not listed."""

    absent: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Component -> why this architecture has none, for the error message. Without prefix: why no stack has one."""

    sequential: bool = True
    """Whether the MLP reads the stream after attention was added, so that `block_mid` exists."""

    variants: tuple[Variant, ...] = ()
    """Differences that depend on the config."""

    positions_derived_from_mask: bool | None = None
    """Whether the model derives positions from the attention mask; None: to be found out by a run."""

    causal: bool = True
    """Whether positions read nothing of later ones (with two stacks: in the decoder)."""

    stacks: Mapping[Stack, str] = dataclasses.field(default_factory=dict)
    """Path of the list of blocks of each stack whose components have a prefix: an encoder and a decoder (`blocks` is
    None then), a tower beside the blocks or beside another tower."""

    decoder_reads: Literal["labels", "input_ids"] | None = None
    """Of which inputs the model makes the decoder's, one position for each, where it is given none."""

    kinds: tuple[LayerKind, ...] = ()
    """Layers that differ from what `sites` and `absent` say."""

    configs: Mapping[Stack, str] = dataclasses.field(default_factory=dict)
    """Stack -> name of the part of the model's config that has its sizes, where it has a part of its own."""

    _of_kinds: dict[tuple[int, ...], ModelMap] = dataclasses.field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    """The map as it is where these of the `kinds` are, once it was asked for."""

    def __post_init__(self) -> None:
        classes: object = self.classes
        blocks: object = self.blocks
        if blocks is not None and not isinstance(blocks, str):
            raise ValueError(f"blocks is {blocks!r}; it must be the path of the list of blocks, '' or None.")
        if isinstance(classes, str) or not classes:
            raise ValueError(
                f"classes is {classes!r}; it must name the classes that the map describes, as ('TinyGPT',)."
            )
        named = (name for kind in self.kinds for name in (*kind.sites, *kind.absent))
        for name in (*self.sites, *self.absent, *named):
            if name not in COMPONENTS:
                near = get_close_matches(name, COMPONENTS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"The map of {', '.join(self.classes)} names {name!r}, which is no component.{hint}"
                    f"\nAllowed: {in_short(WORDS)}. {PREFIXED}"
                )
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))
        object.__setattr__(self, "absent", MappingProxyType(dict(self.absent)))
        object.__setattr__(self, "stacks", MappingProxyType(dict(self.stacks)))
        object.__setattr__(self, "configs", MappingProxyType(dict(self.configs)))

    def __reduce__(self) -> tuple[type[ModelMap], tuple[object, ...]]:
        # A read-only view of a dict can be neither copied nor pickled; models that hold a map should be both.
        values = (getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.init)
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
                    causal=result.causal if variant.causal is None else variant.causal,
                )
        return dataclasses.replace(result, variants=())

    def at_layer(self, component: str, layer: int) -> ModelMap:
        """The map as it is for one layer of the stack that a component is in.

        Args:
            component: The component's name.
            layer: The layer, counted from 0.
        """
        stack = self.blocks_stack_of(component)
        which = tuple(
            number for number, kind in enumerate(self.kinds) if kind.stack == stack and layer in kind.layers
        )
        if which not in self._of_kinds:
            sites, absent = dict(self.sites), dict(self.absent)
            for number in which:
                kind = self.kinds[number]
                sites = {k: v for k, v in sites.items() if k not in kind.absent} | dict(kind.sites)
                absent = {k: v for k, v in absent.items() if k not in kind.sites} | dict(kind.absent)
            self._of_kinds[which] = dataclasses.replace(self, sites=sites, absent=absent, kinds=())
        return self._of_kinds[which]

    def site(self, component: str, layer: int | None = None) -> Site | None:
        """The site to hook for a component, or None if this architecture has no such thing.

        Views by heads and derived components are answered with the site they are made from. Without a layer that
        of the first layer that has it is meant.
        """
        if layer is not None and self.kinds:
            return self.at_layer(component, layer).site(component)
        found = self._site(component)
        if found is None and layer is None:
            firsts = (kind.layers[0] for kind in self.kinds if kind.layers)
            found = next((site for first in firsts if (site := self.site(component, first))), None)
        return found

    def _site(self, component: str) -> Site | None:
        if component in self.sites:
            return self.sites[component]
        known = COMPONENTS[component]
        if component in self.absent or known.word in self.absent:
            return None
        if known.heads_of or known.derived_from:
            return self.site(known.heads_of or known.derived_from or "")
        if known.inside:
            around = self.site(known.inside)
            if around is None:
                return None
            return Site(around.path, width="any", attention=around.attention, axes=around.axes)
        if known.word == "block_mid" and self.sequential and known.prefix != "cross":
            added = self.site(component.replace("block_mid", "attention_contribution"))
            below = component.replace("block_mid", "block_input")
            return None if added is None else dataclasses.replace(added, plus=below)
        return self.site(known.fallback) if known.fallback else None

    def blocks_of(self, component: str) -> str | None:
        """Path of the list of blocks that a component is in; None if this architecture has no such list.

        Example:
            >>> stacks = {"encoder": "encoder.layers", "decoder": "decoder.layers"}
            >>> two = ModelMap(("Tiny",), None, {}, stacks=stacks)
            >>> two.blocks_of("encoder_mlp_output"), two.blocks_of("cross_attention_pattern")
            ('encoder.layers', 'decoder.layers')
        """
        prefix = COMPONENTS[component].prefix
        if prefix == "":
            return self.blocks
        if prefix == "cross":  # of a decoder to its encoder, or of the blocks to a tower beside them
            return self.stacks.get("decoder", self.blocks)
        return self.stacks.get(prefix)

    def blocks_stack_of(self, component: str) -> Stack | None:
        """The stack in whose blocks a component is: of cross attention its own, whatever positions its keys have."""
        prefix = COMPONENTS[component].prefix
        if prefix == "cross":
            return "decoder" if "decoder" in self.stacks else None
        return prefix or None

    def stack_of(self, component: str) -> Stack | None:
        """The stack whose positions a component has (a matrix: in its rows); None if there is but one."""
        known = COMPONENTS[component]
        if known.prefix == "cross" and "decoder" not in self.stacks:
            return "cross" if known.word in OF_KEYS else None
        # Of what has no prefix, an encoder-decoder has its head alone, which is the decoder's.
        return known.stack or ("decoder" if "decoder" in self.stacks else None)

    def stack_at(self, path: str, side: Side = "output") -> Stack | None:
        """The stack whose positions the tensors on a side of a module have; None if there is but one."""
        if not self.stacks:
            return None
        for component in OF_KEYS:
            site = self.sites.get(f"cross_{component}")
            if site is not None and site.side == side and path.endswith(f".{site.path}"):
                return "encoder"
        for stack, blocks in self.stacks.items():
            parent = blocks.rpartition(".")[0]
            if path == parent or path.startswith(f"{parent}."):
                return stack
        return "decoder" if "decoder" in self.stacks else None  # the head, or the blocks beside a tower

    def causal_at(self, component: str) -> bool:
        """Whether what a position has of a component depends on nothing at later positions of its stack.

        Of attention patterns: whether keys after the query are masked.
        """
        return self.causal and COMPONENTS[component].prefix in ("", "decoder")

    def reason(self, component: str, layer: int | None = None) -> str:
        """Why this architecture lacks a component, as the end of a sentence; "" if it has it."""
        if layer is not None and self.kinds:
            return self.at_layer(component, layer).reason(component)
        if self.site(component) is not None:
            return ""
        known = COMPONENTS[component]
        if known.prefix and not self.stacks:
            return self._has_one_stack(known)
        if self.stacks and self.blocks is None and not known.prefix and component not in self.absent:
            return self._has_two_stacks(component)
        holder = "decoder" if known.prefix == "cross" else known.prefix
        if known.prefix == "cross" and holder not in self.stacks and component not in self.absent:
            return "it attends to no tower there"
        if holder and holder not in self.stacks and component not in self.absent:
            return f"it has no {'stack' if holder in ('encoder', 'decoder') else 'tower'} {holder!r}"
        if component in self.absent or known.word in self.absent:
            return self.absent.get(component) or self.absent[known.word]
        if known.word == "block_mid" and not self.sequential:
            return "it adds attention and MLP in parallel, so there is no stream between them"
        below = known.heads_of or known.derived_from or known.inside or known.fallback
        return self.reason(below) if below else "its map does not place it"

    def _has_one_stack(self, known: Component) -> str:
        if known.prefix == "cross":
            return "it has one stack of blocks and no attention from one to another"
        if self.site(known.word) is None:
            return self.reason(known.word)
        return f"it has one stack of blocks, so say {known.word!r}"

    def _has_two_stacks(self, word: str) -> str:
        here = (*self.stacks, *(("cross",) if "decoder" in self.stacks else ()))
        names = [name for name, known in COMPONENTS.items() if known.prefix in here and known.word == word]
        there = [repr(name) for name in names if self.site(name) is not None]
        if not there:
            return self.reason(names[0]) if names else "its map does not place it"
        has = "an encoder and a decoder" if "decoder" in self.stacks else "several towers"
        return (
            f"it has {has}, so say {' or '.join([', '.join(there[:-1]), there[-1]] if there[1:] else there)}"
        )

    def components(self) -> tuple[str, ...]:
        """Every component this architecture has, in the order of the vocabulary."""
        return tuple(name for name in COMPONENTS if self.site(name) is not None)
