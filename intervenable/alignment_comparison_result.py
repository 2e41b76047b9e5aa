"""What a comparison of methods gives: how well each finds an alignment, and each of its controls beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from intervenable.alignment_statistics import Estimate
from intervenable.errors import ConfigError, StorageError, UnknownNameError, unknown_name
from intervenable.tensor_files import FileKind, read_tensors, write_tensors

if TYPE_CHECKING:
    import pandas as pd

    from intervenable.drawing import Picture

COMPARISON = FileKind(
    "intervenable.MethodComparison",
    version=1,
    file_name="methods.safetensors",
    noun="a comparison of methods",
    writer="MethodComparison.save",
    remedy="Compare them again.",
)
TITLES = {
    "full": "full vector",
    "pca": "PCA",
    "dbm": "DBM",
    "boundless": "boundless DAS",
    "das": "DAS",
    "sae": "SAE features",
}
"""What the methods are called on pictures and in tables."""
MOST_SHOWN = 3
"""Shortcuts that are told where a comparison is shown."""
CONTROLS = {
    "random": "random subspace",
    "shuffled": "shuffled labels",
    "untrained": "untrained model",
}
"""What the controls are called on pictures and in tables."""


@dataclass(frozen=True, eq=False)
class ControlResult:
    """What a control of a method gave, on the examples that the method was evaluated on."""

    per_example: Tensor
    """`[seeds, examples]` 1 where the answer was right."""

    size: Tensor
    """`[seeds]` how many coordinates were swapped."""

    loss: Tensor
    """`[seeds]` the last loss of training; NaN where nothing was trained."""


@dataclass(frozen=True, eq=False)
class MethodResult:
    """What one method gave, and its controls."""

    name: str
    """`"das"`, `"pca"` and so on."""

    per_example: Tensor
    """`[seeds, examples]` 1 where the answer was right; a method without chance has one row."""

    size: Tensor
    """`[seeds]` how many coordinates are swapped: a rank, learned or given, or dimensions, or features."""

    loss: Tensor
    """`[seeds]` the last loss of training; NaN where nothing was trained."""

    seconds: float
    """What it took in all, without the controls."""

    controls: Mapping[str, ControlResult] = field(default_factory=dict)
    """By name; only those that make sense for this method."""

    confidence: float = 0.95
    """With which a mean lies in its interval."""

    @property
    def title(self) -> str:
        """Its name as on pictures."""
        return TITLES.get(self.name, self.name)

    @property
    def iia(self) -> Estimate:
        """The accuracy over all seeds and examples."""
        return Estimate.of(self.per_example, self.confidence)

    def control(self, name: str) -> Estimate:
        """The accuracy of a control.

        Raises:
            UnknownNameError: this method has no such control.
        """
        return Estimate.of(self._control(name).per_example, self.confidence)

    def above(self, name: str | None = None) -> Estimate:
        """By how much the method is better than a control, example by example.

        Args:
            name: Which control; by default the one of the highest accuracy.

        Raises:
            UnknownNameError: this method has no such control, or none at all.
        """
        if name is None and self.controls:
            name = max(self.controls, key=lambda each: self.controls[each].per_example.double().mean().item())
        control = self._control(name or "random")
        return Estimate.of_difference(self.per_example, control.per_example, self.confidence)

    def _control(self, name: str) -> ControlResult:
        if name not in self.controls:
            raise UnknownNameError(unknown_name("control", name, self.controls, f"of {self.name!r}"))
        return self.controls[name]


@dataclass(frozen=True, eq=False)
class MethodComparison:
    """How well methods find an alignment at one place, each with its controls, on the same held-out examples.

    A comparison is looked into by name: `comparison["das"].iia`, `comparison["das"].above("random")`.

    Example:
        >>> one = ControlResult(torch.tensor([[1.0, 0.0] * 20]), torch.tensor([2.0]), torch.tensor([float("nan")]))
        >>> das = MethodResult(
        ...     "das", torch.ones(1, 40), torch.tensor([2.0]), torch.tensor([0.1]), 3.0, {"random": one}
        ... )
        >>> print(MethodComparison((das,), torch.zeros(1, 40), {"layer": 1, "component": "block_output"}))
        Methods at layer 1 block_output: IIA over 40 examples, with intervals of 95%.
        method           size  IIA                random subspace    above the best control
        DAS                 2  1.00 [0.91, 1.00]  0.50 [0.35, 0.65]  0.50 [0.33, 0.65]
        no intervention     0  0.00 [0.00, 0.09]
    """

    methods: tuple[MethodResult, ...]
    """In the order in which they were asked for."""

    baseline: Tensor
    """`[1, examples]` what each example gave without any intervention."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """What else is known, as JSON has it: component, layer, rank, seeds, options of training."""

    shortcuts: tuple[str, ...] = ()
    """What could be left out of the computation, and what had to be done the long way."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        object.__setattr__(self, "shortcuts", tuple(self.shortcuts))
        object.__setattr__(self, "settings", dict(self.settings))
        examples = self.baseline.shape[-1]
        for method in self.methods:
            for values in (method.per_example, *(each.per_example for each in method.controls.values())):
                if values.dim() != 2 or values.shape[1] != examples:
                    raise ConfigError(
                        f"{method.name!r} has values of shape {tuple(values.shape)}. Give [seeds, {examples}]: one"
                        " for each example that the baseline has."
                    )

    # -- looking

    def __getitem__(self, name: str) -> MethodResult:
        for method in self.methods:
            if method.name == name:
                return method
        raise UnknownNameError(unknown_name("method", name, self.names, "in this comparison"))

    def __iter__(self) -> Iterator[MethodResult]:
        return iter(self.methods)

    def __len__(self) -> int:
        return len(self.methods)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods, in order."""
        return tuple(method.name for method in self.methods)

    @property
    def controls(self) -> tuple[str, ...]:
        """Names of the controls that at least one method has."""
        found = dict.fromkeys(name for method in self.methods for name in method.controls)
        return tuple(sorted(found, key=[*CONTROLS, *found].index))

    @property
    def confidence(self) -> float:
        """With which a mean lies in its interval."""
        return float(self.settings.get("confidence", 0.95))

    @property
    def unpatched(self) -> Estimate:
        """The accuracy without any intervention: how often the base's own answer is the counterfactual one."""
        return Estimate.of(self.baseline, self.confidence)

    @property
    def place(self) -> str:
        """Where the methods intervene."""
        layer, component = self.settings.get("layer"), str(self.settings.get("component", ""))
        return component if layer is None else f"layer {layer} {component}"

    def to_pandas(self) -> pd.DataFrame:
        """A table with a row for each method.

        Columns: `method`, `size` (the mean over seeds), `iia`, `low`, `high`; for each control its accuracy under its
        name, with `_low` and `_high`, and by how much the method is above it, `above_<control>` with `_low` and
        `_high`; `loss`, `seconds`, `seeds`, `examples`. What a method does not have is NaN.
        """
        import pandas as pd

        return pd.DataFrame([self._row(method) for method in self.methods])

    def _row(self, method: MethodResult) -> dict[str, Any]:
        row: dict[str, Any] = {"method": method.name, "size": method.size.double().mean().item()}
        row |= dict(zip(("iia", "low", "high"), method.iia, strict=True))
        nothing = Estimate(*[float("nan")] * 3)
        for name in self.controls:
            known = name in method.controls
            for key, estimate in (
                (name, method.control(name) if known else nothing),
                (f"above_{name}", method.above(name) if known else nothing),
            ):
                row |= dict(zip((key, f"{key}_low", f"{key}_high"), estimate, strict=True))
        row |= {"loss": method.loss.double().mean().item(), "seconds": method.seconds}
        return row | {"seeds": len(method.per_example), "examples": self.baseline.shape[-1]}

    def plot(self, **options: Any) -> Picture:
        """Draw a row for each method: its accuracy as a dot, its controls as open marks, all with their intervals.

        Options: `title`, `limits`; `plot_comparison` in `intervenable.alignment_comparison_plots` says more.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from intervenable.alignment_comparison_plots import plot_comparison

        return plot_comparison(self, **options)

    def __repr__(self) -> str:
        controls = self.controls
        head = ["method", "size", "IIA" if self.metric == "iia" else self.metric]
        head += [CONTROLS.get(name, name) for name in controls]
        head += ["above the best control"] if controls else []
        rows = [head]
        for method in self.methods:
            row = [method.title, sizes_text(method.size), str(method.iia)]
            row += [str(method.control(name)) if name in method.controls else "" for name in controls]
            row += [str(method.above())] if method.controls else []
            rows.append(row)
        rows.append(["no intervention", "0", str(self.unpatched)])
        seeds = self.settings.get("seeds", ())
        under = f", {len(seeds)} seeds" if len(seeds) > 1 else ""
        return "\n".join(
            [
                f"Methods at {self.place}: {head[2]} over {self.baseline.shape[-1]} examples{under}, with intervals"
                f" of {self.confidence:.0%}.",
                *_table(rows),
                *self.shortcuts[:MOST_SHOWN],
            ]
        )

    @property
    def metric(self) -> str:
        """What the figures are."""
        return str(self.settings.get("metric", "iia"))

    # -- files

    def save(self, path: str | Path) -> Path:
        """Write the result to a file `*.safetensors`, or into a folder; return the file.

        It is written at once or not at all, and the same result gives the same bytes.

        Raises:
            StorageError: it could not be written, or `settings` holds what JSON has no form for.
        """
        tensors = {"baseline": self.baseline}
        listed = []
        for number, method in enumerate(self.methods):
            tensors |= _tensors(method, f"{number:02d}")
            for index, control in enumerate(method.controls.values()):
                tensors |= _tensors(control, f"{number:02d}.{index:02d}")
            listed.append(
                {
                    "name": method.name,
                    "seconds": method.seconds,
                    "confidence": method.confidence,
                    "controls": list(method.controls),
                }
            )
        content = {"methods": listed, "settings": self.settings, "shortcuts": self.shortcuts}
        return write_tensors(COMPARISON.file_at(path), COMPARISON, tensors, content)

    @classmethod
    def load(cls, path: str | Path) -> MethodComparison:
        """The result that `save` has written there.

        Raises:
            StorageError: a damaged file, or one of another kind.
            FileNotFoundError: no file.
        """
        file = COMPARISON.file_at(path)
        tensors, content = read_tensors(file, COMPARISON)
        try:
            methods = [
                MethodResult(
                    name=about["name"],
                    seconds=about["seconds"],
                    confidence=about["confidence"],
                    controls={
                        name: ControlResult(**_parts(tensors, f"{number:02d}.{index:02d}"))
                        for index, name in enumerate(about["controls"])
                    },
                    **_parts(tensors, f"{number:02d}"),
                )
                for number, about in enumerate(content["methods"])
            ]
            return cls(tuple(methods), tensors["baseline"], content["settings"], content["shortcuts"])
        except (KeyError, TypeError, ConfigError) as error:
            raise StorageError(f"{file} is not {COMPARISON.noun} ({error}). {COMPARISON.remedy}") from error


PARTS = ("per_example", "size", "loss")


def _tensors(part: MethodResult | ControlResult, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{name}": getattr(part, name) for name in PARTS}


def _parts(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensors[f"{prefix}.{name}"] for name in PARTS}


def sizes_text(size: Tensor) -> str:
    """One size, or the lowest and highest of several seeds."""
    low, high = (int(end) for end in torch.aminmax(size))
    return str(low) if low == high else f"{low}–{high}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns that begin below each other; figures of the second to the right."""
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if index == 1 else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
