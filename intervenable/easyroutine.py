"""From easyroutine's interventions to a configuration: one representation for each record, in order."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from intervenable import attention
from intervenable.config import IntervenableConfig, RepresentationConfig
from intervenable.easyroutine_keys import ActivationKey, key_value_head, parse_activation_key
from intervenable.easyroutine_records import BLOCKS, MATRIX_TYPES, PRE_SOFTMAX, EasyroutineIntervention
from intervenable.easyroutine_values import FromCache, Values
from intervenable.errors import ConfigError, IntervenableError, IntervenableWarning, raise_listed
from intervenable.position_entries import Span
from interventions import ScaleIntervention, VanillaIntervention, ZeroIntervention


def from_easyroutine(records: Any, model: nn.Module, inputs: Any = None) -> IntervenableConfig:
    """What easyroutine's interventions are here: a configuration with one representation for each, in order.

    Args:
        records: One or several: `EasyroutineIntervention`s, mappings of their fields, or easyroutine's own objects.
        model: The model that they are for; its layers and heads are checked.
        inputs: What the model will be run on, where a record asks for the `"mean"`, which takes a run.

    Raises:
        ConfigError: a record that makes no sense, or that the model has no place for; several are listed together.
        LayerRangeError, LocationRangeError: a layer or head that the model does not have.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, lm = load_small_lm()
        >>> config = from_easyroutine({"type": "full", "activation": "resid_out_2", "token_positions": ["last"]}, lm)
        >>> config.representations[0].component, config.representations[0].where
        ('block_output', ['last'])
    """
    values = Values(model, inputs)
    made: list[RepresentationConfig] = []
    faults: list[IntervenableError] = []
    for index, record in enumerate([records] if _is_one(records) else list(records)):
        try:
            made.append(_representation(_record_from(record), values))
        except IntervenableError as error:
            fault = type(error)(f"intervention {index}: {error}")
            fault.__cause__ = error
            faults.append(fault)
    raise_listed(faults, "the interventions")
    return IntervenableConfig(representations=made)


def _is_one(records: Any) -> bool:
    several = hasattr(records, "__iter__") and not isinstance(records, (str, Mapping))
    return isinstance(records, EasyroutineIntervention) or not several


def _record_from(record: Any) -> EasyroutineIntervention:
    if isinstance(record, EasyroutineIntervention):
        return record
    if isinstance(record, Mapping):
        return EasyroutineIntervention(**record)
    names = [name for name in EasyroutineIntervention.model_fields if hasattr(record, name)]
    if "activation" not in names:
        raise ConfigError(
            f"{record!r} is no intervention of easyroutine's: give EasyroutineIntervention(...), or a mapping of its"
            " fields."
        )
    return EasyroutineIntervention(**{name: getattr(record, name) for name in names})


def _representation(record: EasyroutineIntervention, values: Values) -> RepresentationConfig:
    key = parse_activation_key(record.activation, values.sizes)
    return _matrix(record, key, values) if key.unit == "h.query.key" else _vectors(record, key, values)


# --- attention matrices -----------------------------------------------------------------------------------


def _matrix(record: EasyroutineIntervention, key: ActivationKey, values: Values) -> RepresentationConfig:
    """The edit of a pattern or of the scores before it."""
    kind = record.type.removesuffix(PRE_SOFTMAX)
    how: dict[str, Any] = {"at": "pattern" if kind == record.type else "scores"}
    if record.apply_softmax:
        warnings.warn(
            f"apply_softmax on {record.activation!r} is taken for renormalize='rows': another softmax would give"
            " weight to what is masked. Leave it out, and say renormalize='rows' in the representation.",
            IntervenableWarning,
            stacklevel=4,
        )
        how["renormalize"] = "rows"
    levels = _levels(record, kind)
    given, function = record.patching_values, None
    if given is None or given == "ablation":
        how["factor"] = record.multiplication_value
    elif isinstance(given, (Tensor, FromCache)):
        if kind == "keep_self_attn":
            raise ConfigError(
                "keep_self_attn takes no tensor: the columns that it edits are others in each row."
            )
        how["values"] = values.matrices(given, key)
    elif given == "zero":
        how |= {"mode": "scale", "factor": 0.0}
    elif given == "mean":
        raise ConfigError(
            f"patching_values='mean' is for vectors, and {record.activation!r} is a matrix: give a tensor, or a"
            " function of the chosen entries."
        )
    else:
        how |= {"mode": "scale", "factor": 1.0}  # a place for the function
        function = given
    entry = _edit(kind, key, levels, how)
    if function is None:
        return entry
    named = {name: getattr(entry, name) for name in ("layer", "component", "unit", "where", "renormalize")}
    return RepresentationConfig(**named, intervention=_OfOneHead(function))


def _edit(kind: str, key: ActivationKey, levels: Mapping[str, Any], how: Any) -> RepresentationConfig:
    """The constructor that a type of edit stands for."""
    layer, head = cast(int, key.layer), cast(int, key.head)
    match kind:
        case "full":
            made = attention.full(layer, head, **how)
        case "columns":
            made = attention.columns(layer, head, levels["keys"], **how)
        case "rows":
            made = attention.rows(layer, head, levels["queries"], **how)
        case "keep_self_attn":
            made = attention.keep_self(layer, head, levels["queries"], **how)
        case _:
            made = attention.grid(layer, head, levels["queries"], levels["keys"], **how)
    return cast(RepresentationConfig, made)


def _levels(record: EasyroutineIntervention, kind: str) -> Mapping[str, list[Any]]:
    """The rows and columns that a record chooses, as far as it does not mean all of them."""
    levels, positions = MATRIX_TYPES[kind], record.token_positions
    if kind in BLOCKS or kind == "full":
        if positions not in ((), [], None, "all", ["all"]):
            warnings.warn(
                f"token_positions={positions!r} has no effect on {record.type!r}, which says itself what it edits."
                " Leave them out.",
                IntervenableWarning,
                stacklevel=5,
            )
        return {level: [name] for level, name in BLOCKS.get(kind, {}).items()}
    if kind == "grid":
        return {level: entries_of(side) for level, side in zip(levels, positions, strict=True)}
    return {levels[0]: entries_of(positions)}


# --- vectors ----------------------------------------------------------------------------------------------


def _vectors(record: EasyroutineIntervention, key: ActivationKey, values: Values) -> RepresentationConfig:
    """The edit of some positions of a stream, a projection or a head."""
    where: Any = entries_of(record.token_positions)
    head = key.head
    if head is not None:
        _check_shared(record, key, values)
        where = {"heads": key.component_head(values.sizes), "positions": where}
    given = record.patching_values
    fields: dict[str, Any]
    if given is None or given == "ablation":
        factor = record.multiplication_value
        fields = {"intervention": ZeroIntervention() if factor == 0 else ScaleIntervention(factor)}
    elif given == "zero":
        fields = {"intervention": ZeroIntervention()}
    elif given == "mean":
        fields = _constant(values.mean(key), key)
    elif isinstance(given, (Tensor, FromCache)):
        fields = _constant(values.vectors(given), key)
    else:
        fields = {"intervention": given if head is None else _OfOneHead(given)}
    return RepresentationConfig(key.layer, key.component, key.unit, where=where, **fields)


def _constant(values: Tensor, key: ActivationKey) -> dict[str, Any]:
    # Of one head easyroutine has [b, n, dh], and here heads have an axis of their own.
    by_heads = key.head is not None and values.dim() == 3
    return {
        "intervention_type": VanillaIntervention,
        "source_representation": values[:, None] if by_heads else values,
    }


def _check_shared(record: EasyroutineIntervention, key: ActivationKey, values: Values) -> None:
    """That an edit of what several query heads share was asked for."""
    sizes = values.sizes
    if not key.kind.shared or record.kv == "shared":
        return
    shared = key.component_head(sizes)
    readers = [head for head in range(sizes.query_heads or 0) if key_value_head(head, sizes) == shared]
    if len(readers) > 1:
        expanded = "expanded_head_value" if key.component == "head_value_output" else "expanded_head_key"
        raise ConfigError(
            f"{record.activation!r} is key-value head {shared}, which query heads {readers[0]} to {readers[-1]}"
            f" share: all of them would be edited. Say kv='shared' if that is meant; what head {key.head} alone reads"
            f" is RepresentationConfig({key.layer}, {expanded!r}, 'h.pos')."
        )


class _OfOneHead:
    """A function of what one head has, given to it without the axis of heads, as easyroutine does."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, base: Tensor) -> Tensor | None:
        result = self.function(base.squeeze(1))
        return result[:, None] if isinstance(result, Tensor) else result


# --- positions --------------------------------------------------------------------------------------------


def entries_of(positions: Any) -> list[Any]:
    """What `token_positions` chooses, as entries of `where`: a pair of numbers is the half-open range between them.

    Raises:
        ConfigError: nothing is chosen, or a tuple that is no range.
    """
    listed = list(positions) if isinstance(positions, (list, tuple, range)) else [positions]
    if not listed:
        raise ConfigError("token_positions name no position. Give at least one, or 'all'.")
    return [_entry_of(item) for item in listed]


def _entry_of(item: Any) -> Any:
    if not isinstance(item, tuple):
        return item
    if len(item) == 2 and all(isinstance(number, int) for number in item):
        return Span(*item)
    raise ConfigError(
        f"{item!r} among token_positions is no range: a pair of numbers is the half-open range between them. Write"
        " single positions as numbers."
    )
