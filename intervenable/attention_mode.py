"""Sees what an attention module computes in functions: scores, pattern, and the queries, keys and values they are of.

No module hands these over, so the functions themselves are met: the products of queries with keys and of pattern
with values, the softmax between them, and `scaled_dot_product_attention`, which does all three at once and is redone
by hand where a score or a probability is to be changed. That works alike for every architecture that computes
attention in torch, with whatever it adds to its scores: masks, windows, soft-caps, ALiBi, relative positions, sinks.

A `TorchFunctionMode` is known to its own thread alone. `hooks` puts it on when an attention module is entered and
takes it off when it is left; in all other modules nothing is slowed down.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from intervenable.attention_bands import BandedMatrix, BandedPassage
from intervenable.masked_scores import floor_of
from intervenable.passage import InsidePassage, Passage
from model_maps import Bands

SCORES = ("attention_scores", "attention_scores_masked")
SOFTMAX = (torch.softmax, Tensor.softmax, nn.functional.softmax)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)
PRODUCTS_ADDED = (torch.baddbmm, Tensor.baddbmm)
"""Products of the second and third argument, added to the first."""
FUSED = nn.functional.scaled_dot_product_attention
WHOLE = nn.functional.multi_head_attention_forward
"""Attention of torch's own layers, projections included: one function to a mode, unless it is opened."""
MET = frozenset((*SOFTMAX, *PRODUCTS, *PRODUCTS_ADDED, FUSED, WHOLE))


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function of torch's, in which a mode meets the functions that it calls instead of it alone."""
    names = {**function.__globals__, "has_torch_function": lambda *tensors: False}
    same = FunctionType(
        function.__code__, names, function.__name__, function.__defaults__, function.__closure__
    )
    same.__kwdefaults__ = function.__kwdefaults__
    return same


OPENED = opened(WHOLE)


class InsideHook(NamedTuple):
    """Something to do with a component that is computed by functions inside an attention module."""

    component: str
    act: Callable[[Passage], None]

    writes: bool
    """Whether it may change what it sees."""

    heads: int
    """Query heads of the module."""

    key_value_heads: int
    """Key-value heads of the module."""

    time_first: bool = False
    """Whether the module is given positions before examples."""

    bands: Bands | None = None
    """How the module's softmax lies, if not as a matrix of queries by keys."""


@dataclass
class _Call:
    """What is known of one call of an attention module so far."""

    batch: int
    queries: int
    keys: list[int] = field(default_factory=list)
    """Columns of the products of queries met, of which one is the scores: others are of positions told apart."""
    scored: bool = False
    """Whether a softmax was met whose pattern is still to be multiplied with values."""

    met: dict[int, int] = field(default_factory=dict)
    """How often each hook was called."""

    shown: dict[tuple[str, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What was shown last for components, and what their hooks made of it."""


class AttentionMode(TorchFunctionMode):
    """Lets hooks see and change what one call of one attention module computes.

    Args:
        module: The module.
        hooks: What to do with what, in this order where several are at one component.
        hidden_states: What goes into the module, `[b, q, ...]` (`[q, b, ...]` if the hooks say so): tells attention
            from other uses of a softmax.
    """

    def __init__(self, module: nn.Module, hooks: Sequence[InsideHook], hidden_states: Tensor) -> None:
        super().__init__()
        self._module = module
        self._hooks = hooks
        self._components = {hook.component for hook in hooks}
        self._heads, self._key_value_heads = hooks[0].heads, hooks[0].key_value_heads
        self._bands = hooks[0].bands
        first, second = hidden_states.shape[:2]
        self._call = _Call(second, first) if hooks[0].time_first else _Call(first, second)
        self.awake = True
        """Whether it looks at what is computed; not at what edits inside the module compute."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in MET or not self.awake:
            return func(*args, **kwargs)
        if func is WHOLE:
            with self:
                return OPENED(*args, **kwargs)
        if func is FUSED:
            return self._fused(*args, **kwargs)
        if func in SOFTMAX:
            return self._softmax(func, args, kwargs)
        return self._product(func, args, kwargs)

    # -- hooks

    def _wanted(self, *components: str) -> bool:
        return not self._components.isdisjoint(components)

    def _writes(self, *components: str) -> bool:
        return any(hook.writes for hook in self._hooks if hook.component in components)

    def _shown(
        self, tensor: Tensor, *components: str, passing: Callable[..., InsidePassage] = InsidePassage
    ) -> Tensor:
        """What the hooks of these components make of a tensor, which they are given in such a passage.

        Some modules compute a pattern anew for each half of their values: it is one, and is shown and changed once.
        """
        if not self._wanted(*components):
            return tensor
        before, after = self._call.shown.get(components, (None, tensor))
        if before is not None and before.dtype == tensor.dtype and torch.equal(before, tensor):
            return after
        before = tensor
        for index, hook in enumerate(self._hooks):
            if hook.component in components:
                times = self._call.met.get(index, 0)
                self._call.met[index] = times + 1
                passage = passing(self._module, tensor, repeated=times > 0)
                hook.act(passage)
                tensor = passage.tensor
        self._call.shown[components] = (before, tensor)
        return tensor

    # -- layouts

    def _by_heads(self, tensor: Tensor) -> Tensor | None:
        """`[b, heads, n, m]`, also of a tensor with batch and heads as one axis; None of any other."""
        if tensor.dim() == 4:
            return tensor
        if tensor.dim() != 3 or tensor.shape[0] % self._call.batch:
            return None
        return tensor.view(self._call.batch, -1, *tensor.shape[1:])

    def _is_matrix(self, tensor: Tensor | None) -> bool:
        return (
            tensor is not None
            and tensor.shape[1] == self._heads
            and tensor.shape[2] == self._call.queries
            and tensor.shape[0] == self._call.batch
        )

    def _expanded(self, tensor: Tensor) -> Tensor:
        """Keys or values `[b, heads, s, dh]` with one for each query head."""
        repeats = self._heads // tensor.shape[1]
        return tensor if repeats == 1 else tensor[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)

    def _keys_shown(self, keys: Tensor) -> Tensor:
        """What hooks make of the keys: the same tensor if they leave them as they are, else maybe expanded."""
        result = keys
        if self._wanted("rotary_key"):
            repeats = max(1, keys.shape[1] // self._key_value_heads)
            shared = keys[:, ::repeats]
            new = self._shown(shared, "rotary_key")
            result = keys if new is shared else new.repeat_interleave(repeats, dim=1)
        return self._expanded_shown(result, "expanded_head_key")

    def _expanded_shown(self, tensor: Tensor, component: str) -> Tensor:
        """What hooks make of expanded keys or values; the tensor itself if they leave them as they are."""
        if not self._wanted(component):
            return tensor
        expanded = self._expanded(tensor)
        new = self._shown(expanded, component)
        return tensor if new is expanded else new

    # -- functions, one by one

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A product: of queries with keys, of pattern with values, or something else."""
        named = dict(kwargs)
        added = func in PRODUCTS_ADDED
        names = ("batch1", "batch2") if added else ("other",)
        operands = [*args, *(named.pop(name) for name in names if name in named)]
        if "mat2" in named:
            operands.append(named.pop("mat2"))
        first = 1 if added else 0
        if len(operands) < first + 2 or not isinstance(operands[first + 1], Tensor):
            return func(*args, **kwargs)
        left, right = (self._by_heads(operand) for operand in operands[first : first + 2])
        if left is None or right is None:
            return func(*args, **kwargs)
        if self._call.scored:
            if self._is_matrix(left) and left.shape[3] == right.shape[2]:
                self._call.scored = False
                values = self._expanded_shown(right, "expanded_head_value")
                if values is not right:
                    operands[first + 1] = _like(values, operands[first + 1])
                    return func(*operands, **named)
        elif self._is_matrix(left) and left.shape[3] == right.shape[2]:
            self._call.keys.append(right.shape[3])
            queries = self._shown(left, "rotary_query")
            keys = right.transpose(2, 3)
            new = self._keys_shown(keys)
            if queries is not left or new is not keys:
                operands[first] = _like(queries, operands[first])
                operands[first + 1] = _like(new.transpose(2, 3), operands[first + 1])
                return func(*operands, **named)
        return func(*args, **kwargs)

    def _softmax(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        named = dict(kwargs)
        given: Tensor = named.pop("input") if "input" in named else args[0]
        rest = args if "input" in kwargs else args[1:]
        along = rest[0] if rest and isinstance(rest[0], int) else named.get("dim")
        last = along in (-1, given.dim() - 1)
        if self._bands is not None and last:
            return self._softmax_in_bands(func, given, rest, named, self._bands)
        scores = self._by_heads(given)
        if scores is None or not last or not self._is_matrix(scores):
            return func(*args, **kwargs)  # type: ignore[no-any-return]
        keys, met = scores.shape[3], self._call.keys
        if met and keys not in met:
            keys -= 1
            if keys not in met:
                return func(*args, **kwargs)  # type: ignore[no-any-return]
        self._call.scored = True
        sink = scores.shape[3] > keys  # a column that takes weight and stands for no key
        dead = None
        if self._wanted(*SCORES):
            seen = scores[..., :keys]
            new = self._shown(seen, *SCORES)
            if new is not seen:
                given = _like(torch.cat([new, scores[..., keys:]], -1) if sink else new, given)
                if not sink:
                    dead = _dead_rows(seen, new)
                if dead is not None:
                    given = given.masked_fill(_like(dead, given), 0.0)
        output: Tensor = func(given, *rest, **named)
        pattern = self._by_heads(output)
        assert pattern is not None
        if dead is not None:
            pattern = pattern.masked_fill(dead, 0.0)
            output = _like(pattern, output)
        if self._wanted("attention_pattern"):
            seen = pattern[..., :keys]
            new = self._shown(seen, "attention_pattern")
            if new is not seen:
                output = _like(torch.cat([new, pattern[..., keys:]], -1) if sink else new, output)
        return output

    def _softmax_in_bands(
        self, func: Any, given: Tensor, rest: Sequence[Any], named: Mapping[str, Any], bands: Bands
    ) -> Tensor:
        """A softmax over the keys around each query, with hooks at the matrix that this is a part of."""
        sizes = (self._call.batch, self._heads, self._call.queries)
        if not BandedMatrix.fits(given.shape, bands, *sizes):
            return func(given, *rest, **named)  # type: ignore[no-any-return]
        banded = BandedMatrix(given.shape, bands, self._call.queries, given.device)
        fault, least = banded.fault(given), floor_of(given.dtype)
        dead = None
        if self._wanted(*SCORES):
            seen = given if fault else banded.matrix(given, -torch.inf)
            passing = partial(BandedPassage, banded=banded, least=least, fault=fault)
            new = self._shown(seen, *SCORES, passing=passing)
            if new is not seen:
                edited = banded.put(given, new)
                dead = _dead_rows(given, edited)
                given = edited if dead is None else edited.masked_fill(dead, 0.0)
        output: Tensor = func(given, *rest, **named)
        if dead is not None:
            output = output.masked_fill(dead, 0.0)
        if self._wanted("attention_pattern"):
            empty = output.isnan() & (given.to(output.dtype) == -torch.inf)  # no model goes on with these
            seen = output if fault else banded.matrix(output.masked_fill(empty, 0.0), 0.0)
            passing = partial(BandedPassage, banded=banded, least=0.0, fault=fault)
            new = self._shown(seen, "attention_pattern", passing=passing)
            if new is not seen:
                output = banded.put(output, new)
        return output

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attention in one function: its parts shown, and redone by hand if scores or pattern may be changed."""
        as_it_was = (query, key, value, attn_mask, dropout_p, is_causal)
        # A single query of several heads may come as several queries of shared heads.
        packed = self._call.queries == 1 and query.shape[1] * query.shape[2] == self._heads != query.shape[1]
        if packed:
            query = query.reshape(query.shape[0], self._heads, 1, -1)
            if attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1] != 1:
                attn_mask = attn_mask.reshape(attn_mask.shape[0], self._heads, 1, -1)
        if query.dim() != 4 or query.shape[1] != self._heads or query.shape[2] != self._call.queries:
            return FUSED(*as_it_was, scale=scale, enable_gqa=enable_gqa)
        new_query, new_key = self._shown(query, "rotary_query"), self._keys_shown(key)
        new_value = self._expanded_shown(value, "expanded_head_value")
        output = None
        if self._wanted(*SCORES, "attention_pattern"):
            output = self._by_hand(new_query, new_key, new_value, attn_mask, dropout_p, is_causal, scale)
        if not self._writes(*SCORES, "attention_pattern"):
            if new_query is query and new_key is key and new_value is value:
                return FUSED(*as_it_was, scale=scale, enable_gqa=enable_gqa)
            key, value = self._expanded(new_key), self._expanded(new_value)
            output = FUSED(new_query, key, value, attn_mask, dropout_p, is_causal, scale=scale)
        assert output is not None
        return output.reshape(*as_it_was[0].shape[:3], output.shape[-1])

    def _by_hand(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
    ) -> Tensor | None:
        """What `scaled_dot_product_attention` computes, with hooks at scores and pattern; None if these only read.

        Operations and dtypes are those of the eager attention of transformers.
        """
        key, value = self._expanded(key), self._expanded(value)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = (query @ key.transpose(2, 3)).mul_(scale)  # in place while the tensor is ours alone
        if causal:
            future = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype, device=scores.device)
            scores = scores.add_(future.triu(1))
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        seen = scores
        scores = self._shown(seen, *SCORES)
        dead = None
        if mask is not None or scores is not seen:  # else each query reads itself at least
            # As the kernel does: rows that are -inf altogether give zeros; others that are masked are the model's.
            dead = _dead_rows(seen, scores, empty=True)
        if dead is not None:
            scores = scores.masked_fill(dead, 0.0)
        pattern = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        if dead is not None:
            pattern = pattern.masked_fill(dead, 0.0)
        pattern = self._shown(pattern, "attention_pattern")
        if not self._writes(*SCORES, "attention_pattern"):
            return None
        return nn.functional.dropout(pattern, dropout, training=dropout > 0) @ value


def _dead_rows(seen: Tensor, scores: Tensor, empty: bool = False) -> Tensor | None:
    """Rows `[b, heads, q, 1]` that an edit left without a key (with `empty`, also those that are -inf altogether).

    None if there are none, as nearly always.
    """
    # The largest of a row: one pass over the scores, a tenth of what comparing each of them costs.
    floor, top = floor_of(scores.dtype), scores.detach().amax(-1, keepdim=True)
    low = top <= floor
    if not low.any():
        return None
    dead = low & (seen.detach().amax(-1, keepdim=True) > floor)
    if empty:
        dead = dead | (top == -torch.inf)
    return dead if dead.any() else None


def _like(tensor: Tensor, other: Tensor) -> Tensor:
    """A tensor by heads with batch and heads as one axis, if the other has them so."""
    return tensor if other.dim() == tensor.dim() else tensor.flatten(0, 1)
