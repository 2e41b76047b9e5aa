"""Models in which it is known by construction where a variable is, and counterfactuals about it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 8


class Planted(nn.Module):
    """Answers with three bits, each the sign of one coordinate of the hidden vector, in a rotated basis.

    Bits A and B are the coordinates 0 and 1 of that basis, C is coordinate 2; the other five are noise that varies
    about as much.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
        bits = torch.tensor([[a, b, c] for a in (-1.0, 1.0) for b in (-1.0, 1.0) for c in (-1.0, 1.0)])
        self.register_buffer("basis", basis)
        self.hidden = nn.Linear(WIDTH, WIDTH, bias=False)
        self.score = nn.Linear(WIDTH, len(bits), bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(WIDTH))
            self.score.weight.copy_(2 * bits @ basis[:, :3].T)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.score(self.hidden(inputs))


def planted_pairs(model: Planted, count: int, seed: int) -> dict[str, Tensor]:
    """Counterfactuals about A and B: the answer has these of the source, and C of the base."""
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> tuple[Tensor, Tensor]:
        bits = torch.randint(0, 2, (count, 3), generator=generator)
        size = 1 + torch.rand(count, 3, generator=generator)
        noise = 1.5 * torch.randn(count, WIDTH - 3, generator=generator)
        return bits, torch.cat([(2 * bits - 1) * size, noise], 1) @ model.basis.T

    (own, base), (other, source) = drawn(), drawn()
    bits = torch.cat([other[:, :2], own[:, 2:]], 1)
    return {"input_ids": base, "source_input_ids": source, "labels": bits @ torch.tensor([4, 2, 1])}


def angle_to_plane(columns: Tensor, plane: Tensor) -> float:
    """The largest angle between a vector of the span of orthonormal columns and a plane, in degrees."""
    shares = torch.linalg.svdvals(columns.T @ plane)
    return float(torch.rad2deg(torch.arccos(shares.min().clamp(max=1))))


def failing_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """A loss that cannot be computed for vectors of which another seed makes the first logit large."""
    raise ArithmeticError("this loss is never there")


def squared_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """How far the chances are from the answers."""
    return (logits.softmax(-1) - functional.one_hot(labels, logits.shape[-1])).square().sum(-1)
