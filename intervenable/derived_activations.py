"""What follows from activations and weights without a run: head vectors, statistics of norms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from intervenable.binding import Places
from intervenable.errors import InputError, LocationRangeError, UnknownNameError, unknown_name
from intervenable.model import IntervenableModel
from intervenable.pattern_statistics import repeated_heads


class NormStatistics(NamedTuple):
    """What a norm computes of each vector that it is given."""

    mean: Tensor
    """`(...)`: mean of the entries."""

    second_moment: Tensor
    """`(...)`: mean of their squares."""

    variance: Tensor
    """`(...)`: mean of the squared distances from the mean, which is `second_moment - mean ** 2`."""


def norm_statistics(values: Tensor) -> NormStatistics:
    """The mean, second moment and (biased) variance over the last axis, in float32 at least.

    Args:
        values: `(..., width)`, such as `cache["final_norm_input"]`.

    Example:
        >>> norm_statistics(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        NormStatistics(mean=tensor(2.5000), second_moment=tensor(7.5000), variance=tensor(1.2500))
    """
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    mean = wide.mean(-1)
    return NormStatistics(mean, wide.pow(2).mean(-1), (wide - mean[..., None]).pow(2).mean(-1))


def head_vectors(
    model: nn.Module,
    layer: int,
    vectors: Tensor,
    heads: Sequence[int] | None = None,
    *,
    bias: Literal["none", "split"] = "none",
) -> Tensor:
    """Vectors of heads through their part of the output projection: `v_h @ W_O[h]`.

    Of what heads read (`head_attention_value_output`) that is what each adds to the attention output; of values (or
    keys, or queries) what it would add if it read that token alone.

    Args:
        model: The model, or an `IntervenableModel` of it.
        layer: The block.
        vectors: `(b, heads, n, dh)`, as collected. With fewer heads than there are queries (grouped-query attention),
            each stands for its group.
        heads: Which query heads `vectors` holds, in order; by default all.
        bias: What becomes of the projection's bias. `"none"`: left out. `"split"`: each of all `H` heads gets
            `bias / H`, so that the sum over heads is the attention output.

    Shape:
        result: `(b, heads, n, hidden)`.

    Raises:
        UnsupportedModelError: the model has no such projection.
        InputError, LocationRangeError: vectors or heads that do not fit it.
    """
    if bias not in ("none", "split"):
        raise UnknownNameError(unknown_name("bias", bias, ("none", "split")))
    wrapped = model.model if isinstance(model, IntervenableModel) else model
    site = Places(wrapped).at("head_attention_output", layer)
    weights, offset = site.output_projection(vectors.device)  # (H, dh, hidden), (hidden,)
    count, width = weights.shape[:2]
    if vectors.dim() != 4 or vectors.shape[-1] != width:
        raise InputError(
            f"The vectors have shape {tuple(vectors.shape)}, and the heads of {site.label} take"
            f" (b, heads, n, {width})."
        )
    if heads is None:
        vectors = repeated_heads(vectors, count, axis=1)
    else:
        wrong = [head for head in heads if not -count <= head < count]
        if wrong:
            raise LocationRangeError(
                f"Head {wrong[0]} is out of range: {site.label} has heads 0 to {count - 1}."
            )
        if len(heads) != vectors.shape[1]:
            raise InputError(f"{len(heads)} heads are named, and the vectors have {vectors.shape[1]}.")
        weights = weights[list(heads)]
    kind = torch.promote_types(vectors.dtype, weights.dtype)
    result = vectors.to(kind) @ weights.to(kind)
    return result if bias == "none" or offset is None else result + offset.to(kind) / count
