"""Maps of encoders with bidirectional attention."""

from __future__ import annotations

from model_maps import ModelMap, Site, Variant
from model_maps.families import NO_EXPERTS, NO_ROTARY, Head, family, lacking

BERT = family(
    heads=[
        Head(None, ("BertModel",), ""),
        Head(
            "cls.predictions",
            ("BertForMaskedLM", "BertForPreTraining", "BertLMHeadModel"),
            "bert.",
            width="vocabulary",
        ),
        Head("cls", ("BertForNextSentencePrediction",), "bert."),
        Head(
            "classifier",
            ("BertForMultipleChoice", "BertForSequenceClassification", "BertForTokenClassification"),
            "bert.",
        ),
        Head("qa_outputs", ("BertForQuestionAnswering",), "bert."),
    ],
    blocks="encoder.layer",
    sites={
        "embedding_output": Site("embeddings.word_embeddings"),
        "block_input": Site("", "input"),
        # Norms follow the additions: this one's output is what the MLP reads and what its result is added to.
        "block_mid": Site("attention.output"),
        "block_output": Site(""),
        # Not `attention`, whose input is the residual stream as well.
        "attention_input": Site("attention.self", "input"),
        "query_output": Site("attention.self.query", width="query", heads="query"),
        "key_output": Site("attention.self.key", width="key_value", heads="key_value"),
        "value_output": Site("attention.self.value", width="key_value", heads="key_value"),
        "attention_value_output": Site("attention.output.dense", "input", width="query", heads="query"),
        "attention_output": Site("attention.output.dense"),
        "attention_contribution": Site("attention.output.dropout"),
        "mlp_input": Site("intermediate", "input"),
        "mlp_pre_activation": Site("intermediate.intermediate_act_fn", "input", width="mlp"),
        "mlp_activation": Site("intermediate.intermediate_act_fn", width="mlp"),
        "mlp_hidden": Site("output.dense", "input", width="mlp"),
        "mlp_output": Site("output.dense"),
        "mlp_contribution": Site("output.dropout"),
    },
    absent=NO_EXPERTS
    | NO_ROTARY
    | lacking(
        "final_norm_input",
        "final_norm_output",
        why="each of its blocks ends in a norm and none follows the last block",
    ),
    variants=(Variant("is_decoder", True, causal=True),),
    positions_derived_from_mask=False,
    causal=False,
)

ENCODERS: tuple[ModelMap, ...] = BERT
"""The maps of all encoder classes."""
