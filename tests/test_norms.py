"""What norms divide by: of classes that are known, and of any that compute the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from intervenable.norms import centred, norm_scale


class WithoutWeights(nn.Module):
    """Takes the mean off, and does not say what it adds to the variance."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (x.shape[-1],), eps=0.02)


class MeanTakenOff(nn.Module):
    """Takes the mean off, and is called nothing that says so."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.linspace(0.5, 2.0, width)), 0.02

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class MeanKept(nn.Module):
    """Divides by the mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.linspace(-0.5, 0.5, width)),
            nn.Parameter(torch.ones(width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.02) + self.bias


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_the_scale_is_what_the_output_was_divided_by(width: int, scale: float):
    stream = randn(2, 3, width) * scale + scale
    without_mean = stream - stream.mean(-1, keepdim=True)
    for norm, values in [
        (WithoutWeights(), without_mean),
        (MeanTakenOff(width), without_mean),
        (MeanKept(width), stream),
        (nn.LayerNorm(width, eps=0.02), without_mean),
        (nn.RMSNorm(width, eps=0.02), stream),
    ]:
        assert_close(norm_scale(norm, stream), (values.pow(2).mean(-1, keepdim=True) + 0.02).sqrt())
        assert_close(centred(norm, stream), values)


def test_hooks_of_a_norm_do_not_see_that_it_is_looked_at():
    norm, seen = MeanTakenOff(4), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    norm_scale(norm, randn(1, 2, 4))
    assert not seen
