"""The map of a model found out from its structure and from the numbers of one forward pass.

Nothing is known of any architecture here. What is inferred is a proposal: it counts once its laws have been checked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intervenable.hooks import Hook, hooked
from intervenable.map_attention import BlockAttention, attention_sites
from intervenable.map_attention_module import GIVEN_TWICE, given_twice
from intervenable.map_attention_view import within
from intervenable.map_block_sites import BlockSites, block_sites
from intervenable.map_blocks import BlockStack, find_stacks, why_none, with_roles
from intervenable.map_ends import NO_LOGITS, end_sites, head_sites
from intervenable.map_layer_calls import GOES_PAST, goes_past
from intervenable.map_layout import layout_of
from intervenable.map_mlp import Placed
from intervenable.map_trace import Trace, trace
from intervenable.mixer_state import layers_with_state
from intervenable.signatures import counts_time_first, takes
from intervenable.site_binding import module_at
from model_maps import COMPONENTS, LayerKind, ModelMap, Site, Sizes, Stack, Width, path_in_layer, sizes_of
from model_maps.families import STATE_IS_READ


def infer_map(model: nn.Module, inputs: Mapping[str, Any], run: Trace | None = None) -> ModelMap:
    """The map of a model, inferred and not verified.

    Args:
        model: The model in evaluation mode, small enough that all its activations fit into memory at once.
        inputs: Its keyword inputs, of two examples and at least seven positions.
        run: A trace of the model on these inputs, if there is one.
    """
    run = trace(model, inputs) if run is None else run
    stacks = with_roles(find_stacks(run, model), run)
    found = _Found({}, {}, [])
    attention = _attention(stacks, model, inputs, run)
    for stack in stacks:
        _place_stack(found, stack, model, inputs, run, attention)
    main = next((stack for stack in stacks if stack.role in (None, "decoder")), None)
    if main is None and stacks:
        found.absent["logits"] = NO_LOGITS
    elif main is None:
        found.absent = dict.fromkeys(COMPONENTS, why_none(run, model)) | found.absent
    else:
        head = head_sites(run, main, model)
        found.sites |= head.sites
        found.absent |= head.absent
    one = next((stack for stack in stacks if stack.role is None), None)
    named: dict[Stack, str] = {stack.role: stack.path for stack in stacks if stack.role is not None}
    sites = {
        name: _with_width(model, run, name, site, one_or(stacks, name)) for name, site in found.sites.items()
    }
    kinds = [
        replace(
            kind,
            sites={
                name: _with_width(model, run, name, site, one_or(stacks, name), kind.layers[0])
                for name, site in kind.sites.items()
            },
        )
        for kind in found.kinds
    ]
    return ModelMap(
        classes=(type(model).__name__,),
        blocks=None if one is None else one.path,
        sites=sites,
        absent=found.absent,
        sequential=any(COMPONENTS[name].word == "block_mid" for name in sites),
        causal=_is_causal(model, inputs, main) if main is not None else False,
        stacks=named,
        decoder_reads=_decoder_reads(model, inputs) if "decoder" in named else None,
        kinds=tuple(kinds),
        configs=_configs(model, stacks),
    )


@dataclass
class _Found:
    sites: dict[str, Site]
    absent: dict[str, str]
    kinds: list[LayerKind]


def one_or(stacks: Sequence[BlockStack], name: str) -> BlockStack | None:
    """The stack that a component is in."""
    prefix = COMPONENTS[name].prefix
    role = ("decoder" if prefix == "cross" else prefix) or None
    return next((stack for stack in stacks if stack.role == role), stacks[-1] if stacks else None)


# --- one stack --------------------------------------------------------------------------------------------


def _place_stack(
    found: _Found,
    stack: BlockStack,
    model: nn.Module,
    inputs: Mapping[str, Any],
    run: Trace,
    attention: _Attention,
) -> None:
    """Put the components of one stack where they are."""
    prefix = f"{stack.role}_" if stack.role else ""
    ends = end_sites(run, stack, layout_of(stack, inputs))
    if stack.refused:
        layers: list[BlockSites] = []
        refused = {name: stack.refused for name, known in COMPONENTS.items() if known.scope == "block"}
        own = ("decoder", "cross") if stack.role == "decoder" else (stack.role or "",)
        found.absent |= {name: why for name, why in refused.items() if COMPONENTS[name].prefix in own}
    else:
        layers = _layers(stack, model, inputs, run, attention)
    for name, site in ends.sites.items():
        found.sites[prefix + name] = site
    for name, why in ends.absent.items():
        found.absent[prefix + name] = why
    if not layers:
        return
    of_layer = {
        block.layer: _named(_called_once(sites, stack, block.layer, model, run), prefix)
        for block, sites in zip(stack.blocks, layers, strict=True)
    }
    usual = _commonest(list(of_layer.values()))
    found.sites |= usual.sites
    # What only some layers lack is said of these: said of all, it would hide views where the layer has them.
    nowhere = {
        name: why
        for name, why in usual.absent.items()
        if all(name in placed.absent for placed in of_layer.values())
    }
    found.absent |= nowhere
    others: dict[str, tuple[Placed, list[int]]] = {}
    for layer, placed in of_layer.items():
        others.setdefault(repr(placed), (placed, []))[1].append(layer)
    for placed, numbers in others.values():
        sites = _differing(placed, usual)
        absent = {name: why for name, why in placed.absent.items() if nowhere.get(name) != why}
        if sites or absent:
            found.kinds.append(LayerKind(tuple(numbers), stack.role, sites, absent))
    if stack.uncalled:
        why = "a forward pass does not call it"
        nothing = dict.fromkeys((*usual.sites, *usual.absent), why)
        found.kinds.append(LayerKind(stack.uncalled, stack.role, {}, nothing))


def _differing(placed: Placed, usual: Placed) -> dict[str, Site]:
    """The sites of a layer that are not those of most layers."""
    found = {name: site for name, site in placed.sites.items() if usual.sites.get(name) != site}
    for name in usual.sites.keys() - placed.sites.keys() - placed.absent.keys():
        same = COMPONENTS[name].fallback  # here it is what it may be elsewhere: the output, added as it is
        if same in placed.sites:
            found[name] = placed.sites[same]
    return found


def _layers(
    stack: BlockStack, model: nn.Module, inputs: Mapping[str, Any], run: Trace, attention: _Attention
) -> list[BlockSites]:
    """What is in each block of a stack."""
    own = [attention.own[block.path] for block in stack.blocks]
    cross = [attention.cross.get(block.path) for block in stack.blocks]
    layout, sizes = layout_of(stack, inputs), _sizes(model, stack)
    found = block_sites(model, inputs, run, stack.blocks, own, cross, layout, sizes)
    why = _why_not_entered(stack, model, inputs)
    for placed in found if why else ():
        placed.sites["block_input"] = replace(placed.sites["block_input"], read_only=why)
    _place_states(found, stack, model, inputs)
    return found


def _why_not_entered(stack: BlockStack, model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Why what is written where a block is given the stream does not reach all of the block; "" if it does."""
    if len(stack.blocks) < 2:
        return ""
    before, block = stack.blocks[:2]
    if not (block.call.of_parts or given_twice(block.call)):
        return ""
    ends = (before.call.exit, before.returned), (block.call.exit, block.returned)
    if not goes_past(model, inputs, ends[0], (block.call.entrance, block.given), ends[1], block.entering):
        return ""
    return GOES_PAST if block.call.of_parts else GIVEN_TWICE


def _place_states(
    found: Sequence[BlockSites], stack: BlockStack, model: nn.Module, inputs: Mapping[str, Any]
) -> None:
    """The states of mixers that keep one."""
    mixers = {
        block.layer: path_in_layer(stack.path, block.layer, sites.sites["mixer_output"].path)
        for block, sites in zip(stack.blocks, found, strict=True)
        if "mixer_output" in sites.sites
    }
    shapes = layers_with_state(model, inputs, mixers) if mixers else {}
    for block, sites in zip(stack.blocks, found, strict=True):
        if block.layer in shapes:
            path = sites.sites["mixer_output"].path
            sites.sites["mixer_state"] = Site(path, width="any", read_only=STATE_IS_READ)
        else:
            no_state = "its mixer keeps no state for the next token"
            sites.absent["mixer_state"] = no_state if block.layer in mixers else sites.absent["mixer_output"]


@dataclass
class _Attention:
    """The attention of all blocks, by their paths."""

    own: dict[str, BlockAttention]
    cross: dict[str, BlockAttention]


def _attention(
    stacks: Sequence[BlockStack], model: nn.Module, inputs: Mapping[str, Any], run: Trace
) -> _Attention:
    paths = [block.path for stack in stacks if not stack.refused for block in stack.blocks]
    across = [block.path for stack in stacks if stack.role == "decoder" for block in stack.blocks]
    own = attention_sites(model, inputs, run, paths) if paths else []
    cross = attention_sites(model, inputs, run, across, cross=True) if across else []
    return _Attention(dict(zip(paths, own, strict=True)), dict(zip(across, cross, strict=True)))


def _called_once(
    placed: BlockSites, stack: BlockStack, layer: int, model: nn.Module, run: Trace
) -> BlockSites:
    """The sites whose modules run once in a forward pass, or of which it is said which of their calls in the block
    is meant; a run could not tell the others' values apart.
    """
    sites: dict[str, Site] = {}
    absent = dict(placed.absent)
    block = next(one.call for one in stack.blocks if one.layer == layer)
    for word, site in placed.sites.items():
        module = module_at(model, _path_in(stack, layer, site.path), word)
        calls = [call for call in run.calls if call.module is module]
        times = len(calls)
        if times == 1 or (site.call is not None and all(within(call, block) for call in calls)):
            sites[word] = site
        else:
            absent[word] = f"its module {site.path!r} runs {times} times in a forward pass"
    return BlockSites(sites, absent)


def _path_in(stack: BlockStack, layer: int, path: str) -> str:
    """The path from the model of a part of a block."""
    parts = path_in_layer(stack.path, layer, path) if stack.path else f"{layer}.{path}"
    return parts.rstrip(".")


def _named(placed: BlockSites, prefix: str) -> Placed:
    """The components of a stack by their full names."""

    def full(word: str) -> str:
        return word if word.startswith("cross_") else prefix + word

    sites = {
        full(word): site if site.plus is None else replace(site, plus=full(site.plus))
        for word, site in placed.sites.items()
    }
    return Placed(sites, {full(word): why for word, why in placed.absent.items() if full(word) in COMPONENTS})


def _commonest(layers: Sequence[Placed]) -> Placed:
    """What most layers have; of equally many, the first."""
    counts = Counter(map(repr, layers))
    return max(layers, key=lambda placed: counts[repr(placed)])


# --- the whole --------------------------------------------------------------------------------------------

_WIDTHS: Mapping[str, tuple[Width, ...]] = {
    "embedding_output": ("hidden", "embedding"),
    "mlp_pre_activation": ("mlp",),
    "mlp_activation": ("mlp",),
    "mlp_hidden": ("mlp",),
    "router_output": ("experts",),
    "logits": ("vocabulary",),
}
"""Which size a component's last axis may have; the others have that of the stream."""


def _with_width(
    model: nn.Module, run: Trace, name: str, site: Site, stack: BlockStack | None, layer: int | None = None
) -> Site:
    """A site that says by name how wide its tensor is, if a size of the config says so."""
    known = COMPONENTS[name]
    if known.inside or site.columns is not None or site.width != "any":
        return site
    path = site.path
    if known.scope == "block" and stack is not None:
        blocks = [block for block in stack.blocks if layer is None or block.layer == layer]
        path = _path_in(stack, blocks[0].layer, site.path) if blocks else ""
    calls = run.of(path)[site.call or 0 :]
    if not calls:
        return site
    tensor = calls[0].tensor_at(site.side, site.slot)
    if tensor is None or tensor.dim() > 3:  # several streams side by side
        return site
    sizes = _sizes(model, stack)
    widths = _WIDTHS.get(known.word, ("hidden",))
    fitting = [width for width in widths if sizes.width(width) == tensor.shape[-1]]
    return replace(site, width=fitting[0] if fitting else "any")


def _sizes(model: nn.Module, stack: BlockStack | None) -> Sizes:
    config = getattr(model, "config", None)
    part = None if stack is None or stack.role is None else _config_part(config, stack.role)
    return sizes_of(getattr(config, part) if part else config)


def _config_part(config: object, role: Stack) -> str | None:
    """The name of the part of a config that has the sizes of a stack."""
    for name in (f"{role}_config", role):
        if hasattr(getattr(config, name, None), "to_dict"):
            return name
    return None


def _configs(model: nn.Module, stacks: Sequence[BlockStack]) -> dict[Stack, str]:
    config = getattr(model, "config", None)
    roles = [stack.role for stack in stacks if stack.role is not None]
    return {role: part for role in roles if (part := _config_part(config, role)) is not None}


def _decoder_reads(model: nn.Module, inputs: Mapping[str, Any]) -> Literal["labels", "input_ids"] | None:
    """Of which inputs a model makes the decoder's, where it is given none."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return "labels"
    if not takes(model, "decoder_input_ids") or "input_ids" not in inputs:
        return None
    rest = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    try:
        with torch.no_grad():
            model(**rest)
    except Exception:  # as it says in words of its own
        return None
    return "input_ids"


def _is_causal(model: nn.Module, inputs: Mapping[str, Any], stack: BlockStack) -> bool:
    """Whether the first positions at a stack's end are the same when the later ones that enter it are changed."""
    layout = layout_of(stack, inputs)
    entering, end = stack.first.entering, stack.last.leaving
    placed = layout.placed(Site(""), entering)
    first_axis = counts_time_first(model) and entering.dim() == 3
    axis = (0 if first_axis else 1) if placed.axes is None else placed.axes[1]
    if placed.flat or entering.shape != end.shape:
        return False
    # Behind the tokens there may be padding that nothing reads.
    tokens = inputs.get("input_ids")
    positions = tokens.shape[-1] if isinstance(tokens, Tensor) else entering.shape[axis]
    cut = min(positions, entering.shape[axis]) // 2
    other = entering.clone()
    later = other.narrow(axis, cut, other.shape[axis] - cut)
    later += 1.0 + later.abs()
    seen: list[Tensor] = []
    first, behind = stack.first, stack.last
    hooks = [
        Hook(first.call.entrance.module, "input", lambda passage: passage.put("input", first.given, other)),
        Hook(
            behind.call.exit.module,
            "output",
            lambda at: seen.append(at.take("output", behind.returned).clone()),
        ),
    ]
    with torch.no_grad(), hooked(hooks, model):
        model(**inputs)
    wanted, got = (each.narrow(axis, 0, cut) for each in (end, seen[0]))
    return torch.allclose(got, wanted, rtol=1e-4, atol=1e-4 * float(end.abs().max()))
