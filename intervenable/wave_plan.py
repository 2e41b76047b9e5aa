"""Which cells travel together: as few weights read, and as few tokens computed that no patch changes, as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import nn

from intervenable.cache_memory import format_bytes
from intervenable.errors import ConfigError

READ = 25.0
"""What reading the weights of a block costs, in tokens computed with them, as measured on a CPU."""

WORTH = 1e6
"""From how many weights of a block times tokens on it is worth the trouble to leave tokens out."""

GROWTH = 10.0
"""Of what leaving tokens out must be worth, how much layer by layer growth must save, in weights times tokens."""

OVERHEAD = 5e6
"""What calling a block costs besides, in weights times tokens: what matters for tiny models alone."""


COUNTED = 4
"""So many blocks, evenly spread, tell how large blocks are: to count all weights takes a tiny model a while."""


class Blocks(tuple[nn.Module, ...]):
    """The blocks of a model as they are in one sweep."""

    @cached_property
    def mean_weights(self) -> float:
        """How many weights a block has; 0 if there is none."""
        some = self[:: max(1, len(self) // COUNTED)]
        return sum(map(_weights, some)) / len(some) if some else 0.0


def _weights(block: nn.Module) -> int:
    # What `parameters()` does besides, to tell shared ones, takes longer than to count.
    count, modules = 0, [block]
    while modules:
        module = modules.pop()
        for weight in module._parameters.values():
            if weight is not None:
                count += weight.numel()
        modules += [part for part in module._modules.values() if part is not None]
    return count


def leaves_tokens_out(blocks: Blocks, length: int) -> bool:
    """Whether waves begin at the first token they change: not in tiny models, where caches cost more than tokens."""
    return len(blocks) > 0 and blocks.mean_weights * length >= WORTH


def grows_by_layer(blocks: Blocks, tokens: int) -> bool:
    """Whether rows come layer by layer: not where hooks cost more than what the rows would compute before they come.

    Args:
        blocks: The blocks.
        tokens: Tokens of all rows.
    """
    return len(blocks) * blocks.mean_weights * tokens / 2 >= GROWTH * WORTH


@dataclass(frozen=True)
class Wave:
    """Cells that are computed together."""

    cells: tuple[int, ...]
    """In the order in which they join."""

    start: int
    """The first token that one of them changes."""


@dataclass(frozen=True)
class Costs:
    """What a wave costs and takes."""

    calls: int
    """Calls of blocks in a run."""

    call: float
    """What a call costs, in tokens."""

    row_bytes: float
    """Bytes for one row and one of its tokens."""

    logit_bytes: float
    """Bytes for the logits of one row."""

    @classmethod
    def of(cls, blocks: Blocks, length: int, read_logits: int) -> Costs:
        """Costs of a model, from the sizes of its blocks.

        Args:
            blocks: The blocks.
            length: Tokens of an example.
            read_logits: Logits of one row that are read.
        """
        size = next((weight.element_size() for block in blocks for weight in block.parameters()), 4)
        widths = [
            (part.in_features, part.out_features)
            for block in blocks[:1]
            for part in block.modules()
            if isinstance(part, nn.Linear)
        ]
        hidden = min((min(pair) for pair in widths), default=64)
        widest = max((max(pair) for pair in widths), default=4 * hidden)
        # The hidden state and its neighbours, the MLP's products, and scores of every head with every token.
        per_token = size * (12 * hidden + 4 * widest) + 4 * 3 * length * max(1, hidden // 64)
        return cls(
            max(1, len(blocks)), READ + OVERHEAD / max(blocks.mean_weights, 1.0), per_token, 4.0 * read_logits
        )

    def rows(self, memory: int, tokens: int) -> int:
        """How many rows of so many tokens fit into a budget."""
        return int(memory // (self.row_bytes * max(1, tokens) + self.logit_bytes))


def plan_waves(
    first: Mapping[int, int],
    joins: Mapping[int, int],
    length: int,
    batch: int,
    costs: Costs,
    memory: int,
    suffix: bool,
) -> list[Wave]:
    """Waves that cost least together, always the same for the same sweep.

    Args:
        first: For each cell the first token that it changes.
        joins: For each cell the call of a block at which it comes to the batch.
        length: Tokens of an example.
        batch: Examples of a cell.
        costs: Costs of the model.
        memory: Bytes that the rows of a wave may take.
        suffix: Whether a wave may begin at another token than the first.

    Raises:
        ConfigError: the budget is too small for one cell.
    """
    order = sorted(first, key=lambda cell: (first[cell] if suffix else 0, joins[cell], cell))
    if not order:
        return []
    starts = sorted({first[cell] if suffix else 0 for cell in order})
    needed = min(costs.rows(memory, length - start) for start in starts) // batch
    if needed < 1:
        longest = length - starts[0]
        least = int(batch * (costs.row_bytes * longest + costs.logit_bytes)) + 1
        raise ConfigError(
            f"memory={memory} bytes is too little for one cell of {batch} example(s) of {longest} tokens, which takes"
            f" about {format_bytes(least)}. Give memory={least} or more, or fewer examples at once."
        )
    by_start: dict[int, list[int]] = {start: [] for start in starts}
    for cell in order:
        by_start[first[cell] if suffix else 0].append(cell)
    ends = _cheapest(starts, by_start, joins, length, batch, costs, memory) if len(starts) > 1 else [1]
    waves_found: list[Wave] = []
    begin = 0
    while begin < len(starts):
        end = ends[begin]
        together = [cell for start in starts[begin:end] for cell in by_start[start]]
        together.sort(key=lambda cell: (joins[cell], cell))
        room = max(1, costs.rows(memory, length - starts[begin]) // batch)
        count = -(-len(together) // room)
        size = -(-len(together) // count)
        for i in range(0, len(together), size):
            part = tuple(together[i : i + size])
            waves_found.append(Wave(part, min(first[cell] for cell in part) if suffix else 0))
        begin = end
    return waves_found


def _cheapest(
    starts: Sequence[int],
    by_start: Mapping[int, Sequence[int]],
    joins: Mapping[int, int],
    length: int,
    batch: int,
    costs: Costs,
    memory: int,
) -> list[int]:
    """For each start that waves may begin with, up to which other one those from there on cost least together."""
    counts = np.array([len(by_start[start]) for start in starts])
    work = np.array([sum(costs.calls - max(0, joins[cell]) for cell in by_start[start]) for start in starts])
    cells_before, work_before = np.r_[0, counts.cumsum()], np.r_[0, work.cumsum()]
    best = np.full(len(starts) + 1, np.inf)
    best[-1] = 0.0
    upto = np.zeros(len(starts), dtype=int)
    for begin in range(len(starts) - 1, -1, -1):
        tokens = (length - starts[begin]) * batch
        room = max(1, costs.rows(memory, length - starts[begin]) // batch)
        ends = np.arange(begin + 1, len(starts) + 1)
        waves = -(-(cells_before[ends] - cells_before[begin]) // room)
        total = (
            waves * costs.calls * (costs.call + tokens) + (work_before[ends] - work_before[begin]) * tokens
        )
        total = total + best[ends]
        chosen = int(total.argmin())
        best[begin], upto[begin] = total[chosen], ends[chosen]
    return upto.tolist()
