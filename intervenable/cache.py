"""Collected activations: a frozen mapping from `(component, layer)` to tensors with named axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor

from intervenable.cache_files import read_cache, write_cache
from intervenable.cache_joining import Aggregation, join, names_of, rows_of
from intervenable.cache_layout import BATCH, GROUP, POSITION, Layout, axes_of, check_axes
from intervenable.cache_means import means_of_groups
from intervenable.cache_memory import memory_table
from intervenable.errors import CacheError, MissingActivationError, unknown_name
from model_maps import ALIASES

Key = tuple[str, int | None]
"""A component (or a module path) and its layer; None outside the blocks."""
Value = Tensor | tuple[Tensor, ...]


class ActivationCache(Mapping[Key, Tensor]):
    """Activations by component and layer, as plain tensors that belong to nobody else.

    `cache["block_output", 4]` is a tensor, `cache.axes["block_output", 4]` names its axes, `cache["logits"]` needs no
    layer. Nothing changes a cache: every method that would returns a new one. It holds no reference to the model.

    Padding, and what fills examples up that have fewer units than others, is told apart by `layouts`: there each
    axis over tokens has the position of every entry among the real tokens of its example, -1 where it is none.

    Args:
        values: Tensors by `(component, layer)`, or by name where there is no layer. With a tuple of tensors, one for
            each example, instead of a tensor an activation is kept apart by examples.
        layouts: What their axes are; by default what is known of the component, without tokens.
        info: Anything else to keep, as JSON has it.

    Raises:
        CacheError: axes that do not fit a tensor, or something that is no tensor.

    Example:
        >>> cache = ActivationCache({("block_output", 4): torch.zeros(2, 7, 16), "logits": torch.zeros(2, 7, 72)})
        >>> cache["block_output", 4].shape, cache.axes["logits"]
        (torch.Size([2, 7, 16]), ('batch', 'position', 'vocabulary'))
    """

    def __init__(
        self,
        values: Mapping[Any, Tensor | Sequence[Tensor]],
        layouts: Mapping[Any, Layout] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self._info = dict(info or {})
        self._values: dict[Key, Value] = {self._key(key): _value(key, item) for key, item in values.items()}
        given = {self._key(key): layout for key, layout in (layouts or {}).items()}
        unknown = [key for key in given if key not in self._values]
        if unknown:
            raise CacheError(f"There is a layout for {unknown[0]}, and no activation.")
        self._layouts = {
            key: given.get(key) or Layout(axes_of(key[0], _dimensions(value)))
            for key, value in self._values.items()
        }
        for key, value in self._values.items():
            if isinstance(value, Tensor):
                check_axes(key, value, self._layouts[key])

    # -- looking

    def __getitem__(self, key: str | Key) -> Tensor:
        found = self._values.get(self._key(key))
        if found is None:
            raise MissingActivationError(self._missing(self._key(key)))
        return cast(Tensor, found)  # a tuple of tensors only for who asked for one

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        lines = [
            f"  {names_of([key])}: {_shape(value)} {self._layouts[key].axes}"
            for key, value in self._values.items()
        ]
        return "\n".join([f"ActivationCache with {len(self)} activation(s)", *lines])

    @property
    def layouts(self) -> Mapping[Key, Layout]:
        """What the axes of each activation are: names, tokens, heads."""
        return _Named(self._layouts, self)

    @property
    def axes(self) -> Mapping[Key, tuple[str, ...]]:
        """Names of the axes of each activation."""
        return _Named({key: layout.axes for key, layout in self._layouts.items()}, self)

    @property
    def positions(self) -> Mapping[Key, Tensor]:
        """`[batch, n]` for each activation with a position axis: which real token of its example each entry is.

        -1 where an entry is none. The axes of attention matrices are in `layouts[...].tokens`.
        """
        kept = {key: layout.tokens for key, layout in self._layouts.items()}
        return _Named(
            {
                key: next(tokens[name].positions for name in (POSITION, GROUP) if name in tokens)
                for key, tokens in kept.items()
                if POSITION in tokens or GROUP in tokens
            },
            self,
        )

    @property
    def info(self) -> Mapping[str, Any]:
        """What else was kept: the model's class and number of layers, and what the user added."""
        return dict(self._info)

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components there are, in order."""
        return tuple(dict.fromkeys(component for component, _ in self._values))

    def layers_of(self, component: str) -> tuple[int, ...]:
        """The layers of which a component is there, in order."""
        self.require([component])
        name = self._key(component)[0]
        return tuple(layer for known, layer in self._values if known == name and layer is not None)

    def require(self, entries: Iterable[str | Key]) -> Self:
        """Return this cache if it has all of these; a name alone means at least one layer of it.

        Raises:
            MissingActivationError: it has not; the message says what to collect.
        """
        keys = [self._key(entry) for entry in entries]
        there = {*self._values, *((component, None) for component, _ in self._values)}
        missing = [key for key in dict.fromkeys(keys) if key not in there]
        if missing:
            names = ", ".join(repr(key if key[1] is not None else key[0]) for key in missing)
            raise MissingActivationError(
                f"Not collected: {names}. Collect it too: iv.collect(model, inputs, [{names}, ...])."
                f"\nThere is: {', '.join(names_of([key]) for key in self._values) or 'nothing'}."
            )
        return self

    def by_example(self, key: str | Key) -> tuple[Tensor, ...]:
        """An activation as one tensor for each example, with the tokens of that example alone."""
        name = self._key(key)
        value = self[key]
        self._needs_batch([name])
        return rows_of(value, self._layouts[name])

    def by_group(self, key: str | Key) -> dict[str, Tensor]:
        """The entries of each group of positions by themselves, by what the group was asked for as.

        Raises:
            CacheError: the positions have no groups, or a group is not as long in every example.
        """
        value, layout = self[key], self._layouts[self._key(key)]
        self._needs_batch([self._key(key)])
        tokens, at = layout.tokens.get(POSITION), layout.axis(POSITION)
        if tokens is None or at is None or tokens.groups is None:
            raise CacheError(
                f"{names_of([self._key(key)])} has no groups: name them when collecting, positions=[...]."
            )
        found = {}
        for number, label in enumerate(tokens.labels):
            chosen = tokens.groups == number
            counts = sorted(set(chosen.sum(-1).tolist()))
            if len(counts) > 1:
                raise CacheError(
                    f"The group {label!r} has {counts[0]} to {counts[-1]} positions, depending on the example: take"
                    " the means of groups, or by_example()."
                )
            index = chosen.nonzero()[:, 1].reshape(len(chosen), -1).to(value.device)
            rows = torch.arange(len(chosen), device=value.device)[:, None]
            found[label] = value.movedim(at, 1)[rows, index].movedim(1, at)
        return found

    # -- making new ones

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """The same on another device, or in another type of number (whole numbers and masks keep theirs).

        Takes what `Tensor.to` takes.
        """

        def moved(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                return tensor.to(*args, **kwargs)
            device = kwargs.get("device", next((a for a in args if isinstance(a, (str, torch.device))), None))
            return tensor if device is None else tensor.to(device)

        return self._mapped(moved)

    def cpu(self) -> Self:
        """The same in main memory."""
        return self.to(device="cpu")

    def only(self, entries: Iterable[str | Key]) -> Self:
        """These activations alone; a name alone means every layer of it.

        Raises:
            MissingActivationError: one of them is not there.
        """
        wanted = [self._key(entry) for entry in entries]
        self.require(wanted)
        keys = [key for key in self._values if key in wanted or (key[0], None) in wanted]
        return self._with({key: self._values[key] for key in keys}, self._layouts)

    def with_info(self, **info: Any) -> Self:
        """The same with more kept beside it, which `save` writes too."""
        return self._with(self._values, self._layouts, {**self._info, **info})

    def cat(
        self,
        *others: ActivationCache,
        ragged: Literal["error", "pad", "list"] = "error",
        aggregation: Mapping[str, Aggregation] | None = None,
    ) -> Self:
        """The examples of this cache and then those of the others.

        An empty cache adds nothing. All others must have the same activations with the same axes.

        Args:
            others: Caches of other batches.
            ragged: What to do where examples of different batches have different numbers of tokens: `"error"`;
                `"pad"`: fill up with zeros, which the positions in `layouts` tell apart; `"list"`: keep a tuple with
                one tensor for each example.
            aggregation: What to do instead with some components: `"first"`, `"last"`, `"sum"`, or a function that is
                given the old and the new tensor and returns one. Names may have wildcards, `"final_norm_*"`.

        Raises:
            CacheError: other activations, axes, types or devices, or other lengths under `ragged="error"`.
        """
        everyone: tuple[ActivationCache, ...] = (self, *others)
        parts = [cache for cache in everyone if len(cache)]
        if len(parts) < 2 and ragged != "list":
            return (
                self
                if len(self) or not parts
                else self._with(parts[0]._values, parts[0]._layouts, parts[0].info)
            )
        values, layouts = join(
            [cache._values for cache in parts], [cache._layouts for cache in parts], ragged, aggregation or {}
        )
        info: dict[str, Any] = {}
        for cache in reversed(parts):
            info |= cache.info
        return self._with(values, layouts, info)

    def __add__(self, other: ActivationCache | Mapping[Any, Tensor]) -> Self:
        """All activations of both; where both have one, that of the right."""
        right = other if isinstance(other, ActivationCache) else type(self)(other, info=self._info)
        return self._with(
            {**self._values, **right._values},
            {**self._layouts, **right._layouts},
            {**self._info, **right._info},
        )

    def group_means(self) -> Self:
        """The mean over each group of positions, in float32 at least: the axis `position` becomes `group`.

        Raises:
            CacheError: the positions have no groups, or there are attention matrices (see `pattern_blocks`).
        """
        pairs = {key: means_of_groups(key, self[key], self._layouts[key]) for key in self._values}
        return self._with(
            {key: value for key, (value, _) in pairs.items()},
            {key: layout for key, (_, layout) in pairs.items()},
        )

    def select_examples(self, which: int | slice | Sequence[int]) -> Self:
        """Some of the examples; with an int that one alone, without a batch axis.

        Raises:
            CacheError: there is no batch axis, or no such example.
        """
        self._needs_batch(self._values)
        try:
            if isinstance(which, int):
                layouts = {
                    key: layout.mapped(lambda kept: kept[which, None])
                    for key, layout in self._layouts.items()
                }
                return self._with(
                    {key: value[which].clone() for key, value in self._values.items()},
                    {key: layout.without_batch() for key, layout in layouts.items()},
                )
            index = which if isinstance(which, slice) else list(which)
            return self._with(
                {key: _examples(value, index) for key, value in self._values.items()},
                {key: layout.mapped(lambda kept: kept[index]) for key, layout in self._layouts.items()},
            )
        except IndexError as error:
            sizes = {len(value) for value in self._values.values()}
            raise CacheError(f"There is no example {which}: there are {min(sizes)}.") from error

    def remove_batch_dim(self) -> Self:
        """The activations of the one example without a batch axis.

        Raises:
            CacheError: there are several examples, or there is no batch axis.
        """
        sizes = {len(value) for value in self._values.values()}
        if sizes - {1}:
            raise CacheError(
                f"There are {max(sizes)} examples; remove_batch_dim() is for one. Pick it: select_examples(0)."
            )
        return self.select_examples(0)

    # -- size and files

    def memory(self) -> dict[Key, int]:
        """Bytes that each activation takes."""
        return {
            key: sum(part.nbytes for part in (value if isinstance(value, tuple) else (value,)))
            for key, value in self._values.items()
        }

    def memory_table(self, by: Literal["component", "key"] = "component") -> str:
        """What the activations take, as a table to print: a line for each component, or for each activation."""
        return memory_table(self.memory(), by)

    def save(self, path: str | Path) -> Path:
        """Write the cache to a safetensors file, at once or not at all.

        Args:
            path: The file (`*.safetensors`), or a folder, in which it is called `activations.safetensors`.

        Returns:
            The file.

        Raises:
            StorageError: `info` holds something that JSON has no form for.
        """
        return write_cache(Path(path), self._values, self._layouts, self._info)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Self:
        """Read what `save` has written; no code in the file is ever run.

        Raises:
            StorageError: not such a file, or a damaged one.
            FileNotFoundError: there is none.
        """
        values, layouts, info = read_cache(Path(path), torch.device(device))
        return cls(values, layouts, info)

    # -- inside

    def _with(
        self,
        values: Mapping[Key, Value],
        layouts: Mapping[Key, Layout],
        info: Mapping[str, Any] | None = None,
    ) -> Self:
        return type(self)(values, {key: layouts[key] for key in values}, self._info if info is None else info)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Self:
        values = {
            key: tuple(map(function, value)) if isinstance(value, tuple) else function(value)
            for key, value in self._values.items()
        }
        return self._with(values, self._layouts)

    def _key(self, given: object) -> Key:
        """What was written for an activation, in the one form it has here."""
        component, layer = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
        if not isinstance(component, str) or not (layer is None or type(layer) is int):
            raise MissingActivationError(
                f"{given!r} names no activation: write a component with its layer, cache['block_output', 4]."
            )
        layers = self._info.get("layers")
        if layer is not None and layer < 0 and isinstance(layers, int) and -layers <= layer:
            layer += layers
        return ALIASES.get(component, component), layer

    def _missing(self, key: Key) -> str:
        component, layer = key
        layers = [known for name, known in self._values if name == component]
        if not layers:
            return unknown_name("activation", component, self.components, "in this cache") + (
                f" To have it: iv.collect(model, inputs, [{component!r}, ...])."
            )
        if layer is None:
            return f"{component} is there for layer(s) {_numbers(layers)}: write cache[{component!r}, {layers[0]}]."
        if layers == [None]:
            return f"{component} is outside the blocks and has no layer: write cache[{component!r}]."
        return f"{component} was not collected in layer {layer}, but in layer(s) {_numbers(layers)}."

    def _needs_batch(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if self._layouts[key].axes[:1] != (BATCH,):
                raise CacheError(f"{names_of([key])} has no batch axis any more: {self._layouts[key].axes}.")


class _Named(Mapping[Key, Any]):
    """Something for each activation, found by the same words as the activation."""

    def __init__(self, items: Mapping[Key, Any], cache: ActivationCache) -> None:
        self._items, self._cache = items, cache

    def __getitem__(self, key: str | Key) -> Any:
        found = self._cache._key(key)
        if found not in self._items:
            raise MissingActivationError(
                self._cache._missing(found)
                if found not in self._cache
                else (f"{names_of([found])} has no positions: {self._cache.axes[found]}.")
            )
        return self._items[found]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def _value(key: object, given: object) -> Value:
    if isinstance(given, Tensor):
        return given
    if isinstance(given, (list, tuple)) and given and all(isinstance(part, Tensor) for part in given):
        return tuple(given)
    raise CacheError(
        f"{key!r} is a {type(given).__name__}. A cache keeps tensors, or one tensor for each example."
    )


def _dimensions(value: Value) -> int:
    return value.dim() if isinstance(value, Tensor) else value[0].dim() + 1


def _examples(value: Value, index: slice | list[int]) -> Value:
    if isinstance(value, Tensor):
        return value[index].clone()
    return value[index] if isinstance(index, slice) else tuple(value[example] for example in index)


def _shape(value: Value) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"{len(value)} tensors"


def _numbers(layers: Sequence[int | None]) -> str:
    return ", ".join(str(layer) for layer in layers)
