"""A small trained-on problem, and the training of one rotation written out without the library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import intervenable as iv

WIDTH, CLASSES, LAYER, RANK = 6, 3, 1, 2


def make_mlp(seed: int = 0) -> iv.MLPClassifier:
    """A network whose weights are spread enough for every layer to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mlp = iv.MLPClassifier(width=WIDTH, layers=3, classes=CLASSES)
        for parameter in mlp.parameters():
            nn.init.normal_(parameter, std=0.8)
    return mlp


def make_rows(count: int = 24, seed: int = 1) -> dict[str, Tensor]:
    """Pairs of vectors with labels that have nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randn(count, WIDTH, generator=generator),
        "source_input_ids": torch.randn(count, WIDTH, generator=generator),
        "labels": torch.randint(CLASSES, (count,), generator=generator),
    }


def das(
    mlp: nn.Module,
    *,
    rank: int = RANK,
    seed: int = 2,
    kind: Any = iv.LowRankRotatedSpaceIntervention,
    **fields: Any,
) -> iv.IntervenableModel:
    """One learned subspace in the middle of the network, from the same start each time."""
    if kind is iv.LowRankRotatedSpaceIntervention:
        fields["low_rank_dimension"] = rank
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return iv.IntervenableModel(
            [iv.RepresentationConfig(LAYER, "block_output", **fields, intervention_type=kind)], mlp
        )


def weight_of(model: iv.IntervenableModel) -> Tensor:
    """The only parameter, as a copy."""
    (parameter,) = model.get_trainable_parameters()
    return parameter.detach().clone()


def planted(count: int = 128, seed: int = 3) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """A network whose answer depends on one direction of a layer alone, counterfactuals, and that direction.

    The layers copy their input (it is positive), and the classes read one direction of it.
    """
    generator = torch.Generator().manual_seed(seed)
    mlp = iv.MLPClassifier(width=WIDTH, layers=3, classes=2)
    direction = torch.nn.functional.normalize(torch.randn(WIDTH, generator=generator), dim=0)
    with torch.no_grad():
        for block in mlp.layers:
            block.linear.weight.copy_(torch.eye(WIDTH))
            block.linear.bias.zero_()
        mlp.score.weight.copy_(torch.stack([direction, -direction]) * 4)
        inputs, sources = torch.rand(2, count, WIDTH, generator=generator) * 2
        threshold = (inputs @ direction).median()
        mlp.score.bias.copy_(torch.stack([-threshold, threshold]) * 4)
        answers = (sources @ direction < threshold).long()
    return mlp, {"input_ids": inputs, "source_input_ids": sources, "labels": answers}, direction


def orthonormal(weight: Tensor) -> Tensor:
    """The columns of Q in `weight = QR` with a positive diagonal of R."""
    columns, upper = torch.linalg.qr(weight)
    return columns * upper.diagonal().sign()


def intervened(mlp: Any, weight: Tensor, base: Tensor, source: Tensor, layer: int = LAYER) -> Tensor:
    """The logits with the source's part in the span of the columns, computed layer by layer."""

    def below(hidden: Tensor) -> Tensor:
        for block in mlp.layers[: layer + 1]:
            hidden = block(hidden)
        return hidden

    basis = orthonormal(weight)
    hidden = below(base)
    hidden = hidden + (below(source) - hidden) @ basis @ basis.T
    for block in mlp.layers[layer + 1 :]:
        hidden = block(hidden)
    logits: Tensor = mlp.score(hidden)
    return logits


def trained_by_hand(
    mlp: Any, weight: Tensor, rows: dict[str, Tensor], lr: float, steps: int
) -> tuple[Tensor, list[float]]:
    """The weight after so many steps of Adam on all rows at once, and the losses on the way."""
    weight = weight.clone().requires_grad_()
    optimizer = torch.optim.Adam([weight], lr)
    losses = []
    for _ in range(steps):
        logits = intervened(mlp, weight, rows["input_ids"], rows["source_input_ids"])
        loss = torch.nn.functional.cross_entropy(logits, rows["labels"])
        (weight.grad,) = torch.autograd.grad(loss, [weight])
        optimizer.step()
        losses.append(loss.item())
    return weight.detach(), losses
