"""The map of a model as people read it, and the command that prints it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from written_maps import WRITTEN_MAPS

import intervenable as iv
from intervenable.__main__ import main
from intervenable.map_view import model_map
from intervenable.maps import map_of
from model_maps import lookup


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INTERVENABLE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def a_registered_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The map that was written for GPT-2 is registered."""
    name = "GPT2LMHeadModel"
    monkeypatch.setattr(lookup, "_MAPS", {**lookup._MAPS, name: WRITTEN_MAPS[name]})


def gpt2(layers: int = 3) -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=16, n_head=2, n_layer=layers, vocab_size=99, n_positions=32)
    return transformers.GPT2LMHeadModel(config).train(False)


class Wired(nn.Module):
    """A stack that no row describes, with two outputs of which the first is the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(
            [nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(3)]
        )
        self.head = nn.Linear(8, 20)

    def forward(self, input_ids: torch.Tensor) -> Any:
        stream = self.embed(input_ids)
        for layer in self.layers:
            stream = layer(stream)
        return self.head(stream)


@pytest.mark.usefixtures("a_registered_row")
def test_components_are_those_of_the_map_with_their_places_in_words() -> None:
    view = model_map(gpt2())

    assert tuple(view.components) == view.map.components()
    assert view.components["logits"] == "lm_head output"
    assert view.components["attention_pattern"] == "transformer.h.{layer}.attn, inside"
    assert view.components["key_output"] == (
        "transformer.h.{layer}.attn.c_attn output, 2 heads of 8 columns from 16 on"
    )
    assert view.components["block_mid"] == "transformer.h.{layer}.attn output, plus block_input"
    assert view.layers == {"transformer.h": 3}
    assert view.notes == ("the map is registered for its class",)


def test_what_is_refused_has_its_reason_and_only_words_of_its_stacks() -> None:
    view = model_map(gpt2())

    assert view.refused["rotary_query"] == "it has no rotary embedding"
    assert not [name for name in view.refused if name.startswith(("encoder_", "cross_", "vision_"))]
    assert not {*view.refused} & {*view.components}


def test_the_tree_has_every_module_beside_its_components_and_layers_of_a_kind_once() -> None:
    text = str(model_map(gpt2(layers=12)))

    lines = [re.sub(" +", " ", line.strip()) for line in text.splitlines()]
    assert (
        lines[0]
        == f"GPT2LMHeadModel: {len(map_of(gpt2()).components())} components; 12 layers at 'transformer.h'"
    )
    assert "0-11: GPT2Block in block_input | out block_output" in lines
    assert "c_attn: Conv1D out query_output, key_output, value_output" in lines
    assert "ln_1: LayerNorm" in lines
    assert "lm_head: Linear out logits" in lines
    assert text.count("GPT2Block") == 1


def test_layers_of_two_kinds_are_two_branches_of_the_tree() -> None:
    config = transformers.T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=3, num_heads=2, vocab_size=40)
    view = model_map(transformers.T5ForConditionalGeneration(config))

    text = str(view)

    # The first layer of each stack alone has the table of distances.
    assert text.count("1-2: T5Block") == 2
    assert text.count("relative_attention_bias: Embedding") == 2
    assert view.components["cross_value_output"].startswith(
        "decoder.block.{layer}.layer.1.EncDecAttention.v output"
    )


def test_a_model_without_a_row_or_a_config_is_looked_into() -> None:
    torch.manual_seed(0)
    model = Wired().eval()

    view = model_map(model, example_inputs={"input_ids": torch.randint(20, (2, 7))})

    assert view.layers == {"layers": 3}
    assert view.components["block_output"] == "layers.{layer} output"
    assert view.notes == ("found out by runs of the model on the inputs given",)
    assert map_of(model) is view.map


def test_a_map_is_found_out_once_and_then_kept() -> None:
    config = transformers.JambaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
        num_experts=4,
    )
    with torch.device("meta"):
        first, second = transformers.JambaForCausalLM(config), transformers.JambaForCausalLM(config)

    found, kept = model_map(first), model_map(second)

    assert found.notes == ("the map was found out on a tiny model like it",)
    assert kept.notes == ("kept from an earlier time",)
    assert kept.map == found.map
    assert found.components["query_output"].endswith("4 heads of 8 columns from 0 on (layers 4)")
    assert found.components["mixer_output"].endswith("(layers 0-3)")


def test_the_command_prints_tree_and_table_and_says_that_all_is_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2().save_pretrained(tmp_path)

    code = main(["verify", str(tmp_path), "--components", "block_output", "query_output"])

    printed = capsys.readouterr().out
    assert code == 0
    assert "0-2: GPT2Block" in printed
    assert "GPT2LMHeadModel: 2 components keep every law" in printed


def test_the_command_needs_but_the_config_for_a_twin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.GPT2Config(n_embd=1600, n_head=25, n_layer=48, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(tmp_path)

    code = main(["verify", str(tmp_path), "--twin", "--components", "block_output"])

    printed = capsys.readouterr().out
    assert code == 0
    assert "0-47: GPT2Block" in printed
    assert "1 component keeps every law" in printed


def test_the_command_fails_where_a_component_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpt2().save_pretrained(tmp_path)

    code = main(["verify", str(tmp_path), "--no-tree", "--components", "block_output", "rotary_query"])

    printed = capsys.readouterr().out
    assert code == 1
    assert "GPT2Block" not in printed
    assert "rotary_query is not there: it has no rotary embedding." in printed


@pytest.mark.usefixtures("a_registered_row")
def test_the_command_fails_where_a_law_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gpt2()
    wrong = iv.ModelMap(
        ("GPT2LMHeadModel",), "transformer.h", {**map_of(model).sites, "mlp_hidden": iv.Site("mlp.act")}
    )
    right = lookup._MAPS["GPT2LMHeadModel"]
    model.save_pretrained(tmp_path)
    iv.register_map(wrong, replace=True)
    try:
        code = main(["verify", str(tmp_path), "--no-tree", "--components", "mlp_hidden"])
    finally:
        iv.register_map(right, replace=True)

    assert code == 1
    assert "refused mlp_hidden: what the map places there breaks the law" in capsys.readouterr().out


@pytest.mark.parametrize("ask", [iv.model_map, iv.verify], ids=["model_map", "verify"])
@pytest.mark.parametrize("given", ["gpt2", 3, None], ids=repr)
def test_only_a_model_can_be_asked_about(ask: Any, given: Any) -> None:
    with pytest.raises(iv.ConfigError, match=f"^model is a {type(given).__name__}, not a torch module"):
        ask(given)


@pytest.mark.parametrize("ask", [iv.model_map, iv.verify], ids=["model_map", "verify"])
@pytest.mark.parametrize("given", [torch.ones(2, 5), [1, 2], {}, {0: torch.ones(2, 5)}], ids=str)
def test_example_inputs_are_a_mapping_by_name(ask: Any, given: Any) -> None:
    with pytest.raises(iv.ConfigError, match=r"^example_inputs is .*mapping of the model's keyword inputs"):
        ask(gpt2(), example_inputs=given)


def test_only_a_map_can_be_verified() -> None:
    model = gpt2()
    with pytest.raises(
        iv.ConfigError, match=r"model_map is a ModelView, not an iv\.ModelMap\. That of a model is"
    ):
        iv.verify(model, model_map=iv.model_map(model))  # type: ignore[arg-type]


def test_a_misspelt_component_gets_the_nearest_name_and_those_of_the_model() -> None:
    model = gpt2()
    listed = f"GPT2LMHeadModel has: {', '.join(sorted(map_of(model).components()))}."
    prompt = {"input_ids": torch.tensor([[1, 2, 3]])}
    calls = [
        lambda: iv.verify(model, components=["mlp_ouput"]),
        lambda: iv.patching.sweep(model, prompt, prompt, "mlp_ouput", metric=lambda logits: logits.sum()),
    ]
    for call in calls:
        with pytest.raises(iv.UnknownNameError) as caught:
            call()
        assert str(caught.value) == f"Unknown component 'mlp_ouput'. Did you mean 'mlp_output'?\n{listed}"
    with pytest.raises(
        iv.UnknownNameError, match=r"^Unknown component 'mlp_ouput'.*\nGPT2LMHeadModel has: .*input_ids"
    ):
        iv.collect(model, prompt, "mlp_ouput")


def test_the_command_tells_what_cannot_be_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["verify", str(tmp_path)])

    assert code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is no model whose config can be read.")
