"""Where the experts of a block are: its router, what it chooses, and the module that all experts are in.

The numbers say it: experts are given, beside the stream, which of them each position is sent to (whole numbers) and
with which weights (of the same shape). The router is what handed these over, and the result of the last linear map in
it are its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor, nn

from intervenable.map_trace import Call, Met, Slot, paths_of
from model_maps import Side, Site, Sizes, Width
from model_maps.families import CHOICE_IS_READ, NO_EXPERTS, lacking

DENSE = "each of its experts is given every position, multiplied by its weight before"
SORTED = "its experts are given the positions that are sent to each of them, one after another"
MASKED = "its experts are told by a mask of all of them which positions are theirs"
UNTOLD = "it chooses among experts in a way that none of its modules hands over"


class Experts(NamedTuple):
    """What is known of a block's experts."""

    sites: dict[str, Site]
    """Word -> where it is, from the block."""

    absent: dict[str, str]
    """Word -> why the block has none."""


def expert_sites(block: Call, sizes: Sizes) -> Experts:
    """The sites of one block's router and experts.

    Args:
        block: A call of the block, in a trace.
        sizes: The sizes of the model it was traced in.
    """
    search = _Search(block, sizes)
    sites, why = search.told(), MASKED
    if not sites:
        sites = search.only_routed()
        why = SORTED if "expert_weight" in sites else DENSE
    if not sites:
        return Experts({}, lacking(*NO_EXPERTS, why=UNTOLD) if search.chooses() else dict(NO_EXPERTS))
    return Experts(sites, lacking(*(word for word in NO_EXPERTS if word not in sites), why=why))


@dataclass(frozen=True)
class _Search:
    block: Call
    sizes: Sizes

    def told(self) -> dict[str, Site]:
        """Of experts in one module that is told where positions go."""
        for experts in self.block.inside():
            slots = _choice_and_weight(experts)
            if slots is None:
                continue
            choice, weight = slots
            router = _router_of(experts, experts.inputs[choice])
            logits = None if router is None else self._logits(router)
            if router is None or logits is None:
                continue
            numbers, weights = experts.inputs[choice], experts.inputs[weight]
            sites = {
                "router_input": self._site(router, router.main_input, "input"),
                "router_output": logits,
                "expert_weight": self._site(experts, weights, "input", weight),
                "expert_input": self._site(experts, experts.main_input, "input"),
                "expert_output": self._site(experts, experts.main_output),
            }
            if numbers.shape == weights.shape and _all_differ(numbers):
                sites["expert_choice"] = self._site(
                    experts, numbers, "input", choice, read_only=CHOICE_IS_READ
                )
            return sites
        return {}

    def chooses(self) -> bool:
        """Whether something in the block takes the largest of some numbers, attention to positions aside."""
        calls = (call for call in self.block.inside() if any(met.name == "top" for met in call.met))
        return any(not self._pays_attention(call) for call in calls)

    def only_routed(self) -> dict[str, Site]:
        """Of a router that takes the largest of its logits and tells no module which."""
        for router in self.block.inside():
            tops = [met for met in router.met if met.name == "top"]
            last = _last_linear(router)
            logits = self._logits(router)
            # Of several choices the first is among groups of experts, or among parts of a product.
            if len(tops) != 1 or last is None or logits is None or self._pays_attention(router):
                continue
            (top,) = tops
            if not _same(last.returned, top.given[0]):
                continue
            inside = {"path": self._path(router), "width": "any", "flat": top.given[0].dim() == 2}
            sites = {
                "router_input": self._site(router, router.main_input, "input"),
                "router_output": logits,
                "expert_choice": Site(**inside, slot=1, function="top", read_only=CHOICE_IS_READ),  # type: ignore[arg-type]
            }
            softmaxes = [met for met in router.met if met.name == "softmax"]
            for nth, met in enumerate(softmaxes):
                if _same(met.given[0], top.returned):
                    sites["expert_weight"] = Site(**inside, function="softmax", nth=nth)  # type: ignore[arg-type]
            return sites
        return {}

    def _pays_attention(self, router: Call) -> bool:
        """Whether a call is inside attention, which may have a router of its own (or chooses keys, not experts)."""
        call = router.parent
        while call is not None and call is not self.block:
            if any(met.name in ("fused", "softmax") for met in call.met):
                return True
            call = call.parent
        return False

    def _logits(self, router: Call) -> Site | None:
        """Where a router's logits are: the result of the last linear map in it."""
        last = _last_linear(router)
        if last is None or last.returned is None:
            return None
        handed_over = len(router.outputs) == 1 and _same(router.main_output, last.returned)
        if handed_over and not any(met.name in ("top", "softmax") for met in router.met):
            return self._site(router, last.returned)
        if last.call is not router and _same(last.call.main_output, last.returned):
            return self._site(last.call, last.returned)
        linears = [met for met in router.met_inside() if met.name == "linear"]
        return Site(
            self._path(router),
            width=self._width(last.returned),
            flat=last.returned.dim() == 2,
            function="linear",
            nth=linears.index(last),
        )

    # -- sites

    @cached_property
    def _paths(self) -> Mapping[nn.Module, str]:
        return paths_of(self.block.module)

    def _path(self, call: Call) -> str:
        return self._paths[call.module]

    def _width(self, tensor: Tensor) -> Width:
        if not tensor.is_floating_point():
            return "any"
        size = tensor.shape[-1]
        names: tuple[Width, ...] = ("hidden", "experts")
        return next((name for name in names if self.sizes.width(name) == size), "any")

    def _site(
        self,
        call: Call,
        tensor: Tensor | None,
        side: Side = "output",
        slot: Slot = None,
        *,
        read_only: str = "",
    ) -> Site:
        assert tensor is not None  # a call without it was passed over
        width = "any" if slot is not None else self._width(tensor)
        return Site(self._path(call), side, slot, width=width, flat=tensor.dim() == 2, read_only=read_only)


def _all_differ(numbers: Tensor) -> bool:
    """Whether each position has each number once, as it has experts; a mask of all experts has noughts."""
    ordered = numbers.sort(-1).values
    return bool((ordered[..., 1:] != ordered[..., :-1]).all())


def _choice_and_weight(call: Call) -> tuple[Slot, Slot] | None:
    """The slots of whole numbers and of as many weights, if a call is given such beside a stream.

    The numbers are those of experts, or for each weight a mask with an entry for each expert.
    """
    main = call.main_input
    if main is None or not main.is_floating_point() or call.main_output is None:
        return None
    for choice, numbers in call.inputs.items():
        if numbers.dtype not in (torch.int64, torch.int32) or numbers.dim() < 2:
            continue
        for weight, weights in call.inputs.items():
            masked = numbers.dim() > 2 and numbers.shape[:-1] == weights.shape and bool((numbers <= 1).all())
            alike = weights.shape == numbers.shape or masked
            if alike and weights.is_floating_point() and weights is not main:
                return choice, weight
    return None


def _router_of(experts: Call, choice: Tensor) -> Call | None:
    """The module beside the experts that hands over the numbers, or what these are found with."""
    if experts.parent is None:
        return None
    before = [call for call in experts.parent.children if call.entered < experts.entered and call.outputs]
    for call in reversed(before):
        if call.main_input is not None and any(_same(output, choice) for output in call.outputs.values()):
            return call
    met = [one for one in experts.parent.met if one.name in ("softmax", "top") and one.at < experts.entered]
    for call in reversed(before):
        if call.main_input is not None and any(_same(one.given[0], call.main_output) for one in met):
            return call
    return None


def _last_linear(router: Call) -> Met | None:
    met = [one for one in router.met_inside() if one.name == "linear"]
    return met[-1] if met else None


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors hold the same values, in whatever number of axes."""
    if one is None or other is None or one.numel() != other.numel() or one.shape[-1] != other.shape[-1]:
        return False
    return torch.equal(one.flatten(), other.flatten().to(one.dtype))
