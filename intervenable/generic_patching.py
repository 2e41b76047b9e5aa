"""`generic_activation_patch`: patch by a rule of the user's, one run for each row of a table.

The rules that TransformerLens itself has are here too; a table patched by one of those is a `sweep`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.binding import Places
from intervenable.cache import ActivationCache
from intervenable.collecting import collect
from intervenable.config import RepresentationConfig
from intervenable.errors import (
    ConfigError,
    EditError,
    InputError,
    MetricError,
    UnknownNameError,
    unknown_name,
)
from intervenable.inputs import read_inputs
from intervenable.metrics import Metric, MetricRun, as_metrics
from intervenable.model import IntervenableModel
from intervenable.progress import Progress
from intervenable.sites import BoundSite
from intervenable.sweep_axes import AXES, SPOKEN
from intervenable.transformer_lens_names import from_tl_name, get_act_name
from intervenable.transformer_lens_patching import patched
from intervenable.transformer_lens_rows import columns_of, make_df_from_ranges, whole_number
from intervenable.wave_readout import logits_of
from model_maps import ALIASES, COMPONENTS

Setter = Callable[[Tensor, Sequence[Any], Tensor], Tensor]
"""Makes a patched activation of the corrupted one, a row of indices, and the clean one."""


@dataclass(frozen=True)
class PatchSetter:
    """A rule that puts the clean values of one entry of each axis in.

    Example:
        >>> layer_pos_patch_setter(torch.zeros(1, 3, 2), (0, 1), torch.ones(1, 3, 2))[0].tolist()
        [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    """

    axes: tuple[str, ...]
    """What a row of indices says, the layer first."""

    whole: int
    """How many axes after the batch are taken whole before those that the row names."""

    def __call__(
        self, corrupted_activation: Tensor, index: Sequence[int], clean_activation: Tensor
    ) -> Tensor:
        """The corrupted activation with the clean values at this row's place; nothing is changed in place.

        Raises:
            ConfigError: the row has another number of entries.
        """
        if len(index) != len(self.axes):
            raise ConfigError(
                f"The row {tuple(index)} has {len(index)} entries. Give {', '.join(self.axes)}."
            )
        place = (slice(None),) * (1 + self.whole) + tuple(index[1:])
        changed = corrupted_activation.clone()
        changed[place] = clean_activation[place]
        return changed


layer_pos_patch_setter = PatchSetter(("layer", "pos"), 0)
layer_pos_head_vector_patch_setter = PatchSetter(("layer", "pos", "head"), 0)
layer_head_vector_patch_setter = PatchSetter(("layer", "head"), 1)
layer_head_pattern_patch_setter = PatchSetter(("layer", "head_index"), 0)
layer_head_pos_pattern_patch_setter = PatchSetter(("layer", "head_index", "dest_pos"), 0)
layer_head_dest_src_pos_pattern_patch_setter = PatchSetter(("layer", "head_index", "dest_pos", "src_pos"), 0)


def generic_activation_patch(
    model: nn.Module,
    corrupted_tokens: Any,
    clean_cache: Any,
    patching_metric: Any,
    patch_setter: Setter,
    activation_name: str,
    index_axis_names: Sequence[str] | None = None,
    index_df: Any = None,
    return_index_df: bool = False,
    **options: Any,
) -> Any:
    """Patch an activation by a rule, once for each row of indices, and measure what the model then answers.

    Args:
        model: A model with logits.
        corrupted_tokens: Inputs of the run that is patched: tokens, or a mapping of the model's inputs.
        clean_cache: Inputs of the clean run, or an `ActivationCache` with the activation.
        patching_metric: What is measured, as in `sweep`.
        patch_setter: Given copies of the corrupted activation, a row of indices and the clean activation, returns
            what the activation is to be. Heads come after positions: `[b, s, heads, dh]`; patterns are
            `[b, heads, queries, keys]`. One of ours, such as `layer_pos_patch_setter`, makes a fast sweep of it.
        activation_name: What is patched, by TransformerLens' name (`"resid_pre"`, `"z"`) or ours.
        index_axis_names: The axes of the indices, the first `"layer"`: all combinations are patched. Others are
            `"pos"`, `"head"` or `"head_index"`, and for patterns `"dest_pos"` and `"src_pos"`.
        index_df: Instead, a table with a row for each patch, the layer first; then the result has one axis, of rows.
        return_index_df: Whether to give the table too.
        **options: `progress`; for a rule of ours all options of `sweep`.

    Shape:
        result: a dimension for each axis, or `[rows]`; and the axes of the metric.

    Raises:
        ConfigError: not one of axes and table, or axes that do not fit.
        InputError: the clean run has another shape than the corrupted one.
        MetricError: a metric that gives no number; it names the row.
        EditError: the rule gives something else than an activation.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, model = load_small_lm()
        >>> clean = tokenizer("The capital of Spain is", return_tensors="pt")
        >>> corrupted = tokenizer("The capital of Italy is", return_tensors="pt")
        >>> def halfway(corrupted, index, clean):
        ...     corrupted[:, index[1]] = (corrupted[:, index[1]] + clean[:, index[1]]) / 2
        ...     return corrupted
        >>> index = make_df_from_ranges([2, 5], ["layer", "pos"])
        >>> generic_activation_patch(
        ...     model, corrupted, clean, lambda z: z[0, -1, 7], halfway, "resid_pre", index_df=index
        ... ).shape
        torch.Size([10])
    """
    if (index_axis_names is None) == (index_df is None):
        raise ConfigError(
            "Give index_axis_names, for all combinations, or index_df, for its rows: one of the two."
        )
    component = _component(activation_name)
    if isinstance(patch_setter, PatchSetter):
        axes = patch_setter.axes
        if index_axis_names is not None and _known(index_axis_names) != _known(axes):
            raise ConfigError(f"index_axis_names={tuple(index_axis_names)!r}, and this rule takes {axes!r}.")
        pair = (model, clean_cache, corrupted_tokens)
        return patched(pair, component, axes, patching_metric, index_df, return_index_df, options)
    show = options.pop("progress", None)
    if options:
        raise UnknownNameError(
            unknown_name("option", next(iter(options)), ["progress"], "for a patch_setter of your own")
        )
    runs = _Runs(model, corrupted_tokens, clean_cache, component, patch_setter, patching_metric)
    sizes: list[int] | None = None
    if index_df is None:
        assert index_axis_names is not None
        sizes = runs.sizes(index_axis_names)
        index_df = make_df_from_ranges(sizes, list(index_axis_names))
        index_df[index_axis_names[0]] = [runs.layers[number] for number in index_df[index_axis_names[0]]]
    rows = _rows(index_df)
    with Progress(len(rows), show, "patches") as bar:
        values = []
        for row in rows:
            values.append(runs.value(row))
            bar.advance()
    found = torch.stack(values) if values else torch.empty(0)
    found = found if sizes is None or not values else found.reshape(*sizes, *found.shape[1:])
    return (found, index_df) if return_index_df else found


def _component(activation: str) -> str:
    """What is patched, by our name."""
    known = ALIASES.get(activation, activation)
    if known in COMPONENTS:
        return known
    full = "." in str(activation) or str(activation).startswith("hook_")
    return from_tl_name(activation if full else get_act_name(activation, 0))[0]


def _known(axes: Sequence[str]) -> list[str]:
    return [SPOKEN.get(name, name) for name in axes]


def _rows(index_df: Any) -> list[tuple[Any, ...]]:
    """The rows as a rule is given them: whole numbers as such, anything else as it is.

    Raises:
        ConfigError: no table, or a layer that is no number.
    """
    columns = columns_of(index_df)
    rows = []
    for number, row in enumerate(index_df.itertuples(index=False, name=None)):
        first, *rest = row
        plain = [int(item) if isinstance(item, float) and item.is_integer() else item for item in rest]
        rows.append((whole_number(first, columns[0], number), *plain))
    return rows


class _Runs:
    """One run for each row: what stays the same between them."""

    def __init__(
        self, model: nn.Module, corrupted: Any, clean: Any, component: str, setter: Setter, metric: Any
    ) -> None:
        if isinstance(model, IntervenableModel):
            raise ConfigError(
                "A patch_setter of your own needs the plain model: give the one that the IntervenableModel wraps."
            )
        self.model, self.corrupted, self.clean_given = model, corrupted, clean
        self.component, self.setter = component, setter
        self.places = Places(model)
        self.inputs = read_inputs(corrupted, model, "corrupted")
        self.clean = (
            clean if isinstance(clean, ActivationCache) else collect(model, clean, component, device=None)
        )
        self.metrics = self._bound(metric)
        self.shapes: torch.Size | None = None

    def sizes(self, axes: Sequence[str]) -> list[int]:
        """How many entries each axis has.

        Raises:
            ConfigError: the layer is not the first, or an axis that the component does not have.
        """
        known = _known(axes)
        site = self._site(self.layers[0])
        tokens = self.inputs.of(site.stack).length
        counts = {
            "layer": len(self.layers),
            "pos": tokens,
            "query": tokens,
            "key": self.inputs.of(site.key_stack).length,
        }
        if site.heads is not None:
            counts["head"] = site.heads
        if known[:1] != ["layer"]:
            raise ConfigError(f"index_axis_names={tuple(axes)!r}: the first axis is the layer.")
        for name, axis in zip(axes, known, strict=True):
            if axis not in AXES:
                raise UnknownNameError(unknown_name("axis", name, [*AXES, *SPOKEN]))
            if axis not in counts:
                raise ConfigError(f"{self.component} has no axis {name!r}. It has: {', '.join(counts)}.")
        return [counts[axis] for axis in known]

    def value(self, row: tuple[Any, ...]) -> Tensor:
        """The metric with the patch of one row.

        Raises:
            MetricError: it is no number.
        """
        site = self._site(row[0])
        clean = _told(self.clean.require([(self.component, site.layer)])[self.component, site.layer], site)

        def put(activation: Tensor) -> Tensor:
            own = _told(activation, site)
            if clean.shape[1:] != own.shape[1:] or clean.shape[0] not in (1, own.shape[0]):
                raise InputError(
                    f"{site.label} is {tuple(clean.shape)} in the clean run and {tuple(own.shape)} in the corrupted"
                    " one. Give prompts of the same length, as many clean ones as corrupted ones or one."
                )
            there = clean.to(own).expand(own.shape).clone()
            new: Any = self.setter(own.clone(), list(row), there)
            if not isinstance(new, Tensor) or new.shape != own.shape:
                given = (
                    f"the shape {tuple(new.shape)}" if isinstance(new, Tensor) else f"a {type(new).__name__}"
                )
                raise EditError(
                    f"The patch_setter gave {given} for {site.label} in the row {row}. Return the whole activation,"
                    f" {tuple(own.shape)}."
                )
            return _told(new, site)

        unit = COMPONENTS[self.component].units[-1]
        entry = RepresentationConfig(site.layer, self.component, unit, intervention=put)
        with torch.no_grad():
            output = IntervenableModel(entry, self.model)(self.corrupted).intervened
            return self._measured(logits_of(output, self.model), row)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that have the component."""
        return self.places.layers_with(self.component)

    def _site(self, layer: int) -> BoundSite:
        return self.places.at(self.component, layer)

    def _bound(self, metric: Any) -> Mapping[str, Callable[[Tensor], Any]]:
        corrupted, clean = self.inputs.decoder or self.inputs, None
        if not isinstance(self.clean_given, ActivationCache):
            read = read_inputs(self.clean_given, self.model, "clean")
            clean = read.decoder or read
        run = MetricRun(corrupted, self._logits("clean"), self._logits("corrupted"), clean, corrupted)
        return {
            name: one.bound(run) if isinstance(one, Metric) else one
            for name, one in as_metrics(metric).items()
        }

    def _logits(self, name: str) -> Callable[[], Tensor]:
        given = self.clean_given if name == "clean" else self.corrupted

        def logits() -> Tensor:
            if isinstance(given, ActivationCache):
                raise MetricError(f"The metric reads the {name} run, which was not given as inputs.")
            with torch.no_grad():
                return logits_of(IntervenableModel([], self.model)(given).intervened, self.model)

        return logits

    def _measured(self, logits: Tensor, row: tuple[Any, ...]) -> Tensor:
        """`[*metric]`, or `[metrics, *metric]` of several."""
        values = []
        for name, metric in self.metrics.items():
            value = metric(logits)
            if not isinstance(value, (Tensor, int, float)):
                raise MetricError(
                    f"The metric {name!r} gave a {type(value).__name__} for {row}, not a number."
                )
            value = torch.as_tensor(value).detach().cpu()
            value = value if value.is_floating_point() else value.float()
            if bool(value.isnan().any()):
                raise MetricError(f"The metric {name!r} gave NaN for {row}.")
            if self.shapes is not None and value.shape != self.shapes:
                raise MetricError(
                    f"The metric {name!r} gave the shape {tuple(value.shape)} for {row}, and {tuple(self.shapes)}"
                    " before."
                )
            self.shapes = value.shape
            values.append(value)
        return values[0] if len(values) == 1 else torch.stack(values)


def _told(activation: Tensor, site: BoundSite) -> Tensor:
    """An activation with positions before heads, as TransformerLens has it; and back."""
    by_heads = site.heads is not None and not site.matrix
    return activation.transpose(1, 2) if by_heads and activation.dim() == 4 else activation
