"""Interchange in a learned basis: distributed alignment search and its relatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from interventions.base import Intervention, Json, Parts, Sees, check_count
from interventions.precision import without_autocast, working_dtype
from interventions.subspaces import Subspaces
from interventions.temperature import Tempered


class OrthogonalWeight(nn.Module):
    """Orthonormal columns made from an unconstrained `weight` by a QR decomposition.

    The columns are those of Q in `weight = Q R` with a positive diagonal of R, which makes them unique: a
    weight whose columns are orthonormal already is its own Q. So any weight can be assigned, trained or
    loaded, and what comes out is orthonormal. In float64 for a float64 request, else in float32.

    Args:
        rows: Size of the space.
        columns: How many directions, from 1 to `rows`.

    Raises:
        InterventionArgumentError: `columns` is not between 1 and `rows`.

    Example:
        >>> columns = OrthogonalWeight(8, 3)()
        >>> torch.allclose(columns.mT @ columns, torch.eye(3), atol=1e-6)
        True
    """

    weight: nn.Parameter
    """`[rows, columns]`, free; equal to what `forward` returns where its columns are orthonormal."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        check_count("embed_dim", rows)
        check_count("low_rank_dimension", columns, rows, f" (embed_dim={rows})")
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(rows, columns)))
        self._last: tuple[Tensor, Tensor] | None = None
        self._held: dict[torch.dtype, tuple[Tensor, Tensor]] | None = None

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the orthonormal columns, in `dtype` (float32 or float64).

        Shape:
            result: `(rows, columns)`.
        """
        if torch.is_grad_enabled() and self.weight.requires_grad:
            if self._held is None:
                return _orthonormal(self.weight.to(dtype))
            if dtype not in self._held:
                columns = _orthonormal(self.weight.to(dtype))
                self._held[dtype] = columns, columns.detach().requires_grad_()
            return self._held[dtype][1]
        # Without gradients the same columns serve until the weight changes. Comparing costs a hundredth of
        # the decomposition and, unlike version counters, also notices changes made through `.data`.
        last = self._last
        if last is None or last[1].dtype != dtype or not _same(last[0], self.weight):
            with torch.inference_mode(False), torch.no_grad():
                weight = self.weight.detach().clone()
                last = self._last = (weight, _orthonormal(weight.to(dtype)))
        return last[1]

    @torch.no_grad()
    def retract(self) -> None:
        """Put the orthonormal columns in the weight's place, which changes no result beyond rounding."""
        self.weight.copy_(_orthonormal(self.weight.to(working_dtype(self.weight))))


@contextmanager
def held_bases(module: nn.Module) -> Iterator[None]:
    """Run the block with each orthonormal basis of a module made once, however often it is used and differentiated.

    A basis gathers the gradients of every `backward` in the block, and hands their sum on to its weight when the
    block ends: one decomposition and one derivative of it for each step, whether the basis is shared by several
    places or a step is made of several batches. The weight is not to be changed inside the block.

    Example:
        >>> columns = OrthogonalWeight(4, 2)
        >>> with held_bases(columns):
        ...     for _ in range(2):
        ...         columns()[0, 0].backward()
        ...     columns.weight.grad is None
        True
        >>> columns.weight.grad.shape
        torch.Size([4, 2])
    """
    held = [part for part in module.modules() if isinstance(part, OrthogonalWeight) and part._held is None]
    for part in held:
        part._held = {}
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        yield
        kept = [pair for part in held for pair in (part._held or {}).values()]
    finally:
        for part in held:
            part._held = None
    used = [(columns, leaf.grad) for columns, leaf in kept if leaf.grad is not None]
    if used:
        torch.autograd.backward([columns for columns, _ in used], [gradient for _, gradient in used])


@without_autocast
def _orthonormal(weight: Tensor) -> Tensor:
    columns: Tensor
    upper: Tensor
    columns, upper = torch.linalg.qr(weight)
    return columns * torch.where(upper.diagonal() < 0, -1.0, 1.0).to(columns.dtype)


def _same(copy: Tensor, weight: Tensor) -> bool:
    alike = copy.device == weight.device and copy.dtype == weight.dtype and copy.shape == weight.shape
    return bool(alike and not copy.is_meta and torch.equal(copy, weight))


@without_autocast
def swap_in_basis(base: Tensor, difference: Tensor, basis: Tensor, weights: Tensor | None) -> Tensor:
    """Return `base + (difference @ basis * weights) @ basis.T` in the dtype of `base`.

    Written with the difference of source and base, so that equal ones leave the base exactly as it is.

    Shape:
        base, difference: `(..., width)`; basis: `(width, rank)`; weights: broadcasts to `(..., rank)`; result
            as base.
    """
    coordinates = difference @ basis
    if weights is not None:
        coordinates = coordinates * weights
    return (base.to(basis.dtype) + coordinates @ basis.mT).to(base.dtype)


def difference_of(base: Tensor, source: Tensor) -> Tensor:
    """Return `source - base` in the working precision."""
    dtype = working_dtype(base)
    return source.to(dtype) - base.to(dtype)


class RotatedSpaceIntervention(Intervention):
    """Swap coordinates in a learned rotated basis of the whole space.

    With an orthogonal matrix `R`, the result is `b + ((s - b) R)_S R^T`: the source along the chosen columns,
    the base along the others. Without subspaces that is the source itself.

    Geiger et al. (2023), "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
    Representations", https://arxiv.org/abs/2303.02536.

    Args:
        embed_dim: Size of the last axis; with concatenated units, of all units together.
        subspace_partition, source_representation, sees: See `Intervention`.

    Shape:
        base, source, result: `(..., embed_dim)`.

    Raises:
        InterventionShapeError: When called on another width.

    Example:
        >>> swap = RotatedSpaceIntervention(2)
        >>> swap.rotation.weight.data = torch.tensor([[0.8660, -0.5], [0.5, 0.8660]])
        >>> swap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), subspaces=0).detach()
        tensor([ 0.6830, -0.1830])
    """

    sees: Sees = "concatenated"

    def __init__(
        self,
        embed_dim: int,
        *,
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

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the source along the chosen directions, the base along the others."""
        base, source = self.operands(base, source)
        basis = self.rotation(working_dtype(base))
        mask = self.chosen(subspaces, base, basis.shape[1])
        return swap_in_basis(base, difference_of(base, source), basis, mask)


class LowRankRotatedSpaceIntervention(Intervention):
    """Swap coordinates along a few learned orthonormal directions.

    With `R` of `low_rank_dimension` orthonormal columns, the result is `b + ((s - b) R)_S R^T`: the source
    inside their span, the base in its complement.

    Wu et al. (2024), "pyvene: A Library for Understanding and Improving PyTorch Models via Interventions",
    https://arxiv.org/abs/2403.07809.

    Args:
        embed_dim: Size of the last axis; with concatenated units, of all units together.
        low_rank_dimension: How many directions, from 1 to `embed_dim`.
        subspace_partition, source_representation, sees: See `Intervention`; parts are of the directions.

    Shape:
        base, source, result: `(..., embed_dim)`.

    Raises:
        InterventionArgumentError: `low_rank_dimension` is out of range.
        InterventionShapeError: When called on another width.

    Example:
        >>> swap = LowRankRotatedSpaceIntervention(2, 1)
        >>> swap.rotation.weight.data = torch.tensor([[0.6], [0.8]])
        >>> swap(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).detach()
        tensor([1.1200, 0.1600])
    """

    sees: Sees = "concatenated"

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int,
        *,
        subspace_partition: Parts = None,
        source_representation: Tensor | Mapping[str, Json] | None = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, source_representation=source_representation, sees=sees)
        self.rotation = OrthogonalWeight(embed_dim, low_rank_dimension)
        self.low_rank_dimension = low_rank_dimension
        self.subspace_partition = subspace_partition

    @property
    def subspace_size(self) -> int | None:
        """The number of directions."""
        return getattr(self, "low_rank_dimension", None)

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the source along the chosen directions, the base along all others."""
        base, source = self.operands(base, source)
        mask = self.chosen(subspaces, base, self.low_rank_dimension)
        return swap_in_basis(base, difference_of(base, source), self.rotation(working_dtype(base)), mask)


class SharedSwapInBasis(Tempered, Intervention):
    """Swap each coordinate of a learned basis by a share of its own. A subclass writes `mask_weights`."""

    sees: Sees = "concatenated"
    rotation: OrthogonalWeight

    def mask_weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the share by which each rotated coordinate is swapped, `(embed_dim,)`, between 0 and 1."""
        raise NotImplementedError(f"{type(self).__name__} has no mask_weights(dtype) yet; write it.")

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the base with each chosen rotated coordinate moved by its share towards the source's."""
        base, source = self.operands(base, source)
        basis = self.rotation(working_dtype(base))
        weights = self.mask_weights(basis.dtype)
        mask = self.chosen(subspaces, base, basis.shape[1])
        return swap_in_basis(
            base, difference_of(base, source), basis, weights if mask is None else weights * mask
        )


class BoundlessRotatedSpaceIntervention(SharedSwapInBasis):
    """Swap in a learned basis, and learn how many of its coordinates to swap.

    The result is `b + ((s - b) R * m) R^T`, where `m_i = sigmoid((i + 1/2) / T) * sigmoid((k - i - 1/2) / T)`
    is the share by which coordinate i of the rotated space is swapped, and `k = beta * embed_dim` the learned
    boundary. The half makes coordinates count in full or not at all as the temperature falls; pyvene's
    shares, without it, stay at one half for the first coordinate and at the boundary.

    Wu et al. (2023), "Interpretability at Scale: Identifying Causal Mechanisms in Alpaca",
    https://arxiv.org/abs/2305.08809.

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
        >>> swap = BoundlessRotatedSpaceIntervention(4, temperature=0.1)
        >>> swap.mask_weights().detach()
        tensor([9.9331e-01, 9.9331e-01, 6.6929e-03, 3.0590e-07])
    """

    intervention_boundaries: nn.Parameter
    """`[1]`, beta: the share of the coordinates below the boundary, used clamped to 0.001 to 1."""

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
        self.intervention_boundaries = nn.Parameter(torch.tensor([0.5]))
        self._start_temperature(temperature, trainable_temperature)

    def mask_weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the share by which each rotated coordinate is swapped.

        Shape:
            result: `(embed_dim,)`, between 0 and 1.
        """
        width = self.rotation.weight.shape[0]
        beta, temperature = self.intervention_boundaries.to(dtype), self.temperature.to(dtype)
        positions = torch.arange(width, dtype=dtype, device=beta.device) + 0.5
        boundary = beta.clamp(1e-3, 1.0) * width
        return torch.sigmoid(positions / temperature) * torch.sigmoid((boundary - positions) / temperature)
