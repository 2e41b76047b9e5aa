"""Pictures and sounds: what counts as an example and a position in a tower, and swaps there against hooks by hand."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch
import transformers
from datasets import Dataset
from torch.testing import assert_close
from tower_models import NAMES, registered, tower_inputs, tower_model

import intervenable as iv
from intervenable import maps, stack_lengths
from intervenable.inputs import read_inputs
from model_maps import COMPONENTS, ModelMap, UnmappedModelError, find_map, register_map

LAYER = 1


@pytest.fixture(autouse=True)
def _maps():
    with registered():
        yield


def read(name, **changed):
    model = tower_model(name)
    return read_inputs({**tower_inputs(name), **changed}, model, "base")


def sizes(run, *stacks):
    return [(view.batch, view.length) for view in map(run.of, stacks)]


# What is counted

COUNTED = [
    ("vit", {None: (2, 5)}),
    ("clip", {None: (2, 7), "text": (2, 7), "vision": (3, 5)}),
    ("llava", {None: (2, 11), "vision": (2, 5)}),
    ("gemma3", {None: (2, 11), "vision": (2, 4)}),
    ("qwen2_vl", {None: (2, 9), "vision": (2, 8)}),
    ("mllama", {None: (2, 8), "vision": (2, 8), "cross": (2, 5)}),
    ("whisper", {None: (2, 8), "encoder": (2, 8), "decoder": (2, 5)}),
    ("bart", {None: (2, 7), "encoder": (2, 7), "decoder": (2, 5)}),
    ("wav2vec2", {None: (2, 7)}),
]


@pytest.mark.parametrize(("name", "expected"), COUNTED)
def test_each_stack_counts_its_own_examples_and_positions(name, expected):
    assert sizes(read(name), *expected) == list(expected.values())


@pytest.mark.parametrize(("name", "expected"), COUNTED)
def test_what_is_counted_is_what_a_hook_on_a_block_sees(name, expected):
    model, inputs = tower_model(name), tower_inputs(name)
    described = maps.map_of(model)
    seen = {}
    with ExitStack() as stack, torch.no_grad():
        for which in expected:
            blocks = described.blocks if which is None else described.stacks.get(which)
            if blocks is None:
                continue
            block = model.get_submodule(f"{blocks}.0")
            keep = lambda module, args, output, which=which: seen.__setitem__(which, output)  # noqa: E731
            stack.callback(block.register_forward_hook(keep).remove)
        model(**inputs)
    for which, output in seen.items():
        found = output[0] if isinstance(output, tuple) else output
        batch, length = expected[which]
        assert found.numel() == batch * length * found.shape[-1]
        assert found.dim() == 2 or tuple(found.shape[:2]) == (batch, length)


def test_tokens_and_their_mask_belong_to_the_stack_that_reads_them():
    model = tower_model("llava")
    inputs = tower_inputs("llava")
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :1] = 0
    run = read_inputs({**inputs, "attention_mask": mask}, model, "base")
    assert run.real_positions[0] == list(range(1, 11))
    assert (run.of("vision").input_ids, run.of("vision").attention_mask) == (None, None)
    clip = read("clip")
    assert clip.of("text") is clip
    assert clip.of("vision").input_ids is None


def test_a_mask_of_samples_is_no_mask_of_frames():
    run = read("wav2vec2", attention_mask=torch.ones(2, 120, dtype=torch.long))
    assert (run.length, run.attention_mask) == (7, None)
    assert read("whisper", attention_mask=torch.ones(2, 16, dtype=torch.long)).attention_mask is None


def test_a_batch_may_have_more_pictures_than_prompts():
    inputs = tower_inputs("llava")
    two = torch.cat([inputs["input_ids"], inputs["input_ids"][:, 2:6]], 1)  # two pictures in each prompt
    pixels = torch.cat([inputs["pixel_values"]] * 2)
    run = read("llava", input_ids=two, pixel_values=pixels)
    assert sizes(run, None, "vision") == [(2, 15), (4, 5)]


def test_pictures_of_one_size_on_one_axis_are_told_apart_and_of_several_refused():
    model, inputs = tower_model("qwen2_vl"), tower_inputs("qwen2_vl")
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 4], [1, 2, 2]])
    inputs["pixel_values"] = inputs["pixel_values"][:12]
    inputs["input_ids"][1, 3] = 5
    inputs["mm_token_type_ids"][1, 3] = 0
    run = read_inputs(inputs, model, "base")
    assert run.length == 9  # the prompt is counted all the same
    with pytest.raises(iv.InputError) as caught:
        run.of("vision")
    assert str(caught.value) == (
        "The vision stack of Qwen2VLForConditionalGeneration has the patches of all pictures on one axis, and these"
        " are of different sizes (8, 4 patches), so that their positions cannot be counted picture by picture. Give"
        " pictures of one size, or one at a time."
    )


def test_a_tower_that_is_given_nothing_has_no_positions():
    inputs = tower_inputs("llava")
    inputs.pop("pixel_values")
    inputs["input_ids"] = inputs["input_ids"].clamp(max=60)
    run = read_inputs(inputs, tower_model("llava"), "base")
    with pytest.raises(iv.InputError) as caught:
        run.of("vision")
    assert str(caught.value) == (
        "The vision tower of LlavaForConditionalGeneration does not run with these inputs, so that it has no"
        " positions. Given: input_ids."
    )


def test_a_model_that_puts_patches_before_its_tokens_counts_them_too():
    config = transformers.GitConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        vocab_size=72,
        vision_config={
            "hidden_size": 12,
            "num_hidden_layers": 2,
            "num_attention_heads": 3,
            "intermediate_size": 20,
            "image_size": 8,
            "patch_size": 4,
        },
    )
    model = transformers.GitForCausalLM(config).eval()
    described = ModelMap(("GitForCausalLM",), "git.encoder.layer", {})
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "pixel_values": torch.randn(1, 3, 8, 8)}
    with maps.described_by(model, described):
        run = read_inputs(inputs, model, "base")
        alone = read_inputs({"input_ids": inputs["input_ids"]}, model, "base")
    assert (run.length, run.input_ids) == (5 + 3, None)
    assert (alone.length, alone.input_ids is None) == (3, False)


# The short run


@pytest.fixture
def calls(monkeypatch):
    """How often the model is run to count a stack."""
    counted = []
    measure = stack_lengths._measured

    def counting(*args):
        counted.append(args[1])
        return measure(*args)

    monkeypatch.setattr(stack_lengths, "_measured", counting)
    return counted


def test_a_shape_is_measured_once_and_another_anew(calls):
    model = tower_model("wav2vec2")
    lengths = [
        read_inputs({"input_values": torch.randn(1, samples)}, model, "base").length
        for samples in (120, 120, 200, 120)
    ]
    assert lengths == [7, 7, 12, 7]
    assert len(calls) == 2


def test_models_of_tokens_are_never_run_to_count_them(calls):
    read("bart")
    tokenizer, model = iv.load_small_lm()
    read_inputs(tokenizer("The capital of Spain is", return_tensors="pt"), model, "base")
    assert calls == []


def test_a_tower_that_nobody_asks_about_is_not_run_to_count_it(calls):
    model, inputs = tower_model("llava"), tower_inputs("llava")
    declared = iv.IntervenableModel(iv.RepresentationConfig(LAYER, "block_output"), model)
    with torch.no_grad():
        declared(inputs, [tower_inputs("llava", seed=2)], {"sources->base": 4})
    assert calls == []


def test_the_short_run_stops_at_the_first_block_and_leaves_the_model_as_it_was():
    model = tower_model("vit").train()
    reached = []
    model.vit.layers[0].register_forward_hook(lambda *_: reached.append(0))
    state = torch.random.get_rng_state()
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]

    assert read_inputs(tower_inputs("vit"), model, "base").length == 5

    assert reached == []
    assert all(part.training for part in model.modules())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert hooks == [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]


def test_what_a_model_knows_goes_with_it():
    model = tower_model("vit")
    read_inputs(tower_inputs("vit"), model, "base")
    assert model in stack_lengths._KNOWN
    before = len(stack_lengths._KNOWN)
    del model
    assert len(stack_lengths._KNOWN) < before


def test_several_threads_may_count_at_once():
    model = tower_model("wav2vec2").train()
    found = {}

    def count(samples):
        found[samples] = read_inputs({"input_values": torch.randn(1, samples)}, model, "base").length

    threads = [threading.Thread(target=count, args=(samples,)) for samples in range(120, 184, 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {120: 7, 136: 8, 152: 9, 168: 10}
    assert all(part.training for part in model.modules())


# Swaps against hooks by hand

SWAPPED = [
    ("vit", "block_output", (0, 3)),
    ("clip", "vision_block_output", (1, 4)),
    ("clip", "text_block_output", (0, 1, 2, 3, 4, 5, 6)),
    ("llava", "vision_block_output", (1, 4)),
    ("llava", "block_output", (3, 9)),
    ("gemma3", "vision_block_output", (0, 3)),
    ("gemma3", "block_output", (3, 9)),
    ("qwen2_vl", "vision_block_output", (2, 7)),
    ("qwen2_vl", "block_output", (3, 8)),
    ("mllama", "vision_block_output", (0, 4)),
    ("mllama", "block_output", (0, 6)),
    ("mllama", "cross_key_output", (1, 4)),
    ("mllama", "cross_attention_output", (1, 7)),
    ("whisper", "encoder_block_output", (0, 7)),
    ("whisper", "decoder_block_output", (1, 4)),
    ("whisper", "cross_value_output", (2, 5)),
    ("whisper", "cross_attention_output", (0, 3)),
    ("bart", "encoder_block_output", (0, 6)),
    ("bart", "decoder_block_output", (1, 4)),
    ("bart", "cross_key_output", (1, 4)),
    ("wav2vec2", "block_output", (0, 6)),
]


def module_of(model, component, layer=LAYER):
    described = maps.map_of(model)
    path = described.site(component, layer).path
    return model.get_submodule(".".join(p for p in (described.blocks_of(component), str(layer), path) if p))


def rows(value, run, component):
    """A tensor as `[examples, positions, columns]`, whether they are on one axis or on two."""
    stack = maps.map_of(run.model).stack_of(component)
    return value.reshape(run.of(stack).batch, -1, value.shape[-1])


def swapped_by_hand(model, inputs, source, component, here, there):
    """What comes out with the values of the source at these positions, by two hooks of torch's."""
    module, kept = module_of(model, component), []
    run = read_inputs(inputs, model, "base")
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    handle = module.register_forward_hook(lambda _, args, output: kept.append(first(output).clone()))
    with torch.no_grad():
        model(**source)
    handle.remove()

    def put(module, args, output):
        new = rows(first(output).clone(), run, component)
        new[:, list(here)] = rows(kept[0], run, component)[:, list(there)]
        new = new.reshape(first(output).shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = module.register_forward_hook(put, prepend=True)  # before what records hidden states
    with torch.no_grad():
        output = model(**inputs)
    handle.remove()
    return output


def answer(output):
    """What a model answers: logits, or how pictures and texts go together."""
    return output["logits"] if "logits" in output else output["logits_per_image"]


@pytest.mark.parametrize(("name", "component", "positions"), SWAPPED)
def test_a_swap_is_that_of_hooks_by_hand(name, component, positions):
    model, inputs, source = tower_model(name), tower_inputs(name), tower_inputs(name, seed=2)
    here, there = positions, positions[::-1]
    entry = iv.RepresentationConfig(LAYER, component, "pos")
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.VanillaIntervention), model)
    examples = read_inputs(inputs, model, "base").of(maps.map_of(model).stack_of(component)).batch
    located = {"sources->base": ([[list(there)] * examples], [[list(here)] * examples])}
    with torch.no_grad():
        output = declared(inputs, [source], located)
        plain = answer(model(**inputs))
    expected = answer(swapped_by_hand(model, inputs, source, component, here, there))

    assert torch.equal(answer(output.intervened), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)
    assert [line.positions for line in output.receipt] == [here] * examples


@pytest.mark.parametrize("name", NAMES)
def test_swapping_a_run_with_itself_changes_nothing(name):
    model, inputs = tower_model(name), tower_inputs(name)
    described = maps.map_of(model)
    entries = [
        iv.RepresentationConfig(LAYER, component, COMPONENTS[component].units[-1])
        for component in described.components()
        if COMPONENTS[component].scope == "block"
        and described.site(component, LAYER) is not None
        and COMPONENTS[component].word
        in ("block_output", "attention_output", "head_value_output", "mlp_output")
    ]
    assert entries
    declared = iv.IntervenableModel(iv.IntervenableConfig(entries, iv.VanillaIntervention), model)
    with torch.no_grad():
        assert torch.equal(answer(declared(inputs, [inputs]).intervened), answer(model(**inputs)))


def test_a_source_of_another_number_of_pictures_is_refused():
    model, inputs, source = tower_model("clip"), tower_inputs("clip"), tower_inputs("clip", seed=2)
    source["pixel_values"] = source["pixel_values"][:2]
    entry = iv.RepresentationConfig(LAYER, "vision_block_output", "pos")
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.VanillaIntervention), model)
    with pytest.raises(iv.SourceError) as caught:
        declared(inputs, [source])
    assert str(caught.value) == (
        "'layer_1.vision_block_output.pos' is in the vision tower, which has 3 examples in the base and 2 in the"
        " source. Give as many, or one for all."
    )


def test_locations_are_given_for_each_picture():
    model, inputs = tower_model("clip"), tower_inputs("clip")
    entry = iv.RepresentationConfig(LAYER, "vision_block_output", "pos")
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.ZeroIntervention), model)
    with torch.no_grad():
        lines = declared(inputs, None, {"base": [[[0], [1], [2, 3]]]}).receipt
    assert [line.positions for line in lines] == [(0,), (1,), (2, 3)]
    assert all(line.change > 0 for line in lines)
    with pytest.raises(iv.LocationError, match="positions for 2 examples, and the batch has 3"):
        declared(inputs, None, {"base": [[[0], [1]]]})
    with pytest.raises(
        iv.LocationRangeError, match=r"Position 5 .* is out of range for example 0, which has"
    ):
        declared(inputs, None, {"base": 5})


def test_a_receipt_has_a_line_for_each_picture_that_is_only_read():
    model, inputs = tower_model("clip"), tower_inputs("clip")
    entry = iv.RepresentationConfig(LAYER, "vision_block_output", "pos")
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.CollectIntervention), model)
    with torch.no_grad():
        output = declared(inputs, None, {"base": 1})
    assert [(line.example, line.change) for line in output.receipt] == [(0, 0.0), (1, 0.0), (2, 0.0)]


def test_the_attention_of_a_picture_can_be_edited_head_by_head():
    model, inputs = tower_model("llava", "eager"), tower_inputs("llava")
    where = {"heads": 2, "queries": [0, 1], "keys": 3}
    entry = iv.RepresentationConfig(LAYER, "vision_attention_pattern", "h.query.key", where=where)
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.ZeroIntervention), model)
    value = module_of(model, "vision_value_output")
    output = module_of(model, "vision_attention_value_output")
    kept = {}

    def change(module, args):
        """Without a key, a head sends on its weighted sum of values less that key's part."""
        heads = kept["value"].unflatten(-1, (3, 4))
        sent = args[0].unflatten(-1, (3, 4)).clone()
        for query in (0, 1):
            weight = kept["pattern"][:, 2, query, 3]
            sent[:, query, 2] -= weight[:, None] * heads[:, 3, 2]
        return (sent.flatten(2),)

    with ExitStack() as stack, torch.no_grad():
        attention = module_of(model, "vision_attention_output")
        kept["pattern"] = None
        stack.callback(
            value.register_forward_hook(lambda _, args, out: kept.__setitem__("value", out)).remove
        )
        look = attention.register_forward_hook(lambda _, args, out: kept.__setitem__("pattern", out[1]))
        model(**inputs)
        look.remove()
        stack.callback(output.register_forward_pre_hook(change).remove)
        expected = model(**inputs).logits
    with torch.no_grad():
        got = declared(inputs).intervened.logits
        plain = model(**inputs).logits
    assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-4)


# Collecting


@pytest.mark.parametrize(("name", "component"), [(name, component) for name, component, _ in SWAPPED])
def test_collecting_gives_what_a_hook_sees(name, component):
    model, inputs = tower_model(name), tower_inputs(name)
    run, kept = read_inputs(inputs, model, "base"), []
    module = module_of(model, component)
    handle = module.register_forward_hook(
        lambda _, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    cache = iv.collect(model, inputs, [(component, LAYER)], device=None)
    assert torch.equal(cache[component, LAYER], rows(kept[0], run, component))
    some = iv.collect(model, inputs, [(component, LAYER)], positions=[1, -1], device=None)
    assert torch.equal(some[component, LAYER], rows(kept[0], run, component)[:, [1, -1]])


def test_one_cache_may_hold_towers_of_several_sizes():
    model, inputs = tower_model("clip"), tower_inputs("clip")
    cache = iv.collect(
        model, inputs, ["vision_block_output", "text_block_output", "vision_attention_pattern"]
    )
    shapes = {key: tuple(cache[key, 0].shape) for key in ("vision_block_output", "text_block_output")}
    assert shapes == {"vision_block_output": (3, 5, 12), "text_block_output": (2, 7, 16)}
    assert tuple(cache["vision_attention_pattern", 0].shape) == (3, 3, 5, 5)


def test_batches_whose_pictures_belong_to_nobody_known_are_not_cut():
    model, inputs = tower_model("qwen2_vl"), tower_inputs("qwen2_vl")
    with pytest.raises(iv.InputError) as caught:
        iv.collect(model, inputs, "block_output", batch_size=1)
    assert str(caught.value) == (
        "pixel_values has 16 entries for 2 examples, so that it is not known which belong to which: the batch cannot"
        " be cut into smaller ones. Give one picture or sound for each example, or examples one at a time."
    )
    cut = iv.collect(tower_model("llava"), tower_inputs("llava"), "vision_block_output", batch_size=1)
    whole = iv.collect(tower_model("llava"), tower_inputs("llava"), "vision_block_output")
    assert_close(cut["vision_block_output", 1], whole["vision_block_output", 1])


# Sweeps

SWEPT = [
    ("vit", "block_output", ("layer", "pos")),
    ("vit", "head_value_output", ("layer", "head")),
    ("clip", "vision_block_output", ("layer", "pos")),
    ("llava", "vision_block_output", ("layer", "pos")),
    ("llava", "block_output", ("layer", "pos")),
    ("qwen2_vl", "vision_block_output", ("layer", "pos")),
    ("mllama", "cross_key_output", ("layer", "pos")),
    ("whisper", "encoder_block_output", ("layer", "pos")),
    ("whisper", "cross_attention_pattern", ("layer", "head")),
    ("wav2vec2", "block_output", ("layer", "pos")),
]


@pytest.mark.parametrize(("name", "component", "axes"), SWEPT)
def test_a_sweep_is_one_swap_a_cell(name, component, axes):
    model, clean, corrupted = tower_model(name), tower_inputs(name), tower_inputs(name, seed=2)
    metric = (lambda z: z.square().mean()) if name == "clip" else iv.metrics.logit(None, 3)
    layers = [LAYER] if name == "mllama" else [0, LAYER]
    swept = iv.patching.sweep(model, clean, corrupted, component, axes, metric, layers=layers)
    unit = COMPONENTS[component].units[0]
    entry = iv.RepresentationConfig(LAYER, component, unit)
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.VanillaIntervention), model)
    expected = []
    for cell in range(swept.values.shape[1]):
        with torch.no_grad():
            logits = answer(declared(corrupted, [clean], {"sources->base": cell}).intervened)
        if name == "clip":
            expected.append(logits.square().mean())
        else:
            expected.append((logits if logits.dim() == 2 else logits[:, -1])[:, 3].mean())
    assert_close(swept.values[-1], torch.stack(expected), atol=1e-4, rtol=1e-4)
    assert (swept.values[-1] - swept.baseline_corrupted).abs().max() > 1e-3


def test_the_cells_of_a_picture_go_together_in_waves():
    model, clean, corrupted = (
        tower_model("llava"),
        tower_inputs("llava"),
        tower_inputs("llava", seed=2),
    )
    swept = iv.patching.sweep(
        model, clean, corrupted, "vision_block_input", metric=iv.metrics.logit(None, 3), exact_check=True
    )
    assert any("many at a time" in note for note in swept.shortcuts)


def test_one_clean_picture_stands_for_as_many_prompts_as_are_corrupted():
    model, corrupted = tower_model("llava"), tower_inputs("llava", seed=2)
    one = {key: value[:1] for key, value in tower_inputs("llava").items()}
    both = {key: torch.cat([value] * 2) for key, value in one.items()}
    first, second = (
        iv.patching.sweep(model, clean, corrupted, "vision_block_input", metric=iv.metrics.logit(None, 3))
        for clean in (one, both)
    )
    assert_close(first.values, second.values)


@pytest.mark.parametrize("make", [iv.metrics.logit, iv.metrics.probability, iv.metrics.rank])
def test_metrics_read_the_one_answer_of_a_classifier(make):
    model, clean, corrupted = tower_model("vit"), tower_inputs("vit"), tower_inputs("vit", seed=2)
    swept = iv.patching.sweep(
        model, clean, corrupted, "block_input", metric=make(None, [3, 1], reduce="none")
    )
    with torch.no_grad():
        logits = model(**corrupted).logits
    expected = {
        "logit": logits,
        "probability": logits.softmax(-1),
        "rank": (logits[:, None, :] > logits[:, :, None]).sum(-1).float(),
    }[make(None, 3).name]
    assert_close(swept.baseline_corrupted, expected[[0, 1], [3, 1]])


def test_examples_with_pictures_of_their_own_can_be_drawn_and_others_not():
    model, inputs = tower_model("llava"), tower_inputs("llava")
    swept = iv.patching.sweep(
        model, None, inputs, "vision_block_input", ("layer",), iv.metrics.logit(None, 3), value="resample",
        direction="denoise",
    )  # fmt: skip
    assert swept.values.shape == (3,)
    with pytest.raises(iv.InputError, match="value='resample' cannot draw examples"):
        iv.patching.sweep(
            tower_model("qwen2_vl"), None, tower_inputs("qwen2_vl"), "block_input", ("layer",),
            iv.metrics.logit(None, 3), value="resample", direction="denoise",
        )  # fmt: skip


# Training


TRAINED = [
    ("vit", "block_output", 0),
    ("llava", "block_output", -1),
    ("llava", "vision_block_output", 1),
    ("mllama", "cross_attention_output", -1),
    ("whisper", "encoder_block_output", 1),
    ("whisper", "decoder_block_output", -1),
    ("whisper", "cross_attention_output", -1),
    ("bart", "encoder_block_output", 1),
    ("bart", "cross_key_output", 1),
    ("wav2vec2", "block_output", 2),
]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(("name", "component", "position"), TRAINED)
def test_a_rotation_is_trained_from_the_loss_that_one_call_has(name, component, position, fast):
    model = tower_model(name)
    base, source = tower_inputs(name, batch=3), tower_inputs(name, seed=2, batch=3)
    columns = {key: value.tolist() for key, value in base.items()}
    columns |= {f"source_{key}": value.tolist() for key, value in source.items()}
    labels = [0, 1, 2]
    entry = iv.RepresentationConfig(LAYER, component, "pos", low_rank_dimension=2, where=[position])
    torch.manual_seed(0)
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.LowRankRotatedSpaceIntervention), model)
    with torch.no_grad():
        logits = answer(declared(base, [source]).intervened)
    last = logits if logits.dim() == 2 else logits[:, -1]
    before = torch.nn.functional.cross_entropy(last, torch.tensor(labels))

    result = iv.training.train(
        declared,
        Dataset.from_dict({**columns, "labels": labels}),
        epochs=8,
        batch_size=3,
        lr=0.05,
        schedule="constant",
        fast=fast,
    )

    losses = [row["loss"] for row in result.history if row["kind"] == "step"]
    assert losses[0] == pytest.approx(float(before), rel=1e-4)
    assert losses[-1] < losses[0]


# Maps that a user registers


def test_a_map_is_known_once_registered_and_kept_from_being_overwritten():
    described = ModelMap(("TowerOfATest",), "layers", {})
    with registered():
        register_map(described)
        assert find_map(["TowerOfATest"]) is not None
        with pytest.raises(ValueError, match="Another map already describes TowerOfATest"):
            register_map(ModelMap(("TowerOfATest",), "blocks", {}))
        register_map(ModelMap(("TowerOfATest",), "blocks", {}), replace=True)
        assert find_map(["TowerOfATest"]).blocks == "blocks"
    with pytest.raises(UnmappedModelError):
        find_map(["TowerOfATest"])


def test_what_reads_no_tower_says_so():
    described = maps.map_of(tower_model("mllama"))
    assert described.reason("cross_attention_output", 0) == "it attends to no tower there"
    assert described.stack_of("cross_query_output") is None
    assert described.stack_of("cross_key_output") == "cross"
    assert described.blocks_of("cross_key_output") == described.blocks
