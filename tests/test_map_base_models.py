"""Base models without a head, and others whose inputs are guessed: what they are, and swaps against hooks by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_registry import build, spread_weights
from torch import Tensor, nn

import intervenable as iv
from intervenable.map_inputs import example_inputs
from intervenable.map_making import make_map

_TEXT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
_WORDS = {**_TEXT, "vocab_size": 120, "max_position_embeddings": 64}
_PICTURE = {**_TEXT, "image_size": 16, "patch_size": 8}


def bros() -> nn.Module:
    return transformers.BrosModel(transformers.BrosConfig(**(_WORDS | {"hidden_size": 64})))


def heard_as_a_spectrogram() -> nn.Module:
    return transformers.ASTModel(transformers.ASTConfig(**_TEXT, max_length=64, num_mel_bins=32))


def idefics(between: int = 1) -> nn.Module:
    inner = {"embed_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    config = transformers.IdeficsConfig(
        **(_WORDS | {"num_hidden_layers": 4}),
        additional_vocab_size=0,
        cross_layer_interval=between,
        use_resampler=False,
        vision_config={**inner, "image_size": 16, "patch_size": 8},
    )
    return transformers.IdeficsForVisionText2Text(config)


def layoutlmv3() -> nn.Module:
    config = transformers.LayoutLMv3Config(
        **_WORDS, coordinate_size=6, shape_size=4, max_2d_position_embeddings=64, input_size=16, patch_size=8
    )
    return transformers.LayoutLMv3ForTokenClassification(config)


def lxmert() -> nn.Module:
    config = transformers.LxmertConfig(
        **{name: value for name, value in _WORDS.items() if name != "num_hidden_layers"},
        visual_feat_dim=24,
        l_layers=3,
        x_layers=2,
        r_layers=2,
    )
    return transformers.LxmertModel(config)


def mgp_str() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": [16, 32]}
    return transformers.MgpstrForSceneTextRecognition(transformers.MgpstrConfig(**sizes))


def perceiver() -> nn.Module:
    config = transformers.PerceiverConfig(
        num_latents=6, d_latents=32, d_model=24, num_self_attends_per_block=3, num_self_attention_heads=4
    )
    return transformers.PerceiverModel(config)


def seen_at_any_size() -> nn.Module:
    config = transformers.Siglip2VisionConfig(**_TEXT, num_patches=16, patch_size=8)
    return transformers.Siglip2VisionModel(config)


def seen_patch_by_patch() -> nn.Module:
    config = transformers.Qwen3VLConfig().vision_config
    config.update(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "depth": 3,
            "num_heads": 4,
            "num_position_embeddings": 16,
        }
    )
    config.update({"out_hidden_size": 32, "patch_size": 8, "deepstack_visual_indexes": [1]})
    return transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel(config)


def timesformer() -> nn.Module:
    return transformers.TimesformerModel(transformers.TimesformerConfig(**_PICTURE, num_frames=3))


def videomae() -> nn.Module:
    return transformers.VideoMAEModel(transformers.VideoMAEConfig(**_PICTURE, num_frames=4))


def vivit() -> nn.Module:
    config = transformers.VivitConfig(**_TEXT, image_size=16, num_frames=4, tubelet_size=[2, 8, 8])
    return transformers.VivitModel(config)


SHAPES = {
    bros: {"input_ids": (2, 7), "bbox": (2, 7, 4)},
    heard_as_a_spectrogram: {"input_values": (2, 64, 32)},
    idefics: {"pixel_values": (2, 1, 3, 16, 16), "input_ids": (2, 7), "image_attention_mask": (2, 7, 1)},
    layoutlmv3: {"input_ids": (2, 7)},
    lxmert: {"visual_feats": (2, 5, 24), "visual_pos": (2, 5, 4), "input_ids": (2, 7)},
    mgp_str: {"pixel_values": (2, 3, 16, 32)},
    perceiver: {"inputs": (2, 7, 24)},
    seen_at_any_size: {
        "pixel_values": (2, 16, 192),
        "spatial_shapes": (2, 2),
        "pixel_attention_mask": (2, 16),
    },
    seen_patch_by_patch: {"hidden_states": (32, 384), "grid_thw": (2, 3)},
    timesformer: {"pixel_values": (2, 3, 3, 16, 16)},
    videomae: {"pixel_values": (2, 4, 3, 16, 16)},
    vivit: {"pixel_values": (2, 4, 3, 16, 16)},
}


@pytest.mark.parametrize("make", SHAPES, ids=lambda make: make.__name__)
def test_inputs_are_made_in_the_form_in_which_a_model_runs(make: Any) -> None:
    model = make().eval()

    inputs = example_inputs(model)
    other = example_inputs(model, seed=1)

    assert {name: tuple(value.shape) for name, value in inputs.items()} == SHAPES[make]
    assert {name: value.shape for name, value in other.items()} == {k: v.shape for k, v in inputs.items()}
    assert any(not torch.equal(inputs[name], other[name]) for name in inputs)
    with torch.no_grad():
        model(**inputs)


BLOCKS = {
    bros: "encoder.layer",
    heard_as_a_spectrogram: "layers",
    layoutlmv3: "layoutlmv3.encoder.layer",
    mgp_str: "mgp_str.encoder.blocks",
    perceiver: "encoder.self_attends",
    seen_at_any_size: "encoder.layers",
    timesformer: "encoder.layer",
    videomae: "encoder.layer",
    vivit: "layers",
}
"""Where a person finds the blocks in the code of the model."""


def returned(output: Any) -> Tensor:
    """What a model returns first."""
    first = next(iter(output.values()))
    return first[0] if isinstance(first, tuple) else first


@pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)
def test_a_swap_in_a_model_whose_inputs_were_guessed_is_that_of_a_hook_by_hand(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    inputs, source = example_inputs(model), example_inputs(model, seed=1)
    block, kept = model.get_submodule(f"{BLOCKS[make]}.1"), []
    with torch.no_grad():
        plain = returned(model(**inputs))
        handle = block.register_forward_hook(lambda *passed: kept.append(passed[2]))
        model(**source)
        handle.remove()
        handle = block.register_forward_hook(lambda *_: kept[0])
        by_hand = returned(model(**inputs))
        handle.remove()
        declared = iv.IntervenableModel(iv.RepresentationConfig(1, "block_output"), model)
        found = returned(declared(inputs, [source]).intervened)

    assert make_map(model).blocks == BLOCKS[make]
    assert torch.equal(found, by_hand)
    assert not torch.allclose(by_hand, plain, atol=1e-4)


def test_a_stream_that_a_module_between_the_blocks_changes_is_named_and_not_taken_for_its_tower() -> None:
    model = idefics(between=2).eval()
    spread_weights(model)  # at first what lies between the blocks does nothing

    found = make_map(model, example_inputs(model))

    assert (found.blocks, found.stacks) == ("model.layers", {"vision": "model.vision_model.encoder.layers"})
    assert found.reason("block_output") == (
        "block 2 of 'model.layers' is not given the stream that block 1 returned:"
        " 'model.gated_cross_attn_layers.1' changes it in between"
    )
    assert found.site("vision_block_output") is not None


def test_a_stream_that_gets_shorter_and_is_added_to_on_its_way_is_said_to_be_none() -> None:
    tiny = build("granite_speech5_ctc", "ctc")

    found = make_map(tiny.model, tiny.inputs)

    assert found.reason("block_output") == (
        "what its modules hand on is no stream of one size: 'encoder.layers.0' is given (64, 32) for each example"
        " and hands on (32, 32)"
    )


def test_a_classifier_on_a_decoder_that_names_no_token_for_padding_has_a_map() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_WORDS, pad_token_id=None)
    model = transformers.LlamaForSequenceClassification(config).eval()
    base, source = torch.arange(10, 15)[None], torch.arange(20, 25)[None]
    block, kept = model.model.layers[1], []
    with torch.no_grad():
        handle = block.register_forward_hook(lambda *passed: kept.append(passed[2]))
        model(source)
        handle.remove()
        handle = block.register_forward_hook(lambda *_: kept[0])
        by_hand = model(base).logits
        handle.remove()
        declared = iv.IntervenableModel(iv.RepresentationConfig(1, "block_output"), model)
        found = declared({"input_ids": base}, [{"input_ids": source}]).intervened.logits

    assert torch.equal(found, by_hand)
    assert model.config.pad_token_id is None
