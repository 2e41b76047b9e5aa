"""Which map describes a model: a registered one, or one that is made of the model itself.

Making a map runs the model (or a tiny twin of it) with the machinery that asks for maps here, so the maker is handed
in from above: `map_making` does so when the library is imported.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock

from torch import nn

from intervenable.unwrapping import prefixed, unwrapped
from model_maps import ModelMap, UnmappedModelError, find_map

Maker = Callable[[nn.Module], ModelMap]
"""Makes the map of a model; raises `UnmappedModelError` where it cannot."""

_KNOWN: weakref.WeakKeyDictionary[nn.Module, ModelMap] = weakref.WeakKeyDictionary()
_REFUSED: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
_MAKERS: list[Maker] = []
_LOCK = RLock()


def map_of(model: nn.Module) -> ModelMap:
    """The map of a model: what was remembered for it, a registered row of its class, or one newly made.

    Raises:
        UnmappedModelError: none is registered and none could be made; the message says why and the ways out.
    """
    known = _KNOWN.get(model)
    if known is not None:
        return known
    row = registered_map(model)
    if row is not None:
        return row
    inside, prefix = unwrapped(model)
    if prefix:
        return prefixed(map_of(inside), prefix)
    with _LOCK:
        known = _KNOWN.get(model)  # another thread may have been at it
        if known is None:
            known = _KNOWN[model] = _made(model)
    return known


def registered_map(model: nn.Module) -> ModelMap | None:
    """The registered map of a model's class, as its config calls for it; None if there is none."""
    try:
        return find_map([cls.__name__ for cls in type(model).__mro__], getattr(model, "config", None))
    except UnmappedModelError:
        return None


def remember(model: nn.Module, model_map: ModelMap) -> None:
    """Let a map describe one model from now on, whatever is registered for its class."""
    _KNOWN[model] = model_map


def forget(model: nn.Module) -> None:
    """Look the map of a model up anew the next time it is asked for."""
    _KNOWN.pop(model, None)
    _REFUSED.pop(model, None)


@contextmanager
def described_by(model: nn.Module, model_map: ModelMap) -> Iterator[None]:
    """Run the block with a map for one model, and have what was there before afterwards."""
    before = _KNOWN.get(model)
    remember(model, model_map)
    try:
        yield
    finally:
        if before is None:
            forget(model)
        else:
            remember(model, before)


def use_maker(maker: Maker) -> None:
    """Let a function make the maps of models that have none."""
    _MAKERS[:] = [maker]


def _made(model: nn.Module) -> ModelMap:
    if not _MAKERS:
        return find_map([cls.__name__ for cls in type(model).__mro__])  # raises, and says the ways out
    if model in _REFUSED:  # once is enough
        raise UnmappedModelError(_REFUSED[model])
    try:
        return _MAKERS[0](model)
    except UnmappedModelError as error:
        _REFUSED[model] = str(error)
        raise
