"""Maps that are kept in a folder: found again for the same structure, and never trusted blindly."""

from __future__ import annotations

import dataclasses
import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from written_maps import find_map, known_classes

import intervenable as iv
from intervenable.map_cache import KeptMap, cache_folder, fingerprint, keep, look_up
from intervenable.map_records import from_record, to_record
from intervenable.maps import map_of
from model_maps import AttentionHeads, HeadColumns, LayerKind, ModelMap, Site

RICH = ModelMap(
    ("Tiny",),
    None,
    {
        "encoder_block_output": Site("", slot="hidden_states", axes=(1, 2)),
        "encoder_query_output": Site(
            "q", columns=HeadColumns(4, 8, start=2, stride=24, per_group=2, group_stride=64)
        ),
        "encoder_attention_input": Site(
            "attn", "input", slot=0, attention=AttentionHeads(4, 2, None), flat=True
        ),
        "encoder_router_output": Site("router", width="experts", function="linear", nth=1, scale=0.5),
    },
    absent={"encoder_mixer_output": "it has none"},
    sequential=False,
    positions_derived_from_mask=True,
    causal=False,
    stacks={"encoder": "encoder.layers", "vision": "vision.layers"},
    decoder_reads="labels",
    kinds=(LayerKind((1, 3), "encoder", {"encoder_mlp_output": Site("mlp")}, {"encoder_mlp_hidden": "no"}),),
    configs={"vision": "vision_config"},
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTERVENABLE_CACHE", str(tmp_path))
    return tmp_path / "maps"


def tiny(seed: int = 0, **fields: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = {"n_embd": 8, "n_head": 2, "n_layer": 2, "vocab_size": 30}
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **fields}))


def test_every_field_of_a_map_survives_json() -> None:
    assert from_record(json.loads(json.dumps(to_record(RICH)))) == RICH


def test_every_registered_map_survives_json() -> None:
    for name in known_classes():
        row = dataclasses.replace(find_map([name]), variants=())
        assert from_record(json.loads(json.dumps(to_record(row)))) == row


def test_a_kept_map_is_found_for_a_model_with_other_weights() -> None:
    assert look_up(tiny()).kept is None

    assert keep(tiny(), KeptMap(RICH, {"logits": "it broke a law"}))

    found = look_up(tiny(seed=1))
    assert found.kept == KeptMap(RICH, {"logits": "it broke a law"})
    assert found.note == ""


@pytest.mark.parametrize(
    "fields", [{"n_layer": 3}, {"n_head": 4}, {"scale_attn_weights": False}, {"activation_function": "relu"}]
)
def test_a_model_of_another_structure_has_another_map(fields: dict[str, Any]) -> None:
    keep(tiny(), KeptMap(RICH))

    assert look_up(tiny(**fields)).kept is None


def test_the_attention_that_is_used_and_a_module_put_in_make_another_structure() -> None:
    plain = fingerprint(tiny())
    eager, changed = tiny(), tiny()
    eager.config._attn_implementation = "eager"
    changed.transformer.h[0].mlp.act = nn.ReLU()

    assert len({plain, fingerprint(eager), fingerprint(changed)}) == 3


def test_another_forward_put_into_a_class_makes_another_structure(monkeypatch: pytest.MonkeyPatch) -> None:
    before, model = fingerprint(tiny()), tiny()
    cls = type(model.transformer.h[0].mlp)
    plain = cls.forward

    def negated(self: nn.Module, stream: Any) -> Any:
        return -plain(self, stream)

    monkeypatch.setattr(cls, "forward", negated)
    assert fingerprint(model) not in (before, None)
    monkeypatch.undo()
    assert fingerprint(model) == before


def test_names_of_labels_and_of_the_model_make_no_difference() -> None:
    named = tiny(id2label={0: "a", 1: "b"})
    named.config._name_or_path = "somewhere/else"

    assert fingerprint(named) == fingerprint(tiny())


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"map": {}}', "cut", "changed", "\x00\xff"])
def test_a_damaged_file_is_not_used_and_is_said_to_be_damaged(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    keep(tiny(), KeptMap(RICH))
    (file,) = folder.glob("*.json")
    text = file.read_text()
    shifted = text.replace('"start": 2', '"start": 3')
    assert shifted != text
    file.write_text({"cut": text[: len(text) // 2], "changed": shifted}.get(damage, damage))

    with caplog.at_level(logging.INFO, logger="intervenable"):
        found = look_up(tiny())

    assert found.kept is None
    assert found.note.startswith(f"the map kept in {file} could not be read and is made again: ")
    assert found.note in caplog.text
    keep(tiny(), KeptMap(RICH))
    assert look_up(tiny()).kept == KeptMap(RICH)


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("INTERVENABLE_CACHE", str(tmp_path / "file"))

    assert keep(tiny(), KeptMap(RICH)) is False
    assert look_up(tiny()).kept is None


def test_an_empty_variable_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERVENABLE_CACHE", "")

    assert cache_folder() is None
    assert keep(tiny(), KeptMap(RICH)) is False
    assert look_up(tiny()).kept is None


def test_many_at_once_leave_one_whole_file(folder: Path) -> None:
    model = tiny()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: keep(model, KeptMap(RICH)), range(40)))

    assert [file.suffix for file in folder.iterdir()] == [".json"]
    assert look_up(model).kept == KeptMap(RICH)


def test_what_is_no_record_is_refused() -> None:
    with pytest.raises(iv.StorageError, match="This is no record of a model map"):
        from_record({"classes": ["Tiny"], "blocks": "layers", "sites": {"block_output": {"side": "output"}}})
    with pytest.raises(iv.StorageError, match="names 'block_ouput', which is no component"):
        from_record({"classes": ["Tiny"], "blocks": "layers", "sites": {"block_ouput": {"path": ""}}})


class Scaled(nn.Module):
    """A stack whose branches are added times a learned number, which is no part of its structure."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.layers = nn.ModuleList(Branch(factor) for _ in range(3))
        self.head = nn.Linear(8, 40)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        stream = self.table(input_ids)
        for layer in self.layers:
            stream = layer(stream)
        logits: torch.Tensor = self.head(stream)
        return logits


class Branch(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = stream + self.factor * self.mlp(self.norm(stream))
        return added


def test_a_factor_that_was_measured_on_weights_is_not_kept_for_others() -> None:
    torch.manual_seed(0)
    one, other = Scaled(0.5).train(False), Scaled(0.25).train(False)

    scales = [map_of(model).sites["mlp_contribution"].scale for model in (one, other)]

    assert scales == pytest.approx([0.5, 0.25], rel=1e-4)
