"""What a patching sweep gives: a value for each cell, with named axes and the two unpatched runs beside it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from intervenable.errors import ConfigError, IntervenableWarning, MetricError, UnknownNameError, unknown_name
from intervenable.sweep_files import SWEEP, read_sweep, write_sweep
from intervenable.sweep_selection import chosen, index_of
from intervenable.sweep_tables import SweepCell, cells_of, item_names, table_of

if TYPE_CHECKING:
    import pandas as pd

    from intervenable.plots import Picture

HEAD = "head"
"""The axis that may be shorter for one component than for another: there are fewer key-value heads."""


@dataclass(frozen=True, eq=False)
class SweepResult:
    """The value of each metric for each cell of a sweep, and on the two runs without a patch.

    Nothing changes a result: `select`, `normalized` and `mean` give new ones.

    Example:
        >>> result = SweepResult(
        ...     axes=("layer", "pos"),
        ...     labels={"layer": ("0", "1"), "pos": ("In", " Spain")},
        ...     entries={"layer": (0, 1), "pos": (0, 1)},
        ...     results={("block_input", "difference"): torch.tensor([[1.0, 3.0], [1.0, 2.0]])},
        ...     clean={"difference": torch.tensor(3.0)},
        ...     corrupted={"difference": torch.tensor(1.0)},
        ... )
        >>> result.select(pos=" Spain").normalized().values
        tensor([1.0000, 0.5000])
    """

    axes: tuple[str, ...]
    """Axes of the cells, in order: `("layer", "pos")`."""

    labels: Mapping[str, tuple[str, ...]]
    """For each axis a name of each entry: a layer, the text of a token, `"3-5"` for a window."""

    entries: Mapping[str, tuple[Any, ...]]
    """For each axis what each entry stands for: an int, a tuple of ints for a window, a label for words."""

    results: Mapping[tuple[str, str], Tensor]
    """By component and metric `[*axes, *metric]`: the metric's value, whatever its shape, for each cell.

    A component with fewer heads than another has a shorter axis of heads.
    """

    clean: Mapping[str, Tensor] = field(default_factory=dict)
    """By metric `[*metric]`: its value on the clean run without a patch; empty if there was no such run."""

    corrupted: Mapping[str, Tensor] = field(default_factory=dict)
    """The same of the corrupted run."""

    shortcuts: tuple[str, ...] = ()
    """What could be left out of the computation, and what had to be done the long way."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else is known of the sweep, as JSON has it: direction, value, model class."""

    def __post_init__(self) -> None:
        for name in ("labels", "entries", "results", "clean", "corrupted", "settings"):
            object.__setattr__(self, name, dict(getattr(self, name)))
        for axis in self.axes:
            named, meant = len(self.labels.get(axis, ())), len(self.entries.get(axis, ()))
            if named != meant or axis not in self.entries:
                raise ConfigError(f"The axis {axis!r} has {meant} entries and {named} labels.")
        if not self.results:
            raise ConfigError("A sweep result needs at least one component and metric.")
        for (component, metric), values in self.results.items():
            self._check_shape(component, metric, values)

    def _check_shape(self, component: str, metric: str, values: Tensor) -> None:
        given = tuple(values.shape[: len(self.axes)])
        wanted = tuple(len(self.entries[axis]) for axis in self.axes)
        fits = len(given) == len(wanted) and all(
            have == want or (axis == HEAD and have < want)
            for axis, have, want in zip(self.axes, given, wanted, strict=True)
        )
        shape = tuple(values.shape[len(self.axes) :])
        known = [run[metric] for run in (self.clean, self.corrupted) if metric in run]
        if not fits:
            raise ConfigError(
                f"The values of {metric!r} for {component} have the shape {tuple(values.shape)}, which does not begin"
                f" with the sizes {wanted} of the axes {self.axes}."
            )
        if any(tuple(baseline.shape) != shape for baseline in known):
            raise ConfigError(
                f"{metric!r} has the shape {shape} for each cell of {component}, and another on an unpatched run:"
                f" {', '.join(str(tuple(baseline.shape)) for baseline in known)}."
            )

    # -- looking

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the patched components, in order."""
        return tuple(dict.fromkeys(component for component, _ in self.results))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in order."""
        return tuple(dict.fromkeys(metric for _, metric in self.results))

    @property
    def all_axes(self) -> tuple[str, ...]:
        """Names of the axes of `values`.

        `component` and `metric` are among them where there are several; the axes of what a metric gives for each cell
        come last, as `item`, or `item_0`, `item_1` and so on.
        """
        return (
            *(("component",) if len(self.components) > 1 else ()),
            *self.axes,
            *(("metric",) if len(self.metrics) > 1 else ()),
            *item_names(len(self._shape())),
        )

    @property
    def values(self) -> Tensor:
        """All values in one tensor with the axes `all_axes`; NaN for heads that a component does not have.

        Raises:
            MetricError: the metrics have different shapes.
        """
        self._shape()
        by_component = [
            _stacked([self._padded(component, metric) for metric in self.metrics], len(self.axes))
            for component in self.components
        ]
        return _stacked(by_component, 0)

    @property
    def baseline_clean(self) -> Tensor:
        """`[*metric]` the metric on the clean run without a patch; `[metrics, *metric]` if there are several.

        Raises:
            MetricError: it is not known, or the metrics have different shapes.
        """
        return self._baseline("clean")

    @property
    def baseline_corrupted(self) -> Tensor:
        """`[*metric]` the metric on the corrupted run without a patch; `[metrics, *metric]` if there are several.

        Raises:
            MetricError: it is not known, or the metrics have different shapes.
        """
        return self._baseline("corrupted")

    def __repr__(self) -> str:
        sizes = " x ".join(f"{axis} {len(self.entries[axis])}" for axis in self.axes) or "one cell"
        lines = [f"SweepResult of {', '.join(self.components)}: {sizes}"]
        for metric in self.metrics:
            runs = [
                f"{name} {run[metric].double().mean().item():.4g}"
                for name, run in (("clean", self.clean), ("corrupted", self.corrupted))
                if metric in run
            ]
            shape = "" if not self._shape_of(metric) else f", means over {tuple(self._shape_of(metric))}"
            lines.append(f"  {metric}{shape}: {', '.join(runs) or 'no unpatched run'}")
            lines += [f"    {cell}" for cell in self.top(3, metric=metric)]
        lines += [f"  {sentence}" for sentence in self.shortcuts]
        return "\n".join(lines)

    def top(self, k: int = 10, *, metric: str | None = None) -> tuple[SweepCell, ...]:
        """The `k` cells that changed the metric most, up or down, against the run that was patched.

        That is the clean run if `settings["direction"]` is `"noise"`, and else the corrupted one; where its value is
        not known the cells of the largest values. Of a metric that gives several numbers for each cell their mean is
        compared.

        Raises:
            UnknownNameError: there is no such metric.
            MetricError: there are several metrics, and none is named.
        """
        if metric is None and len(self.metrics) > 1:
            raise MetricError(f"There are several metrics. Name one: metric={self.metrics[0]!r}.")
        one = self.select(metric=metric or self.metrics[0]).mean()
        (name,) = one.metrics
        run = one.clean if self.settings.get("direction") == "noise" else one.corrupted
        before = run[name].item() if name in run else None
        cells = cells_of(one.axes, one.entries, one.labels, one.results, before)
        return tuple(sorted(cells, key=lambda cell: -cell.effect)[:k])

    # -- making others

    def select(
        self,
        *,
        component: str | Sequence[str] | None = None,
        metric: str | Sequence[str] | None = None,
        **where: Any,
    ) -> SweepResult:
        """A part of the result: some components, some metrics, some entries of its axes.

        An entry is what stands in `entries` (`layer=3`, `layer=(3, 4, 5)` for a window) or a label (`pos=" Spain"`);
        a negative number that is no entry counts from the end of the axis. One of them drops the axis, a list
        keeps it.

        Raises:
            UnknownNameError: no such component, metric, axis or entry.
            ConfigError: a label that several entries have.
        """
        components = chosen("component", component, self.components)
        metrics = chosen("metric", metric, self.metrics)
        unknown = [axis for axis in where if axis not in self.axes]
        if unknown:
            raise UnknownNameError(unknown_name("axis", unknown[0], ("component", "metric", *self.axes)))
        result = replace(
            self,
            results={
                (c, m): values for (c, m), values in self.results.items() if c in components and m in metrics
            },
            clean={name: value for name, value in self.clean.items() if name in metrics},
            corrupted={name: value for name, value in self.corrupted.items() if name in metrics},
        )._without_missing_heads()
        for axis, wanted in where.items():
            result = result._at(axis, wanted)
        return result

    def normalized(self) -> SweepResult:
        """Each value on the scale where the corrupted run is 0 and the clean one is 1.

        `(v - corrupted) / (clean - corrupted)`. Where both runs are equal there is no such scale: NaN, and a warning.

        Raises:
            MetricError: the value on one of the two runs is not known.
        """
        scales = {name: self._scale(name) for name in self.metrics}
        equal = [name for name, (_, span) in scales.items() if bool((span == 0).any())]
        if equal:
            warnings.warn(
                f"{', '.join(map(repr, equal))} has the same value on the clean and the corrupted run, so its"
                " normalized values are NaN there. Choose prompts or a metric that tell the two apart.",
                IntervenableWarning,
                stacklevel=2,
            )

        def normal(name: str, value: Tensor) -> Tensor:
            zero, span = scales[name]
            return torch.where(span == 0, torch.nan, (value - zero) / span)

        return replace(
            self,
            results={(c, name): normal(name, value) for (c, name), value in self.results.items()},
            clean={name: normal(name, self.clean[name]) for name in self.metrics},
            corrupted={name: normal(name, self.corrupted[name]) for name in self.metrics},
            settings={**self.settings, "normalized": True},
        )

    def mean(self) -> SweepResult:
        """The mean over all that a metric gave for each cell: over the examples, if it gave a number for each."""
        cells = len(self.axes)

        def means(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: _wide(value).mean() for name, value in values.items()}

        return replace(
            self,
            results={
                key: value if value.dim() == cells else _wide(value).flatten(cells).mean(cells)
                for key, value in self.results.items()
            },
            clean=means(self.clean),
            corrupted=means(self.corrupted),
        )

    def to_pandas(self) -> pd.DataFrame:
        """A table with a row for each cell.

        Columns: `component`, each axis with its entries, `<axis>_label` with their labels, `metric`, `value`, and
        before it `item` (`item_0`, `item_1`, ...) if a metric gives several numbers for each cell, each in a row.
        """
        return table_of(self.axes, self.entries, self.labels, self.results)

    def plot(self, tokenizer: Any = None, **options: Any) -> Picture:
        """Draw the result: a heat map over two axes, one for each head or component where there are more.

        Options: `component`, `metric`, `normalized`, `title`, `limits`, `palette`, `marks`, `show_values`, `across`,
        and entries of axes as in `select`: `result.plot(layer=3, normalized=True)`. `plot_sweep` in
        `intervenable.sweep_plots` says more of them.

        Raises:
            MetricError: several metrics and none chosen, several numbers for each cell, or a baseline not known.
            ConfigError: an axis, entry, component or metric that is not there.
            MissingExtraError: matplotlib is not installed.
        """
        from intervenable.sweep_plots import plot_sweep

        return plot_sweep(self, tokenizer, **options)

    # -- files

    def save(self, path: str | Path) -> Path:
        """Write the result to a file `*.safetensors`, or into a folder; return the file.

        It is written at once or not at all, and the same result gives the same bytes.

        Raises:
            StorageError: it could not be written, or `settings` holds what JSON has no form for.
        """
        tables: dict[str, Mapping[Any, Tensor]] = {
            "results": self.results,
            "clean": self.clean,
            "corrupted": self.corrupted,
        }
        rest = {
            "axes": self.axes,
            "labels": self.labels,
            "entries": self.entries,
            "shortcuts": self.shortcuts,
            "settings": self.settings,
        }
        return write_sweep(SWEEP.file_at(path), tables, rest)

    @classmethod
    def load(cls, path: str | Path) -> SweepResult:
        """The result that `save` has written there.

        Raises:
            StorageError: a damaged file, or one of another kind.
            FileNotFoundError: no file.
        """
        tables, rest = read_sweep(SWEEP.file_at(path))
        return cls(**{**tables, **rest})

    # -- parts of the above

    def _shape_of(self, metric: str) -> torch.Size:
        """The shape of what a metric gives for each cell."""
        return next(values.shape[len(self.axes) :] for (_, m), values in self.results.items() if m == metric)

    def _shape(self) -> torch.Size:
        shapes = {metric: self._shape_of(metric) for metric in self.metrics}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{metric!r} {tuple(shape)}" for metric, shape in shapes.items())
            raise MetricError(
                f"The metrics give values of different shapes: {listed}. Take one:"
                f" .select(metric={self.metrics[0]!r})."
            )
        return shapes[self.metrics[0]]

    def _padded(self, component: str, metric: str) -> Tensor:
        values = self.results[component, metric]
        if HEAD not in self.axes:
            return values
        at, size = self.axes.index(HEAD), len(self.entries[HEAD])
        if values.shape[at] == size:
            return values
        missing = list(values.shape)
        missing[at] = size - values.shape[at]
        return torch.cat([_wide(values), _wide(values).new_full(missing, torch.nan)], at)

    def _baseline(self, run: str) -> Tensor:
        self._shape()
        return _stacked([self._known(run, metric) for metric in self.metrics], 0)

    def _known(self, run: str, metric: str) -> Tensor:
        values: Mapping[str, Tensor] = getattr(self, run)
        if metric not in values:
            raise MetricError(
                f"The value of {metric!r} on the {run} run is not known. Give the sweep the {run} inputs themselves:"
                " it runs them once, unpatched."
            )
        return values[metric]

    def _scale(self, metric: str) -> tuple[Tensor, Tensor]:
        zero = self._known("corrupted", metric)
        return zero, self._known("clean", metric) - zero

    def _without_missing_heads(self) -> SweepResult:
        """Without the heads that none of the components has."""
        if HEAD not in self.axes:
            return self
        size = max(values.shape[self.axes.index(HEAD)] for values in self.results.values())
        return replace(
            self,
            labels={**self.labels, HEAD: self.labels[HEAD][:size]},
            entries={**self.entries, HEAD: self.entries[HEAD][:size]},
        )

    def _at(self, axis: str, wanted: Any) -> SweepResult:
        at = self.axes.index(axis)
        several = isinstance(wanted, list)
        indices = [
            index_of(axis, one, self.entries[axis], self.labels[axis])
            for one in (wanted if several else [wanted])
        ]

        def taken(key: tuple[str, str]) -> Tensor:
            values = (self._padded(*key) if axis == HEAD else self.results[key]).index_select(
                at, torch.tensor(indices, dtype=torch.long)
            )
            return values if several else values.squeeze(at)

        def pick(names: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
            rest = {name: those for name, those in names.items() if name != axis}
            return {**rest, axis: tuple(names[axis][i] for i in indices)} if several else rest

        selected = self.settings.get("selected", {})
        return replace(
            self,
            axes=self.axes if several else tuple(name for name in self.axes if name != axis),
            labels=pick(self.labels),
            entries=pick(self.entries),
            results={key: taken(key) for key in self.results},
            settings=self.settings
            if several
            else {**self.settings, "selected": {**selected, axis: self.labels[axis][indices[0]]}},
        )


def _stacked(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Several tensors along a new axis; one as it is."""
    if len(tensors) == 1:
        return tensors[0]
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return torch.stack([tensor.to(dtype) for tensor in tensors], axis)


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
