"""Tiny random models of every causal language model that transformers registers: nothing is downloaded.

    tiny = build("mixtral")
    tiny.model(**tiny.inputs)

The default config of a type is walked, with the configs inside it, and each field whose name is known (`hidden_size`,
`n_embd`, `num_key_value_heads`) gets a small value; lists with an entry for each layer are cut so that every kind of
layer stays. `EXCEPTIONS` has what cannot be guessed. Several shapes are tried, grouped key-value heads first, and the
first that runs is taken.

Sizes can be told apart: hidden 32, 4 heads of 16 where the config says how wide a head is (64 columns, not 32) and of
8 otherwise, 2 key-value heads, MLP 48, vocabulary 160, 4 layers, windows of 4.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

HIDDEN, MLP, HEADS, VOCABULARY, IMAGE_TOWER_LAYERS = 32, 48, 4, 160, 2

FIRST_SPECIAL = 100
"""Ids from here on are given to special tokens; the logits of some are -inf."""

TOKENS = (10, 90)
"""Where ids of example inputs lie."""

LARGEST = 4_000_000
"""A model of more parameters is not tiny: a field that its config is known by has been missed."""


@dataclass(frozen=True)
class Shape:
    """The sizes in which the models differ."""

    key_value_heads: int = 2
    head_width: int = 16
    window: int = 4
    layers: int = 4
    length: int = 64
    """Most positions that it has embeddings for."""


SHAPES = (
    Shape(),
    Shape(key_value_heads=4),
    Shape(key_value_heads=4, head_width=8),
    Shape(key_value_heads=1),
    Shape(window=64),
    Shape(key_value_heads=4, window=64),
)
"""What is tried, in this order."""


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A model of one type that runs, in evaluation mode."""

    model_type: str
    model: nn.Module
    inputs: Mapping[str, Tensor]
    shape: Shape


# --- what the fields of configs mean ----------------------------------------------------------------------

_ROLES = {
    "hidden": """hidden_size d_model n_embd embed_dim emb_dim embedding_dim dim embedding_size word_embed_proj_dim
        input_embedding_size output_embedding_size lru_width attention_hidden_size backbone_hidden_size hidden_dim
        decoder_hidden_size encoder_hidden_size hidden_channels text_embed_dim projection_dim hidden_size_global
        vision_hidden_size vq_embed_dim ple_embed_dim""",
    "mlp": """intermediate_size ffn_dim ffn_hidden_size d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim d_inner
        feed_forward_size mlp_dim n_inner moe_intermediate_size shared_expert_intermediate_size
        expert_ffn_hidden_size intermediate_size_mlp shared_intermediate_size dense_intermediate_size
        moe_shared_expert_intermediate_size shared_experts_intermediate_size speech_encoder_intermediate_size
        text_config_intermediate_size bottleneck_dim pooler_hidden_size intermediate_ff_dim hidden_mlp_size""",
    "heads": """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads conf_num_attention_heads
        swa_num_attention_heads index_n_heads num_query_groups nhead num_attn_heads linear_num_heads""",
    "key_value_heads": """num_key_value_heads kv_n_heads num_kv_heads swa_num_key_value_heads
        decoder_num_key_value_heads encoder_num_key_value_heads num_global_key_value_heads index_n_kv_heads""",
    "head_width": """head_dim d_kv d_head kv_channels dim_head attention_head_size swa_head_dim attention_head_dim
        linear_head_dim global_head_dim""",
    "layers": """num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks
        num_layers_per_stack""",
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
        keep_window_size attention_chunk_size local_attention_window_len""",
    "vocabulary": "decoder_vocab_size unpadded_vocab_size",
    "of_each_layer": """layer_types mlp_layer_types layers_block_type no_rope_layers attn_layers indexer_types
        num_attention_heads_per_layer layer_rope_theta mtp_layer_types block_types activation_sparsity_pattern""",
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names.split()}
_SPECIAL_TOKEN = re.compile(r"(_token_id|_token_index|_index|_tokens?_ids?)$")
_COUNTS_OF_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "depth")
_TOWERS = ("vision", "audio", "encoder", "speech", "vq")

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
    kinds of layers: no_rope_layer_interval=2 attn_layer_period=2 attn_layer_offset=1 attn_layer_interval=2
        layer_group_size=2 n_layers_per_attn_res_block=2 max_window_layers=2 rescale_every=2
        num_kv_shared_layers=0 num_nextn_predict_layers=0
    what few have: local_attn_chunk_length=8 lsh_attn_chunk_length=8 num_buckets=8 hash_seed=0 prompt_mid_dim=16
        block_size=4 num_random_blocks=1 attention_window=4 pronunciation_embed_dim=16 shape_embed_dim=16 d_rel=8
        rel_extent=16 ngram_vocab_size_base=200 make_ngram_vocab_size_divisible_by=8 split_ngram_parts=8
        ffn_round_up_to_multiple_of=8 encoder_hash_byte_group_vocab=64 max_seq_length=64 summary_hidden_size=32
"""
_VALUES: Mapping[str, Any] = {
    **{name: int(number) for name, number in re.findall(r"(\w+)=(\d+)", _NUMBERS)},
    "axial_pos_shape": (8, 8),
    "axial_pos_embds_dim": (16, 16),
    "mem_len": None,
}
"""Values of fields that are of one kind of model."""

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}


@dataclass(frozen=True)
class _PerLayer:
    """A list with an entry for each layer: these, over and over."""

    kinds: Sequence[Any]

    def of(self, layers: int) -> list[Any]:
        return (list(self.kinds) * layers)[:layers]


_STATE_AND_ATTENTION = _PerLayer(("linear_attention", "full_attention"))

EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"num_hidden_layers": 4, "num_attention_heads": 4},
    "cohere_compass_text": {
        "layer_types": _PerLayer(("sliding_attention", "full_attention")),
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
        "intermediate_size": _PerLayer((MLP,)),
        "activation_sparsity_pattern": _PerLayer((0.0,)),
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
    "lfm2_moe": {"layer_types": _PerLayer(("conv", "full_attention"))},
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
        "layers_block_type": _PerLayer(("linear_attention", "hybrid")),
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


# --- configs ----------------------------------------------------------------------------------------------


def model_types() -> tuple[str, ...]:
    """Every type that is registered as a causal language model and that a tiny model can be made of."""
    return tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNBUILDABLE)


def _model_class(model_type: str) -> type[nn.Module]:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    found: type[nn.Module] = getattr(transformers, name if isinstance(name, str) else name[0])
    return found


def tiny_config(model_type: str, shape: Shape) -> Any:
    """The config of a type, made small."""
    cls = CONFIG_MAPPING[model_type]
    try:
        usual = cls()
    except Exception:
        # Some refuse their own defaults.
        plain = {k: v for k, v in EXCEPTIONS.get(model_type, {}).items() if not isinstance(v, _PerLayer)}
        usual = cls(**plain)
    config = cls(**_shrunk(usual, shape, model_type=model_type))
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "is_decoder", None) is False:
            part.is_decoder = True
        if hasattr(part, "use_cache"):
            part.use_cache = True
    wanted = getattr(_model_class(model_type), "config_class", None)
    if wanted is None or isinstance(config, wanted):
        return config
    parts = (getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return next((p for p in parts if isinstance(p, wanted)), config.get_text_config(decoder=True))


def _shrunk(config: Any, shape: Shape, *, model_type: str, tower: bool = False) -> dict[str, Any]:
    """The fields with which the class of a config makes a small one."""
    cls = type(config)
    defaults = {
        field.name: None if field.default is dataclasses.MISSING else field.default
        for field in (dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ())
    }
    names = set(defaults) or set(vars(config))
    counts = [getattr(config, name, None) for name in _COUNTS_OF_LAYERS]
    layers_before = next((count for count in counts if isinstance(count, int)), None)
    fields: dict[str, Any] = {}
    special = FIRST_SPECIAL
    for name in sorted(names):
        value = vars(config).get(name)
        if value is None:
            try:
                value = getattr(config, name, None)
            except Exception:  # some fields that differ between layers cannot be read
                value = defaults.get(name)
        given = defaults.get(name) is not None
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            inner = tower or any(word in name for word in _TOWERS)
            fields[name] = type(value)(**_shrunk(value, shape, model_type=value.model_type, tower=inner))
        elif isinstance(value, dict):
            if name in ("rope_parameters", "rope_scaling"):
                width = shape.head_width if isinstance(defaults.get("head_dim"), int) else 8
                fields[name] = _rotation(value, width)
        elif value is None or isinstance(value, bool):
            continue
        elif _ROLE_OF.get(name) == "of_each_layer" and isinstance(value, (list, tuple)):
            if not layers_before or len(value) == layers_before or name == "layer_types":
                fields[name] = type(value)(_cut(value, shape.layers))
        elif isinstance(value, int) and (name in _ROLE_OF or name.endswith("vocab_size")):
            small = _small(_ROLE_OF.get(name, "vocabulary"), value, shape, tower, given)
            if small is not None:
                fields[name] = small
        elif isinstance(value, int) and value >= FIRST_SPECIAL and _SPECIAL_TOKEN.search(name):
            fields[name] = special
            special += 1
        elif _fits(name, value) and (given or name == "image_size"):
            fields[name] = _VALUES[name]
    for name, value in EXCEPTIONS.get(model_type, {}).items():
        fields[name] = value.of(shape.layers) if isinstance(value, _PerLayer) else value
    renamed = getattr(cls, "attribute_map", {})
    return {name: value for name, value in fields.items() if name not in renamed or name in names}


def _fits(name: str, value: Any) -> bool:
    """Whether there is a value for a field, and of its kind."""
    return name in _VALUES and isinstance(value, (list, tuple)) == isinstance(_VALUES[name], (list, tuple))


def _small(role: str, value: int, shape: Shape, tower: bool, given: bool) -> int | None:
    """A small value for a number with this role; None to leave it as it is."""
    sizes = {
        "hidden": HIDDEN,
        "mlp": MLP if value else None,
        "heads": HEADS if value else None,
        "key_value_heads": shape.key_value_heads if value else None,
        "head_width": shape.head_width if given else None,  # the config works it out itself
        "layers": IMAGE_TOWER_LAYERS if tower else shape.layers,
        "encoder_layers": shape.layers,
        "tower_layers": IMAGE_TOWER_LAYERS,
        "experts": min(value, 4),
        "chosen_experts": min(value, 2),
        "groups": 1,
        "length": shape.length,
        "window": shape.window if value > 0 else None,
        "vocabulary": VOCABULARY if value > 50 else None,
    }
    return sizes.get(role)


def _cut(values: Sequence[Any], count: int) -> list[Any]:
    """So many entries of a list with one for each layer, in order, of each kind at least one if they suffice."""
    values = list(values)
    if len(values) <= count:
        return (values * count)[:count]
    kinds = list(dict.fromkeys(map(str, values)))
    for start in range(len(values) - count + 1):
        window = values[start : start + count]
        if len(set(map(str, window))) == len(kinds):
            return window
    firsts = [list(map(str, values)).index(kind) for kind in kinds][:count]
    rest = [index for index in range(len(values)) if index not in firsts]
    return [values[index] for index in sorted([*firsts, *rest[: count - len(firsts)]])]


def _rotation(value: Mapping[str, Any], head_width: int) -> dict[str, Any]:
    """The parameters of a rotation for narrow heads; where kinds of layers have their own, of each."""
    if any(isinstance(inner, dict) for inner in value.values()):
        return {
            key: _rotation(inner, head_width) if isinstance(inner, dict) else inner
            for key, inner in value.items()
        }
    found = {key: inner for key, inner in value.items() if key not in ("long_factor", "short_factor")}
    if found.get("mrope_section"):
        half = int(head_width * (found.get("partial_rotary_factor") or 1.0)) // 2
        parts = len(found["mrope_section"])
        found["mrope_section"] = [half - (parts - 1) * (half // parts)] + [half // parts] * (parts - 1)
    if "original_max_position_embeddings" in found:
        found["original_max_position_embeddings"] = 32
    if found.get("rope_type") in ("longrope", "su"):
        found["rope_type"] = "default"
    return found


# --- models -----------------------------------------------------------------------------------------------


def build(model_type: str, *, seed: int = 0) -> TinyModel:
    """A tiny random model of this type, of the first of `SHAPES` that runs.

    Raises:
        Exception: none does; the error of the first.
    """
    errors = []
    with warnings.catch_warnings():
        # Of single types, about fields that are small or are going to be renamed.
        warnings.simplefilter("ignore")
        for shape in SHAPES:
            try:
                return _built(model_type, shape, seed)
            except Exception as error:
                errors.append(error)
    raise errors[0]


def _built(model_type: str, shape: Shape, seed: int) -> TinyModel:
    cls, config = _model_class(model_type), tiny_config(model_type, shape)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(
            f"{model_type} still has {size / 1e6:.1f} M parameters: a field of its config is not known."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config).eval().float()
    spread_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    inputs = {"input_ids": torch.randint(*TOKENS, (2, 7), generator=generator)}
    with torch.no_grad():
        logits = model(**inputs).logits
    if not torch.isfinite(logits[..., :FIRST_SPECIAL]).all():
        raise ValueError(f"The logits of {model_type} are not finite.")
    return TinyModel(model_type, model, inputs, shape)


def spread_weights(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a spread that makes all paths count: the usual deviation of 0.02 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2 and leaf not in ("A_log", "conv_weight", "D"):
                if any(word in name for word in ("embed", "wte", "wpe", "word")):
                    parameter.copy_(normal(parameter))
                elif parameter.dim() == 2:
                    parameter.copy_(normal(parameter) / math.sqrt(parameter.shape[-1]))
                elif parameter.dim() == 3 and "conv" not in name:
                    parameter.copy_(normal(parameter) / math.sqrt(max(parameter.shape[-2:])))
            elif parameter.dim() == 1:
                bias = leaf == "bias" or (
                    leaf.endswith("_bias") and "dt" not in leaf and "correction" not in leaf
                )
                norm = "norm" in name.lower() or "ln" in name
                if bias or norm or float(parameter.abs().max()) == 0.0:
                    parameter.add_(0.1 * normal(parameter))
