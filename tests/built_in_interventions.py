"""Every built-in intervention, made for a width, to hold all of them to the same laws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

import interventions as iv
from interventions import Intervention


def halfway(base: Tensor, source: Tensor) -> Tensor:
    """Return the middle of base and source."""
    return (base + source) / 2


if "tests/halfway" not in iv.registry._callables:
    iv.register_callable("tests/halfway", halfway)


def rank_for(width: int) -> int:
    """Return a rank below the width where there is one."""
    return max(1, width // 2)


def pca(width: int) -> Intervention:
    """Return principal components that were found on noise."""
    return iv.PCARotatedSpaceIntervention.fit(torch.randn(3 * width + 2, width), rank_for(width))


def jump_relu(width: int, error: Literal["drop", "keep"] = "drop") -> Intervention:
    """Return a JumpReLU autoencoder all of whose tensors matter."""
    latents = 2 * width + 1
    return iv.JumpReLUAutoencoderIntervention(
        width,
        latents,
        error,
        threshold=torch.rand(latents),
        b_enc=torch.randn(latents),
        b_dec=torch.randn(width),
    )


BUILT_INS: dict[str, Callable[[int], Intervention]] = {
    "Vanilla": lambda width: iv.VanillaIntervention(embed_dim=width),
    "Vanilla of any width": lambda width: iv.VanillaIntervention(),
    "Skip": lambda width: iv.SkipIntervention(),
    "Zero": lambda width: iv.ZeroIntervention(),
    "Addition": lambda width: iv.AdditionIntervention(),
    "Subtraction": lambda width: iv.SubtractionIntervention(),
    "Scale": lambda width: iv.ScaleIntervention(-1.5),
    "Noise": lambda width: iv.NoiseIntervention(seed=3),
    "Noise, fixed": lambda width: iv.NoiseIntervention(seed=3, shape="fixed"),
    "Collect": lambda width: iv.CollectIntervention(),
    "Callable": lambda width: iv.CallableIntervention(halfway),
    "RotatedSpace": lambda width: iv.RotatedSpaceIntervention(width),
    "LowRankRotatedSpace": lambda width: iv.LowRankRotatedSpaceIntervention(width, rank_for(width)),
    "BoundlessRotatedSpace": lambda width: iv.BoundlessRotatedSpaceIntervention(width, 0.7),
    "SigmoidMask": lambda width: iv.SigmoidMaskIntervention(width),
    "SigmoidMaskRotatedSpace": lambda width: iv.SigmoidMaskRotatedSpaceIntervention(width),
    "PCARotatedSpace": pca,
    "Autoencoder": lambda width: iv.AutoencoderIntervention(width, 2 * width + 1),
    "Autoencoder, error kept": lambda width: iv.AutoencoderIntervention(width, 2 * width + 1, "keep"),
    "JumpReLUAutoencoder": jump_relu,
    "JumpReLUAutoencoder, error kept": lambda width: jump_relu(width, "keep"),
    "Loreft": lambda width: iv.LoreftIntervention(width, rank_for(width), act_fn="gelu"),
    "Noreft": lambda width: iv.NoreftIntervention(width, rank_for(width)),
    "Consreft": lambda width: iv.ConsreftIntervention(width, rank_for(width)),
    "Lobireft": lambda width: iv.LobireftIntervention(width, rank_for(width)),
    "Direft": lambda width: iv.DireftIntervention(width, rank_for(width)),
    "Nodireft": lambda width: iv.NodireftIntervention(width, rank_for(width)),
}

SWAPS = (
    "Vanilla",
    "Skip",
    "RotatedSpace",
    "LowRankRotatedSpace",
    "BoundlessRotatedSpace",
    "SigmoidMask",
    "SigmoidMaskRotatedSpace",
    "PCARotatedSpace",
    "Autoencoder, error kept",
    "JumpReLUAutoencoder, error kept",
)
"""Those that leave the base exactly as it is when the source is the base."""

COORDINATEWISE = (
    "Vanilla",
    "Skip",
    "Zero",
    "Addition",
    "Subtraction",
    "Scale",
    "Noise, fixed",
    "SigmoidMask",
)
"""Those that leave coordinates outside the chosen ones exactly as they are."""


def moved_off_start(intervention: Intervention) -> Intervention:
    """Return it with every parameter changed, as after training."""
    with torch.no_grad():
        for parameter in intervention.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return intervention


def is_trainable(intervention: nn.Module) -> bool:
    """Return whether it has parameters."""
    return any(True for _ in intervention.parameters())
