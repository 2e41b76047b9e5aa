"""The matrix of a linear map, whatever class computes it: plain, quantised, with an adapter, kept elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import UnsupportedModelError

TOLERANCE = 2.0**-9
"""How far a map may be from its matrix, of the largest output, in float32; sixteen times as far in half precision."""


def matrix_of(module: nn.Module, device: torch.device, needed_by: str) -> tuple[Tensor, Tensor | None]:
    """The matrix and the bias of a linear map.

    Those of torch's linear layers and of GPT-2's are their weights. Of any other class nothing is assumed: its matrix
    is what it makes of unit vectors, with adapters as they are now, and it is checked that this is all it does.

    Args:
        module: The map.
        device: Where to put them.
        needed_by: What they are for and where the module is, to begin messages with.

    Shape:
        result: `(in, out)` and `(out,)`; None for no bias.

    Raises:
        UnsupportedModelError: it is no linear map, or has no values.

    Example:
        >>> linear = nn.Linear(2, 3)
        >>> matrix, bias = matrix_of(linear, torch.device("cpu"), "the example")
        >>> torch.equal(matrix, linear.weight.T), torch.equal(bias, linear.bias)
        (True, True)
    """
    weight = parameter_of(module, "weight", device)
    if weight is not None and is_its_weight(module, weight):
        return weight if is_conv1d(module) else weight.T, parameter_of(module, "bias", device)
    width = getattr(module, "in_features", None)
    if not isinstance(width, int) or (weight is not None and weight.is_meta):
        raise UnsupportedModelError(
            f"{needed_by} as a matrix, and {type(module).__name__} has none that can be read."
        )
    return _measured(module, width, device, needed_by)


def is_matrix_of(tensor: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor is a parameter that can be multiplied with, or some rows of one that are.

    Example:
        >>> fused = nn.Parameter(torch.zeros(6, 2))
        >>> is_matrix_of(fused, fused), is_matrix_of(fused.chunk(3)[1], fused), is_matrix_of(fused[:, :1], fused)
        (True, True, False)
    """
    if tensor is parameter:
        return tensor.dim() > 1
    return tensor._base is parameter and tensor.dim() == 2 and tensor.shape[1:] == parameter.shape[1:]


def is_conv1d(module: nn.Module) -> bool:
    """Whether a projection keeps its weight as `[in, out]`, as GPT-2's do."""
    return type(module).__name__ == "Conv1D"


def parameter_of(module: nn.Module, name: str, device: torch.device) -> Tensor | None:
    """A module's parameter; from where accelerate keeps it, if it is offloaded. None if there is none."""
    value: Any = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return None
    hook = vars(module).get("_hf_hook")
    for one in (hook, *getattr(hook, "hooks", ())) if value.is_meta else ():
        kept = getattr(one, "weights_map", None)
        if kept is not None and name in kept:
            value = kept[name]
    found: Tensor = value if value.is_meta else value.to(device)
    return found


def is_its_weight(module: nn.Module, weight: Tensor) -> bool:
    """Whether all that a module does is to multiply with its weight, and the weight is a plain matrix."""
    forward = type(module).forward
    replaced = "forward" in vars(module) and "_hf_hook" not in vars(module)
    return (
        (is_conv1d(module) or forward is nn.Linear.forward)
        and not replaced
        and type(weight) in (Tensor, nn.Parameter)
        and weight.dim() == 2
        and weight.is_floating_point()
        and not weight.is_meta
    )


def _measured(
    module: nn.Module, width: int, device: torch.device, needed_by: str
) -> tuple[Tensor, Tensor | None]:
    """What a module makes of zero is its bias, and what of unit vectors the rows of its matrix."""
    weights = [value for value in (*module.parameters(), *module.buffers()) if value.is_floating_point()]
    dtype = weights[0].dtype if weights else torch.float32
    zero_and_units = torch.cat([torch.zeros(1, width), torch.eye(width)]).to(device, dtype)
    # Not the module itself: this happens in the middle of a run whose hooks are on it.
    found: Tensor = module.forward(zero_and_units)
    bias, matrix = found[0], found[1:] - found[0]
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(4, width, generator=generator).to(device, dtype)
        given = module.forward(probe).float()
        error = (given - (probe @ matrix + bias).float()).abs().max() / given.abs().max().clamp(min=1e-6)
    if error > TOLERANCE * (1 if dtype in (torch.float32, torch.float64) else 16):
        raise UnsupportedModelError(
            f"{needed_by} as a matrix, and {type(module).__name__} is no linear map: what it makes of a sum is off by"
            f" {float(error):.2g} of the largest output (does it round its inputs, or drop some of them at random?)."
        )
    return matrix, bias
