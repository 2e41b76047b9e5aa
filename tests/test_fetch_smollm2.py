"""The script that puts real weights into the cache: how it treats the cache, and what the model knows."""

from __future__ import annotations

import pytest
import torch

from scripts.fetch_smollm2 import smollm2_folder
from scripts.from_wheels import move_into_place

FOLDER_NAME = "smollm2-135m-instruct"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("INTERVENABLE_CACHE", str(tmp_path))
    return tmp_path


def test_a_missing_model_says_how_to_get_it(cache):
    with pytest.raises(FileNotFoundError) as caught:
        smollm2_folder(download=False)
    assert str(caught.value) == (
        f"SmolLM2-135M-Instruct is not in {cache / FOLDER_NAME}.\n"
        "Run `python scripts/fetch_smollm2.py` once, or set INTERVENABLE_CACHE to where it is."
    )


def test_a_model_that_is_there_is_left_alone(cache):
    (cache / FOLDER_NAME).mkdir()
    weights = cache / FOLDER_NAME / "model.safetensors"
    weights.write_bytes(b"as they were")
    assert smollm2_folder() == cache / FOLDER_NAME
    assert weights.read_bytes() == b"as they were"


def test_a_model_that_another_process_finished_first_is_kept(cache):
    for name, text in ((FOLDER_NAME, "first"), ("converted", "second")):
        (cache / name).mkdir()
        (cache / name / "model.safetensors").write_text(text)
    move_into_place(cache / "converted", cache / FOLDER_NAME)
    assert (cache / FOLDER_NAME / "model.safetensors").read_text() == "first"


def test_a_folder_with_something_else_in_it_is_not_overwritten(cache):
    (cache / "converted").mkdir()
    (cache / FOLDER_NAME).mkdir()
    (cache / FOLDER_NAME / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError, match=r"exists but holds no model\.safetensors"):
        move_into_place(cache / "converted", cache / FOLDER_NAME)
    assert (cache / FOLDER_NAME / "notes.txt").read_text() == "mine"


@pytest.mark.smollm2
def test_the_real_model_knows_its_capitals_and_a_swap_turns_madrid_into_rome():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = smollm2_folder(download=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    base = tokenizer("The capital of Spain is", return_tensors="pt")
    source = tokenizer("The capital of Italy is", return_tensors="pt")
    madrid, rome = (tokenizer(word)["input_ids"][0] for word in (" Madrid", " Rome"))
    seen = {}

    def read(_module, _args, output):
        seen["source"] = output

    def swap(_module, _args, output):
        return torch.cat([output[:, :-1], seen["source"][:, -1:]], dim=1)

    def next_token(inputs, hook=None):
        handle = model.model.layers[24].register_forward_hook(hook) if hook else None
        with torch.inference_mode():
            probabilities = model(**inputs).logits[0, -1].softmax(-1)
        if handle:
            handle.remove()
        return probabilities

    plain, other, swapped = next_token(base), next_token(source, read), next_token(base, swap)
    assert plain.argmax() == madrid
    assert plain[madrid].item() == pytest.approx(0.377, abs=1e-3)
    assert other.argmax() == rome
    assert other[rome].item() == pytest.approx(0.380, abs=1e-3)
    assert swapped.argmax() == rome
