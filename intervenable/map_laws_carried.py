"""Whether blocks are given more of the blocks before them than the stream: what these returned, kept for later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from intervenable.map_laws_groups import Key
from intervenable.map_trace import Slot, Trace
from intervenable.sites import BoundSite
from model_maps import COMPONENTS


def carrying(sites: Mapping[tuple[str, int | None], BoundSite], traced: Trace) -> frozenset[str]:
    """Prefixes of the stacks whose blocks are given vectors as wide as the stream, and each block others.

    In these the last block's output does not determine alone what the model returns.

    Args:
        sites: The places of a map, by component and layer.
        traced: A plain pass.
    """
    found: dict[str, dict[Slot, Tensor]] = {}
    result: set[str] = set()
    for (name, layer), site in sites.items():
        known = COMPONENTS[name]
        if known.word != "block_input" or not layer or site.side != "input":
            continue
        for slot, value in _beside_the_stream(traced, site):
            before = found.setdefault(known.prefix, {}).setdefault(slot, value)
            if before.shape != value.shape or not torch.equal(before, value):
                result.add(known.prefix)
    return frozenset(result)


def pinned(sites: Mapping[tuple[str, int | None], BoundSite], traced: Trace) -> dict[Key, tuple[Slot, ...]]:
    """What blocks are given of other positions than their stream's, and each block other vectors: by `block_input`.

    A few tokens beside those of the input, say. In experiments they are those of the base in all groups, so that what
    the stream does can be told.

    Args:
        sites: The places of a map, by component and layer.
        traced: A plain pass.
    """
    prefixes = carrying(sites, traced)
    found: dict[Key, tuple[Slot, ...]] = {}
    for (name, layer), site in sites.items():
        known = COMPONENTS[name]
        call = traced.call_at(site.path)
        stream = None if call is None else call.tensor_at("input", site.slot)
        if known.word != "block_input" or known.prefix not in prefixes or stream is None or stream.dim() != 3:
            continue
        slots = [
            slot
            for slot, value in _beside_the_stream(traced, site)
            if value.shape[:1] == stream.shape[:1] and value.shape[1] != stream.shape[1]
        ]
        if slots and layer:  # the first block is given what comes of no block
            found[name, layer] = tuple(slots)
    return found


def _beside_the_stream(traced: Trace, site: BoundSite) -> Iterator[tuple[Slot, Tensor]]:
    """What a block is given beside the stream, of the same width."""
    call = next(iter(traced.of(site.path)), None)
    stream = None if call is None else call.tensor_at("input", site.slot)
    if call is None or stream is None:
        return
    for slot, value in call.inputs.items():
        wide = (
            value.is_floating_point() and value.dim() >= stream.dim() and value.shape[-1] == stream.shape[-1]
        )
        if wide and value is not stream and not (value.shape == stream.shape and torch.equal(value, stream)):
            yield slot, value
