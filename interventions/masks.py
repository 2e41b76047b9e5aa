"""Interchange through a learned soft mask over coordinates."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from interventions.base import Intervention, Json, Parts, Sees
from interventions.precision import working_dtype
from interventions.rotation import OrthogonalWeight, SharedSwapInBasis, difference_of
from interventions.subspaces import Subspaces
from interventions.temperature import Tempered


class SigmoidMaskIntervention(Tempered, Intervention):
    """Swap each coordinate by a learned share: `b + m (s - b)` with `m = sigmoid(mask / T)`.

    Args:
        embed_dim: Size of the last axis.
        temperature: Where the temperature starts.
        trainable_temperature: Whether it is learned.
        subspace_partition, source_representation, sees: See `Intervention`.

    Shape:
        base, source, result: `(..., embed_dim)`.

    Raises:
        InterventionArgumentError: `temperature` is not positive.
        InterventionShapeError: When called on another width.

    Example:
        >>> swap = SigmoidMaskIntervention(4)
        >>> swap.mask.data = torch.tensor([-1.0, 1.0, 0.0, 0.0])
        >>> swap(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])).detach()
        tensor([ 1.0000, 20.0000, 16.5000, 22.0000])
    """

    mask: nn.Parameter
    """`[embed_dim]`, before temperature and sigmoid; starts at 0, a share of one half."""

    def __init__(
        self,
        embed_dim: int,
        temperature: float = 0.01,
        *,
        trainable_temperature: bool = False,
        subspace_partition: Parts = None,
        source_representation: Tensor | Mapping[str, Json] | None = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            subspace_partition=subspace_partition,
            source_representation=source_representation,
            sees=sees,
        )
        self.mask = nn.Parameter(torch.zeros(embed_dim))
        self._start_temperature(temperature, trainable_temperature)

    def mask_weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the share by which each coordinate is swapped.

        Shape:
            result: `(embed_dim,)`, between 0 and 1.
        """
        return torch.sigmoid(self.mask.to(dtype) / self.temperature.to(dtype))

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the base with each chosen coordinate moved by its share towards the source's."""
        base, source = self.operands(base, source)
        weights = self.mask_weights(working_dtype(base))
        mask = self.chosen(subspaces, base, base.shape[-1])
        if mask is not None:
            weights = weights * mask
        return (base.to(weights.dtype) + weights * difference_of(base, source)).to(base.dtype)


class SigmoidMaskRotatedSpaceIntervention(SharedSwapInBasis):
    """Swap each coordinate of a learned rotated basis by a learned share.

    With an orthogonal matrix `R` and `m = sigmoid(mask / T)`, the result is `b + ((s - b) R * m) R^T`.

    Args:
        embed_dim: Size of the last axis; with concatenated units, of all units together.
        temperature: Where the temperature starts.
        trainable_temperature: Whether it is learned.
        subspace_partition, source_representation, sees: See `Intervention`.

    Shape:
        base, source, result: `(..., embed_dim)`.

    Raises:
        InterventionArgumentError: `temperature` is not positive.
        InterventionShapeError: When called on another width.

    Example:
        >>> SigmoidMaskRotatedSpaceIntervention(3).mask_weights().detach()
        tensor([0.8808, 0.8808, 0.8808])
    """

    mask: nn.Parameter
    """`[embed_dim]`, before temperature and sigmoid; starts at 100, a share of 0.88 at temperature 50."""

    def __init__(
        self,
        embed_dim: int,
        temperature: float = 50.0,
        *,
        trainable_temperature: bool = False,
        subspace_partition: Parts = None,
        source_representation: Tensor | Mapping[str, Json] | None = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(
            embed_dim=embed_dim,
            subspace_partition=subspace_partition,
            source_representation=source_representation,
            sees=sees,
        )
        self.rotation = OrthogonalWeight(embed_dim, embed_dim)
        self.mask = nn.Parameter(torch.full((embed_dim,), 100.0))
        self._start_temperature(temperature, trainable_temperature)

    def mask_weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the share by which each rotated coordinate is swapped.

        Shape:
            result: `(embed_dim,)`, between 0 and 1.
        """
        return torch.sigmoid(self.mask.to(dtype) / self.temperature.to(dtype))
