"""What of a frozen model stays the same from step to step: found out from one run, recorded example by example."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.hooks import EarlyStop, Hook, hooked
from intervenable.inputs import RunInputs
from intervenable.passage import Passage
from intervenable.runs import without_cache
from intervenable.sites import BoundSite, hook_at
from intervenable.training_store import Budget, RowStore
from intervenable.wave_caches import cut, is_croppable, layers_of, recording_cache, watch
from intervenable.wave_rows import NoShortcutError


@dataclass(frozen=True, eq=False)
class Trunk:
    """The blocks below the first edit."""

    blocks: tuple[nn.Module, ...]
    """In the order in which they run; the last of them is where a run begins."""

    paths: Mapping[nn.Module, str]
    """Their paths in the model."""

    cache_layers: frozenset[int]
    """Layers of the key-value cache that blocks above them look at."""

    end: nn.Module | None
    """The last block of all: what comes after it fills no cache."""

    @property
    def last(self) -> nn.Module | None:
        """The block whose output is recorded; None if there is none below the first edit."""
        return self.blocks[-1] if self.blocks else None


def find_trunk(
    model: nn.Module, inputs: RunInputs, blocks: Sequence[nn.Module], sites: Sequence[BoundSite], cached: bool
) -> Trunk:
    """The blocks that are done before the first of these places is met, from a run of a few examples.

    Args:
        cached: Whether to see which layers of a key-value cache each block looks at.

    Raises:
        NoShortcutError: a block runs several times, or the model has no cache to look at.
    """
    order: list[nn.Module] = []
    done: list[nn.Module] = []
    reached: list[BoundSite] = []
    touched: dict[nn.Module, set[int]] = {}
    cache = recording_cache(model) if cached else None
    watched = None if cache is None else watch(cache)

    def enters(passage: Passage) -> None:
        order.append(passage.module)
        if watched is not None:
            watched.seen = touched[passage.module] = set()

    def leaves(passage: Passage) -> None:
        if not reached:
            done.append(passage.module)

    def meets(site: BoundSite) -> Callable[[Passage], None]:
        return lambda passage: reached.append(site)

    # A block that ends in a place is left before the place is met.
    hooks = [Hook(block, "input", enters) for block in blocks]
    hooks += [Hook(block, "output", leaves) for block in blocks]
    hooks += [hook_at(site, meets(site)) for site in sites]
    options: dict[str, Any] = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    with torch.no_grad(), hooked(hooks, model):
        model(*inputs.args, **inputs.kwargs, **options)
    if len(set(order)) != len(order):
        raise NoShortcutError("a block runs several times")
    above = [block for block in order if block not in done]
    layers = frozenset().union(*(touched.get(block, set()) for block in above))
    names = {module: name for name, module in model.named_modules()}
    return Trunk(tuple(done), {block: names[block] for block in order}, layers, order[-1] if order else None)


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a block gives.

    Raises:
        NoShortcutError: it gives something else.
    """
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise NoShortcutError(f"a block gives a {type(output).__name__}")
    return hidden


def like_output(output: Any, hidden: Tensor) -> Any:
    """What a block gives, with other hidden states in it and without any other tensor.

    Attention weights are such; a model that goes on with another one fails, or gives other numbers, when it is
    compared with the plain path.
    """
    if isinstance(output, Tensor):
        return hidden
    return type(output)([hidden, *(None if isinstance(item, Tensor) else item for item in output[1:])])


def _of_one(cache: Any) -> Any:
    """A cache with the first example alone."""
    new = copy.copy(cache)
    new.layers = [copy.copy(layer) for layer in layers_of(cache)]
    for layer in new.layers:
        for name, item in list(vars(layer).items()):
            if isinstance(item, Tensor) and item.dim() == 4:
                setattr(layer, name, item[:1].clone())
    return new


@dataclass(eq=False)
class SourceRecords:
    """The units that source runs captured for one place."""

    known: set[int] = field(default_factory=set)
    """The sources that were run."""

    _store: RowStore | None = None

    def put(self, sources: Sequence[int], values: Tensor, count: int, budget: Budget) -> None:
        """Keep the units of some of so many sources."""
        if self._store is None:
            self._store = RowStore(count, values, budget)
        self._store.put(sources, values)
        self.known.update(sources)

    def at(self, sources: Tensor) -> Tensor:
        """`[n, ...]` the units of some sources."""
        assert self._store is not None
        return self._store.at(sources)


class BaseRecords:
    """The runs of the base prompts below the first edit: hidden states, and keys and values of the tokens before it.

    Args:
        model: The wrapped model.
        trunk: The blocks that are left out.
        prompts: How many different prompts there are.
        span: The tokens whose hidden states may be asked for, from and to.
        cached: For how many tokens keys and values are kept; 0 for none.
        budget: What may be kept in memory.
    """

    def __init__(
        self, model: nn.Module, trunk: Trunk, prompts: int, span: tuple[int, int], cached: int, budget: Budget
    ) -> None:
        self.model, self.trunk, self.span, self.cached = model, trunk, span, cached
        self._prompts, self._budget = prompts, budget
        self.known: set[int] = set()
        """The prompts that were run."""
        self._hidden: RowStore | None = None
        self._states: dict[tuple[int, str], RowStore] = {}
        self._template: Any = None
        self._cuts: dict[int, Any] = {}
        self._length = 0
        self.outputs: dict[nn.Module, Any] = {}
        """What each block below gives, to be imitated: without the hidden states."""

    def record(self, prompts: Sequence[int], inputs: RunInputs) -> None:
        """Run prompts and keep what is needed of them.

        Raises:
            NoShortcutError: the model has no such things.
        """
        self._length = inputs.length
        found: dict[str, Tensor] = {}
        stop_at = self.trunk.end if self.cached else self.trunk.last
        stop = EarlyStop(self.model, [self.trunk.paths[stop_at]] if stop_at is not None else ())

        def leaves(passage: Passage) -> None:
            hidden = hidden_of(passage.output)
            if passage.module not in self.outputs:
                self.outputs[passage.module] = like_output(passage.output, hidden[:0])
            if passage.module is self.trunk.last:
                found["hidden"] = hidden

        def ends(passage: Passage) -> None:
            stop.request(self.trunk.paths[passage.module])

        cache = recording_cache(self.model) if self.cached else None
        options = without_cache(self.model, inputs)
        if cache is not None:
            options = {"past_key_values": cache, "use_cache": True}
        hooks = [Hook(block, "output", leaves) for block in self.trunk.blocks]
        if stop_at is not None:
            hooks.append(Hook(stop_at, "output", ends))
        with torch.no_grad(), stop, hooked([*hooks, *stop.hooks], self.model):
            self.model(*inputs.args, **inputs.kwargs, **options)
        if self.trunk.blocks:
            self._keep_hidden(prompts, found["hidden"])
        if cache is not None:
            self._keep_states(prompts, cache)
        self.known.update(prompts)

    def _keep_hidden(self, prompts: Sequence[int], hidden: Tensor) -> None:
        if hidden.shape[0] != len(prompts):
            raise NoShortcutError("the first axis of hidden states does not count examples")
        if hidden.dim() == 3:
            hidden = hidden[:, self.span[0] : self.span[1]]
        if self._hidden is None:
            self._hidden = RowStore(self._prompts, hidden, self._budget)
        self._hidden.put(prompts, hidden)

    def _keep_states(self, prompts: Sequence[int], cache: Any) -> None:
        if not is_croppable(cache):
            raise NoShortcutError("the model's cache cannot be cut")
        for number, layer in enumerate(layers_of(cache)):
            if number not in self.trunk.cache_layers:
                continue
            for name in ("keys", "values"):
                state = getattr(layer, name, None)
                if not isinstance(state, Tensor) or state.dim() != 4 or state.shape[0] != len(prompts):
                    raise NoShortcutError("a layer of the cache is no attention's")
                if state.shape[2] != self._length:
                    raise NoShortcutError("a layer of the cache has other tokens than the prompt")
                kept = state[:, :, : self.cached]
                if (number, name) not in self._states:
                    self._states[number, name] = RowStore(self._prompts, kept, self._budget)
                self._states[number, name].put(prompts, kept)
        if self._template is None:
            self._template = _of_one(cache)

    def hidden(self, prompts: Tensor, start: int, stop: int) -> Tensor:
        """`[n, stop - start, d]` what the last block below gives."""
        assert self._hidden is not None
        hidden = self._hidden.at(prompts)
        return hidden[:, start - self.span[0] : stop - self.span[0]] if hidden.dim() == 3 else hidden

    def cache(self, prompts: Tensor, start: int) -> Any:
        """A cache with keys and values of the tokens before `start`, for the blocks that run."""
        if start not in self._cuts:
            self._cuts[start] = cut(self._template, self._length - start)
        cut_here = self._cuts[start]
        new = copy.copy(cut_here)
        new.layers = [
            self._layer(number, layer, prompts, start) for number, layer in enumerate(layers_of(cut_here))
        ]
        return new

    def _layer(self, number: int, layer: Any, prompts: Tensor, start: int) -> Any:
        new = copy.copy(layer)
        for name in ("keys", "values"):
            state = getattr(layer, name, None)
            if not isinstance(state, Tensor) or state.dim() != 4:
                continue
            if number in self.trunk.cache_layers:
                # Layers that look back a few tokens only have kept the last of those before `start`.
                rows = self._states[number, name].at(prompts)[:, :, start - state.shape[2] : start]
            else:  # of a block that does not run; models ask the first layer how many tokens there are
                rows = state[:1, :, :1].expand(len(prompts), -1, state.shape[2], -1)
            setattr(new, name, rows)
        return new
