"""Published models of many sizes and kinds, as their configs state them: on the meta device, without weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

PUBLISHED: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "Llama 3 70B": (
        "LlamaForCausalLM",
        {
            "hidden_size": 8192,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "num_hidden_layers": 80,
            "intermediate_size": 28672,
            "vocab_size": 128256,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "DeepSeek V3 671B": ("DeepseekV3ForCausalLM", {}),
    "Mixtral 8x22B": (
        "MixtralForCausalLM",
        {
            "hidden_size": 6144,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "num_hidden_layers": 56,
            "intermediate_size": 16384,
        },
    ),
    "Qwen3 235B": (
        "Qwen3MoeForCausalLM",
        {
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_hidden_layers": 94,
            "num_experts": 128,
            "moe_intermediate_size": 1536,
        },
    ),
    "Gemma 3 27B": (
        "Gemma3ForCausalLM",
        {
            "hidden_size": 5376,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "head_dim": 128,
            "num_hidden_layers": 62,
            "intermediate_size": 21504,
        },
    ),
    "Falcon 180B": (
        "FalconForCausalLM",
        {
            "hidden_size": 14848,
            "num_attention_heads": 232,
            "num_kv_heads": 8,
            "num_hidden_layers": 80,
            "new_decoder_architecture": True,
        },
    ),
    "GPT-2 XL": ("GPT2LMHeadModel", {"n_embd": 1600, "n_head": 25, "n_layer": 48}),
    "Pythia 12B": (
        "GPTNeoXForCausalLM",
        {
            "hidden_size": 5120,
            "num_attention_heads": 40,
            "num_hidden_layers": 36,
            "intermediate_size": 20480,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "T5 11B": (
        "T5ForConditionalGeneration",
        {"d_model": 1024, "d_kv": 128, "d_ff": 65536, "num_heads": 128, "num_layers": 24},
    ),
    "CodeGen 16B": ("CodeGenForCausalLM", {"n_embd": 6144, "n_head": 24, "n_layer": 34, "rotary_dim": 64}),
    "Jamba 52B": ("JambaForCausalLM", {}),
    "Whisper large": (
        "WhisperForConditionalGeneration",
        {
            "d_model": 1280,
            "encoder_layers": 32,
            "decoder_layers": 32,
            "encoder_attention_heads": 20,
            "decoder_attention_heads": 20,
            "encoder_ffn_dim": 5120,
            "decoder_ffn_dim": 5120,
        },
    ),
    "ViT large": (
        "ViTForImageClassification",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "Hubert large": (
        "HubertForCTC",
        {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
        },
    ),
    "Qwen3-Next 80B": ("Qwen3NextForCausalLM", {}),
    "Kimi Linear 48B": ("KimiLinearForCausalLM", {}),
    "BERT large": (
        "BertForMaskedLM",
        {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "intermediate_size": 4096,
        },
    ),
    "Qwen2-VL 7B": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": {
                "hidden_size": 3584,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "num_hidden_layers": 28,
                "intermediate_size": 18944,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1000000.0,
                    "mrope_section": [16, 24, 24],
                },
            },
            "vision_config": {"hidden_size": 3584, "embed_dim": 1280, "depth": 32, "num_heads": 16},
        },
    ),
    "GLM-4.1V 9B": (
        "Glm4vForConditionalGeneration",
        {
            "text_config": {
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_key_value_heads": 2,
                "num_hidden_layers": 40,
                "intermediate_size": 13696,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 500000.0,
                    "mrope_section": [8, 12, 12],
                    "partial_rotary_factor": 0.5,
                },
            }
        },
    ),
    "BLIP-2 2.7B": (
        "Blip2ForConditionalGeneration",
        {
            "text_config": {
                "model_type": "opt",
                "hidden_size": 2560,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "ffn_dim": 10240,
                "word_embed_proj_dim": 2560,
            },
            "image_token_index": 50265,
            "num_query_tokens": 32,
        },
    ),
    "Granite 4 H small": (
        "GraniteMoeHybridForCausalLM",
        {
            "hidden_size": 4096,
            "intermediate_size": 1536,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_hidden_layers": 40,
            "num_local_experts": 72,
            "num_experts_per_tok": 10,
            "shared_intermediate_size": 1536,
            "layer_types": ["attention" if layer % 10 == 5 else "mamba" for layer in range(40)],
            "mamba_n_heads": 128,
            "mamba_d_head": 64,
            "mamba_d_state": 128,
            "position_embedding_type": "nope",
        },
    ),
    "Swin large": (
        "SwinForImageClassification",
        {
            "embed_dim": 192,
            "depths": [2, 2, 18, 2],
            "num_heads": [6, 12, 24, 48],
            "window_size": 12,
            "image_size": 384,
        },
    ),
    "CLAP": ("ClapModel", {}),
    "SAM base": ("SamModel", {}),
}
"""Class and the fields of their configs in which they differ from its defaults."""


def published(name: str) -> nn.Module:
    """A model of the size that it really has, without weights.

    Args:
        name: One of `PUBLISHED`.
    """
    class_name, fields = PUBLISHED[name]
    cls: Any = getattr(transformers, class_name)
    with torch.device("meta"):
        model: nn.Module = cls(cls.config_class(**fields))
    return model
