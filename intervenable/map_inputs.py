"""Inputs made up for a model: enough for a forward pass, drawn from a seed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import InputError
from intervenable.map_config_fields import field_of, number_stated, parts_of, sides_stated
from intervenable.map_input_forms import other_forms
from intervenable.unwrapping import unwrapped

_SPECIAL = re.compile(r"(token_id|token_ids|token_index|_index)$")
_PLACEHOLDERS = ("image_token_id", "image_token_index", "audio_token_id")
"""Fields of models that read pictures or sounds where a text has tokens of theirs, and texts without them as well."""

_TOKENS = {"input_ids", "decoder_input_ids"}
_BESIDE_TOKENS = ("bbox", "visual_feats", "pixel_values_videos")
"""What some models do not run without, though their signature has a default for it."""

_PLAIN_TOKENS = range(10, 90)
"""Where ids are drawn from if the vocabulary has them: few models have special ones there."""


def example_inputs(model: nn.Module, *, batch: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with which a model can run once, by keyword: random tokens, pictures or sounds of its own sizes.

    Args:
        model: The model, on any device.
        batch: Examples.
        length: Positions of a text; a decoder gets one fewer, so that its positions can be told apart.
        seed: Other seeds give other contents of the same shape.

    Raises:
        InputError: it needs inputs that cannot be guessed; the message names them.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> inputs = example_inputs(GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=1, vocab_size=99)))
        >>> {name: tuple(value.shape) for name, value in inputs.items()}
        {'input_ids': (2, 7)}
    """
    inner = unwrapped(model).module
    takes = inspect.signature(inner.forward).parameters
    drawn = _Drawn(inner, batch, length, seed)
    wanted = _wanted(inner, takes)
    unknown = [name for name in wanted if name not in _MAKERS]
    device = _device_of(inner)
    inputs = {name: _MAKERS[name](drawn).to(device) for name in wanted if name in _MAKERS}
    tellable = not any(parameter.is_meta for parameter in inner.parameters())
    if tellable and (unknown or not wanted or (_reads_media(takes) and not _runs(inner, inputs))):
        for form in other_forms(inner, inputs, batch, seed):
            moved = {name: value.to(device) for name, value in form.items()}
            if _runs(inner, moved):
                return moved
    if unknown or not wanted:
        needs = ", ".join(map(repr, unknown)) or "inputs that its signature does not name"
        raise InputError(
            f"What {type(inner).__name__} runs on cannot be guessed: it needs {needs}."
            "\nPass example_inputs=, a mapping of its keyword inputs with at least two examples."
        )
    made_by_itself = not hasattr(inner, "prepare_decoder_input_ids_from_labels")
    if "decoder_input_ids" in inputs and made_by_itself and not _runs(inner, inputs):
        # One that looks for the end of its input in what the decoder gives.
        ended = inputs["input_ids"].clone()
        ended[:, -1] = drawn.number("eos_token_id") or 1
        if _runs(inner, {"input_ids": ended}):
            return {"input_ids": ended}
    return inputs


def _reads_media(takes: Mapping[str, inspect.Parameter]) -> bool:
    """Whether a model reads something beside tokens, of which there are several forms."""
    return any(name in takes for name in (*_MAKERS.keys() - _TOKENS, *_BESIDE_TOKENS))


def _runs(model: nn.Module, inputs: Mapping[str, Tensor]) -> bool:
    if any(parameter.is_meta for parameter in model.parameters()):
        return True  # it cannot be told
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception:
        return False
    return True


def _wanted(model: nn.Module, takes: Mapping[str, inspect.Parameter]) -> list[str]:
    """The inputs to give: those without a default, the main one, and what a decoder or a second tower reads."""
    usual = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [
        name for name, one in takes.items() if one.kind in usual and one.default is inspect.Parameter.empty
    ]
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None) if config is not None else None
    if "input_ids" in takes and main != "input_ids" and any(_says(config, name) for name in _PLACEHOLDERS):
        main = "input_ids"  # a text without a picture will do
    if main in takes and main not in names:
        names.insert(0, str(main))
    if "decoder_input_ids" in takes and (field_of(config, "is_encoder_decoder") or main != "input_ids"):
        names.append("decoder_input_ids")
    towers = field_of(config, "text_config") is not None and field_of(config, "vision_config") is not None
    if towers and not any(_says(config, name) for name in _PLACEHOLDERS):
        names += [name for name in ("input_ids", "pixel_values") if name in takes]
    if "input_ids" in takes and "bbox" in takes and "pixel_values" in takes and "input_ids" not in names:
        names.append("input_ids")
    return list(dict.fromkeys(names))


def _says(config: Any, name: str) -> bool:
    return isinstance(field_of(config, name), int)


class _Drawn:
    """What is drawn for one model."""

    def __init__(self, model: nn.Module, batch: int, length: int, seed: int) -> None:
        self.model = model
        self.config = getattr(model, "config", None)
        self.batch, self.length = batch, length
        self._generator = torch.Generator().manual_seed(seed)

    def tokens(self, length: int) -> Tensor:
        """Ids of ordinary tokens."""
        embeddings = [
            module.num_embeddings for module in self.model.modules() if isinstance(module, nn.Embedding)
        ]
        vocabulary = (
            self.number("vocab_size") or self.number("text_vocab_size") or min(embeddings, default=100)
        )
        vocabulary = min(vocabulary, _rows_of_tokens(self.model) or vocabulary)
        special = {item for part in self._parts() for item in _special_tokens(part)}
        plain = [token for token in _PLAIN_TOKENS if token < vocabulary and token not in special]
        allowed = torch.tensor(plain or [token for token in range(vocabulary) if token not in special] or [0])
        chosen = torch.randint(len(allowed), (self.batch, length), generator=self._generator)
        return allowed[chosen]

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(self.batch, *shape, generator=self._generator)

    def number(self, name: str, otherwise: int | None = None, *, within: str = "") -> int | None:
        """A number that the config or a part of it gives; `within` says which part is asked first."""
        stated = number_stated(self._parts(within), name)
        return otherwise if stated is None else stated

    def sides(self, name: str, *, within: str = "") -> tuple[int, int] | None:
        """Height and width that the config or a part of it gives."""
        return sides_stated(self._parts(within), name)

    def _parts(self, within: str = "") -> list[Any]:
        """The config and the parts of it; in front the part of the name `within`, and the one about text."""
        if self.config is None:
            return []
        first = field_of(self.config, within) if within else None
        texts = getattr(self.config, "get_text_config", None)
        try:
            text = [texts()] if callable(texts) else []
        except ValueError:  # more than one tower reads text
            text = []
        return [*([] if first is None else [first]), *text, *parts_of(self.config)]


def _rows_of_tokens(model: nn.Module) -> int | None:
    """How many tokens the embedding of a model has, whatever its config says; None if it cannot be told."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found.num_embeddings if isinstance(found, nn.Embedding) else None


def _special_tokens(config: Any) -> list[int]:
    found: list[int] = []
    for name, value in vars(config).items():
        if _SPECIAL.search(name):
            found += [
                item
                for item in (value if isinstance(value, (list, tuple)) else [value])
                if isinstance(item, int)
            ]
    return found


def _pictures(drawn: _Drawn) -> Tensor:
    height, width = drawn.sides("image_size", within="vision_config") or drawn.sides("img_size") or (64, 64)
    channels = drawn.number("num_channels", within="vision_config") or drawn.number("in_channels", 3) or 3
    return drawn.normal(channels, height, width)


def _sounds(drawn: _Drawn) -> Tensor:
    return drawn.normal(2000)


def _spectra(drawn: _Drawn) -> Tensor:
    bins = (
        drawn.number("num_mel_bins")
        or drawn.number("feature_projection_input_dim")
        or drawn.number("input_dim", 80)
    )
    assert bins is not None
    places = drawn.number("max_source_positions")
    # Whisper's convolutions want bins first, and exactly twice as many frames as it has positions.
    convolved = field_of(drawn.config, "conv_kernel_sizes") is None and any(
        isinstance(module, nn.Conv1d) and module.in_channels == bins for module in drawn.model.modules()
    )
    return drawn.normal(bins, 2 * places) if convolved and places else drawn.normal(64, bins)


_MAKERS: Mapping[str, Callable[[_Drawn], Tensor]] = {
    "input_ids": lambda drawn: drawn.tokens(drawn.length),
    "decoder_input_ids": lambda drawn: drawn.tokens(drawn.length - 1),
    "pixel_values": _pictures,
    "input_values": _sounds,
    "input_features": _spectra,
}
"""How each input is made."""


def _device_of(model: nn.Module) -> torch.device:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device
