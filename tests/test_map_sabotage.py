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
from tiny_models import CASES, ENCODER_DECODER_CASES, RECURRENT, tiny, tiny_inputs

ROWS = [
    *(case for case in CASES if case[0] not in RECURRENT),
    *ENCODER_DECODER_CASES,
]

INFERRED = (
    ("apertus", "causal-lm"),
    ("arcee", "causal-lm"),
    ("biogpt", "causal-lm"),
    ("codegen", "causal-lm"),
    ("cohere", "causal-lm"),
    ("deepseek_v3", "causal-lm"),
    ("exaone4", "causal-lm"),
    ("glm4", "causal-lm"),
    ("gpt_bigcode", "causal-lm"),
    ("granite", "causal-lm"),
    ("granitemoe", "causal-lm"),
    ("granitemoehybrid", "causal-lm"),
    ("jamba", "causal-lm"),
    ("minicpm3", "causal-lm"),
    ("minimax_m2", "causal-lm"),
    ("mpt", "causal-lm"),
    ("nemotron", "causal-lm"),
    ("olmoe", "causal-lm"),
    ("persimmon", "causal-lm"),
    ("phi", "causal-lm"),
    ("qwen3_moe", "causal-lm"),
    ("qwen3_next", "causal-lm"),
    ("roberta", "causal-lm"),
    ("stablelm", "causal-lm"),
    ("starcoder2", "causal-lm"),
    ("xglm", "causal-lm"),
    ("bart", "seq2seq-lm"),
    ("whisper", "speech-seq2seq"),
    ("deberta-v2", "masked-lm"),
    ("vit", "image-classification"),
)
"""Types without a written map: fused and latent heads, layers of several kinds, norms behind, two stacks, a tower."""

USUAL_ROWS = (("llama", None, 3), ("gpt2", None, 7), ("olmo2", None, 7), ("t5", None, 40))
USUAL_INFERRED = (
    ("deepseek_v3", "causal-lm", 12),
    ("qwen3_next", "causal-lm", 12),
    ("vit", "image-classification", 12),
)
"""What is looked at in every run, and how few of the mistakes: of so many one."""


def not_found(model: nn.Module, spoiled: Spoiled, inputs) -> list[str]:
    """The components with a mistake that were not refused."""
    return [name for name in spoiled.components if name not in check_map(model, spoiled.map, inputs).refused]


def the_mistakes_are_found(model: nn.Module, described: ModelMap, inputs, one_of: int = 1) -> None:
    mistakes = list(spoilt(model, described, trace(model, inputs)))
    assert len(mistakes) > 50
    missed = {one.mistake: names for one in mistakes[::one_of] if (names := not_found(model, one, inputs))}
    assert missed == {}


def row_of(model: nn.Module) -> ModelMap:
    return find_map([base.__name__ for base in type(model).__mro__], model.config).for_config(model.config)


def mistakes_in_a_row_are_found(family: str, variant: str | None, one_of: int = 1) -> None:
    model = tiny(family, variant=variant)
    the_mistakes_are_found(model, row_of(model), tiny_inputs(model), one_of)


def mistakes_in_a_map_that_was_inferred_are_found(model_type: str, task: str, one_of: int = 1) -> None:
    made = tiny_registry.build(model_type, task)
    described = check_map(made.model, infer_map(made.model, made.inputs), made.inputs).map
    assert check_map(made.model, described, made.inputs).refused == {}
    the_mistakes_are_found(made.model, described, made.inputs, one_of)


@pytest.mark.parametrize(("family", "variant", "one_of"), USUAL_ROWS)
def test_some_mistakes_in_a_row_are_found(family, variant, one_of):
    mistakes_in_a_row_are_found(family, variant, one_of)


@pytest.mark.parametrize(("model_type", "task", "one_of"), USUAL_INFERRED)
def test_some_mistakes_in_a_map_that_was_inferred_are_found(model_type, task, one_of):
    mistakes_in_a_map_that_was_inferred_are_found(model_type, task, one_of)


@pytest.mark.registry
@pytest.mark.parametrize(("family", "variant"), ROWS)
def test_every_mistake_in_a_row_is_found(family, variant):
    mistakes_in_a_row_are_found(family, variant)


@pytest.mark.registry
@pytest.mark.parametrize(("model_type", "task"), INFERRED)
def test_every_mistake_in_a_map_that_was_inferred_is_found(model_type, task):
    mistakes_in_a_map_that_was_inferred_are_found(model_type, task)
