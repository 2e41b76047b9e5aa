"""Attention whose scores are computed in bands or blocks: its heads are found without a matrix of scores."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from tiny_registry import TinyModel, build

import intervenable as iv
from intervenable.map_attention import BOTH_STACKS
from intervenable.map_attention_banded import BANDED
from intervenable.map_inference import infer_map
from intervenable.map_verification import check_map
from model_maps import Bands, HeadColumns, ModelMap

PATHS = {
    "longt5": ("layer.0.LocalSelfAttention", "q k v o"),
    "led": (
        "self_attn",
        "longformer_self_attn.query longformer_self_attn.key longformer_self_attn.value output",
    ),
}
WORDS = ("query_output", "key_output", "value_output", "attention_value_output")
SEEN = (
    "block_input",
    "attention_input",
    "query_output",
    "key_output",
    "value_output",
    "attention_value_output",
)
HEADS = ("head_query_output", "head_key_output", "head_value_output", "head_attention_value_output")


@cache
def inferred(model_type: str) -> tuple[TinyModel, ModelMap]:
    tiny = build(model_type, "seq2seq-lm")
    return tiny, infer_map(tiny.model, tiny.inputs)


def refused(tiny: TinyModel, described: ModelMap) -> set[str]:
    kept = {f"encoder_{word}" for word in (*SEEN, *HEADS, "block_output", "attention_output")}
    of_the_encoder = dataclasses.replace(
        described, sites={name: site for name, site in described.sites.items() if name in kept}
    )
    return set(check_map(tiny.model, of_the_encoder, tiny.inputs).refused)


@pytest.mark.parametrize("model_type", PATHS)
def test_what_makes_queries_keys_and_values_is_found_with_the_columns_of_heads(model_type):
    _, described = inferred(model_type)
    holder, leaves = PATHS[model_type]

    found = [described.site(f"encoder_{word}") for word in WORDS]

    assert [site.path for site in found] == [f"{holder}.{leaf}" for leaf in leaves.split()]
    widths = {(site.columns.heads, site.columns.width, site.columns.start) for site in found}
    assert widths == {(4, found[0].columns.width, 0)}
    assert all(site.columns.contiguous for site in found)


BANDS = {
    "longt5": Bands(("examples", "blocks", "heads", "queries", "keys"), blocks=3),
    "led": Bands(("examples", "queries", "heads", "keys")),
}


@pytest.mark.parametrize("model_type", PATHS)
def test_how_scores_in_bands_lie_is_found_and_vectors_that_are_cut_in_pieces_are_not_offered(model_type):
    _, described = inferred(model_type)

    for word in ("attention_scores", "attention_pattern"):
        assert described.site(f"encoder_{word}").attention.bands == BANDS[model_type]
    for word in ("expanded_head_key", "expanded_head_value"):
        assert described.site(f"encoder_{word}") is None
        assert described.reason(f"encoder_{word}") == BANDED


@pytest.mark.parametrize(
    ("model_type", "wrong"),
    [
        ("longt5", Bands(("examples", "blocks", "heads", "queries", "keys"), blocks=1)),
        ("longt5", Bands(("blocks", "examples", "heads", "queries", "keys"), blocks=3)),
        ("led", Bands(("examples", "heads", "queries", "keys"))),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bands_that_lie_otherwise_break_a_law(model_type, wrong):
    tiny, described = inferred(model_type)
    site = described.sites["encoder_attention_input"]
    heads = dataclasses.replace(site.attention, bands=wrong)
    sites = {**described.sites, "encoder_attention_input": dataclasses.replace(site, attention=heads)}

    found = check_map(tiny.model, dataclasses.replace(described, sites=sites), tiny.inputs).refused

    assert {"encoder_attention_scores", "encoder_attention_pattern"} <= set(found)


@pytest.mark.parametrize("model_type", PATHS)
def test_what_is_found_keeps_the_laws(model_type):
    tiny, described = inferred(model_type)

    assert refused(tiny, described) == set()


@pytest.mark.parametrize(("one", "other"), [("query", "key"), ("key", "value")], ids=lambda part: part)
def test_parts_that_are_exchanged_break_a_law(one, other):
    tiny, described = inferred("longt5")
    names = f"encoder_{one}_output", f"encoder_{other}_output"
    sites = {**described.sites, names[0]: described.sites[names[1]], names[1]: described.sites[names[0]]}

    assert set(names) <= refused(tiny, dataclasses.replace(described, sites=sites))


@pytest.mark.parametrize("part", ["query", "key", "value"])
def test_heads_that_are_taken_for_others_break_a_law(part):
    tiny, described = inferred("longt5")
    name = f"encoder_{part}_output"
    site = described.sites[name]
    width = site.columns.width
    backwards = HeadColumns(4, width, start=3 * width, stride=-width)
    half_of_each = HeadColumns(4, width // 2, stride=width)
    for wrong in (backwards, half_of_each):
        sites = {**described.sites, name: dataclasses.replace(site, columns=wrong)}
        assert f"encoder_head_{part}_output" in refused(tiny, dataclasses.replace(described, sites=sites))


def test_a_head_switched_off_in_a_band_is_what_its_columns_at_zero_come_to():
    tiny, _ = inferred("longt5")
    attention = tiny.model.encoder.block[1].layer[0].LocalSelfAttention
    width = attention.key_value_proj_dim

    def without_head_2(module, args, output):
        output = output.clone()
        output[..., 2 * width : 3 * width] = 0
        return output

    handle = attention.v.register_forward_hook(without_head_2)
    with torch.no_grad():
        expected = tiny.model(**tiny.inputs).logits
    handle.remove()

    entry = iv.RepresentationConfig(1, "encoder_head_value_output", unit="h")
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.ZeroIntervention), tiny.model)
    _, found = declared(tiny.inputs, unit_locations={"base": 2})

    assert torch.equal(found.logits, expected)


def test_a_decoder_that_reads_both_stacks_in_one_matrix_says_so():
    _, described = inferred("t5gemma2")

    assert described.site("decoder_attention_scores") is not None
    assert described.site("cross_attention_scores") is None
    assert described.reason("cross_attention_scores") == BOTH_STACKS
    _, other = inferred("longt5")
    assert other.site("cross_attention_scores") is not None
