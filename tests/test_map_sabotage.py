"""One mistake at a time, put into maps that are right: each has to be found, whatever it is."""

from __future__ import annotations

import pytest
import tiny_registry
from map_sabotage_found import missed, of_two_layers, proved_map
from written_maps import find_map

from tiny_models import tiny, tiny_inputs

ROWS = (("llama", 8), ("gpt2", 16), ("olmo2", 16), ("t5", 60))
INFERRED = (
    ("deepseek_v3", "causal-lm", 30),
    ("qwen3_next", "causal-lm", 30),
    ("gpt_oss", "causal-lm", 20),
    ("mamba2", "causal-lm", 10),
    ("vit", "image-classification", 30),
    ("clip", "zero-shot", 60),
)
"""What is looked at in every run, and how few of the mistakes: of so many one."""

WHOLE = (
    ("llama", "causal-lm"),
    ("gpt2", "causal-lm"),
    ("olmo2", "causal-lm"),
    ("gpt_oss", "causal-lm"),
    ("mamba2", "causal-lm"),
    ("vit", "image-classification"),
)
"""Of which every mistake is made, in models of two layers; test_map_sabotage_everywhere.py has all families."""


@pytest.mark.parametrize(("family", "one_of"), ROWS)
def test_some_mistakes_in_a_row_are_found(family, one_of):
    model = tiny(family)
    row = find_map([base.__name__ for base in type(model).__mro__], model.config).for_config(model.config)
    assert missed(model, row, tiny_inputs(model), one_of) == {}


@pytest.mark.parametrize(("model_type", "task", "one_of"), INFERRED)
def test_some_mistakes_in_a_map_that_was_inferred_are_found(model_type, task, one_of):
    made = tiny_registry.build(model_type, task)
    assert missed(made.model, proved_map(made), made.inputs, one_of) == {}


@pytest.mark.registry
@pytest.mark.parametrize(("model_type", "task"), WHOLE)
def test_every_mistake_in_a_model_of_two_layers_is_found(model_type, task):
    made = of_two_layers(model_type, task)
    assert missed(made.model, proved_map(made), made.inputs) == {}
