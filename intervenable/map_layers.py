"""Which layers of a model are of one kind: told from the modules of its blocks, without running them."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from torch import Tensor, nn

from intervenable.errors import UnsupportedModelError
from intervenable.map_config_fields import HEADS, first_number, is_config, parts_of
from intervenable.map_twin_shape import Shown
from intervenable.site_binding import module_at
from intervenable.unwrapping import config_of
from model_maps import are_beside, layer_lists

FEWEST = 3
"""Layers of a small model, if the large one has so many."""

COMFORTABLE = 8
"""Up to so many are kept to show each kind twice."""

LISTED = 4
"""As many, where a config lists the kinds of layers: others need not be kept to come to those."""

MOST = 16
"""Up to so many are kept to show each kind at all."""

MANY_HEADS = 96
"""With more heads than these a layer costs so much to look at that each kind is shown once, as in several stacks."""


def block_signature(block: nn.Module) -> Hashable:
    """What a block is made of, without its sizes: the same for a block and that of a small model like it.

    Linear modules count as such whatever their class, and adapters as what they adapt.

    Example:
        >>> block_signature(nn.TransformerEncoderLayer(8, 2)) == block_signature(nn.TransformerEncoderLayer(16, 4))
        True
        >>> block_signature(nn.TransformerEncoderLayer(8, 2)) == block_signature(nn.TransformerDecoderLayer(8, 2))
        False
    """
    return _signature(block, sizes=False)


def blocks_at(model: nn.Module, path: str) -> list[nn.Module]:
    """The blocks in the list at a path; what is there, if it is no list; of lists beside each other the parts of each
    layer in one module.

    Example:
        >>> blocks_at(nn.Sequential(nn.ReLU(), nn.ReLU()), "")
        [ReLU(), ReLU()]
        >>> blocks_at(nn.GRU(2, 3), "")
        [GRU(2, 3)]
        >>> beside = nn.ModuleDict({name: nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for name in "ab"})
        >>> [list(layer) for layer in blocks_at(beside, "{a,b}")]
        [['a', 'b'], ['a', 'b']]

    Raises:
        UnsupportedModelError: nothing is at the path, or lists beside each other are not equally long.
    """
    if are_beside(path):
        lists = {
            name.rpartition(".")[2]: list(_list_at(model, name).children()) for name in layer_lists(path)
        }
        if len({*map(len, lists.values())}) > 1:
            counts = ", ".join(f"{len(entries)} in {name!r}" for name, entries in lists.items())
            raise UnsupportedModelError(
                f"the list of blocks is {path!r}, which are not equally long: {counts}."
            )
        layers = zip(*lists.values(), strict=True)
        return [nn.ModuleDict(dict(zip(lists, parts, strict=True))) for parts in layers]
    found = _list_at(model, path)
    return list(found.children()) if isinstance(found, (nn.ModuleList, nn.Sequential)) else [found]


def _list_at(model: nn.Module, path: str) -> nn.Module:
    return module_at(model, path, "the list of blocks")


def block_at(model: nn.Module, path: str) -> nn.Module:
    """The block at a path: of lists beside each other (`"model.{attentions,norms}.3"`) its parts in one module."""
    blocks, _, layer = path.rpartition(".")
    return blocks_at(model, blocks)[int(layer)] if are_beside(blocks) else model.get_submodule(path)


def layer_kinds(blocks: Sequence[nn.Module]) -> tuple[int, ...]:
    """For each block the number of the first block that is of its kind: of the same parts and sizes.

    Example:
        >>> layer_kinds([nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 2)])
        (0, 1, 0)
    """
    firsts: dict[Hashable, int] = {}
    return tuple(firsts.setdefault(_signature(block, sizes=True), at) for at, block in enumerate(blocks))


def layers_shown(model: nn.Module, *, even: bool = False) -> Shown:
    """Which layers of each stack show all kinds of its layers, twice where that takes few.

    Once has to do where a layer has many heads, or where several stacks have kinds.

    They are the first ones, so that what a config says in periods holds for them; others only where a config has a
    list, or where the last layers share the keys and values of others.

    Args:
        model: The model that has the stacks; of several stacks of one length the most demanding counts.
        even: Whether all stacks get as many layers.
    """
    lists = [
        module
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        and all(any(True for _ in block.parameters()) for block in module)
    ]
    known: dict[tuple[int, int, bool], tuple[int, ...]] = {}
    config = config_of(model)
    counts = (first_number(part, HEADS) for part in parts_of(config)) if is_config(config) else ()
    many_heads = max((count for count in counts if count), default=0) > MANY_HEADS
    kinds_of = cache(lambda blocks: layer_kinds(list(blocks)))
    once = many_heads or sum(len({*kinds_of(blocks)}) > 1 for blocks in _stacks(model)) > 1

    def usual(count: int, sharing: int, listed: bool) -> tuple[int, ...]:
        key = (count, sharing, listed)
        if key not in known:
            stacks = [kinds_of(blocks) for blocks in lists if len(blocks) == count]
            if not stacks:
                known[key] = tuple(range(_times_a_stack(count)))
            elif 0 < sharing < count:
                known[key] = _before_and_after(stacks, count - sharing)
            else:
                known[key] = max((_chosen(kinds, listed, once) for kinds in stacks), key=len)
        return known[key]

    def _times_a_stack(count: int) -> int:
        # Layers that are run several times may be counted as often.
        for length in sorted({len(blocks) for blocks in lists}, reverse=True):
            if FEWEST < length < count and count % length == 0:
                return len(usual(length, 0, False)) * (count // length)
        return min(count, FEWEST)

    def shown(count: int, *, sharing: int = 0, listed: bool = False) -> tuple[int, ...]:
        if even:
            return tuple(range(max(len(usual(len(blocks), 0, False)) for blocks in lists)))
        return usual(count, sharing, listed)

    return shown


def _stacks(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of modules that are in no other."""
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            yield module
        else:
            yield from _stacks(module)


def _chosen(kinds: Sequence[int], listed: bool, once_will_do: bool = False) -> tuple[int, ...]:
    """The shortest beginning in which every kind is, twice if that is not long; or some of each kind."""
    firsts = [kinds.index(kind) + 1 for kind in {*kinds}]
    if once_will_do and not listed and max(firsts) <= MOST:
        return tuple(range(min(len(kinds), max(FEWEST - 1, *firsts))))
    places = [[at for at, other in enumerate(kinds) if other == kind] for kind in dict.fromkeys(kinds)]
    # No beginning shows kinds that come later: if it is the last layer's alone, that of the twin may be of it.
    shown = places if listed else [group for group in places if group[0] < MOST]
    twice = max(at for group in shown for at in group[:2]) + 1
    once = max(group[0] for group in shown) + 1
    enough = max(FEWEST, twice if twice <= COMFORTABLE else min(once, MOST))
    if listed:
        times = 2 if 2 * len(places) <= LISTED and not once_will_do else 1
        some = [at for group in places for at in group[:times]]
        rest = [at for at in range(len(kinds)) if at not in some]
        some = sorted([*some, *rest[: FEWEST - len(some)]]) if len(some) < FEWEST else sorted(some)
        if len(some) < enough or once > MOST:
            return tuple(some)
    return tuple(range(min(len(kinds), enough)))


def layers_of_twin(small: Sequence[nn.Module], large: Sequence[nn.Module]) -> tuple[int, ...] | None:
    """Which layers of a model those of its twin are; None if they are like no choice of them.

    Args:
        small: The blocks of the twin.
        large: Those of the model.
    """
    signatures = [block_signature(block) for block in small]
    wanted = [block_signature(block) for block in large]
    kinds = layer_kinds(large)
    options = [tuple(range(len(small))), _chosen(kinds, True), _chosen(kinds, True, True)]
    options += [_before_and_after([kinds], part) for part in range(1, len(large))]
    for option in options:
        if len(option) == len(small) and [wanted[at] for at in option if at < len(wanted)] == signatures:
            return option
    return None


def _before_and_after(stacks: Sequence[Sequence[int]], sharing_from: int) -> tuple[int, ...]:
    """Layers of both parts of a stack, the second of which shares what the first has computed."""
    before = max((_chosen(kinds[:sharing_from], True) for kinds in stacks), key=len)
    after = max((_chosen(kinds[sharing_from:], True) for kinds in stacks), key=len)
    return (*before, *(sharing_from + at for at in after))


_Known = dict[tuple[nn.Module, bool], Hashable]
_KNOWN: ContextVar[_Known | None] = ContextVar("known signatures", default=None)


@contextmanager
def models_that_stay() -> Iterator[None]:
    """Within, the modules of models are taken to stay as they are: each block is looked at once."""
    token = _KNOWN.set({})
    try:
        yield
    finally:
        _KNOWN.reset(token)


def _signature(block: nn.Module, *, sizes: bool) -> Hashable:
    known = _KNOWN.get()
    if known is None:
        return _read_signature(block, sizes=sizes)
    if (block, sizes) not in known:
        known[block, sizes] = _read_signature(block, sizes=sizes)
    return known[block, sizes]


def _read_signature(block: nn.Module, *, sizes: bool) -> Hashable:
    parts: list[Hashable] = []
    for name, module in _without_adapters(block):
        if not sizes and _is_linear(module):
            parts.append((name, "linear"))
            continue
        shapes = tuple(
            (entry, tuple(parameter.shape) if sizes else parameter.dim())
            for entry, parameter in module._parameters.items()
            if parameter is not None
        )
        count = len(module._modules) if sizes else None
        parts.append((name, type(module).__name__, _switches(module), shapes, count))
    return tuple(parts)


def _without_adapters(block: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    adapted = block._modules.get("base_layer")
    if adapted is not None:
        return _without_adapters(adapted, prefix)
    found = [(prefix, block)]
    if _is_linear(block):  # packed weights are a part of it in some
        return found
    children = ((name, child) for name, child in block._modules.items() if child is not None)
    for name, child in _one_of_each(children) if isinstance(block, _OF_MANY) else children:
        found += _without_adapters(child, f"{prefix}.{name}" if prefix else name)
    return found


_OF_MANY = (nn.ModuleList, nn.ModuleDict)
"""What holds experts and the like, of which a small model has fewer."""


def _one_of_each(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """The first module of each kind, with its name."""
    kinds: dict[Hashable, tuple[str, nn.Module]] = {}
    for name, module in modules:
        kinds.setdefault(_signature(module, sizes=True), (name, module))
    return list(kinds.values())


def _switches(module: nn.Module) -> Hashable:
    """Settings of a module that choose what it does: words, truth values, and what is not set.

    Tensors that are none of its weights are what it keeps of a run: before one they are not set.
    """
    settings = [
        (name, _without_layer(value) if isinstance(value, (bool, str)) else None)
        for name, value in vars(module).items()
        if name[0] != "_" and name != "training" and (value is None or isinstance(value, (bool, str, Tensor)))
    ]
    return tuple(sorted(settings, key=lambda setting: setting[0]))


def _without_layer(value: bool | str) -> bool | str:
    """A setting without the number of a layer at its end, as in the key by which a cache is asked."""
    return re.sub(r"[._]\d+$", "", value) if isinstance(value, str) else value


def _is_linear(module: nn.Module) -> bool:
    return (_states(module, "in_features") and _states(module, "out_features")) or _states(module, "nf")


def _states(module: nn.Module, name: str) -> bool:
    # Asking the module itself would look through its parameters and submodules, too, for each that it lacks.
    return name in vars(module) or hasattr(type(module), name)
