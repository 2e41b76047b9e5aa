"""How many examples and positions a stack of blocks has in a run, where that does not follow from token ids.

A picture becomes patches and a sound becomes frames in the model's own code, so a short run tells: it ends where the
first block of the stack is entered. What it found is remembered for the model and for inputs of these shapes.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from intervenable.digests import digest_of
from intervenable.errors import InputError
from intervenable.evaluation_mode import evaluating
from intervenable.hooks import EarlyStop, Hook, hooked
from intervenable.maps import map_of
from intervenable.media_tokens import media_tokens
from intervenable.passage import Passage
from intervenable.signatures import forward_signature
from intervenable.unwrapping import unwrapped
from model_maps import ModelMap, Site, Stack, UnmappedModelError, path_in_layer

OF_TOWERS = (
    "pixel_",
    "image",
    "video",
    "audio",
    "input_features",
    "input_values",
    "feature_attention_mask",
    "flattened_patches",
    "spatial_shapes",
    "aspect_ratio",
)
"""How the names of inputs begin that are pictures, films and sounds, or say something of these."""

REMEMBERED = 256
"""Shapes of inputs that are remembered for one model."""


class StackSize(NamedTuple):
    """What is counted in one stack in one run."""

    batch: int
    """Examples; in a tower, pictures or sounds."""

    length: int
    """Positions of each."""


@lru_cache(maxsize=1024)
def is_of_towers(name: str) -> bool:
    """Whether an input of this name is a picture, a film or a sound, or says something of one.

    Example:
        >>> is_of_towers("pixel_values"), is_of_towers("image_grid_thw"), is_of_towers("input_ids")
        (True, True, False)
    """
    return name.startswith(OF_TOWERS)


def is_by_picture(name: str, item: Tensor, batch: int, length: int) -> bool:
    """Whether an input has an entry for each picture or sound, for a patch or code of one, and not for each example.

    Those of all examples lie behind each other then, so that what is given several times is given as a whole.

    Args:
        name: Of the input.
        item: The input.
        batch: Examples of the run.
        length: Positions of each.
    """
    of_tokens = not item.is_floating_point() and tuple(item.shape[:2]) == (batch, length)
    return holds_codes(name, item, batch, length) or (is_of_towers(name) and not of_tokens)


def holds_codes(name: str, item: Tensor, batch: int, length: int) -> bool:
    """Whether an input has several rows of ids for each example, one for each code book.

    Args:
        name: The name of the input.
        item: The input.
        batch: Examples of the main input.
        length: Positions of each.
    """
    return name == "input_ids" and item.dim() == 2 and item.shape[1] == length and item.shape[0] > batch


def reads_codes(model: nn.Module) -> bool:
    """Whether a model has tables of embeddings beside each other, one for each of several code books.

    Then several rows of ids, one for each, may be one example of the blocks.

    Args:
        model: The model.
    """
    known = _CODES.get(model)
    if known is None:
        lists = (part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) > 1)
        known = _CODES[model] = any(all(isinstance(one, nn.Embedding) for one in part) for part in lists)
    return known


_CODES: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def check_divisible(kwargs: Mapping[str, Any], batch: int, length: int, what: str) -> None:
    """That some of the examples can be taken out of a batch: each has one picture or sound, or there are none.

    Args:
        kwargs: The inputs of the run.
        batch: Its examples.
        length: Positions of each.
        what: What is to be done, for the message.

    Raises:
        InputError: they cannot.
    """
    for name, item in kwargs.items():
        if isinstance(item, Tensor) and is_by_picture(name, item, batch, length) and len(item) != batch:
            raise InputError(
                f"{name} has {len(item)} entries for {batch} examples, so that it is not known which belong to which:"
                f" {what}. Give one picture or sound for each example, or examples one at a time."
            )


def _main_stack(model: nn.Module) -> Stack | None:
    """The stack that the first input of a model goes to; None if it has blocks without a name.

    Raises:
        UnmappedModelError: no map describes the model, or it has no list of blocks.
    """
    described = map_of(model)
    if described.blocks:
        return None
    if described.blocks == "" or not described.stacks:
        raise UnmappedModelError(f"{type(model).__name__} has no list of blocks.")
    first: Sequence[Stack] = ("encoder", "vision", "audio", "text", "decoder")
    return next(stack for stack in first if stack in described.stacks)


def stack_size(
    model: nn.Module, stack: Stack | None, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> StackSize:
    """How many examples and positions a stack has in a run with these inputs.

    Args:
        model: The model.
        stack: Which stack; None for the blocks of a model of one, or those beside a tower.
        args: Inputs by position.
        kwargs: Inputs by name.

    Raises:
        InputError: the run does not reach the stack, or its pictures are of different sizes on one axis.
        UnmappedModelError: no map describes the model.
    """
    named = {**dict(zip(forward_signature(model).parameters, args, strict=False)), **kwargs}
    entrance = _entrance(map_of(model), stack)  # before the lock: making a map may run the model
    key = (stack, entrance, *_shapes(named))
    with _LOCK:
        known = _KNOWN.setdefault(model, OrderedDict())
        size = known.get(key)
        if size is None:
            size = known[key] = _measured(model, stack, entrance, args, kwargs, named)
            while len(known) > REMEMBERED:
                known.popitem(last=False)
        else:
            known.move_to_end(key)
    return size


def rows_of_example(model: nn.Module, described: ModelMap, inputs: Mapping[str, Any], rows: int) -> int:
    """How many rows of the inputs are one example of the blocks: several of a model that is given codes in rows.

    Args:
        model: The model.
        described: A map of it.
        inputs: Its keyword inputs.
        rows: How many rows they have.
    """
    if not described.blocks or not reads_codes(model):
        return 1
    examples = _measured(model, None, _entrance(described, None), (), inputs, inputs).batch
    return rows // examples if rows % examples == 0 else 1


_KNOWN: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, StackSize]] = weakref.WeakKeyDictionary()
# Held during the run too, which puts the model into evaluation mode for a moment.
_LOCK = RLock()


def _shapes(named: Mapping[str, Any]) -> list[Hashable]:
    """All that sizes of stacks can depend on: shapes, and what describes pictures and sounds in whole numbers."""
    found: list[Hashable] = []
    for name in sorted(named):
        item = named[name]
        if not isinstance(item, Tensor):
            continue
        found.append((name, tuple(item.shape), item.dtype))
        if not is_of_towers(name):
            continue
        if not item.is_floating_point():
            found.append(digest_of(item))
        elif item.dim() >= 5:  # several pictures an example, of which empty ones may be left out
            found.append(tuple(item.flatten(2).any(-1).flatten().tolist()))
    return found


def _measured(
    model: nn.Module,
    stack: Stack | None,
    entrance: tuple[str, Site],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    named: Mapping[str, Any],
) -> StackSize:
    path, site = entrance
    module = model.get_submodule(path)
    found: list[Tensor] = []
    stop = EarlyStop(model, [path])

    def look(passage: Passage) -> None:
        found.append(passage.take(site.side, site.slot))
        stop.request(path)

    options = {} if "use_cache" in kwargs or "use_cache" not in _parameters(model) else {"use_cache": False}
    with (
        evaluating(model),
        torch.no_grad(),
        stop,
        hooked([Hook(module, site.side, look), *stop.hooks], model),
    ):
        model(*args, **kwargs, **options)
    if not found:
        given = ", ".join(name for name, item in named.items() if item is not None) or "nothing"
        raise InputError(
            f"The {stack or 'main'} {'tower' if stack in ('vision', 'audio', 'text') else 'stack'} of"
            f" {type(model).__name__} does not run with these inputs, so that it has no positions. Given: {given}."
        )
    shape = tuple(found[0].shape)
    if site.axes is not None and site.axes[0] != site.axes[1]:
        return StackSize(shape[site.axes[0]], shape[site.axes[1]])
    if site.flat or site.axes is not None or len(shape) == 2:
        return _of_flat(shape[0], stack, named, model)
    return StackSize(shape[0], shape[1])


def _parameters(model: nn.Module) -> Mapping[str, Any]:
    return forward_signature(model).parameters


def _entrance(described: ModelMap, stack: Stack | None) -> tuple[str, Site]:
    """Where the first block of a stack is entered: the module's path, and what is read there."""
    if stack == "cross":
        return _crossing(described)
    blocks = described.stacks.get(stack) if stack is not None else described.blocks
    if not blocks:
        raise UnmappedModelError(f"{described.classes[0]} has no stack {stack!r}.")
    word = "block_input" if stack is None else f"{stack}_block_input"
    site = described.site(word, 0) or Site("", "input")
    return path_in_layer(blocks, 0, site.path), site


def _crossing(described: ModelMap) -> tuple[str, Site]:
    """Where the keys are made that blocks have of a tower beside them: the module's path, and what is read there."""
    layers = [layer for kind in described.kinds if kind.stack is None for layer in kind.layers]
    found = ((layer, described.site("cross_key_output", layer)) for layer in [*sorted(layers), 0])
    layer, site = next(((layer, site) for layer, site in found if site is not None), (0, None))
    if site is None:
        raise UnmappedModelError(f"{described.classes[0]} has no keys of a tower.")
    return path_in_layer(described.blocks, layer, site.path), Site(site.path, site.side, site.slot)


def _of_flat(positions: int, stack: Stack | None, named: Mapping[str, Any], model: nn.Module) -> StackSize:
    """Examples that lie behind each other on one axis: as many as the inputs say there are, of one size.

    Raises:
        InputError: they are of different sizes.
    """
    sizes = next((sizes for name, item in named.items() if (sizes := _grid(name, item, stack))), None)
    if sizes is None:
        return StackSize(1, positions)
    if len(set(sizes)) > 1:
        raise InputError(
            f"The {stack or 'main'} stack of {type(model).__name__} has the patches of all pictures on one axis, and"
            f" these are of different sizes ({', '.join(map(str, sizes))} patches), so that their positions cannot be"
            " counted picture by picture. Give pictures of one size, or one at a time."
        )
    return StackSize(len(sizes), positions // len(sizes))


def _grid(name: str, item: Any, stack: Stack | None) -> list[int] | None:
    """How many patches each picture has, where an input says it: `[pictures, 2 or 3]` counts along each axis."""
    says = isinstance(item, Tensor) and item.dim() == 2 and not item.is_floating_point()
    if not says or item.shape[1] not in (2, 3) or not ("grid" in name or name == "spatial_shapes"):
        return None
    return [int(size) for size in item.prod(-1).tolist()]


# --- of whole runs ----------------------------------------------------------------------------------------


def main_size(
    main: str, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> StackSize | None:
    """What the blocks count that the main input goes to, where that does not follow from tokens; None where it does.

    It does not follow where the input is a picture or a sound, where the places of one are put before or behind those
    of the tokens, which models do that have no token for them, and where several rows of codes are one example.

    Args:
        main: The name of the main input.
        model: The model.
        args: Inputs by position.
        kwargs: Inputs by name.
    """
    codes = reads_codes(model)
    if not is_of_towers(main) and not codes and media_tokens(unwrapped(model).module):
        return None
    try:
        stack = _main_stack(model)
        if not is_of_towers(main) and stack is not None:
            return None
        return stack_size(model, stack, args, kwargs)
    except UnmappedModelError:
        return None


MASKS = ("attention_mask", "feature_attention_mask", "input_features_mask", "pixel_attention_mask")
"""Inputs that may say which positions of a tower are real."""


def mask_in_tower(named: Mapping[str, Any], size: StackSize, tokens: bool) -> Tensor | None:
    """A mask with an entry for each position of a tower: one of what goes in, before it is made shorter, has others.

    Args:
        named: Inputs by name.
        size: What the tower counts.
        tokens: Whether the model is given tokens too, which its `attention_mask` is then about.
    """
    masks = (named.get(key) for key in MASKS[1 if tokens else 0 :])
    return next((mask for mask in masks if isinstance(mask, Tensor) and tuple(mask.shape) == size), None)
