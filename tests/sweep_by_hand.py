"""Sweeps written out: a loop with a forward pass and a hook for each cell, to compare `sweep` with.

Nothing of the engine is used. Where a component is, its map says; which columns are whose heads, `by_hand` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import product
from typing import Any

import by_hand
import torch
from attention_by_hand import attention_written_out
from declared import main_output
from torch import Tensor, nn

from model_maps import COMPONENTS

Cell = Mapping[str, int]
"""What one cell patches: an int for each axis, those that are missing as a whole."""


def cells_of(**axes: Any) -> list[dict[str, int]]:
    """Every combination of these entries, the last axis fastest."""
    return [dict(zip(axes, entries, strict=True)) for entries in product(*axes.values())]


class ByHand:
    """The cells of one model and one pair of prompts, without padding, of as many tokens each."""

    def __init__(
        self, model: nn.Module, family: str, variant: str | None, clean: Any, corrupted: Any
    ) -> None:
        self.model, self.family, self.variant = model, family, variant
        self.clean, self.corrupted = clean, corrupted
        self._seen: dict[tuple[str, int], Tensor] = {}

    def logits(self, component: str, cell: Cell) -> Tensor:
        """`[b, s, V]` with one cell of a component patched."""
        word, layer = COMPONENTS[component].word, cell.get("layer", 0)
        with torch.no_grad():
            if word in ("attention_pattern", "attention_scores", "attention_scores_masked"):
                return self._with_matrix(word, layer, cell)
            with ExitStack() as stack:
                for name, change in self._changes(component, word, layer, cell).items():
                    stack.callback(by_hand.hook(self.model, name, change, layer).remove)
                return main_output(self.model(**self.corrupted))

    def _changes(self, component: str, word: str, layer: int, cell: Cell) -> dict[str, Any]:
        """What is done at which component, so that the asked one has the clean values of the cell."""
        rows = cell.get("pos", slice(None))
        prefix = component.removesuffix(word)
        if word == "block_mid":  # seen by the MLP and by the residual: what attention adds becomes another
            before, added = (
                self.seen(prefix + name, layer) for name in ("block_input", "attention_contribution")
            )
            here = [self.own(prefix + name, layer) for name in ("block_input", "attention_contribution")]
            change = before + added - here[0] - here[1]
            return {prefix + "attention_contribution": lambda value: _added(value, rows, change)}
        if word == "final_norm_scale":
            norm = prefix + "final_norm_output"
            scale, own = self._scale(self.seen, prefix), self._scale(self.own, prefix)
            return {norm: lambda value: _put(value, rows, slice(None), value * own / scale)}
        same = {  # what is computed from a head's own numbers at one token alone
            "rotary_query": "head_query_output",
            "rotary_key": "head_key_output",
            "head_attention_output": "head_attention_value_output",
        }
        name = prefix + same.get(word, word)
        columns = by_hand.columns(self.family, self.variant, COMPONENTS[name].word)
        chosen: Any = slice(None)
        if columns is not None:
            chosen = columns[cell["head"]] if "head" in cell else columns.flatten()
        where = COMPONENTS[name].heads_of or name
        clean = self.seen(where, layer)
        return {where: lambda value: _put(value, rows, chosen, clean)}

    def _scale(self, seen: Any, prefix: str) -> Tensor:
        """The divisor of an RMS norm."""
        value = seen(prefix + "final_norm_input", 0)
        return (value.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def seen(self, component: str, layer: int) -> Tensor:
        """A component in the clean run."""
        if (component, layer) not in self._seen:
            self._seen[component, layer] = by_hand.seen(self.model, component, self.clean, layer)
        return self._seen[component, layer]

    def own(self, component: str, layer: int) -> Tensor:
        """A component in the corrupted run."""
        return by_hand.seen(self.model, component, self.corrupted, layer)

    def _with_matrix(self, word: str, layer: int, cell: Cell) -> Tensor:
        place = tuple(cell.get(axis, slice(None)) for axis in ("head", "query", "key"))
        at = "pattern" if word == "attention_pattern" else "scores"
        with attention_written_out(self.model, layer=layer) as seen:
            self.model(**self.clean)
        clean = getattr(seen, at)[0]

        def change(matrix: Tensor) -> Tensor:
            new = matrix.clone()
            new[(slice(None), *place)] = clean[(slice(None), *place)]
            return new

        with attention_written_out(self.model, layer=layer, **{at: change}):
            return main_output(self.model(**self.corrupted))


def _put(value: Tensor, rows: Any, columns: Any, clean: Tensor) -> Tensor:
    """The clean values at some positions and columns."""
    new = value.clone()
    keep = torch.zeros(value.shape[1:], dtype=torch.bool)
    keep[rows] = keep[rows] | torch.zeros(value.shape[-1], dtype=torch.bool).index_fill(
        0, torch.arange(value.shape[-1])[columns], True
    )
    new[:, keep] = clean[:, keep]
    return new


def _added(value: Tensor, rows: Any, change: Tensor) -> Tensor:
    new = value.clone()
    new[:, rows] += change[:, rows]
    return new
