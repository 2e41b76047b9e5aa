"""How many multiply-adds a sweep by hooks does, and how many of them the patches can change.

A hook loop computes every position of every layer, and every logit, once for each cell and once for the clean
prompt. A patch at layer `l` and position `j` can change the positions from `j` on of the layers from `l` on; of
the last layer, only its keys and values there and the one position that the metric reads; of the logits, the
two that it reads. Where clean and corrupted values are equal the cell is known without a run. Products with
weights and with keys and values are counted, those that a causal mask hides are not.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from benchmarks.overhead import seconds_of
from benchmarks.sweep_contenders import RESIDUAL, Case, random_case

BUSY_ROWS = (8, 32)
"""Prompts and tokens of a pass that keeps the processor as busy as it gets."""

READ_TOKENS = 2
"""Logits that the metric reads."""


@dataclass(frozen=True)
class Limit:
    """What one sweep asks of the processor."""

    model: str
    prompts: str
    sweep: str
    by_hooks: int  # multiply-adds
    changed: int  # those of them that the patches can change
    busy_seconds: float  # that a fully busy processor would need for the changed ones

    @property
    def ratio(self) -> float:
        return self.by_hooks / self.changed


@dataclass(frozen=True)
class TokenCosts:
    """Multiply-adds for one token."""

    block: int  # all weights of a block
    key_value: int  # those that make keys and values
    attention: int  # those that make queries, keys and values
    score: int  # one key: its score, and its share of the values
    unembedding: int  # one logit
    vocabulary: int

    @classmethod
    def of(cls, case: Case) -> TokenCosts:
        config = case.model.config
        width, heads = config.hidden_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or width // heads
        key_value_heads = getattr(config, "num_key_value_heads", None) or heads
        block = case.model.get_submodule(case.block_path(0))
        return cls(
            block=sum(weight.numel() for weight in block.parameters() if weight.dim() == 2),
            key_value=2 * width * key_value_heads * head,
            attention=width * (heads + 2 * key_value_heads) * head,
            score=2 * heads * head,
            unembedding=width,
            vocabulary=config.vocab_size,
        )


def scores(begin: int, end: int) -> int:
    """Keys that the queries `begin` to `end - 1` see, each itself and all before it.

    Example:
        >>> scores(0, 3), scores(2, 3)
        (6, 3)
    """
    return (end * (end + 1) - begin * (begin + 1)) // 2


def plain_pass(case: Case) -> int:
    """Multiply-adds of one forward pass of all prompts with all logits."""
    cost, tokens = TokenCosts.of(case), len(case.positions)
    layer = tokens * cost.block + scores(0, tokens) * cost.score
    return len(case.clean) * (len(case.layers) * layer + tokens * cost.vocabulary * cost.unembedding)


def hook_loop(case: Case) -> int:
    """Multiply-adds of the whole loop: the clean run and one run a cell."""
    return (case.cells + 1) * plain_pass(case)


def changed(case: Case) -> int:
    """Multiply-adds that the patches can change, over all cells."""
    return sum(changed_by(case, layer, column) for layer in case.layers for column in case.columns)


def changed_by(case: Case, layer: int, column: int) -> int:
    """Multiply-adds that one cell can change; 0 where the patch writes what is there already."""
    cost, tokens, last = TokenCosts.of(case), len(case.positions), case.layers[-1]
    differing = (case.clean != case.corrupted).any(0).nonzero().flatten().tolist()
    first = differing[0]
    begin = column if case.sweep == RESIDUAL else first
    if begin < first or (layer == 0 and begin not in differing):
        return 0
    suffix = tokens - begin
    whole = suffix * cost.block + scores(begin, tokens) * cost.score
    last_layer = suffix * cost.key_value + cost.block - cost.key_value + tokens * cost.score
    if case.sweep == RESIDUAL:
        patched_layer = last_layer if layer == last else whole
    else:  # what mixes the heads, and the feed-forward layer
        patched_layer = (1 if layer == last else suffix) * (cost.block - cost.attention)
    above = (last - layer - 1) * whole + last_layer if layer < last else 0
    return len(case.clean) * (patched_layer + above + READ_TOKENS * cost.unembedding)


def best_rate(model: PreTrainedModel) -> float:
    """Multiply-adds a second in a pass so large that reading the weights costs nothing to speak of."""
    large = random_case(model, *BUSY_ROWS, differing=[0], sweep=RESIDUAL)
    return plain_pass(large) / min(seconds_of(lambda: model(large.corrupted).logits, 1) for _ in range(3))


def limit_of(model: str, prompts: str, case: Case, rate: float) -> Limit:
    possible = changed(case)
    return Limit(model, prompts, case.sweep, hook_loop(case), possible, possible / rate)
