"""The map of a twin made into that of its model, held to rows that people wrote."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from written_maps import find_map

from intervenable.map_cache import VARIABLE
from intervenable.map_fitting import fitted
from intervenable.map_making import make_map
from intervenable.map_twin import twin_of
from model_maps import AttentionHeads, HeadColumns, LayerKind, ModelMap, Site
from model_maps.sizes import columns_of, sizes_of

LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads": (
        "LlamaForCausalLM",
        {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 6},
    ),
    "one fused projection": ("GPT2LMHeadModel", {"n_embd": 1600, "n_head": 25, "n_layer": 5}),
    "fused by heads": (
        "GPTNeoXForCausalLM",
        {"hidden_size": 5120, "num_attention_heads": 40, "num_hidden_layers": 5},
    ),
    "fused by groups": (
        "FalconForCausalLM",
        {
            "hidden_size": 1024,
            "num_attention_heads": 16,
            "num_kv_heads": 2,
            "num_hidden_layers": 5,
            "new_decoder_architecture": True,
        },
    ),
    "stated width of heads": (
        "Gemma2ForCausalLM",
        {"hidden_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256},
    ),
}


def on_meta(class_name: str, **fields: Any) -> Any:
    cls: Any = getattr(transformers, class_name)
    with torch.device("meta"):
        return cls(cls.config_class(**fields))


def written_out(model: nn.Module) -> ModelMap:
    """The row that was written for a model's class, with the columns of this model in numbers."""
    row = find_map([type(model).__name__], model.config)
    sizes = sizes_of(model.config)
    sites = {}
    for name, site in row.sites.items():
        columns = columns_of(site, sizes)
        plain = dataclasses.replace(site, heads=None, part=None, layout="concatenated", columns=columns)
        sites[name] = site if columns is None else plain
    return dataclasses.replace(row, sites=sites)


@pytest.mark.parametrize("kind", LARGE)
def test_columns_are_those_of_the_large_model(kind: str) -> None:
    class_name, fields = LARGE[kind]
    model = on_meta(class_name, **fields)
    twin = twin_of(model)

    assert written_out(twin) != written_out(model)
    assert fitted(written_out(twin), twin, model) == written_out(model)


def test_a_map_is_made_on_the_cpu_wherever_new_tensors_are_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    model = on_meta("OlmoForCausalLM")
    with torch.device("meta"):
        there = make_map(model)

    assert there == make_map(model)


def two_kinds(model: nn.Module, mixers: tuple[int, ...], heads: int, width: int) -> ModelMap:
    """A map of Jamba with two components, each in some layers alone."""
    count = len(model.model.layers)  # type: ignore[arg-type,union-attr]
    attention = tuple(layer for layer in range(count) if layer not in mixers)
    query = Site("self_attn.q_proj", columns=HeadColumns(heads, width))
    around = Site("self_attn", "input", attention=AttentionHeads(heads, heads, width))
    return ModelMap(
        ("JambaForCausalLM",),
        "model.layers",
        {"block_output": Site("")},
        kinds=(
            LayerKind(mixers, sites={"mixer_output": Site("mamba")}, absent={"query_output": "it mixes"}),
            LayerKind(
                attention,
                sites={"query_output": query, "attention_input": around},
                absent={"mixer_output": "it attends"},
            ),
        ),
    )


def test_each_layer_gets_the_sites_of_its_kind() -> None:
    model = on_meta("JambaForCausalLM")
    twin = twin_of(model)
    heads = model.config.num_attention_heads
    width = twin.config.hidden_size // heads  # type: ignore[union-attr]

    live = fitted(two_kinds(twin, (0, 1, 2, 3), heads, width), twin, model)

    attending = [layer for layer, block in enumerate(model.model.layers) if hasattr(block, "self_attn")]
    assert [layer for layer in range(32) if live.site("query_output", layer)] == attending
    assert [layer for layer in range(32) if live.site("mixer_output", layer)] == [
        layer for layer in range(32) if layer not in attending
    ]
    assert live.reason("query_output", 30) == "it mixes"


def test_what_is_inside_is_in_the_few_layers_that_have_it() -> None:
    model = on_meta("JambaForCausalLM")
    twin = twin_of(model)
    record = two_kinds(twin, (0, 1, 2, 3), 32, 8)
    mixers, attention = record.kinds
    record = dataclasses.replace(
        record,
        kinds=(
            dataclasses.replace(mixers, absent={**mixers.absent, "attention_pattern": "it mixes"}),
            attention,
        ),
    )

    live = fitted(record, twin, model)

    pattern = live.site("attention_pattern", 12)
    assert pattern is not None
    assert pattern.attention == AttentionHeads(32, 32, 128)
    assert live.site("attention_pattern", 11) is None


def test_columns_that_no_whole_factor_makes_fit_are_refused_with_the_reason() -> None:
    def model_of(width: int) -> nn.Module:
        made = nn.Module()
        made.layers = nn.ModuleList([nn.Sequential(nn.Linear(width, width))])
        return made

    record = ModelMap(
        ("Tiny",),
        "layers",
        {"query_output": Site("0", columns=HeadColumns(2, 3, start=1)), "block_output": Site("")},
    )

    live = fitted(record, model_of(8), model_of(12))

    assert "query_output" not in live.sites
    assert (
        live.reason("query_output") == "the twin's columns do not fit: '0' is 12 wide, 1.5 times the twin's"
    )
    assert live.site("block_output") == Site("")


def test_a_layer_with_other_heads_than_any_of_the_twin_is_refused() -> None:
    def model_of(*widths: int) -> nn.Module:
        made = nn.Module()
        made.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, width)) for width in widths])
        return made

    record = ModelMap(("Tiny",), "layers", {"query_output": Site("0", columns=HeadColumns(2, 2))})

    live = fitted(record, model_of(4, 4, 4), model_of(8, 8, 8, 16))

    assert live.site("query_output", 2) == Site("0", columns=HeadColumns(2, 4))
    assert live.site("query_output", 3) is None
    assert "no layer of its tiny twin has heads of that kind" in live.reason("query_output", 3)


def test_adapted_and_packed_projections_are_as_wide_as_what_they_stand_for() -> None:
    class Packed(nn.Module):
        in_features, out_features = 8, 16

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(8, 16)

    def model_of(block: nn.Module) -> nn.Module:
        made = nn.Module()
        made.layers = nn.ModuleList([nn.Sequential(block)])
        return made

    record = ModelMap(("Tiny",), "layers", {"query_output": Site("0", columns=HeadColumns(2, 4))})

    for block in (Packed(), Adapted()):
        live = fitted(record, model_of(nn.Linear(4, 8)), model_of(block))
        assert live.sites["query_output"] == Site("0", columns=HeadColumns(2, 8))
