"""`collect`: run a model and keep what passes at the places that were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intervenable.binding import Places
from intervenable.cache import ActivationCache
from intervenable.cache_joining import Aggregation
from intervenable.cache_means import RunningMean
from intervenable.collect_inputs import Batch, batches_of, sources_of
from intervenable.collect_requests import Where, readings
from intervenable.collect_runs import CollectingRun, kept
from intervenable.errors import InputError, UnknownNameError, unknown_name
from intervenable.inputs import RunInputs, read_inputs
from intervenable.locations import RelativeTo, read_locations
from intervenable.model import IntervenableModel
from intervenable.plan import Plan


def collect(
    model: nn.Module,
    inputs: Any,
    components: str | tuple[str, int] | Iterable[str | tuple[str, int]],
    layers: int | Sequence[int] | slice | Literal["all"] | None = None,
    positions: Any = None,
    heads: Any = None,
    *,
    queries: Any = None,
    keys: Any = None,
    group_means: bool = False,
    average: Literal["examples", "tokens"] | None = None,
    gradients_of: Callable[[Any], Tensor] | None = None,
    transform: Callable[[ActivationCache], ActivationCache] | None = None,
    observe: Literal["after", "before"] = "after",
    ragged: Literal["error", "pad", "list"] = "error",
    aggregation: Mapping[str, Aggregation] | None = None,
    batch_size: int | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = "cpu",
    sources: Any = None,
    unit_locations: Mapping[str, Any] | None = None,
    source_representations: Any = None,
    subspaces: Any = None,
    relative_to: RelativeTo = "tokens",
) -> ActivationCache:
    """Run a model and keep activations: of these components, layers, tokens and heads, and nothing else.

    A run ends as soon as it has all that was asked for, before the layers and the head above. Nothing about the model
    changes, and no gradients are computed unless `gradients_of` asks for them.

    Args:
        model: A model, or an `IntervenableModel`, whose interventions then act in the run.
        inputs: One batch (what a tokenizer returns), texts, a `datasets.Dataset` with columns that the model takes or
            one of texts, or an iterable of batches.
        components: Names of components, `("block_output", 3)` with a layer of its own, module paths that end in
            `.input` or `.output`; `"input_ids"` for the tokens.
        layers: Which layers; all by default.
        positions: Which tokens, counted in real tokens: an int, a list, for examples that differ a list of lists. In
            a list each entry is a group, a tuple a group of several; a mapping names them: `{"subject": (1, 2),
            "last": -1}`. By default all there are, padding included.
        heads: Which heads, where components have them; a mapping for layers or components that differ, `{3: [0, 1]}`.
        queries: Rows of attention matrices, as `positions`.
        keys: Columns of attention matrices, as `positions`.
        group_means: Keep the mean of each group of positions instead.
        average: Keep the mean over all examples, or over all their tokens, instead.
        gradients_of: A metric, a function of the model's output with one number for each example. Its gradient with
            respect to each activation is kept as `"<component>.gradient"`, its values as `"metric"`.
        transform: What to make of the activations of each run before they are joined or averaged, such as
            `lambda cache: cache + {("value_weighted_pattern", 3): ...}`.
        observe: Whether to see what the interventions at a place leave there, or what they find.
        ragged: What to do where batches differ in their numbers of tokens; see `ActivationCache.cat`.
        aggregation: How batches become one; see `ActivationCache.cat`.
        batch_size: Examples in a run. By default all of a batch, and 32 of texts and datasets.
        tokenizer: For texts; and for positions given as words.
        dtype: The type of number to keep floating-point values in; by default the model's.
        device: Where to keep them; None for where they are.
        sources, unit_locations, source_representations, subspaces, relative_to: As in a call of the
            `IntervenableModel`.

    Returns:
        The activations; where axes run over tokens, `layouts` tell which.

    Raises:
        UnknownNameError, LayerRangeError, UnsupportedModelError: a component or layer that is not there.
        InputError, LocationError, SourceError: something is wrong with the rest of the call; no model was run.
        NotFiredError: the run did not reach a place.
        CacheError: batches that do not fit together.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, model = load_small_lm()
        >>> cache = collect(model, "The capital of Spain is", "block_output", layers=[0, 2], positions={"last": -1},
        ...                 tokenizer=tokenizer)
        >>> cache["block_output", 2].shape, cache.positions["block_output", 2].tolist()
        (torch.Size([1, 1, 120]), [[4]])
    """
    if observe not in ("after", "before"):
        raise UnknownNameError(unknown_name("observe", observe, ("after", "before")))
    intervenable = model if isinstance(model, IntervenableModel) else None
    wrapped = intervenable.model if intervenable is not None else model
    if intervenable is None and any(
        x is not None for x in (sources, unit_locations, source_representations, subspaces)
    ):
        raise InputError(
            "sources, unit_locations, source_representations and subspaces are for interventions, and the model is a"
            f" plain {type(model).__name__}. Give an IntervenableModel, or leave them out; tokens go in as positions."
        )
    tokenizer = tokenizer if tokenizer is not None or intervenable is None else intervenable.tokenizer
    places = Places(wrapped)
    wanted, ids = readings(places, components, layers, heads)
    where = Where.of(positions, queries, keys)
    mean = RunningMean(average) if average is not None else None
    keep = partial(kept, dtype=dtype, device=device)
    call = (sources, unit_locations, source_representations, subspaces, relative_to)
    info: dict[str, Any] = {"model": type(wrapped).__name__}
    if any(reading.key[1] is not None for reading in wanted):
        info |= {"layers": places.layers}
    caches: list[ActivationCache] = []
    for batch in batches_of(inputs, wrapped, tokenizer, batch_size):
        plan = _plan(intervenable, wrapped, batch, call)
        run = CollectingRun(wrapped, wanted, plan, before=observe == "before", metric=gradients_of, keep=keep)
        run.locate(_part(where, batch, run.inputs), _reader(relative_to, tokenizer), ids)
        cache = run.collected(ids, info)
        cache = cache.group_means() if group_means else cache
        cache = transform(cache) if transform is not None else cache
        if mean is None:
            caches.append(cache)
            continue
        for key, layout in cache.layouts.items():
            mean.add(key, cache[key], layout)
    if mean is not None and mean.values:
        return ActivationCache(mean.values, mean.layouts, info)
    if not caches:
        raise InputError("inputs has no examples: there is nothing to collect from.")
    return caches[0].cat(*caches[1:], ragged=ragged, aggregation=aggregation)


def _plan(
    intervenable: IntervenableModel | None, model: nn.Module, batch: Batch, call: tuple[Any, ...]
) -> Plan:
    """What the interventions do in one run; nothing if there are none."""
    if intervenable is None:
        return Plan(read_inputs(batch.inputs, model, "inputs"), (), (), ())
    sources, *rest = call
    return intervenable._plan(batch.inputs, sources_of(sources, batch), *rest)


def _part(where: Where, batch: Batch, inputs: RunInputs) -> Where:
    """The positions of the examples in one batch."""
    stop = batch.start + inputs.batch
    return where.part(batch.start, stop, batch.total)


def _reader(relative_to: RelativeTo, tokenizer: Any) -> Any:
    return partial(read_locations, relative_to=relative_to, tokenizer=tokenizer)
