"""The logits that metrics read, and no others: computed from what goes into the output embedding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from intervenable.errors import UnsupportedModelError
from intervenable.hooks import Hook
from intervenable.linear_maps import is_its_weight
from intervenable.passage import Passage
from intervenable.sites import BoundSite
from intervenable.unwrapping import unwrapped
from intervenable.wave_rows import NoShortcutError


class HasLogits(Protocol):
    """A run whose logits can be had position by position."""

    def logits(self, positions: Tensor | None = None) -> Tensor:
        """`[b, P, V]` at some positions, or at all."""
        ...


@dataclass(frozen=True, eq=False)
class Reading:
    """Which logits are read."""

    positions: Tensor
    """`[P]` sorted tensor positions."""

    tokens: Tensor | None
    """`[T]` sorted tokens; None for all of the vocabulary."""

    length: int
    """Positions there are in all."""

    def of(self, logits: Tensor) -> Tensor:
        """`[b, P, T]` of whole logits `[b, s, V]`."""
        return self._of_tokens(logits[:, self.positions.to(logits.device)])

    def of_run(self, run: HasLogits) -> Tensor:
        """`[b, P, T]` of a run that knows its logits at some positions."""
        return self._of_tokens(run.logits(self.positions))

    def _of_tokens(self, found: Tensor) -> Tensor:
        return found if self.tokens is None else found[..., self.tokens.to(found.device)]

    def after(self, start: int) -> Tensor:
        """The positions that a run from a token on computes, counted from there."""
        return self.positions[self.positions >= start] - start if start else self.positions

    def kept(self, start: int) -> int:
        """Of how many positions from the end logits are needed."""
        return self.length - max(start, int(self.positions[0])) if len(self.positions) else 1


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """`[b, s, V]` what metrics are given: a model's logits, or what it gives first if it has none.

    Raises:
        UnsupportedModelError: there is no such tensor.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        items = output.values() if isinstance(output, Mapping) else output
        logits = next((item for item in items if isinstance(item, Tensor)), None)
    if isinstance(logits, Tensor) and logits.dim() == 2:  # of a classifier: one position
        logits = logits[:, None]
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no logits [batch, positions, vocabulary] for a metric to look at."
        )
    return logits


def output_embedding(model: nn.Module) -> nn.Module | None:
    """The module that makes logits, if the model names one that is a plain product."""
    get = getattr(unwrapped(model).module, "get_output_embeddings", None)
    head = get() if callable(get) else None
    plain = isinstance(head, nn.Linear) and is_its_weight(head, head.weight)
    return head if plain else None


def reads_head(model: nn.Module, sites: Iterable[BoundSite]) -> bool:
    """Whether a place is at the output embedding or around it: then all logits have to be computed."""
    head = output_embedding(model)
    of_the_model = {site.module for site in sites if site.layer is None}
    return any(inner in (model, head) for module in of_the_model for inner in module.modules())


class Readout:
    """Lets a model compute the logits of some positions and tokens alone, by hooks at its output embedding.

    Args:
        model: The model.
        reading: What is read.
        start: The first token of the run.
        narrow: Whether to do so; otherwise all logits are computed and what is read is taken out of them.
        whole: Whether the model has to compute the logits of all positions.
    """

    def __init__(
        self, model: nn.Module, reading: Reading, start: int, narrow: bool, whole: bool = False
    ) -> None:
        self._model, self._reading = model, reading
        self._positions = reading.after(start)
        self._head = output_embedding(model) if narrow and not whole else None
        self._inputs: list[Tensor] = []
        self.keep = 0 if whole or self._head is not None else reading.kept(start)
        """Of how many positions from the end the model is to compute logits; 0 for all."""
        self._offset = 0 if self.keep == 0 else reading.length - start - self.keep
        self.hooks = (
            []
            if self._head is None
            else [Hook(self._head, "input", self._before), Hook(self._head, "output", self._after)]
        )

    def _before(self, passage: Passage) -> None:
        given = passage.take("input", None)
        if given.dim() != 3:
            raise NoShortcutError(f"its output embedding is given {given.dim()} axes")
        picked = given[:, self._positions.to(given.device)]
        if self._reading.tokens is None:
            passage.put("input", None, picked)
        else:
            self._inputs.append(picked)
            passage.put("input", None, given[:0])

    def _after(self, passage: Passage) -> None:
        if self._reading.tokens is None:
            return
        head: Any = passage.module
        tokens = self._reading.tokens.to(head.weight.device)
        bias = None if head.bias is None else head.bias[tokens]
        passage.put("output", None, nn.functional.linear(self._inputs.pop(), head.weight[tokens], bias))

    def of(self, output: Any) -> Tensor:
        """`[rows, P of the run, T]` of what the model gave.

        Raises:
            NoShortcutError: it has other positions than were asked for.
        """
        logits = logits_of(output, self._model)
        if self._head is not None:
            if logits.shape[1] != len(self._positions):
                raise NoShortcutError(
                    f"the model gave {logits.shape[1]} positions and not {len(self._positions)}"
                )
            return logits
        positions = self._positions - (self._offset if logits.shape[1] == self.keep else 0)
        if len(positions) and int(positions[-1]) >= logits.shape[1]:
            raise NoShortcutError(f"the model gave logits of {logits.shape[1]} positions")
        found = logits[:, positions.to(logits.device)]
        tokens = self._reading.tokens
        return found if tokens is None else found[..., tokens.to(logits.device)]


def largest(logits: Tensor) -> float:
    """The largest finite logit, by amount."""
    if not logits.numel():
        return 0.0
    most = float(logits.abs().max())
    if math.isfinite(most):
        return most
    finite = logits[logits.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def furthest(one: Tensor, other: Tensor) -> float:
    """How far two tensors of logits are apart; those that are the same infinity are not."""
    difference = torch.where(one == other, torch.zeros_like(one), one - other).abs()
    return float(difference.max()) if difference.numel() else 0.0
