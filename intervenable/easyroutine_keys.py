"""The activation keys of easyroutine, and what they are called here: one table, read both ways.

A key such as `pattern_L3H8` or `resid_out_4` names a component, a layer and perhaps a head. Heads in keys are always
**query heads**; where queries share keys and values, `key_value_head` says which shared head a query head reads.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from intervenable.errors import (
    ConfigError,
    LayerRangeError,
    LocationRangeError,
    UnknownNameError,
    unknown_name,
)
from model_maps import ALIASES, COMPONENTS, Sizes


@dataclass(frozen=True)
class KeyKind:
    """One row of the table: a kind of key, and what it names."""

    template: str
    """How its keys are written, with `{layer}` and `{head}` where they stand."""

    component: str
    """What it names here."""

    shared: bool = False
    """Whether the component has key-value heads, while the key counts query heads."""

    read_only: str = ""
    """Why nothing can be written there, as the end of a sentence; "" if it can."""

    @property
    def unit(self) -> str:
        """The unit in which positions of it are located."""
        return {"stream": "pos", "heads": "h.pos", "matrix": "h.query.key"}[COMPONENTS[self.component].axes]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Its keys, as a regular expression for the whole of them."""
        return re.compile(self.template.format(layer=r"(?P<layer>\d+)", head=r"(?P<head>\d+)"))


_EXTRACTED = "easyroutine extracts it and has no interventions there"
_PROJECTED = (
    "no tensor of the forward pass holds it. Write the vector before projection (head_{kind}_L{{layer}}H{{head}})"
    " or what the head adds to the stream (head_out_L{{layer}}H{{head}})"
)

KEY_KINDS: tuple[KeyKind, ...] = (
    KeyKind("pattern_L{layer}H{head}", "attention_pattern"),
    KeyKind("resid_in_{layer}", "block_input"),
    KeyKind("resid_mid_{layer}", "block_mid"),
    KeyKind("resid_out_{layer}", "block_output"),
    KeyKind("attn_in_{layer}", "attention_input"),
    KeyKind(
        "resid_in_post_layernorm_{layer}",
        "attention_input",
        read_only=f"{_EXTRACTED}; attn_in_{{layer}} is the same",
    ),
    KeyKind("attn_out_{layer}", "attention_output"),
    KeyKind("mlp_out_{layer}", "mlp_output"),
    KeyKind("queries_L{layer}", "query_output"),
    KeyKind("keys_L{layer}", "key_output"),
    KeyKind("values_L{layer}", "value_output"),
    KeyKind("head_queries_L{layer}H{head}", "head_query_output"),
    KeyKind("head_keys_L{layer}H{head}", "head_key_output", shared=True),
    KeyKind("head_values_L{layer}H{head}", "head_value_output", shared=True),
    KeyKind(
        "projected_query_L{layer}H{head}", "head_query_output", read_only=_PROJECTED.format(kind="queries")
    ),
    KeyKind(
        "projected_key_L{layer}H{head}",
        "head_key_output",
        shared=True,
        read_only=_PROJECTED.format(kind="keys"),
    ),
    KeyKind(
        "projected_value_L{layer}H{head}",
        "head_value_output",
        shared=True,
        read_only=_PROJECTED.format(kind="values"),
    ),
    KeyKind("head_out_L{layer}H{head}", "head_attention_output"),
    KeyKind("input_embeddings", "embedding_output", read_only=_EXTRACTED),
    KeyKind("last_layernorm", "final_norm_input", read_only=_EXTRACTED),
    KeyKind("logits", "logits", read_only=_EXTRACTED),
)
"""Every key of easyroutine that names an activation. Of rows with one component the first has its canonical key."""

EXTRACTION_FLAGS: Mapping[str, str] = {
    "extract_embed": "embedding_output",
    "extract_resid_in": "block_input",
    "extract_resid_mid": "block_mid",
    "extract_resid_out": "block_output",
    "extract_resid_in_post_layernorm": "attention_input",
    "extract_attn_in": "attention_input",
    "extract_attn_out": "attention_output",
    "extract_attn_pattern": "attention_pattern",
    "extract_mlp_out": "mlp_output",
    "extract_queries": "query_output",
    "extract_keys": "key_output",
    "extract_values": "value_output",
    "extract_head_queries": "head_query_output",
    "extract_head_keys": "head_key_output",
    "extract_head_values": "head_value_output",
    "extract_head_out": "head_attention_output",
    "extract_head_queries_projected": "head_query_output",
    "extract_head_keys_projected": "head_key_output",
    "extract_head_values_projected": "head_value_output",
    "extract_last_layernorm": "final_norm_input",
    "save_input_ids": "input_ids",
    "save_logits": "logits",
}
"""The fields of easyroutine's `ExtractionConfig` that ask for something, and its name in `collect`."""


@dataclass(frozen=True)
class ActivationKey:
    """One key of easyroutine's, taken apart."""

    kind: KeyKind
    """Its row of the table."""

    layer: int | None = None
    """The block; None for what a model has once."""

    head: int | None = None
    """The **query** head; None if the key names none."""

    @property
    def component(self) -> str:
        """What it names here."""
        return self.kind.component

    @property
    def unit(self) -> str:
        """The unit in which positions of it are located: `pos`, `h.pos` or `h.query.key`."""
        return self.kind.unit

    def component_head(self, sizes: Sizes) -> int | None:
        """The index of the head in its component: the key-value head where these are what there is.

        Raises:
            ConfigError: it is a shared head, and the sizes do not say how many there are.
        """
        if self.head is None or not self.kind.shared:
            return self.head
        return key_value_head(self.head, sizes)

    def __str__(self) -> str:
        return self.kind.template.format(layer=self.layer, head=self.head)


def parse_activation_key(key: str, sizes: Sizes | None = None) -> ActivationKey:
    """Take a key of easyroutine's apart; hyphens are as good as underscores.

    Args:
        key: Such as `pattern_L3H8`, `resid_out_4` or `logits`.
        sizes: Those of the model at hand (`model_maps.sizes_of`), to check layer and head against.

    Raises:
        UnknownNameError: no key is written so; the message has the nearest that is.
        LayerRangeError, LocationRangeError: the model has no such layer or head.

    Example:
        >>> parsed = parse_activation_key("head_values_L3H8")
        >>> parsed.component, parsed.layer, parsed.head, parsed.unit
        ('head_value_output', 3, 8, 'h.pos')
        >>> str(parsed)
        'head_values_L3H8'
    """
    if not isinstance(key, str):
        raise ConfigError(f"{key!r} is no activation key; keys are texts such as 'pattern_L3H8'.")
    for kind in KEY_KINDS:
        found = kind.pattern.fullmatch(key.replace("-", "_"))
        if found is not None:
            numbers = {name: int(number) for name, number in found.groupdict().items()}
            parsed = ActivationKey(kind, **numbers)
            _check_range(parsed, sizes or Sizes())
            return parsed
    raise UnknownNameError(_unknown_key(key))


def activation_key(component: str, layer: int | None = None, head: int | None = None) -> str:
    """The key of easyroutine's for a component: the other way round.

    Args:
        component: Its name here.
        layer: The block, for components of a block.
        head: The **query** head, for components by heads.

    Raises:
        UnknownNameError: easyroutine has no key for that component.
        ConfigError: a layer or head is missing, or there is one too many.

    Example:
        >>> activation_key("block_output", 4), activation_key("attention_pattern", 3, 8)
        ('resid_out_4', 'pattern_L3H8')
    """
    component = ALIASES.get(component, component)
    kind = next((kind for kind in KEY_KINDS if kind.component == component), None)
    if kind is None:
        names = {kind.component for kind in KEY_KINDS}
        near = get_close_matches(str(component), names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownNameError(
            f"easyroutine has no key for {component!r}.{hint}\nIt has keys for: {', '.join(sorted(names))}."
        )
    for name, value in (("layer", layer), ("head", head)):
        if ("{" + name + "}" in kind.template) != (value is not None):
            need = "needs a" if value is None else "has no"
            raise ConfigError(
                f"The key of {component!r}, {kind.template!r}, {need} {name}"
                f"{'' if value is None else f', and {name}={value} was given'}."
            )
    return str(ActivationKey(kind, layer, head))


def extraction_components(config: Any) -> tuple[str, ...]:
    """What an `ExtractionConfig` of easyroutine's asks for, as the `components` of `collect`.

    Projected heads are what `head_vectors` makes of the heads, and statistics of the last norm what `norm_statistics`
    makes of its input.

    Args:
        config: The configuration, or a mapping of its fields; fields that ask for nothing (`avg`, `attn_heads`) are
            arguments of `collect` and of those functions, and are passed over. Logits are asked for by default.

    Raises:
        UnknownNameError: a field that would ask for something, and is not known.

    Example:
        >>> extraction_components({"extract_resid_out": True, "extract_attn_pattern": True, "save_logits": False})
        ('block_output', 'attention_pattern')
    """
    fields = dict(config) if isinstance(config, Mapping) else dict(vars(config))
    asked = {name: value for name, value in fields.items() if name.startswith(("extract_", "save_"))}
    unknown = [name for name in asked if name not in EXTRACTION_FLAGS]
    if unknown:
        raise UnknownNameError(unknown_name("field", unknown[0], EXTRACTION_FLAGS, "of an ExtractionConfig"))
    asked.setdefault("save_logits", True)
    return tuple(dict.fromkeys(name for flag, name in EXTRACTION_FLAGS.items() if asked.get(flag)))


def key_value_head(head: int, sizes: Sizes) -> int:
    """The key-value head that a query head reads: `floor(head / (H / K))`.

    Raises:
        ConfigError: the sizes do not say how many heads of either kind there are.

    Example:
        >>> [key_value_head(head, Sizes(query_heads=4, key_value_heads=2)) for head in range(4)]
        [0, 0, 1, 1]
    """
    if not sizes.query_heads or not sizes.key_value_heads:
        raise ConfigError(
            f"Which keys and values query head {head} reads cannot be told: the model's config does not say how many"
            " heads it has. Name the component and its key-value head instead."
        )
    return head // (sizes.query_heads // sizes.key_value_heads)


def _check_range(key: ActivationKey, sizes: Sizes) -> None:
    if key.layer is not None and sizes.layers is not None and key.layer >= sizes.layers:
        raise LayerRangeError(
            f"Layer {key.layer} of {str(key)!r} is out of range: the model has layers 0 to {sizes.layers - 1}."
        )
    if key.head is not None and sizes.query_heads is not None and key.head >= sizes.query_heads:
        raise LocationRangeError(
            f"Head {key.head} of {str(key)!r} is out of range: the model has query heads 0 to"
            f" {sizes.query_heads - 1}, and keys always count these."
        )


def _unknown_key(key: str) -> str:
    """The message for a key that no row has: the nearest with the same numbers, and how keys are written."""
    layer, head, *_ = [*re.findall(r"\d+", key), "0", "0"]
    written = [kind.template.format(layer=layer, head=head) for kind in KEY_KINDS]
    near = get_close_matches(key, written, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    also = ""
    if key.replace("-", "_") == "input_ids":
        also = " Token ids are what you give the model, not an activation of it."
    allowed = ", ".join(kind.template for kind in KEY_KINDS)
    return f"Unknown activation key {key!r}.{also or hint}\nKeys are written: {allowed}."
