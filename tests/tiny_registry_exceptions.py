"""Fields of single types that the rules of `tiny_registry_fields` would get wrong; and what cannot be built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tiny_registry_fields import MLP

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class PerLayer:
    """A list with an entry for each layer: these, over and over."""

    kinds: Sequence[Any]

    def of(self, layers: int) -> list[Any]:
        return (list(self.kinds) * layers)[:layers]


_STATE_AND_ATTENTION = PerLayer(("linear_attention", "full_attention"))

EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"num_hidden_layers": 4, "num_attention_heads": 4},
    "cohere_compass_text": {
        "layer_types": PerLayer(("sliding_attention", "full_attention")),
        "rope_parameters": {"sliding_attention": _ROTARY, "full_attention": None},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
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
    "emu3": {"pad_token_id": 0},
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
    "hunyuan_v1_moe": {"rope_parameters": _ROTARY, "head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"layer_types": PerLayer(("conv", "full_attention"))},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4, "num_layers": 2, "num_hidden_layers": 4},
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
    "masked-lm": {
        "esm": "no tiny config is known that it runs with",
        "perceiver": "no tiny config is known that it runs with",
    },
    "seq2seq-lm": {
        "nemo_speechlm": "no tiny config is known that it runs with",
        "qwen3_asr": "no tiny config is known that it runs with",
        "vibevoice_asr": "no tiny config is known that it runs with",
        "voxtral_realtime": "no tiny config is known that it runs with",
    },
    "image-text-to-text": {
        "blip": "no tiny config is known that it runs with",
        "blip-2": "no tiny config is known that it runs with",
        "chameleon": "no tiny config is known that it runs with",
        "cohere2_vision": "no tiny config is known that it runs with",
        "deepseek_ocr2": "no tiny config is known that it runs with",
        "diffusion_gemma": "no tiny config is known that it runs with",
        "dots3_note": "no tiny config is known that it runs with",
        "emu3": "no tiny config is known that it runs with",
        "ernie4_5_vl_moe": "no tiny config is known that it runs with",
        "fast_vlm": "no tiny config is known that it runs with",
        "florence2": "no tiny config is known that it runs with",
        "gemma3n": "no tiny config is known that it runs with",
        "glm46v": "no tiny config is known that it runs with",
        "glm4v": "no tiny config is known that it runs with",
        "glm4v_moe": "no tiny config is known that it runs with",
        "glm5_next": "no tiny config is known that it runs with",
        "glm_ocr": "no tiny config is known that it runs with",
        "glmga": "no tiny config is known that it runs with",
        "granite4_vision": "no tiny config is known that it runs with",
        "hunyuan_vl": "no tiny config is known that it runs with",
        "idefics": "no tiny config is known that it runs with",
        "inkling2": "no tiny config is known that it runs with",
        "instructblip": "no tiny config is known that it runs with",
        "instructblipvideo": "no tiny config is known that it runs with",
        "janus": "no tiny config is known that it runs with",
        "kosmos-2": "no tiny config is known that it runs with",
        "mistral4": "no tiny config is known that it runs with",
        "molmo2": "no tiny config is known that it runs with",
        "muse_glimmer": "no tiny config is known that it runs with",
        "muse_spark": "no tiny config is known that it runs with",
        "nemotron_h_omni": "no tiny config is known that it runs with",
        "paddleocr_vl": "no tiny config is known that it runs with",
        "perception_lm": "no tiny config is known that it runs with",
        "pi0": "no tiny config is known that it runs with",
        "pix2struct": "no tiny config is known that it runs with",
        "pp_chart2table": "no tiny config is known that it runs with",
        "pp_formulanet": "no tiny config is known that it runs with",
        "qwen2_5_omni_thinker": "no tiny config is known that it runs with",
        "qwen2_5_vl": "no tiny config is known that it runs with",
        "qwen2_vl": "no tiny config is known that it runs with",
        "qwen3_omni_moe_thinker": "no tiny config is known that it runs with",
        "shieldgemma2": "no tiny config is known that it runs with",
        "step3p7": "no tiny config is known that it runs with",
        "t5gemma2": "no tiny config is known that it runs with",
        "udop": "no tiny config is known that it runs with",
        "unlimited_ocr": "no tiny config is known that it runs with",
        "vision-encoder-decoder": "no tiny config is known that it runs with",
    },
    "image-classification": {
        "bit": "no tiny config is known that it runs with",
        "convnext": "no tiny config is known that it runs with",
        "convnextv2": "no tiny config is known that it runs with",
        "cvt": "no tiny config is known that it runs with",
        "dinat": "no tiny config is known that it runs with",
        "donut-swin": "no tiny config is known that it runs with",
        "efficientnet": "no tiny config is known that it runs with",
        "hgnet_v2": "no tiny config is known that it runs with",
        "hiera": "no tiny config is known that it runs with",
        "imagegpt": "no tiny config is known that it runs with",
        "levit": "no tiny config is known that it runs with",
        "mobilevit": "no tiny config is known that it runs with",
        "mobilevitv2": "no tiny config is known that it runs with",
        "perceiver": "no tiny config is known that it runs with",
        "poolformer": "no tiny config is known that it runs with",
        "pvt": "no tiny config is known that it runs with",
        "regnet": "no tiny config is known that it runs with",
        "resnet": "no tiny config is known that it runs with",
        "shieldgemma2": "no tiny config is known that it runs with",
        "siglip2": "no tiny config is known that it runs with",
        "swin": "no tiny config is known that it runs with",
        "swinv2": "no tiny config is known that it runs with",
        "textnet": "no tiny config is known that it runs with",
        "timm_wrapper": "no tiny config is known that it runs with",
    },
    "zero-shot": {
        "align": "no tiny config is known that it runs with",
        "blip-2": "no tiny config is known that it runs with",
        "siglip2": "no tiny config is known that it runs with",
        "videoprism": "no tiny config is known that it runs with",
    },
    "audio-classification": {
        "audio-spectrogram-transformer": "no tiny config is known that it runs with",
        "data2vec-audio": "no tiny config is known that it runs with",
        "hubert": "no tiny config is known that it runs with",
        "unispeech": "no tiny config is known that it runs with",
        "unispeech-sat": "no tiny config is known that it runs with",
        "wav2vec2": "no tiny config is known that it runs with",
        "wav2vec2-bert": "no tiny config is known that it runs with",
        "wav2vec2-conformer": "no tiny config is known that it runs with",
        "wavlm": "no tiny config is known that it runs with",
    },
    "ctc": {
        "data2vec-audio": "no tiny config is known that it runs with",
        "granite_speech5_ctc": "no tiny config is known that it runs with",
        "hubert": "no tiny config is known that it runs with",
        "unispeech": "no tiny config is known that it runs with",
        "unispeech-sat": "no tiny config is known that it runs with",
        "wav2vec2": "no tiny config is known that it runs with",
        "wav2vec2-bert": "no tiny config is known that it runs with",
        "wav2vec2-conformer": "no tiny config is known that it runs with",
        "wavlm": "no tiny config is known that it runs with",
    },
    "speech-seq2seq": {
        "dia": "no tiny config is known that it runs with",
        "fun_asr_nano": "no tiny config is known that it runs with",
        "granite_speech": "no tiny config is known that it runs with",
        "granite_speech_plus": "no tiny config is known that it runs with",
        "kyutai_speech_to_text": "no tiny config is known that it runs with",
        "moonshine": "no tiny config is known that it runs with",
        "moonshine_streaming": "no tiny config is known that it runs with",
        "pop2piano": "no tiny config is known that it runs with",
        "qwen3_asr": "no tiny config is known that it runs with",
        "seamless_m4t": "no tiny config is known that it runs with",
        "seamless_m4t_v2": "no tiny config is known that it runs with",
        "speech-encoder-decoder": "no tiny config is known that it runs with",
        "speecht5": "no tiny config is known that it runs with",
        "vibevoice": "no tiny config is known that it runs with",
        "vibevoice_asr": "no tiny config is known that it runs with",
        "voxtral": "no tiny config is known that it runs with",
        "voxtral_realtime": "no tiny config is known that it runs with",
    },
}
"""The same for each task."""
