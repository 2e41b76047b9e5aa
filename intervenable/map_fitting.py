"""The map of a tiny twin made into that of the model itself: its layers by kind, its columns by width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import nn

from intervenable.map_config_fields import is_config, parts_of
from intervenable.map_layers import block_signature, blocks_at, layer_kinds, layers_of_twin
from intervenable.site_binding import product_width
from intervenable.unwrapping import config_of
from model_maps import COMPONENTS, AttentionHeads, HeadColumns, LayerKind, ModelMap, Site, Stack


def fitted(record: ModelMap, twin: nn.Module, model: nn.Module) -> ModelMap:
    """The map of a model, from that of its twin.

    Each layer of the model gets the sites of a layer of the twin that is of its kind, with columns as much wider as
    the live module is. What cannot be carried over exactly is absent, with the reason.

    Args:
        record: The map of the twin.
        twin: The twin, made by `twin_of(model)`.
        model: The model, whose weights are not read: it may be on the meta device or quantised.
    """
    rows: dict[Stack | None, list[_Layer]] = {}
    factors = _carried_factors(twin, model)
    for stack, path in _stacks(record):
        rows[stack] = _layers(record, stack, path, twin, model, factors)
    outside = _Widths(twin, model)
    sites, absent = {}, dict(record.absent)
    for name, site in record.sites.items():
        if COMPONENTS[name].scope == "block" and record.blocks_stack_of(name) in rows:
            continue
        scaled = _scaled(site, outside)
        if isinstance(scaled, Site):
            sites[name] = scaled
        else:
            absent[name] = scaled
    kinds: list[LayerKind] = []
    for stack, layers in rows.items():
        if not layers:
            continue
        commonest = max(dict.fromkeys(layers), key=layers.count)
        sites.update(commonest.sites)
        mentioned = {name for layer in layers for name in (*layer.sites, *layer.absent)}
        nowhere = {
            name: commonest.absent[name]
            for name in commonest.absent
            if all(name in layer.absent for layer in layers)
        }
        absent = {**{name: why for name, why in absent.items() if name not in mentioned}, **nowhere}
        kinds += _kinds(stack, layers, commonest, nowhere)
    return replace(record, sites=sites, absent=absent, kinds=tuple(kinds))


@dataclass(frozen=True)
class _Layer:
    """What the map says about one layer."""

    sites: Mapping[str, Site]
    absent: Mapping[str, str]

    def __hash__(self) -> int:
        return hash((frozenset(self.sites.items()), frozenset(self.absent.items())))


def _with_sure_factors(layer: _Layer, factors: Sequence[float], small: nn.Module, large: nn.Module) -> _Layer:
    """A layer as its components are multiplied in the model; without those of which the number cannot be told."""
    sites, absent = {}, dict(layer.absent)
    for name, site in layer.sites.items():
        factor = _factor(site.scale, factors, small, large)
        if factor is None:
            absent[name] = (
                f"it is multiplied as it is added, in the tiny twin with {site.scale:.4g}, which is no number of the"
                " config; iv.model_map(model, example_inputs=...) finds the factor on the model itself"
            )
        else:
            sites[name] = replace(site, scale=factor)
    return _Layer(sites, absent)


def _factor(scale: float, factors: Sequence[float], small: nn.Module, large: nn.Module) -> float | None:
    """What a factor of a block of the twin is in that of the model; None if it cannot be told.

    It is the same if both configs say it. What a block works out for itself, as from how many layers there are, is
    what it keeps under the same name, to multiply or to divide by.
    """
    if scale == 1.0 or any(_close(scale, factor) for factor in factors):
        return scale
    found = set()
    for name, ours in vars(small).items():
        theirs = vars(large).get(name)
        if isinstance(ours, float) and isinstance(theirs, float) and ours and theirs:
            found |= {theirs} if _close(scale, ours) else set()
            found |= {1 / theirs} if _close(scale, 1 / ours) else set()
    return found.pop() if len(found) == 1 else None


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-4 * abs(other)


def _carried_factors(twin: nn.Module, model: nn.Module) -> tuple[float, ...]:
    """The numbers that a model and its twin have alike in their configs."""
    ours, theirs = (
        {
            (part.model_type, name): float(value)
            for part in _config_parts(one)
            for name, value in vars(part).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for one in (twin, model)
    )
    return tuple(value for key, value in ours.items() if theirs.get(key) == value)


def _config_parts(model: nn.Module) -> Iterator[Any]:
    config: Any = config_of(model)
    return (
        (part for part in parts_of(config) if hasattr(part, "model_type")) if is_config(config) else iter(())
    )


def _stacks(record: ModelMap) -> Iterator[tuple[Stack | None, str]]:
    if record.blocks:
        yield None, record.blocks
    yield from record.stacks.items()


def _layers(
    record: ModelMap,
    stack: Stack | None,
    path: str,
    twin: nn.Module,
    model: nn.Module,
    factors: Sequence[float],
) -> list[_Layer]:
    small, large = blocks_at(twin, path), blocks_at(model, path)
    known = [_of_twin(record, stack, layer) for layer in range(len(small))]
    kinds, shown = layer_kinds(large), layers_of_twin(small, large) or ()
    same = {kinds[at]: layer for layer, at in reversed(list(enumerate(shown)))}
    alike = {block_signature(block): layer for layer, block in reversed(list(enumerate(small)))}
    made: dict[int, _Layer] = {}
    usual: dict[str, Fraction] = {}
    # Kinds that the twin has for certain come first: they say how much wider the model is.
    for kind in sorted(set(kinds), key=lambda kind: (kind not in same, kind)):
        like = same[kind] if kind in same else alike.get(block_signature(large[kind]))
        if like is None:
            made[kind] = _unknown(known, kind)
            continue
        widths = _Widths(small[like], large[kind], None if kind in same or not shown else usual)
        layer = _fitted_layer(known[like], widths)
        made[kind] = _with_sure_factors(layer, factors, small[like], large[kind])
        usual.update(widths.seen)
    return [made[kind] for kind in kinds]


def _of_twin(record: ModelMap, stack: Stack | None, layer: int) -> _Layer:
    sites, absent = {}, {}
    for name, known in COMPONENTS.items():
        if known.scope != "block" or record.blocks_stack_of(name) != stack:
            continue
        there = record.at_layer(name, layer)
        if name in there.sites:
            sites[name] = there.sites[name]
        elif name in there.absent:
            absent[name] = there.absent[name]
    return _Layer(sites, absent)


def _unknown(known: Sequence[_Layer], layer: int) -> _Layer:
    why = f"layer {layer} is of a kind that its tiny twin does not have"
    return _Layer({}, {name: why for one in known for name in (*one.sites, *one.absent)})


def _fitted_layer(layer: _Layer, widths: _Widths) -> _Layer:
    sites, absent = {}, dict(layer.absent)
    for name, site in layer.sites.items():
        scaled = _scaled(site, widths)
        if isinstance(scaled, str):
            absent[name] = scaled
        else:
            sites[name] = scaled
    absent.update(_uneven(layer.sites, sites))
    sites = {name: site for name, site in sites.items() if name not in absent}
    for name, site in sites.items():
        if site.attention is not None and site.attention.width is not None:
            query = name.replace("attention_input", "query_output")
            sites[name] = replace(
                site, attention=_heads(site.attention, layer.sites.get(query), sites.get(query))
            )
    return _Layer(sites, absent)


def _uneven(small: Mapping[str, Site], large: Mapping[str, Site]) -> dict[str, str]:
    """What has heads, where those of keys are as wide as those of queries in the twin and not in the model.

    One of the two numbers of heads is wrong then, and which of them the widths do not tell.
    """
    found: dict[str, str] = {}
    for name, site in large.items():
        query = name.replace("key_output", "query_output")
        if name == query or query not in large or query not in small:
            continue
        sites = (small[query], small[name], large[query], site)
        widths = [known.columns.width for known in sites if known.columns]
        if len(widths) == 4 and widths[0] == widths[1] and widths[2] != widths[3]:
            why = (
                f"heads of keys would be {widths[3]} wide where those of queries are {widths[2]}: the config says"
                " another number of heads, or of key-value heads, than the weights have"
            )
            words = ("query_output", "key_output", "value_output", "attention_value_output")
            found |= {name.replace("key_output", word): why for word in words}
    return found


def _heads(heads: AttentionHeads, small: Site | None, large: Site | None) -> AttentionHeads:
    """The heads inside of an attention module, as much wider as its queries are."""
    width = None
    if heads.width and small and large and small.columns and large.columns:
        wider = Fraction(heads.width * large.columns.width, small.columns.width)
        width = int(wider) if wider.denominator == 1 else None
    return replace(heads, width=width)


def _kinds(
    stack: Stack | None, layers: Sequence[_Layer], commonest: _Layer, nowhere: Mapping[str, str]
) -> list[LayerKind]:
    """What the layers of each kind have that the commonest have not, and the other way round.

    What some layers lack is said of each kind that lacks it and not of all: views and the like follow from what a
    layer has, and a reason given for all would hide them in the layers that have them.
    """
    kinds = []
    for other in dict.fromkeys(layers):
        sites = {name: site for name, site in other.sites.items() if commonest.sites.get(name) != site}
        absent = {name: why for name, why in other.absent.items() if nowhere.get(name) != why}
        lost = (name for name in commonest.sites if name not in other.sites and name not in other.absent)
        absent.update(dict.fromkeys(lost, "its map does not place it there"))
        if sites or absent:
            which = tuple(at for at, layer in enumerate(layers) if layer == other)
            kinds.append(LayerKind(which, stack, sites, absent))
    return kinds


# --- columns ----------------------------------------------------------------------------------------------


class _Widths:
    """How much wider the modules of a live block are than those of the twin's.

    Where factors are expected, others are refused: those of layers that are known to be of the same sizes.
    """

    def __init__(
        self, small: nn.Module, large: nn.Module, expected: Mapping[str, Fraction] | None = None
    ) -> None:
        self._small, self._large = small, large
        self._expected = expected
        self.seen: dict[str, Fraction] = {}

    def has(self, path: str) -> bool:
        """Whether the live block has a module at a path."""
        try:
            self._large.get_submodule(path)
        except AttributeError:  # also where the model has None in its place
            return False
        return True

    def at(self, site: Site) -> tuple[Fraction, int] | str:
        """The factor at a site and the live width there, or why neither can be told."""
        try:
            small = _width_at(self._small.get_submodule(site.path), site)
            large = _width_at(self._large.get_submodule(site.path), site)
        except AttributeError:
            return f"the model has no module {site.path!r} there"
        if small is None or large is None:
            return f"module {site.path!r} does not say how wide its {site.side} is"
        factor = Fraction(large, small)
        key = f"{site.path}.{site.weight or ''}.{site.side}"
        usual = None if self._expected is None else self._expected.get(key)
        if self._expected is not None and factor != usual:
            # Perhaps its heads are more and not wider.
            return f"{site.path!r} is {large} wide, and no layer of its tiny twin has heads of that kind"
        self.seen[key] = factor
        return factor, large


def _scaled(site: Site, widths: _Widths) -> Site | str:
    """A site with its columns and heads as wide as the model's; the reason if they cannot be."""
    if site.columns is None:
        return site if widths.has(site.path) else f"the model has no module {site.path!r} there"
    found = widths.at(site)
    if isinstance(found, str):
        return found
    factor, live = found
    columns = site.columns
    if columns.first_column(columns.heads - 1) + columns.width > live / factor:
        return f"{site.path!r} states another width of its {site.side} than it has in the tiny twin"
    numbers = [
        factor * value for value in (columns.width, columns.start, columns.stride, columns.group_stride)
    ]
    if any(number.denominator != 1 for number in numbers):
        return f"the twin's columns do not fit: {site.path!r} is {live} wide, {float(factor):.3g} times the twin's"
    width, start, stride, group_stride = map(int, numbers)
    wider = HeadColumns(columns.heads, width, start, stride, columns.per_group, group_stride)
    if wider.first_column(columns.heads - 1) + width > live:
        return f"the twin's columns do not fit: {columns.heads} heads of {width} in {live} columns"
    return replace(site, columns=wider)


def _width_at(module: nn.Module, site: Site) -> int | None:
    return _width(module, site.side) if site.weight is None else product_width(module, site)


def _width(module: nn.Module, side: str) -> int | None:
    """The last axis of what goes into or comes out of a module, as far as the module says."""
    adapted = module._modules.get("base_layer")
    if adapted is not None:
        return _width(adapted, side)
    value = getattr(module, "in_features" if side == "input" else "out_features", None)
    if isinstance(value, int):
        return value
    weight = getattr(module, "weight", None)
    if (
        hasattr(module, "nf") and weight is not None
    ):  # the linear modules of GPT-2 have their weights transposed
        return int(weight.shape[0] if side == "input" else weight.shape[-1])
    if weight is not None and weight.dim() == 1:  # a norm
        return int(weight.shape[0])
    if isinstance(module, nn.Conv1d):
        return module.in_channels if side == "input" else module.out_channels
    if not module._parameters:  # around another, which it clips or adds to
        inside = [child for child in module.children() if any(True for _ in child.parameters())]
        return _width(inside[0], side) if len(inside) == 1 else None
    return None
