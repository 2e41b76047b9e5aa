"""The wrapped model itself, saved beside its interventions and loaded by a fixed table of classes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from intervenable.errors import ConfigError, StorageError
from intervenable.saving_interventions import REMEDY
from intervenable.toy_models import MLPClassifier

LOADERS = (
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModel",
)
"""Classes of transformers that load models, with code that is installed here and no other."""
KERNELS = ("eager", "sdpa")
PERCEPTRON = "MLPClassifier"
PERCEPTRON_FILE = "model.safetensors"


def loader_of(model: nn.Module) -> str:
    """Which of the loaders brings back models of this class.

    Raises:
        ConfigError: none does.
    """
    if type(model) is MLPClassifier:
        return PERCEPTRON
    import transformers

    for name in LOADERS if isinstance(model, transformers.PreTrainedModel) else ():
        mapping = getattr(transformers, name)._model_mapping
        if type(model.config) in mapping and type(model) in _classes(mapping[type(model.config)]):
            return name
    raise ConfigError(
        f"A {type(model).__name__} cannot be saved along: no class of transformers loads it by its config alone."
        " Leave include_model out, and save the model by itself."
    )


def attention_of(model: nn.Module) -> str | None:
    """By which of the kernels that are everywhere a model computes its attention; they round in their own ways."""
    name = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return name if name in KERNELS else None


def model_writer(model: nn.Module) -> tuple[str, Callable[[Path], None]]:
    """A digest of a model, and what writes it into a folder."""
    return _digest(model), lambda folder: _write(model, folder)


def load_model(
    folder: Path | None, loader: str | None, class_name: str, attention: str | None, around: Path
) -> nn.Module:
    """The model in a folder.

    Raises:
        ConfigError: no model was saved.
        StorageError: it cannot be loaded, or is another than it should be.
    """
    if folder is None or loader is None:
        raise ConfigError(
            f"No model was saved in {around}: give the {class_name} that the interventions are for, as model=..."
        )
    if loader not in (*LOADERS, PERCEPTRON):
        raise StorageError(
            f"{around} wants its model loaded by {loader!r}, which is none of: {', '.join(LOADERS)}. {REMEDY}"
        )
    try:
        if loader == PERCEPTRON:
            model: Any = _perceptron(folder)
        else:
            import transformers

            options = {"attn_implementation": attention} if attention in KERNELS else {}
            model = getattr(transformers, loader).from_pretrained(
                folder,
                dtype="auto",
                trust_remote_code=False,
                use_safetensors=True,
                local_files_only=True,
                **options,
            )
    except Exception as error:  # transformers raises many kinds
        raise StorageError(f"The model in {folder} cannot be loaded: {error} {REMEDY}") from error
    if type(model).__name__ != class_name:
        raise StorageError(
            f"{folder} holds a {type(model).__name__}, and should hold a {class_name}. {REMEDY}"
        )
    loaded: nn.Module = model.eval()
    return loaded


def _classes(entry: Any) -> tuple[type, ...]:
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def _write(model: nn.Module, folder: Path) -> None:
    if isinstance(model, MLPClassifier):
        from safetensors.torch import save_file

        save_file(
            {name: weight.detach().cpu().contiguous() for name, weight in model.state_dict().items()},
            folder / PERCEPTRON_FILE,
        )
        return
    model.save_pretrained(folder)  # type: ignore[operator]  # loader_of has let models of transformers through alone


def _perceptron(folder: Path) -> MLPClassifier:
    """A perceptron of the sizes that its weights have."""
    from safetensors.torch import load_file

    weights = load_file(folder / PERCEPTRON_FILE)
    classes, width = weights["score.weight"].shape
    layers = sum(name.endswith("linear.weight") for name in weights)
    model = MLPClassifier(width, layers, classes).to(weights["score.weight"].dtype)
    model.load_state_dict(weights)
    return model


def _digest(model: nn.Module) -> str:
    """Sixteen hexadecimal digits that tell the weights and the config of a model from others."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256(repr(config).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.numel():
            digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
