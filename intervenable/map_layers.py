"""Which layers of a model are of one kind: told from the modules of its blocks, without running them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from torch import nn

FEWEST = 3
"""Layers of a small model, if the large one has so many."""

COMFORTABLE = 8
"""Up to so many are kept to show each kind twice."""

MOST = 16
"""Up to so many are kept to show each kind at all."""


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


def layer_kinds(blocks: Sequence[nn.Module]) -> tuple[int, ...]:
    """For each block the number of the first block that is of its kind: of the same parts and sizes.

    Example:
        >>> layer_kinds([nn.Linear(2, 2), nn.Linear(2, 3), nn.Linear(2, 2)])
        (0, 1, 0)
    """
    firsts: dict[Hashable, int] = {}
    return tuple(firsts.setdefault(_signature(block, sizes=True), at) for at, block in enumerate(blocks))


def layers_needed(model: nn.Module) -> Callable[[int], int]:
    """How many of the first layers of a stack show all kinds of its layers: a function of how many it has.

    Args:
        model: The model that has the stack; of several stacks of one length the most demanding counts.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    known: dict[int, int] = {}

    def needed(count: int) -> int:
        if count not in known:
            kinds = [layer_kinds(list(blocks)) for blocks in lists if len(blocks) == count]
            known[count] = min(count, max([FEWEST, *map(_enough, kinds)]))
        return known[count]

    return needed


def _enough(kinds: Sequence[int]) -> int:
    """The length of the shortest beginning in which every kind is, twice if that is not long."""
    seconds = [[at for at, other in enumerate(kinds) if other == kind][:2][-1] for kind in set(kinds)]
    if (twice := max(seconds) + 1) <= COMFORTABLE:
        return twice
    return min(max(max(kinds) + 1, FEWEST), MOST)


def _signature(block: nn.Module, *, sizes: bool) -> Hashable:
    parts: list[Hashable] = []
    for name, module in _without_adapters(block):
        if not sizes and _is_linear(module):
            parts.append((name, "linear"))
            continue
        shapes = tuple(
            (entry, tuple(parameter.shape) if sizes else parameter.dim())
            for entry, parameter in module.named_parameters(recurse=False)
        )
        parts.append((name, type(module).__name__, _switches(module), shapes))
    return tuple(parts)


def _without_adapters(block: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    adapted = block._modules.get("base_layer")
    if adapted is not None:
        return _without_adapters(adapted, prefix)
    found = [(prefix, block)]
    for name, child in block._modules.items():
        if child is not None:
            found += _without_adapters(child, f"{prefix}.{name}" if prefix else name)
    return found


def _switches(module: nn.Module) -> Hashable:
    """Settings of a module that choose what it does: words, truth values, and what is set at all."""
    return tuple(
        (name, value if isinstance(value, (bool, str)) else value is None)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_")
        and name != "training"
        and isinstance(value, (bool, str, type(None), int, float))
    )


def _is_linear(module: nn.Module) -> bool:
    return (hasattr(module, "in_features") and hasattr(module, "out_features")) or hasattr(module, "nf")
