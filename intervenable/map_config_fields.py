"""Reading the fields of configs: what their names mean, with the configs inside of configs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from model_maps.sizes import HEAD_DIM, HIDDEN, QUERY_HEADS

ROLES: Mapping[str, str] = {
    "hidden": """embed_dim embedding_dim embedding_size word_embed_proj_dim input_embedding_size
        output_embedding_size lru_width attention_hidden_size backbone_hidden_size decoder_hidden_size
        encoder_hidden_size hidden_channels text_embed_dim projection_dim hidden_size_global vision_hidden_size
        vq_embed_dim ple_embed_dim out_hidden_size vision_output_dim projector_input_dim projector_output_dim
        cross_attention_hidden_size conv_dim_out decoder_input_dim pooler_hidden_size text_hidden_size
        image_feature_size d_embed feature_size output_dim num_pos_feats upsample_groups
        vit_dim patch_embeds_hidden_size pred_hidden_size pooler_output_size
        coordinate_size shape_size""",
    "mlp": """intermediate_size ffn_dim ffn_hidden_size d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim d_inner
        feed_forward_size mlp_dim n_inner moe_intermediate_size shared_expert_intermediate_size
        expert_ffn_hidden_size intermediate_size_mlp shared_intermediate_size dense_intermediate_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size speech_encoder_intermediate_size
        text_config_intermediate_size bottleneck_dim intermediate_ff_dim hidden_mlp_size
        block_ff_dim conv_mlp_size projector_hidden_size ff_dim
        alignment_intermediate_size mit_intermediate_size projection_hidden_dim""",
    "layers": """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks
        num_layers_per_stack encoder_layers num_encoder_layers depth conf_num_hidden_layers num_global_layers
        vision_depth speech_encoder_layers audio_depth num_hidden_groups layers encoder_num_hidden_layers
        decoder_num_hidden_layers l_layers x_layers r_layers num_spatial_layers num_temporal_layers
        pred_num_hidden_layers num_self_attends_per_block""",
    "experts": "num_experts n_routed_experts num_local_experts moe_num_experts",
    "chosen_experts": """num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts
        n_activated_experts""",
    "groups": "n_group topk_group num_expert_group",
    "linear_width": "linear_key_head_dim linear_value_head_dim linear_head_dim",
    "linear_heads": "linear_num_heads linear_num_key_heads linear_num_value_heads",
    "length": """max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length
        max_target_positions max_source_positions original_max_position_embeddings max_sequence_length
        num_position_embeddings max_2d_position_embeddings""",
    "window": """sliding_window attention_window_size window_size local_attention sliding_window_size
        keep_window_size attention_chunk_size local_attention_window_len attention_window local_radius
        global_block_size""",
    "latent": "q_lora_rank kv_lora_rank o_lora_rank swa_q_lora_rank swa_kv_lora_rank",
}
WIDTHS_OF_STAGES = ("hidden_sizes", "_channels", "_channel_list", "embed_dim", "_dim_per_stage")
"""How names of lists end that have the width of each stage of a tower."""

LATENT_WIDTHS = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
ROLE_OF = {
    **{name: role for role, names in ROLES.items() for name in names.split()},
    **dict.fromkeys(HIDDEN, "hidden"),
    **dict.fromkeys((*HEAD_DIM, *LATENT_WIDTHS), "head_width"),
    **dict.fromkeys(
        ("qk_head_dim", "global_head_dim", "swa_head_dim", "cross_head_dim", "dim_head"), "head_width"
    ),
    "hidden_dim": "hidden",
}
HEADS = (
    *QUERY_HEADS,
    "encoder_attention_heads",
    "decoder_attention_heads",
    "attention_heads",
    "num_encoder_attention_heads",
    "num_decoder_attention_heads",
    "nhead",
)


def parts_of(config: Any) -> Iterator[Any]:
    """A config and all configs inside it."""
    yield config
    for value in vars(config).values():
        if is_config(value):
            yield from parts_of(value)


def field_of(config: Any, name: str) -> Any:
    """The value of a field; None where the config has none. Of one that differs between layers the usual value."""
    try:
        return getattr(config, name, None)
    except Exception:  # such fields refuse to be read, in ways of their own
        return vars(config).get(name)


def layer_overrides(config: Any) -> dict[int, dict[str, Any]]:
    """Layer -> fields that have another value there."""
    if not field_of(config, "is_heterogeneous"):
        return {}
    return {
        int(layer): dict(fields) for layer, fields in config.to_dict().get("per_layer_config", {}).items()
    }


def layers_of(config: Any) -> int | None:
    """How many layers the stack of one config has."""
    return first_number(config, tuple(ROLES["layers"].split()))


def is_config(value: object) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "model_type")


def first_number(config: Any, names: Sequence[str]) -> int | None:
    return next((value for name in names if is_number(value := field_of(config, name))), None)


def is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def number_stated(parts: Iterable[Any], *names: str) -> int | None:
    """The first number that parts of a config state under one of some names; of several numbers the first.

    Args:
        parts: Configs, the one that is asked first in front.
        names: The names, the one that is looked for first in front.

    Example:
        >>> from types import SimpleNamespace
        >>> number_stated([SimpleNamespace(size=None), SimpleNamespace(size=(8, 6))], "width", "size")
        8
    """
    for part in parts:
        for name in names:
            value = field_of(part, name)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if is_number(value):
                return int(value)
    return None


def sides_stated(parts: Iterable[Any], *names: str) -> tuple[int, int] | None:
    """Height and width of the pictures that parts of a config state, as `number_stated` finds them.

    Example:
        >>> from types import SimpleNamespace
        >>> sides_stated([SimpleNamespace(size=(32, 128))], "size"), sides_stated([SimpleNamespace(size=8)], "size")
        ((32, 128), (8, 8))
    """
    for part in parts:
        for name in names:
            value = field_of(part, name)
            both = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, value)
            if all(map(is_number, both)):
                return int(both[0]), int(both[1])
    return None
