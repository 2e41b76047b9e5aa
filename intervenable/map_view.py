"""What is known of a model, to be read: its components, and the tree of its modules with them beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import nn

from intervenable.errors import IntervenableError, UnsupportedModelError
from intervenable.map_arguments import inputs_in, model_in, not_run
from intervenable.map_cache import note, notes_of
from intervenable.map_layers import blocks_at, layer_kinds
from intervenable.map_making import make_map
from intervenable.maps import map_of, registered_map, remember
from intervenable.unwrapping import config_of, unwrapped
from model_maps import COMPONENTS, ModelMap, Site, UnmappedModelError, are_beside, path_in_layer
from model_maps.sizes import columns_of, sizes_of


def model_map(model: nn.Module, *, example_inputs: Mapping[str, Any] | None = None) -> ModelView:
    """Where each component of a model is; printed, the tree of its modules with the components beside them.

    A class without a registered map gets one that is found out on a tiny model like it, proved there, and kept.

    Args:
        model: The model, or an `IntervenableModel` of it.
        example_inputs: Keyword inputs of the model, of two examples at least. Given them, the map is found out by
            runs of the model itself, also if there was one, and describes it from now on.

    Raises:
        ConfigError: no model is given, or no mapping of inputs.
        InputError: the model does not run on the inputs given.
        UnsupportedModelError: there is none and none could be found out; the message says why and the ways out.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> view = model_map(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=3, vocab_size=99)))
        >>> view.components["query_output"]
        'transformer.h.{layer}.attn.c_attn output, 2 heads of 4 columns from 0 on'
        >>> view.refused["router_output"]
        'its MLP is dense: it has no router and no experts'
    """
    inside = model_in(model)
    if example_inputs is not None:
        remember(inside, _found_out(inside, inputs_in(example_inputs, inside)))
        note(inside, "found out by runs of the model on the inputs given")
    try:
        return ModelView(inside, map_of(inside), _notes(inside))
    except UnmappedModelError as error:
        raise UnsupportedModelError(str(error)) from error


def _found_out(model: nn.Module, inputs: Mapping[str, Any]) -> ModelMap:
    """The map that runs of the model on these inputs show."""
    try:
        return make_map(model, inputs)
    except IntervenableError:
        raise
    except Exception as error:
        raise not_run(model, inputs, error) from error


@dataclass(frozen=True)
class ModelView:
    """A model and its map, side by side."""

    model: nn.Module

    map: ModelMap
    """The map itself, which `register_map` takes."""

    notes: tuple[str, ...]
    """Where the map comes from."""

    @property
    def components(self) -> Mapping[str, str]:
        """Component -> where it is, in words: those that the model has."""
        return MappingProxyType({name: self._place(name) for name in self.map.components()})

    @property
    def refused(self) -> Mapping[str, str]:
        """Component -> why the model has none, or which law it broke: of the stacks that the model has."""
        return MappingProxyType(
            {
                name: self.map.reason(name)
                for name, known in COMPONENTS.items()
                if known.prefix in self._prefixes and self.map.site(name) is None
            }
        )

    @property
    def layers(self) -> Mapping[str, int]:
        """Path of each list of blocks -> how many there are."""
        return MappingProxyType({path: len(blocks_at(self.model, path)) for path in self._lists})

    def __str__(self) -> str:
        count = ", ".join(f"{number} layers at {path!r}" for path, number in self.layers.items())
        head = f"{type(self.model).__name__}: {len(self.components)} components" + (
            f"; {count}" if count else ""
        )
        return "\n".join([head, *(f"({text})" for text in self.notes), *_tree(self)])

    def __repr__(self) -> str:
        return f"<map of {type(self.model).__name__}: {len(self.map.components())} components>"

    @property
    def _prefixes(self) -> tuple[str, ...]:
        cross = ("cross",) if "decoder" in self.map.stacks else ()
        return ("", *self.map.stacks, *cross) if self.map.blocks is not None else (*self.map.stacks, *cross)

    @property
    def _lists(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(path for path in (self.map.blocks, *self.map.stacks.values()) if path))

    def _place(self, name: str) -> str:
        blocks = self.map.blocks_of(name) if COMPONENTS[name].scope == "block" else None
        places: dict[str, list[int]] = {}
        for layer in range(len(blocks_at(self.model, blocks)) if blocks else 1):
            site = self.map.site(name, layer if blocks else None)
            if site is not None:
                path = path_in_layer(blocks, "{layer}", site.path)
                places.setdefault(self._words(name, path, site), []).append(layer)
        if len(places) == 1 and (
            not blocks or len(next(iter(places.values()))) == self.layers.get(blocks or "", 0)
        ):
            return next(iter(places))
        return "; ".join(f"{words} (layers {_ranges(layers)})" for words, layers in places.items())

    def _words(self, name: str, path: str, site: Site) -> str:
        known = COMPONENTS[name]
        if known.inside:
            return f"{path or 'the model'}, inside"
        slot = (
            "" if site.slot is None else f" {site.slot!r}" if isinstance(site.slot, str) else f" {site.slot}"
        )
        function = getattr(site, "function", None)
        words = f"{path or 'the model'} {site.side}{slot}" if function is None else f"{function} in {path}"
        if site.weight:
            words = f"{words} with {site.weight}, {site.side}"
        if site.call is not None:
            words += f", call {site.call} in the block"
        columns = columns_of(site, sizes_of(config_of(self.model))) if known.word in _CUT else None
        if columns is not None:
            words += f", {columns.heads} heads of {columns.width} columns from {columns.start} on"
        if site.plus:
            words += f", plus {site.plus}"
        if site.scale != 1.0:
            words += f", times {site.scale:g}"
        if site.read_only:
            words += ", read only"
        if known.derived_from:
            words += f", made from {known.derived_from}"
        return words


_CUT = (
    "query_output",
    "key_output",
    "value_output",
    "attention_value_output",
    "head_query_output",
    "head_key_output",
    "head_value_output",
    "head_attention_value_output",
)


def _notes(model: nn.Module) -> tuple[str, ...]:
    inside = unwrapped(model).module
    written = dict.fromkeys((*notes_of(model), *notes_of(inside)))
    if written:
        return tuple(written)
    if registered_map(inside) is not None:
        return ("the map is registered for its class",)
    return ("the map was found out on a tiny model like it",)


# --- the tree ---------------------------------------------------------------------------------------------


def _tree(view: ModelView) -> list[str]:
    beside = _beside(view)
    rows = list(_rows(view.model, "", 0, beside, view))
    width = max((len(left) for left, _ in rows), default=0)
    return [f"{left.ljust(width)}  {right}".rstrip() for left, right in rows]


def _beside(view: ModelView) -> dict[str, list[str]]:
    """Path of a module -> what is there: of each list of blocks in every layer."""
    found: dict[str, list[str]] = {}
    for name, known in COMPONENTS.items():
        blocks = view.map.blocks_of(name) if known.scope == "block" else None
        if known.scope == "block" and blocks is None:
            continue
        for layer in range(len(blocks_at(view.model, blocks)) if blocks else 1):
            site = view.map.site(name, layer if blocks else None)
            if site is None or known.heads_of or known.derived_from:
                continue
            if known.fallback and site == view.map.site(known.fallback, layer if blocks else None):
                continue
            listed = blocks and _is_list(view.model, blocks)
            path = ".".join(part for part in (blocks, site.path) if part)
            path = path_in_layer(blocks, layer, site.path) if listed else path
            mark = (
                "inside"
                if known.inside or getattr(site, "function", None)
                else "in"
                if site.side == "input"
                else "out"
            )
            plus = f" (plus {site.plus})" if site.plus else ""
            found.setdefault(path, []).append(f"{mark} {name}{plus}")
    return found


def _is_list(model: nn.Module, path: str) -> bool:
    return are_beside(path) or isinstance(model.get_submodule(path), (nn.ModuleList, nn.Sequential))


def _rows(
    module: nn.Module, path: str, depth: int, beside: Mapping[str, Sequence[str]], view: ModelView
) -> Iterator[tuple[str, str]]:
    if depth == 0 and path in beside:
        yield "(the model)", _grouped(beside[path])
    for label, name, child in _folded(module, path, beside):
        below = f"{path}.{name}" if path else name
        yield f"{'  ' * depth}{label}: {type(child).__name__}", _grouped(beside.get(below, ()))
        if any(other == below or other.startswith(f"{below}.") for other in beside):
            yield from _rows(child, below, depth + 1, beside, view)


def _folded(
    module: nn.Module, path: str, beside: Mapping[str, Sequence[str]]
) -> Iterator[tuple[str, str, nn.Module]]:
    """The children of a module; of a list one of each kind, with the numbers of all that are like it."""
    named = [(name, child) for name, child in module.named_children()]
    if not (len(named) > 1 and all(name.isdigit() for name, _ in named)):
        yield from ((name, name, child) for name, child in named)
        return
    kinds = layer_kinds([child for _, child in named])
    groups: dict[Any, list[int]] = {}
    for at, kind in enumerate(kinds):
        start = f"{path}.{at}"
        own = tuple(
            (other[len(start) :], tuple(texts))
            for other, texts in beside.items()
            if other == start or other.startswith(f"{start}.")
        )
        groups.setdefault((kind, own), []).append(at)
    for numbers in groups.values():
        yield _ranges(numbers), str(numbers[0]), named[numbers[0]][1]


def _grouped(texts: Sequence[str]) -> str:
    sides: dict[str, list[str]] = {}
    for text in texts:
        side, _, name = text.partition(" ")
        sides.setdefault(side, []).append(name)
    return " | ".join(f"{side} {', '.join(sides[side])}" for side in ("in", "inside", "out") if side in sides)


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in order, those side by side as a range.

    Example:
        >>> _ranges([0, 1, 2, 5])
        '0-2,5'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)
