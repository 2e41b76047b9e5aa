"""What a tiny model of each task is run on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from tiny_registry_fields import TOKENS
from torch import Tensor, nn

ROWS, LENGTH = 2, 7
"""Examples of a batch, and tokens of each."""

SAMPLES, FRAMES = 4000, 64
"""Length of sounds: as a wave, and as a spectrogram."""

SEES = (
    "blip",
    "blip-2",
    "idefics",
    "instructblip",
    "instructblipvideo",
    "kosmos-2",
    "shieldgemma2",
)
"""Types that run on an image and text, and not on text alone."""


def tiny_inputs(model: nn.Module, model_type: str, task: str, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs for a model, as its task asks for them."""
    drawn = _Drawn(model, model_type, seed)
    if task in ("causal-lm", "masked-lm"):
        return {"input_ids": drawn.tokens()}
    if task == "seq2seq-lm":
        return {**drawn.main(), "decoder_input_ids": drawn.tokens(LENGTH - 1)}
    if task == "image-text-to-text":
        inputs = drawn.main()
        if model_type in SEES:
            inputs = {"input_ids": drawn.with_image_tokens(), **drawn.image()}
        if "bbox" in drawn.takes:
            inputs["bbox"] = torch.rand((ROWS, LENGTH, 4), generator=drawn.generator).sort(-1).values
        if getattr(model.config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = drawn.tokens(LENGTH - 1)
        elif "decoder_input_ids" in drawn.takes and "input_ids" not in inputs:
            inputs["decoder_input_ids"] = drawn.tokens()
        return {**inputs, **drawn.wanted(inputs)}
    if task == "image-classification":
        if model_type in SEES:
            return {"input_ids": drawn.with_image_tokens(), **drawn.image()}
        return drawn.main()
    if task == "zero-shot":
        return {"input_ids": drawn.tokens(), **drawn.image()}
    sound = drawn.main()
    if task == "speech-seq2seq" and "decoder_input_ids" in drawn.takes:
        channels = getattr(getattr(model.config, "decoder_config", None), "num_channels", None)
        ids = drawn.tokens()
        sound["decoder_input_ids"] = ids if channels is None else ids[..., None].expand(-1, -1, channels)
    return sound


class _Drawn:
    """Inputs of single kinds for one model."""

    def __init__(self, model: nn.Module, model_type: str, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.model, self.model_type = model, model_type
        self.config: Any = model.config
        self.takes = inspect.signature(model.forward).parameters

    def tokens(self, length: int = LENGTH) -> Tensor:
        return torch.randint(*TOKENS, (ROWS, length), generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn((ROWS, *shape), generator=self.generator)

    def main(self) -> dict[str, Tensor]:
        """What the model calls its main input."""
        name = str(getattr(self.model, "main_input_name", "input_ids"))
        if name in ("input_ids", "decoder_input_ids"):
            ids = self.tokens()
            if self.model_type == "kyutai_speech_to_text":  # a text and two code books
                ids = torch.stack([ids] * (self.config.num_codebooks + 1), -1)
            return {"input_ids": ids}
        if name.startswith("pixel_values"):
            return self.image()
        if name == "flattened_patches":
            width = self.config.vision_config.patch_embed_hidden_size
            at = torch.arange(1, 7).view(1, 6, 1).expand(ROWS, 6, 2)
            return {name: torch.cat([at.float(), self.normal(6, width)], -1)}
        if name == "inputs" and "pixel_values" in self.takes:
            return self.image()
        if name == "inputs":
            name = next(known for known in ("input_values", "input_ids", "inputs") if known in self.takes)
            return {name: self.tokens() if self.model_type == "perceiver" else self.normal(SAMPLES)}
        return {name: self.sound(name)}

    def image(self) -> dict[str, Tensor]:
        """Images, in the form in which the model takes them."""
        vision: Any = self.config
        for part in ("vision_config", "encoder"):
            vision = getattr(vision, part, None) or vision
        channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
        channels = channels if isinstance(channels, int) else 3
        if getattr(vision, "num_patches", None) and self.model_type == "siglip2":
            grid = 4
            return {
                "pixel_values": self.normal(grid * grid, channels * vision.patch_size**2),
                "pixel_attention_mask": torch.ones(ROWS, grid * grid, dtype=torch.long),
                "spatial_shapes": torch.tensor([[grid, grid]] * ROWS),
            }
        size = getattr(vision, "image_size", None) or 64
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        name = (
            "pixel_values_videos"
            if "pixel_values_videos" in self.takes and "pixel_values" not in self.takes
            else "pixel_values"
        )
        frames = {"idefics": (1,), "instructblipvideo": (2,), "videoprism": (16,)}.get(self.model_type, ())
        images = {name: self.normal(*frames, channels, height, width)}
        if self.model_type == "idefics":
            images["image_attention_mask"] = torch.ones(ROWS, LENGTH, 1, dtype=torch.long)
        if self.model_type == "kosmos-2":
            images["image_embeds_position_mask"] = (
                torch.arange(LENGTH) < self.config.latent_query_num
            ).expand(ROWS, LENGTH)
        return images

    def with_image_tokens(self) -> Tensor:
        """Tokens, the first of which stand for the image."""
        token = getattr(self.config, "image_token_index", None) or getattr(
            self.config, "image_token_id", None
        )
        count = getattr(self.config, "num_query_tokens", None) or getattr(
            self.config, "mm_tokens_per_image", None
        )
        ids = self.tokens()
        if token is None or count is None:
            return ids
        frames = 2 if self.model_type == "instructblipvideo" else 1
        return torch.cat([torch.full((ROWS, count * frames), token), ids], -1)

    def sound(self, name: str) -> Tensor:
        """Sounds: waves or spectrograms."""
        if self.model_type == "granite_speech5_ctc":  # four frames in one
            return self.normal(FRAMES, 4 * self.config.encoder_config.num_mel_bins)
        if name == "input_values" and self.model_type != "audio-spectrogram-transformer":
            return self.normal(*((1,) if self.model_type == "dac" else ()), SAMPLES)
        parts = [
            self.config,
            *(getattr(self.config, part, None) for part in ("audio_config", "encoder_config")),
        ]
        features = next(
            (
                value
                for part in parts
                for field in ("feature_projection_input_dim", "num_mel_bins")
                if isinstance(value := getattr(part, field, None), int)
            ),
            getattr(self.config, "d_model", 80) if self.model_type == "pop2piano" else 80,
        )
        if self.model_type in ("whisper", "voxtral_realtime"):
            return self.normal(features, 2 * FRAMES)
        if self.model_type == "moonshine":
            return self.normal(SAMPLES)
        return self.normal(FRAMES, features)

    def wanted(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What else the forward pass has no default for."""
        names = [
            name
            for name, one in self.takes.items()
            if one.default is inspect.Parameter.empty
            and one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
            and name not in given
        ]
        found: dict[str, Tensor] = {}
        for name in names:
            found |= self.image() if name.startswith("pixel_values") else {name: self.tokens()}
        return found
