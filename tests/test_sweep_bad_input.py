"""What `sweep` refuses: each message says what was given, what is allowed and what to do instead."""

from __future__ import annotations

import pytest
import torch
from declared import hooks_of
from patched_by_hand import batch, prompts

import intervenable as iv
from intervenable import (
    ConfigError,
    InputError,
    LayerRangeError,
    LocationError,
    LocationRangeError,
    MetricError,
    ModelMismatchError,
    NotFiredError,
    UnknownNameError,
    UnsupportedModelError,
)
from intervenable.sweeping import sweep
from tiny_models import tiny

MODELS = {}


def model_of(family):
    """One model for all that is refused before anything runs."""
    if family not in MODELS:
        MODELS[family] = tiny(family)
    return MODELS[family]


def read(logits):
    return logits[:, -1, 5]


def refused(error, match, *given, family="llama", lengths=(6, 6), **options):
    """What a sweep says of two pairs of prompts."""
    model = model_of(family)
    clean, corrupted = batch(prompts(*lengths)), batch(prompts(*lengths, seed=1))
    options = {"metric": read, "clean": clean, "corrupted": corrupted} | options
    clean, corrupted = options.pop("clean"), options.pop("corrupted")
    with pytest.raises(error, match=match) as caught:
        sweep(model, clean, corrupted, *given, **options)
    assert hooks_of(model) == {}
    return str(caught.value)


# --- components and axes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ("block_imput", UnknownNameError, "'block_imput'.*Did you mean 'block_input'"),
        ([], ConfigError, "component is empty.*'block_input'"),
        (["block_input", "block_input"], ConfigError, "names one twice: block_input, block_input"),
        (5, ConfigError, "component is a int, not a name"),
        (read, ConfigError, "function.*metric=..."),
        ([5], UnknownNameError, "5"),
        ("cross_attention_output", UnsupportedModelError, "cross_attention_output"),
        ("model.layerz[{layer}].output", UnsupportedModelError, "layerz"),
        ("model.layers[1].mlpp.output", UnsupportedModelError, "mlpp"),
    ],
)
def test_components_that_are_not_there(given, error, match):
    refused(error, match, given, "pos")


@pytest.mark.parametrize(
    ("component", "axes", "match"),
    [
        ("block_input", ("layer", "head"), r"block_input has no axis 'head' \(heads\).*It has: layer, pos"),
        ("attention_pattern", ("layer", "pos"), r"no axis 'pos'.*'query' \(rows\) and 'key' \(columns\)"),
        ("attention_pattern", "pos", "It has: layer, head, query, key"),
        ("head_value_output", "key", "no axis 'key'.*It has: layer, head, pos"),
        ("embedding_output", ("layer", "pos"), "embedding_output has no axis 'layer'.*It has: pos"),
        (["attention_output", "attention_pattern"], "pos", "attention_pattern has no axis 'pos'"),
        ("model.layers[{layer}].output", "head", "no axis 'head'.*It has: layer, pos"),
        ("model.layers[1].output", "layer", "no axis 'layer'.*It has: pos"),
    ],
)
def test_a_component_without_the_axis_says_which_it_has(component, axes, match):
    refused(ConfigError, match, component, axes)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"heads": 1}, r"no axis 'head' \(heads\)"),
        ({"queries": 1}, r"no axis 'query' \(queries\)"),
        ({"keys": [1]}, r"no axis 'key' \(keys\)"),
    ],
)
def test_a_part_of_an_axis_that_is_not_there(options, match):
    refused(ConfigError, match, **options)


def test_axes_that_are_none_or_there_twice():
    refused(
        UnknownNameError,
        "'layre' is no axis. Did you mean 'layer'.*\nAllowed: layer, pos, head",
        axes="layre",
    )
    refused(UnknownNameError, "3 is no axis", axes=("layer", 3))
    refused(ConfigError, "'pos' twice", axes=("pos", "layer", "position"))


# --- entries ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"layers": 3}, LayerRangeError, "layer 3 is not there: the component has 3, from 0 to 2"),
        ({"layers": [0, (1, -4)]}, LayerRangeError, "layer -4"),
        ({"layers": []}, ConfigError, "layers is empty.*leave it out for all 3"),
        ({"layers": [()]}, ConfigError, "empty window"),
        ({"layers": 1.5}, ConfigError, "layers=1.5"),
        ({"layers": "middle"}, ConfigError, "layers='middle'"),
        ({"layers": [True]}, ConfigError, "True"),
        ({"layers": [None]}, ConfigError, "None, which is no number of a layer"),
        ({"positions": 6}, LocationRangeError, "6"),
        ({"positions": [0, -7]}, LocationRangeError, "-7"),
        ({"positions": "Spain"}, (LocationError, ConfigError), "tokenizer"),
        ({"window": 3}, ConfigError, r"window=3 names no axis.*\{'layer': 3\}"),
        ({"window": {"layer": 0}}, ConfigError, "window of 'layer' is 0.*1 or more"),
        ({"window": {"pos": True}}, ConfigError, "window of 'pos' is True"),
        ({"window": {"layer": 1.0}}, ConfigError, "1.0"),
        ({"window": {"head": 2}}, ConfigError, "window has 'head'.*Axes: layer, pos"),
        ({"window": {"layers": 2}, "axes": "pos"}, ConfigError, "window has 'layer'.*Axes: pos"),
        ({"window": {"depth": 2}}, UnknownNameError, "'depth' is no axis"),
    ],
)
def test_entries_that_are_not_there(options, error, match):
    refused(error, match, **options)


def test_heads_that_are_not_there():
    component = {"component": "head_value_output", "axes": "head"}  # two of these serve four queries
    refused(LocationRangeError, "head 2 is not there: the component has 2, from 0 to 1", heads=2, **component)
    refused(ConfigError, "heads is empty", heads=[], **component)


def test_tokens_of_matrices_that_are_not_there():
    component = {"component": "attention_pattern", "axes": ("query", "key")}
    refused(LocationRangeError, "9", queries=9, **component)
    refused(LocationRangeError, "-8", keys=[0, -8], **component)


# --- prompts ----------------------------------------------------------------------------------------------


def test_prompts_of_different_length_without_a_word_of_what_belongs_together():
    message = refused(
        ConfigError,
        "Example 1 has 4 tokens in the run that is patched and 5",
        corrupted=batch(prompts(6, 4)),
        clean=batch(prompts(6, 5)),
    )
    assert "align='auto'" in message
    assert "(clean position, corrupted position)" in message


@pytest.mark.parametrize(
    ("align", "error", "match"),
    [
        ("outo", UnknownNameError, "align='outo' is unknown. Allowed: 'auto'"),
        (3, LocationError, "align=3: give 'auto', or a list of pairs"),
        ({0: 1}, LocationError, "align={0: 1}"),
        ([1, 2], LocationError, "1, which is no pair"),
        ([(1, 2, 3)], LocationError, r"\(1, 2, 3\), which is no pair"),
        ([(6, 0)], LocationRangeError, "position 6 of the clean run, which has 6 in example 0"),
        ([(0, -7)], LocationRangeError, "position -7 of the corrupted run, which has 6 in example 0"),
        ([[(0, 0)]] * 3, LocationError, "pairs for 3 examples, and there are 2"),
    ],
)
def test_pairs_that_make_no_sense(align, error, match):
    refused(error, match, align=align)


def test_embeddings_have_no_ids_to_pair_tokens_by():
    one, other = torch.randn(2, 6, 16), torch.randn(2, 5, 16)
    refused(
        ConfigError,
        "align='auto' pairs token ids, and the inputs have none",
        clean={"inputs_embeds": one},
        corrupted={"inputs_embeds": other},
        align="auto",
    )


def test_pairs_of_prompts_that_are_not_pairs():
    refused(InputError, "clean has 3 examples and corrupted 2", clean=batch(prompts(6, 6, 6)))
    refused(InputError, "clean has 2 examples and corrupted 1", corrupted=batch(prompts(6)))


def test_a_run_that_is_needed_and_not_given():
    refused(ConfigError, "'denoise' patches the corrupted run", corrupted=None)
    refused(ConfigError, "'noise' patches the clean run", clean=None, direction="noise")
    refused(ConfigError, "activations of the clean run in.*value='zero'", clean=None)
    refused(ConfigError, "'noise' patches the clean run", clean=None, value="zero")


def test_inputs_that_are_none():
    refused(InputError, "clean", clean="The capital of Spain is")
    refused(InputError, "corrupted", corrupted={"input_idz": torch.ones(1, 2, dtype=torch.long)})
    refused(UnknownNameError, r"direction 'sideways'\.\nAllowed: denoise, noise", direction="sideways")


def test_a_model_that_is_none():
    inputs = batch(prompts(6))
    with pytest.raises(ConfigError, match="model is a str"):
        sweep("gpt2", inputs, inputs, metric=read)


# --- collected activations --------------------------------------------------------------------------------


def test_caches_without_what_is_needed():
    model, inputs = model_of("llama"), batch(prompts(6, 6))
    cache = iv.collect(model, inputs, "block_input", layers=[0, 1])
    refused(LookupError, "block_input.*2", clean=cache)
    refused(LookupError, "mlp_output", "mlp_output", clean=cache)
    some = iv.collect(model, inputs, "block_input", positions=[1, 2])
    refused((ConfigError, ModelMismatchError), "block_input", clean=some)
    shorter = iv.collect(model, batch(prompts(5, 5)), "block_input")
    refused(ModelMismatchError, r"\(2, 5, 16\).*\(2, 6, 16\)", clean=shorter)
    more = iv.collect(model, batch(prompts(6, 6, 6)), "block_input")
    refused(ModelMismatchError, r"\(3, 6, 16\).*\(2, 6, 16\)", clean=more)
    one_head = iv.collect(model, inputs, "head_value_output", heads=[1])
    refused(ConfigError, "without positions, heads or means", "head_value_output", "head", clean=one_head)


def test_a_cache_can_be_put_in_and_not_be_patched():
    cache = iv.collect(model_of("llama"), batch(prompts(6, 6)), "block_input")
    refused(
        ConfigError,
        "'noise' patches the clean run, so that its inputs are needed",
        clean=cache,
        direction="noise",
    )


# --- metrics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "error", "match"),
    [
        (None, (ConfigError, MetricError, TypeError), "metric"),
        ("logit_difference", (ConfigError, MetricError), "logit_difference"),
        ({}, (ConfigError, MetricError), "metric"),
        (lambda z: "high", MetricError, "str"),
        (lambda z: None, MetricError, "NoneType|None"),
        (lambda z: z[:, -1, 500], MetricError, "an unpatched run.*out of bounds"),
        (lambda z: z[:, -1, 5] * torch.nan, MetricError, "NaN|nan"),
        (lambda z: 1 / 0, MetricError, "division by zero"),
    ],
)
def test_metrics_that_measure_nothing(metric, error, match):
    refused(error, match, metric=metric)


def of_patched(good, bad):
    """A metric that goes another way for a patched run: where its logits are none of the unpatched runs'."""
    model = model_of("llama")
    with torch.no_grad():
        known = [model(**batch(prompts(6, 6, seed=seed))).logits[:, -1, 5] for seed in (0, 1)]

    def metric(logits):
        value = logits[:, -1, 5]
        return good(value) if any((value - one).abs().max() < 1e-4 for one in known) else bad(value)

    return metric


def test_nan_is_reported_with_its_cell():
    message = refused(
        MetricError,
        r"'metric'.*block_input, layer 0, pos \d",
        metric=of_patched(lambda v: v, lambda v: v * torch.nan),
    )
    assert "NaN" in message


def test_another_shape_is_reported_with_its_cell():
    message = refused(
        MetricError,
        r"'each'.*layer 1, pos 4",
        metric={"fine": read, "each": of_patched(lambda v: v, lambda v: v[:1])},
        layers=1,
        positions=4,
    )
    assert "2" in message
    assert "1" in message


def test_an_error_in_a_metric_is_reported_with_its_cell():
    def bad(value):
        raise ZeroDivisionError("no")

    refused(
        MetricError,
        r"head_value_output, layer 2, head \d: .*no",
        "head_value_output",
        ("layer", "head"),
        metric=of_patched(lambda v: v, bad),
        layers=2,
    )


def test_a_metric_of_a_run_that_was_not_given():
    refused(
        MetricError,
        "reads the clean run, which was not given",
        metric=iv.metrics.kl_divergence(),
        clean=iv.collect(model_of("llama"), batch(prompts(6, 6)), "block_input"),
    )


# --- the rest ---------------------------------------------------------------------------------------------


def test_budgets_that_are_none_or_too_small():
    refused(ConfigError, "memory='plenty'.*'500MB'", memory="plenty")
    refused(ConfigError, "memory=0 is no room", memory=0)
    message = refused(ConfigError, "memory=64 bytes is too little for one cell of 2 example", memory=64)
    enough = int(message.rpartition("Give memory=")[2].split(" ")[0])
    inputs = batch(prompts(6, 6)), batch(prompts(6, 6, seed=1))
    assert sweep(model_of("llama"), *inputs, metric=read, memory=enough).values.shape == (3, 6, 2)
    refused(ConfigError, "too little", memory=enough // 2)


@pytest.mark.parametrize("check", [-1, 1.5, "yes", None])
def test_a_check_of_no_number_of_cells(check):
    refused(ConfigError, "exact_check=.*is no number of cells.*True, False", exact_check=check)


def test_places_that_are_not_reached_are_named():
    model = tiny("llama")
    model.model.layers[1].mlp.other = torch.nn.Linear(16, 16)
    inputs = batch(prompts(6)), batch(prompts(6, seed=1))
    with pytest.raises(NotFiredError, match=r"did not reach model.layers\[1\].mlp.other.output"):
        sweep(model, *inputs, "model.layers[1].mlp.other.output", "pos", read)
    assert hooks_of(model) == {}


def test_what_can_be_read_and_not_written_is_refused():
    refused(
        ConfigError,
        "can be read and not written",
        "expert_choice",
        family="mixtral",
    )


def test_a_damaged_and_a_foreign_checkpoint(tmp_path):
    inputs = batch(prompts(6, 6)), batch(prompts(6, 6, seed=1))
    sweep(model_of("llama"), *inputs, metric=read, checkpoint=tmp_path)
    refused(iv.StorageError, "checkpoints of another sweep", layers=[0], checkpoint=tmp_path)
    for file in tmp_path.iterdir():
        if file.suffix == ".safetensors":
            file.write_bytes(file.read_bytes()[:50])
    refused(iv.StorageError, str(tmp_path), checkpoint=tmp_path)
