"""Tiny random models of every mapped family, to test with: built from a config, nothing is downloaded.

Their sizes all differ, so that no wrong width passes by luck: hidden 16, query heads 4, key-value heads
2, width of a head 6 (4 where the architecture ties it to hidden / heads), MLP 40 (64 where it is tied to
4 * hidden), vocabulary 72, layers 3. Windows are 4 positions, shorter than the inputs. Weights are spread
out, biases are not zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

Padding = Literal["left", "right"]

HIDDEN, LAYERS, HEADS, KEY_VALUE_HEADS, HEAD_DIM, MLP, VOCABULARY, LABELS = 16, 3, 4, 2, 6, 40, 72, 5
DECODER_LAYERS = 4
"""Layers of the decoders of models that have an encoder too."""
FEATURES = 10
"""Width of the input of the models that do not read tokens."""

PAD = 0
_TOKENS = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_labels": LABELS,
}
_GPT = {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_inner": MLP, "n_positions": 32}
_NAMED = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
_LLAMA = {
    **_NAMED,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "intermediate_size": MLP,
    "max_position_embeddings": 32,
}
_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_WIDE = {**_LLAMA, "head_dim": HEAD_DIM}
_KEY_VALUE_VARIANTS = {"full": {"num_key_value_heads": HEADS}, "single": {"num_key_value_heads": 1}}
_EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
_T5 = {
    "d_model": HIDDEN,
    "d_kv": HEAD_DIM,
    "d_ff": MLP,
    "num_layers": LAYERS,
    "num_decoder_layers": DECODER_LAYERS,
    "num_heads": HEADS,
    # Few and near, so that they tell the positions of short inputs apart.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 6,
    "feed_forward_proj": "relu",
    "decoder_start_token_id": 0,
}
_T5_VARIANTS = {"gated": {"feed_forward_proj": "gated-gelu"}}
_T5_HEADS = {"lm": "ForConditionalGeneration"}
_TWO_KINDS_OF_LAYER = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 4,
}


@dataclass(frozen=True)
class Family:
    """How to make the tiny models of one family."""

    name: str
    """How its classes begin: `Llama` for `LlamaForCausalLM`."""

    options: Mapping[str, Any]
    """Fields of its config."""

    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fields that differ in each variant."""

    heads: Mapping[str, str] = field(default_factory=dict)
    """Head -> how the class's name ends, where that is not the usual."""

    config: str | None = None
    """Name of the config class, if it is not `<name>Config`."""


_ENDINGS = {"base": "Model", "lm": "ForCausalLM", "classifier": "ForSequenceClassification"}

_FAMILIES: Mapping[str, Family] = {
    "gpt2": Family("GPT2", _GPT, heads={"lm": "LMHeadModel"}),
    "gpt_neo": Family(
        "GPTNeo",
        {
            "hidden_size": HIDDEN,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "intermediate_size": MLP,
            "max_position_embeddings": 32,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
        },
    ),
    "gpt_neox": Family(
        "GPTNeoX",
        {
            **_NAMED,
            "intermediate_size": MLP,
            "max_position_embeddings": 32,
            "rope_parameters": {**_ROTARY, "partial_rotary_factor": 0.5},
        },
        variants={"sequential": {"use_parallel_residual": False}},
    ),
    "gptj": Family("GPTJ", {**_GPT, "rotary_dim": 2}),
    "opt": Family(
        "OPT",
        {**_NAMED, "ffn_dim": MLP, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 32},
        variants={
            "post_norm": {"do_layer_norm_before": False, "word_embed_proj_dim": 10},
            "no_final_norm": {"_remove_final_layer_norm": True},
        },
    ),
    "bloom": Family(
        "Bloom",
        {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
        variants={"post_norm": {"apply_residual_connection_post_layernorm": True}},
    ),
    "falcon": Family(
        "Falcon",
        {**_NAMED, "ffn_hidden_size": MLP, "alibi": False, "bias": True},
        variants={
            "grouped": {"new_decoder_architecture": True, "num_kv_heads": KEY_VALUE_HEADS},
            "one_norm": {"new_decoder_architecture": True, "num_kv_heads": 1, "num_ln_in_parallel_attn": 1},
            "sequential": {"multi_query": False, "parallel_attn": False, "alibi": True},
        },
    ),
    "llama": Family("Llama", _WIDE, variants=_KEY_VALUE_VARIANTS),
    "mistral": Family("Mistral", {**_WIDE, "sliding_window": 4}, variants=_KEY_VALUE_VARIANTS),
    "qwen2": Family("Qwen2", _LLAMA, variants=_KEY_VALUE_VARIANTS),
    "qwen3": Family("Qwen3", _WIDE, variants=_KEY_VALUE_VARIANTS),
    "gemma": Family("Gemma", _WIDE, variants=_KEY_VALUE_VARIANTS),
    "gemma2": Family("Gemma2", {**_WIDE, **_TWO_KINDS_OF_LAYER}, variants=_KEY_VALUE_VARIANTS),
    "gemma3": Family(
        "Gemma3",
        {**_WIDE, **_TWO_KINDS_OF_LAYER},
        variants=_KEY_VALUE_VARIANTS,
        heads={"base": "TextModel", "classifier": "TextForSequenceClassification"},
        config="Gemma3TextConfig",
    ),
    "olmo2": Family("Olmo2", _LLAMA, variants=_KEY_VALUE_VARIANTS),
    "phi3": Family("Phi3", _LLAMA, variants=_KEY_VALUE_VARIANTS),
    "mixtral": Family("Mixtral", {**_WIDE, **_EXPERTS}, variants=_KEY_VALUE_VARIANTS),
    "gpt_oss": Family(
        "GptOss",
        {**_WIDE, **_EXPERTS, **_TWO_KINDS_OF_LAYER, "rope_parameters": _ROTARY},
        variants=_KEY_VALUE_VARIANTS,
    ),
    "bert": Family(
        "Bert",
        {**_NAMED, "intermediate_size": MLP, "max_position_embeddings": 32},
        heads={"lm": "ForMaskedLM"},
    ),
    "t5": Family("T5", _T5, variants=_T5_VARIANTS, heads=_T5_HEADS),
    "mt5": Family("MT5", _T5, variants=_T5_VARIANTS, heads=_T5_HEADS),
    "umt5": Family("UMT5", _T5, variants=_T5_VARIANTS, heads=_T5_HEADS),
    "gemma3_multimodal": Family(
        "Gemma3",
        {
            "text_config": {**_WIDE, **_TWO_KINDS_OF_LAYER, **_TOKENS},
            "vision_config": {
                "hidden_size": 12,
                "intermediate_size": 20,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
            },
            "mm_tokens_per_image": 4,
        },
        heads={"lm": "ForConditionalGeneration"},
    ),
}

_RECURRENT: Mapping[str, Callable[..., nn.Module]] = {"gru": nn.GRU, "lstm": nn.LSTM}

MULTIMODAL = "gemma3_multimodal"
"""A family with a config for each tower, used with text alone and not among `FAMILIES`."""
ENCODERS = ("bert",)
ENCODER_DECODERS = ("t5", "mt5", "umt5")
"""Families with two stacks, whose components have other names, and not among `FAMILIES` either."""
DECODERS = tuple(name for name in _FAMILIES if name not in (*ENCODERS, *ENCODER_DECODERS, MULTIMODAL))
"""Families of causal language models."""
LANGUAGE_MODELS = (*DECODERS, *ENCODERS)
"""Families that read tokens."""
RECURRENT = tuple(_RECURRENT)
FAMILIES = (*LANGUAGE_MODELS, *RECURRENT)
VARIANTS: Mapping[str, tuple[str, ...]] = {
    name: tuple(_FAMILIES[name].variants) if name in _FAMILIES else () for name in FAMILIES
}
"""Family -> its variants, besides the plain one (None)."""
CASES = tuple((name, variant) for name in FAMILIES for variant in (None, *VARIANTS[name]))
"""Every `(family, variant)`."""
ENCODER_DECODER_CASES = tuple(
    (name, variant) for name in ENCODER_DECODERS for variant in (None, *_FAMILIES[name].variants)
)
"""Every `(family, variant)` with two stacks."""


def tiny(
    family: str,
    *,
    head: str = "lm",
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    attention: str | None = None,
) -> nn.Module:
    """A tiny random model of a family, in eval mode and always the same for the same arguments.

    Args:
        family: One of `FAMILIES`.
        head: "lm", "base", "classifier", or the name of a model class. Recurrent layers have no head.
        variant: One of `VARIANTS[family]`, or None for the plain form.
        dtype: Type of all weights.
        seed: Seed of the weights.
        attention: "eager" or "sdpa"; None for what the model takes by itself.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module
        if family in _RECURRENT:
            model = _RECURRENT[family](FEATURES, HIDDEN, batch_first=True)
        else:
            row = _FAMILIES[family]
            options = {**_TOKENS, **row.options, **(row.variants[variant] if variant else {})}
            if head.endswith("ForQuestionAnswering"):
                options["num_labels"] = 2  # where the answer starts and where it ends
            config = getattr(transformers, row.config or f"{row.name}Config")(**options)
            ending = row.heads.get(head) or _ENDINGS.get(head)
            cls = getattr(transformers, head if ending is None else row.name + ending)
            model = cls._from_config(config, **({"attn_implementation": attention} if attention else {}))
        _spread(model)
    return model.to(dtype).eval()


def _spread(model: nn.Module) -> None:
    """Weights far enough from their initial values that every part of the model matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms stay near one, biases near zero
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.normal_(std=0.3)


def tiny_inputs(
    model: nn.Module, batch: int = 2, length: int = 7, padding: Padding | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs for a tiny model, as keyword arguments.

    With padding, row `i` has `i` positions less than `length` (never less than 2) and its mask says so. A decoder
    beside an encoder is given two positions less than `length`, padded alike.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, nn.RNNBase):
        return {"input": torch.randn(batch, length, FEATURES, generator=generator)}
    inputs = _tokens(batch, length, padding, generator)
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        decoder = _tokens(batch, length - 2, padding, generator)
        inputs |= {f"decoder_{name}": value for name, value in decoder.items()}
    return inputs


def _tokens(
    batch: int, length: int, padding: Padding | None, generator: torch.Generator
) -> dict[str, Tensor]:
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(batch if padding else 0):
        missing = min(row, length - 2)
        mask[row, slice(0, missing) if padding == "left" else slice(length - missing, length)] = 0
    return {"input_ids": tokens.masked_fill(mask == 0, PAD), "attention_mask": mask}
