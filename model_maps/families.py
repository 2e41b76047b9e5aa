"""From one table for a family of models to the maps of all its classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from model_maps.schema import ModelMap, Variant
from model_maps.sites import Site, Width
from model_maps.vocabulary import COMPONENTS, Prefix, Stack


@dataclass(frozen=True, slots=True)
class Head:
    """Model classes that put the same head on a stack of blocks."""

    path: str | None
    """Path of the module whose output is the logits; None for classes without a head."""

    classes: tuple[str, ...]
    """Names of the classes."""

    prefix: str
    """Path of the stack inside these classes, with a dot at its end; "" if they are the stack."""

    width: Width = "any"
    """Size of the logits' last axis."""

    decoder_reads: Literal["labels", "input_ids"] | None = None
    """Of which inputs these classes make the decoder's where they are given none; None if of none."""


def lacking(*components: str, why: str) -> dict[str, str]:
    """One reason for several absent components.

    Example:
        >>> lacking("router_input", "router_output", why="its MLP is dense")
        {'router_input': 'its MLP is dense', 'router_output': 'its MLP is dense'}
    """
    return dict.fromkeys(components, why)


NO_EXPERTS = lacking(
    "router_input",
    "router_output",
    "expert_choice",
    "expert_weight",
    "expert_input",
    "expert_output",
    why="its MLP is dense: it has no router and no experts",
)
"""What architectures without a mixture of experts lack."""

NO_MIXER = lacking(
    "mixer_input",
    "mixer_output",
    "mixer_contribution",
    "mixer_state",
    why="its blocks mix positions by attention alone",
)
"""What architectures without state spaces, linear attention or convolutions lack."""

STATE_IS_READ = "nothing reads it before the next token; write 'mixer_input' or 'mixer_output' instead"
"""Why a mixer's state is not to be written."""

CHOICE_IS_READ = "its numbers name experts; write 'router_output' or 'expert_weight' instead"
"""Why the numbers of the chosen experts are not to be written."""

NO_ROTARY = lacking("rotary_query", "rotary_key", why="it has no rotary embedding")
"""What architectures lack that tell positions in another way."""

FUSED_EXPERTS = lacking(
    "mlp_pre_activation",
    "mlp_activation",
    "mlp_hidden",
    why="the weights of all its experts are fused, so no module hands over the inside of one",
)
"""What architectures lack whose experts are three-dimensional parameters."""


SWITCHED_OFF = Variant("is_causal", False, causal=False)
"""The switch by which transformers lets nearly every causal mask be left out."""


def family(
    *,
    heads: Iterable[Head],
    blocks: str | Mapping[Stack, str],
    sites: Mapping[str, Site],
    absent: Mapping[str, str] = NO_EXPERTS,
    sequential: bool = True,
    variants: tuple[Variant, ...] = (),
    positions_derived_from_mask: bool | None = None,
    causal: bool = True,
) -> tuple[ModelMap, ...]:
    """The maps of a family, one for each kind of head, from a table that starts at its stack of blocks.

    Args:
        heads: The kinds of head, each with its classes and with where the stack is in them.
        blocks: Path of the list of blocks, from the stack; with an encoder and a decoder, one for each of them.
        sites: Component -> site; the paths of components of the whole model are from the stack.
        absent: Component -> why the family has none.
        sequential: Whether the MLP reads the stream after attention was added.
        variants: Differences that depend on the config; paths as in `sites`.
        positions_derived_from_mask: Whether positions are derived from the attention mask.
        causal: Whether positions read nothing of later ones.

    Example:
        >>> heads = [Head(None, ("Tiny",), ""), Head("lm_head", ("TinyForCausalLM",), "model.")]
        >>> sites = {"block_output": Site(""), "final_norm_output": Site("norm")}
        >>> bare, lm = family(heads=heads, blocks="layers", sites=sites)
        >>> bare.sites["final_norm_output"].path, lm.sites["final_norm_output"].path, lm.blocks
        ('norm', 'model.norm', 'model.layers')
    """
    maps = []
    variants = (SWITCHED_OFF, *variants) if causal else variants
    for head in heads:
        placed = _below(head.prefix, sites)
        missing = {**({} if "mixer_output" in sites else NO_MIXER), **absent}
        if head.path is None:
            missing["logits"] = "it is the bare stack of blocks, without a head"
        else:
            placed["logits"] = Site(head.path, width=head.width)
        maps.append(
            ModelMap(
                classes=head.classes,
                blocks=head.prefix + blocks if isinstance(blocks, str) else None,
                sites=placed,
                absent=missing,
                sequential=sequential,
                variants=tuple(
                    replace(variant, sites=_below(head.prefix, variant.sites)) for variant in variants
                ),
                positions_derived_from_mask=positions_derived_from_mask,
                causal=causal,
                stacks={}
                if isinstance(blocks, str)
                else {stack: head.prefix + path for stack, path in blocks.items()},
                decoder_reads=head.decoder_reads,
            )
        )
    return tuple(maps)


def prefixed(prefix: Prefix, sites: Mapping[str, Site], below: str = "") -> dict[str, Site]:
    """The sites of one stack by their names in a model of two.

    Args:
        prefix: Which stack, or "cross" for the decoder's attention to the encoder.
        sites: Word -> site, as in a model of one stack.
        below: Path of the stack, with a dot at its end, for what is not in its blocks.

    Example:
        >>> prefixed("decoder", {"final_norm_output": Site("norm")}, "decoder.")["decoder_final_norm_output"].path
        'decoder.norm'
    """
    return {f"{prefix}_{word}": site for word, site in _below(below, sites).items()}


def _below(prefix: str, sites: Mapping[str, Site]) -> dict[str, Site]:
    """The sites with `prefix` before the paths that do not start at a block."""
    return {
        name: replace(site, path=prefix + site.path) if COMPONENTS[name].scope == "model" else site
        for name, site in sites.items()
    }
