"""Inputs whose tokens are blurred: noise on the embeddings of some words, for causal tracing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.cache_layout import POSITION
from intervenable.collect_requests import Where
from intervenable.errors import ConfigError, InputError, UnsupportedModelError
from intervenable.evaluation_mode import evaluating
from intervenable.inputs import RunInputs, read_inputs
from intervenable.locations import read_locations
from intervenable.model import IntervenableModel
from intervenable.padding import first_tensor
from intervenable.runs import plain_run, without_cache
from intervenable.signatures import forward_signature, takes


def noised(
    model: nn.Module,
    inputs: Any,
    positions: Any,
    scale: float | None = None,
    *,
    std: float | None = None,
    samples: int = 10,
    seed: int = 0,
    tokenizer: Any = None,
) -> dict[str, Any]:
    """The same inputs with Gaussian noise on the embeddings of some tokens, several samples of each example.

    With `e` what the model's embedding makes of a token, the model is given `e + eps` in its place,
    `eps ~ N(0, std^2)` for each coordinate by itself. Noise on the words that a fact is about makes a model forget it
    without putting another in its place, and `sweep(model, inputs, noised(model, inputs, ...), ...)` finds out which
    of its states bring it back. The model is not changed, and neither is torch's random state.

    Meng et al. (2022), "Locating and Editing Factual Associations in GPT", https://arxiv.org/abs/2202.05262.

    Args:
        model: A model that takes `inputs_embeds`.
        inputs: What it is to be given, with token ids; any batch, any padding.
        positions: Which tokens, as in `collect`: real tokens are counted, words need a tokenizer.
        scale: The standard deviation of the noise in standard deviations of the embedding matrix; 3 by default, as in
            the paper.
        std: The standard deviation itself, instead.
        samples: How often each example is there, with other noise each time.
        seed: Seed of the noise.
        tokenizer: For positions given as words.

    Returns:
        Inputs of `batch * samples` rows, the samples of an example one after the other, with `inputs_embeds` where
        there were ids and everything else as it was.

    Shape:
        inputs_embeds: `[batch * samples, s, D]`.

    Raises:
        UnsupportedModelError: the model takes no embeddings, or makes something else of them than of their ids.
        InputError: there are no token ids, or a key-value cache that rows cannot be repeated of.
        ConfigError: a scale, std, samples or seed that makes no sense.
        LocationError, LocationRangeError: positions that are not there.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, lm = load_small_lm()
        >>> clean = tokenizer("The capital of Spain is", return_tensors="pt")
        >>> blurred = noised(lm, clean, "Spain", samples=4, tokenizer=tokenizer)
        >>> sorted(blurred), blurred["inputs_embeds"].shape
        (['attention_mask', 'inputs_embeds'], torch.Size([4, 5, 120]))
        >>> same = (blurred["inputs_embeds"] == lm.get_input_embeddings()(clean["input_ids"])).all(-1)
        >>> same[0].tolist()
        [True, True, True, False, True]
    """
    _check(scale, std, samples, seed)
    if isinstance(model, IntervenableModel):
        tokenizer = model.tokenizer if tokenizer is None else tokenizer
        model = model.model
    read = read_inputs(inputs, model, "inputs")
    given = _by_name(read, model)
    ids = _ids(read, model)
    located = Where.of(positions, None, None).located(
        POSITION, read, partial(read_locations, relative_to="tokens", tokenizer=tokenizer)
    )
    if located is None:
        raise ConfigError(
            "positions is None. Say which tokens are to be blurred: 'Spain', -1, [2, 3], 'all'."
        )
    with torch.no_grad():
        embedding, embedded = _embedded(model, read, given, ids)
        spread = (
            (3.0 if scale is None else scale) * _deviation(embedding, embedded, ids) if std is None else std
        )
        rows = embedded.repeat_interleave(samples, dim=0)
        chosen = torch.zeros(ids.shape, dtype=torch.bool)
        for example, row in enumerate(located.rows):
            chosen[example, list(row)] = True
        chosen = chosen.repeat_interleave(samples, dim=0)
        generator = torch.Generator().manual_seed(seed)
        noise = spread * torch.randn(int(chosen.sum()), rows.shape[-1], generator=generator)
        where = chosen.to(rows.device)
        rows[where] = (rows[where].float() + noise.to(rows.device)).to(rows.dtype)
    others = {name: value for name, value in given.items() if name not in ("input_ids", "inputs_embeds")}
    repeated = {name: _repeated(value, read.batch, samples) for name, value in others.items()}
    return {**repeated, "inputs_embeds": rows}


def _check(scale: Any, std: Any, samples: Any, seed: Any) -> None:
    if scale is not None and std is not None:
        raise ConfigError(
            f"scale={scale} and std={std} both say how strong the noise is. Give one: scale in standard deviations of"
            " the embedding matrix, std as it is."
        )
    for name, value in (("scale", scale), ("std", std)):
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < float("inf")):
            raise ConfigError(
                f"{name}={value!r} is no strength of noise. Give a number from 0 up, such as 3.0."
            )
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name}={value!r} makes no sense. Give a whole number from {least} up.")


def _by_name(read: RunInputs, model: nn.Module) -> dict[str, Any]:
    """All inputs by name, those that were given by place too."""
    given = {**dict(zip(forward_signature(model).parameters, read.args, strict=False)), **read.kwargs}
    cached = [name for name, value in given.items() if hasattr(value, "get_seq_length")]
    if cached:
        raise InputError(
            f"inputs have {cached[0]}, and the rows of a key-value cache are not repeated here. Give the whole prompt"
            " as ids."
        )
    return given


def _ids(read: RunInputs, model: nn.Module) -> Tensor:
    if not takes(model, "inputs_embeds"):
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no inputs_embeds, so that its tokens cannot be blurred before it. Put"
            " noise where it has its tokens instead: NoiseIntervention at 'embedding_output'."
        )
    if read.input_ids is None:
        raise InputError("inputs have no token ids to embed. Give what the tokenizer returns.")
    return read.input_ids


def _embedded(
    model: nn.Module, read: RunInputs, given: Mapping[str, Any], ids: Tensor
) -> tuple[nn.Module, Tensor]:
    """The model's token embedding, and what it makes of ids, after a check that the model does the same.

    Raises:
        UnsupportedModelError: it does something else.
    """
    find = getattr(model, "get_input_embeddings", None)
    embedding = find() if callable(find) else None
    if not isinstance(embedding, nn.Module):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say which of its modules embeds tokens: it has no get_input_embeddings,"
            " as models of transformers have."
        )
    options = without_cache(model, read)
    with evaluating(model):
        embedded = embedding(ids)
        by_ids = first_tensor(plain_run(model, read, options))
        vectors = {name: value for name, value in given.items() if name != "input_ids"}
        vectors["inputs_embeds"] = embedded
        try:
            by_vectors = first_tensor(plain_run(model, read_inputs(vectors, model, "inputs"), options))
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on inputs_embeds alone: {error}"
            ) from error
    same = by_ids.shape == by_vectors.shape and bool(
        ((by_ids == by_vectors) | (by_ids.isnan() & by_vectors.isnan())).all()
    )
    if not same:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives something else for the embeddings of these tokens than for the tokens"
            " themselves, so that noise on them would not be all that is changed. Put noise where the model has its"
            " tokens instead: NoiseIntervention at 'embedding_output'."
        )
    return embedding, embedded.clone()


def _deviation(embedding: nn.Module, embedded: Tensor, ids: Tensor) -> float:
    """The standard deviation of the embedding matrix, as the module hands its rows out."""
    weight = getattr(embedding, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or weight.dim() != 2
        or weight.is_meta
        or not weight.is_floating_point()
    ):
        raise UnsupportedModelError(
            f"The embedding is a {type(embedding).__name__} without a matrix that could be read, so that scale means"
            " nothing. Give std, the standard deviation of the noise itself."
        )
    handed, stored = embedded.float().norm(), weight[ids.to(weight.device)].float().norm()
    # Some modules multiply (Gemma 3 by the root of its width): what the noise is added to is that many times as wide.
    gain = float(handed / stored) if float(stored) else 1.0
    return float(weight.float().std()) * gain


def _repeated(value: Any, batch: int, samples: int) -> Any:
    """An input with each example as often as there are samples; what is the same for all of them as it is."""
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch:
        return value.repeat_interleave(samples, dim=0)
    return value
