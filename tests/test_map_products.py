"""Products with a parameter that no module computes, as places of queries, keys, values and what heads have read."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_registry import build, spread_weights
from torch import nn
from torch.testing import assert_close

import intervenable as iv
from intervenable.function_mode import FunctionHook
from intervenable.hooks import Hook, hooked
from intervenable.map_inference import infer_map
from intervenable.map_verification import check_map

VIEWS = (
    "head_query_output",
    "head_key_output",
    "head_value_output",
    "head_attention_value_output",
)


def collected(model, inputs, component, layer=1):
    """A whole component, read through the library."""
    reading = iv.RepresentationConfig(layer, component, "h", intervention=iv.CollectIntervention(), name="it")
    with torch.no_grad():
        run = iv.IntervenableModel(iv.IntervenableConfig([reading]), model)(inputs)
    return run.collected["it"]


def by_heads(tensor, heads):
    return tensor.unflatten(-1, (heads, -1)).transpose(1, 2)


def encoder(batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    spread_weights(model)
    tokens = torch.randn(2, 7, 16)
    return model, {"src": tokens if batch_first else tokens.transpose(0, 1)}


def of_type(model_type, task):
    made = build(model_type, task)
    return made.model, made.inputs


@pytest.mark.parametrize(
    "make",
    [
        lambda: of_type("xlnet", "causal-lm"),
        lambda: of_type("wavlm", "audio-classification"),
        lambda: encoder(True),
        lambda: encoder(False),
    ],
    ids=["xlnet", "wavlm", "examples first", "positions first"],
)
def test_heads_that_no_linear_module_makes_keep_every_law(make):
    model, inputs = make()

    found = check_map(model, infer_map(model, inputs), inputs)

    assert set(VIEWS) <= set(found.components), dict(found.refused)
    assert found.absent["head_attention_output"] == (
        "no module has the matrix that the heads are projected with"
    )


def test_the_places_of_xlnet_are_its_parameters():
    model, inputs = of_type("xlnet", "causal-lm")
    sites = infer_map(model, inputs).sites

    named = {"query_output": "q", "key_output": "k", "value_output": "v", "attention_value_output": "o"}
    assert {word: sites[word].weight for word in named} == named
    assert {(sites[word].path, sites[word].function, sites[word].axes) for word in named} == {
        ("rel_attn", "einsum", (1, 0))
    }
    assert sites["attention_value_output"].side == "input"


def test_what_is_read_at_a_parameter_is_the_product_by_hand():
    model, inputs = of_type("xlnet", "causal-lm")
    iv.model_map(model, example_inputs=inputs)
    attention, seen = model.transformer.layer[1].rel_attn, {}
    attention.register_forward_pre_hook(lambda _, given: seen.update(given=given[0]))

    query = collected(model, inputs, "head_query_output")
    read = collected(model, inputs, "head_attention_value_output")
    value = collected(model, inputs, "head_value_output")
    pattern = collected(model, inputs, "attention_pattern")

    with torch.no_grad():
        assert_close(query, torch.einsum("ibh,hnd->bnid", seen["given"], attention.q))
    assert_close(read, pattern @ value)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("head", [0, 3])
def test_a_head_of_torch_s_own_attention_is_switched_off_as_by_hand(batch_first, head):
    model, inputs = encoder(batch_first)
    iv.model_map(model, example_inputs=inputs)
    attention, seen = model.layers[1].self_attn, []
    attention.register_forward_hook(lambda _, __, made: seen.append(made[0]))
    edit = iv.RepresentationConfig(
        1, "head_attention_value_output", "h", intervention=iv.ZeroIntervention(), where={"heads": head}
    )

    with torch.no_grad():
        iv.IntervenableModel(iv.IntervenableConfig([edit]), model)(inputs)
        read = collected(model, inputs, "head_attention_value_output")
        share = read[:, head] @ attention.out_proj.weight[:, 4 * head : 4 * head + 4].T

    without, whole = (made if batch_first else made.transpose(0, 1) for made in seen)
    assert_close(without, whole - share, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("batch_first", [True, False])
def test_keys_of_another_stack_are_made_by_rows_of_a_parameter(batch_first):
    torch.manual_seed(0)
    model = nn.Transformer(16, 4, 2, 2, 24, batch_first=batch_first).eval()
    model.encoder.use_nested_tensor = model.encoder.enable_nested_tensor = False
    spread_weights(model)
    inputs = {"src": torch.randn(2, 7, 16), "tgt": torch.randn(2, 5, 16)}
    if not batch_first:
        inputs = {name: given.transpose(0, 1) for name, given in inputs.items()}
    iv.model_map(model, example_inputs=inputs)
    attention, seen = model.decoder.layers[1].multihead_attn, {}
    attention.register_forward_pre_hook(lambda _, given: seen.update(memory=given[1]))

    keys = collected(model, inputs, "cross_head_key_output")

    memory = seen["memory"] if batch_first else seen["memory"].transpose(0, 1)
    with torch.no_grad():
        by_hand = memory @ attention.in_proj_weight[16:32].T + attention.in_proj_bias[16:32]
    assert_close(keys, by_heads(by_hand, 4))


def test_positions_that_come_first_are_no_examples_when_a_map_asks_what_reads_ahead():
    model, inputs = encoder(batch_first=False)

    assert not infer_map(model, inputs).causal


def test_the_values_of_wavlm_are_made_by_the_weights_of_a_module_that_is_never_called():
    model, inputs = of_type("wavlm", "audio-classification")
    iv.model_map(model, example_inputs=inputs)
    attention, seen = model.wavlm.encoder.layers[1].attention, {}
    attention.register_forward_pre_hook(
        lambda _, given, named: seen.update(given=(*given, *named.values())[0]), with_kwargs=True
    )

    values = collected(model, inputs, "head_value_output")

    with torch.no_grad():
        assert_close(values, by_heads(attention.v_proj(seen["given"]), 4))


def test_a_larger_model_has_the_places_of_its_twin_with_wider_heads():
    config = transformers.XLNetConfig(vocab_size=90, d_model=48, n_layer=5, n_head=6, d_inner=40)
    torch.manual_seed(0)
    model = transformers.XLNetLMHeadModel(config).eval()

    found = iv.model_map(model).map

    site = found.site("query_output", 4)
    assert (site.weight, site.columns.heads, site.columns.width) == ("q", 6, 8)
    inputs = {"input_ids": torch.randint(3, 90, (2, 5))}
    query = collected(model, inputs, "head_query_output", layer=4)
    assert query.shape == (2, 6, 5, 8)


class Thrice(nn.Module):
    """Multiplies with one parameter, then with another, then with the first again."""

    def __init__(self):
        super().__init__()
        self.one, self.other = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))

    def forward(self, given):
        first = nn.functional.linear(given, self.one)
        second = torch.einsum("bi,oi->bo", first, self.other)
        return nn.functional.linear(input=second, weight=self.one)


@pytest.mark.parametrize("nth", [0, 1])
@pytest.mark.parametrize("side", ["input", "output"])
def test_products_with_a_parameter_are_counted_apart_and_changed_on_the_side_that_is_named(nth, side):
    torch.manual_seed(0)
    module, given = Thrice(), torch.randn(3, 4)

    def negate(passage):
        passage.put("output", None, -passage.take("output", None))

    hook = Hook(module, side, negate, FunctionHook("linear", negate, nth, weight="one", side=side))
    with torch.no_grad(), hooked([hook], module):
        changed = module(given)
        assert_close(changed, -(given @ module.one.T @ module.other.T @ module.one.T))


def test_what_is_multiplied_by_einsum_may_be_in_a_list():
    torch.manual_seed(0)
    module, given, seen = nn.Bilinear(2, 3, 4), torch.randn(5, 3), []
    module.forward = lambda given: torch.einsum("bi,oji->boj", [given, module.weight])

    def double(passage):
        seen.append(passage.take("input", None))
        passage.put("input", None, seen[-1] * 2)

    module.weight = nn.Parameter(torch.randn(4, 2, 3))
    plain = module(given)
    hook = Hook(module, "input", double, FunctionHook("einsum", double, weight="weight", side="input"))
    with torch.no_grad(), hooked([hook], module):
        assert_close(module(given), plain * 2)
    assert torch.equal(seen[0], given)


def test_a_linear_module_that_reads_positions_too_gives_queries_at_its_first_call():
    config = transformers.DebertaV2Config(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=30,
        relative_attention=True,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        position_biased_input=False,
        norm_rel_ebd="layer_norm",
        position_buckets=8,
    )
    torch.manual_seed(0)
    model = transformers.DebertaV2ForMaskedLM(config).eval()
    attention, seen = model.deberta.encoder.layer[1].attention.self, {}
    attention.register_forward_pre_hook(lambda _, given: seen.update(given=given[0]))

    found = iv.model_map(model).map
    inputs = {"input_ids": torch.randint(3, 60, (2, 5))}
    keys = collected(model, inputs, "head_key_output")

    site = found.site("key_output", 1)
    assert (site.path, site.function, site.call) == ("attention.self.key_proj", None, 0)
    with torch.no_grad():
        assert_close(keys, by_heads(attention.key_proj(seen["given"]), 4))
