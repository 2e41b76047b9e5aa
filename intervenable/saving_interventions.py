"""One intervention as arguments and tensors, and made of them again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import ConfigError, StorageError, UnknownNameError
from intervenable.saving_types import TypeNames
from interventions import CallableIntervention, Intervention, InterventionError, UnknownInterventionError

REMEDY = "Take an intact copy, or save the model anew."


def taken_apart(intervention: Intervention, types: TypeNames) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What to make an intervention of: the name of its class, its arguments, and its tensors.

    Raises:
        ConfigError: it has something that has no form in a file: a class or a function without a name, arguments that
            JSON does not know, state that is no tensor.
    """
    cls = type(intervention)
    name = types.name_of(cls)
    if isinstance(intervention, CallableIntervention) and _tensors_in(intervention.function):
        raise ConfigError(
            f"its function, a {type(intervention.function).__name__}, has weights of its own, and only the name of a"
            " function is saved. Write a subclass of Intervention that holds it, and register that."
        )
    try:
        arguments = intervention.to_config()
        json.dumps(arguments, allow_nan=False)
    except UnknownInterventionError as error:
        raise ConfigError(str(error)) from error
    except InterventionError as error:
        raise ConfigError(f"{cls.__name__} cannot be saved: {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{cls.__name__} has an argument that JSON has no form for: {error}.") from error
    held = intervention.state_dict()
    for key, tensor in held.items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(
                f"{cls.__name__} keeps {key!r}, a {type(tensor).__name__}; only tensors can be saved."
            )
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device, without values" if tensor.is_meta else f"of layout {tensor.layout}"
            raise ConfigError(
                f"{cls.__name__} keeps {key!r}, which is {kind}; only plain tensors can be saved."
            )
    record = {"type": name, "arguments": arguments}
    frozen = [key for key, weight in intervention.named_parameters() if not weight.requires_grad]
    return (record | {"frozen": frozen} if frozen else record), held


def put_together(
    cls: type[Intervention],
    arguments: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    frozen: Sequence[str],
    where: str,
) -> Intervention:
    """Make what `taken_apart` has taken apart. The random numbers of this process go on as if nothing had been made.

    Raises:
        StorageError: these arguments and tensors do not make such an intervention.
        UnknownNameError: it is made of a function that is not known here.
    """
    # Constructors draw random weights, only to have them replaced.
    with torch.random.fork_rng(devices=[]):
        _check_shapes(cls, arguments, tensors, where)
        with torch.device("cpu"):
            made = _made(cls, arguments, where)
    try:
        # As they are, in their own dtypes.
        made.load_state_dict(dict(tensors), assign=True)
    except (RuntimeError, InterventionError) as error:
        raise StorageError(
            f"{where}: {cls.__name__} does not take these tensors: {error} {REMEDY}"
        ) from error
    weights = dict(made.named_parameters())
    unknown = sorted(set(frozen) - weights.keys())
    if unknown:
        raise StorageError(f"{where}: {cls.__name__} has no parameter {unknown[0]!r} to freeze. {REMEDY}")
    for name, weight in weights.items():
        weight.requires_grad_(name not in frozen)
    return made


def _made(cls: type[Intervention], arguments: Mapping[str, Any], where: str) -> Intervention:
    try:
        return cls(**arguments)
    except UnknownInterventionError as error:  # a function
        raise UnknownNameError(f"{where}: {error}") from error
    except Exception as error:  # whatever the constructor of a class of the user's raises
        raise StorageError(
            f"{where}: {cls.__name__} cannot be made of the arguments {dict(arguments)!r}: {error} If the class has"
            f" changed since, use the one it was saved with. {REMEDY}"
        ) from error


def _check_shapes(
    cls: type[Intervention], arguments: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Compare tensors with what a class wants, before sizes that no memory holds are believed."""
    try:
        with torch.device("meta"):
            wanted = cls(**arguments).state_dict()
    except Exception:  # needs values to be made, or is wrong, which making it for real will tell
        return
    faults = [f"{key!r} is missing" for key in wanted if key not in tensors]
    faults += [f"{key!r} is none of its tensors" for key in tensors if key not in wanted]
    for key in wanted.keys() & tensors.keys():
        want, have = wanted[key], tensors[key]
        if want.shape != have.shape:
            faults.append(f"{key!r} has the shape {tuple(have.shape)}, and should have {tuple(want.shape)}")
        elif want.is_floating_point() != have.is_floating_point():
            faults.append(f"{key!r} is of {have.dtype}, and should be like {want.dtype}")
    if faults:
        raise StorageError(
            f"{where}: the tensors of {cls.__name__} do not fit it: {'; '.join(faults)}. {REMEDY}"
        )


def _tensors_in(function: object) -> bool:
    return isinstance(function, nn.Module) and bool(function.state_dict())
