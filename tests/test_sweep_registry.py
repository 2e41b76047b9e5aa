"""Sweeps are right for every architecture, or say that they cannot be made; and what the comparison stands on."""

from __future__ import annotations

import os
import time

import pytest
import torch
from registry_sites import (
    Axes,
    Place,
    axes_of,
    block_list,
    blocks_called,
    last_logits,
    patched_by_hand,
)
from registry_survey import NAMED, PAGE, READ, TOLERANCE, Finding, Worker, one_pair, page, survey
from tiny_registry import SHAPES, UNBUILDABLE, build, model_types

import intervenable as iv

OF_MANY_KINDS = (
    "deepseek_v3",  # latent attention, experts
    "falcon_mamba",  # a state instead of a cache
    "gemma3n_text",  # several streams, [4, batch, positions, width]
    "gpt_bigcode",  # one key-value head, a loop that fixes shapes
    "jamba",  # states and attention in turn
    "mamba",
    "mixtral",
    "moshi",  # a window behind which its cache cannot be cut
    "openai-gpt",  # no cache
    "reformer",  # two streams, hashed attention, padded to a round length
    "rwkv",
    "xlnet",  # positions come first
)
"""What the whole registry is asked with `-m registry`, these are asked in every run."""


@pytest.mark.parametrize("model_type", OF_MANY_KINDS)
def test_a_sweep_is_what_one_pass_a_cell_gives_in(model_type):
    assert not faults(survey(model_type, brief=True))


@pytest.mark.registry
@pytest.mark.parametrize("model_type", model_types())
def test_a_sweep_of_any_architecture_is_what_one_pass_a_cell_gives(model_type, worker):
    found = worker.ask(survey, model_type)

    assert not faults(found)
    assert f"| {model_type} |" in PAGE.read_text()


@pytest.fixture(scope="module")
def worker():
    beside = Worker()
    yield beside
    beside.close()


def faults(found):
    """What was not right, or was compared in cells that a wrong value could not be told from."""
    return [one for one in found if one.verdict != "right" or not _tells(one)]


def _tells(one):
    """Whether a patch moves more than what is let pass, or a thousand times what the sweep is off by."""
    return one.moved >= 10 * TOLERANCE or 0 <= 1000 * one.error <= one.moved > 0


# --- what the comparison stands on ------------------------------------------------------------------------


def test_the_registry_is_that_of_transformers():
    assert len(model_types()) + len(UNBUILDABLE) >= 189
    assert {"llama", "gpt2", "mamba", "xlm"} <= set(model_types())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "deepseek_v3"])
def test_a_tiny_model_is_the_same_each_time(model_type):
    one, other = build(model_type), build(model_type)

    assert one.shape in SHAPES
    assert torch.equal(one.model(**one.inputs).logits, other.model(**other.inputs).logits)


@pytest.mark.parametrize(
    ("model_type", "path"),
    [
        ("bert", "bert.encoder.layer"),
        ("gpt2", "transformer.h"),
        ("llama", "model.layers"),
        ("mllama", "model.layers"),
        ("rwkv", "rwkv.blocks"),
    ],
)
def test_blocks_are_found_by_what_they_hand_on(model_type, path):
    tiny = build(model_type)
    assert block_list(tiny.model, tiny.inputs, model_type) == path


def test_a_block_that_no_image_reaches_is_not_swept():
    tiny = build("mllama")
    assert len(tiny.model.model.layers) == 4
    assert blocks_called(tiny.model, "model.layers", tiny.inputs) == (0, 1, 2)


@pytest.mark.parametrize(
    ("model_type", "path", "axes"),
    [
        ("llama", "model.layers", Axes(0, 1)),
        ("xlnet", "transformer.layer", Axes(1, 0)),
        ("gemma3n_text", "model.layers", Axes(1, 2)),
        ("reformer", "reformer.encoder.layers", Axes(0, 1)),
    ],
)
def test_axes_are_found_by_how_shapes_change(model_type, path, axes):
    model = build(model_type).model
    place = Place(dict(enumerate(model.get_submodule(path))))
    assert axes_of(model, place, one_pair(model).corrupted) == axes


def test_flattened_examples_are_told_apart():
    stream = torch.arange(24.0).view(2, 3, 4)
    flat = stream.view(6, 4)

    assert torch.equal(Axes(0, 0).at(flat, 1, batch=2), stream[:, 1])


def test_by_hand_patching_all_of_the_first_layer_gives_the_clean_run():
    model = build("llama").model
    pair = one_pair(model)
    place = Place(dict(enumerate(model.model.layers)))
    clean = last_logits(model, pair.clean, READ)
    both = {"input_ids": pair.corrupted["input_ids"].clone()}
    both["input_ids"][:, 4] = pair.clean["input_ids"][:, 4]

    cells = patched_by_hand(model, place, pair.clean, both, READ)

    assert torch.allclose(cells[0, 7], clean, atol=1e-5)  # the one token that still differs
    assert torch.allclose(cells[0, 5], last_logits(model, both, READ), atol=1e-5)


def test_a_part_that_only_some_blocks_have_is_swept_in_those():
    model = build("jamba").model
    pair = one_pair(model)
    place = Place({layer: model.model.layers[layer].self_attn for layer in (1, 3)}, "output")
    by_hand = patched_by_hand(model, place, pair.clean, pair.corrupted, READ)

    result = iv.patching.sweep(
        model,
        pair.clean,
        pair.corrupted,
        component="model.layers[{layer}].self_attn.output",
        metric=lambda logits: logits[:, -1, list(READ)],
        layers=[1, 3],
    )

    assert torch.allclose(result.values, by_hand, atol=1e-4)


def test_a_sweep_that_is_wrong_is_found_out():
    def off_by_one(model, clean, corrupted, **options):
        shifted = {**clean, "input_ids": clean["input_ids"].roll(1, 1)}
        return iv.patching.sweep(model, shifted, corrupted, **options)

    assert {one.verdict for one in survey("gpt2", off_by_one, brief=True)} == {"wrong"}


# --- a process beside this one ----------------------------------------------------------------------------


def _crash(model_type):
    os._exit(7)


def _hang(model_type):
    time.sleep(60)


def _stumble(model_type):
    raise ValueError(f"not {model_type}")


def _find(model_type):
    return [Finding(model_type, "path", "right")]


@pytest.mark.registry
def test_a_type_that_ends_its_process_is_a_finding_and_the_next_is_asked(worker):
    def said(function, seconds=60.0):
        (finding,) = worker.ask(function, "llama", seconds)
        return finding.verdict, finding.text

    assert said(_find) == ("right", "")
    assert said(_stumble) == ("failed", "ValueError: not llama")
    assert said(_crash) == ("failed", "the process ended with code 7")
    assert said(_hang, 0.5) == ("failed", "no answer after 0.5 seconds")
    assert said(_find) == ("right", "")


def test_the_page_counts_what_was_found():
    ways = ("9 of 9 cells were computed at once.", "Logits were computed at 1 of 11 positions.")
    text = page(
        [
            Finding("one", "path", "right", "h[{layer}].input", error=2e-7, shortcuts=ways),
            Finding("one", "part", "wrong", "h[{layer}].mlp.output"),
            Finding("one", NAMED[0], "right", NAMED[0]),
            Finding("two", "path", "refused", "layers[{layer}].input", text="InputError: no"),
        ]
    )

    assert "**0 of 2** types; wrong without an error: 1" in text
    assert "| one | `h` | right |  | mlp wrong | block_input | at once |" in text
    assert "- two, path: refused. InputError: no" in text
