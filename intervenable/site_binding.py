"""A component of a map, or a module path, found in the model at hand: the module, its widths, its heads."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn

from intervenable.errors import UnsupportedModelError
from intervenable.hooks import NthCall
from intervenable.linear_maps import is_conv1d
from intervenable.sites import BoundFunction, BoundSite, Kind, StreamAxes
from intervenable.unwrapping import config_of, unwrapped
from model_maps import COMPONENTS, ModelMap, Side, Site, Sizes, Stack, columns_of, is_head_component


def bind_site(
    model: nn.Module,
    component: str,
    site: Site,
    layer: int | None,
    sizes: Sizes,
    plus: BoundSite | None,
    *,
    causal: bool = False,
    stack: Stack | None = None,
    block: str = "",
) -> BoundSite:
    """A map's site in a model: the module found, widths taken from its live weight where it has one.

    Args:
        model: The wrapped model.
        component: The component's name.
        site: Where the map puts it, with its path from the model.
        layer: The block, or None.
        sizes: Sizes of the model.
        plus: The bound site of `site.plus`, if it has one.
        causal: Whether no position reads from one behind itself there.
        stack: The stack whose positions it has, in a model of two.
        block: Path of the block: the calls of a module are counted from where it is entered.
    """
    path = site.path
    module = module_at(model, path, component)
    if COMPONENTS[component].inside is not None:
        return _bind_inside(model, component, layer, module, path, site, sizes, causal=causal, stack=stack)
    live = product_width(module, site) if site.weight else live_width(module, site.side)
    columns = columns_of(site, sizes, width=live)
    by_heads = is_head_component(component)
    kind: Kind = "sum" if plus is not None else "stored"
    side, slot = site.side, site.slot
    derived = COMPONENTS[component].derived_from
    width = live if live is not None and site.part is None else sizes.width(site.width)
    if columns is not None:
        width = columns.width if by_heads else columns.heads * columns.width
    if by_heads and columns is None:
        raise UnsupportedModelError(
            f"{component}: the number of heads in {type(model).__name__} is not known."
        )
    if COMPONENTS[component].word == "head_attention_output":
        kind, side, slot, width = "per_head", "output", None, live_width(module, "output")
    elif COMPONENTS[component].axes == "state":
        kind, width = "state", None
    elif derived is not None:
        kind, side, slot, width = "norm_scale", "output", None, 1
    return BoundSite(
        component,
        layer,
        module,
        path,
        side,
        slot,
        kind,
        width,
        columns,
        by_heads,
        site.flat,
        plus,
        site.read_only,
        stack=stack,
        axes=None if site.axes is None else StreamAxes(*site.axes),
        scale=site.scale,
        function=None if site.function is None else BoundFunction(site.function, site.nth, site.weight),
        call=None if site.call is None else NthCall(site.call, module_at(model, block, component)),
    )


FUSED_KERNELS = ("flash", "flex", "paged", "kernels", "/")
"""Parts of the names of attention implementations that never show scores or a pattern to torch."""


def _bind_inside(
    model: nn.Module,
    component: str,
    layer: int | None,
    module: nn.Module,
    path: str,
    site: Site,
    sizes: Sizes,
    *,
    causal: bool,
    stack: Stack | None,
) -> BoundSite:
    """What an attention module computes inside itself, if it does so where it can be seen."""
    config: Any = getattr(module, "config", config_of(model))
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    if any(name in implementation for name in FUSED_KERNELS):
        raise UnsupportedModelError(
            f"{component} cannot be seen under attn_implementation={implementation!r}, a kernel that computes"
            " attention as a whole. Load the model with 'sdpa' or 'eager', or call"
            " model.set_attn_implementation('sdpa')."
        )
    stated = site.attention
    query_heads = sizes.query_heads if stated is None else stated.query
    key_value_heads = sizes.key_value_heads if stated is None else stated.key_value
    if query_heads is None or key_value_heads is None:
        raise UnsupportedModelError(
            f"{component}: the number of heads in {type(model).__name__} is not known."
        )
    matrix = COMPONENTS[component].axes == "matrix"
    width = None if matrix else sizes.head_dim if stated is None else stated.width
    heads = (query_heads, key_value_heads)
    return BoundSite(
        component,
        layer,
        module,
        path,
        "output",
        None,
        "inside",
        width,
        head_counts=heads,
        bands=None if stated is None else stated.bands,
        causal=causal and matrix,
        by_heads=not matrix,
        stack=stack,
        key_stack=_key_stack(component, stack),
        axes=None if site.axes is None else StreamAxes(*site.axes),
    )


def _key_stack(component: str, stack: Stack | None) -> Stack | None:
    """The stack whose positions the keys of a matrix have, given that of its queries."""
    known = COMPONENTS[component]
    return "cross" if known.prefix == "cross" and stack is None else known.key_stack


def bind_path(model: nn.Module, component: str, model_map: ModelMap | None = None) -> BoundSite:
    """A component given as a module path, such as `model.layers[3].mlp.output`.

    Args:
        model: The wrapped model.
        component: The path.
        model_map: The model's map, if it has one: tells the stacks of a model of two apart.
    """
    written, _, side = component.rpartition(".")
    path = written.replace("[", ".").replace("]", "")
    module = module_at(model, path, component)
    known: Side = "input" if side == "input" else "output"
    stack = None if model_map is None else model_map.stack_at(path, known)
    return BoundSite(component, None, module, path, known, width=live_width(module, known), stack=stack)


def module_at(model: nn.Module, path: str, component: str) -> nn.Module:
    """The module at a path; an error that shows how far the path goes and what is there."""
    module = model
    done: list[str] = []
    for name in path.split(".") if path else ():
        if name.startswith("-") and name[1:].isdigit() and isinstance(module, nn.ModuleList):
            name = str(len(module) + int(name))
        child = module._modules.get(name)
        if child is None:  # a part may be wrapped too, such as a block that was compiled
            child = unwrapped(module).module._modules.get(name)
        if child is None:
            children = dict(module.named_children())
            at = ".".join(done) or type(model).__name__
            near = get_close_matches(name, children, n=1)
            hint = f" Did you mean {near[0]!r}?" if near and not name.isdigit() else ""
            raise UnsupportedModelError(
                f"{component!r} names no module: {at} has no part {name!r}.{hint}"
                f"\nIt has: {', '.join(children) or 'no parts'}."
            )
        module = child
        done.append(name)
    return unwrapped(module).module if path else module


def product_width(module: nn.Module, site: Site) -> int | None:
    """Columns of what a function of a module multiplies with a parameter, or of the product.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> product_width(attention, Site("", function="linear", weight="in_proj_weight"))
        24
    """
    path, _, name = (site.weight or "").rpartition(".")
    try:
        weight: Any = getattr(module.get_submodule(path), name, None)
    except AttributeError:
        return None
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return None
    if site.function == "linear":
        return int(weight.shape[1 if site.side == "input" else 0])
    return int(weight.shape[1:].numel()) if site.heads else None


def live_width(module: nn.Module, side: Side) -> int | None:
    """The last axis of what goes into or comes out of a module, where its weight tells."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        return module.in_features if side == "input" else module.out_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim if side == "output" else None
    widths = [getattr(module, name, None) for name in ("in_features", "out_features")]
    if all(isinstance(width, int) for width in widths):  # a linear map of another make: quantised, adapted
        return widths[0 if side == "input" else 1]
    if not isinstance(weight, Tensor):
        return None
    if is_conv1d(module):
        return int(weight.shape[0 if side == "input" else 1])
    return int(weight.shape[0]) if weight.dim() == 1 and "Norm" in type(module).__name__ else None
