"""Maps of decoder language models, one table for all classes that share a layout."""

from __future__ import annotations

from model_maps.families import Head, family
from model_maps.schema import Site

GPT2 = family(
    stack=("GPT2Model",),
    prefix="transformer.",
    heads=[
        Head("lm_head", ("GPT2LMHeadModel", "GPT2DoubleHeadsModel"), width="vocabulary"),
        Head("score", ("GPT2ForSequenceClassification",)),
        Head("classifier", ("GPT2ForTokenClassification",)),
        Head("qa_outputs", ("GPT2ForQuestionAnswering",)),
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
)

LLAMA = family(
    stack=("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model", "GemmaModel"),
    prefix="model.",
    heads=[
        Head(
            "lm_head",
            (
                "LlamaForCausalLM",
                "MistralForCausalLM",
                "Qwen2ForCausalLM",
                "Qwen3ForCausalLM",
                "GemmaForCausalLM",
            ),
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
        ),
        Head(
            "qa_outputs",
            ("LlamaForQuestionAnswering", "Qwen2ForQuestionAnswering", "Qwen3ForQuestionAnswering"),
            prefix="transformer.",
        ),
        Head("qa_outputs", ("MistralForQuestionAnswering",)),
    ],
    blocks="layers",
    sites={
        "embedding_output": Site("embed_tokens"),
        "block_input": Site("", "input"),
        "block_output": Site(""),
        "attention_input": Site("self_attn", "input"),
        "query_output": Site("self_attn.q_proj", width="query", heads="query"),
        "key_output": Site("self_attn.k_proj", width="key_value", heads="key_value"),
        "value_output": Site("self_attn.v_proj", width="key_value", heads="key_value"),
        "attention_value_output": Site("self_attn.o_proj", "input", width="query", heads="query"),
        "attention_output": Site("self_attn"),
        "mlp_input": Site("mlp", "input"),
        "mlp_pre_activation": Site("mlp.act_fn", "input", width="mlp"),
        "mlp_activation": Site("mlp.act_fn", width="mlp"),
        "mlp_hidden": Site("mlp.down_proj", "input", width="mlp"),
        "mlp_output": Site("mlp"),
        "final_norm_input": Site("norm", "input"),
        "final_norm_output": Site("norm"),
    },
)

DECODERS = (*GPT2, *LLAMA)
