"""Edits of attention matrices that have a name: columns, rows, blocks, whole heads, cut edges.

Rows are the tokens that read (queries), columns those that are read (keys). Every function here declares and nothing
more: it gives a `RepresentationConfig` if one layer is meant by a number, and a list of them otherwise, for
`IntervenableConfig` to take. What is done is said by the same options everywhere:

`at`
    `"pattern"` (default): after the softmax; what is taken from a row is not made up for. `"scores"`: before it, so
    that the other keys take over; what the model's mask hides stays hidden whatever is done.
`mode`
    `"scale"`: multiply by `factor`. `"mask"`, for scores alone: the entry gets no weight at all, and a row that has
    nothing left becomes zeros. `"set"`: put `values` there. Left out it is `"set"` if there are values, `"mask"` for
    scores with the factor 0, and `"scale"` otherwise.
`factor`
    0 (default) ablates, 0.5 halves, 2 doubles.
`values`
    New entries: they broadcast to `[batch, heads, queries, keys]` of those chosen, or are whole matrices, of which
    the chosen entries are taken. A pattern has them as they are, also where the model's mask hides the keys.
`renormalize`
    `"rows"` divides the edited rows of a pattern by their sum (rows without mass stay zero), `"check"` raises if one
    does not sum to one, `"none"` (default) leaves them.
`stack`
    `"encoder"`, `"decoder"`, `"vision"`, `"audio"`, `"text"` or `"cross"`, in models of several stacks: which
    attention is meant.
`model`
    The model, to count the layers of `layer="all"`.

Layers are a number, several numbers (a `range` for a window) or `"all"`, heads a number, several or `"all"`, tokens
whatever the `where` of a `RepresentationConfig` takes: numbers from 0, words of the text, `"last"`, or a list. What
makes no sense is a `ConfigError` when it is declared; what the model does not have, when it is bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypedDict, Unpack, get_args

from torch import Tensor, nn

from intervenable.config import RepresentationConfig
from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from intervenable.layer_lists import Layers, layers_named, whole_numbers
from intervenable.position_entries import Except
from interventions import (
    Intervention,
    KnockoutIntervention,
    ScaleIntervention,
    VanillaIntervention,
    ZeroIntervention,
)
from model_maps import Stack

Heads = int | Iterable[int] | Literal["all"]
Tokens = Any
"""What a level of `where` takes: a position, a name or words, an object of `positions`, or a list of these."""

Edit = RepresentationConfig | list[RepresentationConfig]
"""One declaration where one layer is given by its number, a list of them otherwise."""


class How(TypedDict, total=False):
    """The options that say what is done; the docstring of this module has their meaning."""

    at: Literal["pattern", "scores"]
    mode: Literal["mask", "scale", "set"] | None
    factor: float
    values: Tensor | None
    renormalize: Literal["none", "rows", "check"]
    stack: Stack | None
    model: nn.Module | None


def columns(layer: Layers, heads: Heads, tokens: Tokens, **how: Unpack[How]) -> Edit:
    """Edit columns: what all queries read of some tokens.

    Example:
        >>> nobody_reads_it = columns(3, 8, "Spain")
        >>> nobody_reads_it.component, nobody_reads_it.where
        ('attention_pattern', {'heads': 8, 'keys': 'Spain'})
    """
    return _edits(layer, "h.query.key", _where(heads, keys=tokens), how)


def rows(layer: Layers, heads: Heads, tokens: Tokens, **how: Unpack[How]) -> Edit:
    """Edit rows: all that some tokens read.

    Example:
        >>> [entry.where for entry in rows([3, 4], "all", "last")]
        [{'queries': 'last'}, {'queries': 'last'}]
    """
    return _edits(layer, "h.query", _where(heads, queries=tokens), how)


def grid(layer: Layers, heads: Heads, queries: Tokens, keys: Tokens, **how: Unpack[How]) -> Edit:
    """Edit the entries where some rows and some columns meet: what these queries read of those keys.

    Example:
        >>> grid(3, [0, 8], "last", [1, 2], at="scores").intervention
        KnockoutIntervention()
    """
    return _edits(layer, "h.query.key", _where(heads, queries=queries, keys=keys), how)


def full(layer: Layers, heads: Heads, **how: Unpack[How]) -> Edit:
    """Edit the whole matrices of some heads.

    Example:
        >>> full(3, 8, factor=0.5).unit
        'h'
    """
    return _edits(layer, "h", _where(heads), how)


def block(
    layer: Layers, heads: Heads, *, rows: Tokens, columns: Tokens, exclude: Tokens = None, **how: Unpack[How]
) -> Edit:
    """Edit a block, such as what the text reads of an image; like `grid`, and some columns can be left out.

    Args:
        layer, heads, how: As everywhere here.
        rows: The tokens that read.
        columns: The tokens that are read.
        exclude: Columns to leave alone.

    Example:
        >>> block(3, 8, rows="last", columns=[0, 1, 2], exclude=1).where["keys"]
        Except(of=[0, 1, 2], exclude=1)
    """
    keys = columns if exclude is None else Except(columns, exclude)
    return _edits(layer, "h.query.key", _where(heads, queries=rows, keys=keys), how)


def keep_self(layer: Layers, heads: Heads, tokens: Tokens, **how: Unpack[How]) -> Edit:
    """Edit all that some tokens read but for themselves: with the factor 0 nothing but their own entry is left.

    Raises:
        ConfigError: as the others do, and for `values`: each row has other columns there.

    Example:
        >>> keep_self(3, 8, "last").where
        {'heads': 8, 'queries': 'last', 'keys': 'others'}
    """
    if how.get("values") is not None:
        raise ConfigError(
            "keep_self takes no values: the columns that it edits are others in each row. Give a factor, or rows(...)"
            " with values for whole rows."
        )
    return _edits(layer, "h.query.key", _where(heads, queries=tokens, keys="others"), how)


def heads(pairs: Iterable[Any], **how: Unpack[How]) -> list[RepresentationConfig]:
    """Edit the whole matrices of heads given as pairs `(layer, head)`; with the factor 0 they read nothing.

    A pattern of zeros is the same as zeros in the head's `head_attention_value_output`.

    Returns:
        One declaration for each layer, layers in the order in which they first appear.

    Raises:
        ConfigError: a pair given twice, none at all, or what the options make impossible.

    Example:
        >>> [(entry.layer, entry.where) for entry in heads([(3, 8), (5, 0), (3, 1)])]
        [(3, {'heads': [8, 1]}), (5, {'heads': [0]})]
    """
    by_layer: dict[int, list[int]] = {}
    for pair in pairs if hasattr(pairs, "__iter__") else [pairs]:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(n, int) for n in pair):
            raise ConfigError(f"{pair!r} is no head; heads are pairs (layer, head) such as (3, 8).")
        layer, head = pair
        if head in by_layer.setdefault(layer, []):
            raise ConfigError(f"Head {head} of layer {layer} is given twice.")
        by_layer[layer].append(head)
    if not by_layer:
        raise ConfigError("No heads were given. Give pairs (layer, head), at least one.")
    return [_edit(layer, "h", {"heads": chosen}, how) for layer, chosen in by_layer.items()]


def knockout(
    queries: Tokens, keys: Tokens, layers: Layers = "all", heads: Heads = "all", **how: Unpack[How]
) -> list[RepresentationConfig]:
    """Cut edges: some tokens cannot read some others, in a window of layers; the rest of each row takes over.

    Geva et al. (2023), "Dissecting Recall of Factual Associations in Auto-Regressive Language Models",
    https://arxiv.org/abs/2304.14767.

    Args:
        queries: The tokens that would read.
        keys: The tokens that they are not to read.
        layers: The layers, such as `range(4, 9)`; for `"all"` give `model`.
        heads: The heads.
        how: As everywhere here, except that `at` is `"scores"` unless said otherwise.

    Example:
        >>> [entry.layer for entry in knockout("last", "Spain", range(4, 7))]
        [4, 5, 6]
    """
    chosen: Any = {"at": "scores", **how}
    made = grid(layers, heads, queries, keys, **chosen)
    return made if isinstance(made, list) else [made]


# --- where ------------------------------------------------------------------------------------------------


def _where(heads: Any, **levels: Tokens) -> dict[str, Any]:
    """The levels that are not everything."""
    missing = [level for level, tokens in levels.items() if tokens is None]
    if missing:
        raise ConfigError(f"The {missing[0]} are None. Say which tokens are meant, or 'all'.")
    everywhere = isinstance(heads, str) and heads == "all"
    return levels if everywhere else {"heads": whole_numbers(heads, "heads"), **levels}


# --- what -------------------------------------------------------------------------------------------------


def _edits(layer: Layers, unit: str, where: Mapping[str, Any], how: How) -> Edit:
    """The declaration for one layer, or a list of those for several."""
    layers = layers_named(layer, _component(how), how.get("model"))
    if isinstance(layers, int):
        return _edit(layers, unit, where, how)
    return [_edit(each, unit, where, how) for each in layers]


def _edit(layer: int, unit: str, where: Mapping[str, Any], how: How) -> RepresentationConfig:
    unknown = [name for name in how if name not in How.__annotations__]
    if unknown:
        raise UnknownNameError(unknown_name("option", unknown[0], How.__annotations__))
    component = _component(how)
    return RepresentationConfig(
        layer,
        component,
        unit,
        where=dict(where),
        renormalize=how.get("renormalize", "none"),
        **_intervention(how.get("at", "pattern"), how.get("mode"), how.get("factor", 0.0), how.get("values")),
    )


def _component(how: How) -> str:
    at, stack = how.get("at", "pattern"), how.get("stack")
    if at not in ("pattern", "scores"):
        raise UnknownNameError(unknown_name("at", at, ["pattern", "scores"]))
    if stack is not None and stack not in get_args(Stack):
        raise UnknownNameError(unknown_name("stack", stack, get_args(Stack)))
    return f"attention_{at}" if stack is None else f"{stack}_attention_{at}"


def _intervention(at: str, mode: str | None, factor: Any, values: Tensor | None) -> dict[str, Any]:
    """The fields of a representation that say what is done."""
    if not isinstance(factor, (int, float)) or not math.isfinite(factor):
        raise ConfigError(f"factor={factor!r} is not a finite number; give one such as 0.5.")
    if mode is None:
        mode = "set" if values is not None else "mask" if at == "scores" and factor == 0 else "scale"
    if mode not in ("mask", "scale", "set"):
        raise UnknownNameError(unknown_name("mode", mode, ["mask", "scale", "set"]))
    if (mode == "set") != (values is not None):
        given = "no values were given" if values is None else "values were given too"
        raise ConfigError(f"mode={mode!r}, and {given}: mode='set' puts values, and nothing else does.")
    if mode == "set":
        if factor != 0:
            raise ConfigError(f"factor={factor} would not be used: values take the place of what is there.")
        return {"intervention_type": VanillaIntervention, "source_representation": values}
    if mode == "mask":
        if at == "pattern":
            raise ConfigError(
                "mode='mask' is for scores: use at='scores', or on the pattern factor=0, with renormalize='rows' to"
                " the same effect."
            )
        if factor != 0:
            raise ConfigError(
                f"factor={factor} would not be used by mode='mask', which leaves no weight at all."
            )
        return {"intervention": KnockoutIntervention()}
    scaled: Intervention = ZeroIntervention() if factor == 0 else ScaleIntervention(factor)
    return {"intervention": scaled}
