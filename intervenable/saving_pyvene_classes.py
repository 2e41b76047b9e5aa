"""What the intervention classes of pyvene 0.1 are here, and what becomes of the tensors that it saves for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from intervenable.errors import StorageError
from interventions import (
    AdditionIntervention,
    AutoencoderIntervention,
    BoundlessRotatedSpaceIntervention,
    CollectIntervention,
    Intervention,
    JumpReLUAutoencoderIntervention,
    LowRankRotatedSpaceIntervention,
    NoiseIntervention,
    RotatedSpaceIntervention,
    SigmoidMaskIntervention,
    SigmoidMaskRotatedSpaceIntervention,
    SkipIntervention,
    SubtractionIntervention,
    VanillaIntervention,
    ZeroIntervention,
)

State = dict[str, Tensor]

CLASS = re.compile(r"<class 'pyvene\.models\.interventions\.(\w+)'>")
"""How pyvene writes a class."""


@dataclass(frozen=True)
class Counterpart:
    """What one class of pyvene is here."""

    cls: type[Intervention]
    """Our class."""

    state: Callable[[State], State] | None = None
    """What becomes of the tensors of a file; None for a class that has none but a constant source."""

    first_only: Callable[[Intervention], int | None] = lambda intervention: None
    """How many coordinates it swaps where a call names none; pyvene's swaps `interchange_dim` of them."""


def _columns(state: State) -> State:
    """The orthonormal matrix that torch's parametrisation, in which pyvene keeps a rotation, stands for."""
    own = {name.removeprefix("rotate_layer."): value.double() for name, value in state.items()}
    original = own.get("weight" if set(own) == {"weight"} else "parametrizations.weight.original")
    if original is None or original.dim() != 2:
        raise StorageError(f"there is no rotation among {', '.join(sorted(state)) or 'no tensors'}.")
    layer = nn.Linear(original.shape[1], original.shape[0], bias=False, dtype=torch.float64)
    if set(own) != {"weight"}:
        nn.init.eye_(layer.weight)
        parametrizations.orthogonal(layer)
    layer.load_state_dict(own)
    columns = layer.weight.detach()
    if not torch.allclose(columns.mT @ columns, torch.eye(columns.shape[1]).double(), atol=1e-3):
        raise StorageError(
            "its rotation is not orthonormal any more. (Weight decay does that to torch's parametrisation.)"
        )
    return {"rotation.weight": columns.float()}


def _rotated(**renamed: str) -> Callable[[State], State]:
    """A rotation and other tensors, some of which have another name here."""

    def converted(state: State) -> State:
        rotation = {name: value for name, value in state.items() if name.startswith("rotate_layer.")}
        others = {renamed.get(name, name): value for name, value in state.items() if name not in rotation}
        # pyvene's positions of the coordinates, which are 0, 1, 2, ...
        others.pop("intervention_population", None)
        return _columns(rotation) | others

    return converted


def _autoencoder(state: State) -> State:
    names = {"autoencoder.encoder.0.": "encoder.", "autoencoder.decoder.0.": "decoder."}
    for theirs, ours in names.items():
        state = {
            ours + name.removeprefix(theirs) if name.startswith(theirs) else name: value
            for name, value in state.items()
        }
    return state


def _rotated_width(intervention: Intervention) -> int | None:
    return intervention.embed_dim


def _latents(intervention: Intervention) -> int | None:
    return intervention.subspace_size


COUNTERPARTS: Mapping[str, Counterpart] = {
    "AdditionIntervention": Counterpart(AdditionIntervention),
    "AutoencoderIntervention": Counterpart(AutoencoderIntervention, _autoencoder),
    "BoundlessRotatedSpaceIntervention": Counterpart(BoundlessRotatedSpaceIntervention, _rotated()),
    "CollectIntervention": Counterpart(CollectIntervention),
    "JumpReLUAutoencoderIntervention": Counterpart(JumpReLUAutoencoderIntervention, dict, _latents),
    "LowRankRotatedSpaceIntervention": Counterpart(LowRankRotatedSpaceIntervention, _rotated()),
    "NoiseIntervention": Counterpart(NoiseIntervention),
    "RotatedSpaceIntervention": Counterpart(RotatedSpaceIntervention, _rotated(), _rotated_width),
    "SigmoidMaskIntervention": Counterpart(SigmoidMaskIntervention, dict),
    "SigmoidMaskRotatedSpaceIntervention": Counterpart(
        SigmoidMaskRotatedSpaceIntervention, _rotated(masks="mask")
    ),
    "SkipIntervention": Counterpart(SkipIntervention),
    "SubtractionIntervention": Counterpart(SubtractionIntervention),
    "VanillaIntervention": Counterpart(VanillaIntervention),
    "ZeroIntervention": Counterpart(ZeroIntervention),
}
"""What each class of pyvene's is here. Its principal components are not among what it saves."""


def counterpart_of(kind: object) -> Counterpart | None:
    """What a class, as pyvene writes it, is here; None if there is none.

    Example:
        >>> counterpart_of("<class 'pyvene.models.interventions.ZeroIntervention'>").cls.__name__
        'ZeroIntervention'
        >>> counterpart_of("<class 'os.system'>") is None
        True
    """
    found = CLASS.fullmatch(kind) if isinstance(kind, str) else None
    return None if found is None else COUNTERPARTS.get(found[1])
