"""What a call did to a model, and what it is going to do: one line for each intervention and example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from intervenable.binding import BoundRepresentation
from intervenable.inputs import RunInputs
from intervenable.plan import Plan
from intervenable.position_resolver import PositionResolver
from intervenable.runs import Fired
from intervenable.token_text import Decodes
from intervenable.units import Units, Whole


@dataclass(frozen=True)
class ReceiptLine:
    """One intervention in one example."""

    name: str
    """Name of the representation."""

    intervention: str
    """Class of the intervention."""

    example: int
    """Which example of the batch."""

    site: str
    """Path of the module, and whether its input or its output was touched."""

    positions: tuple[int, ...] | None
    """Positions, counted in real tokens; None for all of them."""

    heads: tuple[int, ...] | None
    """Heads; None if the component has none, or for all of them."""

    tokens: tuple[str, ...] | None
    """The tokens at these positions, or keys; None if no tokenizer is known."""

    fired: int
    """How often the intervention was applied."""

    change: float
    """Euclidean norm of what it changed, all units of the example together."""

    queries: tuple[int, ...] | None = None
    """Rows of an attention matrix, counted in real tokens; None for all of them."""

    keys: tuple[int, ...] | None = None
    """Columns of an attention matrix, counted in real tokens; None for all of them."""

    query_tokens: tuple[str, ...] | None = None
    """The tokens at these queries; None if no tokenizer is known, or for all of them."""

    relation: str | None = None
    """Which of the entries are meant: `self` or `others`; None for all of them."""


class Receipt(Sequence[ReceiptLine]):
    """What was touched, how often and by how much; prints as a table.

    The lines are made when they are first looked at.
    """

    def __init__(self, plan: Plan, fired: Sequence[Fired], tokenizer: Decodes | None) -> None:
        self._plan = plan
        self._fired = tuple(fired)
        self._tokenizer = tokenizer
        self._lines: tuple[ReceiptLine, ...] | None = None

    @property
    def lines(self) -> tuple[ReceiptLine, ...]:
        """All lines: interventions in declared order, and the examples of each."""
        if self._lines is None:
            self._lines = tuple(self._made())
        return self._lines

    @property
    def skipped(self) -> tuple[str, ...]:
        """Names of the interventions that the call left out."""
        return tuple(entry.name for entry in self._plan.skipped)

    def _made(self) -> Iterator[ReceiptLine]:
        base = self._plan.base
        for edit, record in zip(self._plan.edits, self._fired, strict=True):
            examples = base.of(edit.bound.site.stack).batch
            for example, change in enumerate(record.change(examples).tolist()):
                yield ReceiptLine(
                    name=edit.bound.name,
                    intervention=type(edit.bound.intervention).__name__,
                    example=example,
                    site=site_text(edit.bound),
                    fired=record.times,
                    change=change,
                    **units_of(edit.bound, edit.units, base, example, self._tokenizer),
                )

    @overload
    def __getitem__(self, index: int) -> ReceiptLine: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[ReceiptLine]: ...
    def __getitem__(self, index: int | slice) -> ReceiptLine | Sequence[ReceiptLine]:
        return self.lines[index]

    def __len__(self) -> int:
        return len(self.lines)

    def __str__(self) -> str:
        rows = [("intervention", "example", "site", "units", "tokens", "fired", "change")]
        rows += [
            (
                line.name,
                str(line.example),
                line.site,
                units_text(vars(line)),
                tokens_text(line.tokens, line.query_tokens),
                str(line.fired),
                f"{line.change:.4g}",
            )
            for line in self
        ]
        skipped = f"\nskipped: {', '.join(self.skipped)}" if self.skipped else ""
        return table(rows) + skipped

    __repr__ = __str__


class Explanation(Sequence[dict[str, str]]):
    """The plan of a call as rows; prints as a table."""

    COLUMNS = ("name", "intervention", "layer", "component", "module", "unit", "touches", "fed by")

    def __init__(self, plan: Plan, tokenizer: Decodes | None) -> None:
        self.rows = [*_planned(plan, tokenizer), *map(_left_out, plan.skipped)]

    @overload
    def __getitem__(self, index: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, str]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, str] | Sequence[dict[str, str]]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return table([self.COLUMNS, *(tuple(row[column] for column in self.COLUMNS) for row in self.rows)])

    def __repr__(self) -> str:
        return f"<Explanation of {len(self)} interventions>"


def _planned(plan: Plan, tokenizer: Decodes | None) -> Iterator[dict[str, str]]:
    feeds = {capture.bound.index: (run, capture) for run in plan.source_runs for capture in run.captures}
    for edit in plan.edits:
        fed = "constant" if edit.constant is not None else "nothing"
        if edit.bound.intervention.source_representation is not None and edit.constant is None:
            fed = "its own constant"
        if edit.bound.index in feeds:
            run, capture = feeds[edit.bound.index]
            fed = f"{run.label}: {_touches(edit.bound, capture.units, run.inputs, tokenizer)}"
        yield {
            **_place(edit.bound),
            "touches": _touches(edit.bound, edit.units, plan.base, tokenizer),
            "fed by": fed,
        }


def _left_out(bound: BoundRepresentation) -> dict[str, str]:
    return {**_place(bound), "touches": "(skipped)", "fed by": "-"}


def _place(bound: BoundRepresentation) -> dict[str, str]:
    return {
        "name": bound.name,
        "intervention": type(bound.intervention).__name__,
        "layer": "-" if bound.site.layer is None else str(bound.site.layer),
        "component": bound.site.component,
        "module": site_text(bound),
        "unit": bound.config.unit,
    }


def _touches(
    bound: BoundRepresentation, units: Units | Whole, inputs: RunInputs, tokenizer: Decodes | None
) -> str:
    """The units of every example: one text if they are all alike."""
    texts = []
    examples = len(units) if isinstance(units, Units) else inputs.batch
    for example in range(examples):
        found = units_of(bound, units, inputs, example, tokenizer)
        text = units_text(found)
        named = isinstance(units, Units) and (units.positions or units.queries)
        tokens = found["tokens"] if named else None
        texts.append(f"{text} {tokens_text(tokens, found['query_tokens'])}" if tokens else text)
    if len(set(texts)) == 1:
        return texts[0]
    return "; ".join(f"[{example}] {text}" for example, text in enumerate(texts))


def units_of(
    bound: BoundRepresentation,
    units: Units | Whole,
    inputs: RunInputs,
    example: int,
    tokenizer: Decodes | None,
) -> dict[str, Any]:
    """The units of one example, as a `ReceiptLine` has them."""
    levels = units.levels if isinstance(units, Units) else {}
    heads = levels.get("heads")
    rows, columns = inputs.of(bound.site.stack), inputs.of(bound.site.key_stack)
    found: dict[str, Any] = {
        "heads": None if heads is None else heads[example],
        "positions": _counted(levels.get("positions"), rows, example),
        "queries": _counted(levels.get("queries"), rows, example),
        "keys": _counted(levels.get("keys"), columns, example),
        "relation": units.relation if isinstance(units, Units) else None,
        "query_tokens": None,
    }
    if bound.site.matrix:
        found["tokens"] = _tokens_at(levels.get("keys"), columns, example, tokenizer)
    else:
        found["tokens"] = _tokens_at(levels.get("positions"), rows, example, tokenizer)
    if "queries" in levels:
        found["query_tokens"] = _tokens_at(levels["queries"], rows, example, tokenizer)
    return found


def site_text(bound: BoundRepresentation) -> str:
    """A site as module path and side."""
    if bound.site.kind == "inside":
        return f"inside {bound.site.path}"
    return f"{bound.site.path or '(the model)'}.{bound.site.side}"


def _counted(
    level: tuple[tuple[int, ...], ...] | None, inputs: RunInputs, example: int
) -> tuple[int, ...] | None:
    """Units of one example counted in real tokens (padding counts from -1 down); None for all."""
    real = inputs.real_positions
    if level is None or real is None:
        return None if level is None else level[example]
    counted = {index: position for position, index in enumerate(real[example])}
    return tuple(counted.get(index, -1) for index in level[example])


def _tokens_at(
    level: tuple[tuple[int, ...], ...] | None, inputs: RunInputs, example: int, tokenizer: Decodes | None
) -> tuple[str, ...] | None:
    """The text of each token that one example's units are at; None where there are no tokens or no tokenizer."""
    if isinstance(tokenizer, PositionResolver):
        tokenizer = tokenizer.tokenizer
    if tokenizer is None or inputs.input_ids is None:
        return None
    row = inputs.input_ids[example]
    if level is not None:
        indices: Sequence[int] = level[example]
    else:
        indices = range(inputs.length) if inputs.real_positions is None else inputs.real_positions[example]
    return tuple(tokenizer.decode([int(row[index])]) for index in indices)


def units_text(units: Mapping[str, Any]) -> str:
    """Units as text: `heads 1,2 x positions 4`, `heads 0 x queries 6 x keys 3`."""
    levels = ["queries", "keys"] if units["queries"] or units["keys"] else ["positions"]
    parts = [] if units["heads"] is None else [f"heads {','.join(map(str, units['heads']))}"]
    for level in levels:
        located = units[level]
        parts.append(f"all {level}" if located is None else f"{level} {','.join(map(str, located))}")
    if units["relation"] is not None:
        parts[-1] = {"self": "the key itself", "others": "all other keys"}[units["relation"]]
    return " x ".join(parts)


def tokens_text(tokens: Sequence[str] | None, queries: Sequence[str] | None = None) -> str:
    """Tokens as text, quoted so that spaces show; what queries read after an arrow."""
    read = "-" if tokens is None else " ".join(map(repr, tokens))
    return read if queries is None else f"{' '.join(map(repr, queries))} -> {read}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in aligned columns, the first as the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
