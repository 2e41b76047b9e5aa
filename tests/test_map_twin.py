"""Tiny twins of large models: as many heads, every kind of layer, and a config that is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import intervenable as iv
from benchmarks.published_models import PUBLISHED, published
from intervenable import map_twin
from intervenable.map_config_fields import parts_of
from intervenable.map_inference import infer_map
from intervenable.map_inputs import example_inputs
from intervenable.map_layers import block_signature, layer_kinds, layers_shown
from intervenable.map_making import make_map
from intervenable.map_twin import spread_weights, twin_of
from intervenable.map_twin_config import small_config
from intervenable.map_twin_shape import TwinShape
from intervenable.map_verification import check_map


def heads_of(model: nn.Module) -> list[tuple[Any, ...]]:
    """Heads and key-value heads that a config and those inside of it state, by all the names they may have."""
    names = (
        "num_attention_heads",
        "num_key_value_heads",
        "num_kv_heads",
        "encoder_attention_heads",
        "num_heads",
    )
    return [tuple(getattr(part, name, None) for name in names) for part in parts_of(model.config)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_twin_of_a_large_model_runs_and_has_as_many_heads(name: str) -> None:
    model = published(name)

    twin = twin_of(model)

    assert type(twin) is type(model)
    assert heads_of(twin) == heads_of(model)
    assert sum(parameter.numel() for parameter in twin.parameters()) < 8e6
    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}
    with torch.no_grad():
        output = twin(**example_inputs(twin))
    assert all(value.isfinite().all() for value in output.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("name", ["DeepSeek V3 671B", "Gemma 3 27B", "Jamba 52B", "Llama 3 70B"])
def test_the_twin_has_every_kind_of_layer(name: str) -> None:
    model = published(name)

    twin = twin_of(model)

    kinds = {block_signature(block) for block in model.model.layers}  # type: ignore[union-attr]
    assert {block_signature(block) for block in twin.model.layers} == kinds  # type: ignore[union-attr]
    assert len(twin.model.layers) < len(model.model.layers)  # type: ignore[arg-type,union-attr]


def test_layers_that_a_config_counts_in_periods_are_the_first_ones_of_the_model() -> None:
    model, twin = published("Jamba 52B"), twin_of(published("Jamba 52B"))

    signatures = [block_signature(block) for block in twin.model.layers]  # type: ignore[union-attr]

    assert signatures == [block_signature(block) for block in model.model.layers[: len(signatures)]]  # type: ignore[index,union-attr]


def test_layers_that_share_keys_and_values_come_after_some_that_do_not() -> None:
    config = transformers.Gemma3nTextConfig()
    with torch.device("meta"):
        model = transformers.Gemma3nForCausalLM(config)

    twin = twin_of(model)

    shared = [block.self_attn.is_kv_shared_layer for block in twin.model.layers]  # type: ignore[union-attr]
    assert {True, False} == {*shared}
    assert shared == sorted(shared)


def test_a_far_kind_of_layer_is_only_shown_if_the_config_lists_the_kinds() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([*(nn.Linear(2, 2) for _ in range(30)), nn.Linear(2, 3)])

    assert layers_shown(Odd())(31, listed=True) == (0, 1, 30)
    assert layers_shown(Odd())(31) == (0, 1, 2)


def test_what_makes_a_twin_slow_and_is_in_no_component_becomes_small() -> None:
    with torch.device("meta"):
        jamba = transformers.JambaForCausalLM(transformers.JambaConfig())
        cpmant = transformers.CpmAntForCausalLM(transformers.CpmAntConfig())

    states, prompted = twin_of(jamba).config, twin_of(cpmant).config

    assert (states.mamba_d_state, states.mamba_dt_rank) == (8, 8)  # type: ignore[union-attr]
    assert prompted.dim_head * prompted.num_attention_heads == prompted.hidden_size  # type: ignore[operator,union-attr]
    assert prompted.prompt_length == 4  # type: ignore[union-attr]


def test_a_switch_makes_another_kind_of_layer() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.is_sliding = True  # type: ignore[assignment]

    assert layer_kinds([one, other, one]) == (0, 1, 0)


def test_adapted_and_packed_linear_modules_are_like_plain_ones() -> None:
    class Packed(nn.Module):
        in_features, out_features = 8, 8

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(8, 8)
            self.lora_A = nn.Linear(8, 1)

    plain = block_signature(nn.Sequential(nn.Linear(2, 4)))

    assert block_signature(nn.Sequential(Packed())) == plain
    assert block_signature(nn.Sequential(Adapted())) == plain


def test_neither_the_model_nor_its_config_nor_the_random_numbers_change() -> None:
    config = transformers.LlamaConfig(
        hidden_size=64, num_attention_heads=4, num_hidden_layers=5, vocab_size=300, intermediate_size=99
    )
    model = transformers.LlamaForCausalLM(config).train()
    before = copy.deepcopy(config.to_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()

    twin_of(model)

    assert config.to_dict() == before
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, weights[name])


def test_a_default_dtype_of_the_user_neither_reaches_the_twin_nor_is_lost() -> None:
    model = published("GPT-2 XL")
    torch.set_default_dtype(torch.float64)
    try:
        twin = twin_of(model)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)

    assert {parameter.dtype for parameter in twin.parameters()} == {torch.float32}


def test_stated_numbers_that_are_no_sizes_are_those_of_the_model() -> None:
    config = transformers.Gemma2Config(
        num_hidden_layers=4,
        final_logit_softcapping=7.0,
        attn_logit_softcapping=9.0,
        rms_norm_eps=1e-3,
        attention_bias=True,
    )
    with torch.device("meta"):
        twin: Any = twin_of(transformers.Gemma2ForCausalLM(config))

    assert twin.config.final_logit_softcapping == 7.0
    assert twin.config.attn_logit_softcapping == 9.0
    assert twin.config.rms_norm_eps == 1e-3
    assert twin.model.layers[0].self_attn.q_proj.bias is not None


def test_eager_attention_stays_eager() -> None:
    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=3)
    config._attn_implementation = "eager"
    model = transformers.GPT2LMHeadModel(config)

    twin: Any = twin_of(model)

    assert twin.config._attn_implementation == "eager"


def test_a_model_without_a_config_has_no_twin() -> None:
    with pytest.raises(iv.UnsupportedModelError) as raised:
        twin_of(nn.Linear(2, 2))

    assert str(raised.value) == (
        "Linear has no config of transformers, so no tiny model can be made like it."
        "\nIts map can still be found by running the model itself."
    )


def test_what_a_convolution_over_a_spectrogram_returns_is_as_large_as_what_it_is_given() -> None:
    layers = nn.Sequential(nn.Conv2d(64, 64, 3, bias=False), nn.Conv2d(64, 64, 3, bias=False))
    for parameter in layers.parameters():
        parameter.data.normal_(0.0, 0.02)  # as many models begin: of a sound nothing would be left

    spread_weights(layers)

    with torch.no_grad():
        assert 0.5 < float(layers(torch.randn(2, 64, 9, 9)).std()) < 2.0


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("Qwen3NextForCausalLM", {"linear_num_key_heads": 2, "linear_num_value_heads": 4}),
        (
            "BailingHybridForCausalLM",
            {"linear_num_heads": 2, "num_attention_heads": 32},
        ),  # one number for both
    ],
)
def test_heads_of_linear_attention_become_few_and_those_of_attention_stay(
    name: str, counts: dict[str, int]
) -> None:
    cls: Any = getattr(transformers, name)
    with torch.device("meta"):
        model: Any = cls(cls.config_class())

    twin: Any = twin_of(model)

    assert {field: getattr(twin.config, field) for field in counts} == counts
    assert heads_of(twin) == heads_of(model)
    twin_mixers = [module for module in twin.modules() if hasattr(module, "A_log")]
    heads = {len(module.A_log.flatten()) for module in twin_mixers}
    assert heads == {max(count for field, count in counts.items() if field.startswith("linear"))}


def test_batch_norms_of_a_twin_norm_what_they_are_given():
    from transformers import LevitConfig, LevitForImageClassification

    with torch.device("meta"):
        large = LevitForImageClassification(LevitConfig())
    twin = twin_of(large)
    seen: list[float] = []
    norms = [part for part in twin.modules() if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.register_forward_hook(lambda module, given, returned: seen.append(float(returned.std())))
    with torch.no_grad():
        twin(**example_inputs(twin))
    assert norms
    assert (
        max(seen) < 3
    )  # with the statistics that they are made with it is over a thousand in the last stage
    assert not any(part.training for part in twin.modules())
    assert {norm.momentum for norm in norms} == {0.1}


def test_pictures_of_a_twin_leave_more_than_one_position_to_the_last_stage():
    from transformers import LevitConfig, LevitForImageClassification

    with torch.device("meta"):
        large = LevitForImageClassification(LevitConfig())
    twin = twin_of(large)
    inputs = example_inputs(twin)
    found = check_map(twin, infer_map(twin, inputs), inputs)
    for name in ("head_query_output", "attention_scores", "attention_pattern"):
        assert name in found.components


def test_a_tower_keeps_windows_that_are_counted_in_pixels_and_gets_small_pictures() -> None:
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "window_size": 112}
    windowed = transformers.Qwen2_5_VLConfig(vision_config=vision, text_config={"sliding_window": 4096})
    pictured = transformers.InternVLConfig(vision_config={"image_size": [448, 448]})

    def first(count: int, *, sharing: int = 0, listed: bool = False) -> tuple[int, ...]:
        return tuple(range(min(count, 1)))

    one, other = (small_config(config, TwinShape(), first) for config in (windowed, pictured))

    assert one.vision_config.window_size == 112  # eight patches of 14 pixels
    assert list(other.vision_config.image_size) == [64, 64]


def test_what_would_still_be_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(map_twin, "LARGEST", 1000)

    with pytest.raises(iv.UnsupportedModelError, match="million parameters"):
        twin_of(published("GPT-2 XL"))


def test_stages_of_a_tower_keep_their_heads_and_get_narrower_by_one_factor() -> None:
    twin = twin_of(published("Swin large"))
    stages: Any = twin.swin.encoder.layers  # type: ignore[union-attr]

    assert twin.config.num_heads == [6, 12, 24, 48]
    assert [stage.blocks[0].attention.q_proj.out_features for stage in stages] == [24, 48, 96, 192]
    assert [len(stage.blocks) for stage in stages] == [2, 2, 3, 2]


def test_heads_of_stages_need_not_stay_a_multiple_of_four_as_nothing_turns_them() -> None:
    with torch.device("meta"):
        model = transformers.ClapModel(transformers.ClapConfig())

    twin = twin_of(model)
    stages: Any = twin.audio_model.audio_encoder.layers  # type: ignore[union-attr]

    # 24 wide before, beside heads of text that are 64 wide, in a stream as wide as that of the text.
    assert twin.config.audio_config.hidden_size // 32 == 6  # type: ignore[union-attr]
    assert twin.config.text_config.hidden_size == twin.config.audio_config.hidden_size == 192  # type: ignore[union-attr]
    assert stages[-1].blocks[0].attention.self.query.out_features == 192


def test_what_is_as_wide_as_a_stream_follows_it() -> None:
    sizes = twin_of(published("SAM base")).config
    decoder, prompt, vision = sizes.mask_decoder_config, sizes.prompt_encoder_config, sizes.vision_config

    assert (
        decoder.hidden_size == prompt.hidden_size == vision.output_channels == 2 * vision.num_pos_feats < 256
    )


@pytest.mark.parametrize(
    ("stated", "small"),
    [
        ([16, 24, 24], [2, 1, 1]),
        (None, [2, 1, 1]),  # the model's own
        ([22, 22, 20], [1, 1, 2]),  # the first two are paired with each other
    ],
)
def test_a_rotation_over_several_axes_is_shared_out_anew_in_narrower_heads(
    stated: list[int] | None, small: list[int]
) -> None:
    sections = {} if stated is None else {"mrope_section": stated}
    cls = transformers.Qwen2VLForConditionalGeneration
    with torch.device("meta"):
        large = cls(
            transformers.Qwen2VLConfig(
                text_config={
                    "hidden_size": 1536,
                    "num_attention_heads": 12,
                    "num_key_value_heads": 2,
                    "num_hidden_layers": 4,
                    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **sections},
                }
            )
        )

    assert twin_of(large).config.text_config.rope_parameters["mrope_section"] == small


def test_a_tower_whose_hidden_size_is_what_it_hands_on_keeps_its_heads_and_runs() -> None:
    vision = twin_of(published("Qwen2-VL 7B")).config.vision_config

    assert (vision.num_heads, vision.embed_dim % vision.num_heads, vision.embed_dim < 1280) == (16, 0, True)
    assert "vision_block_output" in make_map(published("Qwen2-VL 7B")).components()


def test_heads_that_turn_along_two_axes_stay_a_multiple_of_four_wide_so_that_the_vision_tower_runs() -> None:
    with torch.device("meta"):
        large = transformers.Qwen2_5OmniThinkerForConditionalGeneration(
            transformers.Qwen2_5OmniThinkerConfig(
                text_config={
                    "hidden_size": 3584,
                    "num_attention_heads": 28,
                    "num_key_value_heads": 4,
                    "num_hidden_layers": 28,
                    "rope_parameters": {
                        "rope_type": "default",
                        "rope_theta": 1e6,
                        "mrope_section": [16, 24, 24],
                    },
                },
                vision_config={"hidden_size": 1280, "num_heads": 16, "out_hidden_size": 3584},
            )
        )

    assert {"vision_block_output", "vision_head_value_output"} <= set(make_map(large).components())
