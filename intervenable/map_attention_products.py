"""Products with a parameter that a function computes and no linear module: they count as linear maps.

`F.linear` and `einsum` on parameters of the module that calls them, as torch's own attention and a few others have
them. Nothing hooks a function, so gradients stop at their results under a mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from intervenable.linear_maps import is_matrix_of
from intervenable.map_trace import LINEAR, Call, Met
from model_maps import FunctionName


@dataclass(eq=False)
class Product(Call):
    """One product with a parameter, as if a linear module had been called inside the one that was running."""

    function: FunctionName = "linear"
    """The function that computed it."""

    weight: str = ""
    """The parameter, by its name in the module that was running."""

    nth: int = 0
    """How many products with it that module had computed before in this call."""


class Matrix(nn.Module):
    """Stands for a parameter that is multiplied with; it is never called.

    Args:
        in_features, out_features: Columns of what is multiplied, and of the product.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features


class StoppingProducts(TorchFunctionMode):
    """Lets gradients stop at what functions multiply with parameters.

    Args:
        stops: Where to note the leaves, by the `id` of the tensors that go on in their place.
    """

    def __init__(self, stops: dict[int, Tensor]) -> None:
        super().__init__()
        self._stops = stops
        self._given: list[Tensor] = []  # ids count while tensors live

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in LINEAR and func is not torch.einsum:
            return result
        if func is torch.einsum and not _is_map(args):
            return result
        if _matrix_in(_flat((args, tuple((kwargs or {}).values())))) is None:
            return result
        leaf = by_columns(result.detach()).requires_grad_()
        copy = leaf.clone().reshape(result.shape)
        self._stops[id(copy)] = leaf
        self._given.append(copy)
        return copy


def products(calls: list[Call], stops: Mapping[int, Tensor]) -> Iterator[tuple[Product, Tensor]]:
    """The products with parameters in a traced pass, each with its leaf; they are put among the calls.

    What a linear module computes inside itself is its own affair.

    Args:
        calls: The calls of the pass.
        stops: What `StoppingProducts` noted in it.
    """
    for call in list(calls):
        names = {id(parameter): name for name, parameter in call.module.named_parameters()}
        times: dict[str, int] = {}
        for met in call.met if names else ():
            leaf = stops.get(id(met.returned))
            weight = names.get(id(_matrix_in(met.given)))
            if leaf is None or weight is None:
                continue
            nth = times.get(weight, 0)
            times[weight] = nth + 1
            made = _product(call, met, leaf, weight, nth)
            call.children.append(made)
            call.children.sort(key=lambda child: child.entered)
            yield made, leaf


def _product(call: Call, met: Met, leaf: Tensor, weight: str, nth: int) -> Product:
    with torch.enable_grad():
        matrix = _matrix_in(met.given)
        given = by_columns(next(one for one in met.given if matrix is None or not is_matrix_of(one, matrix)))
    return Product(
        f"{call.path}.{weight}",
        Matrix(given.shape[-1], leaf.shape[-1]),
        0,
        met.at,
        call,
        {0: given},
        {None: leaf},
        met.at,
        function="einsum" if met.name == "einsum" else "linear",
        weight=weight,
        nth=nth,
    )


def _matrix_in(tensors: Sequence[Tensor]) -> Tensor | None:
    """The parameter among tensors that is a matrix, or of which one has some rows."""
    for tensor in tensors:
        for parameter in (tensor, tensor._base):
            if isinstance(parameter, nn.Parameter) and is_matrix_of(tensor, parameter):
                return parameter
    return None


def by_columns(tensor: Tensor) -> Tensor:
    """A tensor with what follows after examples and positions as one axis.

    Example:
        >>> by_columns(torch.zeros(7, 2, 4, 8)).shape, by_columns(torch.zeros(14, 32)).shape
        (torch.Size([7, 2, 32]), torch.Size([14, 32]))
    """
    return tensor.flatten(2) if tensor.dim() > 3 else tensor


def _is_map(args: tuple[Any, ...]) -> bool:
    """Whether an `einsum` multiplies all columns at two axes with a matrix, so that it is a linear map there.

    Example:
        >>> x, w = torch.zeros(7, 2, 32), nn.Parameter(torch.zeros(32, 4, 8))
        >>> _is_map(("ibh,hnd->ibnd", x, w)), _is_map(("ibh,ibh->ib", x, x))
        (True, False)
    """
    tensors = _flat(args[1:])
    if not isinstance(args[0], str) or len(tensors) != 2 or "." in args[0] or "->" not in args[0]:
        return False
    left, _, made = args[0].replace(" ", "").partition("->")
    sides = left.split(",")
    at = next((at for at, tensor in enumerate(tensors) if isinstance(tensor, nn.Parameter)), None)
    if at is None or len(sides) != 2:
        return False
    given, weight = sides[1 - at], sides[at]
    columns, others = given[2:], made[2:]
    return (
        given[:2] == made[:2]
        and not set(given[:2]) & set(weight)
        and sorted(columns + others) == sorted(weight)
        and columns != ""
        and others != ""
    )


def _flat(values: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists, in order."""
    if isinstance(values, Tensor):
        return [values]
    return [one for value in values for one in _flat(value)] if isinstance(values, (tuple, list)) else []
