"""Layers of several kinds: what some have and others have not, and the state that mixers keep for the next token."""

from __future__ import annotations

import functools
import pickle

import pytest
import tiny_registry
import torch
from torch.testing import assert_close

import intervenable as iv
from intervenable.binding import Places
from intervenable.layer_lists import layers_with
from intervenable.map_records import from_record, to_record
from intervenable.maps import described_by
from intervenable.mixer_state import layers_with_state
from model_maps import AttentionHeads, LayerKind, ModelMap, Site
from model_maps.families import STATE_IS_READ, lacking

NO_PATTERN = lacking(
    "attention_input",
    "query_output",
    "attention_value_output",
    "attention_output",
    "attention_pattern",
    why="it mixes positions by a state space",
)
NO_STATE_SPACE = lacking("mixer_input", "mixer_output", "mixer_state", why="it mixes positions by attention")
ATTENTION = {
    "attention_input": Site("self_attn", "input", "hidden_states", attention=AttentionHeads(4, 2)),
    "query_output": Site("self_attn.q_proj", width="query", heads="query"),
    "attention_value_output": Site("self_attn.o_proj", "input", width="query", heads="query"),
    "attention_output": Site("self_attn"),
}


def mixing(path):
    return {
        "mixer_input": Site(path, "input"),
        "mixer_output": Site(path),
        "mixer_state": Site(path, width="any", read_only=STATE_IS_READ),
    }


def hybrid(name, path, with_attention, without):
    """A row written by hand: attention in some layers, a mixer in the others."""
    return ModelMap(
        (name,),
        "model.layers",
        {
            "block_input": Site("", "input"),
            "block_output": Site(""),
            "final_norm_output": Site("model.norm"),
            "logits": Site("lm_head", width="vocabulary"),
        },
        kinds=(
            LayerKind(with_attention, sites=ATTENTION, absent=NO_STATE_SPACE),
            LayerKind(without, sites=mixing(path), absent=NO_PATTERN),
        ),
        sequential=False,
    )


ROWS = {
    "jamba": hybrid("JambaForCausalLM", "mamba", (1, 3), (0, 2)),
    "qwen3_next": hybrid("Qwen3NextForCausalLM", "linear_attn", (3,), (0, 1, 2)),
}


@functools.cache
def built(name):
    return tiny_registry.build(name).model


@pytest.fixture(params=ROWS)
def model(request):
    found = built(request.param)
    row = ROWS[request.param]
    if request.param == "jamba":  # the last norm is called otherwise
        row = ModelMap(
            row.classes,
            row.blocks,
            {**row.sites, "final_norm_output": Site("model.final_layernorm")},
            kinds=row.kinds,
            sequential=False,
        )
    with described_by(found, row):
        yield found


def prompt(seed=0):
    return {"input_ids": torch.randint(10, 90, (2, 6), generator=torch.Generator().manual_seed(seed))}


def kinds_of(model):
    """The layers with attention and those without."""
    blocks = list(model.model.layers)
    with_attention = tuple(layer for layer, block in enumerate(blocks) if hasattr(block, "self_attn"))
    return with_attention, tuple(layer for layer in range(len(blocks)) if layer not in with_attention)


def mixer_of(model, layer):
    block = model.model.layers[layer]
    return block.mamba if hasattr(block, "mamba") else block.linear_attn


def kept(module, model, inputs, side="output"):
    """A copy of what goes into a module or comes out of it."""
    found = []

    def before(_, args, kwargs):
        found.append((args[0] if args else kwargs["hidden_states"]).clone())

    def after(_, args, output):
        found.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "input"
        else module.register_forward_hook(after)
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return found[0]


# --- which layers have what -------------------------------------------------------------------------------


def test_each_component_is_in_the_layers_of_its_kind(model):
    with_attention, without = kinds_of(model)
    places = Places(model)
    assert places.layers_with("attention_pattern") == with_attention
    assert places.layers_with("head_query_output") == with_attention
    assert places.layers_with("mixer_state") == without
    assert places.layers_with("block_output") == (0, 1, 2, 3)
    assert places.layers_of("mixer_output") == 4
    assert layers_with(model, "query_output") == with_attention


def test_collecting_takes_the_layers_that_have_a_component(model):
    with_attention, without = kinds_of(model)
    names = ["attention_pattern", "mixer_output", "block_output"]
    cache = iv.collect(model, prompt(), names)
    assert cache.layers_of("attention_pattern") == with_attention
    assert cache.layers_of("mixer_output") == without
    assert cache.layers_of("block_output") == (0, 1, 2, 3)
    assert iv.collect(model, prompt(), "mixer_output", layers=slice(1, 4)).layers_of("mixer_output") == tuple(
        layer for layer in without if layer > 0
    )
    for layer in without:
        assert torch.equal(cache["mixer_output", layer], kept(mixer_of(model, layer), model, prompt()))


def test_a_layer_without_the_component_is_refused_by_its_number(model):
    (has, *_), (lacks, *_) = kinds_of(model)
    name = type(model).__name__
    attention = f"Layer {lacks} of {name} has no 'attention_pattern': it mixes positions by a state space."
    mixer = f"Layer {has} of {name} has no 'mixer_output': it mixes positions by attention."
    with pytest.raises(iv.UnsupportedModelError) as error:
        iv.collect(model, prompt(), "attention_pattern", layers=lacks)
    assert str(error.value).splitlines()[0] == attention
    with pytest.raises(iv.UnsupportedModelError) as error:
        iv.collect(model, prompt(), "mixer_output", layers=[lacks, has])
    assert mixer in str(error.value)
    with pytest.raises(iv.UnsupportedModelError) as error:
        iv.IntervenableModel(iv.RepresentationConfig(has, "mixer_output"), model)
    assert mixer in str(error.value)
    with pytest.raises(iv.UnsupportedModelError) as error:
        iv.patching.sweep(model, prompt(), prompt(1), "mixer_output", "layer", last_logit, layers=[has])
    assert mixer in str(error.value)


def last_logit(logits):
    return logits[:, -1, 7]


# --- what is done in them ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_mixer_is_swapped_as_a_hook_would(model, side):
    layer = kinds_of(model)[1][-1]
    base, source = prompt(), prompt(1)
    module = mixer_of(model, layer)
    given = kept(module, model, source, side)

    def before(_, args, kwargs):
        value = (args[0] if args else kwargs["hidden_states"]).clone()
        value[:, 2:4] = given[:, 2:4]
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    def after(_, args, output):
        output = output.clone()
        output[:, 2:4] = given[:, 2:4]
        return output

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "input"
        else module.register_forward_hook(after)
    )
    expected = model(**base).logits
    handle.remove()
    swap = iv.IntervenableModel(
        iv.IntervenableConfig([iv.RepresentationConfig(layer, f"mixer_{side}")], iv.VanillaIntervention),
        model,
    )
    swapped = swap(base, [source], {"sources->base": [2, 3]}).intervened.logits
    assert torch.equal(swapped, expected)
    assert not torch.equal(expected, model(**base).logits)


@torch.no_grad()
def test_an_identity_in_layers_of_every_kind_changes_no_bit(model):
    with_attention, without = kinds_of(model)
    places = [(layer, name) for layer in with_attention for name in ("head_query_output", "attention_output")]
    places += [(layer, name) for layer in without for name in ("mixer_input", "mixer_output")]
    entries = [
        iv.RepresentationConfig(layer, name, "h" if "head" in name else "pos", intervention=lambda base: base)
        for layer, name in places
    ]
    output = iv.IntervenableModel(entries, model)(prompt())
    assert torch.equal(output.intervened.logits, model(**prompt()).logits)


@torch.no_grad()
def test_what_the_source_gave_a_mixer_comes_out_of_it(model):
    layer = kinds_of(model)[1][0]
    source = iv.collect(model, prompt(1), ["mixer_input", "mixer_output", "mixer_state"], layers=layer)
    swap = iv.RepresentationConfig(
        layer,
        "mixer_input",
        intervention_type=iv.VanillaIntervention,
        source_representation=source["mixer_input", layer],
    )
    swapped = iv.IntervenableModel(swap, model)
    found = iv.collect(swapped, prompt(), ["mixer_output", "mixer_state"], layers=layer)
    assert_close(found["mixer_output", layer], source["mixer_output", layer])
    assert_close(found["mixer_state", layer], source["mixer_state", layer])


def test_sweeps_take_the_layers_that_have_a_component(model):
    with_attention, without = kinds_of(model)
    clean, corrupted = prompt(), prompt(1)
    for name, there in (("mixer_output", without), ("query_output", with_attention)):
        found = iv.patching.sweep(model, clean, corrupted, name, ("layer", "pos"), last_logit)
        assert found.values.shape[:2] == (len(there), 6)
        assert [int(label) for label in found.labels["layer"]] == list(there)
        swap = iv.IntervenableModel(
            iv.IntervenableConfig([iv.RepresentationConfig(there[-1], name)], iv.VanillaIntervention), model
        )
        with torch.no_grad():
            one = last_logit(swap(corrupted, [clean], {"sources->base": 3}).intervened.logits)
        assert_close(found.values[-1, 3], one, atol=1e-4, rtol=1e-4)


def test_a_window_of_layers_leaves_out_those_of_another_kind():
    model = built("qwen3_next")
    with described_by(model, ROWS["qwen3_next"]):
        found = iv.patching.sweep(
            model, prompt(), prompt(1), "mixer_output", "layer", last_logit, window={"layer": 3}
        )
        whole = iv.patching.sweep(
            model, prompt(), prompt(1), "mixer_output", "layer", last_logit, layers=[(1, 2)]
        )
    assert_close(found.values[2], whole.values[0])  # the third neighbour has attention


def test_components_of_no_common_layer_are_not_swept_together(model):
    with pytest.raises(iv.ConfigError, match=r"No layer of .* has all of query_output, mixer_output"):
        iv.patching.sweep(model, prompt(), prompt(1), ["query_output", "mixer_output"], "layer", last_logit)


def test_a_patch_setter_of_a_users_own_is_given_the_layers_that_have_the_component(model):
    _, without = kinds_of(model)
    given = []

    def own(corrupted, index, clean):
        given.append(tuple(index))
        corrupted[:, index[1]] = clean[:, index[1]]
        return corrupted

    pair = model, prompt(1), iv.collect(model, prompt(), "mixer_output")
    axes = ("layer", "pos")
    found, index = iv.patching.generic_activation_patch(
        *pair, last_logit, own, "mixer_output", index_axis_names=axes, return_index_df=True
    )
    assert sorted({layer for layer, _ in given}) == sorted(set(index["layer"])) == list(without)
    swept = iv.patching.sweep(model, prompt(), prompt(1), "mixer_output", axes, last_logit).values
    assert_close(found, swept, atol=1e-4, rtol=1e-4)


def test_direct_paths_need_heads_in_every_layer(model):
    name, layers = type(model).__name__, ", ".join(map(str, kinds_of(model)[0]))
    with pytest.raises(iv.UnsupportedModelError, match=f"{name} has heads in layers {layers} alone"):
        iv.patching.get_act_patch_direct_path_all_sources(model, prompt(1), prompt(), None, last_logit)


def test_all_layers_are_those_with_attention(model):
    with_attention, _ = kinds_of(model)
    entries = iv.attention.knockout("last", 0, "all", model=model)
    assert tuple(entry.layer for entry in entries) == with_attention
    with torch.no_grad():
        logits = iv.IntervenableModel(entries, model)(prompt()).intervened.logits
        assert not torch.equal(logits, model(**prompt()).logits)


# --- the state --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_state_is_what_the_models_cache_holds(model):
    _, without = kinds_of(model)
    cache = iv.collect(model, prompt(), "mixer_state")
    held = model(**prompt(), use_cache=True).past_key_values
    for layer in without:
        assert torch.equal(cache["mixer_state", layer], held.layers[layer].recurrent_states[0])
        assert cache.axes["mixer_state", layer][0] == "batch"


@torch.no_grad()
def test_the_state_after_a_prompt_is_that_of_the_step_by_step_run(model):
    layer = kinds_of(model)[1][0]
    ids = prompt()["input_ids"]
    held = model(input_ids=ids[:, :1], use_cache=True).past_key_values
    for at in range(1, ids.shape[1]):
        held = model(input_ids=ids[:, at : at + 1], past_key_values=held, use_cache=True).past_key_values
    state = iv.collect(model, prompt(), "mixer_state", layers=layer)["mixer_state", layer]
    assert_close(state, held.layers[layer].recurrent_states[0], atol=1e-5, rtol=1e-4)


def test_no_position_of_a_state_can_be_named_and_it_is_not_written(model):
    layer = kinds_of(model)[1][0]
    reading = iv.IntervenableModel(
        iv.RepresentationConfig(layer, "mixer_state", intervention=iv.CollectIntervention()), model
    )
    with torch.no_grad():
        (state,) = reading(prompt()).collected.values()
        assert torch.equal(
            state, iv.collect(model, prompt(), "mixer_state", layers=layer)["mixer_state", layer]
        )
        with pytest.raises(iv.LocationError, match="kept of all positions, so that none can be named"):
            reading(prompt(), unit_locations={"base": 2})
    with pytest.raises(iv.LocationError, match="positions say nothing"):
        iv.collect(model, prompt(), "mixer_state", positions=-1)
    with pytest.raises(iv.ConfigError, match="nothing reads it before the next token"):
        iv.IntervenableModel(
            iv.RepresentationConfig(layer, "mixer_state", intervention=iv.ZeroIntervention()), model
        )


def test_a_run_without_a_cache_says_why_there_is_no_state(model):
    with pytest.raises(iv.UnsupportedModelError, match=r"left no state behind. .* not with use_cache=False"):
        iv.collect(model, {**prompt(), "use_cache": False}, "mixer_state")


STATES = {
    "mamba": ("backbone.layers", "mixer", (2, 64, 8)),
    "mamba2": ("backbone.layers", "mixer", (2, 4, 16, 8)),
    "recurrent_gemma": ("model.layers", "temporal_block", (2, 32)),
    "rwkv": ("rwkv.blocks", "attention", (2, 32, 3)),
    "minimax": ("model.layers", "self_attn", (2, 4, 8, 8)),
    "nemotron_h": ("backbone.layers", "mixer", (2, 4, 16, 8)),
}


@pytest.mark.parametrize("name", STATES)
def test_which_layers_keep_a_state_is_found_out_by_a_run(name):
    path, mixer, shape = STATES[name]
    tiny = tiny_registry.build(name)
    blocks = dict(tiny.model.named_modules())
    path = path if path in blocks else path.replace("backbone", "model")
    found = layers_with_state(tiny.model, tiny.inputs, {n: f"{path}.{n}.{mixer}" for n in range(4)})
    without = {
        "minimax": {0, 2},  # the layers with a softmax
        "recurrent_gemma": {2},
        "nemotron_h": {1, 2, 3},  # experts, attention, MLP
    }
    assert set(found) == {0, 1, 2, 3} - without.get(name, set())
    assert set(found.values()) == {shape}


def test_layers_of_one_kind_share_a_map_which_is_made_once():
    with_attention = tuple(range(3, 400, 4))
    without = tuple(layer for layer in range(400) if layer not in with_attention)
    row = hybrid("Deep", "mamba", with_attention, without)
    first = row.at_layer("mixer_output", 0)
    assert all(row.at_layer("mixer_output", layer) is first for layer in without)
    assert row.at_layer("mixer_output", 3) is row.at_layer("query_output", 399) is not first
    for again in (pickle.loads(pickle.dumps(row)), from_record(to_record(row))):
        assert again == row
        assert again.at_layer("mixer_output", 0) == first
