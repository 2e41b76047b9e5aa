"""Interchange in the latents of an autoencoder, such as a sparse one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from interventions.base import Intervention, Json, Parts, Sees, check_count
from interventions.errors import InterventionArgumentError
from interventions.precision import without_autocast, working_dtype
from interventions.subspaces import Subspaces


class LatentIntervention(Intervention):
    """Encode base and source, swap latents, decode: `D(a')` with `a'` of the source on the chosen latents.

    With `error="drop"` the result is that reconstruction; with `error="keep"` what the autoencoder cannot
    express of the base stays: `b + D(a') - D(E(b))`, so that swapping nothing changes nothing. Not for direct
    use: a subclass writes `encode`, and keeps its decoder where `decoder_parts` finds it.
    """

    sees: Sees = "concatenated"
    error: Literal["drop", "keep"]
    """What becomes of the part of the base that the autoencoder cannot express."""

    def encode(self, activation: Tensor) -> Tensor:
        """Return the latents of an activation: `(..., embed_dim)` to `(..., latents)`."""
        raise NotImplementedError(f"{type(self).__name__} has no encode(activation) yet; write it.")

    def decoder_parts(self) -> tuple[Tensor, Tensor]:
        """Return the decoder's directions, `(latents, embed_dim)`, and its bias, `(embed_dim,)`."""
        raise NotImplementedError(f"{type(self).__name__} has no decoder_parts() yet; write it.")

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the decoded latents of the base with the chosen ones taken from the source."""
        base, source = self.operands(base, source)
        directions, _ = self.decoder_parts()
        mask = self.chosen(subspaces, base, directions.shape[0])
        return self._swap(base, source, mask)

    @without_autocast
    def _swap(self, base: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        dtype = working_dtype(base)
        directions, bias = (part.to(dtype) for part in self.decoder_parts())
        own, other = self.encode(base.to(dtype)), self.encode(source.to(dtype))
        swapped = other if mask is None else torch.where(mask, other, own)
        if self.error == "keep":  # the bias cancels in D(a') - D(a)
            return (base.to(dtype) + (swapped - own) @ directions).to(base.dtype)
        return (swapped @ directions + bias).to(base.dtype)

    def _set_error(self, error: str) -> None:
        if error not in ("drop", "keep"):
            raise InterventionArgumentError(f"error={error!r} is unknown; allowed: 'drop', 'keep'.")
        self.error = error  # type: ignore[assignment]  # checked just above


class AutoencoderIntervention(LatentIntervention):
    """Swap latents of a trainable autoencoder with one hidden layer of rectified units.

    `E(x) = relu(W (x - c) + d)` and `D(a) = V a + c`, the decoder's bias `c` being taken off before encoding.

    Args:
        embed_dim: Size of the last axis; with concatenated units, of all units together.
        latent_dim: Number of latents.
        error: `"drop"` (as in pyvene): the result is the reconstruction; `"keep"`: the base's reconstruction
            error is added back.
        subspace_partition, source_representation, sees: See `Intervention`; parts are of the latents.

    Shape:
        base, source, result: `(..., embed_dim)`.

    Raises:
        InterventionArgumentError: A size below 1, or an unknown `error`.
        InterventionShapeError: When called on another width.

    Example:
        >>> swap = AutoencoderIntervention(4, latent_dim=16, error="keep")
        >>> base = torch.randn(2, 4)
        >>> torch.equal(swap(base, base), base)
        True
    """

    def __init__(
        self,
        embed_dim: int,
        latent_dim: int,
        error: Literal["drop", "keep"] = "drop",
        *,
        subspace_partition: Parts = None,
        source_representation: Tensor | Mapping[str, Json] | None = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, source_representation=source_representation, sees=sees)
        check_count("latent_dim", latent_dim)
        self.latent_dim = latent_dim
        self.subspace_partition = subspace_partition
        self._set_error(error)
        self.encoder = nn.Linear(embed_dim, latent_dim)
        self.decoder = nn.Linear(latent_dim, embed_dim)

    @property
    def subspace_size(self) -> int | None:
        """The number of latents."""
        return getattr(self, "latent_dim", None)

    def encode(self, activation: Tensor) -> Tensor:
        """Return the latents, none below zero: `(..., embed_dim)` to `(..., latent_dim)`."""
        dtype = activation.dtype
        weight, bias = self.encoder.weight.to(dtype), self.encoder.bias.to(dtype)
        return torch.relu((activation - self.decoder.bias.to(dtype)) @ weight.mT + bias)

    def decoder_parts(self) -> tuple[Tensor, Tensor]:
        """Return the decoder's directions, `(latent_dim, embed_dim)`, and its bias."""
        return self.decoder.weight.mT, self.decoder.bias


class JumpReLUAutoencoderIntervention(LatentIntervention):
    """Swap latents of a sparse autoencoder with a threshold for each latent.

    `E(x) = z * [z > threshold] * [z > 0]` with `z = x W_enc + b_enc`, and `D(a) = a W_dec + b_dec`. The
    tensors are those of a trained autoencoder, under the names in which they are published; they are buffers
    and are not trained. Those left out start as a random dictionary with zero biases and thresholds, to be
    overwritten or loaded.

    Rajamanoharan et al. (2024), "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
    Autoencoders", https://arxiv.org/abs/2407.14435.

    Args:
        embed_dim: Size of the last axis; with concatenated units, of all units together.
        low_rank_dimension: Number of latents.
        error: `"drop"` (as in pyvene): the result is the reconstruction; `"keep"`: the base's reconstruction
            error is added back.
        W_enc, b_enc, threshold, W_dec, b_dec: `[embed_dim, latents]`, `[latents]`, `[latents]`,
            `[latents, embed_dim]`, `[embed_dim]`.
        subspace_partition, source_representation, sees: See `Intervention`; parts are of the latents.

    Shape:
        base, source, result: `(..., embed_dim)`.

    Raises:
        InterventionArgumentError: A size below 1, a tensor of another shape, or an unknown `error`.
        InterventionShapeError: When called on another width.

    Example:
        >>> eye = torch.eye(2)
        >>> swap = JumpReLUAutoencoderIntervention(
        ...     2, 2, W_enc=eye, W_dec=eye, threshold=torch.full((2,), 0.5), b_dec=torch.full((2,), 0.1)
        ... )
        >>> swap(torch.tensor([0.4, 2.0]), torch.tensor([3.0, 0.2]), subspaces=0)
        tensor([3.1000, 2.1000])
    """

    W_enc: Tensor
    """`[embed_dim, latents]`."""
    b_enc: Tensor
    """`[latents]`."""
    threshold: Tensor
    """`[latents]`; a latent at or below its threshold is zero."""
    W_dec: Tensor
    """`[latents, embed_dim]`."""
    b_dec: Tensor
    """`[embed_dim]`."""

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int,
        error: Literal["drop", "keep"] = "drop",
        *,
        W_enc: Tensor | None = None,
        b_enc: Tensor | None = None,
        threshold: Tensor | None = None,
        W_dec: Tensor | None = None,
        b_dec: Tensor | None = None,
        subspace_partition: Parts = None,
        source_representation: Tensor | Mapping[str, Json] | None = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, source_representation=source_representation, sees=sees)
        check_count("low_rank_dimension", low_rank_dimension)
        self.low_rank_dimension = low_rank_dimension
        self.subspace_partition = subspace_partition
        self._set_error(error)
        dictionary = nn.functional.normalize(torch.randn(low_rank_dimension, embed_dim), dim=-1)
        starts = {
            "W_enc": (W_enc, dictionary.mT),
            "b_enc": (b_enc, torch.zeros(low_rank_dimension)),
            "threshold": (threshold, torch.zeros(low_rank_dimension)),
            "W_dec": (W_dec, dictionary),
            "b_dec": (b_dec, torch.zeros(embed_dim)),
        }
        for name, (given, start) in starts.items():
            if given is not None and given.shape != start.shape:
                raise InterventionArgumentError(
                    f"{name} has shape {tuple(given.shape)}; for embed_dim={embed_dim} and"
                    f" low_rank_dimension={low_rank_dimension} give {tuple(start.shape)}."
                )
            chosen = (start if given is None else given).detach()
            # In the layout that a state dict restores: products of another layout round otherwise.
            self.register_buffer(name, chosen.clone(memory_format=torch.contiguous_format))

    @property
    def subspace_size(self) -> int | None:
        """The number of latents."""
        return getattr(self, "low_rank_dimension", None)

    def encode(self, activation: Tensor) -> Tensor:
        """Return the latents, none below zero: `(..., embed_dim)` to `(..., latents)`."""
        dtype = activation.dtype
        before = activation @ self.W_enc.to(dtype) + self.b_enc.to(dtype)
        return before * ((before > self.threshold.to(dtype)) & (before > 0))

    def decoder_parts(self) -> tuple[Tensor, Tensor]:
        """Return the decoder's directions, `(latents, embed_dim)`, and its bias."""
        return self.W_dec, self.b_dec
