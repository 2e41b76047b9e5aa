"""Hooks written by hand, to compare the engine with: where a map puts a component, but slices of our own.

The columns of fused projections are those of the models' own source code, not of the maps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from declared import LAYER, map_of
from torch import Tensor, nn

from model_maps import COMPONENTS
from tiny_models import RECURRENT

QUERY_HEADS = 4
WIDE = ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3", "mixtral", "gpt_oss")
"""Families whose heads are 6 wide; those of the others are 4."""
GROUPED = (*WIDE, "qwen2", "olmo2", "phi3")
"""Families with two key-value heads, four in the variant `full`, one in `single`."""


def head_width(family: str) -> int:
    """Columns of one head."""
    return 6 if family in WIDE else 4


def key_value_heads(family: str, variant: str | None) -> int:
    """How many key-value heads a tiny model has."""
    if family == "falcon":
        return {None: 1, "grouped": 2, "one_norm": 1, "sequential": 4}[variant]
    if family in GROUPED:
        return {None: 2, "full": 4, "single": 1}[variant]
    return QUERY_HEADS


def columns(family: str, variant: str | None, component: str) -> Tensor | None:
    """`[heads, width]`: the columns of each head in the tensor at a component's site; None if it has no heads."""
    name = component.removeprefix("head_").removesuffix("_output")
    if name not in ("query", "key", "value", "attention_value"):
        return None
    width, heads = head_width(family), key_value_heads(family, variant)
    if name == "attention_value":
        return torch.arange(QUERY_HEADS * width).view(QUERY_HEADS, width)
    if family in ("gpt2", "phi3"):  # [all queries | all keys | all values]
        sizes = [QUERY_HEADS * width, heads * width, heads * width]
        part = torch.arange(sum(sizes)).split(sizes)[("query", "key", "value").index(name)]
        return part.view(-1, width)
    if family in ("gpt_neox", "bloom", "falcon"):  # for each key-value head its queries, its key, its value
        queries = QUERY_HEADS // heads
        blocks = torch.arange((queries + 2) * heads * width).view(heads, queries + 2, width)
        part = {"query": blocks[:, :queries], "key": blocks[:, queries], "value": blocks[:, queries + 1]}[
            name
        ]
        return part.reshape(-1, width)
    return torch.arange((QUERY_HEADS if name == "query" else heads) * width).view(-1, width)


def module_at(model: nn.Module, component: str, layer: int = LAYER) -> tuple[nn.Module, Any]:
    """The module a map names for a component, and the map's site."""
    described = map_of(model)
    site = described.site(component)
    blocks = described.blocks_of(component) if COMPONENTS[component].scope == "block" else None
    block = [blocks, str(layer)] if blocks else []
    return model.get_submodule(".".join([*block, site.path]).strip(".")), site


def hook(
    model: nn.Module, component: str, change: Callable[[Tensor], Tensor | None], layer: int = LAYER
) -> Any:
    """Register a hook that hands the `[b, s, columns]` at a component to `change`, and puts back what it returns.

    Returns:
        The handle.
    """
    module, site = module_at(model, component, layer)

    def changed(value: Tensor) -> Tensor | None:
        new = change(value.view(2, -1, value.shape[-1]) if site.flat else value)
        return None if new is None else new.reshape(value.shape)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        if args:
            at = site.slot or 0
            new = changed(args[at])
            return None if new is None else ((*args[:at], new, *args[at + 1 :]), kwargs)
        key = "input" if is_recurrent(model) else "hidden_states"
        new = changed(kwargs[key])
        return None if new is None else (args, {**kwargs, key: new})

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return changed(output)
        new = changed(output[0])
        return None if new is None else (new, *output[1:])

    if site.function == "linear":
        return _WithOwnLinear(module, changed)
    if site.side == "input":
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


class _WithOwnLinear:
    """Another `torch.nn.functional.linear` while one module runs."""

    def __init__(self, module: nn.Module, changed: Callable[[Tensor], Tensor | None]) -> None:
        real = nn.functional.linear

        def linear(*args: Any) -> Tensor:
            output = real(*args)
            new = changed(output)
            return output if new is None else new

        def enter(*_: Any) -> None:
            nn.functional.linear = linear

        def leave(*_: Any) -> None:
            nn.functional.linear = real

        self._handles = module.register_forward_pre_hook(enter), module.register_forward_hook(leave)

    def remove(self) -> None:
        """Let the module be as it was."""
        for handle in self._handles:
            handle.remove()


def seen(model: nn.Module, component: str, inputs: Mapping[str, Tensor], layer: int = LAYER) -> Tensor:
    """A copy of the `[b, s, columns]` at a component."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        stack.callback(hook(model, component, lambda value: found.append(value.clone()), layer).remove)
        model(**inputs)
    return found[0]


def run_with(
    model: nn.Module, component: str, change: Callable[[Tensor], Tensor], inputs: Any, layer: int = LAYER
) -> Any:
    """The model's output with a change at one component."""
    with ExitStack() as stack:
        stack.callback(hook(model, component, change, layer).remove)
        return model(**inputs)


def block_of(model: nn.Module, layer: int = LAYER) -> nn.Module:
    """One block; a recurrent layer is its own."""
    return (
        model.get_submodule(f"{map_of(model).blocks}.{layer}".strip(".")) if map_of(model).blocks else model
    )


def is_recurrent(model: nn.Module) -> bool:
    """Whether it is one of torch's recurrent layers."""
    return type(model).__name__.lower() in RECURRENT
