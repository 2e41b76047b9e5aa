"""Collecting from models of two stacks, from perceptrons and any network, and where weights are kept elsewhere."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import accelerate
import pytest
import torch
from declared import hooks_of
from torch.testing import assert_close

import intervenable as iv
from tiny_models import ENCODER_DECODERS, tiny, tiny_inputs

# --- models of two stacks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_each_stack_is_read_at_its_own_positions(family):
    model = tiny(family, attention="eager")
    inputs = tiny_inputs(model, batch=3, padding="right")
    with torch.no_grad():
        told = model(**inputs, output_attentions=True, output_hidden_states=True)
    names = [
        "encoder_block_input",
        "decoder_block_input",
        "cross_attention_pattern",
        "encoder_attention_pattern",
    ]
    cache = iv.collect(model, inputs, names)
    for layer in range(3):
        assert_close(cache[names[0], layer], told.encoder_hidden_states[layer])
        assert_close(cache[names[1], layer], told.decoder_hidden_states[layer])
        assert_close(cache[names[2], layer], told.cross_attentions[layer], atol=1e-6, rtol=1e-5)
        assert_close(cache[names[3], layer], told.encoder_attentions[layer], atol=1e-6, rtol=1e-5)
    decoder = inputs["decoder_input_ids"].shape[1]
    assert cache.positions[names[1], 0].shape == (3, decoder)
    tokens = cache.layouts[names[2], 0].tokens
    assert tokens["query"].positions.shape == (3, decoder)
    assert tokens["key"].positions[2].tolist() == [0, 1, 2, 3, 4, -1, -1]
    last = iv.collect(model, inputs, names[2], 1, queries=-1, keys=[[0], [-1], [1, 0]])
    expected = cache.by_example((names[2], 1))
    for found, rows, keys in zip(last.by_example((names[2], 1)), expected, [[0], [5], [1, 0]], strict=True):
        assert torch.equal(found, rows[:, -1:][..., keys])


# --- other architectures ----------------------------------------------------------------------------------


def test_a_perceptron_has_one_position():
    model = iv.MLPClassifier(width=4, layers=2, classes=3)
    inputs = torch.randn(5, 4)
    cache = iv.collect(model, inputs, ["block_output"], positions=0, batch_size=2)
    with torch.no_grad():
        expected = iv.collect(model, inputs, "block_output")
    for key, value in cache.items():
        assert value.shape[:2] == (5, 1)
        assert_close(value, expected[key])


def test_any_module_of_any_network_is_read_by_its_path():
    parts = {"conv": torch.nn.Conv2d(1, 2, 3), "flat": torch.nn.Flatten(), "head": torch.nn.Linear(8, 3)}
    network = torch.nn.Sequential(OrderedDict(parts))
    images = torch.randn(4, 1, 4, 4)
    cache = iv.collect(network, images, ["conv.output", "head.input"])
    with torch.no_grad():
        assert_close(cache["conv.output"], network[0](images))
        assert_close(cache["head.input"].flatten(1), network[:2](images))
    assert cache.axes["conv.output"] == ("batch", "axis_1", "axis_2", "axis_3")


# --- weights elsewhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cpu", "disk"])
def test_offloaded_models_give_the_same_and_their_weights_go_back(how, tmp_path):
    here, model = tiny("llama"), tiny("llama")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    inputs = tiny_inputs(here)
    names = ["block_output", "attention_pattern", "head_attention_output", "mlp_hidden"]
    found, expected = (iv.collect(one, inputs, names, layers=[0, 1]) for one in (model, here))
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert all(parameter.is_meta for parameter in model.parameters())
    assert hooks_of(model) == {}


# --- the page ---------------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run_and_print_what_it_speaks_of(capsys):
    page = (Path(__file__).parents[1] / "docs" / "collecting.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for example in re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        exec(example, names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "ActivationCache with 4 activation(s)"
    assert printed[5] == "torch.Size([2, 1, 120]) ('batch', 'head', 'query', 'key')"
    assert printed[6] == "torch.Size([2, 5])"
    assert printed[-2:] == ["True", "True True torch.Size([2, 5])"]
