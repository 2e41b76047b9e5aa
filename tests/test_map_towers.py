"""Towers of models that are run on text alone: found by the model's own reader of pictures, and proved alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_registry import build
from torch import Tensor, nn
from tower_models import MAPS, tower_inputs, tower_model

import intervenable as iv
from intervenable.map_inputs import example_inputs
from intervenable.map_making import make_map, proved_map
from intervenable.map_media import tower_calls
from intervenable.map_towers import with_towers
from model_maps import COMPONENTS, HeadColumns, ModelMap


def written(name: str) -> ModelMap:
    cls = type(tower_model(name)).__name__
    return next(one for one in MAPS if cls in one.classes)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_the_tower_is_where_a_person_wrote_that_it_is(name: str) -> None:
    found, expected = make_map(tower_model(name)), written(name)

    assert found.blocks == expected.blocks
    assert found.stacks == expected.stacks
    for component in expected.components():
        site, wanted = found.site(component, 0), expected.site(component, 0)
        if wanted is None or not component.startswith("vision_") or COMPONENTS[component].inside:
            continue
        assert site is not None, component
        places = [(one.path, one.side, one.columns, one.flat) for one in (site, wanted)]
        assert places[0] == places[1], component


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_vl"])
def test_a_swap_in_a_tower_that_was_found_is_that_of_a_hook_by_hand(name: str) -> None:
    model, inputs, source = tower_model(name), tower_inputs(name), tower_inputs(name, seed=2)
    path = f"{written(name).stacks['vision']}.1"
    module, kept = model.get_submodule(path), []
    with torch.no_grad():
        plain = model(**inputs).logits
        handle = module.register_forward_hook(lambda *passed: kept.append(passed[2].clone()))
        model(**source)
        handle.remove()
        # Before the hook that records hidden states, of which Llava takes the last but one.
        handle = module.register_forward_hook(lambda *_: kept[0], prepend=True)
        by_hand = model(**inputs).logits
        handle.remove()
        declared = iv.IntervenableModel(iv.RepresentationConfig(1, "vision_block_output"), model)
        output = declared(inputs, [source]).intervened.logits

    assert torch.equal(output, by_hand)
    assert not torch.allclose(by_hand, plain, atol=1e-3)


def test_heads_of_a_tower_with_all_pictures_on_one_axis_are_columns_of_its_projection() -> None:
    found = make_map(tower_model("qwen2_vl"))

    columns = {word: found.site(f"vision_head_{word}_output", 0) for word in ("query", "key", "value")}

    # Its code splits the 36 columns in three, and each part in three heads.
    assert {word: site and site.columns for word, site in columns.items()} == {
        "query": HeadColumns(3, 4, start=0),
        "key": HeadColumns(3, 4, start=12),
        "value": HeadColumns(3, 4, start=24),
    }
    assert all(site is not None and site.flat for site in columns.values())
    assert found.site("vision_attention_scores", 0) is None
    assert found.reason("vision_attention_scores").startswith("its blocks have all examples on one axis")


def test_a_tower_that_hears_is_found_as_one_that_sees() -> None:
    tiny = build("voxtral", "seq2seq-lm")

    found = with_towers(tiny.model, proved_map(tiny.model, tiny.inputs), proved_map)

    assert found.stacks == {"audio": "model.audio_tower.layers"}
    query = found.site("audio_head_query_output", 0)
    assert query is not None
    assert (query.path, query.columns) == ("self_attn.q_proj", HeadColumns(4, 8))  # 32 columns of 4 heads
    assert found.site("audio_attention_scores", 0) is not None


def llava_next() -> nn.Module:
    text: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**text, "image_size": 8, "patch_size": 4, "intermediate_size": 20, "num_hidden_layers": 3}
    config = transformers.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", "intermediate_size": 20, "vocab_size": 72, **text},
        image_token_index=70,
    )
    torch.manual_seed(0)
    return transformers.LlavaNextForConditionalGeneration(config).eval()


def test_a_reader_that_fails_behind_its_tower_has_run_it() -> None:
    calls = tower_calls(llava_next(), "vision")  # the tower wants no tiles; what joins them does

    assert [call.path for call in calls] == ["model.vision_tower", "model.multi_modal_projector"]
    assert tuple(calls[0].inputs["pixel_values"].shape) == (2, 3, 8, 8)


def test_a_tower_is_given_what_its_model_gives_it() -> None:
    (call, *_) = tower_calls(tower_model("qwen2_vl"), "vision")

    assert call.path == "model.visual"
    assert tuple(call.inputs["hidden_states"].shape) == (2 * 16, 3 * 2 * 4 * 4)
    assert call.inputs["grid_thw"].tolist() == [[1, 4, 4]] * 2


def test_a_model_without_a_reader_has_no_calls() -> None:
    config = transformers.GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=99)

    assert tower_calls(transformers.GPT2LMHeadModel(config), "vision") == []


class Twice(nn.Module):
    """A model whose tower reads each half of a picture by itself, in calls of its own."""

    def __init__(self, model: nn.Module, times: int) -> None:
        super().__init__()
        self.config = model.config
        self.model, self.times = model.model, times
        self.lm_head = model.lm_head

    def forward(self, input_ids: Tensor) -> Tensor:
        result: Tensor = self.lm_head(self.model.language_model(input_ids).last_hidden_state)
        return result

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        for _ in range(self.times):
            read: Tensor = self.model.vision_tower(pixel_values).last_hidden_state
        return read


@pytest.mark.parametrize(("times", "stacks"), [(1, {"vision"}), (2, set())])
def test_a_tower_that_runs_twice_for_a_picture_has_no_components(times: int, stacks: set[str]) -> None:
    model = Twice(tower_model("llava"), times)
    model.get_submodule("model").get_image_features = None  # only that of the model itself
    main = proved_map(model, example_inputs(model))

    found = with_towers(model, main, proved_map)

    assert set(found.stacks) == stacks
