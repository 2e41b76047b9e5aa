"""Which attention matrices a picture shows, in which order, and what they are called. Without any drawing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from intervenable.errors import InputError

Head = int | tuple[int, int]
"""A head of each layer shown, or a pair `(layer, head)`."""


@dataclass(frozen=True)
class Panel:
    """One matrix of a picture."""

    layer: int | None
    head: int
    matrix: Tensor
    """`[queries, keys]`"""

    @property
    def name(self) -> str:
        return f"head {self.head}" if self.layer is None else f"layer {self.layer}, head {self.head}"


def panels_of(
    patterns: Tensor | Mapping[Any, Tensor],
    layers: Iterable[int] | None = None,
    heads: Iterable[Head] | None = None,
    example: int = 0,
) -> list[Panel]:
    """The matrices that are asked for: layer by layer, or in the order of the pairs in `heads`.

    Args:
        patterns: `[heads, queries, keys]`, `[layers, heads, queries, keys]`, or a mapping such as an
            `ActivationCache`, from `(component, layer)` to `[batch, heads, queries, keys]`.
        layers: Which layers; all by default.
        heads: Numbers of heads, or pairs `(layer, head)`; all heads by default.
        example: Which example of a batch, in a mapping.

    Raises:
        InputError: patterns of another shape, or a layer, head or example that is not there.

    Example:
        >>> [panel.name for panel in panels_of(torch.rand(2, 6, 5, 5), heads=[(1, 3), (0, 2)])]
        ['layer 1, head 3', 'layer 0, head 2']
    """
    by_layer = _by_layer(patterns, example)
    shown = list(by_layer) if layers is None else list(layers)
    wanted = None if heads is None else list(heads)
    if wanted is not None and any(isinstance(head, tuple) for head in wanted):
        if layers is not None or not all(isinstance(head, tuple) for head in wanted):
            raise InputError(
                f"heads={wanted!r} names heads with their layers. Give pairs (layer, head) alone, and no layers, or"
                " numbers of heads that hold for each layer."
            )
        if list(by_layer) == [None]:
            raise InputError(
                f"heads={wanted!r} names layers, and the patterns [heads, queries, keys] have none. Give numbers of"
                " heads."
            )
        pairs: list[Any] = wanted
    else:
        pairs = [
            (layer, head)
            for layer in shown
            for head in (range(len(_layer(by_layer, layer))) if wanted is None else wanted)
        ]
    if not pairs:
        raise InputError(f"layers={layers!r} and heads={wanted!r} leave nothing to draw. Give at least one.")
    return [_panel(by_layer, layer, head) for layer, head in pairs]


def without_future(panels: Sequence[Panel]) -> list[Panel]:
    """The same, with nan above the diagonal of square matrices if all of them are empty there: a causal mask."""

    def above(matrix: Tensor) -> Tensor:
        return torch.ones_like(matrix, dtype=torch.bool).triu(1)

    square = all(panel.matrix.shape[0] == panel.matrix.shape[1] > 1 for panel in panels)
    if not square or any(bool(panel.matrix[above(panel.matrix)].any()) for panel in panels):
        return list(panels)
    return [
        Panel(panel.layer, panel.head, panel.matrix.masked_fill(above(panel.matrix), torch.nan))
        for panel in panels
    ]


def _by_layer(patterns: Tensor | Mapping[Any, Tensor], example: int) -> dict[int | None, Tensor]:
    """`[heads, queries, keys]` by layer; the layer is None where there is no such number."""
    if not isinstance(patterns, Mapping):
        values = _plain(torch.as_tensor(patterns))
        if values.dim() not in (3, 4) or 0 in values.shape:
            raise InputError(
                f"The patterns have shape {tuple(values.shape)}; give [heads, queries, keys] or [layers, heads,"
                " queries, keys], none of them 0."
            )
        return {None: values} if values.dim() == 3 else dict(enumerate(values))
    matrices = {
        key: value
        for key, value in patterns.items()
        if isinstance(key, tuple) and "attention_" in key[0] and value.dim() == 4
    }
    components = list(dict.fromkeys(component for component, _ in matrices))
    if len(components) != 1:
        found = f"those of {', '.join(components)}" if components else "none"
        raise InputError(
            f"A picture shows the attention matrices of one component, and the mapping has {found}. Give one with"
            " ('attention_pattern', layer), or a tensor."
        )
    found_layers: dict[int | None, Tensor] = {}
    for (component, layer), value in matrices.items():
        if not -len(value) <= example < len(value):
            raise InputError(
                f"There is no example {example}: {component!r} of layer {layer} has {len(value)} example(s)."
            )
        found_layers[layer] = _plain(value[example])
    return found_layers


def _plain(values: Tensor) -> Tensor:
    values = values.detach().float().cpu()
    return values.masked_fill(~values.isfinite(), torch.nan)


def _layer(by_layer: Mapping[int | None, Tensor], layer: int | None) -> Tensor:
    if layer not in by_layer:
        known = ", ".join(str(known) for known in by_layer if known is not None)
        raise InputError(
            f"There is no layer {layer} in the patterns. "
            + (f"They have: {known}." if known else "They have none.")
        )
    return by_layer[layer]


def _panel(by_layer: Mapping[int | None, Tensor], layer: int | None, head: int) -> Panel:
    matrices = _layer(by_layer, layer)
    if not 0 <= head < len(matrices):
        of = "" if layer is None else f" of layer {layer}"
        raise InputError(f"There is no head {head}{of}: heads are 0 to {len(matrices) - 1}.")
    return Panel(layer, head, matrices[head])
