"""Everything in one block, put together: stream, attention, MLP, experts, mixers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from intervenable.map_attention import BlockAttention
from intervenable.map_blocks import Block
from intervenable.map_mixers import Branch, mixer_sites, mixing_calls
from intervenable.map_mlp import mlp_sites, site_at
from intervenable.map_routers import expert_sites
from intervenable.map_stream import Contribution, Residual, residual_of, seen_as
from intervenable.map_trace import Call
from intervenable.map_values import BlockValues, Key, has_matrix, is_linear, key_of
from model_maps import Site, Sizes
from model_maps.families import FUSED_EXPERTS

PARALLEL = "it adds attention and MLP in parallel, so there is no stream between them"
NO_SUM = "the stream that leaves its blocks is no sum of what enters them and what modules of theirs return"
SINGLE = "its block adds one thing to the stream, so there is nothing between"
NO_MLP = "its block has no MLP"
NO_MIXER = "its blocks mix positions by attention alone"
MLP_WORDS = (
    "mlp_input",
    "mlp_pre_activation",
    "mlp_activation",
    "mlp_hidden",
    "mlp_output",
    "mlp_contribution",
)
MIXER_WORDS = ("mixer_input", "mixer_output", "mixer_contribution")


@dataclass(frozen=True)
class BlockSites:
    """What was found in one block: word -> site, and word -> why there is none."""

    sites: dict[str, Site]
    absent: dict[str, str]


def block_sites(
    model: nn.Module,
    inputs: Mapping[str, Any],
    blocks: Sequence[Block],
    own: Sequence[BlockAttention],
    cross: Sequence[BlockAttention | None],
    sizes: Sizes,
) -> list[BlockSites]:
    """The components of the blocks of a stack.

    Args:
        model: The model.
        inputs: Its inputs.
        blocks: The blocks, as they were called.
        own: Their attention to their own positions.
        cross: Their attention to another stack, if they have any.
        sizes: The sizes of the stack.
    """
    views = [
        _View(block, BlockValues(block.call), attention, other, sizes)
        for block, attention, other in zip(blocks, own, cross, strict=True)
    ]
    asked = [view.to_ask() for view in views]
    mixing = mixing_calls(
        model, inputs, blocks, [[f"{v.block.path}.{p}" for p in a] for v, a in zip(views, asked, strict=True)]
    )
    return [view.answer(known) for view, known in zip(views, mixing, strict=True)]


class _View:
    """One block: what it adds to the stream, and what each of these things is."""

    def __init__(
        self,
        block: Block,
        values: BlockValues,
        own: BlockAttention,
        cross: BlockAttention | None,
        sizes: Sizes,
    ) -> None:
        self.block = block
        self.values = values
        self.own = own
        self.cross = cross
        self.sizes = sizes
        self.residual: Residual | None = residual_of(values, block.entering, block.leaving)
        self.parts = self.residual.contributions if self.residual is not None else []
        self.stream: set[Key] = {key_of(block.entering), key_of(block.leaving)}
        for stage in self.residual.stages if self.residual is not None else ():
            if stage.base is not None:
                self.stream.add(stage.base.key)

    def to_ask(self) -> list[str]:
        """Paths of what is added by modules that might read other positions."""
        return [
            self.values.path(part.core.call)
            for part in self.parts
            if self._attention_in(part) is None and not is_linear(part.core.call.module)
        ]

    def _attention_in(self, part: Contribution) -> Branch | None:
        """Which attention a contribution comes from, if it does."""
        for name, found in (("attention", self.own), ("cross", self.cross)):
            if found is None or found.path is None:
                continue
            (call, *_) = [call for call in self.values.calls if self.values.path(call) == found.path]
            if _holds(part.core.call, call) or self._reads(part.core.call, call):
                return name  # type: ignore[return-value]
        return None

    def _reads(self, core: Call, attention: Call) -> bool:
        """Whether a matrix is given what an attention module returned."""
        if not is_linear(core.module) or core.main_input is None:
            return False
        if _holds(attention, core):
            return True
        given = key_of(core.main_input)
        return any(key_of(tensor) == given for tensor in attention.outputs.values())

    def answer(self, mixing: Mapping[str, bool]) -> BlockSites:
        """All components of the block."""
        sites: dict[str, Site] = {
            "block_input": Site("", "input", slot=self.block.given, width="any"),
            "block_output": Site("", slot=self.block.returned, width="any"),
            **self.own.sites,
        }
        absent = dict(self.own.absent)
        if self.cross is not None:
            sites |= {f"cross_{word}": site for word, site in self.cross.sites.items()}
            absent |= {f"cross_{word}": why for word, why in self.cross.absent.items()}
        branches = [self._branch(part, mixing) for part in self.parts]
        self._place_attention(sites, branches)
        self._place_middle(sites, absent, branches)
        self._place_mlp(sites, absent, branches)
        self._place_mixer(sites, absent, branches)
        return BlockSites(sites, {word: why for word, why in absent.items() if word not in sites})

    def _branch(self, part: Contribution, mixing: Mapping[str, bool]) -> Branch:
        attention = self._attention_in(part)
        if attention is not None:
            return attention
        return "mixer" if mixing.get(f"{self.block.path}.{self.values.path(part.core.call)}") else "mlp"

    def _only(self, branches: Sequence[Branch], branch: Branch) -> Contribution | None:
        found = [part for part, kind in zip(self.parts, branches, strict=True) if kind == branch]
        return found[0] if len(found) == 1 else None

    def _place_attention(self, sites: dict[str, Site], branches: Sequence[Branch]) -> None:
        for branch, prefix in (("attention", ""), ("cross", "cross_")):
            part = self._only(branches, branch)  # type: ignore[arg-type]
            output = sites.get(f"{prefix}attention_output")
            if part is None:
                continue
            place = site_at(self.values, part.seen, scale=part.scale)
            if output is None or (place.path, place.slot, place.scale) != (output.path, output.slot, 1.0):
                sites[f"{prefix}attention_contribution"] = place

    def _place_middle(
        self, sites: dict[str, Site], absent: dict[str, str], branches: Sequence[Branch]
    ) -> None:
        if self.residual is None:
            absent |= dict.fromkeys(("block_mid", "attention_contribution"), NO_SUM)
            return
        own = [
            part
            for part, branch in zip(self.parts, branches, strict=True)
            if branch in ("attention", "mixer")
        ]
        other = [part for part, branch in zip(self.parts, branches, strict=True) if branch == "cross"]
        if len(self.parts) < 2 or not own:
            absent["block_mid"] = SINGLE
            return
        if len(own) > 1:
            absent["block_mid"] = f"it adds {len(own)} results of attention and mixers before its MLP"
            return
        below = self._middle("block_mid", "block_input", own, sites, absent)
        if len(other) == 1 and below:
            self._middle("cross_block_mid", "block_mid", [*own, *other], sites, absent)

    def _middle(
        self,
        word: str,
        base: str,
        added: Sequence[Contribution],
        sites: dict[str, Site],
        absent: dict[str, str],
    ) -> bool:
        """Place the stream after these contributions."""
        assert self.residual is not None
        last = added[-1]
        at = next(index for index, stage in enumerate(self.residual.stages) if last in stage.contributions)
        stage = self.residual.stages[at]
        if stage.contributions[-1] is last and at + 1 < len(self.residual.stages):
            normed = self.residual.stages[at + 1].base
            assert normed is not None
            sites[word] = site_at(self.values, self._widest(self.values.returned_like(normed.key)))
            return True
        if at > 0 or stage.base is not None or stage.base_scale != 1.0:
            absent[word] = "the stream is scaled or normed before attention is added to it"
            return False
        middle = self.block.entering.detach().flatten().double()
        for part in added:
            middle = middle + part.scale * part.seen.tensor.detach().flatten().double()
        passed = seen_as(self.values, middle.view(self.block.entering.shape))
        if not passed:
            absent[word] = PARALLEL
            return False
        returned = [seen for seen in passed if seen.side == "output" and has_matrix(seen.call.module)]
        if returned:
            sites[word] = site_at(self.values, self._widest(returned))
            return True
        place = site_at(self.values, last.seen, scale=last.scale)
        sites[word] = Site(
            place.path, slot=place.slot, flat=place.flat, scale=place.scale, width="any", plus=base
        )
        return True

    def _widest(self, alike: Sequence[Any]) -> Any:
        """Of modules that return one value the outermost, those before others that return nothing else."""
        inside = [seen for seen in alike if seen.call is not self.values.call]
        bare = [seen for seen in inside if next(iter(seen.call.outputs)) is None]
        return min(bare or inside, key=lambda seen: seen.call.entered)

    def _place_mlp(self, sites: dict[str, Site], absent: dict[str, str], branches: Sequence[Branch]) -> None:
        experts = expert_sites(self.block.call, self.sizes)
        part = self._only(branches, "mlp")
        if part is None:
            count = list(branches).count("mlp")
            why = (
                NO_SUM if self.residual is None else NO_MLP if count == 0 else f"its block adds {count} MLPs"
            )
            absent |= dict.fromkeys(MLP_WORDS, why)
        else:
            placed = mlp_sites(self.values, part, self.stream)
            inside = FUSED_EXPERTS if experts.sites else {}
            sites |= {word: site for word, site in placed.sites.items() if word not in inside}
            absent |= placed.absent | inside
        sites |= experts.sites
        absent |= experts.absent

    def _place_mixer(
        self, sites: dict[str, Site], absent: dict[str, str], branches: Sequence[Branch]
    ) -> None:
        part = self._only(branches, "mixer")
        if part is None:
            count = list(branches).count("mixer")
            absent |= dict.fromkeys(MIXER_WORDS, NO_MIXER if count == 0 else f"its block adds {count} mixers")
            return
        placed = mixer_sites(self.values, part, self.stream)
        sites |= placed.sites
        absent |= placed.absent


def _holds(call: Call, other: Call) -> bool:
    around: Call | None = other
    while around is not None:
        if around is call:
            return True
        around = around.parent
    return False
