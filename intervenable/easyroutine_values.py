"""What the `patching_values` of easyroutine are as tensors: cut out of matrices, taken from caches, or means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.cache import ActivationCache
from intervenable.config import RepresentationConfig
from intervenable.easyroutine_keys import ActivationKey, parse_activation_key
from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from intervenable.model import IntervenableModel
from intervenable.unwrapping import config_of
from interventions import CollectIntervention
from model_maps import Sizes, sizes_of


@dataclass(frozen=True, eq=False)
class FromCache:
    """Values that stand in a cache: `cache[key]` at some of its positions.

    Example:
        >>> cache = {"resid_out_4": torch.arange(6.0).view(1, 3, 2), "mapping_index": {"last": [2]}}
        >>> FromCache(cache, "resid_out_4", ["last"]).vectors(Sizes())
        tensor([[[4., 5.]]])
    """

    cache: Mapping[Any, Any]
    """An `ActivationCache`, or tensors by easyroutine's keys (with its `mapping_index`, for positions by name)."""

    key: str
    """Which activation: a key of easyroutine's."""

    positions: Any = None
    """Which of its positions, in order: numbers, and the names under which positions were collected. None for all."""

    def vectors(self, sizes: Sizes) -> Tensor:
        """`[b, n, D]` values at the positions.

        Raises:
            ConfigError: nothing in the cache is called so, or its examples have not those positions.
        """
        rows, positions = self._rows(sizes)
        if self.positions is None:
            return _stacked(rows, self.key)
        entries = self.positions if isinstance(self.positions, (list, tuple)) else [self.positions]
        chosen = []
        for example, (row, there) in enumerate(zip(rows, positions, strict=True)):
            index = [place for entry in entries for place in self._places(entry, there, example)]
            chosen.append(row[index])
        return _stacked(chosen, self.key)

    def matrices(self, sizes: Sizes) -> Tensor:
        """`[b, q, k]` the matrices of the head."""
        if self.positions is not None:
            raise ConfigError(
                f"FromCache({self.key!r}): positions={self.positions!r} makes no sense for a matrix, of which the"
                " entries are taken that are edited. Leave it out."
            )
        return _stacked(self._rows(sizes)[0], self.key)

    def _rows(self, sizes: Sizes) -> tuple[list[Tensor], list[list[int]]]:
        """For each example what is there of the activation, one head alone, and at which positions."""
        named = parse_activation_key(self.key, sizes)
        if isinstance(self.cache, ActivationCache):
            place = (named.component, named.layer)
            rows = list(self.cache.by_example(place))
            head = named.component_head(sizes)
            if head is not None:
                rows = [row[head] for row in rows]
            there = self.cache.positions.get(place)
            positions = [[] for _ in rows] if there is None else [row[row >= 0].tolist() for row in there]
            return rows, positions
        if self.key not in self.cache:
            raise UnknownNameError(unknown_name("activation", self.key, map(str, self.cache), "in the cache"))
        value = torch.as_tensor(self.cache[self.key])
        if named.component == "attention_pattern" and value.dim() == 4:
            value = value.squeeze(1)
        if value.dim() != 3:
            raise ConfigError(
                f"{self.key!r} in the cache has shape {tuple(value.shape)}, not [batch, positions, width]."
            )
        return list(value), [list(range(value.shape[1]))] * len(value)

    def _places(self, entry: Any, there: Sequence[int], example: int) -> list[int]:
        """Where in the rows of an example an entry stands."""
        if isinstance(entry, str):
            return self._group(entry, example)
        if not isinstance(entry, int) or isinstance(entry, bool):
            raise ConfigError(
                f"FromCache({self.key!r}): {entry!r} is no position; give numbers, or names that the cache knows."
            )
        if isinstance(self.cache, ActivationCache) and entry >= 0:
            if entry not in there:
                raise ConfigError(
                    f"FromCache({self.key!r}): position {entry} was not collected for example {example}, which has"
                    f" {', '.join(map(str, there)) or 'none'}."
                )
            return [there.index(entry)]
        if not -len(there) <= entry < len(there):
            raise ConfigError(
                f"FromCache({self.key!r}): position {entry} is out of range: example {example} has {len(there)}."
            )
        return [entry % len(there)]

    def _group(self, name: str, example: int) -> list[int]:
        if isinstance(self.cache, ActivationCache):
            named = parse_activation_key(self.key)
            tokens = self.cache.layouts[named.component, named.layer].tokens.get("position")
            labels = () if tokens is None or tokens.groups is None else tokens.labels
            if tokens is not None and tokens.groups is not None and name in labels:
                real = tokens.positions[example] >= 0
                groups = tokens.groups[example][real]
                return [int(place) for place in (groups == labels.index(name)).nonzero().flatten()]
        else:
            labels = tuple(self.cache.get("mapping_index", {}))
            if name in labels:
                return [int(place) for place in self.cache["mapping_index"][name]]
        raise UnknownNameError(
            unknown_name("name of positions", name, labels, f"of {self.key!r} in the cache")
        )


class Values:
    """Makes tensors of patching values, for one model and, where it depends on them, its inputs."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        self.sizes = sizes_of(config_of(model))
        self._given = inputs

    def vectors(self, value: Tensor | FromCache) -> Tensor:
        """A tensor as it is, and cached values as one: `[b, n, D]`."""
        return value.vectors(self.sizes) if isinstance(value, FromCache) else value

    def mean(self, key: ActivationKey) -> Tensor:
        """`[b, 1, D]` or `[b, 1, 1, dh]`: the mean over the real positions of the unedited activation."""
        everywhere = slice(None)
        where: Any = everywhere
        if key.head is not None:
            where = {"heads": key.component_head(self.sizes), "positions": everywhere}
        entry = RepresentationConfig(
            key.layer, key.component, key.unit, intervention=CollectIntervention(), where=where
        )
        with torch.no_grad():
            output = IntervenableModel(entry, self.model)(self._needed("patching_values='mean'"))
        values: Tensor = output.collected_activations[0]
        masks = list(output.collected_mask.values())
        weights = masks[0].to(values)[..., None] if masks else torch.ones_like(values[..., :1])
        return (values * weights).sum(-2, keepdim=True) / weights.sum(-2, keepdim=True)

    def matrices(self, value: Tensor | FromCache, key: ActivationKey) -> Tensor:
        """Values of whole matrices, `[q, k]` or one for each example `[b, 1, q, k]`, padding included."""
        tensor = value.matrices(self.sizes) if isinstance(value, FromCache) else value
        if tensor.dim() not in (2, 3, 4) or (tensor.dim() == 4 and tensor.shape[1] != 1):
            raise ConfigError(
                f"patching_values of {str(key)!r} have shape {tuple(tensor.shape)}; a matrix has [queries, keys], and"
                " one for each example [batch, queries, keys]."
            )
        return tensor[:, None] if tensor.dim() == 3 else tensor

    def _needed(self, what: str) -> Any:
        if self._given is None:
            raise ConfigError(
                f"{what} depends on what the model is run on: give that to from_easyroutine(records, model, inputs)."
            )
        return self._given


def _stacked(rows: Sequence[Tensor], what: str) -> Tensor:
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) > 1:
        raise ConfigError(
            f"The values of {what!r} differ in number between examples ({', '.join(map(str, sorted(shapes)))}), which"
            " no tensor can hold. Give a record for each group of like examples."
        )
    return torch.stack(list(rows))
