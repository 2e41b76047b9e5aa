"""Maps of models with an encoder and a decoder that attends to it."""

from __future__ import annotations

from model_maps import ModelMap, Site
from model_maps.families import NO_EXPERTS, NO_ROTARY, Head, family, prefixed

_T5_STREAM = {
    # The same table for both stacks, and a module for each.
    "embedding_output": Site("embed_tokens"),
    "block_input": Site("", "input"),
    # What self-attention returns includes the stream that its result was added to.
    "block_mid": Site("layer.0"),
    "block_output": Site(""),
    "attention_input": Site("layer.0.SelfAttention", "input"),
    "query_output": Site("layer.0.SelfAttention.q", width="query", heads="query"),
    "key_output": Site("layer.0.SelfAttention.k", width="key_value", heads="key_value"),
    "value_output": Site("layer.0.SelfAttention.v", width="key_value", heads="key_value"),
    "attention_value_output": Site("layer.0.SelfAttention.o", "input", width="query", heads="query"),
    "attention_output": Site("layer.0.SelfAttention"),
    "attention_contribution": Site("layer.0.dropout"),
    "final_norm_input": Site("final_layer_norm", "input"),
    "final_norm_output": Site("final_layer_norm"),
}

_T5_ENCODER = _T5_STREAM | {
    "mlp_input": Site("layer.1.DenseReluDense", "input"),
    "mlp_pre_activation": Site("layer.1.DenseReluDense.act", "input", width="mlp"),
    "mlp_activation": Site("layer.1.DenseReluDense.act", width="mlp"),
    "mlp_hidden": Site("layer.1.DenseReluDense.wo", "input", width="mlp"),
    "mlp_output": Site("layer.1.DenseReluDense"),
    "mlp_contribution": Site("layer.1.dropout"),
}

_T5_CROSS_ATTENTION = {
    # A block has two middles: `decoder_block_mid` is what this attention reads, `cross_block_mid` what the MLP does.
    "block_mid": Site("layer.1"),
    "attention_input": Site("layer.1.EncDecAttention", "input"),
    "query_output": Site("layer.1.EncDecAttention.q", width="query", heads="query"),
    "key_output": Site("layer.1.EncDecAttention.k", width="key_value", heads="key_value"),
    "value_output": Site("layer.1.EncDecAttention.v", width="key_value", heads="key_value"),
    "attention_value_output": Site("layer.1.EncDecAttention.o", "input", width="query", heads="query"),
    "attention_output": Site("layer.1.EncDecAttention"),
    "attention_contribution": Site("layer.1.dropout"),
}

_T5_DECODER = _T5_STREAM | {
    "mlp_input": Site("layer.2.DenseReluDense", "input"),
    "mlp_pre_activation": Site("layer.2.DenseReluDense.act", "input", width="mlp"),
    "mlp_activation": Site("layer.2.DenseReluDense.act", width="mlp"),
    "mlp_hidden": Site("layer.2.DenseReluDense.wo", "input", width="mlp"),
    "mlp_output": Site("layer.2.DenseReluDense"),
    "mlp_contribution": Site("layer.2.dropout"),
}

T5 = family(
    heads=[
        Head(None, ("T5Model", "MT5Model", "UMT5Model"), ""),
        Head(
            "lm_head",
            ("T5ForConditionalGeneration", "MT5ForConditionalGeneration", "UMT5ForConditionalGeneration"),
            "",
            width="vocabulary",
            decoder_reads="labels",
        ),
        Head(
            "classification_head",
            ("T5ForSequenceClassification", "MT5ForSequenceClassification", "UMT5ForSequenceClassification"),
            "transformer.",
            decoder_reads="input_ids",
        ),
        Head(
            "qa_outputs",
            ("T5ForQuestionAnswering", "MT5ForQuestionAnswering", "UMT5ForQuestionAnswering"),
            "",
            decoder_reads="input_ids",
        ),
    ],
    blocks={"encoder": "encoder.block", "decoder": "decoder.block"},
    sites=prefixed("encoder", _T5_ENCODER, "encoder.")
    | prefixed("decoder", _T5_DECODER, "decoder.")
    | prefixed("cross", _T5_CROSS_ATTENTION),
    absent=NO_EXPERTS | NO_ROTARY,
    positions_derived_from_mask=False,
)

T5_ENCODER = family(
    heads=[
        Head(None, ("T5EncoderModel", "MT5EncoderModel", "UMT5EncoderModel"), "encoder."),
        Head(
            "classifier",
            ("T5ForTokenClassification", "MT5ForTokenClassification", "UMT5ForTokenClassification"),
            "transformer.encoder.",
        ),
    ],
    blocks="block",
    sites=_T5_ENCODER,
    absent=NO_EXPERTS | NO_ROTARY,
    positions_derived_from_mask=False,
    causal=False,
)

ENCODER_DECODERS: tuple[ModelMap, ...] = (*T5, *T5_ENCODER)
"""The maps of all encoder-decoder classes, and of those that are the encoder of one."""
