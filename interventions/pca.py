"""Interchange along principal components that were found beforehand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from interventions.base import Intervention, Json, Parts, Sees, check_count
from interventions.errors import InterventionArgumentError, InterventionError, InterventionShapeError
from interventions.precision import without_autocast, working_dtype
from interventions.rotation import difference_of
from interventions.subspaces import Subspaces


class PCARotatedSpaceIntervention(Intervention):
    """Swap coordinates along given principal components.

    Activations are standardised, `z = (x - mean) / std`, and projected on the rows of `C`, `y = z C^T`. The
    result is `b + ((y_s - y_b)_S C) * std`. What fewer components than dimensions do not describe stays the
    base's. Nothing is trained.

    Args:
        components: `[k, embed_dim]`, orthonormal rows. Without them `embed_dim` and `low_rank_dimension` make
            room for a state dict, and calling before it is loaded is an error.
        mean: `[embed_dim]`; zeros if left out.
        std: `[embed_dim]` or a number; ones if left out.
        embed_dim, low_rank_dimension: The sizes, if there are no components yet.
        subspace_partition, source_representation, sees: See `Intervention`; parts are of the components.

    Shape:
        base, source, result: `(..., embed_dim)`.

    Raises:
        InterventionArgumentError: Neither components nor sizes, or a `std` that is not positive.
        InterventionShapeError: Sizes that do not fit each other.

    Example:
        >>> components = torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
        >>> swap = PCARotatedSpaceIntervention(components, mean=1.0, std=2.0)
        >>> swap(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 5.0]), subspaces=0)
        tensor([4.2000, 2.6000])
    """

    sees: Sees = "concatenated"
    components: Tensor
    """`[k, embed_dim]`."""
    mean: Tensor
    """`[embed_dim]`."""
    std: Tensor
    """`[embed_dim]`."""

    def __init__(
        self,
        components: Tensor | None = None,
        mean: Tensor | float | None = None,
        std: Tensor | float | None = None,
        *,
        embed_dim: int | None = None,
        low_rank_dimension: int | None = None,
        subspace_partition: Parts = None,
        source_representation: Tensor | Mapping[str, Json] | None = None,
        sees: Sees | None = None,
    ) -> None:
        if components is not None:
            components = torch.as_tensor(components).detach()
            if components.dim() != 2:
                raise InterventionShapeError(
                    f"components has shape {tuple(components.shape)}; give [k, embed_dim]."
                )
            given = (low_rank_dimension, embed_dim)
            if any(
                want is not None and want != have for want, have in zip(given, components.shape, strict=True)
            ):
                raise InterventionShapeError(
                    f"components has shape {tuple(components.shape)}, but [low_rank_dimension, embed_dim] ="
                    f" {list(given)} was given. Leave the sizes out, or make them equal."
                )
            low_rank_dimension, embed_dim = components.shape
        if embed_dim is None:
            raise InterventionArgumentError(
                "PCARotatedSpaceIntervention needs its components ([k, embed_dim]), or embed_dim to load"
                " them later."
            )
        super().__init__(embed_dim=embed_dim, source_representation=source_representation, sees=sees)
        self.low_rank_dimension = embed_dim if low_rank_dimension is None else low_rank_dimension
        check_count("low_rank_dimension", self.low_rank_dimension, embed_dim, f" (embed_dim={embed_dim})")
        self.subspace_partition = subspace_partition
        self._ready = components is not None
        if components is None:
            components = torch.zeros(self.low_rank_dimension, embed_dim)
        # In the layout that a state dict restores: products of another layout round otherwise.
        self.register_buffer("components", components.clone(memory_format=torch.contiguous_format))
        self.register_buffer("mean", _vector("mean", mean, 0.0, components))
        self.register_buffer("std", _vector("std", std, 1.0, components))
        if not self.std.is_meta and not bool((self.std > 0).all()):
            raise InterventionArgumentError(
                f"std has entries that are not positive (smallest: {float(self.std.min())}), but it divides."
                f" Give the standard deviations, with 1 for constant dimensions."
            )

    @property
    def subspace_size(self) -> int | None:
        """The number of components."""
        return getattr(self, "low_rank_dimension", None)

    @classmethod
    def fit(
        cls, activations: Tensor, low_rank_dimension: int | None = None, *, standardize: bool = True
    ) -> PCARotatedSpaceIntervention:
        """Return the intervention on the principal components of some activations.

        Args:
            activations: `[..., embed_dim]`, at least two of them.
            low_rank_dimension: How many components, the largest first; all that there are if left out.
            standardize: Whether each dimension is divided by its standard deviation (constant ones are not).

        Raises:
            InterventionShapeError: Fewer than two activations.
            InterventionArgumentError: More components than activations or dimensions give.

        Example:
            >>> line = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])
            >>> PCARotatedSpaceIntervention.fit(line, 1, standardize=False).components.abs()
            tensor([[0.6000, 0.8000]])
        """
        rows = activations.detach().reshape(-1, activations.shape[-1])
        rows = rows.to(working_dtype(rows))
        if len(rows) < 2:
            raise InterventionShapeError(f"Components need at least 2 activations; got {len(rows)}.")
        most = min(rows.shape)
        rank = most if low_rank_dimension is None else low_rank_dimension
        check_count(
            "low_rank_dimension", rank, most, f" ({rows.shape[0]} activations of width {rows.shape[1]})"
        )
        mean = rows.mean(0)
        std = rows.std(0) if standardize else torch.ones_like(mean)
        std = torch.where(std > 0, std, 1.0)
        components = torch.linalg.svd((rows - mean) / std, full_matrices=False).Vh[:rank]
        return cls(components, mean, std)

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the source along the chosen components, the base along all other directions."""
        if not self._ready:
            raise InterventionError(
                "PCARotatedSpaceIntervention has no components yet: make it with components, fit it, or load"
                " a state dict."
            )
        base, source = self.operands(base, source)
        mask = self.chosen(subspaces, base, self.low_rank_dimension)
        return self._swap(base, source, mask)

    @without_autocast
    def _swap(self, base: Tensor, source: Tensor, mask: Tensor | None) -> Tensor:
        dtype = working_dtype(base)
        components, std = self.components.to(dtype), self.std.to(dtype)
        # The mean cancels in the difference.
        coordinates = (difference_of(base, source) / std) @ components.mT
        if mask is not None:
            coordinates = coordinates * mask
        return (base.to(dtype) + (coordinates @ components) * std).to(base.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._ready = self._ready or f"{prefix}components" in state_dict


def _vector(name: str, value: Tensor | float | None, default: float, components: Tensor) -> Tensor:
    """Return a `[embed_dim]` vector beside the components."""
    width = components.shape[1]
    vector = torch.as_tensor(
        default if value is None else value, dtype=components.dtype, device=components.device
    )
    if vector.shape not in ((), (1,), (width,)):
        raise InterventionShapeError(f"{name} has shape {tuple(vector.shape)}; give [{width}] or a number.")
    return vector.detach().expand(width).clone()
