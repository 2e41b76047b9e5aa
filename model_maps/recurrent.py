"""Maps of torch's recurrent layers, each of which is its own single block.

Inference looks for a list of blocks, which they do not have: that the layer itself is one is a convention.
"""

from __future__ import annotations

from model_maps.families import lacking
from model_maps.schema import ModelMap
from model_maps.sites import Site
from model_maps.vocabulary import COMPONENTS

_PLACED = {
    "block_input": Site("", "input", width="any"),
    # The output at every position; the state after the last one is a second output.
    "block_output": Site("", width="any"),
}

TORCH_RECURRENT = ModelMap(
    classes=("GRU", "LSTM", "RNN"),
    blocks="",
    sites=_PLACED,
    absent=lacking(
        *COMPONENTS.keys() - _PLACED, why="a recurrent layer has nothing but its input and its output"
    ),
    sequential=False,
    positions_derived_from_mask=False,
)

RECURRENT: tuple[ModelMap, ...] = (TORCH_RECURRENT,)
"""The maps of all recurrent classes."""
