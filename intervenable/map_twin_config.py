"""A config made small: what a tiny twin of a model is built from.

Configs are read by the names of their fields, with the configs inside them. Heads stay as many as they are, and as
wide where their width is stated apart from the hidden size; else they become narrow with it. Hidden sizes, MLPs,
vocabularies, experts, windows and lengths shrink; of the layers the first stay, as many as are asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

from intervenable.map_config_fields import (
    ROLE_OF,
    ROLES,
    WIDTHS_OF_STAGES,
    field_of,
    first_number,
    is_config,
    is_number,
    layer_overrides,
    layers_of,
)
from intervenable.map_twin_shape import Shown, TwinShape
from intervenable.map_twin_widths import Geometry, geometry_of, hidden_sizes, shrink_factor, stage_factor

VOCABULARY = 160
FIRST_SPECIAL = 100
"""Ids of special tokens from here on are given out anew, from here on."""

_WIDTHS_BY_HEAD = ("rotary_dim", "query_pre_attn_scalar")
_WIDTHS_OF_STREAMS = ("_hidden_size", "_channels")
"""How names of fields end that are as wide as a stream where they have its width."""

_DEPTHS = ("depths", "depth")
_MOST_BLOCKS = 3
"""In each of several stages."""

_SPECIAL_TOKEN = re.compile(r"(_token_id|_token_index|_index|_tokens?_ids?|_token)$")
_LINEAR = ("linear_heads", "linear_width")
_LAYER_INDICES = re.compile(r"(layer|idx|indices|indexes|block)")
_UNCHANGED = ("transformers_version", "architectures", "dtype", "model_type", "quantization_config")
_PLAIN_ROTATIONS = ("longrope", "su")

_CHANNELS = 16
"""Of each of the convolutions before an encoder of sounds."""

_LEAST_LENGTH = 16
"""As many positions the twin has at least, however short the model's inputs must be."""

_OF_STAGES = 96
"""Pixels along each side of pictures for towers of several stages."""

_MOST: Mapping[str, int] = {
    "experts": 4,
    "chosen_experts": 2,
    "groups": 1,
    "length": 64,
    "linear_width": 4,
    "image_size": 64,
    "spec_size": 64,
    "index_topk": 4,
    "index_n_heads": 4,
    "num_filters": 8,
    "subsampling_conv_channels": 32,
    "latent_query_num": 4,
    "num_bpe_labels": VOCABULARY,
    "num_wordpiece_labels": VOCABULARY,
    "index_block_size": 2,
    "index_topk_blocks": 2,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "mamba_dt_rank": 8,
    "time_step_rank": 8,
    "local_attn_chunk_length": 8,
    "lsh_attn_chunk_length": 8,
    "hidden_size_per_layer_input": 16,
    "spatial_merge_size": 2,
    "router_hidden_size": 16,
    "moe_latent_size": 16,
    "block_size": 4,
    "summary_hidden_size": 32,
    "num_codebooks": 2,
    "codebook_size": 128,
    "num_quantizers": 4,
    "context_size": 8,
    "max_length": 32,
    "num_frames": 4,
    "frames_per_clip": 4,
    "prompt_length": 4,
    "rel_extent": 16,
    "num_queries": 8,
    "index_kpool": 2,
    "base_channels": 32,
    "d_latents": 40,
    "moe_hidden_size": 24,
    "num_embeddings": VOCABULARY,
    "downsample_hidden_size": 16,
}
"""Roles and single fields -> the largest number that is left."""


def small_config(config: Any, shape: TwinShape, shown: Shown, sections: Sequence[int] | None = None) -> Any:
    """A small copy of a config of transformers, of its class.

    Args:
        config: The config, which stays as it is.
        shape: What is tried.
        shown: Which layers of a stack the twin has.
        sections: How the model shares a rotation out among axes where its config does not say.
    """
    return _Shrinking(shape, shown, hidden_sizes(config, shape), sections).of(config)


@dataclass(frozen=True)
class _Part:
    """One config and how it shrinks."""

    geometry: Geometry | None
    layers: int | None
    shown: tuple[int, ...]
    """The layers that stay."""

    factor: int
    """By how much heads become narrower."""

    fewer: int
    """By how much the heads of linear attention become fewer: no component is of one of them."""

    patch: int | None
    """Pixels along a side of the patches of a tower whose windows are counted in pixels."""

    stages: int
    """By how much the stages of a tower become narrower."""

    largest_side: int
    """Pixels along a side of pictures."""

    last_side: int | None
    """Positions along a side of pictures in the last stage of a tower, which a window must not exceed."""


class _Shrinking:
    """Makes small configs of the parts of one."""

    def __init__(
        self, shape: TwinShape, shown: Shown, widths: Mapping[int, int], sections: Sequence[int] | None
    ) -> None:
        self._shape = shape
        self._sections = sections
        self._shown = shown
        self._widths = widths
        self._mlps: dict[int, int] = {}
        self._specials: dict[int, int] = {}

    def of(self, config: Any) -> Any:
        """A small config of the same class."""
        cls = type(config)
        fields = (
            {entry.name: entry for entry in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        )
        part = self._part(config)
        renamed = getattr(cls, "attribute_map", {})
        # A field may be kept under another name.
        kept_as = {renamed[name] for name in fields if name in renamed}
        values: dict[str, Any] = {}
        for name in (*fields, *(name for name in vars(config) if name not in fields and name not in kept_as)):
            if (
                not name.startswith("_")
                and name not in _UNCHANGED
                and (name in fields or name not in renamed)
            ):
                value = vars(config)[name] if name in vars(config) else field_of(config, name)
                values[name] = self._small(name, value, part)
        _fill_state_spaces(config, values, part, self._width)
        if isinstance(field_of(config, "hidden_sizes"), (list, tuple)) and is_number(
            values.get("image_size")
        ):
            # Stages make pictures smaller: in the last, attention needs more than one position.
            values["image_size"] = min(field_of(config, "image_size"), _OF_STAGES)
        if values.get("default_language", 0) is None and values.get("languages"):
            values["default_language"] = next(iter(values["languages"]))
        given = {name: value for name, value in values.items() if name in fields or not fields}
        if self._shape.stated_fields_alone:
            given = {name: value for name, value in given.items() if _is_stated(fields.get(name), value)}
        small = cls(**given)
        for name, value in values.items():
            # Some configs give linear attention the heads of the other, whatever they are told, or work out anew
            # how often a layer has experts.
            worked_out = ROLE_OF.get(name) in _LINEAR or name.endswith("_sparse_step")
            if (name not in given and not hasattr(small, name)) or worked_out:
                setattr(small, name, value)
        own = {
            at: {name: self._small(name, value, part) for name, value in overrides[layer].items()}
            for overrides in (layer_overrides(config),)
            for at, layer in enumerate(part.shown)
            if layer in overrides
        }
        if own:
            small.per_layer_config = own
        if getattr(config, "_attn_implementation_internal", None) == "eager":
            small._attn_implementation = "eager"
        return small

    def _part(self, config: Any) -> _Part:
        geometry, layers = geometry_of(config), layers_of(config)
        sharing = field_of(config, "num_kv_shared_layers")
        listed = not self._shape.first_layers and any(
            isinstance(value, (list, tuple)) and len(value) == layers for value in vars(config).values()
        )
        shown = (
            self._shown(layers, sharing=sharing if is_number(sharing) else 0, listed=listed) if layers else ()
        )
        factor = 1 if geometry is None else self._head_factor(geometry)
        merged = is_number(field_of(config, "spatial_merge_size"))
        side = field_of(config, "patch_size") if merged else None
        patch = side if is_number(side) else None
        return _Part(
            geometry,
            layers,
            shown,
            factor,
            _fewer_linear_heads(config),
            patch,
            stage_factor(config, self._shape),
            _largest_side(config),
            _side_of_last_stage(config),
        )

    def _head_factor(self, geometry: Geometry) -> int:
        """By how much heads become narrower."""
        if not geometry.stated:
            return geometry.hidden // self._widths[geometry.hidden]
        if geometry.divisible and geometry.heads * geometry.width > self._shape.most_columns:
            return shrink_factor([geometry.divisible], geometry.heads, self._shape)
        return 1

    def _small(self, name: str, value: Any, part: _Part) -> Any:
        if is_config(value):
            return self.of(value)
        if isinstance(value, Mapping):
            if name.startswith("rope"):
                return _rotation(self._with_sections(value, part), part.factor)
            if any(not isinstance(key, str) for key in value):
                return dict(value)  # labels
            return {key: self._small(key, inner, part) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            made = self._list(name, value, part)
            return tuple(made) if isinstance(value, tuple) else made
        return self._number(name, value, part) if is_number(value) else value

    def _with_sections(self, rotation: Mapping[str, Any], part: _Part) -> Mapping[str, Any]:
        """The parameters of a rotation with the sections that the model gives it by itself."""
        if not self._sections or part.geometry is None or rotation.get("mrope_section"):
            return rotation
        turned = 2 * sum(self._sections)  # of the columns of each head, all or a share
        return (
            rotation if part.geometry.width % turned else {**rotation, "mrope_section": list(self._sections)}
        )

    def _number(self, name: str, value: int, part: _Part) -> int:
        role = ROLE_OF.get(name)
        if "vocab_size" in name or name.endswith("_group_vocab"):
            return min(value, VOCABULARY)
        if role is None and _SPECIAL_TOKEN.search(name):
            return self._special(value)
        match role:
            case "hidden":
                return self._width(value, self._heads_beside(name, value, part))
            case "mlp":
                return self._mlp(value)
            case "layers":
                return len(part.shown) if value == part.layers else len(self._shown(value))
            case "head_width":
                return value // part.factor if value % part.factor == 0 else value
            case "linear_heads":
                return value // part.fewer
            case "latent":
                return min(value, 16 if name.endswith("kv_lora_rank") else 24)
            case "window" if part.patch and value >= 2 * part.patch and value % part.patch == 0:
                return value
            case "window" if part.last_side:
                return min(value, part.last_side)
            case "window":
                return min(value, self._shape.window)
            case None if value in self._widths and name.endswith(_WIDTHS_OF_STREAMS):
                return self._widths[value]
            case None if name in _WIDTHS_BY_HEAD and part.factor > 1:
                return max(value // part.factor, 2)
            case None if name == "num_kv_shared_layers" and value and part.layers:
                return sum(layer >= part.layers - value for layer in part.shown)
        if name == "image_size":
            return min(value, part.largest_side)
        most = min(value, _MOST.get(role or name, value))
        return max(most, _LEAST_LENGTH) if role == "length" else most

    def _heads_beside(self, name: str, value: int, part: _Part) -> int:
        """Heads that share a width of a tower which calls hidden size what it hands on; 1 if it is none."""
        heads = 1 if part.geometry is None else part.geometry.heads
        return heads if name == "embed_dim" and value % heads == 0 else 1

    def _width(self, value: int, heads: int = 1) -> int:
        """A hidden size, or another that belongs to it: twice as much, a half; else one that heads can share."""
        if value in self._widths:
            return self._widths[value]
        for old, new in sorted(self._widths.items()):
            if value % old == 0:
                return value // old * new
            if old % value == 0 and new % (old // value) == 0:
                return new // (old // value)
        if heads > 1:
            return value // shrink_factor([value // heads], heads, self._shape)
        return min(value, 24)

    def _mlp(self, value: int) -> int:
        if value <= self._shape.mlp:
            return value
        if value not in self._mlps:
            smaller = (0, -16, 16, -8, 8)[len(self._mlps) % 5]
            self._mlps[value] = min(value, self._shape.mlp + smaller)
        return self._mlps[value]

    def _special(self, value: int) -> int:
        if value < FIRST_SPECIAL:
            return value
        return self._specials.setdefault(value, FIRST_SPECIAL + len(self._specials))

    def _list(self, name: str, value: Sequence[Any], part: _Part) -> list[Any]:
        numbers = bool(value) and all(map(is_number, value))
        if numbers and name == "image_size":
            return [min(side, part.largest_side) for side in value]
        if numbers and name == "conv_dim":
            return [min(channels, _CHANNELS) for channels in value]
        if numbers and name.endswith(WIDTHS_OF_STAGES):
            return [size if size % part.stages else size // part.stages for size in value]
        if numbers and name in _DEPTHS:
            return [min(depth, _MOST_BLOCKS) for depth in value]
        if part.layers and len(value) == part.layers:
            if numbers and name.endswith("_source_layers"):
                return [_shown_at(part.shown, value[layer], at) for at, layer in enumerate(part.shown)]
            return [self._small(name, value[layer], part) for layer in part.shown]
        if name == "attention_types":  # pairs: kinds of layers in turn, and how often
            turns = [kind for kinds, times in value for kind in kinds * times]
            return [[[turns[layer] for layer in part.shown], 1]]
        if numbers and _SPECIAL_TOKEN.search(name) and "layer" not in name:
            return [self._special(item) for item in value]
        if numbers and part.geometry and sum(value) == part.geometry.hidden and len(value) > 1:
            return _shared_out(value, self._width(part.geometry.hidden))
        if (
            numbers
            and part.layers
            and _LAYER_INDICES.search(name)
            and 0 <= min(value) <= max(value) < part.layers
        ):
            return [at for at, layer in enumerate(part.shown) if layer in value] or [len(part.shown) - 1]
        return list(value)


def _shown_at(shown: Sequence[int], layer: int, own: int) -> int:
    """Where a layer is among those that are shown; a place of its own if it is none of them."""
    return shown.index(layer) if layer in shown else own


_PATCHES = 8
"""Patches along each side of pictures for towers of one stage, if they are small."""


def _largest_side(config: Any) -> int:
    """Pixels along each side of the pictures of a small model."""
    patch, stages = field_of(config, "patch_size"), field_of(config, "depths")
    in_patches = is_number(patch) and patch >= 4 and not isinstance(stages, (list, tuple))
    return min(_MOST["image_size"], patch * _PATCHES) if in_patches else _MOST["image_size"]


def _side_of_last_stage(config: Any) -> int | None:
    """Positions along a side of the pictures of a small model in the last of its stages, each half as large."""
    depths, patch = field_of(config, "depths"), field_of(config, "patch_size")
    image = first_number(config, ("image_size", "spec_size"))
    if not (isinstance(depths, (list, tuple)) and image and is_number(patch)):
        return None
    positions: int = min(image, _MOST["image_size"]) // patch
    return max(1, positions >> (len(depths) - 1))


def _fewer_linear_heads(config: Any) -> int:
    """By how much the heads of linear attention become fewer: two stay at least, shared as they were."""
    counts = [value for name in ROLES["linear_heads"].split() if is_number(value := field_of(config, name))]
    common = gcd(*counts)
    return max((factor for factor in range(1, common // 2 + 1) if common % factor == 0), default=1)


def _fill_state_spaces(config: Any, values: dict[str, Any], part: _Part, width: Callable[[int], int]) -> None:
    """Let the heads of a state space fill its width again, which has become narrower."""
    if part.geometry is None:
        return
    for heads_name, width_name, expand_name in _STATE_SPACES:
        heads, head_width = field_of(config, heads_name), field_of(config, width_name)
        expand = field_of(config, expand_name)
        if not (is_number(heads) and is_number(head_width) and isinstance(expand, (int, float))):
            continue
        if heads * head_width == expand * part.geometry.hidden:
            inner = int(expand * width(part.geometry.hidden))
            narrow = next(size for size in (16, 8, 4, 2, 1) if inner % size == 0)
            values[heads_name], values[width_name] = inner // narrow, narrow


_STATE_SPACES = (
    ("mamba_n_heads", "mamba_d_head", "mamba_expand"),
    ("num_heads", "head_dim", "expand"),
    ("mamba_num_heads", "mamba_head_dim", "expand"),
    ("n_mamba_heads", "mamba_headdim", "mamba_expand"),
)
"""Fields for the heads of a state space, their width, and how much wider than the stream it is."""


def _is_stated(entry: dataclasses.Field[Any] | None, value: Any) -> bool:
    """Whether a config has to be told a value: not where it works it out from others."""
    return entry is None or (entry.default is not None and value is not None)


def _rotation(value: Mapping[str, Any], factor: int) -> dict[str, Any]:
    """The parameters of a rotation for narrower heads; where kinds of layers have their own, of each."""
    if any(isinstance(inner, Mapping) for inner in value.values()):
        return {
            key: _rotation(inner, factor) if isinstance(inner, Mapping) else copy.copy(inner)
            for key, inner in value.items()
        }
    found = {key: inner for key, inner in value.items() if key not in ("long_factor", "short_factor")}
    if found.get("mrope_section") and factor > 1:
        found["mrope_section"] = _mrope(found["mrope_section"], factor)
    if "original_max_position_embeddings" in found:
        found["original_max_position_embeddings"] = 32
    if found.get("rope_type") in _PLAIN_ROTATIONS:
        found["rope_type"] = "default"
    if found.get("type") in _PLAIN_ROTATIONS:
        found["type"] = "default"
    return found


def _shared_out(sections: Sequence[int], total: int) -> list[int]:
    """So many columns shared out as these are: about in proportion, even, none left over."""
    rest = [max(2, section * total // sum(sections) // 2 * 2) for section in sections[1:]]
    return [total - sum(rest), *rest]


def _mrope(sections: Sequence[int], factor: int) -> list[int]:
    """Sections that are even, but for one that has what is left: the last where the first two are equal."""
    total, parts = sum(sections) // factor, len(sections)
    even = [total // parts] * (parts - 1)
    rest = [total - sum(even)]
    return even + rest if parts > 2 and sections[0] == sections[1] != sections[-1] else rest + even
