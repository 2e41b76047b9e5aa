"""What the sizes of a model are, from configs that name them in many ways."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from model_maps import HeadColumns, Site, Sizes, columns_of, sizes_of
from tiny_models import CASES, MULTIMODAL, RECURRENT, tiny

KEY_VALUE_HEADS = {"full": 4, "single": 1, "grouped": 2, "one_norm": 1}
WITHOUT_GROUPING = ("gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "bert")
WIDE_HEADS = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "mixtral", "gpt_oss", MULTIMODAL)


@pytest.mark.parametrize(
    ("family", "variant"), [case for case in CASES if case[0] not in RECURRENT] + [(MULTIMODAL, None)]
)
def test_sizes_of_every_tiny_model_are_those_it_was_made_with(family, variant):
    key_value_heads = 4 if family in WITHOUT_GROUPING else KEY_VALUE_HEADS.get(variant, 2)
    if family == "falcon":
        key_value_heads = {None: 1, "grouped": 2, "one_norm": 1, "sequential": 4}[variant]
    assert sizes_of(tiny(family, variant=variant).config) == Sizes(
        hidden=16,
        layers=3,
        query_heads=4,
        key_value_heads=key_value_heads,
        head_dim=6 if family in WIDE_HEADS else 4,
        mlp=64 if family == "bloom" else 40,
        vocabulary=72,
        experts=3 if family in ("mixtral", "gpt_oss") else None,
        embedding=10 if variant == "post_norm" and family == "opt" else 16,
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("GPT2Config", Sizes(768, 12, 12, 12, 64, 3072, 50257, None, 768)),
        ("GemmaConfig", Sizes(3072, 28, 16, 16, 256, 24576, 256000, None, 3072)),
        ("Qwen3Config", Sizes(4096, 32, 32, 32, 128, 22016, 151936, None, 4096)),
        ("FalconConfig", Sizes(4544, 32, 71, 1, 64, 18176, 65024, None, 4544)),
        ("GPTBigCodeConfig", Sizes(768, 12, 12, 1, 64, 3072, 50257, None, 768)),
        ("MptConfig", Sizes(2048, 24, 16, 16, 128, 8192, 50368, None, 2048)),
        ("T5Config", Sizes(512, 6, 8, 8, 64, 2048, 32128, None, 512)),
        ("MixtralConfig", Sizes(4096, 32, 32, 8, 128, 14336, 32000, 8, 4096)),
        ("AlbertConfig", Sizes(4096, 12, 64, 64, 64, 16384, 30000, None, 128)),
    ],
)
def test_sizes_of_known_default_configs(config, expected):
    assert sizes_of(getattr(transformers, config)()) == expected


def test_query_and_key_value_widths_are_heads_times_head_dim():
    sizes = Sizes(hidden=16, query_heads=4, key_value_heads=2, head_dim=6, mlp=40, vocabulary=72)
    assert [sizes.width(name) for name in ("hidden", "query", "key_value", "mlp", "vocabulary")] == [
        16,
        24,
        12,
        40,
        72,
    ]
    assert [sizes.width(name) for name in ("experts", "embedding", "any")] == [None, None, None]
    assert Sizes(query_heads=4).width("query") is None


@pytest.mark.parametrize("config", [None, SimpleNamespace(), SimpleNamespace(hidden_size=None), object()])
def test_what_a_config_lacks_is_none_and_never_an_error(config):
    assert sizes_of(config) == Sizes()


def test_a_config_with_two_text_towers_is_read_as_it_stands():
    config = transformers.MusicgenConfig()
    with pytest.raises(ValueError, match="Multiple valid text configs"):
        config.get_text_config()
    assert sizes_of(config) == Sizes()


def test_of_several_towers_the_text_towers_sizes_are_read():
    config = SimpleNamespace(
        text_config=SimpleNamespace(hidden_size=16), vision_config=SimpleNamespace(hidden_size=12)
    )
    assert sizes_of(config).hidden == 16
    assert sizes_of(tiny(MULTIMODAL).config).mlp == 40


def test_a_stated_head_dim_is_never_overruled_by_hidden_over_heads():
    stated = SimpleNamespace(hidden_size=16, num_attention_heads=4, head_dim=6)
    assert sizes_of(stated).head_dim == 6
    assert sizes_of(SimpleNamespace(d_model=16, num_heads=4, d_kv=7)).head_dim == 7


def test_latent_attention_has_no_single_head_width():
    config = transformers.DeepseekV3Config()
    assert config.head_dim == config.qk_rope_head_dim  # what a naive reader would take
    assert sizes_of(config).head_dim is None


def test_a_size_that_differs_between_layers_is_none():
    assert sizes_of(SimpleNamespace(intermediate_size=[40, 40, 40])).mlp == 40
    assert sizes_of(SimpleNamespace(intermediate_size=[40, 48])).mlp is None
    assert sizes_of(SimpleNamespace(hidden_size=True)).hidden is None


def test_a_field_that_refuses_to_answer_counts_as_missing():
    class Refusing:
        num_attention_heads = 4

        @property
        def head_dim(self):
            raise RuntimeError("differs from layer to layer")

    assert sizes_of(Refusing()) == Sizes(query_heads=4, key_value_heads=4)


# Columns of heads


def picked(site: Site, sizes: Sizes, of: torch.Tensor) -> torch.Tensor:
    """`[heads, head width]`: what the heads of a site are in a vector."""
    columns = columns_of(site, sizes, width=len(of))
    starts = [columns.first_column(head) for head in range(columns.heads)]
    return torch.stack([of[start : start + columns.width] for start in starts])


def part(name: str, layout: str) -> Site:
    heads = "query" if name == "query" else "key_value"
    return Site("qkv", width=heads, heads=heads, part=name, layout=layout)


heads_of_a_model = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5))


@given(heads_of_a_model)
def test_concatenated_parts_are_those_that_split_gives(shape):
    key_value_heads, group, head_dim = shape
    sizes = Sizes(query_heads=key_value_heads * group, key_value_heads=key_value_heads, head_dim=head_dim)
    wide, narrow = sizes.width("query"), sizes.width("key_value")
    fused = torch.arange(wide + 2 * narrow)

    for name, expected in zip(("query", "key", "value"), fused.split([wide, narrow, narrow]), strict=True):
        assert (
            picked(part(name, "concatenated"), sizes, fused).tolist() == expected.view(-1, head_dim).tolist()
        )


@given(heads_of_a_model)
def test_grouped_parts_are_those_that_falcons_split_gives(shape):
    key_value_heads, group, head_dim = shape
    sizes = Sizes(query_heads=key_value_heads * group, key_value_heads=key_value_heads, head_dim=head_dim)
    fused = torch.arange(key_value_heads * (group + 2) * head_dim)
    split = fused.view(key_value_heads, group + 2, head_dim)

    assert picked(part("query", "grouped"), sizes, fused).tolist() == split[:, :-2].flatten(0, 1).tolist()
    assert picked(part("key", "grouped"), sizes, fused).tolist() == split[:, -2].tolist()
    assert picked(part("value", "grouped"), sizes, fused).tolist() == split[:, -1].tolist()


def test_without_grouping_the_grouped_layout_is_that_of_neox():
    sizes = Sizes(query_heads=4, key_value_heads=4, head_dim=4)
    fused = torch.arange(48)
    query, key, value = fused.view(4, 12).chunk(3, dim=-1)

    assert picked(part("query", "grouped"), sizes, fused).tolist() == query.tolist()
    assert picked(part("key", "grouped"), sizes, fused).tolist() == key.tolist()
    assert picked(part("value", "grouped"), sizes, fused).tolist() == value.tolist()


def test_columns_of_a_plain_projection_lie_side_by_side():
    columns = columns_of(Site("k", heads="key_value"), Sizes(key_value_heads=2, head_dim=6))
    assert (columns.heads, columns.width, columns.contiguous) == (2, 6, True)
    assert not columns_of(
        part("key", "grouped"), Sizes(query_heads=4, key_value_heads=2, head_dim=6)
    ).contiguous


def test_the_live_width_decides_how_wide_a_head_is():
    wrong = Sizes(query_heads=4, key_value_heads=2, head_dim=4)
    assert columns_of(Site("q", heads="query"), wrong, width=24).width == 6
    assert columns_of(part("value", "concatenated"), wrong, width=48) == HeadColumns(2, 6, start=36)


def test_a_width_that_heads_cannot_share_is_an_error():
    with pytest.raises(ValueError, match="cannot share") as caught:
        columns_of(Site("self_attn.q_proj", heads="query"), Sizes(query_heads=4), width=26)
    assert str(caught.value) == (
        "The tensor at 'self_attn.q_proj' has 26 columns, which 4 heads cannot share equally.\n"
        "Give the site explicit columns, or correct its heads, part or layout."
    )


def test_explicit_columns_win_and_a_site_without_heads_has_none():
    explicit = HeadColumns(heads=4, width=8, start=8, stride=24)
    assert columns_of(Site("q", heads="query", columns=explicit), Sizes()) is explicit
    assert [explicit.first_column(head) for head in range(4)] == [8, 32, 56, 80]
    assert columns_of(Site("mlp"), Sizes(query_heads=4, head_dim=6)) is None
    assert columns_of(Site("q", heads="query"), Sizes(head_dim=6)) is None
    assert columns_of(Site("q", heads="query"), Sizes(query_heads=4)) is None
    assert columns_of(part("key", "grouped"), Sizes(query_heads=4, head_dim=6)) is None
