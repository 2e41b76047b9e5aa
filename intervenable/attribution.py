"""`attribution_patch`: what a patching sweep would find, estimated from gradients in two runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from intervenable.attribution_estimates import Estimates, as_found, line
from intervenable.attribution_runs import run_probed
from intervenable.binding import Places
from intervenable.errors import ConfigError, UnknownNameError, unknown_name
from intervenable.metrics import as_metrics
from intervenable.sweep_axes import Axis, read_axes
from intervenable.sweep_cells import Cell, all_cells
from intervenable.sweep_edits import edits_of
from intervenable.sweep_fingerprint import settings_of
from intervenable.sweep_grids import Subsets, make_grids, read_components
from intervenable.sweep_layouts import with_layouts
from intervenable.sweep_measuring import Found, bound_metrics
from intervenable.sweep_pairs import Direction, Pair
from intervenable.sweep_result import SweepResult
from intervenable.sweep_runs import Unpatched, run_unpatched
from intervenable.sweep_sources import Source
from intervenable.sweep_start import Start
from intervenable.sweep_values import Edits, Place

Method = Literal["gradient", "integrated"]
METHODS: tuple[Method, ...] = ("gradient", "integrated")


def attribution_patch(
    model: nn.Module,
    clean: Any,
    corrupted: Any,
    component: str | Sequence[str] = "block_input",
    axes: str | Sequence[str] = ("layer", "pos"),
    metric: Any = None,
    *,
    layers: Any = None,
    positions: Any = None,
    heads: Any = None,
    queries: Any = None,
    keys: Any = None,
    direction: Direction | None = None,
    steps: int = 1,
    method: Method = "gradient",
    align: Any = None,
    tokenizer: Any = None,
) -> SweepResult:
    """Estimate what `sweep` would find, for all cells at once: one run of each prompt and one backward pass.

    With `a` the activations of the run that is patched (base) and `a'` those of the run that gives the values
    (source), the estimate for a cell is to first order

        metric(base) + sum((a' - a) * d metric / d a),

    the sum over all that the cell patches. It is exact where the metric depends on the activation as a straight line
    does, and may be far off where that bends: a large difference in the residual stream, a softmax that is full.
    It is a screen: what it finds is to be checked with `sweep`.

    `method="integrated"` goes along the bend. For each component and layer by itself, all that the cells patch there
    moves at once along the straight line from `a` to `a'`; what lies below stays as in the base run, what lies above
    follows. The gradient is the mean of those at the midpoints `(k - 1/2) / steps` of the line, k = 1 ... `steps`.
    With many steps the estimates of cells that divide a layer among them add up to what patching all of them does.
    This takes a forward and a backward pass for each layer and step.

    Nanda (2023), "Attribution Patching: Activation Patching At Industrial Scale",
    https://www.neelnanda.io/mechanistic-interpretability/attribution-patching; Syed et al. (2023), "Attribution
    Patching Outperforms Automated Circuit Discovery", https://arxiv.org/abs/2310.10348. Integrated gradients:
    Sundararajan et al. (2017), https://arxiv.org/abs/1703.01365; for patching Hanna et al. (2024), "Have Faith in
    Faithfulness", https://arxiv.org/abs/2403.17806. They move the embeddings of the input along the line and read
    gradients at all layers, at `k / steps`; here each layer's own activations move.

    Args:
        model: As in `sweep`, and so is all else that is not explained here.
        clean: The clean prompts.
        corrupted: The corrupted prompts.
        component: What is patched, one or several.
        axes: What is varied. In a block `layer` must be one of them, since estimates of several layers do not add up.
        metric: One of `iv.metrics` or any callable on logits `[b, s, V]` through which gradients flow, or several by
            name. A value of several numbers takes a backward pass for each; those of different examples share one.
        layers: Which layers, one by one.
        positions: Which tokens.
        heads: Which heads.
        queries: Which rows of attention matrices.
        keys: Which of their columns.
        direction: Which run is patched: `"denoise"`, the default, or `"noise"`.
        steps: Points on the line, for `method="integrated"`.
        method: `"gradient"`, that of the base run, or `"integrated"`.
        align: Which tokens belong together in prompts of different length.
        tokenizer: For positions given as words, and for the names of tokens.

    Returns:
        The estimates, with the axes, labels and baselines that `sweep` gives.

    Raises:
        ConfigError: several layers in one cell; a method or steps that make no sense; as in `sweep`.
        MetricError: a metric without a gradient.
        UnknownNameError, UnsupportedModelError, InputError, LayerRangeError, LocationError: as in `sweep`.

    Example:
        >>> from intervenable import load_small_lm, metrics
        >>> tokenizer, model = load_small_lm()
        >>> clean = tokenizer("The capital of Spain is", return_tensors="pt")
        >>> corrupted = tokenizer("The capital of Italy is", return_tensors="pt")
        >>> difference = metrics.logit_difference(tokenizer, " Madrid", " Rome")
        >>> result = attribution_patch(
        ...     model, clean, corrupted, "attention_output", ("layer", "pos"), difference, positions=[-1]
        ... )
        >>> result.values.shape, int(result.values.argmax())  # layer 4 carries the country to the last token
        (torch.Size([6, 1]), 4)
    """
    _check(steps, method)
    asked, metrics = read_axes(axes), as_metrics(metric)
    given: dict[Axis, Any] = {"layer": layers, "pos": positions, "head": heads, "query": queries, "key": keys}
    subsets = Subsets.of(given, None, asked)
    pair = Pair.of(model, clean, corrupted, direction, True)
    components = read_components(component, pair.model)
    source = Source.of("source", pair, None, 0)
    grids = make_grids(Places(pair.model), components, asked, subsets, pair, source.paired, align, tokenizer)
    sites = with_layouts(pair.model, pair.base.base, grids.sites)
    grids = replace(grids, sites=sites)
    cells = all_cells(grids.grids)
    _check_layers(cells)

    run = run_probed(pair.model, pair.base, sites)
    base = run.unpatched
    other = None if pair.other is None else run_unpatched(pair.model, pair.other, sites, "other run")
    edits = _with_own(cells, edits_of(cells, grids, base, source.values(base, other, sites), None), base)
    begun = Start(base, other, None)
    estimates = Estimates(len(cells), bound_metrics(metrics, pair, begun, base), base.logits())
    if method == "gradient":
        estimates.add(run, edits, 1.0)
    else:
        del run  # and its graph
        for place, site in sites.items():
            here = [edit for edit in edits if edit[0] == place]
            changes = line(here)
            for step in range(steps):
                along = (step + 0.5) / steps
                put = [own + along * change for own, change in zip(base.values[place], changes, strict=True)]
                estimates.add(run_probed(pair.model, pair.base, {place: site}, {place: put}), here, 1 / steps)

    found = Found(cells, estimates.baseline)
    found.put(range(len(cells)), estimates.values())
    rest = {}
    if other is not None:
        with torch.no_grad():
            of_other = bound_metrics(metrics, pair, begun, other)
            rest = {name: as_found(call(other.logits().clone())) for name, call in of_other.items()}
    clean_values, corrupted_values = (
        (estimates.baseline, rest) if pair.noising else (rest, estimates.baseline)
    )
    about = settings_of(pair, components, asked, "source", subsets)
    return SweepResult(
        axes=tuple(asked),
        labels=grids.along(lambda entry: entry.label),
        entries=grids.along(lambda entry: entry.stands_for),
        results=found.by_component(),
        clean=clean_values,
        corrupted=corrupted_values,
        shortcuts=(_how(method, steps),),
        settings={**about, "method": method, "steps": steps},
    )


# --- what was asked ---------------------------------------------------------------------------------------


def _check(steps: Any, method: Any) -> None:
    if method not in METHODS:
        raise UnknownNameError(unknown_name("method", method, METHODS))
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ConfigError(
            f"steps={steps!r} makes no sense. Give the number of points on the line, 1 or more."
        )
    if method == "gradient" and steps > 1:
        raise ConfigError(
            f"steps={steps} are points on the line of integrated gradients, and method='gradient' looks at one end"
            " of it. Give method='integrated', or leave steps out."
        )


def _check_layers(cells: Sequence[Cell]) -> None:
    several = next((cell for cell in cells if len(cell.layers) > 1), None)
    if several is not None:
        raise ConfigError(
            f"The cell {several.label} patches layers {', '.join(map(str, several.layers))} together, where the upper"
            " patches cover what the lower ones do: estimates of single layers do not add up. Name 'layer' in axes,"
            " without windows, or take iv.patching.sweep."
        )


def _with_own(
    cells: Sequence[Cell], edits: Sequence[Edits], base: Unpatched
) -> list[tuple[Place, Edits, Tensor]]:
    """What cells put where, with the place and what is there without a patch."""
    found = []
    for one in edits:
        cell = cells[one.cells[0]]
        place = (cell.grid.component, one.site.layer)
        found.append((place, one, base.values[place][one.passage]))
    return found


def _how(method: Method, steps: int) -> str:
    if method == "gradient":
        return "Estimates to first order, from the gradient of the run that is patched: no cell was run."
    return f"Estimates from gradients at {steps} point(s) of a line for each layer: no cell was run."
