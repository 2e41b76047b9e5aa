"""Patching: what becomes of a model's answer when activations of another run are put into it.

`sweep` patches every layer, token or head in turn; `attribution_patch` estimates from gradients what it would find;
`noised` blurs tokens; `compare_patched` compares whole answers for a few patches.
TransformerLens' functions are here by their names, `get_act_patch_resid_pre` and so on, direct paths among them.
"""

from __future__ import annotations

from intervenable.attribution import attribution_patch
from intervenable.comparing import PatchingComparison, compare_patched
from intervenable.generic_patching import (
    PatchSetter,
    generic_activation_patch,
    layer_head_dest_src_pos_pattern_patch_setter,
    layer_head_pattern_patch_setter,
    layer_head_pos_pattern_patch_setter,
    layer_head_vector_patch_setter,
    layer_pos_head_vector_patch_setter,
    layer_pos_patch_setter,
)
from intervenable.noising import noised
from intervenable.path_patching import get_act_patch_direct_path, get_act_patch_direct_path_all_sources
from intervenable.sweep_result import SweepResult
from intervenable.sweeping import sweep
from intervenable.transformer_lens_every import (
    get_act_patch_attn_head_all_pos_every,
    get_act_patch_attn_head_by_pos_every,
    get_act_patch_block_every,
)
from intervenable.transformer_lens_names import from_tl_name, get_act_name, tl_name
from intervenable.transformer_lens_patching import (
    get_act_patch_attn_head_k_all_pos,
    get_act_patch_attn_head_k_by_pos,
    get_act_patch_attn_head_out_all_pos,
    get_act_patch_attn_head_out_by_pos,
    get_act_patch_attn_head_pattern_all_pos,
    get_act_patch_attn_head_pattern_by_pos,
    get_act_patch_attn_head_pattern_dest_src_pos,
    get_act_patch_attn_head_q_all_pos,
    get_act_patch_attn_head_q_by_pos,
    get_act_patch_attn_head_v_all_pos,
    get_act_patch_attn_head_v_by_pos,
    get_act_patch_attn_out,
    get_act_patch_mlp_out,
    get_act_patch_resid_mid,
    get_act_patch_resid_pre,
)
from intervenable.transformer_lens_rows import make_df_from_ranges
from intervenable.wave_learning import forget

__all__ = [
    "PatchSetter",
    "PatchingComparison",
    "SweepResult",
    "attribution_patch",
    "compare_patched",
    "forget",
    "from_tl_name",
    "generic_activation_patch",
    "get_act_name",
    "get_act_patch_attn_head_all_pos_every",
    "get_act_patch_attn_head_by_pos_every",
    "get_act_patch_attn_head_k_all_pos",
    "get_act_patch_attn_head_k_by_pos",
    "get_act_patch_attn_head_out_all_pos",
    "get_act_patch_attn_head_out_by_pos",
    "get_act_patch_attn_head_pattern_all_pos",
    "get_act_patch_attn_head_pattern_by_pos",
    "get_act_patch_attn_head_pattern_dest_src_pos",
    "get_act_patch_attn_head_q_all_pos",
    "get_act_patch_attn_head_q_by_pos",
    "get_act_patch_attn_head_v_all_pos",
    "get_act_patch_attn_head_v_by_pos",
    "get_act_patch_attn_out",
    "get_act_patch_block_every",
    "get_act_patch_direct_path",
    "get_act_patch_direct_path_all_sources",
    "get_act_patch_mlp_out",
    "get_act_patch_resid_mid",
    "get_act_patch_resid_pre",
    "layer_head_dest_src_pos_pattern_patch_setter",
    "layer_head_pattern_patch_setter",
    "layer_head_pos_pattern_patch_setter",
    "layer_head_vector_patch_setter",
    "layer_pos_head_vector_patch_setter",
    "layer_pos_patch_setter",
    "make_df_from_ranges",
    "noised",
    "sweep",
    "tl_name",
]
