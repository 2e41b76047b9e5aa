"""Layers that are called part by part have a map, too: what it says is what the model itself returns of them."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from tiny_registry import build
from torch import nn

import intervenable as iv
from intervenable.map_inference import infer_map
from intervenable.map_layers import blocks_at
from intervenable.map_verification import check_map
from model_maps import ModelMap, Site

LAYERS = 5
LISTS = "transformer.{attentions,layer_norm1,ffns,layer_norm2}"


@pytest.fixture(scope="module")
def xlm():
    torch.manual_seed(0)
    sizes = {"emb_dim": 40, "n_heads": 5, "n_layers": LAYERS, "vocab_size": 120, "n_langs": 1}
    return transformers.XLMWithLMHeadModel(transformers.XLMConfig(**sizes)).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(5, 100, (2, 2, 6), generator=torch.Generator().manual_seed(1))


def swapped(model, component, layer, base, source):
    config = iv.IntervenableConfig([iv.RepresentationConfig(layer, component)], iv.VanillaIntervention)
    return iv.IntervenableModel(config, model)({"input_ids": base}, [{"input_ids": source}])[1].logits


def test_layers_in_several_lists_have_the_streams_that_the_model_records(xlm, tokens):
    recorded = xlm(tokens[0], output_hidden_states=True, output_attentions=True)

    found = iv.collect(
        xlm, {"input_ids": tokens[0]}, ["block_input", "block_output", "attention_pattern"], device=None
    )

    assert iv.model_map(xlm).map.blocks == LISTS
    for layer in range(LAYERS):
        assert torch.equal(found["block_input", layer], recorded.hidden_states[layer])
        assert torch.equal(found["block_output", layer], recorded.hidden_states[layer + 1])
        torch.testing.assert_close(found["attention_pattern", layer], recorded.attentions[layer])


@pytest.mark.parametrize("component", ["block_mid", "block_output"])
def test_with_another_runs_stream_in_such_a_layer_the_model_returns_what_it_did_then(xlm, tokens, component):
    base, source = tokens
    expected = xlm(source).logits

    for layer in range(LAYERS):
        assert torch.equal(swapped(xlm, component, layer, base, source), expected)


def test_what_the_stream_goes_past_can_be_read_and_not_written(xlm, tokens):
    with pytest.raises(iv.ConfigError, match="write 'block_output' of the layer before"):
        swapped(xlm, "block_input", 2, *tokens)


def test_a_sweep_of_such_layers_is_what_one_run_a_cell_gives(xlm, tokens):
    clean, corrupted = tokens[0][:1], tokens[1][:1]

    found = iv.patching.sweep(
        xlm,
        {"input_ids": clean},
        {"input_ids": corrupted},
        "block_output",
        metric=lambda logits: logits[:, -1, 7],
    )

    for layer in range(LAYERS):
        for position in range(clean.shape[1]):
            config = iv.IntervenableConfig(
                [iv.RepresentationConfig(layer, "block_output")], iv.VanillaIntervention
            )
            run = iv.IntervenableModel(config, xlm)(
                {"input_ids": corrupted},
                [{"input_ids": clean}],
                unit_locations={"sources->base": position},
            )[1]
            torch.testing.assert_close(found.values[layer, position], run.logits[:, -1, 7])


@pytest.mark.parametrize(
    ("model_type", "task"), [("xlm", "causal-lm"), ("flaubert", "masked-lm"), ("squeezebert", "masked-lm")]
)
def test_types_of_such_layers_have_blocks_that_keep_every_law(model_type, task):
    tiny = build(model_type, task)

    found = check_map(tiny.model, infer_map(tiny.model, tiny.inputs), tiny.inputs)

    assert {"block_input", "block_output"} <= {*found.components}
    assert found.refused == {}


def test_lists_beside_each_other_are_no_layers_beside_a_list_that_hands_a_stream_on():
    tiny = build(
        "blt"
    )  # its last stack has a list of blocks and one of what each of them reads across before

    found = check_map(tiny.model, infer_map(tiny.model, tiny.inputs), tiny.inputs)

    assert found.map.blocks == "model.global_transformer.layers"
    assert {"block_mid", "mlp_hidden", "attention_pattern", "head_value_output"} <= {*found.components}


def test_where_positions_come_last_they_are_counted_on_the_last_axis():
    tiny = build("squeezebert", "masked-lm")
    words = ["block_input", "block_mid", "block_output"]
    found = iv.model_map(tiny.model).map
    parts: dict[str, torch.Tensor] = {}
    block = tiny.model.transformer.encoder.layers[1]
    handles = [
        block.attention.register_forward_pre_hook(lambda _, args: parts.update(entering=args[0])),
        block.post_attention.register_forward_hook(lambda *call: parts.update(middle=call[-1])),
        block.output.register_forward_hook(lambda *call: parts.update(leaving=call[-1])),
    ]
    recorded = tiny.model(**tiny.inputs, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()

    assert {found.site(word, 1).axes for word in words} == {(0, 2)}
    # The attention of its blocks is no mixer, though it multiplies matrices in modules of their own.
    assert found.site("mixer_output", 1) is None
    ours = iv.collect(tiny.model, dict(tiny.inputs), words, device=None)
    assert torch.equal(ours["block_input", 1], recorded[1])
    assert torch.equal(ours["block_mid", 1], parts["middle"].mT)
    assert torch.equal(ours["block_output", 1], parts["leaving"].mT)


def test_a_block_that_is_given_its_stream_several_times_is_not_written_where_it_enters():
    tiny = build("funnel", "masked-lm")

    found = infer_map(tiny.model, tiny.inputs)

    assert "the module is given it as several inputs" in found.site("block_input", 1).read_only
    assert found.site("block_output", 1).read_only == ""


class _Around(nn.Module):
    """A block that adds to the stream that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, stream):
        return stream + self.mlp(torch.tanh(self.norm(stream)))


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.layers = nn.ModuleList(_Around() for _ in range(3))

    def forward(self, input_ids):
        stream = self.table(input_ids)
        for layer in self.layers:
            stream = layer(stream)
        return self.head(stream)


def test_what_is_given_to_a_part_alone_is_not_the_stream_that_enters():
    torch.manual_seed(0)
    sites = {"block_input": Site("norm", "input"), "block_output": Site(""), "logits": Site("head")}

    found = check_map(
        _Model(), ModelMap(("_Model",), "layers", sites), {"input_ids": torch.arange(14).view(2, 7)}
    )

    assert (
        "block_output as with the same value at block_output of the layer before"
        in found.refused["block_input"]
    )
    assert found.map.site("block_input", 0) is None


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ("layer", "transformer has no part 'layer'. Did you mean 'layers'?"),
        ("{layers,norm}", "transformer has no part 'norm'. Did you mean 'norms'?"),
        ("{layers,norms}", "not equally long: 2 in 'layers', 3 in 'norms'"),
    ],
)
def test_a_list_of_blocks_that_is_not_there_is_named_with_what_is(blocks, why):
    lists = {"layers": [nn.Linear(2, 2) for _ in range(2)], "norms": [nn.LayerNorm(2) for _ in range(3)]}
    model = nn.ModuleDict(
        {"transformer": nn.ModuleDict({name: nn.ModuleList(parts) for name, parts in lists.items()})}
    )

    with pytest.raises(iv.UnsupportedModelError, match=re.escape(why)):
        blocks_at(model, f"transformer.{blocks}")
