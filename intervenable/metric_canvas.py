"""Logits to show to metrics, again and again in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Canvas:
    """Logits `[b, s, V]` that are shown to metrics, of which a part is written anew each time.

    The memory is kept: to allocate and fill that of a large vocabulary for every run costs more than most metrics do.
    A metric may keep what it is shown, though, or write into it. Then it has that for good, and the next one is shown
    other memory.

    Args:
        background: Makes what it shows where nothing is written.
        positions: `[P]` tensor positions that are written.
        tokens: `[T]` tokens that are written; None for all.

    Example:
        >>> canvas = Canvas(lambda: torch.full((1, 2, 2), torch.nan), torch.tensor([1]))
        >>> canvas.write(torch.ones(1, 1, 2))
        >>> canvas.show(lambda logits: logits.mul_(2).tolist())
        [[[nan, nan], [2.0, 2.0]]]
        >>> canvas.show(lambda logits: logits.tolist())
        [[[nan, nan], [1.0, 1.0]]]
    """

    tensor: Tensor
    """What is shown next, to be written into."""

    def __init__(
        self,
        background: Callable[[], Tensor],
        positions: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> None:
        self._background = background
        self._positions = positions
        self._tokens = tokens
        self._known: Tensor | None = None
        self.renew()

    def write(self, known: Tensor) -> None:
        """Show these logits, `[b, P, T or V]`, where it is written."""
        self._known = known
        if self._window is not None:
            self._window.copy_(known)
        elif self._flat is not None:
            self.tensor.view(-1).index_copy_(0, self._flat, known.reshape(-1))
        else:
            self.tensor.index_copy_(1, self._index, known)

    def show(self, look: Callable[[Tensor], T]) -> T:
        """What a function makes of the logits. It may keep or change them; what it returns is its own."""
        version = self.tensor._version
        try:
            value = look(self.tensor.detach())
        except BaseException:
            self.renew()  # the traceback holds what was shown
            raise
        if self.tensor._version != version or torch._C._storage_Use_Count(self._storage) != self._holders:
            self.renew()
        return value

    def renew(self) -> None:
        """Show other memory from now on, of the same logits."""
        self.tensor = tensor = self._background()
        self._storage: int = tensor.untyped_storage()._cdata
        self._index = torch.arange(tensor.shape[1]) if self._positions is None else self._positions
        self._index = self._index.to(tensor.device)
        self._window, self._flat = None, None
        if self._tokens is None and _are_neighbours(self._index):
            self._window = tensor[:, int(self._index[0]) : int(self._index[-1]) + 1]
        elif self._tokens is not None:
            rows = (
                torch.arange(tensor.shape[0], device=tensor.device)[:, None] * tensor.shape[1] + self._index
            )
            flat = rows[..., None] * tensor.shape[2] + self._tokens.to(tensor.device)
            self._flat = flat.flatten()
        self._holders: int = torch._C._storage_Use_Count(self._storage)
        if self._known is not None:
            self.write(self._known)


def _are_neighbours(positions: Tensor) -> bool:
    return int(positions[-1] - positions[0]) == len(positions) - 1
