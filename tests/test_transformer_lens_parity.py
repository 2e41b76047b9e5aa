"""What we read and patch under our names is what TransformerLens reads and patches under its own.

TransformerLens gets the same weights in a bridge around a copy of the model, without folding or centring, so
that its activations are those of the model itself.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import intervenable as iv
from tiny_models import LAYERS, tiny, tiny_inputs

# What TransformerLens and its dependencies warn of is theirs (2026-11).
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-4
FAMILIES = ("gpt2", "llama")

PER_LAYER = {
    "block_input": "hook_resid_pre",
    "block_mid": "hook_resid_mid",
    "block_output": "hook_resid_post",
    "attention_input": "attn.hook_in",
    "attention_output": "hook_attn_out",
    "attention_contribution": "hook_attn_out",
    "attention_value_output": "attn.hook_z",
    "query_output": "attn.hook_q",
    "key_output": "attn.hook_k",
    "value_output": "attn.hook_v",
    "head_attention_value_output": "attn.hook_z",
    "head_query_output": "attn.hook_q",
    "head_key_output": "attn.hook_k",
    "head_value_output": "attn.hook_v",
    "head_attention_output": "attn.hook_result",
    "mlp_input": "mlp.hook_in",
    "mlp_pre_activation": "mlp.hook_pre",
    "mlp_hidden": "mlp.hook_post",
    "mlp_output": "hook_mlp_out",
    "mlp_contribution": "hook_mlp_out",
}
OF_THE_MODEL = {
    "embedding_output": "hook_embed",
    "final_norm_input": "ln_final.hook_in",
    "final_norm_output": "ln_final.hook_out",
    "final_norm_scale": "ln_final.hook_scale",
    "logits": "unembed.hook_out",
}


@pytest.fixture(scope="module")
def bridges() -> dict[str, Any]:
    """A bridge for each family. `make peers` sets PEERS, so that there TransformerLens has to be there."""
    try:
        from transformer_lens.model_bridge.sources import build_bridge_from_module
    except ImportError as error:
        if os.environ.get("PEERS") == "required":
            raise
        pytest.skip(f"transformer_lens cannot be imported ({error}); `make peers` installs it")
    made = {}
    for family in FAMILIES:
        model = copy.deepcopy(tiny(family))  # it replaces modules of the model it is given
        made[family] = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
        made[family].set_use_attn_result(True)
    return made


def read(model: nn.Module, component: str, layer: int | None, inputs: Any) -> Tensor:
    """Our reading of a whole component, with positions before heads as in TransformerLens."""
    by_heads = component.startswith("head_")
    unit = "h" if by_heads else "pos"
    entry = iv.RepresentationConfig(layer, component, unit, intervention_type=iv.CollectIntervention)
    with torch.no_grad():
        (values,) = iv.IntervenableModel([entry], model)(inputs).collected.values()
    return values.transpose(1, 2) if by_heads else values


@pytest.mark.parametrize("family", FAMILIES)
def test_the_bridge_computes_what_the_model_computes(bridges, family):
    model = tiny(family)
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        assert_close(bridges[family](ids), model(ids).logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", PER_LAYER)
def test_readings_of_a_block_are_equal(bridges, component, family, layer):
    model = tiny(family)
    inputs = {"input_ids": tiny_inputs(model)["input_ids"]}
    ours = read(model, component, layer, inputs)
    with torch.no_grad():
        _, cache = bridges[family].run_with_cache(inputs["input_ids"])
    theirs = cache[f"blocks.{layer}.{PER_LAYER[component]}"]
    if ours.dim() < theirs.dim():
        theirs = theirs.flatten(2)
    assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert ours.std() > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", OF_THE_MODEL)
def test_readings_outside_the_blocks_are_equal(bridges, component, family):
    model = tiny(family)
    inputs = {"input_ids": tiny_inputs(model)["input_ids"]}
    with torch.no_grad():
        _, cache = bridges[family].run_with_cache(inputs["input_ids"])
    assert_close(read(model, component, None, inputs), cache[OF_THE_MODEL[component]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "component",
    [
        "block_input",
        "block_output",
        "attention_output",
        "mlp_hidden",
        "mlp_output",
        "value_output",
    ],
)
def test_a_patched_position_gives_equal_logits(bridges, component, family):
    model, layer, position = tiny(family), 1, 4
    base, source = (tiny_inputs(model, seed=seed)["input_ids"] for seed in (0, 1))
    name = f"blocks.{layer}.{PER_LAYER[component]}"
    _, cache = bridges[family].run_with_cache(source)

    def patch(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, position] = cache[name][:, position]
        return value

    with torch.no_grad():
        theirs = bridges[family].run_with_hooks(base, fwd_hooks=[(name, patch)])
        swap = iv.IntervenableModel([iv.RepresentationConfig(layer, component)], model)
        output = swap(base, [source], {"sources->base": position}, output_original_output=True)
    assert_close(output.intervened.logits, theirs, rtol=0, atol=TOLERANCE)
    assert (output.intervened.logits - output.original.logits).abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stream_after_attention_is_patched_here_and_only_its_norm_in_the_bridge(bridges, family):
    model, layer = tiny(family), 1
    base, source = (tiny_inputs(model, seed=seed)["input_ids"] for seed in (0, 1))
    name = f"blocks.{layer}.{PER_LAYER['block_mid']}"
    _, cache = bridges[family].run_with_cache(source)
    with torch.no_grad():
        expected = model(source).logits  # everything above comes from the source
        theirs = bridges[family].run_with_hooks(base, fwd_hooks=[(name, lambda value, hook: cache[name])])
        swap = iv.IntervenableModel([iv.RepresentationConfig(layer, "block_mid")], model)
        ours = swap(base, [source]).intervened.logits
    assert_close(ours, expected, rtol=0, atol=TOLERANCE)
    assert (theirs - expected).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "component", ["head_attention_value_output", "head_value_output", "head_query_output"]
)
def test_a_patched_head_gives_equal_logits(bridges, component, family):
    model, layer, head = tiny(family), 1, 1
    base, source = (tiny_inputs(model, seed=seed)["input_ids"] for seed in (0, 1))
    name = f"blocks.{layer}.{PER_LAYER[component]}"
    _, cache = bridges[family].run_with_cache(source)

    def patch(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, :, head] = cache[name][:, :, head]
        return value

    with torch.no_grad():
        theirs = bridges[family].run_with_hooks(base, fwd_hooks=[(name, patch)])
        swap = iv.IntervenableModel([iv.RepresentationConfig(layer, component, "h")], model)
        output = swap(base, [source], {"sources->base": head}, output_original_output=True)
    assert_close(output.intervened.logits, theirs, rtol=0, atol=TOLERANCE)
    assert (output.intervened.logits - output.original.logits).abs().max() > 10 * TOLERANCE


INSIDE_ATTENTION = {
    "attention_pattern": "attn.hook_pattern",
    "attention_scores_masked": "attn.hook_attn_scores",
}


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", INSIDE_ATTENTION)
def test_attention_matrices_are_equal(bridges, component, family, layer):
    model = tiny(family)
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        _, cache = bridges[family].run_with_cache(ids)
    ours = iv.collect(model, {"input_ids": ids}, component, layers=layer)[component, layer]
    theirs = cache[f"blocks.{layer}.{INSIDE_ATTENTION[component]}"]
    seen = torch.ones(
        ids.shape[1], ids.shape[1], dtype=torch.bool
    ).tril()  # what is masked is written differently
    assert_close(ours[..., seen], theirs[..., seen], rtol=0, atol=TOLERANCE)
    assert theirs[..., seen].std() > 100 * TOLERANCE


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize(
    ("component", "name"), [("rotary_query", "hook_rot_q"), ("rotary_key", "hook_rot_k")]
)
def test_rotated_queries_and_keys_are_equal(bridges, component, name, layer):
    model = tiny("llama")
    ids = tiny_inputs(model)["input_ids"]
    with torch.no_grad():
        _, cache = bridges["llama"].run_with_cache(ids)
    theirs = cache[f"blocks.{layer}.attn.{name}"]
    ours = iv.collect(model, {"input_ids": ids}, component, layers=layer)[component, layer]
    if theirs.shape != ours.shape:  # positions before heads
        theirs = theirs.transpose(1, 2)
    assert_close(ours, theirs, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("component", INSIDE_ATTENTION)
def test_a_key_taken_away_from_a_head_gives_equal_logits(bridges, component, family):
    model, layer, head, key = tiny(family), 1, 2, 3
    ids = tiny_inputs(model)["input_ids"]
    scores = component == "attention_scores_masked"
    intervention = iv.KnockoutIntervention() if scores else iv.ZeroIntervention()

    def take_away(value: Tensor, hook: Any) -> Tensor:
        value = value.clone()
        value[:, head, :, key] = -torch.inf if scores else 0.0
        return value

    with torch.no_grad():
        name = f"blocks.{layer}.{INSIDE_ATTENTION[component]}"
        theirs = bridges[family].run_with_hooks(ids, fwd_hooks=[(name, take_away)])
        entry = iv.RepresentationConfig(
            layer, component, "h.query.key", intervention=intervention, where={"heads": head, "keys": key}
        )
        ours = iv.IntervenableModel(entry, model)(ids, output_original_output=True)
    assert_close(ours.intervened.logits, theirs, rtol=0, atol=TOLERANCE)
    assert (ours.intervened.logits - ours.original.logits).abs().max() > 10 * TOLERANCE
