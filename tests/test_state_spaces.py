"""Models whose blocks have no attention: stream and mixers are reached, the rest refused with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.testing import assert_close

import intervenable as iv

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "vocab_size": 50, "state_size": 4}
NAMES = {
    "Mamba": SIZES | {"intermediate_size": 32},
    "Mamba2": SIZES | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "expand": 2},
    "FalconMamba": SIZES | {"intermediate_size": 32},
}


def tiny(name):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**NAMES[name])
        return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def tokens(seed):
    return {"input_ids": torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(seed))}


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_the_stream_of_a_state_space_model_is_swapped_as_a_hook_would(name):
    model, base, source = tiny(name), tokens(1), tokens(2)
    kept = []
    handle = model.backbone.layers[1].register_forward_hook(lambda *call: kept.append(call[-1].clone()))
    model(**source)
    handle.remove()

    def swap(module, args, output):
        output = output.clone()
        output[:, 2] = kept[0][:, 2]
        return output

    handle = model.backbone.layers[1].register_forward_hook(swap)
    expected = model(**base).logits
    handle.remove()

    swapped = iv.IntervenableModel(iv.RepresentationConfig(1), model)(base, [source], {"sources->base": 2})
    assert torch.equal(swapped.intervened.logits, expected)
    assert not torch.equal(expected, model(**base).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_each_component_of_a_state_space_model_passes_an_identity(name):
    model, inputs = tiny(name), tokens(1)
    names = (
        "embedding_output",
        "block_input",
        "mixer_input",
        "mixer_output",
        "mixer_contribution",
        "block_output",
        "final_norm_input",
        "final_norm_output",
        "logits",
    )
    entries = [
        iv.RepresentationConfig(
            1 if part.startswith(("block", "mixer")) else None, part, intervention=lambda base: base
        )
        for part in names
    ]
    output = iv.IntervenableModel(entries, model)(inputs)
    assert torch.equal(output.intervened.logits, model(**inputs).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_mixer_adds_its_output_to_the_stream_and_keeps_the_state_of_the_cache(name):
    model, inputs = tiny(name), tokens(1)
    names = [
        "block_input",
        "mixer_input",
        "mixer_output",
        "mixer_contribution",
        "mixer_state",
        "block_output",
    ]
    cache = iv.collect(model, inputs, names)
    held = model(**inputs, use_cache=True).cache_params
    for layer, block in enumerate(model.backbone.layers):
        entering = cache["block_input", layer]
        assert_close(cache["mixer_input", layer], block.norm(entering))
        assert_close(entering + cache["mixer_contribution", layer], cache["block_output", layer])
        assert torch.equal(cache["mixer_output", layer], cache["mixer_contribution", layer])
        assert torch.equal(cache["mixer_state", layer], held.layers[layer].recurrent_states[0])


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_mixer_is_swapped_as_a_hook_would(name, side):
    model, base, source = tiny(name), tokens(1), tokens(2)
    mixer = model.backbone.layers[1].mixer
    given = iv.collect(model, source, f"mixer_{side}", layers=1)[f"mixer_{side}", 1]

    def before(module, args):
        value = args[0].clone()
        value[:, 2] = given[:, 2]
        return (value, *args[1:])

    def after(module, args, output):
        value = output.clone()
        value[:, 2] = given[:, 2]
        return value

    handle = (
        mixer.register_forward_pre_hook(before) if side == "input" else mixer.register_forward_hook(after)
    )
    expected = model(**base).logits
    handle.remove()
    swap = iv.IntervenableModel(iv.RepresentationConfig(1, f"mixer_{side}"), model)
    swapped = swap(base, [source], {"sources->base": 2})
    assert torch.equal(swapped.intervened.logits, expected)
    assert not torch.equal(expected, model(**base).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_rows_filled_up_on_the_right_have_the_same_mixers_as_alone(name):
    model, long, short = tiny(name), tokens(1), {"input_ids": tokens(2)["input_ids"][:1, :4]}
    ids = torch.cat([long["input_ids"][:1], torch.nn.functional.pad(short["input_ids"], (0, 2))])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    both = iv.collect(model, {"input_ids": ids, "attention_mask": mask}, ["mixer_input", "mixer_output"])
    alone = iv.collect(model, short, ["mixer_input", "mixer_output"])
    for key, value in alone.items():
        assert_close(both[key][1:, :4], value, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_sweep_over_mixers_is_one_swap_a_cell():
    model, clean, corrupted = tiny("Mamba"), tokens(1), tokens(2)
    found = iv.patching.sweep(
        model, clean, corrupted, "mixer_output", ("layer", "pos"), lambda logits: logits[:, -1, 5]
    )
    assert found.values.shape[:2] == (3, 6)
    swap = iv.IntervenableModel(iv.RepresentationConfig(2, "mixer_output"), model)
    one = swap(corrupted, [clean], {"sources->base": 3}).intervened.logits[:, -1, 5]
    assert_close(found.values[2, 3], one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "component", ["attention_pattern", "attention_scores", "rotary_key", "head_query_output"]
)
def test_what_attention_computes_is_refused_with_the_reason(component):
    entry = iv.RepresentationConfig(0, component, "h", intervention=iv.CollectIntervention())
    with pytest.raises(iv.UnsupportedModelError, match="computes no attention: no softmax"):
        iv.IntervenableModel(entry, tiny("Mamba"))
    with pytest.raises(iv.UnsupportedModelError, match="computes no attention: no softmax"):
        iv.collect(tiny("Mamba"), tokens(1), component)
