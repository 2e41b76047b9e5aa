"""Logits to show to metrics, again and again in the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Canvas:
    """Logits `[b, s, V]` that are shown to metrics: NaN but for a part, which is written anew each time.

    The memory is kept: to allocate and fill that of a large vocabulary for every run costs more than most metrics do.
    A metric may keep what it is shown, though, or write into it. Then it has that for good, and the next one is shown
    other memory.

    Args:
        shape: `(b, s, V)`.
        like: Logits of the dtype and on the device.

    Example:
        >>> canvas = Canvas((1, 2, 2), torch.zeros(1))
        >>> canvas.aim(torch.tensor([1]))
        >>> canvas.write(torch.ones(1, 1, 2))
        >>> canvas.show(lambda logits: logits.mul_(2).tolist())
        [[[nan, nan], [2.0, 2.0]]]
        >>> canvas.show(lambda logits: logits.tolist())
        [[[nan, nan], [1.0, 1.0]]]
    """

    tensor: Tensor
    """What is shown next, to be written into."""

    def __init__(self, shape: tuple[int, int, int], like: Tensor) -> None:
        self.tensor = like.new_full(shape, torch.nan)
        self._blank = True
        self.aim(torch.arange(shape[1]))
        self._blank = True  # until something is written, or it is aimed at something else

    def aim(self, positions: Tensor, tokens: Tensor | None = None) -> None:
        """Make everything NaN, and choose what is written.

        Args:
            positions: `[P]` sorted tensor positions.
            tokens: `[T]` tokens; None for all.
        """
        self._known: Tensor | None = None
        numbers = positions.tolist()
        self._span = slice(numbers[0], numbers[-1] + 1) if numbers[-1] - numbers[0] < len(numbers) else None
        self._index = positions.to(self.tensor.device)
        self._tokens = None if tokens is None else tokens.to(self.tensor.device)
        if not self._blank:
            self.tensor.fill_(torch.nan)
        self._blank = False
        self._find()

    def write(self, known: Tensor) -> None:
        """Show these logits, `[b, P, T or V]`, where it is written."""
        self._known, self._blank = known, False
        if self._window is not None:
            self._window.copy_(known)
        elif self._flat is not None:
            self._memory.index_copy_(0, self._flat, known.reshape(-1))
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
        """Show other memory from now on, with the same written."""
        self.tensor = torch.full_like(self.tensor, torch.nan)
        self._find()
        if self._known is not None:
            self.write(self._known)

    def _find(self) -> None:
        """Where in the memory it is written, and who holds that."""
        self._window: Tensor | None = None
        self._flat: Tensor | None = None
        batch, length, size = self.tensor.shape
        if self._tokens is not None:
            rows = torch.arange(batch, device=self.tensor.device)[:, None] * length + self._index
            self._flat = (rows[..., None] * size + self._tokens).flatten()
        elif self._span is not None:
            self._window = self.tensor[:, self._span]
        self._memory = self.tensor.view(-1)
        self._storage: int = self.tensor.untyped_storage()._cdata
        self._holders: int = torch._C._storage_Use_Count(self._storage)
