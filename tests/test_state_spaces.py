"""Models whose blocks have no attention: the stream between blocks is reached, the rest refused with the reason."""

from __future__ import annotations

import pytest
import torch
import transformers

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
        "block_output",
        "final_norm_input",
        "final_norm_output",
        "logits",
    )
    entries = [
        iv.RepresentationConfig(1 if part.startswith("block") else None, part, intervention=lambda base: base)
        for part in names
    ]
    output = iv.IntervenableModel(entries, model)(inputs)
    assert torch.equal(output.intervened.logits, model(**inputs).logits)


@pytest.mark.parametrize(
    "component", ["attention_pattern", "attention_scores", "rotary_key", "head_query_output"]
)
def test_what_attention_computes_is_refused_with_the_reason(component):
    entry = iv.RepresentationConfig(0, component, "h", intervention=iv.CollectIntervention())
    with pytest.raises(
        iv.UnsupportedModelError, match="mix positions by a state space and have neither attention"
    ):
        iv.IntervenableModel(entry, tiny("Mamba"))
    with pytest.raises(iv.UnsupportedModelError, match="mix positions by a state space"):
        iv.collect(tiny("Mamba"), tokens(1), component)
