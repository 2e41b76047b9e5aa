"""Models of two stacks: T5's map against its source, and which stack's positions a component has."""

from __future__ import annotations

from contextlib import ExitStack

import by_hand
import pytest
import torch
import transformers
from declared import at, components_of, map_of, same_bits, wrapped
from torch.testing import assert_close
from written_maps import find_map

import intervenable as iv
import tiny_models
from intervenable.inputs import read_inputs
from model_maps import COMPONENTS, AbsentComponentError, component_site, sizes_of
from tiny_models import ENCODER_DECODER_CASES as CASES
from tiny_models import ENCODER_DECODERS, HEAD_DIM, HEADS, tiny, tiny_inputs

LENGTHS = {"encoder": 7, "decoder": 5}
TWO = (("t5", None), ("umt5", "gated"))
"""One of each attention and of each MLP: mT5's source is T5's."""
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


# What a run is given


def given(model, **inputs):
    return read_inputs(inputs, model, "base")


def test_each_stack_counts_its_own_real_tokens():
    model = tiny("t5")
    inputs = read_inputs(tiny_inputs(model, padding="left"), model, "base")
    encoder, decoder = inputs.of("encoder"), inputs.of("decoder")
    assert inputs.of(None) is encoder is inputs
    assert [(view.batch, view.length) for view in (encoder, decoder)] == [(2, 7), (2, 5)]
    assert encoder.real_positions == [list(range(7)), list(range(1, 7))]
    assert decoder.real_positions == [list(range(5)), list(range(1, 5))]
    assert [view.count(1) for view in (encoder, decoder)] == [6, 4]


@pytest.mark.parametrize(
    ("head", "reads"),
    [
        ("T5ForConditionalGeneration", "labels"),
        ("T5ForSequenceClassification", "input_ids"),
        ("T5ForQuestionAnswering", "input_ids"),
        ("MT5ForQuestionAnswering", "input_ids"),
        ("UMT5ForSequenceClassification", "input_ids"),
    ],
)
def test_a_decoder_that_is_given_nothing_counts_what_the_model_makes_it_of(head, reads):
    model = tiny(family_of(head), head=head)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 4, 2]])}
    if reads == "labels":
        inputs["labels"] = torch.tensor([[3, 4, -100], [5, 2, 6]])
    (stream,) = seen(model, "decoder_block_output", inputs=inputs)
    view = given(model, **inputs).of("decoder")
    assert (view.batch, view.length) == stream.shape[:2] == inputs[reads].shape


def test_a_decoder_without_any_input_is_refused():
    model = tiny("t5", head="base")
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert given(model, **inputs).of("encoder").length == 3
    declared = wrapped(model, at(model, "decoder_block_output"), types=iv.ZeroIntervention)
    with pytest.raises(iv.InputError) as caught:
        declared(inputs, unit_locations={"base": 1})
    assert str(caught.value) == (
        "The decoder is given nothing, so that it has no positions. Put decoder_input_ids into the inputs, or labels"
        " if the model makes them of those."
    )


def test_a_decoder_of_another_batch_or_mask_is_refused():
    model = tiny("t5")
    ids = torch.tensor([[5, 6, 7], [4, 6, 8]])
    with pytest.raises(iv.InputError) as caught:
        given(model, input_ids=ids, decoder_input_ids=ids[:1])
    assert str(caught.value) == (
        "base gives the encoder 2 examples and the decoder 1. Give both the same number."
    )
    with pytest.raises(iv.InputError) as caught:
        given(model, input_ids=ids, decoder_input_ids=ids, decoder_attention_mask=torch.ones(2, 4))
    assert str(caught.value) == (
        "The decoder_attention_mask of base has shape (2, 4), and its tokens (2, 3)."
    )
    with pytest.raises(iv.InputError) as caught:
        given(model, input_ids=ids, decoder_input_ids=ids.tolist())
    assert str(caught.value) == (
        "decoder_input_ids of base is a list, not a tensor: tokenize with return_tensors='pt'."
    )


@pytest.mark.parametrize("form", ["output", "tuple"])
def test_what_the_encoder_gave_before_may_be_given_in_place_of_its_input(form):
    model = tiny("t5")
    inputs = inputs_of(model)
    with torch.no_grad():
        encoded = model.encoder(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    rest = {key: value for key, value in inputs.items() if key != "input_ids"}
    rest["encoder_outputs"] = encoded if form == "output" else (encoded.last_hidden_state,)
    assert given(model, **rest).of("encoder").length == 7

    declared = wrapped(model, at(model, "cross_key_output"), types=iv.ZeroIntervention)
    with torch.no_grad():
        short, long = (declared(run, None, {"base": [2, 6]}).intervened for run in (rest, inputs))
    assert torch.equal(short.logits, long.logits)

    upstream = wrapped(model, at(model, "encoder_block_output"), types=iv.ZeroIntervention)
    with pytest.raises(iv.NotFiredError):
        upstream(rest)


# Interventions

EDITED = [name for name in components_of(tiny("t5")) if COMPONENTS[name].inside is None]
"""What modules hand over."""
OWN_TESTS = ("head_attention_output", "final_norm_scale")
"""Words that no module hands over."""


def tokens_of(component):
    """How many positions a component has in these tests."""
    return LENGTHS[COMPONENTS[component].stack or "decoder"]


def head_columns(component):
    return torch.arange(HEADS * HEAD_DIM).view(HEADS, HEAD_DIM) if component.count("head_") else None


@pytest.mark.parametrize(("family", "variant"), [("t5", "gated")])
def test_a_swap_of_every_component_equals_hooks_written_by_hand(family, variant):
    model = tiny(family, variant=variant)
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    with torch.no_grad():
        plain = model(**base).logits
    names = [name for name in EDITED if COMPONENTS[name].word not in OWN_TESTS]
    for component, value in zip(names, seen(model, *names, inputs=source), strict=True):
        columns = head_columns(component)
        width = slice(None) if columns is None else columns[-1]
        last = tokens_of(component) - 1

        def put(stream, value=value, width=width, last=last):
            new = stream.clone()
            for row in range(2):
                for taken, into in ((2, 3), (0, last)):
                    new[row, into, width] = value[row, taken, width]
            return new

        positions = ([[[2, 0]] * 2], [[[3, -1]] * 2])
        if columns is not None:
            positions = tuple([[[[HEADS - 1]] * 2, side[0]]] for side in positions)
        declared = wrapped(model, at(model, component))
        with torch.no_grad():
            expected = by_hand.run_with(model, component, put, base).logits
            result = declared(base, [source], {"sources->base": positions}).intervened.logits
        assert_close(result, expected, atol=1e-6, rtol=1e-5, msg=component)
        assert (result - plain).abs().max() > 1e-5, f"{component} changed nothing"


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_a_reading_of_every_component_is_what_a_hook_sees(family, variant):
    model = tiny(family, variant=variant)
    names = [name for name in EDITED if COMPONENTS[name].word not in OWN_TESTS]
    declared = wrapped(model, *(at(model, name, name=name) for name in names), types=iv.CollectIntervention)
    inputs = tiny_inputs(model)
    with torch.no_grad():
        collected = declared(inputs).collected
    for name, value in zip(names, seen(model, *names, inputs=inputs), strict=True):
        columns = head_columns(name)
        expected = value if columns is None else value[..., columns].transpose(1, 2)
        assert torch.equal(collected[name], expected), name


@pytest.mark.parametrize("form", ["whole", "located", "negative", "ragged"])
@pytest.mark.parametrize(("family", "variant"), TWO)
def test_an_identity_at_every_component_leaves_the_output_bit_identical(family, variant, form):
    model = tiny(family, variant=variant, attention="eager")
    inputs = tiny_inputs(model)
    places = [(name, unit) for name in components_of(model) for unit in COMPONENTS[name].units]

    def rebuilt(base):
        return base.clone()

    declared = wrapped(model, *(at(model, name, unit, intervention=rebuilt) for name, unit in places))
    slots = [slot_of(name, unit, form) for name, unit in places]
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        result = declared(
            inputs, None, None if form == "whole" else {"base": slots}, output_hidden_states=True
        )
    assert same_bits(result.intervened, plain)
    assert all(line.fired == 1 for line in result.receipt)


def slot_of(component, unit, form):
    """Locations for two examples; `ragged` ones differ in number."""
    rows = {"located": [[1, 2]] * 2, "negative": [[-1, -3]] * 2, "ragged": [[1], [0, 3, -1]], "whole": None}
    keys = {"located": [[0, 1]] * 2, "negative": [[-3, -4]] * 2, "ragged": [[1], [0, 2]], "whole": None}
    heads = {"located": [[3]] * 2, "negative": [[-1]] * 2, "ragged": [[3], [0, 1, 2, 3]], "whole": None}
    levels = {"pos": rows, "h": heads, "query": rows, "key": keys}
    found = [levels[level][form] for level in unit.split(".")]
    return found[0] if len(found) == 1 else found


def test_a_swap_with_itself_is_bit_identical_also_in_the_fused_kernel():
    model = tiny("t5", attention="sdpa")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        plain = model(**inputs).logits
        declared = wrapped(model, *(at(model, component) for component in EDITED))
        assert torch.equal(declared(inputs, [inputs]).intervened.logits, plain)


def test_replacing_a_middle_everywhere_carries_the_source_on():
    model = tiny("t5")
    base, source = tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)
    with torch.no_grad():
        expected = model(**source)
        encoder = wrapped(model, at(model, "encoder_block_mid"))(base, [source]).intervened
        assert_close(encoder.encoder_last_hidden_state, expected.encoder_last_hidden_state)
        same_text = {**base, "decoder_input_ids": source["decoder_input_ids"]}
        wanted = model(**same_text).logits
        for component in ("decoder_block_mid", "cross_block_mid"):
            result = wrapped(model, at(model, component))(base, [same_text]).intervened
            assert_close(result.logits, wanted)


@pytest.mark.parametrize(("family", "variant"), TWO)
def test_what_heads_add_sums_to_the_output_and_one_is_taken_out_as_by_hand(family, variant):
    model = tiny(family, variant=variant)
    inputs = tiny_inputs(model)
    for prefix in ("encoder", "decoder", "cross"):
        name = f"{prefix}_head_attention_output"
        declared = wrapped(model, at(model, name), types=iv.CollectIntervention)
        with torch.no_grad():
            (each,) = declared(inputs).collected.values()
        output, sent = seen(model, f"{prefix}_attention_output", f"{prefix}_attention_value_output")
        assert_close(each.sum(1), output, atol=5e-5, rtol=1e-5)
        without = wrapped(model, at(model, name), types=iv.ZeroIntervention)

        def zero(value):
            new = value.clone()
            new[:, :, HEAD_DIM : 2 * HEAD_DIM] = 0
            return new

        with torch.no_grad():
            result = without(inputs, None, {"base": [[[[1]] * 2, [list(range(tokens_of(name)))] * 2]]})
            expected = by_hand.run_with(model, f"{prefix}_attention_value_output", zero, inputs)
        assert_close(result.intervened.logits, expected.logits, atol=1e-6, rtol=1e-5)
        assert sent.shape[1] == tokens_of(name)


# Attention of all three kinds

KINDS = [("encoder", "encoder_attentions"), ("decoder", "decoder_attentions"), ("cross", "cross_attentions")]


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "variant"), TWO)
def test_patterns_are_those_that_the_model_reports(family, variant, attention, padding):
    model = tiny(family, variant=variant, attention=attention)
    told = tiny(family, variant=variant, attention="eager")
    inputs = tiny_inputs(model, padding=padding)
    names = [f"{prefix}_attention_pattern" for prefix, _ in KINDS]
    declared = wrapped(
        model, *(at(model, name, "h", name=name) for name in names), types=iv.CollectIntervention
    )
    with torch.no_grad():
        collected = declared(inputs).collected
        output = told(**inputs, output_attentions=True)
    rows = real_rows(inputs)
    for name, (prefix, field) in zip(names, KINDS, strict=True):
        pattern, expected = collected[name], getattr(output, field)[LAYER]
        assert pattern.shape == expected.shape
        stack = COMPONENTS[name].stack
        for example, real in enumerate(rows[stack]):
            assert_close(pattern[example, :, real], expected[example, :, real], atol=1e-6, rtol=1e-5)
        assert prefix in name


def real_rows(inputs):
    """For each stack and example a mask of its real positions."""
    return {
        "encoder": [row.bool() for row in inputs["attention_mask"]],
        "decoder": [row.bool() for row in inputs["decoder_attention_mask"]],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_a_key_that_cross_attention_does_not_read_any_more_equals_arithmetic_by_hand(family, attention):
    model = tiny(family, attention=attention)
    inputs = tiny_inputs(model)
    where = {"heads": [1, 3], "keys": 4}
    entry = at(model, "cross_attention_pattern", "h.query.key", where=where)
    with torch.no_grad():
        result = wrapped(model, entry, types=iv.ZeroIntervention)(inputs).intervened.logits

        query, key, value = seen(model, "cross_query_output", "cross_key_output", "cross_value_output")
        query, key, value = (t.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for t in (query, key, value))
        pattern = (query @ key.mT).softmax(-1)
        pattern[:, [1, 3], :, 4] = 0
        sent = (pattern @ value).transpose(1, 2).flatten(2)
        expected = by_hand.run_with(model, "cross_attention_value_output", lambda _: sent, inputs).logits
        plain = model(**inputs).logits
    assert_close(result, expected, atol=1e-6, rtol=1e-5)
    assert (result - plain).abs().max() > 1e-4


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_knocked_out_key_gets_no_weight_and_the_others_share_it(attention):
    model = tiny("t5", attention=attention)
    inputs = tiny_inputs(model)
    edit = at(
        model,
        "cross_attention_scores",
        "h.query.key",
        where={"queries": -1, "keys": [0, 6]},
        intervention=iv.KnockoutIntervention(),
    )
    look = at(model, "cross_attention_pattern", "h", name="look", intervention=iv.CollectIntervention())
    plain = wrapped(
        model, at(model, "cross_attention_pattern", "h", name="look"), types=iv.CollectIntervention
    )
    with torch.no_grad():
        before = plain(inputs).collected["look"]
        after = wrapped(model, edit, look)(inputs).collected["look"]
    expected = before.clone()
    expected[:, :, -1, [0, 6]] = 0
    expected[:, :, -1] /= expected[:, :, -1].sum(-1, keepdim=True)
    assert_close(after, expected)


def test_a_key_of_cross_attention_is_counted_in_the_encoder_and_a_query_in_the_decoder():
    model = tiny("t5")
    inputs = tiny_inputs(model)

    def located(component, where):
        entry = at(model, component, "h.query.key", where=where)
        return wrapped(model, entry, types=iv.ZeroIntervention)(inputs)

    located("cross_attention_pattern", {"queries": 4, "keys": 6})
    with pytest.raises(iv.LocationRangeError, match=r"Query 5 .* has queries 0 to 4"):
        located("cross_attention_pattern", {"queries": 5, "keys": 6})
    with pytest.raises(iv.LocationRangeError, match=r"Key 7 .* has keys 0 to 6"):
        located("cross_attention_pattern", {"queries": 4, "keys": 7})
    with pytest.raises(iv.LocationRangeError, match=r"Key 5 .* has keys 0 to 4"):
        located("decoder_attention_pattern", {"queries": 4, "keys": 5})
    # What is after the query is hidden from it in the decoder alone.
    with pytest.raises(iv.LocationError, match="which the causal mask hides"):
        located("decoder_attention_pattern", {"queries": 1, "keys": 2})
    located("cross_attention_pattern", {"queries": 1, "keys": 2})
    located("encoder_attention_pattern", {"queries": 1, "keys": 2})
    with pytest.raises(iv.LocationError, match="no key is the query itself"):
        located("cross_attention_pattern", {"queries": 1, "keys": "self"})


def test_rows_of_cross_attention_are_as_long_as_the_encoders_text():
    model = tiny("t5", attention="eager")
    inputs = tiny_inputs(model)
    entry = at(
        model, "cross_attention_pattern", "h.query", where={"heads": 2, "queries": [1, 4]}, name="rows"
    )
    with torch.no_grad():
        rows = wrapped(model, entry, types=iv.CollectIntervention)(inputs).collected["rows"]
        expected = model(**inputs, output_attentions=True).cross_attentions[LAYER]
    assert torch.equal(rows, expected[:, 2:3, [1, 4]])


def test_whole_rows_come_from_a_source_with_as_many_keys():
    model = tiny("t5")
    base = tiny_inputs(model)
    longer = tiny_inputs(model, length=9, seed=1)  # of nine and seven positions
    crossed = {**longer, "input_ids": base["input_ids"], "attention_mask": base["attention_mask"]}
    rows = {"sources->base": ([[[[0]] * 2, [[6]] * 2]], [[[[0]] * 2, [[4]] * 2]])}
    declared = wrapped(model, at(model, "cross_attention_pattern", "h.query"))
    with pytest.raises(
        iv.LocationError, match="over 9 source positions into attention over 7 base positions"
    ):
        declared(base, [longer], rows)
    assert declared(base, [crossed], rows).receipt[0].change > 0


# Padding


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_an_edit_in_a_padded_batch_is_the_edit_of_each_example_alone(family, padding):
    model = tiny(family)
    base, source = (tiny_inputs(model, padding=padding, seed=seed) for seed in (0, 1))
    masks = {key: value[1].bool() for key, value in base.items() if "mask" in key}

    def alone(inputs):
        return {
            key: value[1:, masks["decoder_attention_mask" if "decoder" in key else "attention_mask"]]
            for key, value in inputs.items()
        }

    for component in (
        "encoder_block_output",
        "decoder_block_output",
        "cross_key_output",
        "cross_query_output",
    ):
        declared = wrapped(model, at(model, component))
        with torch.no_grad():
            batch = declared(base, [source], {"sources->base": ([1, -1], [2, -1])}).intervened.logits
            one = declared(
                alone(base), [alone(source)], {"sources->base": ([1, -1], [2, -1])}
            ).intervened.logits
        assert_close(batch[1:, masks["decoder_attention_mask"]], one, atol=1e-5, rtol=1e-5, msg=component)


# Sources, groups, layers, paths


def test_stacks_take_their_values_from_grouped_sources():
    model = tiny("t5")
    base, one, two = (tiny_inputs(model, seed=seed) for seed in range(3))
    entries = [
        at(model, "encoder_block_output", group_key=0, layer=2),
        at(model, "cross_attention_output", group_key=1, layer=0),
        at(model, "encoder_attention_output", group_key=0, layer=0),
    ]
    with torch.no_grad():
        result = wrapped(model, *entries)(base, [one, two], {"sources->base": 3}).intervened.logits
        (first,), (second,), (third,) = (
            seen(model, entry.component, layer=entry.layer, inputs=source)
            for entry, source in zip(entries, (one, two, one), strict=True)
        )

        def put(value):
            def change(stream):
                new = stream.clone()
                new[:, 3] = value[:, 3]
                return new

            return change

        with ExitStack() as stack:
            for entry, value in zip(entries, (first, second, third), strict=True):
                stack.callback(by_hand.hook(model, entry.component, put(value), entry.layer).remove)
            expected = model(**base).logits
    assert_close(result, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("component", "where", "last"),
    [
        ("encoder_block_output", "the encoder of ", 2),
        ("decoder_mlp_output", "the decoder of ", 3),
        ("cross_key_output", "the decoder of ", 3),
    ],
)
def test_layers_count_in_their_stack(component, where, last):
    model = tiny("t5")
    declared = wrapped(model, at(model, component, layer=-1), types=iv.ZeroIntervention)
    assert declared.explain(tiny_inputs(model))[0]["layer"] == str(last)
    with pytest.raises(iv.LayerRangeError) as caught:
        wrapped(model, at(model, component, layer=last + 1), types=iv.ZeroIntervention)
    assert str(caught.value).endswith(
        f"Layer {last + 1} is out of range: {where}T5ForConditionalGeneration has layers 0 to {last}."
    )


def test_a_plain_name_is_refused_when_the_model_is_wrapped():
    with pytest.raises(iv.UnsupportedModelError) as caught:
        wrapped(tiny("t5"), iv.RepresentationConfig(1, "mlp_output"))
    assert str(caught.value).splitlines()[0] == (
        "representation 0: T5ForConditionalGeneration has no 'mlp_output': it has an encoder and a decoder, so say"
        " 'encoder_mlp_output' or 'decoder_mlp_output'."
    )


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("encoder.block[1].output", "encoder_block_output"),
        ("decoder.block[1].layer[0].SelfAttention.k.output", "decoder_key_output"),
        ("decoder.block[1].layer[1].EncDecAttention.k.output", "cross_key_output"),
        ("decoder.block[1].layer[1].EncDecAttention.q.output", "cross_query_output"),
        ("lm_head.output", "logits"),
    ],
)
def test_a_module_path_counts_the_positions_of_its_stack(path, component):
    model = tiny("t5")
    inputs = tiny_inputs(model, padding="left")
    by_path, by_name = (
        wrapped(model, entry, types=iv.ZeroIntervention)
        for entry in (iv.RepresentationConfig(component=path), at(model, component, "pos"))
    )
    with torch.no_grad():
        one, other = (d(inputs, None, {"base": [0, -1]}).intervened.logits for d in (by_path, by_name))
    assert torch.equal(one, other)
    with pytest.raises(iv.LocationRangeError):
        by_path(inputs, None, {"base": tokens_of(component)})


def test_receipts_name_the_tokens_of_the_stack():
    model = tiny("t5")
    inputs = tiny_inputs(model, batch=1)

    class Tokenizer:
        def decode(self, ids):
            return f"<{ids[0]}>"

    config = iv.IntervenableConfig(
        [
            at(model, "cross_attention_pattern", "h.query.key", where={"queries": 1, "keys": 6}),
            at(model, "decoder_block_output", where=4),
            at(model, "cross_value_output", where=5),
        ],
        iv.ZeroIntervention,
    )
    declared = iv.IntervenableModel(config, model, tokenizer=Tokenizer())
    pattern, block, value = declared(inputs).receipt
    encoder, decoder = (inputs[key][0].tolist() for key in ("input_ids", "decoder_input_ids"))
    assert (pattern.query_tokens, pattern.tokens) == ((f"<{decoder[1]}>",), (f"<{encoder[6]}>",))
    assert (block.tokens, value.tokens) == ((f"<{decoder[4]}>",), (f"<{encoder[5]}>",))


def test_a_cache_of_both_attentions_is_left_as_it_was():
    model = tiny("t5")
    inputs = tiny_inputs(model)
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        step = {**inputs, "decoder_input_ids": torch.tensor([[7], [9]]), "past_key_values": cache}
        step.pop("decoder_attention_mask")
        declared = wrapped(model, at(model, "decoder_block_output"), types=iv.ZeroIntervention)
        first = declared(step, None, {"base": 0}).intervened.logits
        second = declared(step, None, {"base": 0}).intervened.logits
    assert cache.get_seq_length() == 5
    assert torch.equal(first, second)


# With the rest of the library


def test_words_are_looked_up_in_the_text_of_their_stack():
    tokenizer, _ = iv.load_small_lm()
    options = {**tiny_models._FAMILIES["t5"].options, "vocab_size": len(tokenizer)}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**options)).eval()
    encoder, decoder = "The capital of Spain is", "Spain is the country"
    inputs = dict(tokenizer(encoder, return_tensors="pt"))
    inputs |= {f"decoder_{key}": value for key, value in tokenizer(decoder, return_tensors="pt").items()}
    entries = [
        at(model, "cross_attention_pattern", "h.query.key", where={"queries": "country", "keys": "Spain"}),
        at(model, "decoder_block_output", where=["Spain"]),
        at(model, "encoder_block_output", where=["Spain"]),
    ]
    config = iv.IntervenableConfig(entries, iv.ZeroIntervention)
    with torch.no_grad():
        receipt = iv.IntervenableModel(config, model, tokenizer=tokenizer)(inputs).receipt
    texts = [
        [tokenizer.decode([token]) for token in inputs[key][0]] for key in ("input_ids", "decoder_input_ids")
    ]
    spain, first, country = (
        next(place for place, token in enumerate(text) if word.startswith(token.strip()) and token.strip())
        for text, word in ((texts[0], "Spain"), (texts[1], "Spain"), (texts[1], "country"))
    )
    assert (receipt[0].queries[0], receipt[0].keys[0]) == (country, spain)
    assert (receipt[1].positions[0], receipt[2].positions[0]) == (first, spain)


def test_collecting_gives_each_stack_its_own_tokens():
    model = tiny("t5")
    inputs = tiny_inputs(model, padding="left")
    names = ["encoder_block_output", "decoder_block_output", "cross_attention_pattern", "logits"]
    cache = iv.collect(model, inputs, components=names)
    assert [cache["encoder_block_output", layer].shape[1] for layer in range(3)] == [7] * 3
    assert [cache["decoder_block_output", layer].shape[1] for layer in range(4)] == [5] * 4
    assert cache["cross_attention_pattern", 3].shape == (2, 4, 5, 7)
    (expected,) = seen(model, "decoder_block_output", layer=3, inputs=inputs)
    assert torch.equal(cache["decoder_block_output", 3], expected)


def test_an_edit_is_met_again_when_a_checkpointed_decoder_is_run_a_second_time():
    gradients = []
    for again in (False, True):
        model = tiny("t5").train()
        for part in model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
            elif isinstance(getattr(part, "dropout", None), float):  # the attention's own
                part.dropout = 0.0
        if again:
            model.activation_checkpointing_enable()
        inputs = tiny_inputs(model)
        declared = wrapped(
            model,
            at(model, "cross_attention_pattern", "h", intervention=torch.square),
            at(model, "decoder_block_output", intervention=torch.tanh),
        )
        output = declared({**inputs, "labels": inputs["decoder_input_ids"]}, use_cache=False).intervened
        output.loss.backward()
        gradients.append(model.encoder.block[0].layer[0].SelfAttention.q.weight.grad)
    assert gradients[0].abs().max() > 0
    assert_close(*gradients)


def test_an_identity_in_half_precision_is_bit_identical():
    model = tiny("t5", dtype=torch.bfloat16)
    inputs = tiny_inputs(model)
    declared = wrapped(model, *(at(model, name) for name in EDITED))
    with torch.no_grad():
        assert torch.equal(declared(inputs, [inputs]).intervened.logits, model(**inputs).logits)
