"""The figures of `benchmarks.sweep` as text, and as tables for the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from benchmarks.overhead import aligned
from benchmarks.sweep_arithmetic import Limit
from benchmarks.sweep_contenders import HOOKS, OURS
from benchmarks.sweep_growth import Growth
from benchmarks.sweep_memory import PLAIN, Memory
from benchmarks.sweep_turns import Result

Table = list[list[str]]


@dataclass(frozen=True)
class Figures:
    """All that was measured, in order."""

    results: list[Result] = field(default_factory=list)
    limits: list[Limit] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)


def as_text(figures: Figures) -> str:
    tables = [contenders_in_rows(figures), *smaller_tables(figures)]
    return "\n\n".join(aligned(table) for table in tables if len(table) > 1)


def as_markdown(figures: Figures) -> str:
    tables = [contenders_by_case(figures), *smaller_tables(figures)]
    return "\n\n".join(markdown(table) for table in tables if len(table) > 1)


def markdown(table: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])


def contenders_in_rows(figures: Figures) -> Table:
    """A row for each contender of each sweep, with everything that is known of it."""
    rows = [["model", "prompts", "sweep", "contender", "CPU s", "ratio to ours", "numbers differ by"]]
    for result in figures.results:
        rows.append(
            [
                result.model,
                result.prompts,
                f"{result.sweep}, {result.cells} cells",
                result.contender,
                result.seconds.text(".3f"),
                result.ratio.text(".1f", "x") if result.ratio else "",
                f"{result.difference:.1e}",
            ]
        )
    return rows


def contenders_by_case(figures: Figures) -> Table:
    """A row for each contender, a column for each sweep: seconds, and the ratio to this library."""
    results = figures.results
    cases = list(dict.fromkeys((r.model, r.prompts, r.sweep, r.cells) for r in results))
    found = {(r.contender, r.model, r.prompts, r.sweep, r.cells): r for r in results}
    rows = [["", *(f"{m}, {p}: {s}, {cells} cells" for m, p, s, cells in cases)]] if cases else []
    for label in dict.fromkeys(result.contender for result in results):
        row = [label]
        for case in cases:
            result = found[label, *case]
            ratio = f", {result.ratio.text('.1f', 'x')}" if result.ratio and label != OURS else ""
            row.append(f"{result.seconds.median:.3g} s{ratio}")
        rows.append(row)
    return rows


def smaller_tables(figures: Figures) -> Iterator[Table]:
    """The tables that are the same in both forms."""
    yield limits_beside_measured(figures)
    yield peaks_beside_allowed(figures.memory)
    for model, varied in dict.fromkeys((size.model, size.varied) for size in figures.growth):
        yield growth_of([size for size in figures.growth if (size.model, size.varied) == (model, varied)])


def limits_beside_measured(figures: Figures) -> Table:
    measured = {(r.model, r.prompts, r.sweep, r.contender): r for r in figures.results}
    rows = [["limits", "sweep", "10^9 multiply-adds of the hooks", "that patches can change", "ratio"]]
    rows[0] += ["measured", "s at full rate", "ours, s"]
    for limit in figures.limits:
        case = (limit.model, limit.prompts, limit.sweep)
        hooks, ours = measured[*case, HOOKS], measured.get((*case, OURS))
        rows.append(
            [
                f"{limit.model}, {limit.prompts}",
                limit.sweep,
                f"{limit.by_hooks / 1e9:.3g}",
                f"{limit.changed / 1e9:.3g}",
                f"{limit.ratio:.1f}x",
                f"{hooks.ratio.median:.1f}x" if hooks.ratio else "",
                f"{limit.busy_seconds:.3g}",
                f"{ours.seconds.median:.3g}" if ours else "",
            ]
        )
    return rows


def peaks_beside_allowed(peaks: Sequence[Memory]) -> Table:
    plain = {(p.model, p.prompts, p.sweep): p.peak for p in peaks if p.job == PLAIN}
    rows = [["memory", "sweep", "", "peak, MB", "over a plain pass, MB", "1.5 x plain + budget, MB"]]
    for entry in peaks:
        base = plain[entry.model, entry.prompts, entry.sweep]
        rows.append(
            [
                f"{entry.model}, {entry.prompts}",
                entry.sweep,
                entry.job,
                f"{entry.peak:.0f}",
                f"{entry.peak - base:+.0f}",
                f"{1.5 * base + entry.budget:.0f}" if entry.budget else "",
            ]
        )
    return rows


def growth_of(sizes: Sequence[Growth]) -> Table:
    """The sizes of one thing that was varied, and what grew how many times from the first of them."""
    first = sizes[0]
    rows = [[f"{first.model}, {first.varied}", "cells", "hooks, s", "ours, s", "ratio"]]
    rows[0] += [f"{first.varied} grew", "hooks grew", "ours grew"]
    for size in sizes:
        rows.append(
            [
                str(size.value),
                str(size.cells),
                f"{size.hooks:.3g}",
                f"{size.ours:.3g}",
                f"{size.hooks / size.ours:.1f}x",
                f"{size.value / first.value:.1f}x",
                f"{size.hooks / first.hooks:.1f}x",
                f"{size.ours / first.ours:.1f}x",
            ]
        )
    return rows
