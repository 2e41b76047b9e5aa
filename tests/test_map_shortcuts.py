"""What a run of a model can leave out, held to models of which that is known."""

from __future__ import annotations

import pytest
import torch
from tiny_registry import build
from torch import Tensor, nn

from intervenable.map_shortcuts import START, SUFFIX, shortcuts_of
from intervenable.maps import map_of
from model_maps import ModelMap, Site


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "bloom"])
def test_blocks_and_tokens_can_be_left_out_of_decoders_with_a_cache(name: str) -> None:
    tiny = build(name)

    found = shortcuts_of(tiny.model, map_of(tiny.model), tiny.inputs)

    assert found[START] == "bit for bit"
    assert "more than" not in found[SUFFIX]
    assert "not here" not in found[SUFFIX]


@pytest.mark.parametrize("name", ["jamba", "bamba"])
def test_a_cache_that_does_not_go_on_exactly_is_told(name: str) -> None:
    tiny = build(name)

    found = shortcuts_of(tiny.model, map_of(tiny.model), tiny.inputs)

    assert found[START] == "bit for bit"
    assert "more than the 1e-04 of rounding" in found[SUFFIX]


def test_a_model_that_keeps_nothing_says_so() -> None:
    tiny = build("openai-gpt")
    assert shortcuts_of(tiny.model, map_of(tiny.model), tiny.inputs)[SUFFIX].startswith("not here")


class Counting(nn.Module):
    """A block that writes down how often it ran, which a later one reads: its output is not all that it hands on."""

    def __init__(self, shared: dict[str, int]) -> None:
        super().__init__()
        self.shared, self.linear = shared, nn.Linear(4, 4)

    def forward(self, stream: Tensor) -> Tensor:
        self.shared["ran"] += 1
        return self.linear(stream) * self.shared["ran"]


class Leaky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = {"ran": 0}
        self.table = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(Counting(self.shared) for _ in range(4))

    def forward(self, tokens: Tensor) -> Tensor:
        self.shared["ran"] = 0
        stream = self.table(tokens)
        for layer in self.layers:
            stream = layer(stream)
        return stream


def test_blocks_that_hand_on_more_than_their_output_are_told() -> None:
    torch.manual_seed(0)
    leaky = Leaky()
    described = ModelMap(("Leaky",), "layers", {"block_output": Site("")})

    found = shortcuts_of(leaky, described, {"tokens": torch.randint(9, (2, 5))})

    assert "more than" in found[START]
