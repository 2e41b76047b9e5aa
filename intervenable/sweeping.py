"""`sweep`: patch every layer, token or head in turn, and see what becomes of the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from intervenable.binding import Places
from intervenable.compiled import uncompiled
from intervenable.metrics import as_metrics
from intervenable.progress import Progress
from intervenable.sweep_axes import Axis, read_axes
from intervenable.sweep_cells import all_cells
from intervenable.sweep_checkpoints import Checkpoints
from intervenable.sweep_edits import changed_cells, edits_of, first_difference
from intervenable.sweep_fingerprint import fingerprint, settings_of
from intervenable.sweep_grids import Grids, Subsets, make_grids, model_blocks, read_components
from intervenable.sweep_layouts import with_layouts
from intervenable.sweep_measuring import Found, check_cells, make_reader, measured_wave, read_check
from intervenable.sweep_pairs import Direction, Pair
from intervenable.sweep_result import SweepResult
from intervenable.sweep_runs import PlainRuns, PlainWaves, Unpatched
from intervenable.sweep_sources import Source, read_value, swaps
from intervenable.sweep_start import Start, start
from intervenable.sweep_values import Edits
from intervenable.wave import Recorded, Waves
from intervenable.wave_budget import bytes_of
from intervenable.wave_learning import knowledge_of
from intervenable.wave_plan import Blocks
from intervenable.wave_readout import Reading, largest


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
        >>> result.values.shape, bool((result.values[0, 3] - result.baseline_clean).abs() < 1e-4)
        (torch.Size([6, 5]), True)
    """
    asked = read_axes(axes)
    given: dict[Axis, Any] = {"layer": layers, "pos": positions, "head": heads, "query": queries, "key": keys}
    subsets = Subsets.of(given, window, asked)
    checked = read_check(exact_check)
    budget, metrics, kind = bytes_of(memory), as_metrics(metric), read_value(value)
    pair = Pair.of(model, clean, corrupted, direction, swaps(kind))
    components = read_components(component, pair.model)
    source = Source.of(kind, pair, reference, seed)
    places = Places(pair.model)
    grids = make_grids(places, components, asked, subsets, pair, source.paired, align, tokenizer)

    grids = replace(grids, sites=with_layouts(pair.model, pair.base.base, grids.sites))
    cells = all_cells(grids.grids)
    differs = first_difference(pair, source, align)
    blocks = model_blocks(places, components)
    begun = start(pair, grids.sites, swaps(kind), blocks)
    base, other = begun.base, begun.other
    edits = edits_of(cells, grids, base, source.values(base, other, grids.sites), differs)
    reader, rest = make_reader(metrics, pair, begun)
    reading = Reading(reader.positions, reader.tokens, base.shape[1])
    baseline = reader.measure(reading.of_run(base), "the run that is patched, without a patch")

    plain = PlainRuns(pair.model, base, edits)
    with uncompiled(pair.model):  # it compares runs with hooks and without
        engine = _engine(begun, blocks, edits, reading, plain, changed_cells(edits), components, budget)
    about = settings_of(pair, components, asked, kind, subsets)
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
    found = Found(cells, baseline)
    with (
        uncompiled(pair.model),
        _kept(checkpoint, print_of, len(engine.waves)) as done,
        Progress(len(cells), progress, "sweep") as bar,
    ):
        bar.advance(len(cells) - sum(len(wave.cells) for wave in engine.waves), computed=False)
        for number, wave in enumerate(engine.waves):
            kept = None if done is None else done.read(number)
            if kept is None:
                before = engine.used.copy()
                measured = measured_wave(wave, engine.run(wave), reader, plain, cells)
                if done is not None:
                    done.write(number, measured, engine.used - before)
            else:
                measured = kept.results
                engine.used.update(kept.ways)
            found.put(wave.cells, measured)
            bar.advance(len(wave.cells), computed=kept is None)
    if checked:
        check_cells(checked, found, plain, reader, cells, seed)
    clean_values, corrupted_values = (baseline, rest) if pair.noising else (rest, baseline)
    return SweepResult(
        axes=tuple(asked),
        labels=grids.along(lambda entry: entry.label),
        entries=grids.along(lambda entry: entry.stands_for),
        results=found.by_component(),
        clean=clean_values,
        corrupted=corrupted_values,
        shortcuts=(*_shortcuts(engine, len(cells), reading), *_other_lengths(base, grids)),
        settings=about,
    )


def _kept(
    folder: str | Path | None, print_of: Mapping[str, Any], waves: int
) -> AbstractContextManager[Checkpoints | None]:
    return nullcontext() if folder is None else Checkpoints(folder, print_of, waves)


# --- the cells --------------------------------------------------------------------------------------------


def _engine(
    begun: Start,
    blocks: Blocks,
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
    learnt = knowledge_of(base.model, tracks.inputs)
    return Waves(
        base.model, blocks, recorded, edits, first, reading, plain, learnt, tuple(components), memory
    )


def _shortcuts(engine: Waves | PlainWaves, cells: int, reading: Reading) -> tuple[str, ...]:
    """What was left out, and what was not."""
    run = sum(engine.used.values())
    notes = [f"{cells - run} of {cells} cells change nothing and were not run."] if run < cells else []
    notes += [f"{count} of {cells} cells were computed {way}." for way, count in engine.used.items()]
    what = "" if reading.tokens is None else f" for {len(reading.tokens)} token(s)"
    notes.append(f"Logits were computed at {len(reading.positions)} of {reading.length} positions{what}.")
    return tuple(notes)


def _other_lengths(base: Unpatched, grids: Grids) -> Iterator[str]:
    """Which components have other positions than the tokens of the prompt."""
    for grid in grids.grids:
        layer = next(iter(grid.sites))
        site = grids.sites[grid.component, layer]
        there = base.values[grid.component, layer][0].shape[-2]
        tokens = base.plan.base.of(site.stack).length
        if there != tokens:
            yield f"{grid.component} has {there} positions for {tokens} tokens: 'pos' counts its positions."
