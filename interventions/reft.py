"""Representation finetuning: learned edits of an activation that need no source.

Wu et al. (2024), "ReFT: Representation Finetuning for Language Models", https://arxiv.org/abs/2404.03592.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from interventions.base import Intervention, Json, Parts, Sees, check_count
from interventions.errors import InterventionArgumentError, UnknownInterventionError
from interventions.precision import without_autocast, working_dtype
from interventions.registry import callable_named, name_of_callable
from interventions.rotation import OrthogonalWeight
from interventions.subspaces import Subspaces

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": nn.functional.gelu,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}
"""What `act_fn` can be called by name."""


class ReftIntervention(Intervention):
    """A learned edit of an activation along a few directions: `h + D c(h)`.

    Not for direct use: a subclass writes `change`, the coordinates `c` along the directions `D`, and says of
    what kind its directions and its learned coordinates are.

    Args:
        embed_dim: Size of the last axis.
        low_rank_dimension: How many directions, from 1 to `embed_dim`.
        dropout: Share of the *result's* entries that training drops, as in pyreft.
        act_fn: Applied to the learned coordinates: a name from `ACTIVATIONS` or of `register_callable`, or a
            function; None for none.
        subspace_partition, sees: See `Intervention`; parts are of the directions.

    Shape:
        base, result: `(..., embed_dim)`.

    Raises:
        InterventionArgumentError: `low_rank_dimension` or `dropout` out of range, or an unknown `act_fn`.
        InterventionShapeError: When called on another width.
    """

    needs_source: ClassVar[bool] = False
    orthonormal: ClassVar[bool]
    """Whether the directions are kept orthonormal (`rotation`) or are free (`projection`)."""
    constant: ClassVar[bool]
    """Whether the learned coordinates are one vector or a linear function of the activation."""
    learned_source: nn.Linear | nn.Parameter
    """`W` and `b` of the formula, or `b` alone."""

    def __init__(
        self,
        embed_dim: int,
        low_rank_dimension: int,
        *,
        dropout: float = 0.0,
        act_fn: str | Callable[[Tensor], Tensor] | None = None,
        subspace_partition: Parts = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, sees=sees)
        check_count("low_rank_dimension", low_rank_dimension, embed_dim, f" (embed_dim={embed_dim})")
        if not 0 <= dropout < 1:
            raise InterventionArgumentError(
                f"dropout={dropout!r} is out of range; give a share from 0 to below 1."
            )
        if isinstance(act_fn, str) and act_fn not in ACTIVATIONS:
            act_fn = _registered(act_fn)
        self.low_rank_dimension = low_rank_dimension
        self.subspace_partition = subspace_partition
        self.dropout = float(dropout)
        self.act_fn = act_fn
        if self.orthonormal:
            self.rotation = OrthogonalWeight(embed_dim, low_rank_dimension)
        else:
            self.projection = nn.Linear(embed_dim, low_rank_dimension, bias=False)
        if self.constant:
            self.learned_source = nn.Parameter(torch.rand(low_rank_dimension))
        else:
            self.learned_source = nn.Linear(embed_dim, low_rank_dimension)

    @property
    def subspace_size(self) -> int | None:
        """The number of directions."""
        return getattr(self, "low_rank_dimension", None)

    def directions(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the directions along which the activation is edited: `(embed_dim, low_rank_dimension)`."""
        return self.rotation(dtype) if self.orthonormal else self.projection.weight.to(dtype).mT

    def learned(self, hidden: Tensor) -> Tensor:
        """Return the learned coordinates, `act_fn` applied: they broadcast to `(..., low_rank_dimension)`."""
        if isinstance(self.learned_source, nn.Linear):
            weight, bias = (
                self.learned_source.weight.to(hidden.dtype),
                self.learned_source.bias.to(hidden.dtype),
            )
            coordinates = hidden @ weight.mT + bias
        else:
            coordinates = self.learned_source.to(hidden.dtype)
        function = ACTIVATIONS[self.act_fn] if isinstance(self.act_fn, str) else self.act_fn
        return coordinates if function is None else function(coordinates)

    def change(self, hidden: Tensor, directions: Tensor) -> Tensor:
        """Return the coordinates of the edit: they broadcast to `(..., low_rank_dimension)`."""
        raise NotImplementedError(f"{type(self).__name__} has no change(hidden, directions) yet; write it.")

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the edited activation."""
        self.check_width(base)
        return self._edit(base, self.chosen(subspaces, base, self.low_rank_dimension))

    @without_autocast
    def _edit(self, base: Tensor, mask: Tensor | None) -> Tensor:
        hidden = base.to(working_dtype(base))
        directions = self.directions(hidden.dtype)
        change = self.change(hidden, directions)
        if mask is not None:
            change = change * mask
        result = (hidden + change @ directions.mT).to(base.dtype)
        return nn.functional.dropout(result, self.dropout, self.training)

    def argument_to_json(self, name: str, value: object) -> Json:
        """Return a constructor argument as JSON: `act_fn` by its name.

        Raises:
            UnknownInterventionError: `act_fn` is a function that is not registered.
        """
        if name != "act_fn" or not callable(value):
            return super().argument_to_json(name, value)
        names = [known for known, function in ACTIVATIONS.items() if function is value]
        return names[0] if names else name_of_callable(value)


def _registered(act_fn: str) -> Callable[[Tensor], Tensor]:
    try:
        return callable_named(act_fn)
    except UnknownInterventionError as error:
        raise InterventionArgumentError(
            f"act_fn={act_fn!r} is unknown; allowed: {', '.join(sorted(ACTIVATIONS))}, or a function."
        ) from error


class LoreftIntervention(ReftIntervention):
    """LoReFT: replace the coordinates along orthonormal directions by a linear function of the activation.

    `h + R^T (W h + b - R h)`, with orthonormal rows `R`. Arguments, shapes and errors are those of
    `ReftIntervention`.

    Wu et al. (2024), "ReFT: Representation Finetuning for Language Models", https://arxiv.org/abs/2404.03592.

    Example:
        >>> edit = LoreftIntervention(4, 2)
        >>> hidden = torch.randn(3, 4)
        >>> wanted, present = edit.learned(hidden), edit(hidden) @ edit.directions()
        >>> torch.allclose(wanted, present, atol=1e-5)  # along the directions, the result is what was learned
        True
    """

    orthonormal: ClassVar[bool] = True
    constant: ClassVar[bool] = False

    def change(self, hidden: Tensor, directions: Tensor) -> Tensor:
        """Return what was learned, less what is there."""
        return self.learned(hidden) - hidden @ directions


class NoreftIntervention(ReftIntervention):
    """NoReFT: LoReFT without the constraint that the directions are orthonormal.

    `h + W2^T (W1 h + b - W2 h)`, with free rows `W2`. Arguments, shapes and errors are those of
    `ReftIntervention`.

    Wu et al. (2024), "ReFT: Representation Finetuning for Language Models", https://arxiv.org/abs/2404.03592.

    Example:
        >>> NoreftIntervention(4, 2)(torch.randn(3, 5, 4)).shape
        torch.Size([3, 5, 4])
    """

    orthonormal: ClassVar[bool] = False
    constant: ClassVar[bool] = False

    def change(self, hidden: Tensor, directions: Tensor) -> Tensor:
        """Return what was learned, less what is there."""
        return self.learned(hidden) - hidden @ directions


class ConsreftIntervention(ReftIntervention):
    """ConsReFT: replace the coordinates along orthonormal directions by a learned constant.

    `h + R^T (b - R h)`, with orthonormal rows `R`. Arguments, shapes and errors are those of
    `ReftIntervention`.

    Wu et al. (2024), "ReFT: Representation Finetuning for Language Models", https://arxiv.org/abs/2404.03592.

    Example:
        >>> edit = ConsreftIntervention(4, 2)
        >>> coordinates = edit(torch.randn(3, 4)) @ edit.directions()
        >>> torch.allclose(coordinates, edit.learned_source.expand(3, 2), atol=1e-5)
        True
    """

    orthonormal: ClassVar[bool] = True
    constant: ClassVar[bool] = True

    def change(self, hidden: Tensor, directions: Tensor) -> Tensor:
        """Return what was learned, less what is there."""
        return self.learned(hidden) - hidden @ directions


class LobireftIntervention(ReftIntervention):
    """LobiReFT: add a learned constant along orthonormal directions, a steering vector of low rank.

    `h + R^T b`, with orthonormal rows `R`. Arguments, shapes and errors are those of `ReftIntervention`.

    Wu et al. (2024), "ReFT: Representation Finetuning for Language Models", https://arxiv.org/abs/2404.03592.

    Example:
        >>> edit = LobireftIntervention(4, 2)
        >>> torch.allclose(edit(torch.zeros(4)), edit.directions() @ edit.learned_source, atol=1e-6)
        True
    """

    orthonormal: ClassVar[bool] = True
    constant: ClassVar[bool] = True

    def change(self, hidden: Tensor, directions: Tensor) -> Tensor:
        """Return what was learned."""
        return self.learned(hidden)


class DireftIntervention(ReftIntervention):
    """DiReFT: add a linear function of the activation along orthonormal directions.

    `h + R^T (W h + b)`, with orthonormal rows `R`. Arguments, shapes and errors are those of
    `ReftIntervention`.

    Wu et al. (2024), "ReFT: Representation Finetuning for Language Models", https://arxiv.org/abs/2404.03592.

    Example:
        >>> edit = DireftIntervention(4, 2, act_fn="relu")
        >>> at_zero = edit.directions() @ edit.learned_source.bias.relu()
        >>> torch.allclose(edit(torch.zeros(4)), at_zero, atol=1e-6)
        True
    """

    orthonormal: ClassVar[bool] = True
    constant: ClassVar[bool] = False

    def change(self, hidden: Tensor, directions: Tensor) -> Tensor:
        """Return what was learned."""
        return self.learned(hidden)


class NodireftIntervention(ReftIntervention):
    """NodiReFT: add a linear function of the activation along free directions, like LoRA on the activation.

    `h + W2^T (W1 h + b)`, with free rows `W2`. Arguments, shapes and errors are those of `ReftIntervention`.

    Wu et al. (2024), "ReFT: Representation Finetuning for Language Models", https://arxiv.org/abs/2404.03592.

    Example:
        >>> sorted(name for name, _ in NodireftIntervention(4, 2).named_parameters())
        ['learned_source.bias', 'learned_source.weight', 'projection.weight']
    """

    orthonormal: ClassVar[bool] = False
    constant: ClassVar[bool] = False

    def change(self, hidden: Tensor, directions: Tensor) -> Tensor:
        """Return what was learned."""
        return self.learned(hidden)
