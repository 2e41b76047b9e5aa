"""Causal interventions on PyTorch models: declare what to change inside, run, and see what follows.

    import intervenable as iv

    config = iv.IntervenableConfig(
        [iv.RepresentationConfig(3, "block_output", "pos", 1)], iv.VanillaIntervention
    )
    model = iv.IntervenableModel(config, language_model, tokenizer=tokenizer)
    original, intervened = model(base, [source], {"sources->base": 4})

Everything public is here; the submodules may change. `iv.plots` draws, and loads when it is first used.
"""

import warnings as _warnings
from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from intervenable import attention, causal, experts, metrics, patching, training
from intervenable._version import __version__
from intervenable.cache import ActivationCache
from intervenable.collecting import collect
from intervenable.config import IntervenableConfig, RepresentationConfig
from intervenable.derived_activations import NormStatistics, head_vectors, norm_statistics
from intervenable.easyroutine import from_easyroutine
from intervenable.easyroutine_keys import activation_key, extraction_components, parse_activation_key
from intervenable.easyroutine_records import EasyroutineIntervention
from intervenable.easyroutine_values import FromCache
from intervenable.errors import (
    CacheError,
    CompiledModelWarning,
    ConfigError,
    DatasetError,
    EditError,
    InexactError,
    InputError,
    IntervenableError,
    IntervenableWarning,
    LayerRangeError,
    LocationError,
    LocationRangeError,
    MapError,
    MetricError,
    MissingActivationError,
    MissingExtraError,
    MissingFileError,
    ModelMismatchError,
    NotAvailableError,
    NotFiredError,
    RenamedWarning,
    SourceError,
    StorageError,
    SubspaceError,
    SubspaceRangeError,
    TrainingError,
    UnknownNameError,
    UnsupportedModelError,
)
from intervenable.locations import get_loc
from intervenable.map_making import make_map as _make_map
from intervenable.map_verification import verify
from intervenable.map_verification_result import Verification
from intervenable.map_view import ModelView, model_map
from intervenable.maps import use_maker as _use_maker
from intervenable.model import IntervenableModel
from intervenable.output import IntervenableOutput
from intervenable.pattern_statistics import pattern_blocks, uniform_pattern, value_weighted_pattern
from intervenable.position_entries import (
    Aligned,
    Except,
    PerExample,
    Regex,
    Role,
    Sampled,
    Segment,
    Span,
    Words,
)
from intervenable.position_resolver import PositionResolver, positions
from intervenable.receipt import Explanation, Receipt, ReceiptLine
from intervenable.small_lm import load_small_lm
from intervenable.token_text import TokenView, align
from intervenable.tokens import embed_to_distrib, format_token, top_vals
from intervenable.toy_models import MLPClassifier
from interventions import (
    AdditionIntervention,
    AutoencoderIntervention,
    BoundlessRotatedSpaceIntervention,
    CallableIntervention,
    CollectIntervention,
    ConsreftIntervention,
    DireftIntervention,
    IndexSet,
    Intervention,
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
    SubspacePerPosition,
    SubtractionIntervention,
    VanillaIntervention,
    ZeroIntervention,
    register_callable,
    register_intervention,
)
from model_maps import ModelMap, Site, register_map

__all__ = [
    "ActivationCache",
    "AdditionIntervention",
    "Aligned",
    "AutoencoderIntervention",
    "BoundlessRotatedSpaceIntervention",
    "CacheError",
    "CallableIntervention",
    "CollectIntervention",
    "CompiledModelWarning",
    "ConfigError",
    "ConsreftIntervention",
    "DatasetError",
    "DireftIntervention",
    "EasyroutineIntervention",
    "EditError",
    "Except",
    "Explanation",
    "FromCache",
    "IndexSet",
    "InexactError",
    "InputError",
    "IntervenableConfig",
    "IntervenableError",
    "IntervenableModel",
    "IntervenableOutput",
    "IntervenableWarning",
    "Intervention",
    "JumpReLUAutoencoderIntervention",
    "KnockoutIntervention",
    "LayerRangeError",
    "LobireftIntervention",
    "LocationError",
    "LocationRangeError",
    "LoreftIntervention",
    "LowRankRotatedSpaceIntervention",
    "MLPClassifier",
    "MapError",
    "MetricError",
    "MissingActivationError",
    "MissingExtraError",
    "MissingFileError",
    "ModelMap",
    "ModelMismatchError",
    "ModelView",
    "NodireftIntervention",
    "NoiseIntervention",
    "NoreftIntervention",
    "NormStatistics",
    "NotAvailableError",
    "NotFiredError",
    "PCARotatedSpaceIntervention",
    "PerExample",
    "PositionResolver",
    "Receipt",
    "ReceiptLine",
    "Regex",
    "RenamedWarning",
    "RepresentationConfig",
    "Role",
    "RotatedSpaceIntervention",
    "Sampled",
    "ScaleIntervention",
    "Segment",
    "SigmoidMaskIntervention",
    "SigmoidMaskRotatedSpaceIntervention",
    "Site",
    "SkipIntervention",
    "SourceError",
    "Span",
    "StorageError",
    "SubspaceError",
    "SubspacePerPosition",
    "SubspaceRangeError",
    "SubtractionIntervention",
    "TokenView",
    "TrainingError",
    "UnknownNameError",
    "UnsupportedModelError",
    "VanillaIntervention",
    "Verification",
    "Words",
    "ZeroIntervention",
    "__version__",
    "activation_key",
    "align",
    "attention",
    "causal",
    "collect",
    "embed_to_distrib",
    "experts",
    "extraction_components",
    "format_token",
    "from_easyroutine",
    "get_loc",
    "head_vectors",
    "load_small_lm",
    "metrics",
    "model_map",
    "norm_statistics",
    "parse_activation_key",
    "patching",
    "pattern_blocks",
    "positions",
    "register_callable",
    "register_intervention",
    "register_map",
    "top_vals",
    "training",
    "uniform_pattern",
    "value_weighted_pattern",
    "verify",
]

if _TYPE_CHECKING:
    from intervenable import plots as plots

_use_maker(_make_map)  # which runs models, as those do who look maps up

_RENAMED = {
    "GET_LOC": "get_loc",
    "IntervenableRepresentationConfig": "RepresentationConfig",
    "build_intervenable_model": "IntervenableModel",
}


def __getattr__(name: str) -> _Any:
    if name == "plots":  # needs an extra, and time to load: only for those who draw
        return _import_module("intervenable.plots")
    if name not in _RENAMED:
        raise AttributeError(f"module 'intervenable' has no attribute {name!r}")
    new = _RENAMED[name]
    _warnings.warn(f"{name!r} is now called {new!r}.", RenamedWarning, stacklevel=2)
    return globals()[new]
