"""The patching functions of TransformerLens by their names: a thin table over `sweep`.

`get_act_patch_resid_pre(model, corrupted_tokens, clean_cache, metric)` and its relatives take what they take there
and give tensors of the same shapes; the options of `sweep` go beside. `clean_cache` may be an `ActivationCache` of
ours or the inputs of the clean run. Heads of keys and values are key-value heads.

    >>> from intervenable import load_small_lm, metrics
    >>> tokenizer, model = load_small_lm()
    >>> clean = tokenizer("The capital of Spain is", return_tensors="pt")
    >>> corrupted = tokenizer("The capital of Italy is", return_tensors="pt")
    >>> metric = metrics.logit_difference(tokenizer, " Madrid", " Rome")
    >>> get_act_patch_resid_pre(model, corrupted, clean, metric).shape
    torch.Size([6, 5])
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn

from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from intervenable.sweep_axes import read_axes
from intervenable.sweeping import sweep
from intervenable.transformer_lens_names import from_tl_name, get_act_name
from intervenable.transformer_lens_rows import Row, boxes, read_rows, table_of

if TYPE_CHECKING:
    import pandas as pd

_OPTIONS: Mapping[str, str] = {
    "layers": "layer",
    "positions": "pos",
    "heads": "head",
    "queries": "query",
    "keys": "key",
}
"""Which argument of `sweep` names the entries of an axis."""
_GIVEN = ("model", "clean", "corrupted", "component", "axes", "metric")


@dataclass(frozen=True)
class NamedSweep:
    """One row of the table: a function of TransformerLens, and the sweep it is."""

    name: str
    """The function's name."""

    activation: str
    """TransformerLens' short name of what is patched."""

    axes: tuple[str, ...]
    """Its axes by TransformerLens' names, in the order of the result."""

    meaning: str
    """What is patched, in words."""

    @property
    def component(self) -> str:
        """Our name of what is patched."""
        return from_tl_name(get_act_name(self.activation, 0))[0]

    @property
    def docstring(self) -> str:
        """What the function says of itself."""
        along = ", ".join(self.axes)
        return f"""Patch {self.meaning}, and measure what the model then answers.

    `sweep` of `{self.component}` over {along}, by TransformerLens' name for it.

    Args:
        model: A model with logits.
        corrupted_tokens: Inputs of the run that is patched: tokens, or a mapping of the model's inputs.
        clean_cache: Inputs of the clean run, or an `ActivationCache` with `{self.component}` of every layer.
        patching_metric: What is measured: one of `iv.metrics` or any callable on the logits `[b, s, V]`.
        index_df: A table with a row for each patch and the columns {along}; then the result has one axis, of rows.
        return_index_df: Whether to give the table of patches too.
        index_axis_names: None, or {self.axes!r}.
        **options: Further arguments of `sweep`: `layers`, `memory`, `progress`, `checkpoint` and so on.

    Shape:
        result: `[{along}]`, and the axes of the metric.
    """


_RESIDUAL, _BY_POS = ("layer", "pos"), ("layer", "pos", "head")
_ALL_POS, _PATTERN = ("layer", "head"), ("layer", "head_index")

NAMED_SWEEPS: Mapping[str, NamedSweep] = {
    row.name: row
    for row in (
        NamedSweep(
            "get_act_patch_resid_pre", "resid_pre", _RESIDUAL, "the stream entering each block at each token"
        ),
        NamedSweep(
            "get_act_patch_resid_mid", "resid_mid", _RESIDUAL, "the stream after attention at each token"
        ),
        NamedSweep(
            "get_act_patch_attn_out", "attn_out", _RESIDUAL, "what attention adds to the stream at each token"
        ),
        NamedSweep(
            "get_act_patch_mlp_out", "mlp_out", _RESIDUAL, "what each MLP adds to the stream at each token"
        ),
        NamedSweep(
            "get_act_patch_attn_head_out_by_pos", "z", _BY_POS, "the output of each head at each token"
        ),
        NamedSweep("get_act_patch_attn_head_q_by_pos", "q", _BY_POS, "the query of each head at each token"),
        NamedSweep("get_act_patch_attn_head_k_by_pos", "k", _BY_POS, "the key of each head at each token"),
        NamedSweep("get_act_patch_attn_head_v_by_pos", "v", _BY_POS, "the value of each head at each token"),
        NamedSweep(
            "get_act_patch_attn_head_pattern_by_pos",
            "pattern",
            (*_PATTERN, "dest_pos"),
            "what each head reads at each token",
        ),
        NamedSweep(
            "get_act_patch_attn_head_pattern_dest_src_pos",
            "pattern",
            (*_PATTERN, "dest_pos", "src_pos"),
            "how much each head reads at each token of each other",
        ),
        NamedSweep("get_act_patch_attn_head_out_all_pos", "z", _ALL_POS, "the output of each head"),
        NamedSweep("get_act_patch_attn_head_q_all_pos", "q", _ALL_POS, "the queries of each head"),
        NamedSweep("get_act_patch_attn_head_k_all_pos", "k", _ALL_POS, "the keys of each head"),
        NamedSweep("get_act_patch_attn_head_v_all_pos", "v", _ALL_POS, "the values of each head"),
        NamedSweep(
            "get_act_patch_attn_head_pattern_all_pos", "pattern", _PATTERN, "the pattern of each head"
        ),
    )
}
"""Every patching function of TransformerLens that is one sweep, by its name."""


class PatchingFunction(Protocol):
    """A function of the table."""

    __name__: str

    @overload
    def __call__(
        self,
        model: nn.Module,
        corrupted_tokens: Any,
        clean_cache: Any,
        patching_metric: Any,
        index_df: Any = None,
        return_index_df: Literal[False] = False,
        **options: Any,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        model: nn.Module,
        corrupted_tokens: Any,
        clean_cache: Any,
        patching_metric: Any,
        index_df: Any = None,
        *,
        return_index_df: Literal[True],
        **options: Any,
    ) -> tuple[Tensor, pd.DataFrame]: ...


def _function(name: str) -> PatchingFunction:
    """The function of one row."""
    row = NAMED_SWEEPS[name]

    def patch(
        model: nn.Module,
        corrupted_tokens: Any,
        clean_cache: Any,
        patching_metric: Any,
        index_df: Any = None,
        return_index_df: bool = False,
        *,
        index_axis_names: Sequence[str] | None = None,
        **options: Any,
    ) -> Any:
        if index_axis_names is not None and read_axes(index_axis_names) != read_axes(row.axes):
            raise ConfigError(
                f"{name} has the axes {', '.join(row.axes)}. Leave index_axis_names={index_axis_names!r} out, or call"
                " sweep, which has any."
            )
        pair = (model, clean_cache, corrupted_tokens)
        return patched(pair, row.component, row.axes, patching_metric, index_df, return_index_df, options)

    patch.__name__ = patch.__qualname__ = name
    patch.__doc__ = row.docstring
    return patch


get_act_patch_resid_pre = _function("get_act_patch_resid_pre")
get_act_patch_resid_mid = _function("get_act_patch_resid_mid")
get_act_patch_attn_out = _function("get_act_patch_attn_out")
get_act_patch_mlp_out = _function("get_act_patch_mlp_out")
get_act_patch_attn_head_out_by_pos = _function("get_act_patch_attn_head_out_by_pos")
get_act_patch_attn_head_q_by_pos = _function("get_act_patch_attn_head_q_by_pos")
get_act_patch_attn_head_k_by_pos = _function("get_act_patch_attn_head_k_by_pos")
get_act_patch_attn_head_v_by_pos = _function("get_act_patch_attn_head_v_by_pos")
get_act_patch_attn_head_pattern_by_pos = _function("get_act_patch_attn_head_pattern_by_pos")
get_act_patch_attn_head_pattern_dest_src_pos = _function("get_act_patch_attn_head_pattern_dest_src_pos")
get_act_patch_attn_head_out_all_pos = _function("get_act_patch_attn_head_out_all_pos")
get_act_patch_attn_head_q_all_pos = _function("get_act_patch_attn_head_q_all_pos")
get_act_patch_attn_head_k_all_pos = _function("get_act_patch_attn_head_k_all_pos")
get_act_patch_attn_head_v_all_pos = _function("get_act_patch_attn_head_v_all_pos")
get_act_patch_attn_head_pattern_all_pos = _function("get_act_patch_attn_head_pattern_all_pos")


# --- one sweep, or the rows of a table --------------------------------------------------------------------


def patched(
    pair: tuple[nn.Module, Any, Any],
    component: str,
    axes: Sequence[str],
    metric: Any,
    index_df: Any,
    return_index_df: bool,
    options: Mapping[str, Any],
) -> Any:
    """A sweep over axes, or over the rows of a table alone.

    Args:
        pair: The model, the clean run and the corrupted one.
        component: What is patched.
        axes: The axes, by their names in the table.
        metric: What is measured.
        index_df: A row for each patch; None for all combinations.
        return_index_df: Whether to give the table too.
        options: Further arguments of `sweep`.
    """
    check_options(options)
    model, clean, corrupted = pair
    along = read_axes(axes)
    if index_df is None:
        result = sweep(model, clean, corrupted, component, along, metric, **options)
        if not return_index_df:
            return result.values
        return result.values, table_of(product(*(result.entries[axis] for axis in along)), axes)
    taken = [option for option, axis in _OPTIONS.items() if axis in along and options.get(option) is not None]
    if taken:
        raise ConfigError(f"index_df says which entries are patched: leave out {', '.join(taken)}.")
    rows = read_rows(index_df, along)
    found: dict[Row, Tensor] = {}
    grids = boxes(rows)
    for number, box in enumerate(grids):
        entries: dict[str, Any] = {
            option: list(box[along.index(axis)]) for option, axis in _OPTIONS.items() if axis in along
        }
        more = options if len(grids) == 1 else inside(options, str(number))
        values = sweep(model, clean, corrupted, component, along, metric, **entries, **more).values
        for index in product(*(range(len(entries)) for entries in box)):
            found[tuple(entries[i] for entries, i in zip(box, index, strict=True))] = values[index]
    values = torch.stack([found[row] for row in rows]) if rows else torch.empty(0)
    return (values, index_df) if return_index_df else values


def inside(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The options for one of several sweeps: each keeps what is finished in a folder of its own."""
    folder = options.get("checkpoint")
    return {**options, **({} if folder is None else {"checkpoint": Path(folder) / name})}


_INSTEAD: Mapping[str, str] = {
    "reduce": " A metric may give a number for each example, and the result has them last.",
    "baseline": " `sweep` gives the metric of the unpatched runs too.",
    "verbose": " The bar is switched by progress=False.",
}


def check_options(options: Mapping[str, Any]) -> None:
    """That all options are those of `sweep`.

    Raises:
        UnknownNameError: one is not.
    """
    known = [name for name in inspect.signature(sweep).parameters if name not in _GIVEN]
    for name in options:
        if name not in known:
            raise UnknownNameError(unknown_name("option", name, known) + _INSTEAD.get(name, ""))
