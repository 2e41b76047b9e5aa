"""Models of two stacks: T5's map against its source, and which stack's positions a component has."""

from __future__ import annotations

from contextlib import ExitStack

import by_hand
import pytest
import torch
import transformers
from declared import components_of, map_of
from torch.testing import assert_close

from model_maps import COMPONENTS, AbsentComponentError, component_site, find_map, sizes_of
from tiny_models import ENCODER_DECODER_CASES as CASES
from tiny_models import ENCODER_DECODERS, HEAD_DIM, HEADS, tiny, tiny_inputs

LENGTHS = {"encoder": 7, "decoder": 5}
LAYER = 1
LAYERS = {"encoder": 3, "decoder": 4}


def seen(model, *components, layer=LAYER, inputs=None):
    """What hooks written by hand see at these components, in one run."""
    found = {}

    def keep(component):
        return lambda value: found.__setitem__(component, value.clone())

    with ExitStack() as stack, torch.no_grad():
        for component in components:
            stack.callback(by_hand.hook(model, component, keep(component), layer).remove)
        model(**(inputs or inputs_of(model)))
    return tuple(found[component] for component in components)


def inputs_of(model, seed=0):
    inputs = tiny_inputs(model, seed=seed)
    if type(model).__name__.endswith(
        "ForSequenceClassification"
    ):  # it reads its answer at the end of the text
        inputs["input_ids"][:, -1] = model.config.eos_token_id
        inputs["decoder_input_ids"] = inputs["input_ids"]
        inputs["decoder_attention_mask"] = inputs["attention_mask"]
    return inputs


def block_of(model, component, layer=LAYER):
    return model.get_submodule(f"{map_of(model).blocks_of(component)}.{layer}")


def normed(model, component, stream):
    """What the norm makes of the stream that a sublayer reads."""
    sublayer = {"attention_input": 0, "cross_attention_input": 1, "mlp_input": -1}
    word = component if component.startswith("cross_") else COMPONENTS[component].word
    return block_of(model, component).layer[sublayer[word]].layer_norm(stream)


# Every class

CLASSES = [
    getattr(transformers, f"{prefix}{head}").__name__
    for prefix in ("T5", "MT5", "UMT5")
    for head in (
        "Model",
        "ForConditionalGeneration",
        "EncoderModel",
        "ForSequenceClassification",
        "ForTokenClassification",
        "ForQuestionAnswering",
    )
]
CLASS_CASES = [(name, variant) for name in CLASSES for variant in (None, "gated")]


def family_of(class_name):
    return next(name for name in ("umt5", "mt5", "t5") if class_name.lower().startswith(name))


def test_these_are_all_classes_that_transformers_has_for_these_families():
    there = {
        name
        for family in ENCODER_DECODERS
        for name in dir(getattr(transformers.models, family))
        if isinstance(cls := getattr(transformers, name, None), type)
        and issubclass(cls, transformers.PreTrainedModel)
        and not name.endswith("PreTrainedModel")
    }
    assert there == set(CLASSES)


@pytest.mark.parametrize(("class_name", "variant"), CLASS_CASES)
def test_every_site_of_every_class_exists_and_is_as_wide_and_long_as_promised(class_name, variant):
    model = tiny(family_of(class_name), head=class_name, variant=variant)
    described, sizes, inputs = map_of(model), sizes_of(model.config), inputs_of(model)
    names = described.components()

    assert {"encoder_block_output", "cross_attention_pattern"} <= set(names) or "block_output" in names
    names = [name for name in names if not COMPONENTS[name].inside]  # those no module hands over
    for name, value in zip(names, seen(model, *names, inputs=inputs), strict=True):
        site, stack = described.site(name), described.stack_of(name)
        expected = inputs["decoder_input_ids" if stack == "decoder" else "input_ids"].shape
        if name != "logits":  # some heads read one pooled position
            assert value.shape[:-1] == expected, name
        assert sizes.width(site.width) in (None, value.shape[-1]), name
        assert site.width != "any" or name == "logits"


# The streams


@pytest.mark.parametrize(("family", "variant"), CASES)
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_each_block_reads_what_the_block_below_wrote(stack, family, variant):
    model = tiny(family, variant=variant)
    for layer in range(LAYERS[stack] - 1):
        (below,) = seen(model, f"{stack}_block_output", layer=layer)
        (above,) = seen(model, f"{stack}_block_input", layer=layer + 1)
        assert torch.equal(below, above)
    last, end = seen(model, f"{stack}_block_output", f"{stack}_final_norm_input", layer=LAYERS[stack] - 1)
    assert torch.equal(last, end)
    first, embedded = seen(model, f"{stack}_block_input", f"{stack}_embedding_output", layer=0)
    assert torch.equal(first, embedded)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_an_encoder_block_adds_attention_and_mlp(family, variant):
    model = tiny(family, variant=variant)
    names = ("block_input", "attention_contribution", "block_mid", "mlp_contribution", "block_output")
    before, attention, middle, mlp, after = seen(model, *(f"encoder_{name}" for name in names))
    assert_close(middle, before + attention)
    assert_close(after, middle + mlp)
    assert attention.abs().max() > 0.1 < mlp.abs().max()


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_a_decoder_block_adds_attention_then_cross_attention_then_mlp(family, variant):
    model = tiny(family, variant=variant)
    before, attention, first, crossing, second, mlp, after = seen(
        model,
        "decoder_block_input",
        "decoder_attention_contribution",
        "decoder_block_mid",
        "cross_attention_contribution",
        "cross_block_mid",
        "decoder_mlp_contribution",
        "decoder_block_output",
    )
    assert_close(first, before + attention)
    assert_close(second, first + crossing)
    assert_close(after, second + mlp)


@pytest.mark.parametrize(
    ("stream", "reader"),
    [
        ("encoder_block_input", "encoder_attention_input"),
        ("encoder_block_mid", "encoder_mlp_input"),
        ("decoder_block_input", "decoder_attention_input"),
        ("decoder_block_mid", "cross_attention_input"),
        ("cross_block_mid", "decoder_mlp_input"),
    ],
)
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_each_sublayer_reads_the_norm_of_the_stream_before_it(family, variant, stream, reader):
    model = tiny(family, variant=variant)
    before, read = seen(model, stream, reader)
    assert_close(read, normed(model, reader, before))


# Attention


@pytest.mark.parametrize(("family", "variant"), CASES)
@pytest.mark.parametrize(
    ("prefix", "field"),
    [
        ("encoder", "encoder_attentions"),
        ("decoder", "decoder_attentions"),
        ("cross", "cross_attentions"),
    ],
)
def test_pattern_times_value_heads_is_what_each_head_sends_on(prefix, field, family, variant):
    model = tiny(family, variant=variant, attention="eager")
    value, sent, output = seen(
        model,
        f"{prefix}_value_output",
        f"{prefix}_attention_value_output",
        f"{prefix}_attention_output",
    )
    with torch.no_grad():
        pattern = getattr(model(**inputs_of(model), output_attentions=True), field)[LAYER]
    by_heads = value.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)

    assert_close(sent, (pattern @ by_heads).transpose(1, 2).flatten(2))
    projection, _ = by_hand.module_at(model, f"{prefix}_attention_value_output")
    assert_close(output, sent @ projection.weight.T)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_the_scores_of_cross_attention_are_its_queries_times_its_keys(family, variant):
    model = tiny(family, variant=variant, attention="eager")
    query, key = seen(model, "cross_query_output", "cross_key_output")
    query, key = (value.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for value in (query, key))
    with torch.no_grad():
        pattern = model(**inputs_of(model), output_attentions=True).cross_attentions[LAYER]
    assert_close(pattern, (query @ key.mT).softmax(-1))  # no scale, no bias


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_the_keys_of_cross_attention_are_made_of_what_the_encoder_gives(family, variant):
    model = tiny(family, variant=variant)
    encoded, key = seen(model, "encoder_final_norm_output", "cross_key_output")
    module, _ = by_hand.module_at(model, "cross_key_output")
    assert_close(key, encoded @ module.weight.T)


# The MLP and the ends


@pytest.mark.parametrize(("family", "variant"), CASES)
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_the_inside_of_an_mlp_follows_its_formula(stack, family, variant):
    model = tiny(family, variant=variant)
    words = ("mlp_input", "mlp_pre_activation", "mlp_activation", "mlp_hidden", "mlp_output")
    given, pre, activation, hidden, output = seen(model, *(f"{stack}_{word}" for word in words))
    mlp = block_of(model, f"{stack}_mlp_input").layer[-1].DenseReluDense

    gate, up = (mlp.wi_0, mlp.wi_1(given)) if variant == "gated" else (mlp.wi, 1.0)
    assert_close(pre, gate(given))
    assert not torch.allclose(activation, pre)
    assert_close(hidden, activation * up)
    assert_close(output, mlp.wo(hidden))


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_logits_are_those_the_model_returns(family, variant):
    model = tiny(family, variant=variant)
    (logits,) = seen(model, "logits")
    with torch.no_grad():
        assert torch.equal(logits, model(**inputs_of(model)).logits)


# What the map says of stacks


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_what_is_causal_depends_on_no_later_position_of_its_stack(family, variant):
    model = tiny(family, variant=variant)
    inputs = inputs_of(model)
    described = map_of(model)
    for name in ("encoder_block_output", "decoder_block_output", "cross_attention_output"):
        stack = described.stack_of(name)
        changed = dict(inputs)
        key = {"encoder": "input_ids", "decoder": "decoder_input_ids"}[stack]
        changed[key] = changed[key].clone()
        changed[key][:, -1] = 71 - changed[key][:, -1]
        (before,), (after,) = seen(model, name, inputs=inputs), seen(model, name, inputs=changed)
        assert not torch.equal(before, after)
        unmoved = torch.equal(before[:, :-1], after[:, :-1])
        if name == "cross_attention_output":
            assert unmoved  # its queries come from the causal part, and its keys are the encoder's
        else:
            assert unmoved == described.causal_at(name), name


def test_cross_attention_reads_every_key_before_and_after():
    model = tiny("t5", attention="eager")
    with torch.no_grad():
        output = model(**inputs_of(model), output_attentions=True)
    assert (output.cross_attentions[LAYER] > 0).all()
    assert (output.decoder_attentions[LAYER].triu(1) == 0).all()
    described = map_of(model)
    assert described.causal_at("decoder_attention_pattern")
    assert not described.causal_at("cross_attention_pattern")
    assert not described.causal_at("encoder_attention_pattern")


def test_names_say_whose_positions_rows_and_columns_are():
    stacks = {name: (COMPONENTS[name].stack, COMPONENTS[name].key_stack) for name in COMPONENTS}
    assert stacks["attention_pattern"] == (None, None)
    assert stacks["encoder_attention_pattern"] == ("encoder", "encoder")
    assert stacks["cross_attention_pattern"] == ("decoder", "encoder")
    assert stacks["cross_query_output"][0] == stacks["cross_head_attention_value_output"][0] == "decoder"
    for word in ("key_output", "head_value_output", "expanded_head_key"):
        assert stacks[f"cross_{word}"][0] == "encoder"
    assert map_of(tiny("t5")).stack_of("logits") == "decoder"
    assert map_of(tiny("bert")).stack_of("logits") is None


def test_a_model_that_is_the_encoder_alone_has_the_plain_names():
    for head in ("T5EncoderModel", "UMT5ForTokenClassification"):
        described = map_of(tiny(family_of(head), head=head))
        assert not described.causal
        assert not any(COMPONENTS[name].prefix for name in described.components())


REFUSED = [
    (
        "T5Model",
        "block_output",
        "it has an encoder and a decoder, so say 'encoder_block_output' or 'decoder_block_output'",
    ),
    (
        "T5Model",
        "attention_pattern",
        "it has an encoder and a decoder, so say 'encoder_attention_pattern', 'decoder_attention_pattern' or"
        " 'cross_attention_pattern'",
    ),
    ("T5Model", "rotary_query", "it has no rotary embedding"),
    ("T5Model", "encoder_router_input", "its MLP is dense: it has no router and no experts"),
    ("T5Model", "logits", "it is the bare stack of blocks, without a head"),
    ("GPT2Model", "encoder_block_output", "it has one stack of blocks, so say 'block_output'"),
    ("T5EncoderModel", "decoder_block_output", "it has one stack of blocks, so say 'block_output'"),
    (
        "LlamaModel",
        "cross_attention_pattern",
        "it has one stack of blocks and no attention from one to another",
    ),
    ("GPT2Model", "encoder_rotary_key", "it has no rotary embedding"),
]


@pytest.mark.parametrize(("class_name", "component", "reason"), REFUSED)
def test_a_name_with_the_wrong_prefix_is_refused_with_the_right_one(class_name, component, reason):
    with pytest.raises(AbsentComponentError) as caught:
        component_site(find_map([class_name]), component)
    assert str(caught.value).splitlines()[0] == f"{class_name} has no {component!r}: {reason}."


def test_every_prefixed_name_means_what_its_word_means():
    for name, known in COMPONENTS.items():
        assert name == (f"{known.prefix}_{known.word}" if known.prefix else known.word)
        word = COMPONENTS[known.word]
        assert (known.shape, known.scope, known.axes) == (word.shape, word.scope, word.axes)
        for field in ("heads_of", "derived_from", "fallback", "inside"):
            pointed, plain = getattr(known, field), getattr(word, field)
            assert pointed == (plain and f"{known.prefix}_{plain}".strip("_")), name
            assert pointed is None or pointed in COMPONENTS
    assert sum(name.startswith("cross_") for name in components_of(tiny("t5"))) == 18
