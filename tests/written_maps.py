"""The maps that were written by hand for the first architectures: what inference has to find by itself.

They were checked against the source of the models, and `test_model_maps.py` still does so.
"""

from __future__ import annotations

from collections.abc import Iterable

from written_decoders import DECODERS
from written_encoder_decoders import ENCODER_DECODERS
from written_encoders import ENCODERS
from written_state_spaces import STATE_SPACES

import model_maps
from model_maps import ModelMap

WRITTEN_MAPS = {
    name: row for row in (*DECODERS, *ENCODERS, *ENCODER_DECODERS, *STATE_SPACES) for name in row.classes
}
"""Class -> its map."""


def find_map(class_names: Iterable[str], config: object | None = None) -> ModelMap:
    """The map written for the first of these classes that has one, for this config; or a registered one."""
    names = tuple(class_names)
    for name in names:
        if name in WRITTEN_MAPS:
            return WRITTEN_MAPS[name].for_config(config)
    return model_maps.find_map(names, config)


def known_classes() -> tuple[str, ...]:
    """Names of all classes that have a map of either kind, sorted."""
    return tuple(sorted({*WRITTEN_MAPS, *model_maps.known_classes()}))
