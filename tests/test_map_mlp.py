"""Where the parts of an MLP are that is no module by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from intervenable.map_inference import infer_map
from intervenable.map_verification import check_map

WIDTH = 16


class Wrapped(nn.Module):
    """One matrix with something behind it that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.dropout = nn.Linear(3 * WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            part(hidden).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        mixed = (query @ key.mT).softmax(-1) @ value
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """An MLP in modules of the block, whose output is normed before the block adds it to a sum of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.norm_before, self.norm_after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.intermediate, self.act, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), Wrapped()

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.norm_before(self.attention(stream))
        return stream + self.norm_after(self.output(self.act(self.intermediate(stream))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(WIDTH, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        stream = self.embed(input_ids)
        for block in self.blocks:
            stream = block(stream)
        return self.head(stream)


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    model = Model().eval()
    inputs = {"input_ids": torch.randint(30, (2, 7))}
    return check_map(model, infer_map(model, inputs), inputs)


@pytest.mark.parametrize(
    ("component", "path", "side"),
    [
        ("mlp_input", "intermediate", "input"),
        ("mlp_pre_activation", "act", "input"),
        ("mlp_activation", "act", "output"),
        ("mlp_hidden", "output.dense", "input"),
        ("mlp_output", "output", "output"),
        ("mlp_contribution", "norm_after", "output"),
    ],
)
def test_an_mlp_of_two_modules_begins_at_the_sum_that_its_block_makes(found, component, path, side):
    assert found.refused == {}
    site = found.map.site(component)
    assert (site.path, site.side) == (path, side)
