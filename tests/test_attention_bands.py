"""Scores and patterns of attention in bands, as matrices: what is read, what a write does, what is refused."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
    LongT5Config,
    LongT5ForConditionalGeneration,
    PegasusXConfig,
    PegasusXForConditionalGeneration,
)

import intervenable as iv
from intervenable.attention_bands import BandedMatrix
from model_maps import Bands

SMALL = {"vocab_size": 64, "pad_token_id": 1, "decoder_start_token_id": 2}
KINDS = ("led", "longformer", "longt5", "longt5 with sides")
LAYER = 1


@cache
def made(kind, window=6):
    """A model whose queries read `window // 2` keys on either side (LongT5: so many), in float64."""
    torch.manual_seed(0)
    sizes = {"attention_window": window, "num_hidden_layers": 2}
    if kind == "led":
        config = LEDConfig(
            **SMALL,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            attention_window=window,
            max_encoder_position_embeddings=64,
        )
        model = LEDForConditionalGeneration(config)
    elif kind == "longformer":
        config = LongformerConfig(
            vocab_size=64, hidden_size=32, num_attention_heads=4, intermediate_size=32, **sizes
        )
        model = LongformerForMaskedLM(config)
    else:
        sides = "transient-global" if "sides" in kind else "local"
        config = LongT5Config(
            **SMALL,
            d_model=32,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=4,
            local_radius=window // 2,
            global_block_size=3,
            encoder_attention_type=sides,
        )
        model = LongT5ForConditionalGeneration(config)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # patterns far from even, biases that are not zero
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs_of(kind, length=14, padded=0):
    tokens = torch.randint(4, 60, (2, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, -padded:] = 0
    given = {"input_ids": tokens, "attention_mask": mask}
    return given if kind == "longformer" else {**given, "decoder_input_ids": tokens[:, :5]}


def named(kind, word):
    return word if kind == "longformer" else f"encoder_{word}"


def stack_of(kind):
    return None if kind == "longformer" else "encoder"


def attention_of(model, kind):
    if kind == "longformer":
        return model.longformer.encoder.layer[LAYER].attention.self
    if kind == "led":
        return model.led.encoder.layers[LAYER].self_attn.longformer_self_attn
    attention = model.encoder.block[LAYER].layer[0]
    return getattr(attention, "LocalSelfAttention", None) or attention.TransientGlobalSelfAttention


def output_of(model, kind):
    """The linear module that is given what the heads have read."""
    if kind == "longformer":
        return model.longformer.encoder.layer[LAYER].attention.output.dense
    return model.led.encoder.layers[LAYER].self_attn.output if kind == "led" else attention_of(model, kind).o


def edit(kind, word, intervention=None, **fields):
    unit = "pos" if word.endswith("output") else "h"
    unit = "h.pos" if word.startswith("head") else unit
    return iv.RepresentationConfig(LAYER, named(kind, word), unit, intervention=intervention, **fields)


def run(model, inputs, *entries):
    """What our model returns with these entries, and what they have collected."""
    result = iv.IntervenableModel(iv.IntervenableConfig(list(entries)), model)(inputs)
    return result[1], result.collected


def logits(model, inputs, *entries):
    with torch.no_grad():
        return (run(model, inputs, *entries)[0] if entries else model(**inputs)).logits


def read(model, kind, inputs, *words, edits=()):
    reads = [edit(kind, word, iv.CollectIntervention(), name=word) for word in words]
    with torch.no_grad():
        _, collected = run(model, inputs, *edits, *reads)
    return [collected[word] for word in words]


def returned(model, kind, inputs):
    """What the model itself returns of its attention, entry by entry at the key that it stands for."""
    with torch.no_grad():
        output = model(**inputs, output_attentions=True)
    bands = (output.attentions if kind == "longformer" else output.encoder_attentions)[LAYER]
    length = inputs["input_ids"].shape[1]
    if kind in ("led", "longformer"):
        whole = torch.zeros(2, 4, length, length, dtype=bands.dtype)
        side = bands.shape[-1] // 2
        for query in range(length):
            for key in range(max(0, query - side), min(length, query + side + 1)):
                whole[:, :, query, key] = bands[:, :, query, side + key - query]
        return whole
    block = bands.shape[3]
    whole = torch.zeros(2, 4, length, length, dtype=bands.dtype)
    for query in range(length):
        for key in range(length):
            column = key - (query // block - 1) * block
            if 0 <= column < 3 * block:
                whole[:, :, query, key] = bands[:, query // block, :, query % block, column]
    return whole


@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_pattern_has_the_entries_that_the_model_returns_at_their_keys(kind, padded):
    model, inputs = made(kind), inputs_of(kind, padded=padded)

    (pattern,) = read(model, kind, inputs, "attention_pattern")

    pattern = pattern[:, :, :14, :14]  # some models add positions to fill their windows
    if kind in ("led", "longformer"):  # and take away what queries at padding have read
        pattern = pattern * inputs["attention_mask"][:, None, :, None]
    assert torch.equal(pattern, returned(model, kind, inputs))


@pytest.mark.parametrize(("kind", "window"), [("led", 4), ("led", 10), ("longt5", 2), ("longt5", 10)])
def test_windows_of_other_widths_have_their_keys_where_they_are(kind, window):
    model, inputs = made(kind, window), inputs_of(kind, 20)

    (pattern,) = read(model, kind, inputs, "attention_pattern")
    pattern = pattern[:, :, :20, :20]

    far = (torch.arange(20)[:, None] - torch.arange(20)).abs() > window // 2
    assert not pattern[:, :, far].any()
    assert pattern[:, :, ~far].all()
    assert torch.equal(pattern, returned(model, kind, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_masked_where_a_query_reads_nothing_and_their_softmax_is_the_pattern(kind):
    model, inputs = made(kind), inputs_of(kind)

    scores, pattern, masked = read(
        model, kind, inputs, "attention_scores", "attention_pattern", "attention_scores_masked"
    )

    assert torch.equal(scores == -torch.inf, masked <= -1e8)
    scores, pattern = scores[:, :, :14], pattern[:, :, :14]
    assert torch.equal(scores == -torch.inf, pattern == 0)
    share = pattern.sum(-1, keepdim=True)
    assert_close(scores.softmax(-1).to(pattern), pattern / share)
    assert bool((share < 0.999).any()) == ("sides" in kind)


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_of_a_pattern_at_zero_takes_one_value_from_what_its_query_has_read(kind):
    model, inputs = made(kind), inputs_of(kind)
    head, query, key = 2, 7, 6
    width = 8
    pattern, values = read(model, kind, inputs, "attention_pattern", "head_value_output")
    lost = pattern[:, head, query, key, None] * values[:, head, key]

    def without(module, args):
        given = args[0].clone()
        given[:, query, head * width : (head + 1) * width] -= lost
        return (given,)

    handle = output_of(model, kind).register_forward_pre_hook(without)
    expected = logits(model, inputs)
    handle.remove()

    cut = iv.attention.grid(LAYER, head, query, key, stack=stack_of(kind))
    found = logits(model, inputs, cut)

    assert_close(found, expected)
    assert not torch.allclose(found, logits(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_cut_from_the_scores_leaves_its_weight_to_the_others(kind):
    model, inputs = made(kind), inputs_of(kind)
    (before,) = read(model, kind, inputs, "attention_pattern")

    cut = iv.attention.columns(LAYER, 1, 5, at="scores", stack=stack_of(kind))
    (after,) = read(model, kind, inputs, "attention_pattern", edits=[cut])

    if "sides" not in kind:
        expected = before.clone()
        expected[:, 1, :, 5] = 0
        expected[:, 1] /= expected[:, 1].sum(-1, keepdim=True)
        assert_close(after[:, :, :14], expected[:, :, :14])
    assert not after[:, 1, :, 5].any()
    assert torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    near = before[0, 1, :, 5] > 0
    left = before[:, 1, near].sum(-1) - before[:, 1, near, 5]
    assert (after[:, 1, near].sum(-1) >= left - 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_writing_back_what_was_read_changes_no_bit(kind):
    model, inputs = made(kind), inputs_of(kind)
    words = ("attention_scores", "attention_scores_masked", "attention_pattern")
    entries = [edit(kind, word, lambda old: old + 0) for word in words]

    assert torch.equal(logits(model, inputs, *entries), logits(model, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_weight_on_a_key_outside_the_band_is_refused_with_the_keys_that_are_read(kind):
    model, inputs = made(kind), inputs_of(kind)
    entry = edit(kind, "attention_pattern", lambda old: torch.full_like(old, 1 / old.shape[-1]))

    with pytest.raises(iv.EditError, match=r"gives query 0 of head 0 .* weight on key \d+.*keys 0 to \d"):
        run(model, inputs, entry)


def test_scores_outside_the_band_stay_masked_whatever_is_written():
    model, inputs = made("longt5"), inputs_of("longt5")
    entry = edit("longt5", "attention_scores", torch.zeros_like)

    (pattern,) = read(model, "longt5", inputs, "attention_pattern", edits=[entry])

    near = (torch.arange(14)[:, None] - torch.arange(14)).abs() <= 3
    assert_close(pattern, (near / near.sum(-1, keepdim=True)).to(pattern).expand_as(pattern))


def test_positions_that_all_attend_to_are_refused_with_what_can_be_had_instead():
    model, inputs = made("led"), inputs_of("led")
    for globally in ([0], [0, 5]):
        mask = torch.zeros_like(inputs["input_ids"])
        mask[:, globally] = 1
        with pytest.raises(iv.UnsupportedModelError, match=r"(?s)global attention mask.*head_query_output"):
            read(model, "led", {**inputs, "global_attention_mask": mask}, "attention_pattern")


def test_gradients_reach_queries_through_a_pattern_that_was_changed():
    model, inputs = made("longt5"), inputs_of("longt5")
    entry = edit("longt5", "attention_pattern", iv.ScaleIntervention(0.5))

    total = run(model, inputs, entry)[0].logits.sum()
    (gradient,) = torch.autograd.grad(total, attention_of(model, "longt5").q.weight)

    assert gradient.abs().sum() > 0


@cache
def with_tokens_beside():
    """A model whose queries read their own block and three tokens beside the inputs."""
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = PegasusXConfig(**SMALL, **sizes, **heads, d_model=32, num_global_tokens=3, block_size=4)
    return PegasusXForConditionalGeneration(config).eval()


def test_columns_of_tokens_beside_the_inputs_come_first_and_are_no_keys():
    model, inputs = with_tokens_beside(), inputs_of("pegasus_x", 11, padded=2)
    read_first = iv.RepresentationConfig(
        0, "encoder_attention_pattern", "h", intervention=iv.CollectIntervention(), name="pattern"
    )
    with torch.no_grad():
        pattern = run(model, inputs, read_first)[1]["pattern"]
        bands = model(**inputs, output_attentions=True).encoder_attentions[0]["local"]

    assert bands.shape == (2, 4, 3, 4, 3 + 4)
    expected = torch.zeros(2, 4, 12, 12)
    for query in range(12):
        for key in range(query // 4 * 4, query // 4 * 4 + 4):
            expected[:, :, query, key] = bands[:, :, query // 4, query % 4, 3 + key % 4]
    assert torch.equal(pattern, expected)
    assert (pattern.sum(-1) < 0.999).any()


def test_blocks_that_begin_amid_the_positions_are_refused():
    declared = iv.RepresentationConfig(
        1, "encoder_attention_pattern", "h", intervention=iv.CollectIntervention()
    )

    with pytest.raises(iv.UnsupportedModelError, match=r"Layer 1 .* positions where the stream has"):
        run(with_tokens_beside(), inputs_of("pegasus_x"), declared)


def test_blocks_of_which_the_last_is_not_full_are_put_back_as_they_were():
    bands = Bands(("examples", "blocks", "heads", "queries", "keys"), 3)
    scores = torch.arange(2 * 3 * 2 * 4 * 14.0).reshape(2, 3, 2, 4, 14)
    banded = BandedMatrix(scores.shape, bands, 10)

    matrix = banded.matrix(scores, -1.0)

    assert banded.beside == 2
    assert matrix.shape == (2, 2, 10, 10)
    assert matrix[1, 0, 9, 4] == scores[1, 2, 0, 1, 0]
    assert matrix[1, 1, 0, 7] == scores[1, 0, 1, 0, 11]
    assert matrix[0, 0, 0, 8] == matrix[0, 0, 9, 3] == -1
    assert torch.equal(banded.put(scores, matrix), scores)
    changed = banded.put(scores, matrix + 1) - scores
    assert changed.sum() == 2 * 2 * int((matrix[0, 0] >= 0).sum())
