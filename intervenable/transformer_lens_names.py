"""The names that TransformerLens has for activations, and ours: one table, read both ways.

TransformerLens has two styles. `"hooked"` are the names that its users write, `blocks.3.hook_resid_pre`; its bridge
knows them too. `"bridge"` are the names of the bridge's own hook points, `blocks.3.hook_in`. Names are those of the
model's own numbers: no weights are folded or centred here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from model_maps import ALIASES, COMPONENTS

Style = Literal["hooked", "bridge"]
"""`"hooked"`: `blocks.3.hook_resid_pre`; `"bridge"`: `blocks.3.hook_in`."""


@dataclass(frozen=True, slots=True)
class HookName:
    """One row of the table: a component, and what TransformerLens calls it in each style."""

    component: str
    """Our name."""

    hooked: str
    """The name in the style "hooked", without `blocks.<layer>.`; "" where there is no such hook."""

    bridge: str
    """The name in the style "bridge", likewise."""

    def in_style(self, style: Style) -> str:
        """The name in one style."""
        return self.hooked if style == "hooked" else self.bridge


HOOK_NAMES: tuple[HookName, ...] = (
    HookName("embedding_output", "hook_embed", "embed.hook_out"),
    HookName("block_input", "hook_resid_pre", "hook_in"),
    HookName("block_mid", "hook_resid_mid", "ln2.hook_in"),
    HookName("block_output", "hook_resid_post", "hook_out"),
    HookName("attention_input", "", "attn.hook_in"),
    HookName("head_query_output", "attn.hook_q", "attn.q.hook_out"),
    HookName("head_key_output", "attn.hook_k", "attn.k.hook_out"),
    HookName("head_value_output", "attn.hook_v", "attn.v.hook_out"),
    HookName("rotary_query", "attn.hook_rot_q", "attn.hook_rot_q"),
    HookName("rotary_key", "attn.hook_rot_k", "attn.hook_rot_k"),
    HookName("attention_scores_masked", "attn.hook_attn_scores", "attn.hook_attn_scores"),
    HookName("attention_pattern", "attn.hook_pattern", "attn.hook_pattern"),
    HookName("head_attention_value_output", "attn.hook_z", "attn.o.hook_in"),
    HookName("head_attention_output", "attn.hook_result", "attn.hook_result"),
    HookName("attention_output", "", "attn.hook_out"),
    HookName("attention_contribution", "hook_attn_out", "hook_attn_out"),
    HookName("mlp_input", "", "mlp.hook_in"),
    HookName("mlp_pre_activation", "mlp.hook_pre", "mlp.hook_pre"),
    HookName("mlp_hidden", "mlp.hook_post", "mlp.out.hook_in"),
    HookName("mlp_output", "", "mlp.hook_out"),
    HookName("mlp_contribution", "hook_mlp_out", "hook_mlp_out"),
    HookName("final_norm_input", "", "ln_final.hook_in"),
    HookName("final_norm_output", "", "ln_final.hook_out"),
    HookName("final_norm_scale", "ln_final.hook_scale", "ln_final.hook_scale"),
    HookName("logits", "hook_unembed", "unembed.hook_out"),
)
"""Every component that TransformerLens has a name for."""

_OTHER_NAMES: Mapping[str, str] = {
    "ln1_post.hook_in": "attention_output",
    "ln1_post.hook_out": "attention_contribution",
    "ln2_post.hook_in": "mlp_output",
    "ln2_post.hook_out": "mlp_contribution",
}
"""More names of the bridge's that mean one component alone."""

_PER_HEAD_INPUT = (
    "the residual stream before its norm, copied for each head, which no module here is given. Patch the path from"
    " one head into another with get_act_patch_direct_path"
)
_POSITIONS = (
    "the position embedding, which is no component here: take its path, such as 'transformer.wpe.output'"
)
_NORMALIZED = "what a norm computes before its weight and bias. What comes out of the norm is {!r}"

_NO_COMPONENT: Mapping[str, str] = {
    "hook_pos_embed": _POSITIONS,
    "pos_embed.hook_out": _POSITIONS,
    "hook_attn_in": _PER_HEAD_INPUT,
    "hook_q_input": _PER_HEAD_INPUT,
    "hook_k_input": _PER_HEAD_INPUT,
    "hook_v_input": _PER_HEAD_INPUT,
    "attn.hook_attn_in": _PER_HEAD_INPUT,
    "attn.hook_q_input": _PER_HEAD_INPUT,
    "attn.hook_k_input": _PER_HEAD_INPUT,
    "attn.hook_v_input": _PER_HEAD_INPUT,
    "attn.hook_hidden_states": "the attention output once more. It is 'attention_output'",
    "hook_mlp_in": "the MLP's own copy of the residual stream before its norm. The stream there is 'block_mid',"
    " what the MLP is given is 'mlp_input'",
    "ln1.hook_scale": "the divisor of a norm inside a block; only the last norm's is here, 'final_norm_scale'",
    "ln2.hook_scale": "the divisor of a norm inside a block; only the last norm's is here, 'final_norm_scale'",
    "ln1.hook_normalized": _NORMALIZED.format("attention_input"),
    "ln2.hook_normalized": _NORMALIZED.format("mlp_input"),
    "ln_final.hook_normalized": _NORMALIZED.format("final_norm_output"),
    "ln1.hook_out": "the output of a norm that attention and MLP share in some models. For one of them alone it is"
    " 'attention_input' ('attn.hook_in')",
    "ln2.hook_out": "the output of a norm. What the MLP is given is 'mlp_input' ('mlp.hook_in')",
    "ln1.hook_in": "what the first norm is given: 'block_input' ('hook_resid_pre') in most models",
    "mlp.hook_pre_linear": "the up projection of a gated MLP, which is no component here: take the module path,"
    " such as 'model.layers[3].mlp.up_proj.output'",
    "mlp.hook_mid": "a step of SoLU MLPs, which no mapped model has",
    "mlp.in.hook_out": "another thing in plain and in gated MLPs. Say 'mlp.hook_pre' or 'mlp.hook_pre_linear'",
    "mlp.gate.hook_out": "the gate of a gated MLP, and the router of a mixture of experts. Say 'mlp.hook_pre', or"
    " take 'router_output'",
    "mlp.hook_router_scores": "the weights of the chosen experts, in some models alone. The router's logits are"
    " 'router_output'",
    "mlp.hook_expert_weights": "the weights of the experts after the choice among them. The router's logits are"
    " 'router_output'",
    "mlp.hook_expert_indices": "which experts were chosen, which is no activation. The router's logits are"
    " 'router_output'",
}
"""Hooks that are no component here, and what they hold: the end of a sentence."""

_NORM_HOOKS = "hook_scale, hook_normalized and hook_out"

_NO_HOOK: Mapping[str, str] = {
    "attention_input": f"The norm's own hooks are {_NORM_HOOKS} of ln1. In the style 'bridge' it is 'attn.hook_in'",
    "mlp_input": f"The norm's own hooks are {_NORM_HOOKS} of ln2. In the style 'bridge' it is 'mlp.hook_in'",
    "final_norm_input": "It is hook_resid_post of the last block. In the style 'bridge' it is 'ln_final.hook_in'",
    "final_norm_output": "Its hook_normalized comes before weight and bias. In the style 'bridge' it is"
    " 'ln_final.hook_out'",
    "attention_output": "Its hook_attn_out is what is added to the stream, after a post-norm if there is one:"
    " 'attention_contribution'. In the style 'bridge' it is 'attn.hook_out'",
    "mlp_output": "Its hook_mlp_out is what is added to the stream, after a post-norm if there is one:"
    " 'mlp_contribution'. In the style 'bridge' it is 'mlp.hook_out'",
    "query_output": "It has queries by heads: 'head_query_output'",
    "key_output": "It has keys by heads: 'head_key_output'",
    "value_output": "It has values by heads: 'head_value_output'",
    "attention_value_output": "It has them by heads: 'head_attention_value_output'",
    "attention_scores": "Its scores are those with masked entries as they are: 'attention_scores_masked'",
    "expanded_head_key": "Shared heads are not repeated there: 'head_key_output' or 'rotary_key'",
    "expanded_head_value": "Shared heads are not repeated there: 'head_value_output'",
    "mlp_activation": "Its hook_post is gate times up in gated MLPs: 'mlp_hidden'; in plain ones the two are equal",
    "router_input": "It has hooks in the router of some models alone",
    "router_output": "It has hooks in the router of some models alone",
    "expert_input": "It has no hooks between router and experts",
    "expert_output": "It has no hooks between experts and MLP output",
}
"""Why a component has no name, in one style or in both."""

_BY_COMPONENT = {row.component: row for row in HOOK_NAMES}
_BY_NAME = {name: row.component for row in HOOK_NAMES for name in (row.hooked, row.bridge) if name}
_BY_NAME |= _OTHER_NAMES
_IN_A_BLOCK = re.compile(r"blocks\.(?P<layer>\d+)\.(?P<rest>.+)")


def tl_name(component: str, layer: int | None = None, style: Style = "hooked") -> str:
    """What TransformerLens calls a component: `blocks.3.hook_resid_pre`.

    Args:
        component: Our name.
        layer: The block, counted from 0; None for what a model has once.
        style: `"hooked"` for the names its users know, `"bridge"` for those of the bridge's own hook points.

    Raises:
        UnknownNameError: no such component, or TransformerLens has no hook there; the message says why.
        ConfigError: a layer where there is none, none where there is one, or one counted from the end.

    Example:
        >>> tl_name("block_input", 3), tl_name("head_attention_value_output", 3, "bridge")
        ('blocks.3.hook_resid_pre', 'blocks.3.attn.o.hook_in')
    """
    if style not in get_args(Style):
        raise UnknownNameError(unknown_name("style", style, get_args(Style)))
    known = ALIASES.get(component, component)
    if known not in COMPONENTS:
        raise UnknownNameError(
            unknown_name(
                "component", component, [*COMPONENTS, *ALIASES], "with a TransformerLens name", _BY_COMPONENT
            )
        )
    row = _BY_COMPONENT.get(known)
    name = "" if row is None else row.in_style(style)
    if not name:
        raise UnknownNameError(
            f"{component!r} has no name in the style {style!r} of TransformerLens."
            f" {_NO_HOOK.get(known, 'Its names speak of models of one stack')}."
        )
    return name if COMPONENTS[known].scope == "model" and _no_layer(component, layer) else _in(layer, name)


def from_tl_name(name: str) -> tuple[str, int | None]:
    """Our component and layer for a hook of TransformerLens: the inverse of `tl_name`, for both styles.

    Short names are read too, as `get_act_name` reads them.

    Raises:
        UnknownNameError: no such hook, or one that is no component here; the message says what it holds.

    Example:
        >>> from_tl_name("blocks.3.hook_in"), from_tl_name("blocks.0.attn.hook_z"), from_tl_name("k6")
        (('block_input', 3), ('head_attention_value_output', 0), ('head_key_output', 6))
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"{name!r} is no name of a hook: give one such as 'blocks.3.hook_resid_pre'.")
    full = name if _is_full(name) else get_act_name(name)
    found = _IN_A_BLOCK.fullmatch(full)
    rest = full if found is None else found["rest"]
    layer = None if found is None else int(found["layer"])
    component = _BY_NAME.get(rest)
    scope = "model" if layer is None else "block"
    if component is not None and COMPONENTS[component].scope == scope:
        return component, layer
    if component is not None:
        where = "in every block: 'blocks.<layer>." if layer is None else "outside the blocks: '"
        raise UnknownNameError(f"{name!r} names no hook: {rest!r} is {where}{rest}'.")
    if rest in _NO_COMPONENT:
        raise UnknownNameError(
            f"{name!r} has no counterpart among our components: it is {_NO_COMPONENT[rest]}."
        )
    here = [one for one, component in _BY_NAME.items() if COMPONENTS[component].scope == scope]
    start = "" if layer is None else f"blocks.{layer}."
    raise UnknownNameError(unknown_name("hook", name, [start + one for one in here]))


def _is_full(name: str) -> bool:
    return "." in name or name.startswith("hook_")


def _no_layer(component: str, layer: int | None) -> bool:
    if layer is not None:
        raise ConfigError(
            f"{component!r} is outside the blocks, so that it has no layer {layer}: leave it out."
        )
    return True


def _in(layer: object, rest: str) -> str:
    """A name inside a block."""
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        raise ConfigError(
            f"layer={layer!r} makes no name of {rest!r}: give the number of the block, counted from 0."
        )
    return f"blocks.{layer}.{rest}"


# --- short names ------------------------------------------------------------------------------------------

_SAME_NAME: Mapping[str, str] = {
    "attn": "pattern",
    "attn_logits": "attn_scores",
    "key": "k",
    "query": "q",
    "value": "v",
    "mlp_pre": "pre",
    "mlp_mid": "mid",
    "mlp_post": "post",
}
_SAME_TYPE: Mapping[str, str] = {
    "a": "attn",
    "attention": "attn",
    "m": "mlp",
    "b": "",
    "block": "",
    "blocks": "",
}
_IN_ATTENTION = ("k", "v", "q", "z", "rot_k", "rot_q", "result", "pattern", "attn_scores")
_IN_MLP = ("pre", "post", "mid", "pre_linear")
_IN_NORMS = ("scale", "normalized")
_IN_ANY = ("in", "out")
_OF_BLOCKS = (
    *("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"),
    *("attn_in", "mlp_in", "q_input", "k_input", "v_input"),
)
_OF_THE_MODEL = ("embed", "pos_embed", "unembed")
_SHORT = (*_IN_ATTENTION, *_IN_MLP, *_IN_NORMS, *_IN_ANY, *_OF_BLOCKS, *_OF_THE_MODEL)
_NORMS = ("ln1", "ln2", "ln1_post", "ln2_post", "ln_final")
_TYPES = ("", "attn", "mlp", *_NORMS)
_WITH_NUMBER = re.compile(r"(?P<name>[a-z_]+?)(?P<layer>\d+)(?P<type>[a-z].*)?")


def get_act_name(name: str, layer: int | None = None, layer_type: str | None = None) -> str:
    """The full TransformerLens name for a short one: `("k", 6, "a")` or `"k6"` is `blocks.6.attn.hook_k`.

    Reads what `transformer_lens.utils.get_act_name` reads, and refuses what would name no hook.

    Args:
        name: A short name; with the layer and the type written after it, `"scale4ln1"`; or a full name, which is
            given back.
        layer: The block. Without one what stands inside blocks is named as it is in each of them.
        layer_type: `"attn"`, `"mlp"`, `"ln1"`, `"ln2"`, `"ln_final"`, or `"a"`, `"m"`, `"b"`. Only norms need it.

    Raises:
        UnknownNameError: no such name or type.
        ConfigError: a layer that is none, that stands in the name too, or where there is none.

    Example:
        >>> get_act_name("k", 6, "a"), get_act_name("pre5"), get_act_name("scale4ln1"), get_act_name("normalized")
        ('blocks.6.attn.hook_k', 'blocks.5.mlp.hook_pre', 'blocks.4.ln1.hook_scale', 'ln_final.hook_normalized')
    """
    if not isinstance(name, str):
        raise UnknownNameError(f"{name!r} is no name of an activation: give one such as 'resid_pre'.")
    if _is_full(name) and layer is None and layer_type is None:
        return name
    with_number = _WITH_NUMBER.fullmatch(name)
    if with_number is not None:
        if layer is not None or layer_type is not None:
            given = f"layer={layer!r}" if layer is not None else f"layer_type={layer_type!r}"
            raise ConfigError(f"{name!r} says the layer itself: leave out {given}.")
        name, layer, layer_type = with_number["name"], int(with_number["layer"]), with_number["type"]
    short = _SAME_NAME.get(name, name)
    if short not in _SHORT:
        raise UnknownNameError(
            unknown_name("activation", name, [*_SHORT, *_SAME_NAME], "of TransformerLens", _SHORT)
        )
    kind = _SAME_TYPE.get(layer_type or "", layer_type or "")
    if kind not in _TYPES:
        raise UnknownNameError(
            unknown_name("layer_type", layer_type, [*_TYPES[1:], *_SAME_TYPE], "of TransformerLens")
        )
    rest = f"{_place(short, kind, layer)}hook_{short}"
    if short in _OF_THE_MODEL or rest.startswith("ln_final."):
        _no_layer(name, layer)
        return rest
    return rest if layer is None else _in(layer, rest)


def _place(short: str, kind: str, layer: int | None) -> str:
    """The module a hook is in, with a point behind it."""
    if short in _IN_ATTENTION:
        return "attn."
    if short in _IN_MLP:
        return "mlp."
    if short in _IN_NORMS:
        norm = kind or ("ln_final" if layer is None else "")
        if norm not in _NORMS:
            raise UnknownNameError(
                f"{short!r} belongs to a norm, and layer_type={kind or None!r} is none. Give one of"
                f" {_listed(_NORMS[:-1])}; without a layer it is that of ln_final."
            )
        return f"{norm}."
    if kind and short not in _IN_ANY:
        raise UnknownNameError(f"{short!r} is not inside {kind!r}: leave layer_type out.")
    return f"{kind}." if kind else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
