"""From hidden states to tokens that people can read."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from intervenable.errors import InputError, UnsupportedModelError
from intervenable.receipt import Decodes


def embed_to_distrib(model: nn.Module, embed: Tensor, log: bool = False, logits: bool = False) -> Tensor:
    """The distribution over the vocabulary that a language model's head makes of final hidden states.

    `softmax(head(embed))`. The final norm is not applied: give states that it has passed (`last_hidden_state`). The
    head is the model's output embedding, or for a model without one its (tied) input embedding; a final soft-cap of
    the logits is honoured.

    Args:
        model: A language model, or its headless base if the embeddings are tied.
        embed: `(..., hidden)`.
        log: Return log-probabilities.
        logits: Return the logits themselves.

    Shape:
        result: `(..., vocabulary)`.

    Raises:
        UnsupportedModelError: the model has no embedding of a vocabulary.
        InputError: `embed` is not as wide as the head's input.
    """
    head = _call_if_there(model, "get_output_embeddings")
    if head is None:
        embedding = _call_if_there(model, "get_input_embeddings")
        if embedding is None:
            raise UnsupportedModelError(f"{type(model).__name__} has neither output nor input embeddings.")
        weight, bias = embedding.weight, None
    else:
        weight, bias = head.weight, getattr(head, "bias", None)
    if embed.shape[-1] != weight.shape[-1]:
        raise InputError(
            f"The hidden states have shape {tuple(embed.shape)}, and the head of {type(model).__name__} takes"
            f" {weight.shape[-1]} columns."
        )
    scores = nn.functional.linear(embed.to(weight.dtype), weight, bias)
    cap = getattr(getattr(model, "config", None), "final_logit_softcapping", None)
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if logits:
        return scores
    return scores.log_softmax(-1) if log else scores.softmax(-1)


def _call_if_there(model: nn.Module, name: str) -> Any:
    getter = getattr(model, name, None)
    return getter() if callable(getter) else None


def format_token(tokenizer: Decodes, token: int) -> str:
    r"""A token as one visible word: spaces as `_`, line breaks as `\n`."""
    return tokenizer.decode([int(token)]).replace(" ", "_").replace("\n", "\\n")


@overload
def top_vals(
    tokenizer: Decodes, values: Tensor, n: int = 10, return_results: Literal[False] = False
) -> None: ...
@overload
def top_vals(
    tokenizer: Decodes, values: Tensor, n: int = 10, *, return_results: Literal[True]
) -> list[tuple[str, float]]: ...
def top_vals(
    tokenizer: Decodes, values: Tensor, n: int = 10, return_results: bool = False
) -> list[tuple[str, float]] | None:
    """Print the tokens with the highest values, or return them.

    Args:
        tokenizer: Decodes token ids.
        values: `(vocabulary,)`, such as a distribution at one position.
        n: How many.
        return_results: Return `(token, value)` pairs, highest first, and print nothing.

    Raises:
        InputError: `values` has more than one axis longer than 1.
    """
    flat = values.squeeze()
    if flat.dim() != 1:
        raise InputError(
            f"The values have shape {tuple(values.shape)}; give those of one position, (vocabulary,)."
        )
    top, ids = flat.topk(min(n, flat.shape[0]))
    results = [
        (format_token(tokenizer, token), value)
        for token, value in zip(ids.tolist(), top.tolist(), strict=True)
    ]
    if return_results:
        return results
    print("\n".join(f"{token:<20} {value}" for token, value in results))
    return None
