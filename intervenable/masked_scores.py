"""Which scores of attention count as masked, whatever a model writes there."""

from __future__ import annotations

import torch


def floor_of(dtype: torch.dtype) -> float:
    """Scores below this are masked: models write the least number of a dtype, or add it, or -inf.

    Example:
        >>> floor_of(torch.float32), floor_of(torch.float16)
        (-100000000.0, -16376.0)
    """
    return -1e8 if torch.finfo(dtype).max > 1e9 else torch.finfo(dtype).min / 4
