"""What a tiny model of each task is run on."""

from __future__ import annotations

from typing import Any

import torch
from tiny_registry_fields import TOKENS
from torch import Tensor, nn

ROWS, LENGTH = 2, 7
"""Examples of a batch, and tokens of each."""

SAMPLES, FRAMES = 2000, 64
"""Length of sounds: as a wave, and as a spectrogram."""


def tiny_inputs(model: nn.Module, model_type: str, task: str, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs for a model, as its task asks for them."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    main = str(getattr(model, "main_input_name", "input_ids"))

    def tokens(length: int) -> Tensor:
        return torch.randint(*TOKENS, (ROWS, length), generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def image() -> Tensor:
        vision = getattr(config, "vision_config", config)
        size = getattr(vision, "image_size", None) or 32
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return normal(ROWS, getattr(vision, "num_channels", None) or 3, height, width)

    if task in ("causal-lm", "masked-lm", "image-text-to-text"):
        return {"input_ids": tokens(LENGTH)}
    if task == "seq2seq-lm":
        return {"input_ids": tokens(LENGTH), "decoder_input_ids": tokens(LENGTH - 1)}
    if task == "image-classification":
        return {main: image()}
    if task == "zero-shot":
        return {"input_ids": tokens(LENGTH), "pixel_values": image()}
    if main == "input_values":
        sound = {main: normal(ROWS, SAMPLES)}
    else:
        features = getattr(config, "num_mel_bins", None) or 80
        sound = {
            main: normal(ROWS, features, 2 * FRAMES)
            if model_type == "whisper"
            else normal(ROWS, FRAMES, features)
        }
    if task == "speech-seq2seq":
        sound["decoder_input_ids"] = tokens(LENGTH)
    return sound
