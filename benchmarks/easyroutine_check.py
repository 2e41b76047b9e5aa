"""What easyroutine 1.1.5 computes when it edits a pattern, beside the same thing written by hand.

`benchmarks/easyroutine.md` says how to make the environment that it needs and what was seen there. A tiny
Llama with random weights, one prompt of 8 tokens, one head of the middle layer.

Example:
    python -m benchmarks.easyroutine_check
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention import difference
from benchmarks.attention_contenders import (
    EASYROUTINE_LLAMA,
    HEAD,
    Case,
    by_hand,
    case_on,
    load,
    loading,
)

TOKENS = 8


def hooked(case: Case) -> Any:
    """easyroutine around a copy of the model."""
    from easyroutine.interpretability.hooked_model import HookedModel, HookedModelConfig

    logging.getLogger("easyroutine").setLevel(logging.ERROR)
    with loading(case.copy(eager=True)):
        return HookedModel(HookedModelConfig(EASYROUTINE_LLAMA, device_map="cpu", torch_dtype=torch.float32))


def run(model: Any, case: Case, kind: str, **options: Any) -> tuple[Tensor, Tensor]:
    """The pattern of the head and the logits, with the middle column edited."""
    from easyroutine.interpretability import ExtractionConfig, Intervention

    name = f"pattern_L{case.layer}H{HEAD}"
    inputs = {"input_ids": case.ids, "attention_mask": torch.ones_like(case.ids)}
    chosen = [{"layer": case.layer, "head": HEAD}]
    cache = model(
        inputs,
        target_token_positions=["all", case.key],
        extraction_config=ExtractionConfig(extract_attn_pattern=True, attn_heads=chosen),
        interventions=[Intervention(kind, name, [case.key], **options)],
    )
    return cache[name][0, :TOKENS, :TOKENS], cache["logits"][:, :TOKENS]


def weight_on_the_future(pattern: Tensor) -> float:
    return pattern.triu(1).max().item()


def report() -> list[str]:
    """One line a fact."""
    case = case_on(load("tiny-llama"), 1, TOKENS)
    model = hooked(case)
    lines = []

    pattern, logits = run(model, case, "columns")
    far = difference([logits], by_hand(case, "zero a key")())
    sums = ", ".join(f"{total:.2f}" for total in pattern.sum(-1).tolist())
    lines.append(f"columns: the logits differ from the hand-written edit's by {far:.1e} of their largest")
    lines.append(f"columns: the rows sum to {sums}; nothing is renormalised")

    pattern, _ = run(model, case, "columns", apply_softmax=True)
    lines.append(f"columns, apply_softmax: weight on the future up to {weight_on_the_future(pattern):.2f}")

    try:
        run(model, case, "columns_pre_softmax")
    except ValueError as error:
        lines.append(f"columns_pre_softmax, as documented: {error}")

    pattern, logits = run(model, case, "colums_pre_softmax")
    lines.append(
        f"colums_pre_softmax, ablation: weight on the future up to {weight_on_the_future(pattern):.2f},"
        f" weight on the ablated column up to {pattern[:, case.key].max().item():.2f}"
    )
    values = torch.full((TOKENS, TOKENS), -torch.inf)
    _, logits = run(model, case, "colums_pre_softmax", patching_values=values)
    far = difference([logits], by_hand(case, "mask a key")())
    lines.append(f"colums_pre_softmax, -inf: the logits differ from the hand-written mask's by {far:.1e}")

    two = case_on(case.model, 2, TOKENS)
    inputs = {"input_ids": two.ids, "attention_mask": torch.ones_like(two.ids)}
    positions = model(inputs, target_token_positions=["last"])["logits"].shape
    found = f"logits of 'last' for two prompts have shape {tuple(positions)}"
    try:
        everything = model(inputs, target_token_positions=["all"])["logits"].shape
        lines.append(f"batch of 2: {found}; of 'all' {tuple(everything)}, of {TOKENS} tokens")
    except (IndexError, RuntimeError) as error:
        lines.append(f"batch of 2: {found}; 'all' raises {type(error).__name__}: {error}")
    return lines


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        sys.stdout.write("\n".join(report()) + "\n")
