"""Tiny random models that read pictures and sounds, with the maps that a person would write for them.

Their towers differ in all sizes from their text: hidden 12 and 3 heads beside 16 and 4. A picture of 8 x 8 makes four
patches (five positions with the one before them all), a sound of 16 frames eight positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tiny_models
from intervenable import maps
from model_maps import AttentionHeads, HeadColumns, LayerKind, ModelMap, Site, lookup, register_map

IMAGE = 70
"""The token that stands for a part of a picture, in models that have one."""

_TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 40,
    "vocab_size": 72,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "image_size": 8,
    "patch_size": 4,
}
_TWO_STACKS = {
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "vocab_size": 72,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# --- maps -------------------------------------------------------------------------------------------------


def _block(
    attention: str, output: str, width: int, heads: int, shared: int = 0, mlp: str = "mlp"
) -> dict[str, Site]:
    """The sites of a block with projections of its own for queries, keys and values."""
    query, key = HeadColumns(heads, width), HeadColumns(shared or heads, width)
    sites = {
        "block_input": Site("", "input"),
        "block_output": Site(""),
        "attention_input": Site(attention, "input", attention=AttentionHeads(heads, shared or heads, width)),
        "attention_output": Site(attention),
        "query_output": Site(f"{attention}.q_proj", width="query", columns=query),
        "key_output": Site(f"{attention}.k_proj", width="key_value", columns=key),
        "value_output": Site(f"{attention}.v_proj", width="key_value", columns=key),
        "attention_value_output": Site(f"{attention}.{output}", "input", width="query", columns=query),
    }
    return sites | ({"mlp_input": Site(mlp, "input"), "mlp_output": Site(mlp)} if mlp else {})


def _prefixed(prefix: str, sites: Mapping[str, Site]) -> dict[str, Site]:
    return {f"{prefix}_{word}": site for word, site in sites.items()}


_TOWER = _prefixed("vision", _block("self_attn", "out_proj", 4, 3))
_LLAMA = _block("self_attn", "o_proj", 6, 4, 2)
_HEADED = {"logits": Site("lm_head", width="vocabulary")}
_ENCODER_DECODER = {
    **_prefixed("encoder", _block("self_attn", "out_proj", 4, 4, mlp="")),
    **_prefixed("decoder", _block("self_attn", "out_proj", 4, 4, mlp="")),
    **{
        name: site
        for name, site in _prefixed("cross", _block("encoder_attn", "out_proj", 4, 4, mlp="")).items()
        if "block" not in name
    },
}
_FLAT_TOWER = {
    # Its config calls the width of the text `hidden_size`.
    "vision_block_input": Site("", "input", flat=True, width="any"),
    "vision_block_output": Site("", flat=True, width="any"),
    "vision_mlp_output": Site("mlp", flat=True, width="any"),
}

_CROSSING = LayerKind(
    (1, 3),
    sites={
        name: site
        for name, site in _prefixed("cross", _block("cross_attn", "o_proj", 4, 4, 2, mlp="")).items()
        if "block" not in name
    },
    absent=dict.fromkeys(
        (
            "attention_input",
            "attention_output",
            "query_output",
            "key_output",
            "value_output",
            "attention_value_output",
        ),
        "it attends to pictures here, so say the word with 'cross_'",
    ),
)
"""The layers of Mllama that read pictures."""

MAPS = (
    ModelMap(
        ("ViTForImageClassification",),
        "vit.layers",
        _block("attention", "o_proj", 4, 3) | {"logits": Site("classifier", width="any")},
        causal=False,
    ),
    ModelMap(
        ("CLIPModel",),
        None,
        {**_TOWER, **_prefixed("text", _block("self_attn", "out_proj", 4, 4))},
        stacks={"vision": "vision_model.encoder.layers", "text": "text_model.encoder.layers"},
        configs={"vision": "vision_config", "text": "text_config"},
        causal=False,
    ),
    ModelMap(
        ("LlavaForConditionalGeneration",),
        "model.language_model.layers",
        _LLAMA | _TOWER | _HEADED,
        stacks={"vision": "model.vision_tower.encoder.layers"},
        configs={"vision": "vision_config"},
    ),
    ModelMap(
        ("Gemma3ForConditionalGeneration",),
        "model.language_model.layers",
        _LLAMA | _TOWER | _HEADED,
        stacks={"vision": "model.vision_tower.encoder.layers"},
        configs={"vision": "vision_config"},
        causal=False,  # the tokens of a picture read each other both ways
    ),
    ModelMap(
        ("Qwen2VLForConditionalGeneration",),
        "model.language_model.layers",
        _block("self_attn", "o_proj", 4, 4, 2) | _FLAT_TOWER | _HEADED,
        stacks={"vision": "model.visual.blocks"},
    ),
    ModelMap(
        ("MllamaForConditionalGeneration",),
        "model.language_model.layers",
        _block("self_attn", "o_proj", 4, 4, 2) | _TOWER | _HEADED,
        stacks={"vision": "model.vision_model.transformer.layers"},
        configs={"vision": "vision_config"},
        kinds=(_CROSSING,),
    ),
    ModelMap(
        ("WhisperForConditionalGeneration",),
        None,
        _ENCODER_DECODER | {"logits": Site("proj_out", width="vocabulary")},
        stacks={"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
        decoder_reads="labels",
    ),
    ModelMap(
        ("BartForConditionalGeneration",),
        None,
        _ENCODER_DECODER | _HEADED,
        stacks={"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
        decoder_reads="labels",
    ),
    ModelMap(
        ("Wav2Vec2ForCTC",),
        "wav2vec2.encoder.layers",
        _block("attention", "out_proj", 4, 4, mlp="feed_forward") | _HEADED,
        causal=False,
    ),
)


@contextmanager
def registered() -> Iterator[None]:
    """Run the block with these maps registered, and with those that were there before afterwards."""
    before = dict(lookup._MAPS)
    try:
        for one in MAPS:
            register_map(one, replace=True)
        yield
    finally:
        lookup._MAPS.clear()
        lookup._MAPS.update(before)


# --- models -----------------------------------------------------------------------------------------------


def _config(name: str) -> Any:
    text, vision = dict(_TEXT), dict(_VISION)
    if name == "vit":
        return transformers.ViTConfig(**vision, num_labels=5)
    if name == "clip":
        own = {**text, "num_hidden_layers": 2}
        own.pop("head_dim")
        return transformers.CLIPConfig(text_config=own, vision_config=vision, projection_dim=10)
    if name == "llava":
        return transformers.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **vision},
            text_config={"model_type": "llama", **text},
            image_token_index=IMAGE,
        )
    if name == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        return transformers.Gemma3Config(
            vision_config=vision,
            text_config={**text, "sliding_window": 4, "layer_types": kinds},
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
            boi_token_index=68,
            eoi_token_index=67,
        )
    if name == "qwen2_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}
        return transformers.Qwen2VLConfig(
            vision_config={
                "depth": 3,
                "embed_dim": 12,
                "hidden_size": 16,
                "num_heads": 3,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            text_config={**text, "head_dim": 4, "rope_parameters": rope},
            image_token_id=IMAGE,
            video_token_id=69,
            vision_start_token_id=68,
            vision_end_token_id=67,
        )
    if name == "mllama":
        return transformers.MllamaConfig(
            vision_config={
                "hidden_size": 12,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 3,
                "intermediate_size": 20,
                "image_size": 8,
                "patch_size": 4,
                "vision_output_dim": 24,
                "intermediate_layers_indices": [0],
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            text_config={**text, "head_dim": 4, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]},
            image_token_index=IMAGE,
        )
    if name == "whisper":
        return transformers.WhisperConfig(
            **_TWO_STACKS,
            num_mel_bins=6,
            max_source_positions=8,
            max_target_positions=16,
            decoder_start_token_id=1,
            begin_suppress_tokens=None,
        )
    if name == "bart":
        return transformers.BartConfig(**_TWO_STACKS, max_position_embeddings=32)
    assert name == "wav2vec2"
    return transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        vocab_size=30,
        conv_dim=(8, 8),
        conv_stride=(4, 4),
        conv_kernel=(8, 4),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
    )


_CLASSES = {
    "vit": "ViTForImageClassification",
    "clip": "CLIPModel",
    "llava": "LlavaForConditionalGeneration",
    "gemma3": "Gemma3ForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "mllama": "MllamaForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "wav2vec2": "Wav2Vec2ForCTC",
}
NAMES = tuple(_CLASSES)


def tower_model(name: str, attention: str = "sdpa") -> nn.Module:
    """The tiny model of a name, its weights spread out, so that what is patched moves what comes out."""
    torch.manual_seed(0)
    config = _config(name)
    config._attn_implementation = attention
    model: nn.Module = getattr(transformers, _CLASSES[name])(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    maps.forget(model)
    return model


# --- inputs -----------------------------------------------------------------------------------------------

BEFORE, PATCHES = 2, 4
"""Tokens before a picture in a prompt, and those of the picture."""


def _prompt(batch: int, image_tokens: int, generator: torch.Generator) -> Tensor:
    """Two words, a picture, five words."""
    words = torch.randint(3, 60, (batch, 7), generator=generator)
    picture = torch.full((batch, image_tokens), IMAGE)
    return torch.cat([words[:, :BEFORE], picture, words[:, BEFORE:]], 1)


def tower_inputs(name: str, seed: int = 1, batch: int = 2) -> dict[str, Any]:
    """Inputs of a batch, each prompt with one picture or sound."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    words = torch.randint(3, 60, (batch, 7), generator=generator)
    if name == "vit":
        return {"pixel_values": random(batch, 3, 8, 8)}
    if name == "clip":
        words[:, -1] = 2
        return {"input_ids": words, "pixel_values": random(batch + 1, 3, 8, 8)}
    if name in ("llava", "gemma3"):
        found: dict[str, Any] = {
            "input_ids": _prompt(batch, PATCHES, generator),
            "pixel_values": random(batch, 3, 8, 8),
        }
        if name == "gemma3":
            found["token_type_ids"] = (found["input_ids"] == IMAGE).long()
        return found
    if name == "qwen2_vl":  # pictures of 2 x 4 patches, four of which make one token
        ids = _prompt(batch, 2, generator)
        return {
            "input_ids": ids,
            "pixel_values": random(batch * 8, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 2, 4]] * batch),
            "mm_token_type_ids": (ids == IMAGE).long(),
        }
    if name == "mllama":
        ids = torch.cat([torch.full((batch, 1), IMAGE), words], 1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": random(batch, 1, 1, 3, 8, 8),
            "aspect_ratio_ids": torch.ones(batch, 1, dtype=torch.long),
            "aspect_ratio_mask": torch.ones(batch, 1, 1, dtype=torch.long),
            "cross_attention_mask": torch.ones(batch, 8, 1, 1, dtype=torch.long),
        }
    if name == "whisper":
        return {"input_features": random(batch, 6, 16), "decoder_input_ids": words[:, :5]}
    if name == "bart":
        return {"input_ids": words, "decoder_input_ids": words.flip(1)[:, :5]}
    if name == "wav2vec2":
        return {"input_values": random(batch, 120)}
    return tiny_models.tiny_inputs(tower_model(name), batch=batch, seed=seed)
