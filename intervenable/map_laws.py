"""The laws that what a map says must keep: their names, what each of them demands, and of which components.

All are about numbers in runs of the model at hand. What a component *determines* is tested by writing a whole value
of another run: if the value at `mlp_hidden` is the source's, `mlp_output` has to be the source's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model_maps import COMPONENTS

LAWS: Mapping[str, str] = {
    "bound": "the map's module exists and its tensor has examples, positions and the columns that are named",
    "once": "one forward pass passes the place once",
    "layout": "the columns of heads are apart, inside the tensor, and the view by heads has the numbers of the whole",
    "chain": "a block is given what the one before returned, bit for bit",
    "lookup": "the vector at a position depends on its token alone",
    "reads": "what is multiplied with the first weights is this, bit for bit",
    "projects": "it comes straight from, or goes straight into, a matrix of weights",
    "rows": "rows of the pattern sum to one, or to less where a sink takes a share",
    "causal": "no query reads a key behind itself, if the map says so",
    "sum": "pattern times values is what the head view has",
    "projection": "the shares of all heads and the bias are the attention's output",
    "share": "without some heads the attention's output lacks their shares and nothing else",
    "linear": "parts of what the last matrix is given add up, and so does what is added to the stream",
    "residual": "the stream after it is the stream before and what is added",
    "norm": "the norm's output is its input divided by this, times weights",
    "logits": "what the model returns is this, or this under a function that keeps the order",
    "identity": "writing back what was read changes nothing",
    "determines": "with another run's value here, what follows is that run's",
    "only": "what does not follow from it stays as it was",
    "apart": "it has other numbers than what it is computed from",
    "adds": "the block's output changes as it does by what is added in the end",
    "elementwise": "each column follows from its own column alone",
    "heads": "a head's columns move what that head computes and nothing of other heads",
    "roles": "queries act at their own position, keys and values at others too, values column by column",
    "mixes": "what is given to a mixer at some positions reaches what it returns at others",
    "about": "a stack of tokens is entered by others if its tokens are in another order, a stack beside it is not",
    "attends": "attention to the encoder changes with the encoder alone, attention of a decoder to itself does not",
    "follows": "what is behind a stack's blocks changes with that stack, and not with one that comes later",
    "chosen": "an expert is chosen with a logit far above the others', not with one far below them",
    "weighs": "with twice the weights the experts return twice as much",
    "moves": "a write changes what the block, or the model, returns",
    "ends": "with another run's value here the model returns what it did then",
}
"""Every law by its name, in the order of tables."""

TELLS_NOTHING = ("bound", "once", "layout", "projects", "identity", "moves", "causal", "apart")
"""Laws that a place with another meaning keeps as well."""

TELLS_NOTHING_OF: Mapping[str, tuple[str, ...]] = {
    "value_output": ("only", "heads"),  # no matrix of scores depends on much else, and heads may be wider
    "expanded_head_value": ("only", "heads"),
    "head_attention_value_output": ("determines", "share"),  # all heads are as many as half of them, or twice
    "mlp_input": ("reads",),  # so is whatever a matrix is multiplied with
    "router_input": ("reads",),
}
"""Laws that other places keep as well as these components do."""


class Transfer(NamedTuple):
    """What determines what: with the source's values at `written`, `read` has the source's."""

    written: tuple[str, ...]
    read: str


TRANSFERS: tuple[Transfer, ...] = (
    Transfer(("block_input",), "block_output"),
    Transfer(("block_mid",), "block_output"),
    Transfer(("attention_input",), "attention_output"),
    Transfer(("query_output", "key_output"), "attention_scores"),
    Transfer(("rotary_query", "rotary_key"), "attention_scores"),
    Transfer(("rotary_query", "expanded_head_key"), "attention_scores"),
    Transfer(("query_output", "expanded_head_key"), "attention_scores"),
    Transfer(("head_query_output", "head_key_output"), "attention_scores"),
    Transfer(("attention_scores",), "attention_pattern"),
    Transfer(("attention_scores_masked",), "attention_pattern"),
    Transfer(("value_output", "attention_pattern"), "attention_value_output"),
    Transfer(("head_value_output", "attention_pattern"), "attention_value_output"),
    Transfer(("expanded_head_value", "attention_pattern"), "attention_value_output"),
    Transfer(("attention_value_output",), "attention_output"),
    Transfer(("head_attention_value_output",), "attention_output"),
    Transfer(("head_attention_output",), "attention_output"),
    Transfer(("attention_output",), "attention_contribution"),
    Transfer(("mixer_input",), "mixer_output"),
    Transfer(("mixer_input",), "mixer_state"),
    Transfer(("mixer_output",), "mixer_contribution"),
    Transfer(("mlp_input",), "mlp_pre_activation"),
    Transfer(("mlp_input",), "mlp_output"),
    Transfer(("mlp_pre_activation",), "mlp_activation"),
    Transfer(("mlp_hidden",), "mlp_output"),
    Transfer(("mlp_output",), "mlp_contribution"),
    Transfer(("router_input",), "router_output"),
    Transfer(("router_output",), "expert_choice"),
    Transfer(("router_output",), "expert_weight"),
    Transfer(("router_input", "expert_input"), "expert_output"),
    Transfer(("router_output", "expert_input"), "expert_output"),
)
"""What determines what inside a block whose input is held at the base's."""

ENDS = ("block_output", "final_norm_input", "final_norm_output", "final_norm_scale", "logits")
"""What follows after the blocks, in this order."""

ADDED: Mapping[str, tuple[str, ...]] = {
    "attention_contribution": ("attention_input", "attention_value_output", "attention_output"),
    "mixer_contribution": ("mixer_input", "mixer_output"),
    "mlp_contribution": ("mlp_input", "mlp_hidden", "mlp_output"),
}
"""What is added to the stream, and what changes the stream through it alone."""

ONLY: tuple[tuple[str, str, str], ...] = (
    ("query_output", "attention_pattern", "attention_value_output"),
    ("key_output", "attention_pattern", "attention_value_output"),
    ("rotary_query", "attention_pattern", "attention_value_output"),
    ("rotary_key", "attention_pattern", "attention_value_output"),
    ("expanded_head_key", "attention_pattern", "attention_value_output"),
    ("value_output", "", "attention_scores"),
    ("expanded_head_value", "", "attention_scores"),
)
"""Written, what is held meanwhile, and what has to stay as it was."""

LIMITS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-5,  # norms and softmaxes of many models are computed in float32 all the same
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 8e-2,
}
"""How far two ways to the same number may be apart by rounding, of the largest entry at the position."""


@dataclass(frozen=True)
class Finding:
    """What one law came to for one component in one layer."""

    component: str
    law: str
    layer: int | None
    """The layer; None outside the blocks."""

    passed: bool
    deviation: float
    """How far the numbers are apart, of the largest; 0 where there is nothing to measure."""

    limit: float
    """How far they may be apart."""

    why: str = ""
    """What was compared, in words."""

    compared: str = ""
    """The component that it was compared with, if the law tells something of this one through another."""


def limit_of(dtype: torch.dtype) -> float:
    """How far two ways to the same number may be apart in this dtype."""
    return LIMITS.get(dtype, LIMITS[torch.float32])


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest entry at its position; infinite if the shapes differ.

    Entries that are infinite in the same way do not differ, nor do those that are masked with the least number.

    Example:
        >>> round(deviation(torch.tensor([[1.0, 100.0]]), torch.tensor([[2.0, 100.0]])), 3)
        0.01
    """
    if found.shape != expected.shape:
        return float("inf")
    if found.dtype == expected.dtype and torch.equal(found, expected):  # as most are that are compared
        return 0.0
    dtype = expected.dtype if expected.is_floating_point() else torch.float32
    wide = torch.promote_types(expected.dtype, torch.float32)
    found, expected = found.to(wide), expected.to(wide)
    same = found == expected
    difference = torch.where(same, torch.zeros_like(found), (found - expected).abs()).nan_to_num(
        torch.inf, torch.inf
    )
    if difference.numel() == 0:
        return 0.0
    counts = expected.isfinite() & (expected > torch.finfo(dtype).min)
    size = torch.where(counts, expected.abs(), torch.zeros_like(expected))
    largest = size.amax()
    scale = size.amax(-1, keepdim=True).clamp(min=max(1e-3 * float(largest), 1e-12))
    return float((difference / scale).amax())


def told(scores: Tensor) -> Tensor:
    """Which scores are not masked: a softmax gives weight to none that lies a thousand below the largest of its row.

    Example:
        >>> told(torch.tensor([[1.0, -1e4, -torch.inf]])).tolist()
        [[True, False, False]]
    """
    return scores.isfinite() & (scores > scores.amax(-1, keepdim=True) - 1000)


def named(word: str, prefix: str) -> str:
    """A component's name in a stack; of what cross attention has not, the decoder's.

    Example:
        >>> named("attention_input", "cross"), named("block_output", "cross"), named("block_output", "")
        ('cross_attention_input', 'decoder_block_output', 'block_output')
    """
    if not prefix:
        return word
    name = f"{prefix}_{word}"
    return name if name in COMPONENTS or prefix != "cross" else f"decoder_{word}"
