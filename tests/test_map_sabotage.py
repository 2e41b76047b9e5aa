"""One mistake at a time, put into maps that are right: each has to be found, whatever it is."""

from __future__ import annotations

import pytest
import tiny_registry
from map_sabotage import Spoiled, spoilt
from torch import nn
from written_maps import find_map

from intervenable.map_inference import infer_map
from intervenable.map_trace import trace
from intervenable.map_verification import check_map
from model_maps import ModelMap
from tiny_models import DECODERS, ENCODERS, tiny, tiny_inputs

FAMILIES = [
    *((family, None) for family in (*DECODERS, *ENCODERS)),
    ("gpt_neox", "sequential"),
    ("opt", "post_norm"),
    ("bloom", "post_norm"),
    ("falcon", "grouped"),
    ("falcon", "sequential"),
    ("llama", "full"),
    ("t5", None),
]

INFERRED = (
    "apertus",
    "biogpt",
    "codegen",
    "cohere",
    "arcee",
    "granitemoe",
    "exaone4",
    "glm4",
    "gpt_bigcode",
    "granite",
    "granite_swa",
    "helium",
    "minicpm3",
    "minimax_m2",
    "mpt",
    "nemotron",
    "olmoe",
    "persimmon",
    "phi",
    "qwen3_moe",
    "roberta",
    "seed_oss",
    "stablelm",
    "starcoder2",
    "xglm",
)
"""Types without a row, whose layers are all of one kind."""


def not_found(model: nn.Module, spoiled: Spoiled, inputs) -> list[str]:
    """The components with a mistake that were not refused."""
    return [name for name in spoiled.components if name not in check_map(model, spoiled.map, inputs).refused]


def every_mistake_is_found(model: nn.Module, described: ModelMap, inputs) -> int:
    mistakes = list(spoilt(model, described, trace(model, inputs)))
    missed = {one.mistake: names for one in mistakes if (names := not_found(model, one, inputs))}
    assert missed == {}
    return len(mistakes)


def row_of(model: nn.Module) -> ModelMap:
    return find_map([base.__name__ for base in type(model).__mro__], model.config).for_config(model.config)


# What is left out of the usual run is asked for by the marker: the mistakes are the same everywhere.
USUAL = ("key_output", "value_output", "attention_", "mlp_", "block_mid", "block_output", "final_norm_output")


def test_mistakes_in_the_map_of_a_decoder_are_found():
    model = tiny("llama")
    inputs = tiny_inputs(model, batch=1, length=6)
    mistakes = [
        one
        for one in spoilt(model, row_of(model), trace(model, inputs))
        if one.mistake.startswith(USUAL) and "query_output and value" not in one.mistake
    ]
    assert len(mistakes) > 25
    assert {one.mistake: names for one in mistakes if (names := not_found(model, one, inputs))} == {}


@pytest.mark.registry
@pytest.mark.parametrize(("family", "variant"), FAMILIES)
def test_every_mistake_in_a_row_is_found(family, variant):
    model = tiny(family, variant=variant)
    assert every_mistake_is_found(model, row_of(model), tiny_inputs(model)) > 30


@pytest.mark.registry
@pytest.mark.parametrize("model_type", INFERRED)
def test_every_mistake_in_a_map_that_was_inferred_is_found(model_type):
    made = tiny_registry.build(model_type)
    described = check_map(made.model, infer_map(made.model, made.inputs), made.inputs).map
    assert check_map(made.model, described, made.inputs).refused == {}
    assert described.kinds == ()
    assert every_mistake_is_found(made.model, described, made.inputs) > 30
