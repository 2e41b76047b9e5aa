"""Maps of decoder language models, one table for all classes that share a layout."""

from __future__ import annotations

from model_maps import ModelMap, Site, Variant
from model_maps.families import CHOICE_IS_READ, FUSED_EXPERTS, NO_EXPERTS, NO_ROTARY, Head, family, lacking

GPT2 = family(
    heads=[
        Head(None, ("GPT2Model",), ""),
        Head("lm_head", ("GPT2LMHeadModel", "GPT2DoubleHeadsModel"), "transformer.", width="vocabulary"),
        Head("score", ("GPT2ForSequenceClassification",), "transformer."),
        Head("classifier", ("GPT2ForTokenClassification",), "transformer."),
        Head("qa_outputs", ("GPT2ForQuestionAnswering",), "transformer."),
    ],
    blocks="h",
    sites={
        "embedding_output": Site("wte"),
        "block_input": Site("", "input"),
        "block_output": Site(""),
        "attention_input": Site("attn", "input"),
        "query_output": Site("attn.c_attn", width="query", heads="query", part="query"),
        "key_output": Site("attn.c_attn", width="key_value", heads="key_value", part="key"),
        "value_output": Site("attn.c_attn", width="key_value", heads="key_value", part="value"),
        "attention_value_output": Site("attn.c_proj", "input", width="query", heads="query"),
        "attention_output": Site("attn"),
        "mlp_input": Site("mlp", "input"),
        "mlp_pre_activation": Site("mlp.act", "input", width="mlp"),
        "mlp_activation": Site("mlp.act", width="mlp"),
        "mlp_hidden": Site("mlp.c_proj", "input", width="mlp"),
        "mlp_output": Site("mlp"),
        "final_norm_input": Site("ln_f", "input"),
        "final_norm_output": Site("ln_f"),
    },
    absent=NO_EXPERTS | NO_ROTARY,
    positions_derived_from_mask=False,
)

GPT_NEO = family(
    heads=[
        Head(None, ("GPTNeoModel",), ""),
        Head("lm_head", ("GPTNeoForCausalLM",), "transformer.", width="vocabulary"),
        Head("score", ("GPTNeoForSequenceClassification",), "transformer."),
        Head("classifier", ("GPTNeoForTokenClassification",), "transformer."),
        Head("qa_outputs", ("GPTNeoForQuestionAnswering",), "transformer."),
    ],
    blocks="h",
    sites={
        "embedding_output": Site("wte"),
        "block_input": Site("", "input"),
        "block_output": Site(""),
        "attention_input": Site("attn", "input"),
        "query_output": Site("attn.attention.q_proj", width="query", heads="query"),
        "key_output": Site("attn.attention.k_proj", width="key_value", heads="key_value"),
        "value_output": Site("attn.attention.v_proj", width="key_value", heads="key_value"),
        "attention_value_output": Site("attn.attention.out_proj", "input", width="query", heads="query"),
        "attention_output": Site("attn"),
        "mlp_input": Site("mlp", "input"),
        "mlp_pre_activation": Site("mlp.act", "input", width="mlp"),
        "mlp_activation": Site("mlp.act", width="mlp"),
        "mlp_hidden": Site("mlp.c_proj", "input", width="mlp"),
        "mlp_output": Site("mlp"),
        "final_norm_input": Site("ln_f", "input"),
        "final_norm_output": Site("ln_f"),
    },
    absent=NO_EXPERTS | NO_ROTARY,
    # Its triangular masks are buffers, which no config leaves out.
    variants=(Variant("is_causal", False, causal=True),),
    positions_derived_from_mask=False,
)

GPTJ = family(
    heads=[
        Head(None, ("GPTJModel",), ""),
        Head("lm_head", ("GPTJForCausalLM",), "transformer.", width="vocabulary"),
        Head("score", ("GPTJForSequenceClassification",), "transformer."),
        Head("qa_outputs", ("GPTJForQuestionAnswering",), "transformer."),
    ],
    blocks="h",
    sites={
        "embedding_output": Site("wte"),
        "block_input": Site("", "input"),
        "block_output": Site(""),
        # One norm feeds attention and MLP; each still has its own input, which is edited apart.
        "attention_input": Site("attn", "input"),
        "query_output": Site("attn.q_proj", width="query", heads="query"),
        "key_output": Site("attn.k_proj", width="key_value", heads="key_value"),
        "value_output": Site("attn.v_proj", width="key_value", heads="key_value"),
        "attention_value_output": Site("attn.out_proj", "input", width="query", heads="query"),
        "attention_output": Site("attn"),
        "mlp_input": Site("mlp", "input"),
        "mlp_pre_activation": Site("mlp.act", "input", width="mlp"),
        "mlp_activation": Site("mlp.act", width="mlp"),
        "mlp_hidden": Site("mlp.fc_out", "input", width="mlp"),
        "mlp_output": Site("mlp"),
        "final_norm_input": Site("ln_f", "input"),
        "final_norm_output": Site("ln_f"),
    },
    sequential=False,
    positions_derived_from_mask=False,
)

GPT_NEOX = family(
    heads=[
        Head(None, ("GPTNeoXModel",), ""),
        Head("lm_head", ("GPTNeoXForCausalLM",), "gpt_neox.", width="vocabulary"),
        Head("score", ("GPTNeoXForSequenceClassification",), "gpt_neox."),
        Head("classifier", ("GPTNeoXForTokenClassification",), "gpt_neox."),
        Head("qa_outputs", ("GPTNeoXForQuestionAnswering",), "gpt_neox."),
    ],
    blocks="layers",
    sites={
        "embedding_output": Site("embed_in"),
        "block_input": Site("", "input"),
        "block_output": Site(""),
        "attention_input": Site("attention", "input"),
        "query_output": Site(
            "attention.query_key_value", width="query", heads="query", part="query", layout="grouped"
        ),
        "key_output": Site(
            "attention.query_key_value", width="key_value", heads="key_value", part="key", layout="grouped"
        ),
        "value_output": Site(
            "attention.query_key_value", width="key_value", heads="key_value", part="value", layout="grouped"
        ),
        "attention_value_output": Site("attention.dense", "input", width="query", heads="query"),
        "attention_output": Site("attention"),
        "attention_contribution": Site("post_attention_dropout"),
        "mlp_input": Site("mlp", "input"),
        "mlp_pre_activation": Site("mlp.act", "input", width="mlp"),
        "mlp_activation": Site("mlp.act", width="mlp"),
        "mlp_hidden": Site("mlp.dense_4h_to_h", "input", width="mlp"),
        "mlp_output": Site("mlp"),
        "mlp_contribution": Site("post_mlp_dropout"),
        "final_norm_input": Site("final_layer_norm", "input"),
        "final_norm_output": Site("final_layer_norm"),
    },
    sequential=False,
    variants=(Variant("use_parallel_residual", False, sequential=True),),
    positions_derived_from_mask=False,
)

OPT = family(
    heads=[
        Head(None, ("OPTModel",), "decoder."),
        Head("lm_head", ("OPTForCausalLM",), "model.decoder.", width="vocabulary"),
        Head("score", ("OPTForSequenceClassification",), "model.decoder."),
        Head("qa_outputs", ("OPTForQuestionAnswering",), "model.decoder."),
    ],
    blocks="layers",
    sites={
        "embedding_output": Site("embed_tokens", width="embedding"),
        "block_input": Site("", "input"),
        "block_output": Site(""),
        "attention_input": Site("self_attn", "input"),
        "query_output": Site("self_attn.q_proj", width="query", heads="query"),
        "key_output": Site("self_attn.k_proj", width="key_value", heads="key_value"),
        "value_output": Site("self_attn.v_proj", width="key_value", heads="key_value"),
        "attention_value_output": Site("self_attn.out_proj", "input", width="query", heads="query"),
        "attention_output": Site("self_attn"),
        "mlp_input": Site("fc1", "input", flat=True),
        "mlp_pre_activation": Site("activation_fn", "input", width="mlp", flat=True),
        "mlp_activation": Site("activation_fn", width="mlp", flat=True),
        "mlp_hidden": Site("fc2", "input", width="mlp", flat=True),
        "mlp_output": Site("fc2", flat=True),
        # Each block has a norm of the same name, for its MLP; this one is the decoder's.
        "final_norm_input": Site("final_layer_norm", "input"),
        "final_norm_output": Site("final_layer_norm"),
    },
    absent=NO_EXPERTS | NO_ROTARY,
    variants=(
        Variant(
            "do_layer_norm_before",
            False,
            sites={"block_mid": Site("self_attn_layer_norm")},
            absent=lacking(
                "final_norm_input",
                "final_norm_output",
                why="each of its blocks ends in a norm and none follows the last block",
            ),
        ),
        Variant(
            "_remove_final_layer_norm",
            True,
            absent=lacking(
                "final_norm_input",
                "final_norm_output",
                why="its config removes the norm after the last block",
            ),
        ),
    ),
    positions_derived_from_mask=True,
)

BLOOM = family(
    heads=[
        Head(None, ("BloomModel",), ""),
        Head("lm_head", ("BloomForCausalLM",), "transformer.", width="vocabulary"),
        Head("score", ("BloomForSequenceClassification",), "transformer."),
        Head("classifier", ("BloomForTokenClassification",), "transformer."),
        Head("qa_outputs", ("BloomForQuestionAnswering",), "transformer."),
    ],
    blocks="h",
    sites={
        "embedding_output": Site("word_embeddings"),
        "block_input": Site("", "input"),
        # The attention module adds the stream to its result before it returns, and so does the MLP.
        "block_mid": Site("self_attention"),
        "block_output": Site(""),
        "attention_input": Site("self_attention", "input"),
        "query_output": Site(
            "self_attention.query_key_value", width="query", heads="query", part="query", layout="grouped"
        ),
        "key_output": Site(
            "self_attention.query_key_value",
            width="key_value",
            heads="key_value",
            part="key",
            layout="grouped",
        ),
        "value_output": Site(
            "self_attention.query_key_value",
            width="key_value",
            heads="key_value",
            part="value",
            layout="grouped",
        ),
        "attention_value_output": Site("self_attention.dense", "input", width="query", heads="query"),
        "attention_output": Site("self_attention.dense"),
        "mlp_input": Site("mlp", "input"),
        "mlp_pre_activation": Site("mlp.gelu_impl", "input", width="mlp"),
        "mlp_activation": Site("mlp.gelu_impl", width="mlp"),
        "mlp_hidden": Site("mlp.dense_4h_to_h", "input", width="mlp"),
        "mlp_output": Site("mlp.dense_4h_to_h"),
        "final_norm_input": Site("ln_f", "input"),
        "final_norm_output": Site("ln_f"),
    },
    absent=NO_EXPERTS | NO_ROTARY,
    variants=(
        Variant(
            "apply_residual_connection_post_layernorm",
            True,
            sites={"block_mid": Site("post_attention_layernorm")},
        ),
    ),
    positions_derived_from_mask=True,
)

FALCON = family(
    heads=[
        Head(None, ("FalconModel",), ""),
        Head("lm_head", ("FalconForCausalLM",), "transformer.", width="vocabulary"),
        Head("score", ("FalconForSequenceClassification",), "transformer."),
        Head("classifier", ("FalconForTokenClassification",), "transformer."),
        Head("qa_outputs", ("FalconForQuestionAnswering",), "transformer."),
    ],
    blocks="h",
    sites={
        "embedding_output": Site("word_embeddings"),
        "block_input": Site("", "input"),
        "block_output": Site(""),
        "attention_input": Site("self_attention", "input"),
        "query_output": Site(
            "self_attention.query_key_value", width="query", heads="query", part="query", layout="grouped"
        ),
        "key_output": Site(
            "self_attention.query_key_value",
            width="key_value",
            heads="key_value",
            part="key",
            layout="grouped",
        ),
        "value_output": Site(
            "self_attention.query_key_value",
            width="key_value",
            heads="key_value",
            part="value",
            layout="grouped",
        ),
        "attention_value_output": Site("self_attention.dense", "input", width="query", heads="query"),
        "attention_output": Site("self_attention"),
        "mlp_input": Site("mlp", "input"),
        "mlp_pre_activation": Site("mlp.act", "input", width="mlp"),
        "mlp_activation": Site("mlp.act", width="mlp"),
        "mlp_hidden": Site("mlp.dense_4h_to_h", "input", width="mlp"),
        # Parallel blocks add the attention's output to this tensor in place, after hooks saw it.
        "mlp_output": Site("mlp"),
        "final_norm_input": Site("ln_f", "input"),
        "final_norm_output": Site("ln_f"),
    },
    sequential=False,
    variants=(
        Variant("alibi", True, absent=NO_ROTARY),
        Variant("parallel_attn", False, sequential=True),
        # The new blocks are parallel whatever `parallel_attn` says.
        Variant("new_decoder_architecture", True, sequential=False),
    ),
)

_LLAMA_ATTENTION = {
    "attention_input": Site("self_attn", "input"),
    "query_output": Site("self_attn.q_proj", width="query", heads="query"),
    "key_output": Site("self_attn.k_proj", width="key_value", heads="key_value"),
    "value_output": Site("self_attn.v_proj", width="key_value", heads="key_value"),
    "attention_value_output": Site("self_attn.o_proj", "input", width="query", heads="query"),
    "attention_output": Site("self_attn"),
}

_LLAMA_MLP = {
    "mlp_input": Site("mlp", "input"),
    "mlp_pre_activation": Site("mlp.act_fn", "input", width="mlp"),
    "mlp_activation": Site("mlp.act_fn", width="mlp"),
    "mlp_hidden": Site("mlp.down_proj", "input", width="mlp"),
    "mlp_output": Site("mlp"),
}

_LLAMA_STREAM = {
    "embedding_output": Site("embed_tokens"),
    "block_input": Site("", "input"),
    "block_output": Site(""),
    "final_norm_input": Site("norm", "input"),
    "final_norm_output": Site("norm"),
}

LLAMA = family(
    heads=[
        Head(None, ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "GemmaModel"), ""),
        Head(
            "lm_head",
            (
                "LlamaForCausalLM",
                "MistralForCausalLM",
                "Qwen2ForCausalLM",
                "Qwen3ForCausalLM",
                "GemmaForCausalLM",
            ),
            "model.",
            width="vocabulary",
        ),
        Head(
            "score",
            (
                "LlamaForSequenceClassification",
                "LlamaForTokenClassification",
                "MistralForSequenceClassification",
                "MistralForTokenClassification",
                "Qwen2ForSequenceClassification",
                "Qwen2ForTokenClassification",
                "Qwen3ForSequenceClassification",
                "Qwen3ForTokenClassification",
                "GemmaForSequenceClassification",
                "GemmaForTokenClassification",
            ),
            "model.",
        ),
        Head("qa_outputs", ("MistralForQuestionAnswering",), "model."),
        Head(
            "qa_outputs",
            ("LlamaForQuestionAnswering", "Qwen2ForQuestionAnswering", "Qwen3ForQuestionAnswering"),
            "transformer.",
        ),
    ],
    blocks="layers",
    sites=_LLAMA_STREAM | _LLAMA_ATTENTION | _LLAMA_MLP,
    positions_derived_from_mask=False,
)

SANDWICH = family(
    heads=[
        Head(None, ("Gemma2Model", "Gemma3TextModel", "Olmo2Model"), ""),
        Head(None, ("Gemma3Model",), "language_model."),
        Head(
            "lm_head",
            ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Olmo2ForCausalLM"),
            "model.",
            width="vocabulary",
        ),
        Head("lm_head", ("Gemma3ForConditionalGeneration",), "model.language_model.", width="vocabulary"),
        Head(
            "score",
            (
                "Gemma2ForSequenceClassification",
                "Gemma2ForTokenClassification",
                "Gemma3TextForSequenceClassification",
                "Olmo2ForSequenceClassification",
            ),
            "model.",
        ),
        Head("score", ("Gemma3ForSequenceClassification",), "model.language_model."),
    ],
    blocks="layers",
    sites=_LLAMA_STREAM
    | _LLAMA_ATTENTION
    | _LLAMA_MLP
    | {
        # A norm after attention and one after the MLP; OLMo 2 has only these and none before.
        "attention_contribution": Site("post_attention_layernorm"),
        "mlp_contribution": Site("post_feedforward_layernorm"),
    },
    # Gemma 3 as an encoder.
    variants=(Variant("use_bidirectional_attention", True, causal=False),),
    positions_derived_from_mask=False,
)

PHI3 = family(
    heads=[
        Head(None, ("Phi3Model",), ""),
        Head("lm_head", ("Phi3ForCausalLM",), "model.", width="vocabulary"),
        Head("score", ("Phi3ForSequenceClassification", "Phi3ForTokenClassification"), "model."),
    ],
    blocks="layers",
    sites=_LLAMA_STREAM
    | {
        "attention_input": Site("self_attn", "input"),
        "query_output": Site("self_attn.qkv_proj", width="query", heads="query", part="query"),
        "key_output": Site("self_attn.qkv_proj", width="key_value", heads="key_value", part="key"),
        "value_output": Site("self_attn.qkv_proj", width="key_value", heads="key_value", part="value"),
        "attention_value_output": Site("self_attn.o_proj", "input", width="query", heads="query"),
        "attention_output": Site("self_attn"),
        "attention_contribution": Site("resid_attn_dropout"),
        "mlp_input": Site("mlp", "input"),
        "mlp_pre_activation": Site("mlp.activation_fn", "input", width="mlp"),
        "mlp_activation": Site("mlp.activation_fn", width="mlp"),
        "mlp_hidden": Site("mlp.down_proj", "input", width="mlp"),
        "mlp_output": Site("mlp"),
        "mlp_contribution": Site("resid_mlp_dropout"),
    },
    positions_derived_from_mask=False,
)

CHOSEN = {
    "expert_choice": Site("mlp.experts", "input", 1, width="any", flat=True, read_only=CHOICE_IS_READ),
    "expert_weight": Site("mlp.experts", "input", 2, width="any", flat=True),
}
"""Where experts are told which of them each position is sent to."""

MIXTRAL = family(
    heads=[
        Head(None, ("MixtralModel",), ""),
        Head("lm_head", ("MixtralForCausalLM",), "model.", width="vocabulary"),
        Head("score", ("MixtralForSequenceClassification", "MixtralForTokenClassification"), "model."),
        Head("qa_outputs", ("MixtralForQuestionAnswering",), "model."),
    ],
    blocks="layers",
    sites=_LLAMA_STREAM
    | _LLAMA_ATTENTION
    | {
        "mlp_input": Site("mlp", "input"),
        "mlp_output": Site("mlp"),
        "router_input": Site("mlp.gate", "input", flat=True),
        # The router chooses experts before it returns its logits.
        "router_output": Site("mlp.gate", width="experts", flat=True, function="linear"),
        **CHOSEN,
        "expert_input": Site("mlp.experts", "input", flat=True),
        "expert_output": Site("mlp.experts", flat=True),
    },
    absent=FUSED_EXPERTS,
    positions_derived_from_mask=False,
)

GPT_OSS = family(
    heads=[
        Head(None, ("GptOssModel",), ""),
        Head("lm_head", ("GptOssForCausalLM",), "model.", width="vocabulary"),
        Head("score", ("GptOssForSequenceClassification", "GptOssForTokenClassification"), "model."),
    ],
    blocks="layers",
    sites=_LLAMA_STREAM
    | _LLAMA_ATTENTION
    | {
        "mlp_input": Site("mlp", "input"),
        "mlp_output": Site("mlp"),
        "router_input": Site("mlp.router", "input", flat=True),
        "router_output": Site("mlp.router", width="experts", flat=True, function="linear"),
        **CHOSEN,
        "expert_input": Site("mlp.experts", "input", flat=True),
        "expert_output": Site("mlp.experts", flat=True),
    },
    absent=FUSED_EXPERTS,
    positions_derived_from_mask=False,
)

DECODERS: tuple[ModelMap, ...] = (
    *GPT2,
    *GPT_NEO,
    *GPTJ,
    *GPT_NEOX,
    *OPT,
    *BLOOM,
    *FALCON,
    *LLAMA,
    *SANDWICH,
    *PHI3,
    *MIXTRAL,
    *GPT_OSS,
)
"""The maps of all decoder classes."""
