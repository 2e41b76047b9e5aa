"""What a norm divides its input by, and whether it takes the mean off: told by what the module computes."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

EPSILONS = ("eps", "variance_epsilon")
"""Names under which norms keep what they add to the variance."""

SMALL = 1e-3
"""How much smaller a probe is that tells what is added to the variance."""

_known: WeakKeyDictionary[nn.Module, tuple[bool, float]] = WeakKeyDictionary()


def norm_scale(module: nn.Module, stream: Tensor) -> Tensor:
    """What a norm divides by: the root of the variance (LayerNorm) or mean square (RMSNorm), plus epsilon.

    Shape: `[b, s, D]` to `[b, s, 1]`, in float32 (float64 for a float64 model).
    """
    values = centred(module, stream.to(torch.promote_types(stream.dtype, torch.float32)))
    return (values.pow(2).mean(-1, keepdim=True) + _told(module, stream)[1]).sqrt()


def centred(module: nn.Module, values: Tensor) -> Tensor:
    """Vectors less their mean, if that is what a norm divides; else as they are.

    Example:
        >>> centred(nn.LayerNorm(2), torch.tensor([1.0, 3.0])), centred(nn.RMSNorm(2), torch.tensor([1.0, 3.0]))
        (tensor([-1.,  1.]), tensor([1., 3.]))
    """
    return values - values.mean(-1, keepdim=True) if _told(module, values)[0] else values


def _told(module: nn.Module, like: Tensor) -> tuple[bool, float]:
    """Whether the mean is taken off, and what is added to the variance."""
    if module not in _known:
        values = [getattr(module, name, None) for name in EPSILONS]
        epsilon = next((value for value in values if isinstance(value, float)), None)
        if isinstance(module, nn.LayerNorm | nn.RMSNorm) and epsilon is not None:
            _known[module] = isinstance(module, nn.LayerNorm), epsilon
        else:
            _known[module] = _probed(module, like, epsilon)
    return _known[module]


@torch.no_grad()
def _probed(module: nn.Module, like: Tensor, epsilon: float | None) -> tuple[bool, float]:
    """The same, found out with vectors whose entries are all alike, and with some whose mean is zero."""
    width = like.shape[-1]
    flat = torch.ones(1, 1, width, device=like.device, dtype=like.dtype)
    turns = flat * (torch.arange(width, device=like.device).remainder(2) * 2 - 1)
    turns[..., width // 2 * 2 :] = 0  # an odd width has one more
    try:  # `forward`, so that no hook sees it
        nothing, same, far, near = (module.forward(x) for x in (flat * 0, flat, turns, turns * SMALL))
    except Exception:  # it needs more than a vector
        return False, epsilon or 0.0
    far, near, same = far - nothing, near - nothing, same - nothing
    mean_off = float(same.abs().max()) < 0.01 * float(far.abs().max())
    if epsilon is not None:
        return mean_off, epsilon
    square, variance = SMALL**2, float(turns.float().pow(2).mean())
    ratio = float((near.double().norm() / far.double().norm().clamp(min=1e-30)) ** 2)
    return mean_off, max(0.0, square * variance * (1 - ratio) / max(ratio - square, 1e-12))
