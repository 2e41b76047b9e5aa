"""Models that are given the codes of a sound: a row of ids for each code book, several rows for one example."""

from __future__ import annotations

import pytest
import torch
from tiny_registry import build
from torch import Tensor

import intervenable as iv
from intervenable.map_inference import infer_map
from intervenable.map_verification import check_map

BOOKS, EXAMPLES, LENGTH, HEADS = 2, 3, 7, 4


@pytest.fixture(scope="module")
def musicgen():
    made = build("musicgen", "causal-lm").model
    assert made.config.num_codebooks == BOOKS
    assert made.config.num_attention_heads == HEADS
    return made


def codes(seed: int = 0) -> dict[str, Tensor]:
    drawn = torch.randint(10, 90, (BOOKS * EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": drawn}


def query_projection(model):
    path = next(name for name, _ in model.named_modules() if name.endswith("1.self_attn.q_proj"))
    return model.get_submodule(path)


def test_views_by_heads_are_offered_where_rows_of_ids_are_code_books(musicgen):
    for rows in (BOOKS, BOOKS * EXAMPLES):
        inputs = {"input_ids": codes()["input_ids"][:rows]}
        found = check_map(musicgen, infer_map(musicgen, inputs), inputs)
        assert {"head_query_output", "head_attention_output"} <= {*found.components}


def test_heads_of_each_example_are_collected_and_not_of_each_row(musicgen):
    seen: list[Tensor] = []
    projection = query_projection(musicgen)
    handle = projection.register_forward_hook(lambda module, given, returned: seen.append(returned))
    with torch.no_grad():
        musicgen(**codes())
    handle.remove()
    expected = seen[0].view(EXAMPLES, LENGTH, HEADS, -1).transpose(1, 2)
    assert torch.equal(
        iv.collect(musicgen, codes(), "head_query_output", layers=[1])["head_query_output", 1], expected
    )


def test_a_head_is_swapped_in_all_examples_as_by_hand(musicgen):
    with torch.no_grad():
        rest = musicgen(**codes()).logits
    config = iv.IntervenableConfig(
        [iv.RepresentationConfig(1, "head_query_output", "h", intervention=iv.ZeroIntervention())]
    )
    _, changed = iv.IntervenableModel(config, musicgen)(codes(), unit_locations={"base": 1})

    def without_head(module, given, returned):
        heads = returned.clone().view(EXAMPLES, LENGTH, HEADS, -1)
        heads[:, :, 1] = 0
        return heads.view(returned.shape)

    handle = query_projection(musicgen).register_forward_hook(without_head)
    with torch.no_grad():
        expected = musicgen(**codes()).logits
    handle.remove()
    assert torch.equal(changed.logits, expected)
    assert not torch.equal(changed.logits, rest)
