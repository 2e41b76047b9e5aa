"""Any callable as an intervention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from interventions.base import Intervention, Json, Parts, Sees
from interventions.errors import InterventionError, InterventionShapeError
from interventions.registry import callable_named, name_of_callable
from interventions.signatures import pattern_of_function
from interventions.subspaces import Subspaces


class CallableIntervention(Intervention):
    """Whatever a function of the activation returns: `b <- f(b)`, `f(b, s)` or `f(b, s, subspaces)`.

    How the function is called is decided once, from its signature: a second parameter gets the source if it
    is required (or is called `source`, with None as default), a third the subspaces likewise; so
    `torch.relu`, partials, bound methods, callable objects and modules all work. It gets copies and may
    change them in place, but has to return the result; returning None leaves the activation as it is. A
    source it can take may still be None.

    Args:
        function: The callable, or the name under which `register_callable` knows it. Only registered ones can
            be saved. A module's parameters become the intervention's.
        embed_dim, subspace_partition, source_representation, sees: See `Intervention`.

    Raises:
        InterventionArgumentError: The function takes no argument, or requires more than these three.
        InterventionShapeError: When called: the result is no tensor of the base's shape and dtype.
        InterventionError: When called: the function changed the base in place and returned None.

    Example:
        >>> CallableIntervention(torch.relu)(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
        >>> CallableIntervention(lambda base, source: (base + source) / 2)(torch.zeros(2), torch.ones(2))
        tensor([0.5000, 0.5000])
    """

    needs_source: ClassVar[bool] = False

    def __init__(
        self,
        function: Callable[..., Tensor | None] | str,
        *,
        embed_dim: int | None = None,
        subspace_partition: Parts = None,
        source_representation: Tensor | Mapping[str, Json] | None = None,
        sees: Sees | None = None,
    ) -> None:
        super().__init__(embed_dim=embed_dim, subspace_partition=subspace_partition, sees=sees)
        self.function = callable_named(function) if isinstance(function, str) else function
        self._pattern = pattern_of_function(self.function)
        if source_representation is not None:
            self.set_source_representation(source_representation)

    @property
    def accepts_source(self) -> bool:
        """Whether the function has a parameter for a source."""
        return self._pattern.takes("source")

    def check_subspaces(self, subspaces: Subspaces, batch: int | None = None) -> None:
        """Raise SubspaceError if the function takes no subspaces, or as every intervention does."""
        if subspaces is not None and not self._pattern.takes("subspaces"):
            raise self._no_subspaces(subspaces)
        super().check_subspaces(subspaces, batch)

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Subspaces = None) -> Tensor:
        """Return what the function makes of copies of base and source."""
        if subspaces is not None and not self._pattern.takes("subspaces"):
            raise self._no_subspaces(subspaces)
        self.check_width(base)
        source = self.source_representation if source is None else source
        if source is not None and self.accepts_source:
            source = self.operands(base, source)[1].clone()
        copy = base.clone()
        version = None if copy.is_inference() else copy._version
        arguments, keywords = self._pattern.arguments(source, subspaces)
        result = self.function(copy, *arguments, **keywords)
        if result is None:
            if version is not None and copy._version != version:
                raise InterventionError(
                    f"{self.function!r} changed its argument in place and returned None, so the change would"
                    f" be lost. Return the new activation."
                )
            return base
        if not isinstance(result, Tensor) or result.shape != base.shape or result.dtype != base.dtype:
            got = (
                f"{tuple(result.shape)} {result.dtype}"
                if isinstance(result, torch.Tensor)
                else f"a {type(result).__name__}"
            )
            raise InterventionShapeError(
                f"{self.function!r} returned {got} for an activation of {tuple(base.shape)} {base.dtype}."
                f" Return a tensor of the same shape and dtype, or None to leave it as it is."
            )
        return result

    def argument_to_json(self, name: str, value: object) -> Json:
        """Return a constructor argument as JSON: the function by its registered name.

        Raises:
            UnknownInterventionError: The function is not registered.
        """
        return (
            name_of_callable(self.function) if name == "function" else super().argument_to_json(name, value)
        )

    def extra_repr(self) -> str:
        """Show which function it is."""
        return "" if isinstance(self.function, nn.Module) else repr(self.function)
