"""`sweep`: patch every layer, token or head in turn, and see what becomes of the answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from intervenable._version import __version__
from intervenable.binding import Places
from intervenable.errors import ConfigError, InexactError, MetricError
from intervenable.metric_reading import MetricReader, UnreadError
from intervenable.metrics import Metric, MetricRun, as_metrics
from intervenable.progress import Progress
from intervenable.sweep_axes import Axis, Entry, read_axes
from intervenable.sweep_cells import Cell, all_cells
from intervenable.sweep_checkpoints import Checkpoints
from intervenable.sweep_fingerprint import fingerprint
from intervenable.sweep_grids import Grids, Subsets, make_grids, model_blocks, read_components
from intervenable.sweep_layouts import with_layouts
from intervenable.sweep_pairs import Direction, Pair
from intervenable.sweep_result import SweepResult
from intervenable.sweep_runs import PlainRuns, PlainWaves, Unpatched
from intervenable.sweep_sources import Source, read_value, swaps
from intervenable.sweep_start import Start, last_tokens, start
from intervenable.sweep_values import Edits, Place, edits_at
from intervenable.wave import Recorded, Waves
from intervenable.wave_budget import bytes_of
from intervenable.wave_learning import knowledge_of
from intervenable.wave_plan import Wave
from intervenable.wave_readout import Reading, largest

CHECKED_CELLS = 16
"""How many cells `exact_check=True` runs again."""

TOLERANCE = 1e-4
"""How far a shortcut may be from the plain way, of the largest value; ten times what rounding was seen to do."""


def sweep(
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
    window: Mapping[str, int] | None = None,
    direction: Direction | None = None,
    value: Any = "source",
    reference: Any = None,
    seed: int = 0,
    align: Any = None,
    tokenizer: Any = None,
    memory: int | str | None = None,
    exact_check: bool | int = False,
    checkpoint: str | Path | None = None,
    progress: bool | Callable[[int, int], None] | None = None,
) -> SweepResult:
    """Patch each entry of the axes in a run of its own, and measure what the model then answers.

    A cell of the result is the metric of a run of one prompt in which that place alone has the activation of the
    other prompt. Cells are computed many at a time and only as far as a patch reaches; what is left out that way is
    checked on the model at hand, and the result is that of one whole forward pass a cell, up to rounding.

    Args:
        model: A model with logits, or an `IntervenableModel`, whose interventions then act in every run.
        clean: The prompts that are answered as wanted, a batch with padding as usual; one prompt stands for as many
            as `corrupted` has. Also an `ActivationCache` of them. None where nothing of them is needed.
        corrupted: The prompts that are not, as many.
        component: What is patched; several are swept one after the other. A module path may stand instead, with the
            place of the layer: `"model.layers[{layer}].input"`.
        axes: What is varied: `layer`, `pos`, `head`, and for attention matrices `query` and `key`. What is no axis is
            patched as a whole.
        metric: What is measured: one of `iv.metrics`, any callable on the logits `[b, s, V]` of one cell, or several
            of them by name. A value may be a number or a tensor of any shape, whose axes come last.
        layers: Which layers. An entry may be a tuple, a window of several that are patched together.
        positions: Which tokens, as in `iv.collect`: real tokens by number, words, windows, names for them.
        heads: Which heads, alone or in windows.
        queries: Which rows of attention matrices, as `positions`.
        keys: Which of their columns, as `positions`.
        window: Patch the neighbours too: `{"layer": 3}` patches layers l-1 to l+1 in the cell of layer l.
        direction: `"denoise"` puts clean activations into the corrupted run, `"noise"` corrupted ones into the clean
            run. By default "denoise", and "noise" where `value` is not of the other prompt.
        value: What is put in: `"source"`, the other prompt's; `"zero"`, `"mean"` (over examples and tokens of
            `reference`), `"resample"` (of another example of it), a number, a tensor, or tensors by layer.
        reference: Inputs for `"mean"` and `"resample"`; by default the prompts that would give the values.
        seed: Says which examples `"resample"` draws.
        align: For prompts of different length, which tokens belong together: `"auto"`, or pairs (clean position,
            corrupted position), the same for all examples or a list of them for each.
        tokenizer: For positions given as words, and for the names of tokens.
        memory: Bytes that the rows of a wave may take beyond a plain forward pass, as a number or as "2GB"; 1 GB by
            default.
        exact_check: Compute some random cells (a number of them, or 16) once more without any shortcut.
        checkpoint: A folder for what is finished. The same call goes on there after it was cut off, and ends with the
            same bytes.
        progress: Whether to draw a bar; by default if it takes more than two seconds and there is a terminal. A
            callable is told (cells done, cells in all).

    Returns:
        The values with their axes and baselines.

    Raises:
        ConfigError: a component without one of the axes, prompts of different length and no `align`, a budget too
            small for one cell.
        UnknownNameError, LayerRangeError, LocationError: something that is not there.
        MetricError: a metric that gives no number, NaN, or another shape than before; it names the cell.
        InexactError: the check found a difference.
        StorageError: the checkpoint is damaged, or that of another sweep, or cannot be written.

    Example:
        >>> from intervenable import load_small_lm, metrics
        >>> tokenizer, model = load_small_lm()
        >>> clean = tokenizer("The capital of Spain is", return_tensors="pt")
        >>> corrupted = tokenizer("The capital of Italy is", return_tensors="pt")
        >>> result = sweep(model, clean, corrupted, metric=metrics.logit_difference(tokenizer, " Madrid", " Rome"))
        >>> result.values.shape, bool(result.values[0, 3] == result.baseline_clean)
        (torch.Size([6, 5]), True)
    """
    asked, components = read_axes(axes), read_components(component)
    given: dict[Axis, Any] = {"layer": layers, "pos": positions, "head": heads, "query": queries, "key": keys}
    subsets = Subsets.of(given, window, asked)
    budget, metrics, kind = bytes_of(memory), as_metrics(metric), read_value(value)
    pair = Pair.of(model, clean, corrupted, direction, swaps(kind))
    source = Source.of(kind, pair, reference, seed)
    grids = make_grids(Places(pair.model), components, asked, subsets, pair, source.paired, align, tokenizer)

    grids = replace(grids, sites=with_layouts(pair.model, pair.base.base, grids.sites))
    cells = all_cells(grids.grids)
    differs = _differs_from(pair, source, align)
    blocks = model_blocks(pair.model, components)
    begun = start(pair, grids.sites, swaps(kind), blocks)
    base, other = begun.base, begun.other
    edits = _edits(cells, grids, base, source.values(base, other, grids.sites), differs)
    reader = _reader(metrics, pair, base, other)
    reading = Reading(reader.positions, reader.tokens, base.shape[1])
    baseline = reader.measure(reading.of_run(base), "the run that is patched, without a patch")
    rest = {} if other is None else reader.measure(reading.of_run(other), "the other run")

    plain = PlainRuns(pair.model, base, edits)
    engine = _engine(begun, blocks, edits, reading, plain, _changing(edits), components, budget)
    about = _settings(pair, components, asked, kind, subsets)
    print_of = (
        {}
        if checkpoint is None
        else fingerprint(
            pair,
            about,
            baselines=(baseline, rest),
            patches=[
                (one.site.label, one.passage, one.cells, one.base, one.real, one.values) for one in edits
            ],
            parts=[wave.cells for wave in engine.waves],
        )
    )
    found = _Found(cells, baseline)
    with (
        _kept(checkpoint, print_of, len(engine.waves)) as done,
        Progress(len(cells), progress, "sweep") as bar,
    ):
        bar.advance(len(cells) - sum(len(wave.cells) for wave in engine.waves), computed=False)
        for number, wave in enumerate(engine.waves):
            kept = None if done is None else done.read(number)
            if kept is None:
                before = engine.used.copy()
                measured = _measured(wave, engine.run(wave), reader, plain, cells)
                if done is not None:
                    done.write(number, measured, engine.used - before)
            else:
                measured = kept.results
                engine.used.update(kept.ways)
            found.put(wave.cells, measured)
            bar.advance(len(wave.cells), computed=kept is None)
    if exact_check:
        _check(exact_check, found, plain, reader, cells, seed)
    clean_values, corrupted_values = (baseline, rest) if pair.noising else (rest, baseline)
    return SweepResult(
        axes=tuple(asked),
        labels=_along(grids, lambda entry: entry.label),
        entries=_along(grids, lambda entry: entry.stands_for),
        results=found.by_component(),
        clean=clean_values,
        corrupted=corrupted_values,
        shortcuts=_shortcuts(engine, len(cells), reading),
        settings=about,
    )


def _kept(
    folder: str | Path | None, print_of: Mapping[str, Any], waves: int
) -> AbstractContextManager[Checkpoints | None]:
    return nullcontext() if folder is None else Checkpoints(folder, print_of, waves)


# --- before the cells -------------------------------------------------------------------------------------


def _differs_from(pair: Pair, source: Source, align: Any) -> Tensor | None:
    """`[b]` the first token whose inputs differ between the runs, a tensor index; None where that says nothing.

    In a model that looks back only, whatever lies before it is the same in both.
    """
    base, feed = pair.base.base, source.paired
    if feed is None or align is not None or base.decoder is not None:
        return None
    same = base.input_ids, feed.input_ids
    if same[0] is None or same[1] is None or base.args or base.kwargs.keys() != feed.kwargs.keys():
        return None
    first = torch.full((base.batch,), base.length)
    for key, item in base.kwargs.items():
        there = feed.kwargs[key]
        if not isinstance(item, Tensor) or not isinstance(there, Tensor):
            if item is not there and item != there:
                return None
            continue
        if item.shape != there.shape:
            return None
        if item.shape[:2] != (base.batch, base.length):
            if not torch.equal(item, there):
                return None
            continue
        differs = (item != there).flatten(2).any(-1) if item.dim() > 2 else item != there
        place = torch.where(differs.cpu(), torch.arange(base.length), base.length).amin(1)
        first = torch.minimum(first, place)
    return first


def _edits(
    cells: Sequence[Cell],
    grids: Grids,
    base: Unpatched,
    values: Mapping[Place, Sequence[Tensor]],
    start: Tensor | None,
) -> list[Edits]:
    """What all cells put where."""
    by_place: dict[Place, list[tuple[int, Cell]]] = {}
    for number, cell in enumerate(cells):
        for layer in cell.layers:
            by_place.setdefault((cell.grid.component, layer), []).append((number, cell))
    found: list[Edits] = []
    for place, here in by_place.items():
        own, put = base.values[place], values[place]
        if len(put) != len(own):
            raise ConfigError(
                f"{grids.sites[place].label} is passed {len(own)} times in one run and {len(put)} in the other."
            )
        for passage, (value, there) in enumerate(zip(put, own, strict=True)):
            found += edits_at(grids.sites[place], passage, here, grids.whole[place], value, there, start)
    return found


def _changing(edits: Sequence[Edits]) -> dict[int, int]:
    """For each cell that changes anything the first token that it changes."""
    first: dict[int, int] = {}
    for one in edits:
        for cell, token in zip(one.cells.tolist(), one.first.tolist(), strict=True):
            if token < one.nowhere:
                first[cell] = min(first.get(cell, token), token)
    return dict(sorted(first.items()))


def _reader(metrics: Mapping[str, Any], pair: Pair, base: Unpatched, other: Unpatched | None) -> MetricReader:
    runs = {"clean": base, "corrupted": other} if pair.noising else {"clean": other, "corrupted": base}

    def whole(name: str) -> Callable[[], Tensor]:
        def logits() -> Tensor:
            run = runs[name]
            if run is None:
                raise MetricError(f"The metric reads the {name} run, which was not given as inputs.")
            return run.logits()

        return logits

    about = MetricRun(base.inputs, whole("clean"), whole("corrupted"))
    calls = {
        name: metric.bound(about) if isinstance(metric, Metric) else metric
        for name, metric in metrics.items()
    }
    probes = [run.logits for run in (base, other) if run is not None]
    guess = last_tokens(base.inputs, base.shape[1])
    return MetricReader(calls, base.shape, probes, guess=guess, narrow=True)


# --- the cells --------------------------------------------------------------------------------------------


def _engine(
    begun: Start,
    blocks: Sequence[nn.Module],
    edits: Sequence[Edits],
    reading: Reading,
    plain: PlainRuns,
    first: Mapping[int, int],
    components: Sequence[str],
    memory: int,
) -> Waves | PlainWaves:
    """What computes the cells."""
    tracks, base = begun.waves, begun.base
    if tracks is None:
        return PlainWaves(plain, reading, first)
    recorded = Recorded(
        tracks.inputs,
        reading.of_run(base),
        largest(base.known),
        len(tracks.order),
        tracks.joins,
        tracks.cache,
    )
    learnt = knowledge_of(base.model, tracks.inputs, list(base.plan.base.kwargs))
    return Waves(
        base.model, blocks, recorded, edits, first, reading, plain, learnt, tuple(components), memory
    )


def _shortcuts(engine: Waves | PlainWaves, cells: int, reading: Reading) -> tuple[str, ...]:
    """What was left out, and what was not."""
    run = sum(engine.used.values())
    notes = [f"{cells - run} of {cells} cells change nothing and were not run"] if run < cells else []
    notes += [f"{count} cells: {way}" for way, count in engine.used.items()]
    where = f"logits of {len(reading.positions)} of {reading.length} positions"
    notes.append(where if reading.tokens is None else f"{where} and {len(reading.tokens)} tokens")
    return tuple(notes)


def _measured(
    wave: Wave, logits: Tensor, reader: MetricReader, plain: PlainRuns, cells: Sequence[Cell]
) -> dict[str, Tensor]:
    """The metrics of the cells of a wave, stacked."""
    values: dict[str, list[Tensor]] = {name: [] for name in reader.shapes}
    for cell, one in zip(wave.cells, logits, strict=True):
        try:
            measured = reader.measure(one, cells[cell].label)
        except UnreadError:  # it looked where it had not before
            measured = reader.measure_whole(plain.logits(cell), cells[cell].label)
        for name, value in measured.items():
            values[name].append(value)
    return {name: torch.stack(items) for name, items in values.items()}


class _Found:
    """The values of all cells, those that change nothing as in the run without a patch."""

    def __init__(self, cells: Sequence[Cell], baseline: Mapping[str, Tensor]) -> None:
        self._cells = cells
        self.values = {
            name: value.expand(len(cells), *value.shape).clone() for name, value in baseline.items()
        }

    def put(self, wave: Sequence[int], measured: Mapping[str, Tensor]) -> None:
        index = torch.tensor(wave)
        for name, values in measured.items():
            self.values[name][index] = values.to(self.values[name].dtype)

    def by_component(self) -> dict[tuple[str, str], Tensor]:
        """`[sizes of the axes..., shape of the metric]` for each component and metric."""
        found, at = {}, 0
        for grid in dict.fromkeys(cell.grid for cell in self._cells):
            for name, values in self.values.items():
                here = values[at : at + len(grid)]
                found[grid.component, name] = here.reshape(*grid.shape, *here.shape[1:]).clone()
            at += len(grid)
        return found


def _check(
    asked: bool | int, found: _Found, plain: PlainRuns, reader: MetricReader, cells: Sequence[Cell], seed: int
) -> None:
    """Compute some cells again without any shortcut.

    Raises:
        InexactError: one differs.
    """
    count = min(CHECKED_CELLS if asked is True else int(asked), len(cells))
    order = torch.randperm(len(cells), generator=torch.Generator().manual_seed(seed))[:count]
    for cell in sorted(order.tolist()):
        exact = reader.measure_whole(plain.logits(cell), cells[cell].label)
        for name, value in exact.items():
            got = found.values[name][cell]
            scale = max(1.0, float(value.abs().max()) if value.numel() else 1.0)
            if not torch.allclose(got.double(), value.double(), rtol=0, atol=TOLERANCE * scale):
                raise InexactError(
                    f"{cells[cell].label}: {name} is {got.tolist()} with shortcuts and {value.tolist()} without."
                    " Please report the model and the call."
                )


def _along(grids: Grids, of: Callable[[Entry], Any]) -> dict[str, tuple[Any, ...]]:
    """Something of each entry, by axis; of heads those of the component that has most."""
    found: dict[str, tuple[Any, ...]] = {}
    for grid in grids.grids:
        for axis, entries in grid.entries.items():
            if len(entries) > len(found.get(axis, ())):
                found[axis] = tuple(of(entry) for entry in entries)
    return found


def _settings(
    pair: Pair, components: Sequence[str], axes: Sequence[Axis], kind: Any, subsets: Subsets
) -> dict[str, Any]:
    """What was asked for, as JSON has it."""
    return {
        "model": type(pair.model).__name__,
        "version": __version__,
        "components": list(components),
        "axes": list(axes),
        "direction": pair.direction,
        "value": kind if isinstance(kind, (str, int, float)) else type(kind).__name__,
        "window": {str(axis): width for axis, width in subsets.windows.items()},
    }
