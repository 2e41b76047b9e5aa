"""Where the parts of a model are: data about architectures, without any framework."""

from model_maps.bands import BandAxis, Bands
from model_maps.families import Head, family, lacking, prefixed
from model_maps.layer_paths import are_beside, layer_lists, path_in_layer
from model_maps.lookup import (
    AbsentComponentError,
    UnknownNameError,
    UnmappedModelError,
    component_site,
    find_map,
    known_classes,
    register_map,
)
from model_maps.schema import LayerKind, ModelMap, Variant
from model_maps.sites import AttentionHeads, FunctionName, HeadColumns, Layout, Part, Side, Site, Width
from model_maps.sizes import Sizes, columns_of, sizes_of
from model_maps.vocabulary import (
    ALIASES,
    COMPONENTS,
    PREFIXED,
    UNITS,
    WORDS,
    Axes,
    Component,
    Prefix,
    Stack,
    in_short,
    is_head_component,
)

__all__ = [
    "ALIASES",
    "COMPONENTS",
    "PREFIXED",
    "UNITS",
    "WORDS",
    "AbsentComponentError",
    "AttentionHeads",
    "Axes",
    "BandAxis",
    "Bands",
    "Component",
    "FunctionName",
    "Head",
    "HeadColumns",
    "LayerKind",
    "Layout",
    "ModelMap",
    "Part",
    "Prefix",
    "Side",
    "Site",
    "Sizes",
    "Stack",
    "UnknownNameError",
    "UnmappedModelError",
    "Variant",
    "Width",
    "are_beside",
    "columns_of",
    "component_site",
    "family",
    "find_map",
    "in_short",
    "is_head_component",
    "known_classes",
    "lacking",
    "layer_lists",
    "path_in_layer",
    "prefixed",
    "register_map",
    "sizes_of",
]
