"""How many layers a tiny twin has: with many heads or several stacks each kind is shown once, as layers are dear."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from intervenable.map_fitting import fitted
from intervenable.map_layers import MANY_HEADS, block_signature, layer_kinds, layers_shown
from intervenable.map_making import make_map
from intervenable.map_twin import twin_of


@pytest.mark.parametrize(("heads", "layers"), [(MANY_HEADS, (0, 1, 2)), (MANY_HEADS + 1, (0, 1))])
def test_with_many_heads_two_layers_of_one_kind_will_do(heads: int, layers: tuple[int, ...]) -> None:
    config = LlamaConfig(
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        num_hidden_layers=9,
        vocab_size=40,
        intermediate_size=16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)

    assert layers_shown(model)(9) == layers


def test_with_many_heads_every_kind_is_shown_all_the_same() -> None:
    with torch.device("meta"):
        model = DeepseekV3ForCausalLM(DeepseekV3Config())  # 128 heads, three dense layers before the mixtures

    assert layers_shown(model)(61) == (0, 1, 2, 3)


def test_where_two_stacks_have_kinds_each_is_shown_once() -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(num_layers=9, num_decoder_layers=8))

    assert layer_kinds(list(model.decoder.block)) == (0, *[1] * 7)  # the first has the bias of positions
    assert layers_shown(model)(9) == layers_shown(model)(8) == (0, 1)


def test_a_list_of_convolutions_is_no_stack_that_has_to_be_shown() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            convolutions = [
                nn.Conv1d(2, 2, 1),
                nn.ReLU(),
                nn.Tanh(),
                nn.Conv1d(2, 3, 1),
                nn.SiLU(),
                nn.GELU(),
            ]
            self.before = nn.ModuleList(convolutions)
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(2, 2)) for _ in range(6)])

    assert layers_shown(Model())(6) == (0, 1, 2)


def test_how_many_experts_a_block_has_is_no_other_structure_and_another_size() -> None:
    def block(experts: int, bias: bool = True) -> nn.Module:
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2, bias) for _ in range(experts)])})

    assert block_signature(block(4)) == block_signature(block(128))
    assert layer_kinds([block(4), block(128), block(4), block(4, bias=False)]) == (0, 1, 0, 3)


def test_the_number_of_its_layer_in_a_key_makes_no_other_kind_of_block() -> None:
    class Keyed(nn.Linear):
        def __init__(self, key: str) -> None:
            super().__init__(2, 2)
            self.key = key

    class Convolution(nn.Conv1d):
        def __init__(self, key: str) -> None:
            super().__init__(2, 2, 1)
            self.key = key

    assert layer_kinds([Convolution("conv.0"), Convolution("conv.11"), Convolution("pool.2")]) == (0, 0, 2)
    assert layer_kinds([Keyed("mamba1"), Keyed("mamba2")]) == (0, 1)


@pytest.mark.parametrize(
    ("config", "cls", "sparse"),
    [
        (SwitchTransformersConfig, SwitchTransformersForConditionalGeneration, (1, 5, 9)),
        (NllbMoeConfig, NllbMoeForConditionalGeneration, (3, 7, 11)),
    ],
)
def test_layers_of_experts_have_their_components_in_both_stacks_of_a_large_model(
    config: type, cls: type[nn.Module], sparse: tuple[int, ...]
) -> None:
    with torch.device("meta"):
        model = cls(config())

    twin = twin_of(model)
    live = fitted(make_map(twin), twin, model)

    for stack in ("encoder", "decoder"):
        layers = range(12)
        assert all(live.site(f"{stack}_block_output", layer) for layer in layers)
        assert tuple(layer for layer in layers if live.site(f"{stack}_router_output", layer)) == sparse
