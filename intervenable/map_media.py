"""Towers run as their model runs them: what each is given when the model reads pictures or sounds made up for it.

A model that reads text and pictures has a method for the pictures alone. What that calls first, on pictures in the
one form of several that it takes, is the tower; with what it was given then, the tower can be run by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.hooks import Hook, hooked
from intervenable.map_pictures import pictures, sounds
from intervenable.passage import Passage
from model_maps import Stack

READERS: Mapping[Stack, tuple[str, Callable[[Any, tuple[str, ...], int], Iterator[dict[str, Tensor]]]]] = {
    "vision": ("get_image_features", pictures),
    "audio": ("get_audio_features", sounds),
}
"""Which tower -> how models call the method that reads for it, and what it may be given."""


@dataclass(frozen=True, eq=False)
class TowerCall:
    """One call of a tower that came to its end."""

    path: str
    module: nn.Module
    inputs: Mapping[str, Any]
    """What it was given, by keyword."""

    @property
    def rows(self) -> int:
        """The entries of the first axis of the numbers that it was given: pictures, or patches of all of them."""
        given = (value for value in self.inputs.values() if isinstance(value, Tensor))
        return next((len(value) for value in given if value.is_floating_point() and value.dim()), 0)


def tower_calls(model: nn.Module, role: Stack, count: int = 2) -> list[TowerCall]:
    """The outermost modules that a model calls to read pictures or sounds, in order; none if it cannot be made to.

    Args:
        model: The model.
        role: Whether pictures or sounds are to be read: one of `READERS`.
        count: How many are read.
    """
    name, make = READERS[role]
    readers = [(path, part) for path, part in model.named_modules() if callable(getattr(part, name, None))]
    # An outer one may hand on whatever it is given to the one that says what it takes.
    said = [(path, part) for path, part in readers if _named(getattr(part, name))]
    path, reader = next(iter(said or readers), ("", None))
    config = getattr(reader, "config", None)
    if reader is None or config is None:
        return []
    read = getattr(reader, name)
    takes = _named(read)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    for form in make(config, takes, count):
        given = {name: value.to(device) for name, value in form.items()}
        found = _calls(reader, path, lambda given=given: read(**given))  # type: ignore[misc]
        # What follows the tower may want more than was made up; the tower itself has run then.
        if found and _has_blocks(found[0].module):
            return found
    return []


def _named(function: Callable[..., object]) -> tuple[str, ...]:
    """The names of the parameters of a function."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(function).parameters
    return tuple(name for name, one in parameters.items() if one.kind not in several)


def rows_of_picture(inputs: Mapping[str, Any], rows: int) -> int:
    """How many rows of its inputs are one picture to a tower that is given the patches of all of them on one axis.

    Args:
        inputs: What the tower is given, with counts of patches along the sides of each picture.
        rows: How many rows there are.

    Example:
        >>> rows_of_picture({"grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}, 32)
        16
    """
    for name, item in inputs.items():
        counts = isinstance(item, Tensor) and item.dim() == 2 and not item.is_floating_point()
        if counts and "grid" in name and item.shape[1] in (2, 3):
            patches = set(item.prod(-1).tolist())
            if len(patches) == 1 and rows == len(item) * min(patches):
                return rows // len(item)
    return 1


def _has_blocks(module: nn.Module) -> bool:
    return any(isinstance(part, (nn.ModuleList, nn.Sequential)) and len(part) for part in module.modules())


def _calls(model: nn.Module, path: str, run: Callable[[], object]) -> list[TowerCall]:
    """The outermost calls inside a model that came to their end."""
    open_calls: list[nn.Module] = []
    found: list[TowerCall] = []
    given: dict[str, Any] = {}

    def entering(passage: Passage) -> None:
        if not open_calls:
            given.clear()
            given.update(_by_keyword(passage))
        open_calls.append(passage.module)

    def leaving(name: str) -> Callable[[Passage], None]:
        def act(passage: Passage) -> None:
            open_calls.pop()
            if not open_calls:
                whole = ".".join(part for part in (path, name) if part)
                found.append(TowerCall(whole, passage.module, dict(given)))

        return act

    hooks: list[Hook] = []
    for name, module in model.named_modules():
        if name:
            hooks += [Hook(module, "input", entering), Hook(module, "output", leaving(name))]
    with torch.no_grad(), hooked(hooks, model):
        try:
            run()
        except Exception:  # in words of the model's own: what was called before counts
            return found
    return found


def _by_keyword(passage: Passage) -> dict[str, Any]:
    """What a module is given, by the names of its parameters; not what it is to hand out besides."""
    bound = inspect.signature(passage.module.forward).bind(*passage.args, **passage.kwargs)
    given = dict(bound.arguments)
    for name, one in bound.signature.parameters.items():
        if one.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return {
        name: value.detach().clone() if isinstance(value, Tensor) else value
        for name, value in given.items()
        if not name.startswith("output_") and value is not None
    }
