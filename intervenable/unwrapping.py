"""The model inside what is wrapped around it: adapters, compiled, parallel and averaged models.

A wrapper is a module that hands its inputs on to one module inside and gives back what that returns. It has a class
of its own, so that nothing is known of it, and the parts of the model have longer paths in it:
`_orig_mod.model.layers.0` instead of `model.layers.0`. Runs go through the wrapper as ever; what is known of the
model inside is known of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from torch import nn

from model_maps import COMPONENTS, LayerKind, ModelMap, Site

WRAPPERS: Mapping[str, str] = {
    "AveragedModel": "module",
    "BaseTuner": "model",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "OptimizedModule": "_orig_mod",
    "PeftMixedModel": "base_model",
    "PeftModel": "base_model",
}
"""Classes of wrappers (theirs or a base's name) and the attribute under which they have the module inside."""


class Unwrapped(NamedTuple):
    """The model inside a wrapper."""

    module: nn.Module
    """The model; the wrapper itself where it wraps nothing."""

    prefix: str
    """What comes before the path of each of its parts: "" or names with a dot at the end."""


def unwrapped(model: nn.Module) -> Unwrapped:
    """The model inside all wrappers around it, and what its paths begin with.

    Example:
        >>> wrapper = nn.DataParallel(nn.Linear(2, 3))
        >>> unwrapped(wrapper)
        Unwrapped(module=Linear(in_features=2, out_features=3, bias=True), prefix='module.')
        >>> unwrapped(wrapper.module).prefix
        ''
    """
    prefix = ""
    while (step := _step(model)) is not None:
        name, model = step
        prefix += f"{name}."
    return Unwrapped(model, prefix)


def _step(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The module inside a wrapper and the attribute under which it is there; None if the model is no wrapper."""
    for name in _attributes_of(type(model).__mro__):
        inside = model._modules.get(name)
        if inside is not None:
            return name, inside
    return None


@lru_cache(maxsize=512)
def _attributes_of(bases: tuple[type, ...]) -> tuple[str, ...]:
    """Under which attributes models of a class may have one inside: none in all but wrappers, asked in every run."""
    own = bases[: bases.index(nn.Module)]
    return tuple(WRAPPERS[base.__name__] for base in own if base.__name__ in WRAPPERS)


def virtual_tokens(model: nn.Module) -> int:
    """How many positions an adapter puts before those of the inputs, as tuned prompts and prefixes do; 0 for none."""
    found = 0
    while (step := _step(model)) is not None:
        adapter = getattr(model, "active_peft_config", None)
        # A disabled one has the model's own forward in its place.
        if getattr(adapter, "is_prompt_learning", False) and "forward" not in vars(model):
            found += int(getattr(adapter, "num_virtual_tokens", None) or 0)
        model = step[1]
    return found


def class_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the class of the model inside and of its bases, nearest first.

    Example:
        >>> class_names(nn.DataParallel(nn.Linear(2, 3)))
        ('Linear', 'Module', 'object')
    """
    return tuple(cls.__name__ for cls in type(unwrapped(model).module).__mro__)


def config_of(model: nn.Module) -> object | None:
    """The config of the model inside, if it has one."""
    found: object | None = getattr(unwrapped(model).module, "config", None)
    return found


def prefixed(model_map: ModelMap, prefix: str) -> ModelMap:
    """The map of a model as that of a wrapper in which its paths begin with `prefix`.

    Example:
        >>> inside = ModelMap(("Tiny",), "layers", {"block_output": Site(""), "logits": Site("head")})
        >>> outside = prefixed(inside, "module.")
        >>> outside.blocks, outside.sites["block_output"].path, outside.sites["logits"].path
        ('module.layers', '', 'module.head')
    """
    if not prefix:
        return model_map

    def longer(path: str) -> str:
        return f"{prefix}{path}".rstrip(".")

    def moved(sites: Mapping[str, Site]) -> dict[str, Site]:
        return {
            name: dataclasses.replace(site, path=longer(site.path))
            if _is_from_root(name, model_map)
            else site
            for name, site in sites.items()
        }

    return dataclasses.replace(
        model_map,
        blocks=longer(model_map.blocks) if model_map.blocks else model_map.blocks,
        sites=moved(model_map.sites),
        stacks={stack: longer(path) for stack, path in model_map.stacks.items()},
        variants=tuple(
            dataclasses.replace(variant, sites=moved(variant.sites)) for variant in model_map.variants
        ),
        kinds=tuple(
            LayerKind(kind.layers, kind.stack, moved(kind.sites), kind.absent) for kind in model_map.kinds
        ),
    )


def _is_from_root(component: str, model_map: ModelMap) -> bool:
    """Whether the path of a site begins at the model: outside the blocks, or if the model is itself the block."""
    return COMPONENTS[component].scope == "model" or not model_map.blocks_of(component)
