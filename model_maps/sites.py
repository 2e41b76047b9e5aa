"""Where one component is, and where the heads lie in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal, get_args

from model_maps.bands import Bands

Side = Literal["input", "output"]
Part = Literal["query", "key", "value"]
Layout = Literal["concatenated", "grouped"]
FunctionName = Literal["linear", "einsum", "softmax", "top"]
"""Functions of torch's whose result a site can be: a product with a weight, a softmax, the largest entries."""

Width = Literal["hidden", "query", "key_value", "mlp", "vocabulary", "experts", "embedding", "any"]


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionHeads:
    """The heads of what one attention module computes, where they are not those of the stack's config."""

    query: int
    """Query heads: rows of matrices that its pattern has."""

    key_value: int
    """Key-value heads."""

    width: int | None = None
    """Columns of a query or key of one head; None if not known."""

    bands: Bands | None = None
    """How its softmax lies, if not as a matrix of queries by keys."""


@dataclasses.dataclass(frozen=True, slots=True)
class HeadColumns:
    """Where the heads lie in the last axis of a tensor.

    Head `i` has the `width` columns from
    `start + (i // per_group) * group_stride + (i % per_group) * stride` on.
    """

    heads: int
    """How many heads there are."""

    width: int
    """Columns of one head."""

    start: int = 0
    """First column of head 0."""

    stride: int = 0
    """Columns from one head to the next of its group; 0 means `width`."""

    per_group: int = 1
    """Heads in one group."""

    group_stride: int = 0
    """Columns from one group to the next; 0 means `per_group` heads side by side."""

    def first_column(self, head: int) -> int:
        """The first column of one head."""
        stride = self.stride or self.width
        group_stride = self.group_stride or self.per_group * stride
        return self.start + head // self.per_group * group_stride + head % self.per_group * stride

    @property
    def contiguous(self) -> bool:
        """Whether all heads lie side by side in order, so that one slice holds them all."""
        stride = self.stride or self.width
        in_groups = min(self.heads, self.per_group) < 2 or stride == self.width
        group_stride = self.group_stride or self.per_group * stride
        return in_groups and (self.heads <= self.per_group or group_stride == self.per_group * self.width)


@dataclasses.dataclass(frozen=True, slots=True)
class Site:
    """The place of one component: a side of a module, and how to read what is there."""

    path: str
    """Module path, from the block for components of a block, from the model for the others; "" is itself."""

    side: Side = "output"
    """Whether the tensor goes into the module or comes out of it."""

    slot: str | int | None = None
    """Keyword or index of the tensor among the inputs or outputs. None is the usual place: the first positional
    input, else `hidden_states`, else what is given by keyword first; the output itself, else its first item."""

    width: Width = "hidden"
    """Which size the component's last axis has."""

    heads: Literal["query", "key_value"] | None = None
    """Which heads lie side by side in the last axis, if any do."""

    part: Part | None = None
    """Which part of a fused query-key-value projection this is."""

    layout: Layout = "concatenated"
    """How a fused projection lies: all queries, all keys, all values; or for each key-value head its queries,
    its key, its value."""

    columns: HeadColumns | None = None
    """Explicit columns, which win over `heads`, `part` and `layout`."""

    flat: bool = False
    """Whether batch and positions are one axis here: `[b*s, ...]`; with `axes=(1, 0)` `[s*b, ...]`."""

    plus: str | None = None
    """A component of the same block to be added to read this one; a write then goes to this site alone, as
    the change. (`block_mid` is the attention's contribution plus the block's input.)"""

    read_only: str = ""
    """Why a value written here would not reach the rest of the model, if it would not."""

    scale: float = 1.0
    """What the model multiplies the tensor here with to get the component (a scaled contribution)."""

    axes: tuple[int, int] | None = None
    """Which axes of the tensor count examples and positions, where those are not the first two (nor `flat`)."""

    attention: AttentionHeads | None = None
    """Of an attention module's input: the heads of what is computed inside, if they differ from the sizes."""

    function: FunctionName | None = None
    """The function whose result it is, called inside the module; None: the module takes it or hands it over. Then
    `slot` is the item of a result of several, and `side` says nothing unless there is a `weight`."""

    nth: int = 0
    """Which of that function's calls inside the module, those in its children included, counted from 0."""

    weight: str | None = None
    """The parameter that the function multiplies with, by its name in the module. Then `nth` counts its products with
    that parameter alone, and `side` says whether the site is what is multiplied or the product."""

    call: int | None = None
    """Which of the module's calls since its block was entered, counted from 0; None: the block calls it once."""

    def __post_init__(self) -> None:
        path: object = self.path
        if not isinstance(path, str):
            raise ValueError(
                f"path of a Site is {path!r}; it must be a module path, or '' for the module itself."
            )
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} of the Site at {self.path!r} is {value!r}.\nAllowed: {', '.join(map(repr, allowed))}."
                )


_CHOICES: Mapping[str, tuple[object, ...]] = {
    "side": get_args(Side),
    "width": get_args(Width),
    "heads": ("query", "key_value", None),
    "part": (*get_args(Part), None),
    "layout": get_args(Layout),
    "function": (*get_args(FunctionName), None),
}
"""What fields of a site may say."""
