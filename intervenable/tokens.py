"""From hidden states to tokens that people can read."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from intervenable.compiled import uncompiled
from intervenable.errors import InputError, UnsupportedModelError
from intervenable.evaluation_mode import evaluating
from intervenable.padding import first_tensor
from intervenable.signatures import forward_signature, takes
from intervenable.token_text import Decodes
from intervenable.unwrapping import unwrapped


def embed_to_distrib(model: nn.Module, embed: Tensor, log: bool = False, logits: bool = False) -> Tensor:
    """The distribution over the vocabulary that a language model's head makes of final hidden states.

    `softmax(head(embed))`. The final norm is not applied: give states that it has passed (`last_hidden_state`). The
    head is the model's own, or for a model without one its tied input embedding; a final soft-cap of the logits is
    honoured. That nothing else belongs to the head is found out once per model, on three tokens.

    Args:
        model: A language model, or its headless base if the embeddings are tied.
        embed: `(..., hidden)`.
        log: Return log-probabilities.
        logits: Return the logits themselves.

    Shape:
        result: `(..., vocabulary)`.

    Raises:
        UnsupportedModelError: the model has no head, or one that does more than can be redone here.
        InputError: `embed` is not as wide as the head's input.
    """
    model = unwrapped(model).module
    head, weight = _head(model)
    if embed.shape[-1:] != weight.shape[-1:]:
        raise InputError(
            f"The hidden states have shape {tuple(embed.shape)}, and the head of {type(model).__name__} takes"
            f" {weight.shape[-1]} columns."
        )
    scores = _scores(model, head, embed.to(weight.dtype))
    if logits:
        return scores
    return scores.log_softmax(-1) if log else scores.softmax(-1)


Head = Callable[[Tensor], Tensor]


def _head(model: nn.Module) -> tuple[Head, Tensor]:
    """What turns hidden states into logits, and the weight that says how wide they are."""
    name = type(model).__name__
    embedding = _call_if_there(model, "get_output_embeddings")
    if embedding is not None:
        outermost = next((part for part in model.children() if embedding in part.modules()), embedding)
        head = outermost if _takes_one_input(outermost) else embedding
        if not _is_all(model, head):
            raise UnsupportedModelError(
                f"The head of {name} does more with hidden states than can be redone here. Take the logits of a"
                " run of the model instead: model(...).logits.softmax(-1)."
            )
        return head, embedding.weight
    embedding = _call_if_there(model, "get_input_embeddings")
    if embedding is None:
        raise UnsupportedModelError(f"{name} has neither output nor input embeddings.")
    if not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        raise UnsupportedModelError(
            f"{name} has no head, and its input embeddings are not tied to one: give the model that has the head."
        )
    return lambda states: nn.functional.linear(states, embedding.weight), embedding.weight


def _scores(model: nn.Module, head: Head, states: Tensor) -> Tensor:
    scores = head(states)
    cap = getattr(getattr(model, "config", None), "final_logit_softcapping", None)
    return scores if cap is None else torch.tanh(scores / cap) * cap


def _takes_one_input(module: nn.Module) -> bool:
    parameters = forward_signature(module).parameters.values()
    return (
        sum(
            p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
            for p in parameters
        )
        == 1
    )


_all_there: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def _is_all(model: nn.Module, head: Head) -> bool:
    """Whether this head makes the model's own logits of its last hidden states."""
    base = getattr(model, "base_model", model)
    if base is model:  # nothing to compare with
        return not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if model not in _all_there:
        ids = torch.arange(3, device=next(base.parameters()).device)[None]
        inputs = {name: ids for name in ("input_ids", "decoder_input_ids") if takes(base, name)}
        with evaluating(model), uncompiled(model), torch.no_grad():
            made = _scores(model, head, first_tensor(base(**inputs)))
            own = first_tensor(model(**inputs))
        error = (made - own).abs().max() if made.shape == own.shape else torch.inf
        _all_there[model] = bool(error <= 0.02 * own.abs().max())
    return _all_there[model]


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
