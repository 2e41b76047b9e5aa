"""Where the parts of a model are: data about architectures, without any framework."""

from model_maps.families import Head, family, lacking, prefixed
from model_maps.lookup import (
    AbsentComponentError,
    UnknownNameError,
    UnmappedModelError,
    component_site,
    find_map,
    known_classes,
    register_map,
)
from model_maps.schema import HeadColumns, Layout, ModelMap, Part, Side, Site, Variant, Width
from model_maps.sizes import Sizes, columns_of, sizes_of
from model_maps.vocabulary import (
    ALIASES,
    COMPONENTS,
    UNITS,
    WORDS,
    Axes,
    Component,
    Prefix,
    Stack,
    is_head_component,
)

__all__ = [
    "ALIASES",
    "COMPONENTS",
    "UNITS",
    "WORDS",
    "AbsentComponentError",
    "Axes",
    "Component",
    "Head",
    "HeadColumns",
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
    "columns_of",
    "component_site",
    "family",
    "find_map",
    "is_head_component",
    "known_classes",
    "lacking",
    "prefixed",
    "register_map",
    "sizes_of",
]
