"""Everything in one block, put together: stream, attention, MLP, experts, mixers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from intervenable.map_attention import BlockAttention
from intervenable.map_blocks import Block
from intervenable.map_layout import Layout
from intervenable.map_mixers import BRANCHES, Branch, mixer_sites, mixing_modules
from intervenable.map_mlp import mlp_sites, site_at
from intervenable.map_modules import Key, has_matrix, holds, is_elementwise, is_linear, is_norm, key_of
from intervenable.map_routers import expert_sites
from intervenable.map_stream import Contribution, residual_of, seen_as
from intervenable.map_trace import Call, Trace
from intervenable.map_values import BlockValues, Seen
from model_maps import Site, Sizes
from model_maps.families import FUSED_EXPERTS

PARALLEL = "it adds attention and MLP in parallel, so there is no stream between them"
NO_SUM = "the stream that leaves its blocks is no sum of what enters them and what modules of theirs return"
SINGLE = "its block adds one thing to the stream, so there is nothing between"
SCALED = "its blocks scale the stream that they add to"
NORMED = "the stream is scaled or normed before attention is added to it"
NARROW = "its attention is not added to the stream that its blocks hand on, so what is cannot be told apart"
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
    run: Trace,
    blocks: Sequence[Block],
    own: Sequence[BlockAttention],
    cross: Sequence[BlockAttention | None],
    layout: Layout,
    sizes: Sizes,
) -> list[BlockSites]:
    """The components of the blocks of a stack.

    Args:
        model: The model.
        inputs: Its inputs.
        run: A trace of the model on these inputs.
        blocks: The blocks, as they were called.
        own: Their attention to their own positions.
        cross: Their attention to another stack, if they have any.
        layout: The layout of the stack's stream.
        sizes: The sizes of the stack.
    """
    calls: dict[nn.Module, int] = {}
    for call in run.calls:
        calls[call.module] = calls.get(call.module, 0) + 1
    repeated = {module for module, times in calls.items() if times > 1}
    views = [
        _View(block, BlockValues(block.call, layout, repeated), attention, other, sizes)
        for block, attention, other in zip(blocks, own, cross, strict=True)
    ]
    asked = {call.path for view in views for call in view.to_ask()}
    mixing = mixing_modules(model, inputs, run, asked, layout)
    return [view.answer(mixing) for view in views]


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
        self.attentions = {"attention": own} | ({} if cross is None else {"cross": cross})
        self.sizes = sizes
        self.residual = residual_of(values, block.entering, block.leaving)
        self.parts = self.residual.contributions if self.residual is not None else []
        self.stream: set[Key] = {key_of(block.entering), key_of(block.leaving)}
        for stage in self.residual.stages if self.residual is not None else ():
            if stage.base is not None:
                self.stream.add(stage.base.key)
        self.sites: dict[str, Site] = {}
        self.absent: dict[str, str] = {}
        self.branches: list[Branch] = []

    # -- branches

    def to_ask(self) -> list[Call]:
        """What might read other positions, of which attention is not known."""
        parts = [part for part in (*self.parts, *self._unsummed()) if self._attention_in(part) is None]
        makers = [call for part in parts for call in self._makers(part)]
        return [call for call in makers if call.module not in self.values.repeated]

    def _makers(self, part: Contribution) -> list[Call]:
        """The module that makes a contribution; if it is one matrix, what returns the input of that."""
        core = part.core.call
        if not is_linear(core.module):
            return [core]
        before = None if core.main_input is None else key_of(core.main_input)
        if before is None or before in self.stream:
            return []
        made = [seen.call for seen in self.values.returned_like(before) if seen.call.left < core.left]
        once = [call for call in made if call.module not in self.values.repeated]
        return [call for call in once if not is_norm(call)][-1:]

    def _attention_in(self, part: Contribution) -> Branch | None:
        """Which attention a contribution comes from, if it does."""
        for name, found in self.attentions.items():
            if found.path is None:
                continue
            for call in self.values.calls:
                if self.values.path(call) == found.path and self._is_of(part.core.call, call):
                    return BRANCHES[name]
        weighing = any(_weighs(call) for call in (part.core.call, *self._makers(part)))
        return "attention" if weighing else None

    def _is_of(self, core: Call, attention: Call) -> bool:
        """Whether a module holds the attention, is a part of it, or is given what it returns."""
        if holds(core, attention) or holds(attention, core):
            return core is not self.values.call
        given = core.main_input
        keys = {key_of(tensor) for tensor in attention.outputs.values()}
        return given is not None and key_of(given) in keys

    def _branch(self, part: Contribution, mixing: Mapping[str, bool]) -> Branch:
        attention = self._attention_in(part)
        mixes = any(mixing.get(call.path) for call in self._makers(part))
        return attention or ("mixer" if mixes else "mlp")

    def _branches(self, mixing: Mapping[str, bool]) -> list[Branch]:
        """The branch of each contribution."""
        found = [self._branch(part, mixing) for part in self.parts]
        if found == ["mixer", "mixer"]:
            found[-1] = "mlp"  # RWKV's, which looks one position back
        return found

    def _of(self, *branches: Branch) -> list[Contribution]:
        """The contributions of these branches, in order."""
        return [part for part, branch in zip(self.parts, self.branches, strict=True) if branch in branches]

    def _unsummed(self) -> list[Contribution]:
        """Of a block that is no sum: its parts with a matrix that return vectors like the stream's."""
        if self.residual is not None:
            return []
        found = []
        layout = self.values.layout
        for call in self.values.call.children:
            given, returned = call.main_input, call.main_output
            if returned is None or given is None or is_norm(call) or not has_matrix(call.module):
                continue
            as_stream = given.dim() == 3 and given.shape[:2] == (layout.examples, layout.positions)
            if as_stream and returned.shape == given.shape and any(call.children):
                seen = Seen(call, "output", None, returned, key_of(returned))
                found.append(Contribution(seen, 1.0, seen))
        return found

    # -- sites

    def answer(self, mixing: Mapping[str, bool]) -> BlockSites:
        """All components of the block."""
        block = self.block
        entering = Seen(block.call.entrance, "input", block.given, block.entering, key_of(block.entering))
        leaving = Seen(block.call.exit, "output", block.returned, block.leaving, key_of(block.leaving))
        self.sites = {
            "block_input": site_at(self.values, entering),
            "block_output": site_at(self.values, leaving),
        }
        for name, found in self.attentions.items():
            prefix = "cross_" if name == "cross" else ""
            self.sites |= {prefix + word: site for word, site in found.sites.items()}
            self.absent |= {prefix + word: why for word, why in found.absent.items()}
        self.branches = self._branches(mixing)
        self._place_attention()
        self._place_middles()
        self._place_mlp(mixing)
        self._place_mixer(mixing)
        missing = {word: why for word, why in self.absent.items() if word not in self.sites}
        return BlockSites(self.sites, missing)

    def _place_attention(self) -> None:
        for branch, prefix in (("attention", ""), ("cross", "cross_")):
            word = f"{prefix}attention_contribution"
            if branch not in self.attentions:
                continue
            parts = self._of(BRANCHES[branch])
            if len(parts) != 1:
                why = f"its block adds {len(parts)} results of attention" if parts else NARROW
                self.absent[word] = NO_SUM if self.residual is None else why
                continue
            if not self._is_added(parts[0]):
                self.absent[word] = SCALED
                continue
            place = site_at(self.values, parts[0].seen, scale=parts[0].scale)
            output = self.sites.get(f"{prefix}attention_output")
            if output is None or (place.path, place.slot, place.scale) != (output.path, output.slot, 1.0):
                self.sites[word] = place

    def _is_added(self, part: Contribution) -> bool:
        """Whether the stream is as it was but for what is added."""
        stages = () if self.residual is None else self.residual.stages
        return all(stage.base_scale == 1.0 for stage in stages if part in stage.contributions)

    def _place_middles(self) -> None:
        """The stream between a block's branches."""
        own, other = self._of("attention", "mixer"), self._of("cross")
        why = ""
        if self.residual is None:
            why = NO_SUM
        elif len(self.parts) < 2 or not own:
            why = SINGLE
        elif len(own) > 1:
            why = f"it adds {len(own)} results of attention and mixers before its MLP"
        else:
            why = self._place_middle("block_mid", "block_input", own)
        if why:
            self.absent["block_mid"] = why
        if "cross" in self.attentions:
            below = "the stream before it is not in one place"
            why = why and below
            if not why and len(other) == 1:
                why = self._place_middle("cross_block_mid", "block_mid", [*own, *other])
            if why or len(other) != 1:
                self.absent["cross_block_mid"] = why or "its block does not add one result of it"

    def _place_middle(self, word: str, base: str, added: Sequence[Contribution]) -> str:
        """Place the stream after these contributions; the reason if that cannot be done."""
        assert self.residual is not None
        stages, last = self.residual.stages, added[-1]
        at = next(index for index, stage in enumerate(stages) if last in stage.contributions)
        if stages[at].contributions[-1] is last and at + 1 < len(stages):
            normed = stages[at + 1].base
            assert normed is not None  # all sums but the first start from a norm
            self.sites[word] = site_at(self.values, self._widest(self.values.returned_like(normed.key)))
            return ""
        if at > 0 or stages[at].base is not None or stages[at].base_scale != 1.0:
            return NORMED
        middle = self.block.entering.detach().flatten().double()
        for part in added:
            middle = middle + part.scale * part.seen.tensor.detach().flatten().double()
        passed = seen_as(self.values, middle.view(self.block.entering.shape))
        passed = [seen for seen in passed if seen.call is not self.values.call]
        if not passed:
            return PARALLEL
        # A module that reads it itself before it returns it would have read another value than the one written.
        read = [seen.call for seen in passed if seen.side == "input"]
        returned = [seen for seen in passed if seen.side == "output" and has_matrix(seen.call.module)]
        returned = [seen for seen in returned if not any(holds(seen.call, call) for call in read)]
        if returned:
            self.sites[word] = site_at(self.values, self._widest(returned))
        else:
            self.sites[word] = site_at(self.values, last.seen, scale=last.scale, plus=base)
        return ""

    def _widest(self, alike: Sequence[Seen]) -> Seen:
        """Of modules that return one value the outermost, those before others that return nothing else."""
        inside = [seen for seen in alike if seen.call is not self.values.call]
        bare = [seen for seen in inside if next(iter(seen.call.outputs)) is None]
        return min(bare or inside, key=lambda seen: seen.call.entered)

    def _place_mlp(self, mixing: Mapping[str, bool]) -> None:
        experts = expert_sites(self.values.call, self.sizes)
        summed = self.residual is not None
        parts = self._of("mlp") or [part for part in self._unsummed() if self._branch(part, mixing) == "mlp"]
        if summed and self.attentions["attention"].path is not None and not self._of("attention"):
            self.absent |= dict.fromkeys(MLP_WORDS, NARROW) | experts.absent
            self.sites |= experts.sites
            return
        if len(parts) > 1:
            # What is linear beside an MLP is a gate, or a short cut.
            parts = [part for part in parts if self._is_nonlinear(part)] or parts
        if len(parts) != 1:
            none = NO_MLP if summed else NO_SUM
            self.absent |= dict.fromkeys(MLP_WORDS, f"its block adds {len(parts)} MLPs" if parts else none)
        else:
            placed = mlp_sites(self.values, parts[0], self.stream)
            inside = FUSED_EXPERTS if experts.sites else {}
            self.sites |= {word: site for word, site in placed.sites.items() if word not in inside}
            self.absent |= placed.absent | inside
            if not summed or not self._is_added(parts[0]):
                self.sites.pop("mlp_contribution", None)
                self.absent["mlp_contribution"] = SCALED if summed else NO_SUM
        self.sites |= experts.sites
        self.absent |= experts.absent

    def _is_nonlinear(self, part: Contribution) -> bool:
        """Whether there is a nonlinearity or a choice among experts in what makes a contribution."""
        for call in (part.core.call, *self._makers(part)):
            chooses = any(met.name in ("top", "softmax") for met in call.met_inside())
            if chooses or any(is_elementwise(inner) for inner in (call, *call.inside())):
                return True
        return False

    def _place_mixer(self, mixing: Mapping[str, bool]) -> None:
        summed = self.residual is not None
        parts = self._of("mixer") or [
            part for part in self._unsummed() if self._branch(part, mixing) == "mixer"
        ]
        if len(parts) != 1:
            why = f"its block adds {len(parts)} mixers" if parts else NO_MIXER
            self.absent |= dict.fromkeys(MIXER_WORDS, why)
            return
        placed = mixer_sites(self.values, parts[0], self._makers(parts[0])[0])
        self.sites |= placed.sites
        self.absent |= placed.absent
        if not summed or not self._is_added(parts[0]):
            self.sites.pop("mixer_contribution", None)
            self.absent["mixer_contribution"] = SCALED if summed else NO_SUM


def _weighs(core: Call) -> bool:
    """Whether a module computes attention: a fused kernel, or a softmax whose result multiplies something."""
    met = core.met_inside()
    if any(one.name == "fused" for one in met):
        return True
    patterns = {
        key_of(one.returned)
        for one in met
        if one.name == "softmax" and one.returned is not None and one.returned.dim() >= 3
    }
    return any(
        key_of(tensor) in patterns for one in met if one.name in ("product", "einsum") for tensor in one.given
    )
