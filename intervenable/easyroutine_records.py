"""Interventions as easyroutine declares them: the record, checked when it is made.

A record says of one activation which tokens of it are edited and how; `from_easyroutine` makes configurations of
them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, field_validator
from torch import Tensor

from intervenable.config_base import Declared
from intervenable.easyroutine_keys import ActivationKey, parse_activation_key
from intervenable.easyroutine_values import FromCache
from intervenable.errors import ConfigError, UnknownNameError, unknown_name

MATRIX_TYPES: Mapping[str, tuple[str, ...]] = {
    "columns": ("keys",),
    "rows": ("queries",),
    "grid": ("queries", "keys"),
    "full": (),
    "block_img_txt": (),
    "block_img_img": (),
    "keep_self_attn": ("queries",),
}
"""Types of edits of attention matrices, and the levels that `token_positions` chooses; `_pre_softmax` may follow."""

BLOCKS: Mapping[str, Mapping[str, str]] = {
    "block_img_txt": {"queries": "all-text", "keys": "all-image"},
    "block_img_img": {"queries": "all-image", "keys": "all-image"},
}
"""Types that choose by kinds of tokens."""

PRE_SOFTMAX = "_pre_softmax"
TYPES = (*MATRIX_TYPES, *(f"{name}{PRE_SOFTMAX}" for name in MATRIX_TYPES))


class EasyroutineIntervention(Declared):
    """One intervention with the fields that easyroutine gives it.

    Example:
        >>> record = EasyroutineIntervention("columns", "pattern_L1H2", [3, "last"], multiplication_value=0.5)
        >>> record.type, record["activation"]
        ('columns', 'pattern_L1H2')

    Raises:
        ConfigError: with every fault found.
    """

    model_config = ConfigDict(frozen=True)

    type: str
    """What is edited: `full` for vectors; for attention matrices `columns`, `rows`, `grid`, `full`, `block_img_txt`,
    `block_img_img` or `keep_self_attn`, after the softmax or, with `_pre_softmax` behind the name, before it."""

    activation: str
    """Key of the activation, such as `pattern_L3H8` or `resid_out_4`; heads are query heads."""

    token_positions: Any = ()
    """Numbers and names of positions; for `grid` a pair of lists, rows and columns. A pair of numbers within a list
    is the half-open range between them."""

    patching_values: Any = None
    """None or `"ablation"`: multiply by `multiplication_value`. `"zero"`; `"mean"`, the mean over the positions of
    the unedited activation, for each example; a tensor; a function of the chosen entries; `FromCache`."""

    multiplication_value: float = 0.0
    """What an ablation multiplies by."""

    apply_softmax: bool = False
    """On patterns: divide the edited rows by their sum (easyroutine takes a softmax, which gives weight to what is
    masked)."""

    kv: Literal["shared"] | None = None
    """`"shared"`: to edit a key or value that several query heads share is meant."""

    POSITIONAL: ClassVar[tuple[str, ...]] = (
        "type",
        "activation",
        "token_positions",
        "patching_values",
        "multiplication_value",
        "apply_softmax",
        "kv",
    )

    @field_validator("type", mode="before")
    @classmethod
    def _type_from(cls, value: object) -> str:
        """The type by its one spelling: hyphens, and the `colums` under which easyroutine registers one, will do."""
        name = str(value).replace("-", "_").replace("colums", "columns")
        if name not in TYPES:
            raise UnknownNameError(unknown_name("type of intervention", value, TYPES))
        return name

    @field_validator("activation", mode="before")
    @classmethod
    def _activation_from(cls, value: Any) -> str:
        return str(parse_activation_key(value))

    @field_validator("patching_values", mode="before")
    @classmethod
    def _values_from(cls, value: Any) -> Any:
        names = ("ablation", "zero", "mean")
        if isinstance(value, str) and value not in names:
            raise UnknownNameError(unknown_name("patching_values", value, names))
        if not (value is None or isinstance(value, (str, Tensor, FromCache)) or callable(value)):
            raise ConfigError(
                f"patching_values is a {type(value).__name__}; give None, {', '.join(map(repr, names))}, a tensor, a"
                " function of the activation, or FromCache(cache, key, positions)."
            )
        return value

    @field_validator("multiplication_value", mode="before")
    @classmethod
    def _factor_from(cls, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ConfigError(f"multiplication_value={value!r} is not a finite number; give one such as 0.5.")
        return float(value)

    @classmethod
    def _faults_between(cls, fields: Mapping[str, Any]) -> Iterable[ConfigError]:
        if "type" not in fields or "activation" not in fields:
            return
        try:
            kind = cls._type_from(fields["type"])
            key = parse_activation_key(fields["activation"])
        except ConfigError:
            return  # told already
        matrix = key.component == "attention_pattern"
        if not matrix and kind != "full":
            yield ConfigError(
                f"type {kind!r} is for attention matrices (pattern_L..H..); vectors such as {str(key)!r} take 'full'."
            )
        if fields.get("apply_softmax") and (not matrix or kind.endswith(PRE_SOFTMAX)):
            why = (
                "the softmax that follows takes care of them"
                if matrix
                else "there are no rows to renormalise"
            )
            yield ConfigError(
                f"apply_softmax makes no sense for {kind!r} of {str(key)!r}: {why}. Leave it out."
            )
        if key.kind.read_only:
            reason = key.kind.read_only.format(layer=key.layer, head=key.head)
            yield ConfigError(f"{str(key)!r} cannot be written: {reason}.")
        pair = (
            isinstance(fields.get("token_positions"), (list, tuple)) and len(fields["token_positions"]) == 2
        )
        if kind.removesuffix(PRE_SOFTMAX) == "grid" and not (
            pair and all(isinstance(side, (list, tuple)) for side in fields["token_positions"])
        ):
            yield ConfigError(
                f"token_positions of a grid are {fields.get('token_positions')!r}; give a pair of lists, the rows and"
                " the columns: ([2, 'last'], [0])."
            )

    def __getitem__(self, field: str) -> Any:
        if field not in type(self).model_fields:
            raise UnknownNameError(unknown_name("field", field, type(self).model_fields))
        return getattr(self, field)

    @property
    def key(self) -> ActivationKey:
        """The activation's key, taken apart."""
        return parse_activation_key(self.activation)
