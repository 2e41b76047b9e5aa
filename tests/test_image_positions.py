"""`image`, `audio` and `text` as positions: the tokens that a model's config names, against those counted by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from tower_models import BEFORE, IMAGE, PATCHES, registered, tower_inputs, tower_model

import intervenable as iv
from intervenable.media_tokens import media_tokens

PICTURE = list(range(BEFORE, BEFORE + PATCHES))
REST = [place for place in range(11) if place not in PICTURE]
START, END = 68, 67


@pytest.fixture(autouse=True)
def _maps():
    with registered():
        yield


def inputs_with_ids(ids):
    """A prompt for the language model of a LLaVA alone: without a picture its tokens are read as any others."""
    return {"input_ids": torch.tensor(ids)}


def zeroed(model, inputs, where, component="block_output", layer=0):
    """Where an intervention writes, by its receipt, and what comes out."""
    entry = iv.RepresentationConfig(layer, component, "pos", where=where)
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.ZeroIntervention), model)
    with torch.no_grad():
        output = declared(inputs)
    return [line.positions for line in output.receipt], output.intervened.logits


def by_hand(model, inputs, positions, layer=0):
    """The logits with the output of a block zeroed at these positions by a hook."""

    def hook(module, args, output):
        output = output.clone()
        output[:, positions] = 0.0
        return output

    handle = model.model.language_model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = model(**inputs).logits
    handle.remove()
    return logits


# What stands for what


def test_configs_name_the_tokens_of_pictures_and_sounds_in_two_ways():
    config = SimpleNamespace(image_token_id=7, audio_token_index=9, video_token_id=None)
    assert media_tokens(SimpleNamespace(config=config)) == {"image": (7,), "audio": (9,)}
    assert media_tokens(tower_model("llava")) == {"image": (IMAGE,)}
    assert set(media_tokens(tower_model("qwen2_vl"))) == {"image", "video"}
    assert media_tokens(tower_model("bart")) == media_tokens(None) == {}


def test_a_list_of_ids_and_two_names_for_one_id_are_read():
    assert media_tokens(SimpleNamespace(image_token_id=[7, 8], image_token_index=8)) == {"image": (7, 8)}


# In interventions


@pytest.mark.parametrize(("word", "positions"), [("image", PICTURE), ("text", REST)])
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_declared_name_writes_where_a_hook_by_hand_does(name, word, positions):
    model, inputs = tower_model(name), tower_inputs(name)
    found, logits = zeroed(model, inputs, [word])
    assert found == [tuple(positions)] * 2
    assert torch.equal(logits, by_hand(model, inputs, positions))


def test_source_and_base_are_each_looked_up_in_their_own_prompt():
    model = tower_model("llava")
    base = inputs_with_ids([[5, IMAGE, IMAGE, 6, 7, 8]])
    source = inputs_with_ids([[5, 6, 7, IMAGE, 8, IMAGE]])
    declared = iv.IntervenableModel(
        iv.IntervenableConfig([iv.RepresentationConfig(1, "block_output")], iv.VanillaIntervention), model
    )
    with torch.no_grad():
        words = declared(base, [source], {"sources->base": "image"})
        ints = declared(base, [source], {"sources->base": ([[[3, 5]]], [[[1, 2]]])})
    assert words.receipt[0].positions == (1, 2)
    assert torch.equal(words.intervened.logits, ints.intervened.logits)


def test_padding_is_not_counted():
    model = tower_model("llava")
    ids = torch.tensor([[0, 0, 5, IMAGE, 6], [5, 6, 7, IMAGE, IMAGE]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    found, _ = zeroed(model, inputs, ["image"])
    assert found == [(1,), (3, 4)]


def test_keys_of_a_pattern_are_named_too():
    model, inputs = tower_model("llava"), tower_inputs("llava")
    entry = iv.RepresentationConfig(
        1, "attention_pattern", "h.query.key", where={"queries": "last", "keys": "image"}
    )
    declared = iv.IntervenableModel(iv.IntervenableConfig([entry], iv.ZeroIntervention), model)
    with torch.no_grad():
        receipt = declared(inputs).receipt
    assert (receipt[0].queries, receipt[0].keys) == ((10,), tuple(PICTURE))


def test_names_combine_with_other_entries():
    model, inputs = tower_model("llava"), tower_inputs("llava")
    found, _ = zeroed(model, inputs, [iv.Except("image", BEFORE), "last"])
    assert found == [(*PICTURE[1:], 10)] * 2


# In the rest of the library


def test_collecting_takes_the_positions_of_pictures():
    model, inputs = tower_model("llava"), tower_inputs("llava")
    cache = iv.collect(model, inputs, "block_output", positions=["image"])
    whole = iv.collect(model, inputs, "block_output")
    assert torch.equal(cache["block_output", 1], whole["block_output", 1][:, PICTURE])


def test_a_sweep_patches_a_picture_as_one_entry_and_the_words_as_another():
    model = tower_model("llava")
    clean, corrupted = tower_inputs("llava"), tower_inputs("llava", seed=2)
    swept = iv.patching.sweep(
        model,
        clean,
        corrupted,
        "block_input",
        metric=iv.metrics.logit(None, 3),
        positions=["image", "text"],
        exact_check=True,
    )
    cache = iv.collect(model, clean, "block_input", device=None)
    for column, positions in enumerate((PICTURE, REST)):

        def hook(module, args, kwargs, positions=positions):
            stream = args[0].clone()
            stream[:, positions] = cache["block_input", 1][:, positions]
            return (stream, *args[1:]), kwargs

        handle = model.model.language_model.layers[1].register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            expected = model(**corrupted).logits[:, -1, 3].mean()
        handle.remove()
        assert torch.allclose(swept.values[1, column], expected, atol=1e-5)
    assert swept.labels["pos"] == ("image", "text")


def test_positions_are_told_by_a_model_a_processor_or_a_class_of_tokens():
    ids = torch.tensor([5, START, IMAGE, IMAGE, END, 6])
    processor = SimpleNamespace(decode=str, image_token_id=IMAGE)
    assert iv.positions(None, ids, "image", model=tower_model("llava")) == [2, 3]
    assert iv.positions(processor, ids, "image") == [2, 3]
    assert iv.positions(processor, ids, "text") == [0, 1, 4, 5]
    resolver = iv.PositionResolver(None, classes={"image": (START, IMAGE, END)})
    assert resolver.positions(ids, "image") == [2, 3]
    assert resolver.positions(ids, "text") == [0, 5]  # as of `all-text`, the markers are no text
    assert iv.PositionResolver(None, model=tower_model("llava")).positions(ids, "text") == [0, 1, 4, 5]


def test_a_name_of_ones_own_wins():
    ids = torch.tensor([5, IMAGE, 6])
    resolver = iv.PositionResolver(None, names={"image": 0}, model=tower_model("llava"))
    assert resolver.positions(ids, "image") == [0]


def test_entries_with_the_names_go_through_json():
    entry = iv.RepresentationConfig(1, "block_output", where=["image", "last"])
    config = iv.IntervenableConfig([entry], iv.ZeroIntervention)
    again = iv.IntervenableConfig.model_validate_json(config.model_dump_json())
    assert again.representations[0].where == ["image", "last"]


# What cannot be told


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "image",
            "'image' in the base locations of 'layer_0.block_output.pos' stands for the tokens of pictures, and the"
            " model has none. Say Words('image') to look for the word.",
        ),
        (
            "text",
            "'text' in the base locations of 'layer_0.block_output.pos' is what is no picture and no sound, and the"
            " model has no tokens for these. Say 'all' for all tokens, and Words('text') to look for the word.",
        ),
    ],
)
def test_a_model_of_text_alone_has_no_such_positions(word, message):
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=72)
    )
    with pytest.raises(iv.LocationError) as caught:
        zeroed(model.eval(), {"input_ids": torch.tensor([[1, 2, 3]])}, [word])
    assert str(caught.value) == message


def test_a_prompt_without_a_picture_is_told_of():
    with pytest.raises(iv.LocationError, match="chooses nothing for example 1: its 3 tokens are all text"):
        zeroed(tower_model("llava"), inputs_with_ids([[5, IMAGE, 6], [5, 6, 7]]), ["image"])


def test_a_medium_that_the_model_does_not_read_is_told_of():
    with pytest.raises(
        iv.LocationError, match=r"of sounds, and the model has none\. It has some for pictures"
    ):
        zeroed(tower_model("llava"), inputs_with_ids([[5, IMAGE, 6]]), ["audio"])


def test_the_positions_of_a_tower_are_no_tokens():
    model, inputs = tower_model("llava"), tower_inputs("llava")
    with pytest.raises(iv.LocationError, match="what goes through a tower is not tokens"):
        zeroed(model, inputs, ["image"], "vision_block_output")


class Letters:
    """A tokenizer with a token for each letter."""

    def decode(self, ids):
        return "".join(map(chr, ids))


def test_the_word_can_still_be_looked_for():
    ids = [ord(letter) for letter in "a text, an image"]
    assert iv.positions(Letters(), ids, iv.Words("text")) == [2, 3, 4, 5]
    assert iv.positions(Letters(), ids, iv.Words("image")) == [11, 12, 13, 14, 15]
    with pytest.raises(iv.LocationError, match=r"Say Words\('image'\) to look for the word"):
        iv.positions(Letters(), ids, "image")
