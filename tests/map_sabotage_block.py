"""One layer of a model whose map is right, and maps that say something else of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from intervenable.map_layer_calls import call_of_parts, put_in
from intervenable.map_layers import blocks_at
from intervenable.map_trace import Call, Trace
from model_maps import COMPONENTS, LayerKind, ModelMap, Site, path_in_layer, sizes_of


@dataclass(frozen=True)
class Spoiled:
    """A map with one mistake."""

    mistake: str
    components: tuple[str, ...]
    """What it is wrong about: each of these has to be refused."""

    map: ModelMap


PREFIXES = ("", "encoder", "decoder", "cross", "vision", "audio", "text")


def named(word: str, prefix: str) -> str:
    return f"{prefix}_{word}" if prefix else word


def with_sites(model_map: ModelMap, **sites: Site) -> ModelMap:
    return replace(model_map, sites={**model_map.sites, **sites})


def one_of_each_kind(model: nn.Module, model_map: ModelMap, prefix: str) -> list[int]:
    """A layer of each kind, the second one rather than the first."""
    blocks = model_map.blocks_of(named("attention_input", prefix))
    if blocks is None:
        return []
    count = len(blocks_at(model, blocks)) if blocks else 1
    if not model_map.kinds:
        return [1] if count > 1 else [0]
    words = [name for name, known in COMPONENTS.items() if known.prefix == prefix and known.scope == "block"]
    layers: dict[tuple[Site | None, ...], int] = {}
    for layer in (*range(1, count), 0):
        layers.setdefault(tuple(model_map.site(name, layer) for name in words), layer)
    return sorted(layers.values())


def with_all_layers(traced: Trace, model: nn.Module, model_map: ModelMap) -> Trace:
    """The pass with a call of each layer, also of those that are called part by part."""
    for blocks in (model_map.blocks, *model_map.stacks.values()):
        for layer, block in enumerate(blocks_at(model, blocks) if blocks else ()):
            path = path_in_layer(blocks, layer, "")
            call = None if traced.of(path) else call_of_parts(traced, block, path)
            if call is not None:
                put_in(traced, call)
    return traced


def path_from(block: str, path: str) -> str:
    """The path from the model of a part of a block."""
    blocks, _, layer = block.rpartition(".")
    return path_in_layer(blocks, layer, path) if layer.isdigit() else ".".join(p for p in (block, path) if p)


def numbers_of(traced: Trace, block: str, site: Site) -> Tensor | None:
    """What a site of a block had in a pass; None of what a function is given."""
    call = next(iter(traced.of(path_from(block, site.path))[site.call or 0 :]), None)
    if call is None or (site.weight is not None and site.side == "input"):
        return None
    if site.function is None:
        return call.tensor_at(site.side, site.slot)
    met = [one for one in call.met_inside() if one.name == site.function]
    if site.weight is not None:
        weight = dict(call.module.named_parameters()).get(site.weight)
        met = [one for one in met if any(weight is not None and torch.equal(x, weight) for x in one.given)]
    return met[site.nth].returned if site.nth < len(met) else None


class Block:
    """One layer of a stack in a pass that was written down, and the mistakes that can be made about it."""

    def __init__(self, model: nn.Module, model_map: ModelMap, traced: Trace, prefix: str, layer: int) -> None:
        self.map, self.prefix, self.layer, self.traced = model_map, prefix, layer, traced
        blocks = model_map.blocks_of(named("attention_input", prefix))
        self.path = ".".join(part for part in (blocks, str(layer) if blocks else "") if part)
        self.call = next(iter(traced.of(self.path)), None)
        config = getattr(model, "config", None)
        part = model_map.configs.get("decoder" if prefix == "cross" else prefix)  # type: ignore[call-overload]
        self.sizes = sizes_of(getattr(config, part) if part else config)
        self.where = f" in layer {layer}" if model_map.kinds else ""

    def name(self, word: str) -> str:
        return named(word, self.prefix)

    def site(self, word: str) -> Site | None:
        name = self.name(word)
        return self.map.site(name, self.layer) if name in COMPONENTS else None

    def call_at(self, site: Site) -> Call | None:
        path = path_from(self.path, site.path)
        calls = () if self.call is None else (self.call, *self.call.inside())
        same = [one for one in calls if one.path == path]
        return next(iter(same[site.call or 0 :]), None)

    def tensor(self, site: Site) -> Tensor | None:
        return None if self.call is None else numbers_of(self.traced, self.path, site)

    def same(self, one: Site, other: Site) -> bool:
        """Whether two sites have the same numbers, so that nothing is wrong with taking one for the other."""
        return one.scale == other.scale and alike(self.tensor(one), self.tensor(other))

    def name_of(self, call: Call) -> str:
        """A call's path from the block."""
        assert self.call is not None
        parts = self.call.module.named_modules()
        return next((path for path, part in parts if part is call.module), call.path)

    def norms(self) -> list[str]:
        """Paths of the norms in the block, in order."""
        if self.call is None:
            return []
        return [self.name_of(one) for one in self.call.children if "Norm" in type(one.module).__name__]

    def linears(self) -> list[str]:
        """Paths of the modules in the block that have a matrix of weights, in order."""
        if self.call is None:
            return []
        return [
            self.name_of(one)
            for one in self.call.inside()
            if "Linear" in type(one.module).__name__ or "Conv1D" in type(one.module).__name__
        ]

    def is_made_of(self, own: Site, path: str) -> bool:
        """Whether one module, such as a norm or a convolution, makes what is at a site of what a matrix gives.

        Either is then the output of a projection or of an MLP.
        """
        right, given = self.tensor(own), self.tensor(Site(path))
        steps = () if self.call is None else self.call.inside()
        return any(alike(step.main_input, given) and alike(step.main_output, right) for step in steps)

    def put(self, mistake: str, wrong: tuple[str, ...] = (), **sites: Site) -> Spoiled:
        """A map in which components of this layer lie elsewhere.

        Args:
            mistake: What is wrong, in words.
            wrong: The words it is wrong about; by default those that lie elsewhere.
            sites: Word -> where it is said to be.
        """
        placed = {self.name(word): site for word, site in sites.items()}
        names = tuple(self.name(word) for word in (wrong or tuple(sites)))
        if not self.map.kinds:
            spoiled = with_sites(self.map, **placed)
        else:
            stack = "decoder" if self.prefix == "cross" else self.prefix or None
            own = LayerKind((self.layer,), stack, sites=placed)
            spoiled = replace(self.map, kinds=(*self.map.kinds, own))
        return Spoiled(f"{', '.join(names)}: {mistake}{self.where}", names, spoiled)

    def moved(self, mistake: str, word: str, site: Site | None) -> Iterator[Spoiled]:
        """The word's site is another one, if that has other numbers."""
        own = self.site(word)
        if own is None or site is None or site == own:
            return
        if own.plus == site.plus and own.columns == site.columns and self.same(own, site):
            return
        yield self.put(mistake, **{word: replace(site, width=own.width)})

    def same_shape(self, one: Site, other: Site) -> bool:
        a, b = self.tensor(one), self.tensor(other)
        return a is not None and b is not None and a.shape == b.shape


def alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors have the same numbers in the same order, whatever their shapes."""
    if one is None or other is None or one.numel() != other.numel():
        return False
    return torch.equal(one.reshape(-1), other.reshape(-1))
