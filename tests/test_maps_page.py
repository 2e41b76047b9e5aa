"""docs/maps.md: its laws are the library's, its examples run, its tables are those of the real models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import intervenable as iv
from intervenable.map_laws import LAWS
from intervenable.map_making import make_map
from model_maps import lookup
from scripts.fetch_minilm import minilm_folder
from scripts.fetch_smollm2 import smollm2_folder

PAGE = (Path(__file__).parents[1] / "docs" / "maps.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8))

    def forward(self, stream: Tensor) -> Tensor:
        return stream + self.mlp(self.norm(stream))


class TinyGPT(nn.Module):
    """Blocks that do not mix positions: enough for the page."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 30)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.table(tokens)
        for layer in self.layers:
            stream = layer(stream)
        return self.head(stream)


def test_the_table_of_laws_is_the_librarys() -> None:
    rows = [row.strip("| ").split(" | ") for row in PAGE.splitlines() if row.startswith("| ")]
    assert rows[1:] == [[name, meaning] for name, meaning in LAWS.items()]


def test_the_examples_of_the_page_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "_MAPS", dict(lookup._MAPS))
    torch.manual_seed(0)
    names: dict[str, object] = {"model": iv.load_small_lm()[1]}
    exec(EXAMPLES[0], names)
    printed = capsys.readouterr().out
    assert "self_attn: LlamaAttention" in printed
    assert "components keep every law" in printed
    names |= {"model": TinyGPT(), "inputs": {"tokens": torch.randint(30, (2, 7))}}
    exec(EXAMPLES[1], names)
    assert lookup.find_map(["TinyGPT"]).blocks == "layers"


@pytest.mark.smollm2
@pytest.mark.parametrize("name", ["SmolLM2", "MiniLM"])
def test_the_tables_are_what_the_real_models_show(name: str) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    if name == "SmolLM2":
        model = AutoModelForCausalLM.from_pretrained(smollm2_folder(download=False))
    else:
        model = AutoModel.from_pretrained(minilm_folder(download=False))
    verified = iv.verify(model, model_map=make_map(model))
    assert verified.passed
    assert _without_rounding(str(verified)) in _without_rounding(PAGE)


def _without_rounding(text: str) -> str:
    """The text without how large a rounding error is: it differs with the processor and its threads."""
    return re.sub(r"off by [\d.]+e-\d\d", "off by rounding", text)
