"""Tiny random models of every type that transformers registers for a task: nothing is downloaded.

    tiny = build("mixtral")
    tiny.model(**tiny.inputs)
    build("t5", "seq2seq-lm")

The default config of a type is walked, with the configs inside it, and each field whose name is known (`hidden_size`,
`n_embd`, `num_key_value_heads`) gets a small value; lists with an entry for each layer are cut so that every kind of
layer stays. `EXCEPTIONS` has what cannot be guessed. Several shapes are tried, grouped key-value heads first, and the
first that runs is taken.

Sizes can be told apart: hidden 32, 4 heads of 16 where the config says how wide a head is (64 columns, not 32) and of
8 otherwise, 2 key-value heads, MLP 48, vocabulary 160, 4 layers, windows of 4.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import transformers
from tiny_registry_configs import SHAPES, Shape, tiny_config
from tiny_registry_exceptions import UNBUILDABLE, UNBUILDABLE_FOR
from tiny_registry_fields import FIRST_SPECIAL, HEADS, TOKENS
from tiny_registry_inputs import tiny_inputs
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from intervenable.map_twin_scale import settle

__all__ = [
    "FIRST_SPECIAL",
    "HEADS",
    "SHAPES",
    "TASKS",
    "TOKENS",
    "UNBUILDABLE",
    "UNBUILDABLE_FOR",
    "Shape",
    "TinyModel",
    "build",
    "model_types",
    "registered",
    "spread_weights",
]

TASKS: Mapping[str, str] = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": "MASKED_LM",
    "seq2seq-lm": "SEQ_TO_SEQ_CAUSAL_LM",
    "image-text-to-text": "IMAGE_TEXT_TO_TEXT",
    "image-classification": "IMAGE_CLASSIFICATION",
    "zero-shot": "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "audio-classification": "AUDIO_CLASSIFICATION",
    "ctc": "CTC",
    "speech-seq2seq": "SPEECH_SEQ_2_SEQ",
}
"""Each task, and how transformers calls it in the name of its list of types."""

LARGEST = 4_000_000
"""A model of more parameters is not tiny: a field that its config is known by has been missed."""


@dataclass(frozen=True, eq=False)
class TinyModel:
    """A model of one type that runs, in evaluation mode."""

    model_type: str
    model: nn.Module
    inputs: Mapping[str, Tensor]
    shape: Shape
    task: str = "causal-lm"


def registered(task: str) -> Mapping[str, str | tuple[str, ...]]:
    """Every type that is registered for a task, with the name of its class."""
    found: Mapping[str, str | tuple[str, ...]] = getattr(
        modeling_auto, f"MODEL_FOR_{TASKS[task]}_MAPPING_NAMES"
    )
    return found


def model_types(task: str = "causal-lm") -> tuple[str, ...]:
    """Every type that is registered for a task and that a tiny model can be made of."""
    return tuple(name for name in registered(task) if name not in UNBUILDABLE_FOR[task])


def build(model_type: str, task: str = "causal-lm", *, seed: int = 0) -> TinyModel:
    """A tiny random model of this type, of the first of `SHAPES` that runs.

    Raises:
        Exception: none does; the error of the first.
    """
    errors = []
    with warnings.catch_warnings():
        # Of single types, about fields that are small or are going to be renamed.
        warnings.simplefilter("ignore")
        for shape in SHAPES:
            try:
                return _built(model_type, task, shape, seed)
            except Exception as error:
                errors.append(error)
    raise errors[0]


def _built(model_type: str, task: str, shape: Shape, seed: int) -> TinyModel:
    name = registered(task)[model_type]
    cls: type[nn.Module] = getattr(transformers, name if isinstance(name, str) else name[0])
    config = tiny_config(model_type, cls, shape, causal=task == "causal-lm")
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if size > LARGEST:
        raise ValueError(
            f"{model_type} still has {size / 1e6:.1f} M parameters: a field of its config is not known."
        )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = cls(config).eval().float()
    spread_weights(model, seed)
    inputs = tiny_inputs(model, model_type, task, seed)
    with torch.no_grad():
        output = settle(model, lambda: model(**inputs))
    logits = output.get("logits")
    if isinstance(logits, Tensor) and not torch.isfinite(logits[..., :FIRST_SPECIAL]).all():
        raise ValueError(f"The logits of {model_type} are not finite.")
    return TinyModel(model_type, model, inputs, shape, task)


def spread_weights(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a spread that makes all paths count: the usual deviation of 0.02 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor) -> Tensor:
        return torch.randn(parameter.shape, generator=generator).to(parameter.dtype)

    with torch.no_grad():
        for module in model.modules():
            table = getattr(module, "tid2eid", None)  # DeepSeek V4: the experts of each token, all 0 at first
            if isinstance(table, Tensor):
                order = torch.rand(len(table), module.num_experts, generator=generator).argsort(-1)
                table.copy_(order[:, : table.shape[-1]])
        for name, parameter in model.named_parameters():
            leaf = name.rpartition(".")[2]
            if not parameter.is_floating_point():
                continue
            if parameter.dim() >= 2 and leaf not in ("A_log", "conv_weight", "D"):
                if any(word in name for word in ("embed", "wte", "wpe", "word")):
                    parameter.copy_(normal(parameter))
                elif parameter.dim() == 2:
                    parameter.copy_(normal(parameter) / math.sqrt(parameter.shape[-1]))
                elif parameter.dim() == 3 and "conv" not in name:
                    parameter.copy_(normal(parameter) / math.sqrt(max(parameter.shape[-2:])))
                elif parameter.dim() == 4:  # of convolutions over images and spectra
                    parameter.copy_(normal(parameter) / math.sqrt(parameter[0].numel()))
            elif parameter.dim() == 1:
                bias = leaf == "bias" or (
                    leaf.endswith("_bias") and "dt" not in leaf and "correction" not in leaf
                )
                norm = "norm" in name.lower() or "ln" in name
                if bias or norm or float(parameter.abs().max()) < 1e-3:
                    parameter.add_(0.1 * normal(parameter))
