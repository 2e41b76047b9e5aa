"""What is learnt about a model for waves: which axes count rows, and which routes are exact. Remembered per model."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from threading import Lock, RLock
from typing import Any, Literal, NamedTuple

from torch import nn

from intervenable.hooks import Hook, hooked
from intervenable.passage import Passage
from intervenable.unwrapping import config_of
from intervenable.wave_caches import layers_of, recording_cache, shapes_of, watch
from intervenable.wave_inputs import WaveInputs
from intervenable.wave_rows import NoShortcutError, Path, Rows, row_axes, shapes_in

Cache = Literal["recorded", "prefix", "none"]
Growth = Literal["grow", "pad", "whole"]


class Route(NamedTuple):
    """One way to compute a wave."""

    cache: Cache
    """Where keys and values of the tokens before the wave come from; `none`: the wave begins at the first token."""

    growth: Growth
    """Whether rows come to the batch layer by layer, or the model's loop keeps all while blocks compute those that
    have come; `whole`: all are there from the beginning."""

    @property
    def note(self) -> str:
        """What it leaves out, for people."""
        layers = "from their layers on" if self.growth != "whole" else "through all layers"
        tokens = {
            "recorded": "from the first token on that a wave changes",
            "prefix": "from the first token on that a wave changes (the tokens before it were run one by one)",
            "none": "with all tokens",
        }[self.cache]
        return f"many at a time, {layers} and {tokens}"


ROUTES: tuple[Route, ...] = (
    Route("recorded", "grow"),
    Route("recorded", "pad"),
    Route("prefix", "grow"),
    Route("prefix", "pad"),
    Route("none", "grow"),
    Route("none", "pad"),
    Route("none", "whole"),
)
"""From the one that leaves out most to the one that leaves out least."""

WHOLE_FIRST: tuple[Route, ...] = (ROUTES[-1], *ROUTES[:-1])
"""The same for tiny models, where it costs more than it saves to let rows come layer by layer."""


class CallRows(NamedTuple):
    """The row axes at one call of a block."""

    into: Rows
    """Of what it is given."""

    out: Rows
    """Of what it gives."""

    touched: list[int]
    """Layers of the cache that it looks at."""


@dataclass
class Learnt:
    """What is known of one model, for inputs of one kind."""

    calls: dict[Cache, list[CallRows]] = field(default_factory=dict)
    """The row axes at each call of a block, with the entries of one group of `examples`."""

    cache_rows: dict[Cache, list[Rows]] = field(default_factory=dict)
    """Those of the layers of a cache."""

    examples: int = 1
    """Examples in a group of the runs that it was learnt from."""

    exact: dict[tuple[Hashable, Route], bool] = field(default_factory=dict)
    """For each kind of place whether a route gives what plain runs give."""

    why: dict[Route, str] = field(default_factory=dict)
    """Why a route was not taken last."""

    narrow_head: bool | None = None
    """Whether the logits of single tokens can be had from rows of the output embedding."""

    apart: bool | None = None
    """Whether prompts that run together give what they give alone."""

    lock: Any = field(default_factory=RLock)

    def calls_of(self, how: Cache, batch: int) -> list[CallRows]:
        """The row axes at each call of a block, for groups of so many examples."""
        return [
            CallRows(self._scaled(call.into, batch), self._scaled(call.out, batch), call.touched)
            for call in self.calls[how]
        ]

    def cache_rows_of(self, how: Cache, batch: int) -> list[Rows]:
        """The row axes of each layer of a cache, for groups of so many examples."""
        return [self._scaled(rows, batch) for rows in self.cache_rows[how]]

    def _scaled(self, rows: Rows, batch: int) -> Rows:
        if batch == self.examples:
            return rows
        return {
            path: None if known is None else known.scaled(batch, self.examples)
            for path, known in rows.items()
        }


_known: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Learnt]] = weakref.WeakKeyDictionary()
_lock = Lock()


def knowledge_of(model: nn.Module, inputs: WaveInputs) -> Learnt:
    """What is known of a model, for inputs like these."""
    config: Any = config_of(model)
    first = next(model.parameters(), None)
    key = (
        inputs.kind,
        inputs.padded,
        inputs.batch > 1 if inputs.is_divisible else inputs.batch,
        getattr(config, "_attn_implementation", None),
        None if first is None else (first.dtype, str(first.device)),
    )
    with _lock:
        known = _known.setdefault(model, {})
        if key not in known:
            # Two examples are told from one, and from more in nothing.
            known[key] = Learnt(examples=min(inputs.batch, 2) if inputs.is_divisible else inputs.batch)
        return known[key]


def forget(model: nn.Module) -> None:
    """Forget what was learnt about a model, after it was changed in a way that hooks can feel."""
    with _lock:
        _known.pop(model, None)


# --- calls of blocks --------------------------------------------------------------------------------------


class Trace:
    """Counts calls of blocks in a run, in the order in which they come.

    Args:
        blocks: The blocks, of all lists.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.order: list[int] = []
        numbers = {id(block): number for number, block in enumerate(blocks)}

        def act(passage: Passage) -> None:
            self.order.append(numbers[id(passage.module)])

        self.hooks = [Hook(block, "input", act) for block in dict.fromkeys(blocks)]

    @property
    def now(self) -> int:
        """The call that is on, or was last; -1 before the first."""
        return len(self.order) - 1


@dataclass
class _Seen:
    into: dict[Path, tuple[int, ...]]
    out: dict[Path, tuple[int, ...]] = field(default_factory=dict)
    touched: set[int] = field(default_factory=set)


def _shapes_by_call(
    inputs: WaveInputs, blocks: Sequence[nn.Module], groups: int, start: int, stop: int | None, cache: Any
) -> list[_Seen]:
    """What each call of a block is given and gives, in a run of several groups."""
    seen: list[_Seen] = []
    watched = None if cache is None else watch(cache)

    def before(passage: Passage) -> None:
        if watched is not None:
            watched.seen = set()
        seen.append(_Seen(shapes_in((passage.args, passage.kwargs))))

    def after(passage: Passage) -> None:
        seen[-1].out = shapes_in(passage.output)
        seen[-1].touched = set() if watched is None else watched.seen

    hooks = [Hook(block, "input", before) for block in dict.fromkeys(blocks)]
    hooks += [Hook(block, "output", after) for block in dict.fromkeys(blocks)]
    with hooked(hooks, inputs.model):
        inputs.call(groups, start, stop, cache, keep=1)
    return seen


SHORT = 16
"""Tokens that are enough to tell which axes count rows."""


def learn_calls(
    learnt: Learnt, inputs: WaveInputs, blocks: Sequence[nn.Module], how: Cache, start: int | None = None
) -> None:
    """Find out which axes count rows at every call of a block, from runs of two and of three groups.

    Args:
        learnt: Where it is kept.
        inputs: Inputs to run.
        blocks: The blocks.
        how: Where keys and values of the tokens before come from.
        start: The first token of the runs; None for a short run that tells as much, as a rule.

    Raises:
        NoShortcutError: it cannot be told.
    """
    inputs = inputs.sample(learnt.examples)
    # Padding makes masks; without any a part of the prompt tells as much.
    stop = None if inputs.padded or inputs.has_pictures or start is not None else min(inputs.length, SHORT)
    length = inputs.length if stop is None else stop
    if start is None:
        start = 0 if how == "none" else max(1, length // 2)
    if how != "none" and length < 2:
        raise NoShortcutError("one token has none before it")
    runs: list[list[_Seen]] = []
    kept: list[list[dict[Path, tuple[int, ...]]]] = []
    for groups in (2, 3):
        cache = None if how == "none" else prefix_cache(inputs, start, how, groups=groups)
        kept.append([] if cache is None else shapes_of(cache))
        runs.append(_shapes_by_call(inputs, blocks, groups, start, stop, cache))
    two, three = runs
    if len(two) != len(three):
        raise NoShortcutError("blocks are called another number of times in another batch")
    calls = [
        CallRows(row_axes(a.into, b.into), row_axes(a.out, b.out), sorted(a.touched | b.touched))
        for a, b in zip(two, three, strict=True)
    ]
    if how != "none":
        if len(kept[0]) != len(kept[1]):
            raise NoShortcutError("its cache has another number of layers in another batch")
        learnt.cache_rows[how] = [row_axes(a, b) for a, b in zip(*kept, strict=True)]
    known = learnt.calls.get(how)
    if known is not None and len(known) == len(calls):  # the same calls, given something more this time
        calls = [
            CallRows({**old.into, **new.into}, {**old.out, **new.out}, sorted({*old.touched, *new.touched}))
            for old, new in zip(known, calls, strict=True)
        ]
    learnt.calls[how] = calls


def prefix_cache(inputs: WaveInputs, stop: int, how: Cache, groups: int = 1) -> Any:
    """The keys and values of the first tokens, from a run of these alone.

    Raises:
        NoShortcutError: the model gives none.
    """
    given: Any = recording_cache(inputs.model) if how == "recorded" else True
    output = inputs.call(groups, 0, stop, given, keep=1)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise NoShortcutError("the model gives no cache back")
    layers_of(cache)
    return cache
