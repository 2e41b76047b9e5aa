"""Interventions: rules that make a new activation out of the activation(s) they are given.

Tensors in, tensor out. Nothing here knows a model, a layer, a hook or a position.
"""

from interventions.autoencoders import AutoencoderIntervention, JumpReLUAutoencoderIntervention
from interventions.base import Intervention
from interventions.errors import (
    DuplicateInterventionError,
    InterventionArgumentError,
    InterventionError,
    InterventionShapeError,
    MissingSourceError,
    SubspaceError,
    SubspaceIndexError,
    UnknownInterventionError,
    UnusedSourceError,
)
from interventions.fixed import (
    AdditionIntervention,
    CollectIntervention,
    KnockoutIntervention,
    NoiseIntervention,
    ScaleIntervention,
    SkipIntervention,
    SubtractionIntervention,
    VanillaIntervention,
    ZeroIntervention,
)
from interventions.function import CallableIntervention
from interventions.masks import SigmoidMaskIntervention, SigmoidMaskRotatedSpaceIntervention
from interventions.pca import PCARotatedSpaceIntervention
from interventions.reft import (
    ConsreftIntervention,
    DireftIntervention,
    LobireftIntervention,
    LoreftIntervention,
    NodireftIntervention,
    NoreftIntervention,
)
from interventions.registry import (
    callable_named,
    intervention_named,
    name_of,
    name_of_callable,
    register_callable,
    register_intervention,
)
from interventions.rotation import (
    BoundlessRotatedSpaceIntervention,
    LowRankRotatedSpaceIntervention,
    OrthogonalWeight,
    RotatedSpaceIntervention,
)
from interventions.subspaces import IndexSet, SubspacePerPosition, Subspaces

__all__ = [
    "AdditionIntervention",
    "AutoencoderIntervention",
    "BoundlessRotatedSpaceIntervention",
    "CallableIntervention",
    "CollectIntervention",
    "ConsreftIntervention",
    "DireftIntervention",
    "DuplicateInterventionError",
    "IndexSet",
    "Intervention",
    "InterventionArgumentError",
    "InterventionError",
    "InterventionShapeError",
    "JumpReLUAutoencoderIntervention",
    "KnockoutIntervention",
    "LobireftIntervention",
    "LoreftIntervention",
    "LowRankRotatedSpaceIntervention",
    "MissingSourceError",
    "NodireftIntervention",
    "NoiseIntervention",
    "NoreftIntervention",
    "OrthogonalWeight",
    "PCARotatedSpaceIntervention",
    "RotatedSpaceIntervention",
    "ScaleIntervention",
    "SigmoidMaskIntervention",
    "SigmoidMaskRotatedSpaceIntervention",
    "SkipIntervention",
    "SubspaceError",
    "SubspaceIndexError",
    "SubspacePerPosition",
    "Subspaces",
    "SubtractionIntervention",
    "UnknownInterventionError",
    "UnusedSourceError",
    "VanillaIntervention",
    "ZeroIntervention",
    "callable_named",
    "intervention_named",
    "name_of",
    "name_of_callable",
    "register_callable",
    "register_intervention",
]

for _cls in (
    AdditionIntervention,
    AutoencoderIntervention,
    BoundlessRotatedSpaceIntervention,
    CallableIntervention,
    CollectIntervention,
    ConsreftIntervention,
    DireftIntervention,
    JumpReLUAutoencoderIntervention,
    KnockoutIntervention,
    LobireftIntervention,
    LoreftIntervention,
    LowRankRotatedSpaceIntervention,
    NodireftIntervention,
    NoiseIntervention,
    NoreftIntervention,
    PCARotatedSpaceIntervention,
    RotatedSpaceIntervention,
    ScaleIntervention,
    SigmoidMaskIntervention,
    SigmoidMaskRotatedSpaceIntervention,
    SkipIntervention,
    SubtractionIntervention,
    VanillaIntervention,
    ZeroIntervention,
):
    register_intervention(_cls)
