"""What attention patterns say in a few numbers: how much some tokens read of others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from intervenable.errors import CacheError, LocationError, LocationRangeError, UnknownNameError, unknown_name

Group = int | slice | Sequence[int]
Groups = Sequence[Group] | Sequence[Sequence[Group]]
"""Groups of positions for all examples, or for each example its own (as many in each)."""
Method = Literal["mean", "sum", "row_mass", "baseline_ratio", "none"]
METHODS = ("baseline_ratio", "mean", "none", "row_mass", "sum")
NAN_POLICIES = ("nan", "raise", "zero")


def pattern_blocks(
    pattern: Tensor,
    columns: Groups,
    rows: Groups | None = None,
    method: Method = "mean",
    *,
    allowed: Tensor | Literal["causal", "all"] | None = None,
    nan_policy: Literal["zero", "nan", "raise"] = "zero",
) -> Tensor:
    r"""What groups of queries read of groups of keys, one number for each pair of groups.

    With a pattern `A`, the queries `R` of a row group and the keys `C` of a column group:

    - `"mean"`: the average of `A[i, j]` over `i` in `R`, `j` in `C`, entries under the mask included;
    - `"sum"`: their sum;
    - `"row_mass"`: the sum over `C`, averaged over `R`: the share of its attention that a query gives to the group;
    - `"baseline_ratio"`: the row mass, divided by what it would be if each query read all keys that it may read
      equally: above 1 where the group is read more than its size explains;
    - `"none"`: the entries themselves, the sub-matrix of all rows by all columns in the order of the groups.

    Args:
        pattern: `(..., q, k)`, as collected: `cache["attention_pattern", 3]`.
        columns: Groups of keys: `[(0, 1), 4, slice(5, None)]`, a tuple being a group, as a position by itself is. For
            examples that differ, a list of such lists, one for each example.
        rows: Groups of queries; by default those of `columns`.
        method: See above.
        allowed: For `"baseline_ratio"`, the keys that each query may read: True there, in a shape that broadcasts to
            the pattern's, such as `cache["attention_scores", 3] > -torch.inf`; or `"causal"` or `"all"` for inputs
            without padding and windows.
        nan_policy: The ratio of a block in which no query may read any key: `"zero"`, `"nan"` or `"raise"`.

    Shape:
        result: `(..., row groups, column groups)`; for `"none"` `(..., rows, columns)`. Float32 at least.

    Raises:
        LocationError, LocationRangeError: groups that are empty, name a position twice or one that is not there.
        CacheError: `allowed` is missing or forbids what the pattern reads; a ratio of nothing under `"raise"`.

    Example:
        >>> uniform = uniform_pattern("causal", 4)
        >>> pattern_blocks(uniform, columns=[(0, 1)], rows=[3]), pattern_blocks(
        ...     uniform, columns=[(0, 1)], rows=[3], method="baseline_ratio", allowed="causal")
        (tensor([[0.2500]]), tensor([[1.]]))
    """
    if method not in METHODS:
        raise UnknownNameError(unknown_name("method", method, METHODS))
    if nan_policy not in NAN_POLICIES:
        raise UnknownNameError(unknown_name("nan_policy", nan_policy, NAN_POLICIES))
    if pattern.dim() < 2:
        raise CacheError(f"A pattern is a tensor (..., queries, keys), not {_shape(pattern)}.")
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    right = _index(columns, pattern.shape[-1], "columns", pattern)
    left = _index(columns if rows is None else rows, pattern.shape[-2], "rows", pattern)
    if method == "none":
        return _sub_matrix(wide, left, right)
    members = [
        _members(groups, size, wide) for groups, size in zip((left, right), wide.shape[-2:], strict=True)
    ]
    total = _between(wide, *members)
    counts = [one.sum(-1) for one in members]  # (..., groups)
    if method == "sum":
        return total
    if method == "mean":
        return total / (counts[0][..., :, None] * counts[1][..., None, :])
    mass = total / counts[0][..., :, None]
    if method == "row_mass":
        return mass
    baseline = (
        _between(uniform_pattern(_allowed(allowed, pattern), like=wide), *members) / counts[0][..., :, None]
    )
    return _ratio(mass, baseline, nan_policy)


def uniform_pattern(
    allowed: Tensor | Literal["causal", "all"], size: int | None = None, *, like: Tensor | None = None
) -> Tensor:
    """The pattern of queries that read all keys they may read equally; zeros where one may read none.

    Args:
        allowed: True where a query may read a key, `(..., q, k)`; or a word, for `size` positions.
        size: Number of positions, for a word.
        like: A tensor whose type and device the result gets.

    Example:
        >>> uniform_pattern("causal", 2)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    if isinstance(allowed, str):
        if size is None:
            raise CacheError(f"uniform_pattern({allowed!r}) needs the number of positions: size=...")
        allowed = _allowed(allowed, torch.empty(size, size))
    mask = allowed.to(torch.float32) if like is None else allowed.to(like)
    uniform: Tensor = mask / mask.sum(-1, keepdim=True).clamp(min=1)
    return uniform


def value_weighted_pattern(pattern: Tensor, vectors: Tensor) -> Tensor:
    """A pattern weighted by the size of what is read: `A[q, k] * ||v_k||`.

    Kobayashi et al. (2020), "Attention is Not Only a Weight: Analyzing Transformers with Vector Norms",
    https://arxiv.org/abs/2004.10102.

    Args:
        pattern: `(..., H, q, k)`.
        vectors: What each head reads of each key, `(..., H, k, d)`: values, or values through the output projection
            (`head_vectors`). With fewer heads than the pattern (grouped-query attention), each serves its group.

    Shape:
        result: that of `pattern`; float32 at least.

    Raises:
        CacheError: the vectors are not those of the pattern's keys.
    """
    norms = vectors.to(torch.promote_types(vectors.dtype, torch.float32)).norm(dim=-1)
    if norms.dim() >= 2 and pattern.dim() >= 3:
        norms = repeated_heads(norms, pattern.shape[-3], axis=-2)
    if norms.shape[-1:] != pattern.shape[-1:] or norms.dim() != pattern.dim() - 1:
        raise CacheError(
            f"The pattern is {_shape(pattern)} and the vectors are {_shape(vectors)}: for (..., H, q, k) they must be"
            " (..., H, k, d)."
        )
    weighted: Tensor = pattern * norms[..., None, :]
    return weighted


def repeated_heads(tensor: Tensor, heads: int, axis: int) -> Tensor:
    """Key-value heads as each query head reads them: head `h` of `heads` is that of its group.

    Raises:
        CacheError: there are not as many query heads for each.
    """
    there = tensor.shape[axis]
    if heads % there:
        raise CacheError(f"{there} key-value heads cannot serve {heads} query heads in equal groups.")
    return tensor.repeat_interleave(heads // there, axis) if there != heads else tensor


# --- inside -----------------------------------------------------------------------------------------------

_Index = list[list[list[int]]]
"""For each example (or once for all) the positions of each group."""


def _index(groups: Any, size: int, name: str, pattern: Tensor) -> _Index:
    listed = _plain(groups)
    if not isinstance(listed, list) or not listed:
        raise LocationError(f"{name} is {groups!r}. Give a list of groups: {name}=[(0, 1), 4].")
    each = all(isinstance(item, list) for item in listed) and (
        all(isinstance(item, list) for item in groups)  # lists are for examples, tuples are groups
        or any(isinstance(inner, (list, slice)) for item in listed for inner in item)
    )
    examples = listed if each else [listed]
    if each and (pattern.dim() < 3 or len(examples) != pattern.shape[0]):
        there = pattern.shape[0] if pattern.dim() > 2 else "no"
        raise LocationError(
            f"{name} has groups for {len(examples)} examples, and the pattern {_shape(pattern)} has {there}."
        )
    found = [[_positions(group, size, name) for group in example] for example in examples]
    numbers = sorted({len(example) for example in found})
    if len(numbers) > 1:
        raise LocationError(
            f"{name} has {numbers[0]} to {numbers[-1]} groups, depending on the example; give as many in each."
        )
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, range):
        return list(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _positions(group: Any, size: int, name: str) -> list[int]:
    if isinstance(group, slice):
        group = list(range(size)[group])
    listed = group if isinstance(group, list) else [group]
    for position in listed:
        if isinstance(position, bool) or not isinstance(position, int):
            raise LocationError(
                f"{position!r} in {name} is not a position: give ints, tuples of ints or slices."
            )
        if not -size <= position < size:
            raise LocationRangeError(
                f"Position {position} in {name} is out of range: the pattern has positions 0 to {size - 1} there."
            )
    found = [position % size for position in listed]
    if not found:
        raise LocationError(f"A group in {name} is empty. Give at least one position.")
    if len(set(found)) < len(found):
        raise LocationError(f"The group {tuple(listed)} in {name} names a position more than once.")
    return found


def _members(index: _Index, size: int, like: Tensor) -> Tensor:
    """1 where a position belongs to a group: `(groups, size)`, or for each example `(b, 1..., groups, size)`."""
    marks = like.new_zeros(len(index), len(index[0]), size)
    for example, groups in enumerate(index):
        for number, group in enumerate(groups):
            marks[example, number, group] = 1
    if len(index) == 1:
        return marks[0]
    return marks.view(len(index), *[1] * (like.dim() - 3), *marks.shape[1:])


def _between(pattern: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    return rows @ pattern @ columns.mT


def _sub_matrix(pattern: Tensor, rows: _Index, columns: _Index) -> Tensor:
    sides: list[list[list[int]]] = []
    for name, index in (("rows", rows), ("columns", columns)):
        side = [[position for group in example for position in group] for example in index]
        lengths = sorted({len(example) for example in side})
        if len(lengths) > 1:
            raise LocationError(
                f"{name} has {lengths[0]} to {lengths[-1]} positions, depending on the example, which is no matrix."
            )
        sides.append(side)
    count = max(len(side) for side in sides)
    left, right = (side * (count // len(side)) for side in sides)
    if count == 1:
        return pattern[..., torch.tensor(left[0])[:, None], torch.tensor(right[0])]
    each = zip(pattern, left, right, strict=True)
    return torch.stack([one[..., torch.tensor(r)[:, None], torch.tensor(c)] for one, r, c in each])


def _allowed(allowed: Any, pattern: Tensor) -> Tensor:
    queries, keys = pattern.shape[-2:]
    if isinstance(allowed, Tensor):
        if allowed.dtype != torch.bool:
            raise CacheError(
                f"allowed is {allowed.dtype}: give True where a query may read a key, such as"
                " cache['attention_scores', 3] > -torch.inf."
            )
        try:
            return allowed.to(pattern.device).expand(pattern.shape)
        except RuntimeError as error:
            raise CacheError(
                f"allowed is {_shape(allowed)}, which does not broadcast to the pattern {_shape(pattern)}."
            ) from error
    ones = torch.ones(queries, keys, dtype=torch.bool, device=pattern.device)
    if allowed == "all":
        return ones
    if allowed == "causal":
        return ones.tril(keys - queries)  # the queries are the last of the keys
    if allowed is None:
        raise CacheError(
            "method='baseline_ratio' compares with reading all allowed keys equally: say which those are,"
            " allowed=cache['attention_scores', layer] > -torch.inf, or 'causal' or 'all' where there is no padding"
            " and no window."
        )
    raise UnknownNameError(unknown_name("allowed", allowed, ("all", "causal")))


def _ratio(mass: Tensor, baseline: Tensor, nan_policy: str) -> Tensor:
    nothing = baseline == 0
    if bool((nothing & (mass > 0)).any()):
        raise CacheError(
            "The pattern reads keys that `allowed` forbids, so it is not the mask of this pattern. Take it from the"
            " same run: cache['attention_scores', layer] > -torch.inf."
        )
    ratio = mass / baseline
    if nan_policy == "nan" or not bool(nothing.any()):
        return ratio
    if nan_policy == "raise":
        rows, columns = nothing.nonzero()[0].tolist()[-2:]
        raise CacheError(
            f"No query of row group {rows} may read any key of column group {columns}, so their ratio is 0 / 0. For a"
            " number there: nan_policy='zero' or 'nan'."
        )
    return torch.where(nothing, torch.zeros_like(ratio), ratio)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else f"a {type(value).__name__}"
