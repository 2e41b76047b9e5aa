"""The tokens that stand for pictures, films and sounds in a prompt, as a model's config names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEDIA = ("image", "video", "audio")
"""What tokens can stand for beside text."""

_FIELDS = ("{}_token_id", "{}_token_index")


def media_tokens(model: object) -> Mapping[str, tuple[int, ...]]:
    """For each medium that a model has tokens for their ids; also of a config, a processor or a tokenizer.

    Example:
        >>> from types import SimpleNamespace
        >>> media_tokens(SimpleNamespace(config=SimpleNamespace(image_token_id=7, audio_token_index=None)))
        {'image': (7,)}
    """
    config = getattr(model, "config", model)
    found = {medium: _ids(config, medium) for medium in MEDIA}
    return {medium: ids for medium, ids in found.items() if ids}


def _ids(config: object, medium: str) -> tuple[int, ...]:
    given: list[Any] = []
    for name in _FIELDS:
        value = getattr(config, name.format(medium), None)
        given += value if isinstance(value, (list, tuple)) else [value]
    whole = [value for value in given if isinstance(value, int) and not isinstance(value, bool)]
    return tuple(dict.fromkeys(whole))
