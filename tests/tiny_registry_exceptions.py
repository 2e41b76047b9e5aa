"""Fields of single types that the rules of `tiny_registry_fields` would get wrong; and what cannot be built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiny_registry_fields import HIDDEN, MLP

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class PerLayer:
    """A list with an entry for each layer: these, over and over."""

    kinds: Sequence[Any]

    def of(self, layers: int) -> list[Any]:
        return (list(self.kinds) * layers)[:layers]


_SECTIONS_OF_4 = {**_ROTARY, "mrope_section": [2, 1, 1]}

_STATE_AND_ATTENTION = PerLayer(("linear_attention", "full_attention"))

_TWO_STAGES = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": HIDDEN,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}

EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"num_hidden_layers": 4, "num_attention_heads": 4},
    "cohere_compass_text": {
        "layer_types": PerLayer(("sliding_attention", "full_attention")),
        "rope_parameters": {"sliding_attention": _ROTARY, "full_attention": None},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        # One chosen expert would always have the weight 1.
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {
        "num_key_value_heads": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_kv_lora_rank": 16,
        "swa_q_lora_rank": 24,
        "swa_qk_nope_head_dim": 8,
        "swa_qk_rope_head_dim": 4,
        "swa_v_head_dim": 10,
        "swa_head_dim": 12,
    },
    "gemma3n_text": {
        "intermediate_size": PerLayer((MLP,)),
        "activation_sparsity_pattern": PerLayer((0.0,)),
    },
    "gemma4_text": {"global_head_dim": 32},
    "gemma4_unified_text": {"global_head_dim": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": _STATE_AND_ATTENTION},
    "hrm_text": {
        "num_hidden_layers": 2,
        "num_layers_per_stack": None,
        "H_cycles": 2,
        "L_cycles": 2,
        "L_bp_cycles": [2, 2],
    },
    "hunyuan_v1_dense": {"rope_parameters": _ROTARY, "head_dim": 16},
    "hunyuan_v1_moe": {
        "rope_parameters": _ROTARY,
        "head_dim": 16,
        "num_experts": 4,
        "moe_topk": 2,
    },
    "lfm2_moe": {"layer_types": PerLayer(("conv", "full_attention"))},
    "longcat_flash": {
        "num_key_value_heads": 4,
        "head_dim": 4,
        "num_layers": 2,
        "num_hidden_layers": 4,
    },
    "ministral": {"rope_parameters": _ROTARY, "head_dim": 16, "num_key_value_heads": 2},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [],
    },
    "align_vision_model": {"width_coefficient": 0.025, "depth_coefficient": 1.0},
    "bit": {"num_groups": 4, "image_size": 64},
    "convnext": {"patch_size": 4, "image_size": 64},
    "convnextv2": {"patch_size": 4, "image_size": 64},
    "audio-spectrogram-transformer": {"max_length": 64, "num_mel_bins": 24},
    "chameleon": {
        "vocabulary_map": {"<image>": 100, "IMGIMGA": 101},
        "vq_config.resolution": 32,
    },
    "dia": {"delay_pattern": [0, 1, 2]},
    "cvt": {"depth": (1, 2, 3)},
    "efficientnet": {"width_coefficient": 0.025, "depth_coefficient": 1.0},
    "florence_vision": {"projection_dim": 32},
    "fun_asr_nano": {"adaptor_config.intermediate_size": 8},
    "granite_speech5_encoder": {"context_size": 8},
    "hgnet_v2": {
        "stem_channels": (3, 16, 32),
        "stage_in_channels": (32, 32, 32, 32),
        "stage_mid_channels": (16, 16, 16, 16),
        "stage_out_channels": (32, 32, 32, 32),
        "stage_numb_of_layers": (2, 2, 2, 2),
    },
    "hiera": {"image_size": (64, 64), "num_heads": (1, 2, 4, 8)},
    "janus": {"vq_config.channel_multiplier": [1, 1], "vq_config.num_res_blocks": 1},
    "kosmos-2": {"latent_query_num": 4},
    "levit": {"image_size": 128, "patch_size": 16},
    "mobilevit": {"image_size": 128, "patch_size": 2},
    "mobilevitv2": {"image_size": 64, "patch_size": 2, "width_multiplier": 0.25},
    "qwen2_vl_text": {"rope_parameters": _SECTIONS_OF_4},
    "qwen2_5_vl_text": {"rope_parameters": _SECTIONS_OF_4},
    "qwen2_5_omni_text": {"rope_parameters": _SECTIONS_OF_4},
    "glm4v_text": {"rope_parameters": _SECTIONS_OF_4},
    "glm_ocr_text": {"rope_parameters": _SECTIONS_OF_4},
    "glm4v_moe_text": {
        "rope_parameters": {
            **_ROTARY,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "paddleocr_vl_text": {"rope_parameters": {**_ROTARY, "mrope_section": [4, 2, 2]}},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [MLP, 16],
        "rope_parameters": {**_ROTARY, "mrope_section": [1, 1, 2]},
    },
    "encoder-decoder": {
        "decoder.is_decoder": True,
        "decoder.add_cross_attention": True,
    },
    "speech-encoder-decoder": {
        "decoder.is_decoder": True,
        "decoder.add_cross_attention": True,
    },
    "vision-encoder-decoder": {
        "decoder.is_decoder": True,
        "decoder.add_cross_attention": True,
    },
    "swin": _TWO_STAGES,
    "donut-swin": _TWO_STAGES,
    "swinv2": {"image_size": 64, "patch_size": 4, "num_heads": (2, 4, 8, 8)},
    "textnet": {"stem_out_channels": HIDDEN, "image_size": (64, 64), "hidden_sizes": [HIDDEN] * 5},
    "internvl_vision": {"image_size": (32, 32), "patch_size": (8, 8)},
    "qianfan_ocr_vision": {"image_size": (32, 32), "patch_size": (8, 8)},
    "qwen2_5_vl_vision": {"window_size": 32},  # in pixels
    "exaone4_5_vision": {"window_size": 32},
    "qwen2_5_omni_vision_encoder": {"window_size": 32},
    "wav2vec2-bert": {"vocab_size": 160},
    "wav2vec2-conformer": {"vocab_size": 160},
    "esm": {"vocab_size": 160, "pad_token_id": 1, "mask_token_id": 2},
    "molmo2": {"adapter_config.vision_feature_layer": [1, 0]},
    "deepseek_ocr2_text": {"mlp_layer_types": PerLayer(("dense", "sparse")), "num_experts_per_tok": 2},
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100, "image_token_index": 100},
    "glm5_next_text": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "qk_head_dim": 8, "index_kpool": 2},
    "deepseek_ocr2_sam_vision_model": {"global_attn_indexes": (1,)},
    "unlimited_ocr_sam_vision_model": {"global_attn_indexes": (1,)},
    "pp_formulanet_vision": {
        "global_attn_indexes": (1,),
        "post_conv_out_channels": HIDDEN,
        "image_size": 64,  # of a smaller one a single position is left for the decoder
    },
    "diffusion_gemma_text": {
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 16,
    },
    "emu3": {
        "vq_config.base_channels": 32,
        "vq_config.num_res_blocks": 1,
        "pad_token_id": 0,
        "vocabulary_map": {
            "<image>": 100,
            "<|visual token 000000|>": 101,
            "<|visual token 000001|>": 102,
        },
    },
    "hunyuan_vl_text": {"rope_parameters": {**_ROTARY, "xdrope_section": [1, 1, 1, 1]}, "head_dim": 8},
    "mistral4": {
        "num_key_value_heads": 4,
        "head_dim": 4,
        "rope_parameters": {**_ROTARY, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 32},
    },
    "muse_spark": {"audio_config.num_hidden_layers": 4},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "step3p7": {"text_config.sliding_window": 4},
    "moonshine": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "blip_2_qformer": {"cross_attention_frequency": 1},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "vision_config.hidden_size": 64,
        "qformer_config.encoder_hidden_size": 64,
        "deepstack_layer_map": [[0, 1], [1, 2]],
        "spatial_target_layers": [0, 1, 2, 3],
        "image_grid_pinpoints": [[32, 64], [64, 32]],
    },
    "perceiver": {
        "image_size": 8,
        "max_position_embeddings": 7,
        "train_size": (32, 32),
    },
    "shieldgemma2": {"yes_token_index": 40, "no_token_index": 41},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": PerLayer(("linear_attention", "hybrid")),
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
}
"""Fields of single types that the rules would get wrong."""

UNBUILDABLE = {
    "dots3_note": "its config wants a tower for sound that fits",
    "gemma3n": "it needs timm",
    "gemma4_assistant": "it is half of a model",
    "gemma4_unified_assistant": "it is half of a model",
    "xlstm": "its code fails on states of this size",
}
"""Types that are registered and that no tiny model is made of, and why."""

UNBUILDABLE_FOR: Mapping[str, Mapping[str, str]] = {
    "causal-lm": UNBUILDABLE,
    "masked-lm": {},
    "seq2seq-lm": {"voxtral_realtime": "its sounds have to go on in step with its text"},
    "image-text-to-text": {
        "fast_vlm": "it needs timm",
        "gemma3n": "it needs timm",
        "perception_lm": "it needs timm",
        "pi0": "it moves a robot: it needs states and actions and has no logits",
    },
    "image-classification": {
        "dinat": "it needs natten",
        "timm_wrapper": "it needs timm",
    },
    "zero-shot": {
        "align": "no tiny config is known that it runs with",
        "blip-2": "its query tower needs fields that another task's model must not have",
    },
    "audio-classification": {},
    "ctc": {},
    "speech-seq2seq": {"voxtral_realtime": "its sounds have to go on in step with its text"},
}
"""The same for each task."""
