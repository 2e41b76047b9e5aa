"""Inputs in every form in which a model might want them, for one whose forward pass does not say what it needs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.map_config_fields import field_of, number_stated, parts_of
from intervenable.map_pictures import films, pictures, sounds

_PICTURES = ("pixel_values", "pixel_values_videos", "hidden_states")
"""What readers of pictures call them; the last where they are given patch by patch."""

_SOUNDS = ("input_features", "input_values")

_OTHERWISE = ("pixel_attention_mask", "spatial_shapes", "image_position_ids")
"""What is given beside pictures in some of their forms alone."""

_BOX = (10, 20, 30, 40)


def other_forms(
    model: nn.Module, plain: Mapping[str, Tensor], batch: int, seed: int = 0
) -> Iterator[dict[str, Tensor]]:
    """Inputs to try on a model that does not run on the plain ones, the likeliest first.

    Args:
        model: The model, with a config.
        plain: What its signature asks for, in the plain form of each: tokens, if it reads any, are taken from here.
        batch: Examples.
        seed: Of what is drawn.
    """
    config, takes = getattr(model, "config", None), inspect.signature(model.forward).parameters
    if config is None:
        return
    tokens = {name: value for name, value in plain.items() if name.endswith("input_ids")}
    words = tokens.get("input_ids")
    beside = dict(tokens) if words is None else {**tokens, **_beside_text(takes, config, words)}
    names = tuple(takes)
    for given in _media(config, names, batch, seed):
        renamed = _as_called(given, names)
        if renamed is None:
            continue
        yield {**renamed, **beside}
        if words is not None:
            begun = _with_placeholders(config, words, len(next(iter(renamed.values()))) // batch)
            if begun is not None:
                yield {**renamed, **beside, "input_ids": begun, **_beside_text(takes, config, begun)}
    if words is not None and len(beside) > len(tokens):
        yield beside
        if "bbox" in beside:
            yield {**beside, "bbox": beside["bbox"] / 1000}
    rows = _rows(config, names, batch, seed)
    if rows:
        yield {**rows, **beside}


def _media(config: Any, names: tuple[str, ...], count: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Pictures, films and sounds, as far as a model takes them."""
    if any(name in names for name in _PICTURES):
        yield from pictures(config, names, count, seed)
        yield from films(config, count, seed)
    if any(name in names for name in _SOUNDS):
        yield from sounds(config, names, count, seed)


def _as_called(given: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor] | None:
    """The same under the names that a model has for them; None if it does not take it in this form."""
    grids = any("grid" in name for name in given)
    found: dict[str, Tensor] = {}
    for name, value in given.items():
        if name in names:
            found[name] = value
        elif name == "pixel_values":
            others = [other for other in _PICTURES if other in names and (other != "hidden_states" or grids)]
            if not others:
                return None
            found[others[0]] = value
        elif name in _OTHERWISE:
            return None
    return found or None


def _beside_text(takes: Mapping[str, Any], config: Any, words: Tensor) -> dict[str, Tensor]:
    """What some models want to know of each token."""
    rows, length = words.shape[:2]
    found: dict[str, Tensor] = {}
    if "bbox" in takes:
        found["bbox"] = torch.tensor(_BOX).expand(rows, length, 4).clone()
    if "image_attention_mask" in takes:  # which of the pictures each token may look at
        found["image_attention_mask"] = torch.ones(rows, length, 1, dtype=torch.long)
    latent = field_of(config, "latent_query_num")
    if "image_embeds_position_mask" in takes and isinstance(latent, int):
        found["image_embeds_position_mask"] = (torch.arange(length) < latent).expand(rows, length).clone()
    return found


def _with_placeholders(config: Any, words: Tensor, pictures_each: int) -> Tensor | None:
    """Tokens after those that stand for a picture; None where a config does not say which, or how many."""
    parts = list(parts_of(config))
    token = number_stated(parts, "image_token_id", "image_token_index", "video_token_index")
    count = number_stated(parts, "num_query_tokens", "latent_query_num", "mm_tokens_per_image")
    if count is None:
        return None
    first = torch.full((len(words), count * max(1, pictures_each)), 0 if token is None else token)
    return torch.cat([first, words], -1)


def _rows(config: Any, names: tuple[str, ...], batch: int, seed: int) -> dict[str, Tensor] | None:
    """Vectors where a model reads vectors: embeddings, or what was seen in pictures."""
    generator = torch.Generator().manual_seed(seed)
    parts = list(parts_of(config))

    def normal(length: int, width: int) -> Tensor:
        return torch.randn(batch, length, width, generator=generator)

    width = number_stated(parts, "d_model", "hidden_size")
    if width is None:
        return None
    if "visual_feats" in names:
        seen = number_stated(parts, "visual_feat_dim")
        return None if seen is None else {"visual_feats": normal(5, seen), "visual_pos": normal(5, 4)}
    found = [name for name in ("inputs", "query_embeds", "inputs_embeds") if name in names]
    wanted = found[0] if found else None
    return None if wanted is None else {wanted: normal(7, width)}
