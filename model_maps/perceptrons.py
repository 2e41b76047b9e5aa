"""Maps of plain multi-layer perceptrons.

The class is ours and has no config of transformers, of which a tiny twin could be made. That its inputs are vectors
and not tokens, no signature tells.
"""

from __future__ import annotations

from model_maps.families import lacking
from model_maps.schema import ModelMap
from model_maps.sites import Site
from model_maps.vocabulary import COMPONENTS

_PLACED = {
    "block_input": Site("", "input"),
    "block_output": Site(""),
    "mlp_pre_activation": Site("act", "input"),
    "mlp_activation": Site("act"),
    "logits": Site("score", width="any"),
}

MLP_CLASSIFIER = ModelMap(
    classes=("MLPClassifier",),
    blocks="layers",
    sites=_PLACED,
    absent=lacking(
        *COMPONENTS.keys() - _PLACED, why="its blocks are a linear map and a nonlinearity, nothing else"
    ),
    sequential=False,
    positions_derived_from_mask=False,
)

PERCEPTRONS: tuple[ModelMap, ...] = (MLP_CLASSIFIER,)
"""The maps of all perceptron classes."""
