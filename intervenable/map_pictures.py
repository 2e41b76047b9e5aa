"""Pictures and sounds made up for the part of a model that reads them, in each form in which models want them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from intervenable.map_config_fields import field_of, number_stated, parts_of, sides_stated

_SIDE = 4
"""Patches along each side of a picture that is given patch by patch."""

_SAMPLES = 3840
"""Samples of a sound that is given as a wave: some read them in pieces of 1920 or of 640."""


def pictures(
    config: Any, names: tuple[str, ...], count: int = 2, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Pictures in every form in which models are given them, the likeliest first.

    Args:
        config: The config of the model, with a part about its tower.
        names: What the reader of the pictures can be given beside `pixel_values`.
        count: How many pictures.
        seed: Of the numbers in them.

    Example:
        >>> from transformers import LlavaConfig
        >>> forms = pictures(LlavaConfig(), ("pixel_values",))
        >>> {name: tuple(value.shape) for name, value in next(forms).items()}
        {'pixel_values': (2, 3, 336, 336)}
    """
    drawn = _Drawn(config, seed)
    channels = drawn.number("num_channels", "in_channels", "in_chans") or 3
    size = drawn.number("image_size", "img_size")
    patch = drawn.number("patch_size") or (size or 56) // _SIDE
    films = drawn.number("temporal_patch_size") or 1
    side = _SIDE * max(1, (drawn.number("spatial_merge_size") or 2) // 2)
    patches = side * side
    in_pixels = size or side * patch
    height, width = drawn.sides("image_size", "img_size") or (in_pixels, in_pixels)
    grids = [name for name in names if "grid" in name]
    if grids:
        grid = {name: _grid(name, side, count) for name in grids}
        for frames in dict.fromkeys((films, 1, 2)):
            yield {"pixel_values": drawn.normal(count * patches, channels * frames * patch**2), **grid}
        yield {"pixel_values": drawn.normal(count * patches, channels, patch, patch), **grid}
    places_called = next(
        (name for name in names if name in ("image_position_ids", "pixel_position_ids")), None
    )
    if places_called is not None:
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
        yield {
            "pixel_values": drawn.normal(count, patches, channels * patch**2),
            places_called: places.reshape(1, patches, 2).expand(count, -1, -1).contiguous(),
        }
    if "spatial_shapes" in names:
        yield {
            "pixel_values": drawn.normal(count, patches, channels * patch**2),
            "spatial_shapes": torch.full((count, 2), side),
            "pixel_attention_mask": torch.ones(count, patches, dtype=torch.long),
        }
    beside = {name: made for name in names if (made := _beside(name, in_pixels, patch, count)) is not None}
    yield {"pixel_values": drawn.normal(count, channels, height, width), **beside}
    one_each = drawn.normal(count, 1, channels, height, width)
    yield {"pixel_values": one_each, **beside}
    if "pixel_attention_mask" in names:
        # Of tiles first: where they are what is meant, a mask of pixels would choose as many tiles.
        yield {"pixel_values": one_each, "pixel_attention_mask": torch.ones(count, 1, dtype=torch.bool)}
        flat_mask = torch.ones(count, height, width, dtype=torch.long)
        yield {"pixel_values": one_each[:, 0], "pixel_attention_mask": flat_mask}
        whole = torch.ones(count, 1, height, width, dtype=torch.long)
        yield {"pixel_values": one_each, "pixel_attention_mask": whole}


def films(config: Any, count: int = 2, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Films, as `pixel_values`: examples, pictures of each, channels, height and width; the likeliest length first.

    Args:
        config: The config of the model.
        count: How many films.
        seed: Of the numbers in them.
    """
    drawn = _Drawn(config, seed)
    channels = drawn.number("num_channels", "in_channels", "in_chans") or 3
    size = drawn.number("image_size", "img_size", "crop_size") or 32
    stated = drawn.number("num_frames", "frames_per_clip")
    for frames in dict.fromkeys((*([stated] if stated else []), 2)):
        yield {"pixel_values": drawn.normal(count, frames, channels, size, size)}


def sounds(config: Any, names: tuple[str, ...], count: int = 2, seed: int = 0) -> Iterator[dict[str, Tensor]]:
    """Sounds in every form in which models are given them, the likeliest first.

    Args:
        config: The config of the model, with a part about its tower.
        names: What the reader of the sounds can be given.
        count: How many sounds.
        seed: Of the numbers in them.
    """
    drawn = _Drawn(config, seed, "audio_config")
    if "input_values" in names:
        yield {"input_values": drawn.normal(count, _SAMPLES)}
        yield {"input_values": drawn.normal(count, 1, _SAMPLES)}
        frames, bins = drawn.number("max_length"), drawn.number("num_mel_bins")
        if frames and bins:
            yield {"input_values": drawn.normal(count, frames, bins)}
    if "input_features" not in names:
        return
    bins = drawn.number("num_mel_bins", "feature_size", "input_dim") or 80
    places = drawn.number("max_source_positions")
    for frames in dict.fromkeys((2 * places if places else 64, 64, 128, 200)):
        mask = {name: torch.ones(count, frames, dtype=torch.long) for name in names if "mask" in name}
        lengths = {name: torch.full((count,), frames) for name in names if "length" in name}
        yield {"input_features": drawn.normal(count, bins, frames), **mask, **lengths}
        yield {"input_features": drawn.normal(count, frames, bins), **mask, **lengths}
    for together in (2, 4):  # several frames in one
        yield {"input_features": drawn.normal(count, 64, together * bins)}
    spectra = drawn.normal(count, 1, 64, bins)
    yield {
        "input_features": spectra,
        **({"is_longer": torch.zeros(count, 1)} if "is_longer" in names else {}),
    }


def _grid(name: str, side: int, count: int) -> Tensor:
    axes = [side, side] if name.endswith("hw") and not name.endswith("thw") else [1, side, side]
    return torch.tensor([axes] * count)


def _beside(name: str, size: int, patch: int, count: int) -> Tensor | None:
    """What some readers want to know about whole pictures."""
    if name in ("image_sizes", "target_sizes"):
        return torch.full((count, 2), size if name == "image_sizes" else size // patch)
    if name in ("batch_num_images", "image_merge_sizes"):
        return torch.ones(count, dtype=torch.long)
    return torch.ones(count, 5, dtype=torch.long) if name == "qformer_input_ids" else None


class _Drawn:
    """Random numbers, and the numbers of a config: those of the tower first."""

    def __init__(self, config: Any, seed: int, tower: str = "vision_config") -> None:
        own = field_of(config, tower)
        self._parts = [*([] if own is None else [own]), *parts_of(config)]
        self._generator = torch.Generator().manual_seed(seed)

    def number(self, *names: str) -> int | None:
        return number_stated(self._parts, *names)

    def sides(self, *names: str) -> tuple[int, int] | None:
        return sides_stated(self._parts, *names)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._generator)
