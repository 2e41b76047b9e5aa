"""Every option of `sweep`, each against patched runs written out by hand."""

from __future__ import annotations

import patched_by_hand as hand
import pytest
import torch
from declared import at, main_output, wrapped
from patched_by_hand import FAMILIES, ByHand, batch, grid, near, prompts, told

import intervenable as iv
from intervenable import load_small_lm, wave_plan
from intervenable.sweeping import sweep
from tiny_models import tiny, tiny_inputs

DIFFERS = 2
"""The token from which on prompts differ."""
LAYERS, LENGTH = 3, 6


@pytest.fixture(params=["all tokens", "later tokens alone"])
def leaving_out(request, monkeypatch):
    """Waves that compute all tokens, as of tiny models, and such as begin at the first token that they change."""
    if request.param == "all tokens":
        monkeypatch.setattr(wave_plan, "WORTH", torch.inf)
    else:
        for name in ("WORTH", "READ", "OVERHEAD"):  # and one wave for each token
            monkeypatch.setattr(wave_plan, name, 0.0)
    return request.param


def pair(family, *lengths, differs=DIFFERS):
    """A model, its prompts as lists and as batches, and the loop by hand that puts clean into corrupted."""
    lengths = lengths or (LENGTH, LENGTH)
    model = tiny(family)
    clean = prompts(*lengths)
    corrupted = prompts(*lengths, seed=1, like=clean, start=differs)
    return model, clean, corrupted, ByHand(model, family, corrupted, clean)


def swept(family, component="block_input", axes=("layer", "pos"), **options):
    """A sweep of two prompts of one length, and the loop by hand."""
    model, clean, corrupted, by_hand = pair(family)
    inputs = batch(clean), batch(corrupted)
    return sweep(model, *inputs, component, axes, told(inputs[1]), **options), by_hand


# --- subsets and windows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_each_layer_and_token_is_patched_alone(family, leaving_out):
    result, by_hand = swept(family)
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), range(LAYERS), range(LENGTH)),
    )
    near(result.baseline_corrupted, by_hand.plain())
    assert (result.values[:, :DIFFERS] == result.baseline_corrupted).all()
    assert result.axes == ("layer", "pos")
    assert result.labels["layer"] == ("0", "1", "2")
    assert result.entries["pos"] == tuple(range(LENGTH))
    later = any("from the first token on that a wave changes" in note for note in result.shortcuts)
    assert later is (leaving_out == "later tokens alone")
    assert not any("a forward pass of its own" in note for note in result.shortcuts)


@pytest.mark.parametrize("family", ["llama"])
def test_the_baselines_are_the_two_runs_without_a_patch(family):
    result, by_hand = swept(family)
    near(result.baseline_corrupted, by_hand.plain())
    near(result.baseline_clean, ByHand(by_hand.model, family, by_hand.source, by_hand.base).plain())


@pytest.mark.parametrize("family", ["gpt2"])
@pytest.mark.usefixtures("leaving_out")
def test_subsets_are_kept_in_the_order_that_was_asked_for(family):
    result, by_hand = swept(family, layers=[2, 0, -2], positions=[4, -1, 2])
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), [2, 0, 1], [4, 5, 2]),
    )
    assert result.entries == {"layer": (2, 0, 1), "pos": (4, 5, 2)}


@pytest.mark.parametrize("layers", [1, [1], (1,), slice(1, 2), torch.tensor([1]), range(1, 2)])
def test_one_layer_may_be_written_in_many_ways(layers):
    result, by_hand = swept("llama", layers=layers, positions=-1)
    near(result.values[0, 0], by_hand.cell("block_input", [1], [5]))
    assert result.entries["layer"] == (1,)


@pytest.mark.parametrize("family", ["bloom"])
@pytest.mark.usefixtures("leaving_out")
def test_a_tuple_is_a_window_that_is_patched_together(family):
    result, by_hand = swept(
        family, "head_attention_value_output", layers=[(0, 1), 2], positions=[(2, 3), (5, 2), 4]
    )
    near(
        result.values,
        grid(
            lambda layers, tokens: by_hand.cell("head_attention_value_output", layers, tokens),
            [(0, 1), (2,)],
            [(2, 3), (2, 5), (4,)],
        ),
    )
    assert result.labels["layer"] == ("0-1", "2")
    assert result.labels["pos"][0] == "2-3"
    assert [list(entry) for entry in result.entries["pos"][:2]] in ([[2, 3], [5, 2]], [[2, 3], [2, 5]])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("leaving_out")
def test_a_width_patches_the_neighbours_too_as_far_as_there_are_any(family):
    result, by_hand = swept(family, "head_attention_value_output", window={"layer": 3, "pos": 2})
    around = [range(max(0, layer - 1), min(LAYERS, layer + 2)) for layer in range(LAYERS)]
    tokens = [range(max(0, pos - 1), pos + 1) for pos in range(LENGTH)]
    near(
        result.values,
        grid(lambda a, b: by_hand.cell("head_attention_value_output", a, b), around, tokens),
    )
    assert result.labels["layer"] == ("0-1", "0-2", "1-2")


def test_heads_alone_and_in_windows():
    result, by_hand = swept(
        "llama", "head_attention_value_output", ("head", "layer"), heads=[3, (0, 2)], layers=[1, 2]
    )
    near(
        result.values,
        grid(
            lambda heads, layer: by_hand.cell("head_attention_value_output", [layer], heads=heads),
            [[3], [0, 2]],
            [1, 2],
        ),
    )
    assert result.labels["head"] == ("3", "0+2")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("leaving_out")
def test_every_head_at_every_token(family):
    result, by_hand = swept(family, "head_attention_value_output", ("layer", "pos", "head"), layers=[0, 1])
    near(
        result.values,
        grid(
            lambda layer, pos, head: by_hand.cell(
                "head_attention_value_output", [layer], [pos], heads=[head]
            ),
            [0, 1],
            range(LENGTH),
            range(4),
        ),
    )


@pytest.mark.usefixtures("leaving_out")
def test_shared_heads_are_swept_as_the_heads_they_are():
    result, by_hand = swept("llama", "head_value_output", ("layer", "head"))
    near(
        result.values,
        grid(
            lambda layer, head: by_hand.cell("head_value_output", [layer], heads=[head]),
            range(LAYERS),
            range(2),
        ),
    )


# --- axes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama"])
def test_axes_in_another_order_are_the_same_values_in_another_order(family):
    result, _ = swept(family)
    other, _ = swept(family, axes=("position", "layer"))
    assert other.axes == ("pos", "layer")
    near(other.values, result.values.transpose(0, 1))


@pytest.mark.parametrize("family", ["gpt2"])
@pytest.mark.usefixtures("leaving_out")
def test_what_is_no_axis_is_patched_as_a_whole(family):
    component = "head_attention_value_output"
    result, by_hand = swept(family, component, "pos")
    near(result.values, grid(lambda pos: by_hand.cell(component, range(LAYERS), [pos]), range(LENGTH)))
    result, by_hand = swept(family, component, "layer")
    near(result.values, grid(lambda layer: by_hand.cell(component, [layer]), range(LAYERS)))


@pytest.mark.parametrize("family", ["bloom"])
def test_without_axes_there_is_one_cell(family):
    component = "head_attention_value_output"
    result, by_hand = swept(family, component, ())
    assert result.axes == ()
    near(result.values, by_hand.cell(component, range(LAYERS)))


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.usefixtures("leaving_out")
def test_of_what_is_no_axis_a_part_may_be_patched(family):
    component = "head_attention_value_output"
    result, by_hand = swept(family, component, "layer", positions=[2, (3, 2), -1], heads=[1, 3])
    near(
        result.values,
        grid(lambda layer: by_hand.cell(component, [layer], [2, 3, 5], heads=[1, 3]), range(LAYERS)),
    )
    result, by_hand = swept(family, component, "head", positions=4, layers=[0, 2])
    near(result.values, grid(lambda head: by_hand.cell(component, [0, 2], [4], heads=[head]), range(4)))


# --- positions people can say -----------------------------------------------------------------------------


def test_positions_may_have_names():
    result, by_hand = swept("gpt2", positions={"subject": (2, 3), "end": -1}, layers=[0, 2])
    near(
        result.values,
        grid(lambda layer, tokens: by_hand.cell("block_input", [layer], tokens), [0, 2], [[2, 3], [5]]),
    )
    assert result.labels["pos"] == ("subject", "end")


def test_positions_may_be_words_of_the_prompt_that_is_patched():
    tokenizer, model = load_small_lm()
    clean, corrupted = (
        tokenizer(f"The capital of {country} is", return_tensors="pt") for country in ("Spain", "Italy")
    )
    result = sweep(
        model, clean, corrupted, metric=lambda z: z[:, -1], positions=["Italy", "last"], tokenizer=tokenizer
    )
    numbers = sweep(model, clean, corrupted, metric=lambda z: z[:, -1])
    texts = [tokenizer.decode([token]).strip() for token in corrupted["input_ids"][0]]
    near(result.values, numbers.values[:, [texts.index("Italy"), -1]])
    assert (result.values[0, 0] - result.baseline_corrupted).abs().max() > 1
    named = sweep(model, clean, corrupted, metric=lambda z: z[:, -1], tokenizer=tokenizer)
    assert named.labels["pos"] == tuple(texts)


# --- several components and metrics -----------------------------------------------------------------------


@pytest.mark.usefixtures("leaving_out")
def test_several_components_are_swept_one_after_the_other():
    names = ["mlp_output", "block_input", "attention_output"]
    result, by_hand = swept("gpt2", names)
    near(
        result.values,
        grid(
            lambda name, layer, pos: by_hand.cell(name, [layer], [pos]), names, range(LAYERS), range(LENGTH)
        ),
    )
    assert result.all_axes[:3] == ("component", "layer", "pos")
    assert result.components == tuple(names)


def test_components_may_have_different_numbers_of_heads():
    names = ["head_query_output", "head_value_output"]
    result, by_hand = swept("llama", names, ("layer", "head"))
    near(
        result.values[0],
        grid(lambda layer, head: by_hand.cell(names[0], [layer], heads=[head]), range(LAYERS), range(4)),
    )
    near(
        result.values[1, :, :2],
        grid(lambda layer, head: by_hand.cell(names[1], [layer], heads=[head]), range(LAYERS), range(2)),
    )
    assert result.values[1, :, 2:].isnan().all()
    assert result.labels["head"] == ("0", "1", "2", "3")


@pytest.mark.parametrize("family", ["gpt2"])
@pytest.mark.usefixtures("leaving_out")
def test_several_metrics_of_any_shape_are_measured_in_the_same_runs(family):
    model, clean, corrupted, by_hand = pair(family)
    inputs = batch(clean), batch(corrupted)
    metrics = {
        "scalar": lambda z: z[:, -1, 5].mean() - z[:, 1, 7].mean(),
        "each": lambda z: z[:, -1, 5],
        "number": lambda z: float(z[0, -1].max()),
        "vector": lambda z: z[:, -1, 3:9],
        "which": lambda z: z[:, -1].argmax(-1),
    }
    result = sweep(model, *inputs, metric=metrics)
    cells = grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), range(LAYERS), range(LENGTH))

    def of(name):
        return result.results["block_input", name]

    last = cells[..., 1, :]
    near(of("scalar"), last[..., 5].mean(-1) - cells[..., 0, 7].mean(-1))
    near(of("each"), last[..., 5])
    near(of("number").float(), last[..., 0, :].amax(-1))
    near(of("vector"), last[..., 3:9])
    assert torch.equal(of("which").long(), last.argmax(-1))
    assert result.metrics == tuple(metrics)
    assert result.clean.keys() == result.corrupted.keys() == metrics.keys()


def test_a_metric_of_the_library_and_a_callable_go_together():
    model, clean, corrupted, _ = pair("llama")
    metrics = {"ready": iv.metrics.logit_difference(None, 5, 7), "own": lambda z: z[:, -1, 5] - z[:, -1, 7]}
    result = sweep(model, batch(clean), batch(corrupted), metric=metrics)
    near(result.results["block_input", "ready"], result.results["block_input", "own"].mean(-1))


@pytest.mark.usefixtures("leaving_out")
def test_a_metric_that_reads_other_logits_in_some_cells_is_right_there_too():
    model, clean, corrupted, by_hand = pair("llama")

    def metric(logits):
        wide = bool(logits[0, -1, 5] > boundary)
        return logits[0, 0 if wide else -1, 6] + (logits[0, 1:].sum() if wide else 0)

    values = grid(
        lambda layer, pos: by_hand.run(0, "block_input", [layer], [(pos, pos)]), range(LAYERS), range(LENGTH)
    )
    unpatched = [ByHand(model, "llama", ids, ids).run(0, "block_input")[-1, 5] for ids in (clean, corrupted)]
    boundary = float(max(unpatched)) + 1e-3  # the unpatched runs tell of the last logits alone
    expected = grid(lambda layer, pos: metric(values[layer, pos][None]), range(LAYERS), range(LENGTH))
    assert 0 < (values[..., -1, 5] > boundary).sum() < values[..., -1, 5].numel()
    result = sweep(model, batch(clean), batch(corrupted), metric=metric)
    near(result.values, expected)


# --- batches and padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("leaving_out")
def test_examples_of_different_length_are_swept_as_if_each_were_alone(family, padding):
    model, clean, corrupted, by_hand = pair(family, 6, 4, 5)
    inputs = batch(clean, padding), batch(corrupted, padding)
    result = sweep(model, *inputs, metric=told(inputs[1]))
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), range(LAYERS), range(LENGTH)),
    )
    near(result.values[:, 4:, 1], by_hand.plain()[1].expand(LAYERS, 2, -1, -1))  # it has no such tokens
    result = sweep(
        model, *inputs, "head_attention_value_output", ("layer", "head"), told(inputs[1]), layers=[0, 2]
    )
    near(
        result.values,
        grid(
            lambda layer, head: by_hand.cell("head_attention_value_output", [layer], heads=[head]),
            [0, 2],
            range(4),
        ),
    )


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.usefixtures("leaving_out")
def test_positions_from_the_end_are_those_of_each_example(padding):
    model, clean, corrupted, by_hand = pair("llama", 6, 4, 5)
    inputs = batch(clean, padding), batch(corrupted, padding)
    result = sweep(model, *inputs, metric=told(inputs[1]), positions=[-1, (-2, -1)])
    near(
        result.values,
        grid(
            lambda layer, tokens: by_hand.cell("block_input", [layer], tokens),
            range(LAYERS),
            [{0: [5], 1: [3], 2: [4]}, {0: [4, 5], 1: [2, 3], 2: [3, 4]}],
        ),
    )


@pytest.mark.parametrize("paddings", [("left", "right"), ("right", "left")])
@pytest.mark.usefixtures("leaving_out")
def test_the_two_runs_may_be_padded_differently(paddings):
    model, clean, corrupted, by_hand = pair("gpt2", 6, 4)
    inputs = [batch(rows, side) for rows, side in zip((clean, corrupted), paddings, strict=True)]
    result = sweep(model, *inputs, metric=told(inputs[1]))
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), range(LAYERS), range(LENGTH)),
    )


def test_more_padding_than_needed_changes_nothing():
    model, clean, corrupted, by_hand = pair("llama", 6, 4)
    inputs = batch(clean, "left", 8), batch(corrupted, "left", 9)
    result = sweep(model, *inputs, metric=told(inputs[1]))
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), range(LAYERS), range(LENGTH)),
    )


# --- which run is patched ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bloom"])
@pytest.mark.usefixtures("leaving_out")
def test_noising_puts_corrupted_values_into_the_clean_run(family):
    model, clean, corrupted, _ = pair(family)
    by_hand = ByHand(model, family, clean, corrupted)
    inputs = batch(clean), batch(corrupted)
    result = sweep(model, *inputs, metric=told(inputs[0]), direction="noise")
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), range(LAYERS), range(LENGTH)),
    )
    near(result.baseline_clean, by_hand.plain())
    near(result.baseline_corrupted, ByHand(model, family, corrupted, clean).plain())
    other = sweep(model, *inputs[::-1], metric=told(inputs[0]))
    assert torch.equal(result.values, other.values)


@pytest.mark.usefixtures("leaving_out")
def test_one_clean_prompt_stands_for_all_examples():
    model, clean, corrupted, _ = pair("llama")
    inputs = batch(clean[:1]), batch(corrupted)
    by_hand = ByHand(model, "llama", corrupted, [clean[0], clean[0]])
    result = sweep(model, *inputs, metric=told(inputs[1]))
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), range(LAYERS), range(LENGTH)),
    )
    noised = ByHand(model, "llama", [clean[0], clean[0]], corrupted)
    result = sweep(model, *inputs, metric=told(inputs[1]), direction="noise", layers=1)
    near(result.values[0], grid(lambda pos: noised.cell("block_input", [1], [pos]), range(LENGTH)))


@pytest.mark.parametrize(
    ("component", "axes"),
    [("block_input", ("layer", "pos")), ("head_attention_value_output", ("layer", "head"))],
)
@pytest.mark.parametrize("examples", [1, 2])
def test_clean_activations_may_have_been_collected_before(component, axes, examples):
    model, clean, corrupted, _ = pair("llama")
    inputs = batch(clean[:examples]), batch(corrupted)
    cache = iv.collect(model, inputs[0], component)
    result = sweep(model, cache, inputs[1], component, axes, told(inputs[1]))
    near(result.values, sweep(model, *inputs, component, axes, told(inputs[1])).values)
    assert result.clean == {}


@pytest.mark.usefixtures("leaving_out")
def test_collected_patterns_are_values_too():
    model, clean, corrupted, _ = pair("llama")
    inputs = batch(clean), batch(corrupted)
    cache = iv.collect(model, inputs[0], "attention_pattern")
    given = ("attention_pattern", ("layer", "head"), told(inputs[1]))
    near(sweep(model, cache, inputs[1], *given).values, sweep(model, *inputs, *given).values)


# --- prompts of different length --------------------------------------------------------------------------


def of_unequal_length(family):
    """Two examples of seven and five tokens to be patched, and their clean forms with one or two tokens more."""
    model = tiny(family)
    corrupted = prompts(7, 5, seed=3)
    clean = [
        torch.cat([corrupted[0][:2], torch.tensor([70, 71, 69]), corrupted[0][3:]]),
        torch.cat([corrupted[1][:3], torch.tensor([70]), corrupted[1][3:]]),
    ]
    return model, clean, corrupted, ByHand(model, family, corrupted, clean)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("leaving_out")
def test_equal_tokens_are_paired_where_lengths_differ(family, padding):
    model, clean, corrupted, by_hand = of_unequal_length(family)
    inputs = batch(clean, padding), batch(corrupted, padding)
    result = sweep(model, *inputs, metric=told(inputs[1]), align="auto")
    partners = [
        dict(iv.align(own.tolist(), other.tolist())) for own, other in zip(corrupted, clean, strict=True)
    ]
    assert partners[1] == {0: 0, 1: 1, 2: 2, 3: 4, 4: 5}  # that much is plain
    assert partners[0].items() >= {0: 0, 1: 1, 3: 5, 6: 8}.items()

    def expected(layer, pos):
        tokens = {
            example: [(pos, pairs[pos])] if pos in pairs else [] for example, pairs in enumerate(partners)
        }
        return by_hand.cell("block_input", [layer], tokens)

    near(result.values, grid(expected, range(LAYERS), range(7)))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.usefixtures("leaving_out")
def test_tokens_may_be_paired_by_hand(direction):
    model, clean, corrupted, by_hand = of_unequal_length("llama")
    inputs = batch(clean), batch(corrupted)
    own = {0: {2: 4, 5: 7}, 1: {4: 5, 0: 3}}  # corrupted to clean
    align = [[(there, here) for here, there in pairs.items()] for pairs in own.values()]
    if direction == "noise":
        by_hand = ByHand(model, "llama", clean, corrupted)
        own = {example: {b: a for a, b in pairs.items()} for example, pairs in own.items()}

    def expected(layer, pos):
        tokens = {example: [(pos, pairs[pos])] if pos in pairs else [] for example, pairs in own.items()}
        return by_hand.cell("block_input", [layer], tokens)

    base = inputs[1] if direction == "denoise" else inputs[0]
    result = sweep(model, *inputs, metric=told(base), align=align, direction=direction)
    near(result.values, grid(expected, range(LAYERS), range(max(map(len, by_hand.base)))))


def test_one_list_of_pairs_is_for_every_example():
    model, clean, corrupted, by_hand = of_unequal_length("gpt2")
    inputs = batch(clean), batch(corrupted)
    result = sweep(model, *inputs, metric=told(inputs[1]), align=[(3, 1), (-1, -1)], layers=[1])
    near(result.values[0, 1], by_hand.cell("block_input", [1], [(1, 3)]))
    near(result.values[0, 4], by_hand.cell("block_input", [1], {0: [], 1: [(4, 5)]}))
    near(result.values[0, 6], by_hand.cell("block_input", [1], {0: [(6, 8)], 1: []}))
    near(result.values[0, 2], by_hand.plain())


def test_pairs_count_where_lengths_are_equal_too():
    model, clean, corrupted, by_hand = pair("llama")
    inputs = batch(clean), batch(corrupted)
    result = sweep(model, *inputs, metric=told(inputs[1]), align=[(4, 2)], layers=0)
    near(result.values[0, 2], by_hand.cell("block_input", [0], [(2, 4)]))
    near(result.values[0, 3], by_hand.plain())


# --- other models and inputs ------------------------------------------------------------------------------


def test_interventions_of_a_wrapped_model_act_in_every_run():
    model, clean, corrupted, _ = pair("gpt2")
    declared = wrapped(
        model, at(model, "mlp_output", layer=0, intervention=iv.ZeroIntervention()), types=iv.ZeroIntervention
    )
    always = [("transformer.h.0.mlp", "output", torch.zeros_like)]
    by_hand = ByHand(model, "gpt2", corrupted, clean, always)
    inputs = batch(clean), batch(corrupted)
    result = sweep(declared, *inputs, metric=told(inputs[1]))
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), range(LAYERS), range(LENGTH)),
    )
    near(result.baseline_clean, ByHand(model, "gpt2", clean, corrupted, always).plain())
    untouched = ByHand(model, "gpt2", corrupted, clean).plain()
    assert (result.baseline_corrupted - untouched).abs().max() > 0.1


def test_a_wrapped_model_without_interventions_that_act_is_the_model():
    model, clean, corrupted, _ = pair("llama")
    declared = wrapped(model, at(model, "block_output"))
    inputs = batch(clean), batch(corrupted)
    assert (
        torch.equal(
            sweep(
                iv.IntervenableModel(iv.IntervenableConfig([]), model), *inputs, metric=told(inputs[1])
            ).values,
            sweep(model, *inputs, metric=told(inputs[1])).values,
        )
        or declared
    )


T5_PLACES = {
    "encoder_block_input": ("encoder.block.{}", "input", 7),
    "decoder_block_input": ("decoder.block.{}", "input", 5),
    "encoder_mlp_output": ("encoder.block.{}.layer.1.DenseReluDense", "output", 7),
    "cross_attention_output": ("decoder.block.{}.layer.1.EncDecAttention", "output", 5),
    "decoder_attention_output": ("decoder.block.{}.layer.0.SelfAttention", "output", 5),
}


@pytest.mark.parametrize("component", T5_PLACES)
@pytest.mark.usefixtures("leaving_out")
def test_both_stacks_of_a_translator_are_swept_over_their_own_tokens(component):
    model = tiny("t5")
    clean, corrupted = tiny_inputs(model), tiny_inputs(model, seed=1)
    path, side, length = T5_PLACES[component]

    def metric(logits):
        return logits[:, [1, -1]]

    def cell(layer, pos):
        seen = []

        def look(value):
            seen.append(value.clone())
            return value

        def change(value):
            new = value.clone()
            new[:, pos] = seen[0][:, pos]
            return new

        hand.logits_with(model, clean, [(path.format(layer), side, look)])
        return metric(hand.logits_with(model, corrupted, [(path.format(layer), side, change)]))

    layers = [0, 2] if component.startswith("encoder") else [0, 3]
    result = sweep(model, clean, corrupted, component, metric=metric, layers=layers)
    near(result.values, grid(cell, layers, range(length)))
    assert (result.values - result.baseline_corrupted).abs().max() > 1e-2


def test_a_recurrent_layer_is_swept_over_its_tokens():
    model = tiny("gru")
    clean, corrupted = tiny_inputs(model), tiny_inputs(model, seed=1)
    result = sweep(model, clean, corrupted, "block_input", "pos", metric=lambda z: z[:, [1, -1]])

    def cell(pos):
        value = corrupted["input"].clone()
        value[:, pos] = clean["input"][:, pos]
        with torch.no_grad():
            return main_output(model(value))[:, [1, -1]]

    near(result.values, grid(cell, range(7)))


@pytest.mark.parametrize(
    ("family", "path", "component"),
    [
        ("llama", "model.layers[{layer}].mlp.output", "mlp_output"),
        ("gpt2", "transformer.h[{layer}].input", "block_input"),
        ("bloom", "transformer.h[{layer}].self_attention.dense.input", "head_attention_value_output"),
    ],
)
@pytest.mark.usefixtures("leaving_out")
def test_a_module_path_with_a_place_for_the_layer_is_a_component(family, path, component):
    result, by_hand = swept(family, path)
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell(component, [layer], [pos]), range(LAYERS), range(LENGTH)),
    )
    assert result.components == (path,)


def test_a_module_path_without_a_layer_has_tokens_alone():
    result, by_hand = swept("llama", "model.layers[1].mlp.output", "pos")
    near(result.values, grid(lambda pos: by_hand.cell("mlp_output", [1], [pos]), range(LENGTH)))


def test_inputs_may_be_a_tensor_of_token_ids():
    model, clean, corrupted, by_hand = pair("gpt2")
    inputs = batch(clean), batch(corrupted)
    result = sweep(
        model, inputs[0]["input_ids"], inputs[1]["input_ids"], metric=told(inputs[1]), layers=[0, 1]
    )
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), [0, 1], range(LENGTH)),
    )


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.usefixtures("leaving_out")
def test_inputs_may_be_embeddings(family):
    model, clean, corrupted, by_hand = pair(family)
    inputs = batch(clean), batch(corrupted)
    with torch.no_grad():
        embedded = [
            {"inputs_embeds": model.get_input_embeddings()(one["input_ids"]).clone()} for one in inputs
        ]
    result = sweep(model, *embedded, metric=told(inputs[1]))
    near(
        result.values,
        grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), range(LAYERS), range(LENGTH)),
    )


@pytest.mark.usefixtures("leaving_out")
def test_position_ids_of_the_users_own_are_kept():
    model, clean, corrupted, _ = pair("gpt2")
    inputs = batch(clean), batch(corrupted)
    for one in inputs:
        one["position_ids"] = torch.tensor([[3, 4, 5, 9, 10, 11]])
    result = sweep(model, *inputs, metric=told(inputs[1]), layers=[1])
    seen = []

    def look(value):
        seen.append(value.clone())
        return value

    hand.logits_with(model, inputs[0], [("transformer.h.1", "input", look)])

    def cell(pos):
        def change(value):
            new = value.clone()
            new[:, pos] = seen[0][:, pos]
            return new

        return told(inputs[1])(hand.logits_with(model, inputs[1], [("transformer.h.1", "input", change)]))

    near(result.values[0], grid(cell, range(LENGTH)))
    assert (
        result.baseline_clean
        - sweep(model, *map(batch, (clean, corrupted)), metric=told(inputs[1]), layers=1).baseline_clean
    ).abs().max() > 0.01
