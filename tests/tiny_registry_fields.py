"""What the fields of configs mean, and small values for them: the data that tiny models are made by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN, MLP, HEADS, VOCABULARY, IMAGE_TOWER_LAYERS = 32, 48, 4, 160, 2

FIRST_SPECIAL = 100
"""Ids from here on are given to special tokens; the logits of some are -inf."""

TOKENS = (10, 90)
"""Where ids of example inputs lie."""

ROLES = {
    "hidden": """hidden_size d_model n_embd embed_dim emb_dim embedding_dim dim embedding_size word_embed_proj_dim
        input_embedding_size output_embedding_size lru_width attention_hidden_size backbone_hidden_size hidden_dim
        decoder_hidden_size encoder_hidden_size hidden_channels text_embed_dim projection_dim hidden_size_global
        vision_hidden_size vq_embed_dim ple_embed_dim cross_hidden_size audio_hidden_size text_hidden_size
        adapter_input_size adapter_in_dim adapter_out_dim d_latents downsample_hidden_size
        alignment_intermediate_size output_hidden_size
        projector_hidden_size projection_intermediate_size projection_hidden_dim conv_hidden_size
        moe_hidden_size post_conv_in_channels post_conv_mid_channels latent_channels image_token_embed_dim""",
    "mlp": """intermediate_size ffn_dim ffn_hidden_size d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim d_inner
        feed_forward_size mlp_dim n_inner moe_intermediate_size shared_expert_intermediate_size
        expert_ffn_hidden_size intermediate_size_mlp shared_intermediate_size dense_intermediate_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size speech_encoder_intermediate_size
        text_config_intermediate_size bottleneck_dim pooler_hidden_size intermediate_ff_dim hidden_mlp_size""",
    "heads": """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads conf_num_attention_heads
        swa_num_attention_heads index_n_heads num_query_groups nhead num_attn_heads linear_num_heads
        cross_num_attention_heads encoder_num_attention_heads num_self_attention_heads
        num_cross_attention_heads""",
    "key_value_heads": """num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads
        decoder_num_key_value_heads encoder_num_key_value_heads num_global_key_value_heads index_n_kv_heads
        cross_num_key_value_heads encoder_num_key_value_heads decoder_num_key_value_heads""",
    "head_width": """head_dim d_kv d_head kv_channels dim_head attention_head_size swa_head_dim attention_head_dim
        linear_head_dim global_head_dim cross_head_dim""",
    "layers": """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks
        num_layers_per_stack encoder_num_hidden_layers decoder_num_hidden_layers
        num_self_attends_per_block""",
    "encoder_layers": "encoder_layers num_encoder_layers",
    "tower_layers": """depth conf_num_hidden_layers num_global_layers vision_depth speech_encoder_layers
        audio_depth""",
    "experts": "num_experts n_routed_experts num_local_experts moe_num_experts",
    "chosen_experts": "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts",
    "groups": "n_group topk_group num_expert_group",
    "length": """max_position_embeddings n_positions n_ctx max_seq_len model_max_length context_length
        max_target_positions max_source_positions original_max_position_embeddings max_sequence_length
        num_position_embeddings""",
    "window": """sliding_window attention_window_size window_size local_attention sliding_window_size
        keep_window_size attention_chunk_size local_attention_window_len local_radius global_block_size""",
    "vocabulary": "decoder_vocab_size unpadded_vocab_size",
    "of_each_layer": """layer_types mlp_layer_types layers_block_type no_rope_layers attn_layers indexer_types
        num_attention_heads_per_layer layer_rope_theta mtp_layer_types block_types activation_sparsity_pattern""",
}
ROLE_OF = {name: role for role, names in ROLES.items() for name in names.split()}
SPECIAL_TOKEN = re.compile(r"(_token_id|_token_index|_index|_tokens?_ids?)$")
COUNTS_OF_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "depth",
)
TOWERS = ("vision", "audio", "encoder", "speech", "vq")

_NUMBERS = """
    latent attention: q_lora_rank=24 kv_lora_rank=16 qk_nope_head_dim=8 qk_rope_head_dim=4 qk_head_dim=12
        v_head_dim=10 o_lora_rank=16 o_groups=2 index_head_dim=16 index_topk=4 index_block_size=2
        index_topk_blocks=2
    state spaces: mamba_d_state=8 mamba_d_conv=4 mamba_expand=2 mamba_n_heads=4 mamba_d_head=16 mamba_n_groups=1
        mamba_chunk_size=4 mamba_d_ssm=64 state_size=8 expand=2 conv_kernel=4 time_step_rank=4 mamba_dt_rank=4
        ssm_state_size=8 mamba_num_heads=4 mamba_head_dim=16 n_groups=1 chunk_size=4 mamba_ngroups=1
        mamba_headdim=16 n_mamba_heads=4
    linear attention: linear_num_key_heads=2 linear_num_value_heads=4 linear_key_head_dim=8
        linear_value_head_dim=12 linear_conv_kernel_dim=4 short_conv_kernel_size=4 conv_L_cache=3
        block_multiple_of=8
    experts: n_shared_experts=1 num_shared_experts=1 moe_num_shared_experts=1 first_k_dense_replace=1
        num_dense_layers=1 router_hidden_size=16 zero_expert_num=2 moe_latent_size=16 moe_layer_end_index=3
        num_centroids=16 centroid_intermediate_top_k=4
    rotations and ranks: rotary_dim=4 query_pre_attn_scalar=16 adapter_rank=8 gated_norm_rank=8 laurel_rank=8
        vocab_size_per_layer_input=160 hidden_size_per_layer_input=16 hc_lowrank=8
    towers: image_size=32 patch_size=8 num_channels=3 spatial_merge_size=2 temporal_patch_size=2
        out_hidden_size=32 vision_output_dim=32 projector_input_dim=32 projector_output_dim=32
        output_channels=32 mm_tokens_per_image=4 num_mel_bins=80 prompt_length=4 prompt_types=4 segment_types=4
        max_2d_position_embeddings=64 qformer_hidden_size=32 num_query_tokens=4 image_feature_size=32
        base_channels=32 classifier_proj_size=32 num_codebooks=2 audio_vocab_size=160 codebook_size=32
    sounds: num_filters=2 codebook_dim=32 num_quantizers=2 upsample_groups=4 num_embeddings=32
        num_latents=8 img_max_token_num=64
    kinds of layers: no_rope_layer_interval=2 attn_layer_period=2 attn_layer_offset=1 attn_layer_interval=2
        layer_group_size=2 n_layers_per_attn_res_block=2 max_window_layers=2 rescale_every=2
        num_kv_shared_layers=0 num_nextn_predict_layers=0
    what few have: local_attn_chunk_length=8 lsh_attn_chunk_length=8 num_buckets=8 hash_seed=0 prompt_mid_dim=16
        block_size=4 num_random_blocks=1 attention_window=4 pronunciation_embed_dim=16 shape_embed_dim=16 d_rel=8
        rel_extent=16 ngram_vocab_size_base=200 make_ngram_vocab_size_divisible_by=8 split_ngram_parts=8
        ffn_round_up_to_multiple_of=8 encoder_hash_byte_group_vocab=64 max_seq_length=64 summary_hidden_size=32
"""
VALUES: Mapping[str, Any] = {
    **{name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", _NUMBERS)},
    "axial_pos_shape": (8, 8),
    "axial_pos_embds_dim": (16, 16),
    "mem_len": None,
}
"""Values of fields that are of one kind of model."""

OF_EACH_STAGE: Mapping[str, int] = {
    **dict.fromkeys(
        ("hidden_sizes", "embed_dim", "conv_dim", "tdnn_dim", "base_attn_unit_dims"),
        HIDDEN,
    ),
    **dict.fromkeys(("downsample_channels", "neck_hidden_sizes"), HIDDEN),
    **dict.fromkeys(("num_heads", "num_attention_heads"), HEADS),
    **dict.fromkeys(("depths", "depth", "num_block_repeats", "n_attn_blocks", "stage_num_blocks"), 2),
    "num_groups": 4,
    "key_dim": 8,
}
"""What stands in lists that have an entry for each stage."""
