"""Interventions whose formula has nothing to learn and acts on each coordinate by itself."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from interventions.base import Intervention, Parts, Sees
from interventions.errors import InterventionArgumentError, InterventionShapeError
from interventions.subspaces import Subspaces, select


class CoordinatewiseIntervention(Intervention):
    """An intervention that makes each new coordinate from the same coordinate alone.

    With `embed_dim` below the activation's width it concerns the first `embed_dim` coordinates only. Not for
    direct use: a subclass writes `forward` with `edited`.
    """

    def check_width(self, base: Tensor) -> None:
        """Raise InterventionShapeError if `base` is narrower than `embed_dim`."""
        if base.dim() == 0 or (self.embed_dim is not None and base.shape[-1] < self.embed_dim):
            raise InterventionShapeError(
                f"{type(self).__name__} was made for embed_dim={self.embed_dim}, but the activation's shape"
                f" is {tuple(base.shape)}: its last axis is too small."
            )

    def edited(self, base: Tensor, new: Tensor, subspaces: Subspaces) -> Tensor:
        """Return a tensor that is `new` on the chosen coordinates and `base` on the others."""
        width = base.shape[-1]
        size = width if self.embed_dim is None else self.embed_dim
        mask = self.chosen(subspaces, base, size)
        if size < width:
            inside = torch.ones(size, dtype=torch.bool, device=base.device) if mask is None else mask
            mask = torch.nn.functional.pad(inside, (0, width - size))
        if mask is None and not (base.requires_grad and torch.is_grad_enabled()):
            return new.expand_as(base).clone()
        if mask is None:  # still a choice between both, so that the result stays in the base's graph
            mask = torch.ones((), dtype=torch.bool, device=base.device)
        return torch.where(mask, new, base)


class VanillaIntervention(CoordinatewiseIntervention):
    """Put the source in the base's place: `b <- s` on the chosen coordinates.

    Shape:
        base, source, result: `(..., width)`; the source broadcasts.

    Example:
        >>> base, source = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([10.0, 20.0, 30.0, 40.0])
        >>> VanillaIntervention()(base, source, subspaces=[1, 3])
        tensor([ 1., 20.,  3., 40.])
        >>> VanillaIntervention(subspace_partition=[[0, 1], [1, 4]])(base, source, subspaces=1)
        tensor([ 1., 20., 30., 40.])
    """

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the source on the chosen coordinates, the base on the others."""
        base, source = self.operands(base, source)
        return self.edited(base, source, subspaces)


class SkipIntervention(VanillaIntervention):
    """Skip the module: the source is what went *into* it in the source run, and becomes its output.

    The formula is Vanilla's, `b <- s`; only where the source is read differs (`source_side`). With the base
    as its own source the module becomes the identity.

    Example:
        >>> module_input, module_output = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
        >>> SkipIntervention()(module_output, module_input)
        tensor([1., 2.])
    """

    source_side: ClassVar[Literal["site", "module_input"]] = "module_input"


class ZeroIntervention(CoordinatewiseIntervention):
    """Clear the activation: `b <- 0` on the chosen coordinates.

    Example:
        >>> ZeroIntervention()(torch.ones(2, 2), subspaces=[[0], [1]])  # ids belong to examples
        tensor([[0., 1.],
                [1., 0.]])
    """

    needs_source: ClassVar[bool] = False

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return zeros on the chosen coordinates, the base on the others."""
        self.check_width(base)
        return self.edited(base, torch.zeros((), dtype=base.dtype, device=base.device), subspaces)


class KnockoutIntervention(CoordinatewiseIntervention):
    """Forbid attention: `b <- -inf`, a score that the softmax gives no weight, on the chosen coordinates.

    For attention scores and the logits of experts. What was forbidden is shared out among what is left of its row; a
    row of which nothing is left reads nothing. Geva et al. (2023), "Dissecting Recall of Factual Associations in
    Auto-Regressive Language Models", https://arxiv.org/abs/2304.14767, call this attention knockout.

    Args:
        coordinates: The coordinates that calls without subspaces concern, such as the numbers of experts; None for
            all.
        embed_dim, subspace_partition, sees: See `Intervention`.

    Raises:
        InterventionArgumentError: `coordinates` that are no numbers from 0 on, or none.

    Example:
        >>> KnockoutIntervention()(torch.tensor([2.0, 1.0, 0.0]), subspaces=[1]).softmax(-1)
        tensor([0.8808, 0.0000, 0.1192])
        >>> KnockoutIntervention([0, 2])(torch.tensor([2.0, 1.0, 0.0]))
        tensor([-inf, 1., -inf])
    """

    needs_source: ClassVar[bool] = False

    def __init__(
        self,
        coordinates: Iterable[int] | None = None,
        *,
        embed_dim: int | None = None,
        subspace_partition: Parts = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, subspace_partition=subspace_partition, sees=sees)
        chosen = None if coordinates is None else tuple(coordinates)
        if chosen is not None and (not chosen or not all(type(one) is int and one >= 0 for one in chosen)):
            raise InterventionArgumentError(
                f"coordinates={list(chosen)!r}: give at least one number from 0 on, or None for all."
            )
        self.coordinates = chosen

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return -inf on the chosen coordinates, the base on the others."""
        self.check_width(base)
        if subspaces is None and self.coordinates is not None:
            return base.index_fill(-1, self._inside(base), -torch.inf)
        return self.edited(base, torch.full_like(base, -torch.inf), subspaces)

    def _inside(self, base: Tensor) -> Tensor:
        """The coordinates as an index."""
        assert self.coordinates is not None
        if max(self.coordinates) >= base.shape[-1]:
            raise InterventionShapeError(
                f"KnockoutIntervention is to forbid coordinate {max(self.coordinates)}, and the activation has"
                f" 0 to {base.shape[-1] - 1}."
            )
        return torch.tensor(self.coordinates, device=base.device)


class AdditionIntervention(CoordinatewiseIntervention):
    """Add the source, for instance a steering vector: `b <- b + s` on the chosen coordinates.

    Example:
        >>> steer = AdditionIntervention(source_representation=torch.tensor([1.0, -1.0]))
        >>> steer(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        tensor([[2., 1.],
                [4., 3.]])
    """

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the sum on the chosen coordinates, the base on the others."""
        base, source = self.operands(base, source)
        return self.edited(base, base + source, subspaces)


class SubtractionIntervention(CoordinatewiseIntervention):
    """Take the source away: `b <- b - s` on the chosen coordinates.

    Example:
        >>> SubtractionIntervention()(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]))
        tensor([ -9., -18.])
    """

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the difference on the chosen coordinates, the base on the others."""
        base, source = self.operands(base, source)
        return self.edited(base, base - source, subspaces)


class ScaleIntervention(CoordinatewiseIntervention):
    """Multiply by a number: `b <- factor * b` on the chosen coordinates.

    Args:
        factor: 0 clears the activation, 1 leaves it, -1 turns it round.
        embed_dim, subspace_partition, sees: See `Intervention`.

    Raises:
        InterventionArgumentError: `factor` is not a finite number.

    Example:
        >>> ScaleIntervention(0.5)(torch.tensor([1.0, 2.0]), subspaces=1)
        tensor([1., 1.])
    """

    needs_source: ClassVar[bool] = False

    def __init__(
        self,
        factor: float = 1.0,
        *,
        embed_dim: int | None = None,
        subspace_partition: Parts = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, subspace_partition=subspace_partition, sees=sees)
        if not math.isfinite(factor):
            raise InterventionArgumentError(f"factor={factor!r} is not finite; give a number such as 0.5.")
        self.factor = float(factor)

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return `factor` times the base on the chosen coordinates, the base on the others."""
        self.check_width(base)
        return self.edited(base, base * self.factor, subspaces)


class CollectIntervention(CoordinatewiseIntervention):
    """Read the activation and change nothing: the result is for the user.

    Chosen coordinates are returned alone, in the order in which they were given. Gradients flow through the
    reading.

    Shape:
        base: `(..., width)`.
        result: `(..., chosen)`, or `(..., width)` without subspaces.

    Raises:
        SubspaceError: Different numbers of coordinates for different examples, which no tensor can hold.

    Example:
        >>> CollectIntervention()(torch.tensor([1.0, 2.0, 3.0, 4.0]), subspaces=[2, 0])
        tensor([3., 1.])
    """

    needs_source: ClassVar[bool] = False
    collects: ClassVar[bool] = True

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return a copy of the base, or of the chosen coordinates."""
        self.check_width(base)
        readable = base[..., : self.embed_dim]
        batch = base.shape[0] if base.dim() > 1 else 1
        size = readable.shape[-1]
        selection = select(subspaces, size=size, partition=self.subspace_partition, batch=batch)
        return readable.clone() if selection is None else selection.gather(readable)


class NoiseIntervention(CoordinatewiseIntervention):
    """Add Gaussian noise: `b <- b + std * e` on the chosen coordinates, `e` standard normal.

    The default `std` is that of pyvene, three times the spread of GPT-2 XL's embeddings as in Meng et al.
    (2022), "Locating and Editing Factual Associations in GPT", https://arxiv.org/abs/2202.05262.

    Args:
        std: Standard deviation of the noise.
        seed: Makes the noise reproducible. Without one, `"per_call"` draws from torch's global generator, and
            `"fixed"` takes a seed from there once.
        shape: `"per_call"`: new noise in each call and for each example. `"fixed"`: one piece of noise, the
            same in every call, for every example and on every device; it is the stream of
            `numpy.random.RandomState(seed)`, unit by unit, so that fewer units get the beginning of the noise
            of more.
        embed_dim, subspace_partition, sees: See `Intervention`.

    Raises:
        InterventionArgumentError: A negative `std` or `seed`, or an unknown `shape`.

    Example:
        >>> NoiseIntervention(seed=1, shape="fixed")(torch.zeros(1, 1, 3))
        tensor([[[ 0.2187, -0.0824, -0.0711]]])
    """

    needs_source: ClassVar[bool] = False

    def __init__(
        self,
        std: float = 0.13462981581687927,
        seed: int | None = None,
        shape: Literal["per_call", "fixed"] = "per_call",
        *,
        embed_dim: int | None = None,
        subspace_partition: Parts = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, subspace_partition=subspace_partition, sees=sees)
        if not math.isfinite(std) or std < 0:
            raise InterventionArgumentError(f"std={std!r} is no standard deviation; give a number from 0 on.")
        if shape not in ("per_call", "fixed"):
            raise InterventionArgumentError(f"shape={shape!r} is unknown; allowed: 'per_call', 'fixed'.")
        if seed is not None and seed not in range(2**32):
            raise InterventionArgumentError(
                f"seed={seed!r} is no seed; give a whole number from 0 to 2**32 - 1."
            )
        if seed is None and shape == "fixed":
            seed = int(torch.randint(2**31, ()))
        self.std = float(std)
        self.seed = seed
        self.shape = shape
        self._generators: dict[torch.device, torch.Generator] = {}
        self._stream = torch.empty(0, dtype=torch.float64)

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return the base with noise on the chosen coordinates."""
        self.check_width(base)
        noise = self._fixed_noise(base) if self.shape == "fixed" else self._new_noise(base)
        return self.edited(base, (base + self.std * noise).to(base.dtype), subspaces)

    def _new_noise(self, base: Tensor) -> Tensor:
        dtype = torch.promote_types(base.dtype, torch.float32)
        generator = None if self.seed is None else self._generators.get(base.device)
        if self.seed is not None and generator is None:
            generator = torch.Generator(base.device).manual_seed(self.seed)
            self._generators[base.device] = generator
        return torch.randn(base.shape, generator=generator, dtype=dtype, device=base.device)

    def _fixed_noise(self, base: Tensor) -> Tensor:
        shape = base.shape[1:] if base.dim() > 1 else base.shape
        stream = self._stream
        if len(stream) < shape.numel():
            stream = self._stream = _legacy_normal(self.seed or 0, shape.numel())
        noise = stream[: shape.numel()].view(shape)
        return noise.to(base.device, torch.promote_types(base.dtype, torch.float32))


def _legacy_normal(seed: int, count: int) -> Tensor:
    """Return the first `count` normal numbers of `numpy.random.RandomState(seed)`, in float64.

    Mersenne Twister, seeded as its authors do, and Marsaglia's polar method. Python's own generator is the
    same one seeded in another way, so it is given the state.
    """
    word = seed
    state = [word]
    for index in range(1, 624):
        word = (1812433253 * (word ^ (word >> 30)) + index) & 0xFFFFFFFF
        state.append(word)
    uniform = random.Random()
    uniform.setstate((3, (*state, 624), None))
    normals = torch.empty(0, dtype=torch.float64)
    while len(normals) < count:
        pairs = (count - len(normals)) * 2 // 3 + 8  # 79 % of the pairs are accepted
        draws = torch.tensor([uniform.random() for _ in range(2 * pairs)], dtype=torch.float64)
        points = 2 * draws.view(-1, 2) - 1
        squared = points[:, :1] ** 2 + points[:, 1:] ** 2
        inside = ((squared < 1) & (squared > 0)).squeeze(1)
        points, squared = points[inside], squared[inside]
        normals = torch.cat([normals, (torch.sqrt(-2 * squared.log() / squared) * points.flip(1)).flatten()])
    return normals[:count]
