"""From one table for a family of models to the maps of all its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from model_maps.schema import ModelMap, Site, Variant, Width
from model_maps.vocabulary import COMPONENTS

DENSE: Mapping[str, str] = {
    "router_input": "its MLP is dense, so nothing is routed",
    "router_output": "its MLP is dense, so nothing is routed",
    "expert_input": "its MLP is dense, so there are no experts",
    "expert_output": "its MLP is dense, so there are no experts",
}
"""Why an architecture without a mixture of experts lacks its components."""


@dataclass(frozen=True)
class Head:
    """Model classes that put the same head on the stack of blocks."""

    path: str
    """Path of the module whose output is the logits."""

    classes: tuple[str, ...]
    """Names of the classes."""

    width: Width = "any"
    """Size of the logits' last axis."""

    prefix: str | None = None
    """Where the stack is in these classes, if not where the family usually has it."""


def family(
    *,
    stack: tuple[str, ...],
    prefix: str,
    heads: Iterable[Head],
    blocks: str,
    sites: Mapping[str, Site],
    absent: Mapping[str, str] = DENSE,
    sequential: bool = True,
    variants: tuple[Variant, ...] = (),
    positions_derived_from_mask: bool | None = None,
) -> tuple[ModelMap, ...]:
    """The maps of a family: one for the classes of the bare stack and one for each kind of head.

    Args:
        stack: Classes of the bare stack of blocks, without a head.
        prefix: Path, ending in a dot, of the stack inside the classes with a head.
        heads: The kinds of head, each with its classes.
        blocks: Path of the list of blocks, from the stack.
        sites: Component -> site; paths of model-wide components are from the stack.
        absent: Component -> why the family has none.
        sequential: Whether the MLP reads the stream after attention was added.
        variants: Differences that depend on the config; paths as in `sites`.
        positions_derived_from_mask: Whether positions are derived from the attention mask.

    Example:
        >>> bare, lm = family(stack=("TinyModel",), prefix="model.", heads=[Head("lm_head", ("TinyForCausalLM",))],
        ...                   blocks="layers", sites={"block_output": Site(""), "final_norm_output": Site("norm")})
        >>> bare.sites["final_norm_output"].path, lm.sites["final_norm_output"].path, lm.blocks
        ('norm', 'model.norm', 'model.layers')
    """
    headless = {"logits": f"{stack[0]} is the bare stack of blocks, without a head"} if stack else {}
    bare = ModelMap(
        classes=stack,
        blocks=blocks,
        sites=sites,
        absent={**absent, **headless},
        sequential=sequential,
        variants=variants,
        positions_derived_from_mask=positions_derived_from_mask,
    )
    maps = [bare] if stack else []
    for head in heads:
        at = prefix if head.prefix is None else head.prefix
        maps.append(
            replace(
                bare,
                classes=head.classes,
                blocks=at + blocks,
                sites={**_below(at, sites), "logits": Site(head.path, width=head.width)},
                absent=absent,
                variants=tuple(replace(variant, sites=_below(at, variant.sites)) for variant in variants),
            )
        )
    return tuple(maps)


def _below(prefix: str, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites with `prefix` before the paths that do not start at a block."""
    return {
        name: replace(site, path=prefix + site.path) if COMPONENTS[name].scope == "model" else site
        for name, site in sites.items()
    }
