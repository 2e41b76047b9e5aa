"""TransformerLens' helpers that patch several components at once, and grouped heads in their results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from intervenable.binding import Places
from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from intervenable.model import IntervenableModel
from intervenable.sweep_result import SweepResult
from intervenable.sweeping import sweep
from intervenable.transformer_lens_patching import check_options, inside

HeadsOfGroups = Literal["expand", "native", "pad", "zeros"]
"""What becomes of keys and values where several query heads share a head of them."""

_HEAD_KINDS: Mapping[str, str] = {
    "out": "head_attention_value_output",
    "q": "head_query_output",
    "k": "head_key_output",
    "v": "head_value_output",
    "pattern": "attention_pattern",
}
_BLOCK_KINDS: Mapping[str, str] = {
    "resid_pre": "block_input",
    "attn_out": "attention_contribution",
    "mlp_out": "mlp_contribution",
}


def get_act_patch_attn_head_all_pos_every(
    model: nn.Module,
    corrupted_tokens: Any,
    clean_cache: Any,
    metric: Any,
    gqa: HeadsOfGroups = "expand",
    **options: Any,
) -> Any:
    """Patch output, query, key, value and pattern of each head at all tokens, in this order.

    Args:
        model: A model with logits.
        corrupted_tokens: Inputs of the run that is patched.
        clean_cache: Inputs of the clean run, or an `ActivationCache`.
        metric: What is measured.
        gqa: What to do with keys and values where query heads share them. `"expand"`: the value of a key-value head
            at each of the query heads that read it; `"pad"`: NaN after the key-value heads, and `"zeros"`: zeros, as
            TransformerLens has it; `"native"`: a mapping of `"out"`, `"q"`, `"k"`, `"v"` and `"pattern"` to tensors
            with the heads that there are.
        **options: Further arguments of `sweep`.

    Shape:
        result: `[5, layers, heads]`, and the axes of the metric.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, model = load_small_lm()
        >>> clean = tokenizer("The capital of Spain is", return_tensors="pt")
        >>> corrupted = tokenizer("The capital of Italy is", return_tensors="pt")
        >>> get_act_patch_attn_head_all_pos_every(model, corrupted, clean, lambda z: z[0, -1, 7]).shape
        torch.Size([5, 6, 6])
    """
    heads = _check_groups(model, gqa, options)
    kinds = list(_HEAD_KINDS.values())
    result = sweep(model, clean_cache, corrupted_tokens, kinds, ("layer", "head"), metric, **options)
    return _joined({kind: _of(result, name) for kind, name in _HEAD_KINDS.items()}, 1, heads, gqa)


def get_act_patch_attn_head_by_pos_every(
    model: nn.Module,
    corrupted_tokens: Any,
    clean_cache: Any,
    metric: Any,
    gqa: HeadsOfGroups = "expand",
    **options: Any,
) -> Any:
    """Patch output, query, key, value and pattern of each head at each token, in this order.

    Of a pattern the token is the one that reads. Arguments are those of `get_act_patch_attn_head_all_pos_every`.

    Shape:
        result: `[5, layers, positions, heads]`, and the axes of the metric.
    """
    heads = _check_groups(model, gqa, options)
    kinds = [name for kind, name in _HEAD_KINDS.items() if kind != "pattern"]
    pair = (model, clean_cache, corrupted_tokens)
    vectors = sweep(*pair, kinds, ("layer", "pos", "head"), metric, **inside(options, "vectors"))
    found = {kind: _of(vectors, name) for kind, name in _HEAD_KINDS.items() if kind != "pattern"}
    rows = {**inside(options, "pattern"), "queries": options.get("positions"), "positions": None}
    window = options.get("window")
    if window is not None:
        rows["window"] = {"query" if axis == "pos" else axis: width for axis, width in window.items()}
    pattern = sweep(*pair, _HEAD_KINDS["pattern"], ("layer", "query", "head"), metric, **rows)
    return _joined({**found, "pattern": pattern.values}, 2, heads, gqa)


def get_act_patch_block_every(
    model: nn.Module, corrupted_tokens: Any, clean_cache: Any, metric: Any, **options: Any
) -> Tensor:
    """Patch the stream entering each block, what attention adds and what the MLP adds, at each token, in this order.

    Arguments are those of `get_act_patch_resid_pre`.

    Shape:
        result: `[3, layers, positions]`, and the axes of the metric.
    """
    check_options(options)
    kinds = list(_BLOCK_KINDS.values())
    return sweep(model, clean_cache, corrupted_tokens, kinds, ("layer", "pos"), metric, **options).values


def _of(result: SweepResult, component: str) -> Tensor:
    return result.select(component=component).values


def _check_groups(model: nn.Module, gqa: str, options: Mapping[str, Any]) -> int:
    """The number of query heads.

    Raises:
        UnknownNameError: no such way of joining.
        ConfigError: heads by number, where the same number means a query head here and a shared one there.
    """
    check_options(options)
    if gqa not in get_args(HeadsOfGroups):
        raise UnknownNameError(unknown_name("gqa", gqa, get_args(HeadsOfGroups)))
    places = Places(model.model if isinstance(model, IntervenableModel) else model)
    names = [_HEAD_KINDS[kind] for kind in ("out", "k")]
    heads, shared = (places.at(name, places.layers_with(name)[0]).heads or 0 for name in names)
    if options.get("heads") is not None:
        if heads != shared:
            raise ConfigError(
                f"heads={options['heads']!r}: {heads} query heads share {shared} heads of keys and values here, so"
                " that a number means different heads. Call the functions for each of them, such as"
                " get_act_patch_attn_head_k_all_pos."
            )
        return 0
    return heads


def _joined(found: Mapping[str, Tensor], axis: int, heads: int, gqa: HeadsOfGroups) -> Any:
    """The results of all kinds as one tensor, or apart."""
    if gqa == "native":
        return dict(found)
    return torch.stack([of_all_heads(values, axis, heads, gqa) for values in found.values()])


def of_all_heads(values: Tensor, axis: int, heads: int, gqa: HeadsOfGroups) -> Tensor:
    """Values of heads that several query heads share as values of all query heads.

    Query head `h` reads the shared head `h // (heads / shared)`.

    Example:
        >>> shared = torch.tensor([1.0, 2.0])
        >>> of_all_heads(shared, 0, 4, "expand"), of_all_heads(shared, 0, 4, "pad")
        (tensor([1., 1., 2., 2.]), tensor([1., 2., nan, nan]))
    """
    shared = values.shape[axis]
    if not heads or shared == heads:
        return values
    if gqa == "expand":
        return values.repeat_interleave(heads // shared, axis)
    shape = (*values.shape[:axis], heads - shared, *values.shape[axis + 1 :])
    return torch.cat([values, values.new_full(shape, torch.nan if gqa == "pad" else 0.0)], axis)
