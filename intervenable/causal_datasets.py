"""Data sets that a causal model makes: inputs with answers, and pairs of inputs with the answer of an
interchange."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, product
from typing import TYPE_CHECKING, Any

from intervenable.causal_model import CausalModel
from intervenable.causal_sampling import (
    TRIES,
    Sampler,
    chosen_variables,
    drawing,
    fits,
    possible_values,
)
from intervenable.causal_values import Setting, same
from intervenable.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Counterfactual:
    """A base, sources, and what becomes of the base when some variables are as in the sources."""

    base: Setting
    """The values of all variables for the base."""

    sources: Mapping[str, Setting]
    """For each variable that is set by hand the values of all variables for its source."""

    result: Setting
    """The values of all variables for the base with those set by hand."""

    variables: tuple[str, ...]
    """Every variable that the data set is about, whether or not this example sets it."""

    subset: int
    """Which of the combinations of variables is set here."""


def factual_settings(
    model: CausalModel,
    size: int,
    seed: int,
    sampler: Sampler,
    filter: Callable[[Setting], bool] | None = None,
) -> list[dict[str, Any]]:
    """The values of all variables for so many inputs, drawn at random."""
    _check_size(size)
    rng, draw = random.Random(seed), drawing(model, sampler)
    found: list[dict[str, Any]] = []
    for _ in range(size):
        for _ in range(TRIES):
            inputs = draw(rng, {})
            if inputs is None:
                continue
            setting = model.run(inputs)
            if filter is None or filter(setting):
                found.append(setting)
                break
        else:
            raise InputError(
                f"Of {TRIES} inputs that were drawn in a row, the filter keeps none. Is there one?"
            )
    return found


def draw_counterfactuals(
    model: CausalModel,
    size: int,
    variables: str | Sequence[str] | None,
    seed: int,
    *,
    subsets: Sequence[Sequence[str]] | None = None,
    batch_size: int = 1,
    balance: bool = False,
    distinct: bool = False,
    sampler: Sampler = "balanced",
    shared: Sequence[str] = (),
    another: Sequence[str] = (),
    filter: Callable[[Counterfactual], bool] | None = None,
) -> list[Counterfactual]:
    """So many counterfactuals, drawn at random; see `CausalModel.counterfactual_dataset`.

    Args:
        distinct: No two with the same inputs that set the same variables.
        shared: Inputs that a source has from its base.
        another: Inputs in which a source differs from its base.
    """
    _check_size(size)
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: it must be 1 or more.")
    if variables is None and subsets is not None:
        variables = tuple(dict.fromkeys(chain.from_iterable(subsets)))
    names = chosen_variables(model, variables)
    sets = _subsets(names, subsets)
    rng = random.Random(seed)
    pairs = _Pairs(model, names, sets, sampler, shared, another)
    answers: list[tuple[Setting, Setting]] = _answers(model, size, rng) if balance else [({}, {})] * size
    seen: set[Any] = set()
    found: list[Counterfactual] = []
    which = 0
    for row, (before, after) in enumerate(answers):
        if row % batch_size == 0:
            which = rng.randrange(len(sets))
        for _ in range(TRIES):
            drawn = pairs.draw(rng, which, before)
            if drawn is None or not fits(drawn.result, after) or not (filter is None or filter(drawn)):
                continue
            key = _key(model, drawn) if distinct else None
            if key is None or key not in seen:
                seen.add(key)
                found.append(drawn)
                break
        else:
            raise InputError(_nothing(row, before, after, distinct, sets[which]))
    return found


class _Pairs:
    """Draws one counterfactual."""

    def __init__(
        self,
        model: CausalModel,
        names: tuple[str, ...],
        sets: Sequence[tuple[str, ...]],
        sampler: Sampler,
        shared: Sequence[str],
        another: Sequence[str],
    ) -> None:
        self.model, self.names, self.sets = model, names, sets
        self.shared, self.another = tuple(shared), tuple(another)
        self.input = drawing(model, sampler)
        # Only where inputs are drawn for a value can each value of a variable occur equally often.
        self.goals = {name: possible_values(model, name) for name in names} if sampler == "balanced" else {}

    def draw(self, rng: random.Random, which: int, answer: Setting) -> Counterfactual | None:
        """A base, its sources and what becomes of it; None where a source is not as it should be."""
        base = self._run(rng, {})
        if base is None or not fits(base, answer):
            return None
        kept = {name: base[name] for name in self.shared}
        sources: dict[str, Setting] = {}
        for name in self.sets[which]:
            goal = {**kept, name: rng.choice(self.goals[name])} if self.goals else kept
            source = self._run(rng, goal)
            if source is None or not fits(source, goal):
                return None
            if any(same(source[other], base[other]) for other in self.another):
                return None
            sources[name] = source
        forced = {name: source[name] for name, source in sources.items()}
        inputs = {name: base[name] for name in self.model.inputs}
        return Counterfactual(base, sources, self.model.run({**inputs, **forced}), self.names, which)

    def _run(self, rng: random.Random, goal: Setting) -> Setting | None:
        inputs = self.input(rng, goal)
        return None if inputs is None else self.model.run(inputs)


def _subsets(names: tuple[str, ...], subsets: Sequence[Sequence[str]] | None) -> list[tuple[str, ...]]:
    if subsets is None:
        return [subset for count in range(1, len(names) + 1) for subset in combinations(names, count)]
    if isinstance(subsets, str) or any(isinstance(subset, str) for subset in subsets):
        raise InputError(f"subsets={subsets!r} is no list of lists of variables, such as [['WX'], ['YZ']].")
    listed = [tuple(subset) for subset in subsets]
    strange = [name for subset in listed for name in subset if name not in names]
    if strange or not listed or not all(listed):
        what = f"names {strange[0]!r}, which is not among them" if strange else "leaves one without variables"
        raise InputError(
            f"subsets={subsets!r} {what}. Combine {', '.join(map(repr, names))}, at least one each."
        )
    return listed


def _answers(model: CausalModel, size: int, rng: random.Random) -> list[tuple[Setting, Setting]]:
    """The output that each example is to have without and with the intervention, in random order."""
    name = model.output
    try:
        values: Sequence[Any] = possible_values(model, name)
    except InputError:  # too many settings to find out
        values = model.domains[name].listed("have each equally often")
    pairs = list(product(values, values))
    wanted = [tuple({name: value} for value in pairs[row % len(pairs)]) for row in range(size)]
    rng.shuffle(wanted)
    return [(before, after) for before, after in wanted]


def _key(model: CausalModel, drawn: Counterfactual) -> Any:
    runs = (drawn.base, *drawn.sources.values())
    return drawn.subset, tuple(repr(run[name]) for run in runs for name in model.inputs)


def _nothing(row: int, before: Setting, after: Setting, distinct: bool, names: tuple[str, ...]) -> str:
    about = " and ".join(map(repr, names))
    changes = [f"{name} from {before[name]!r} to {after[name]!r}" for name in after]
    conditions = [*(f"takes {change}" for change in changes), *["is not there yet"] * distinct]
    wanted = f" that {' and '.join(conditions)}" if conditions else ""
    hint = ", without balance=True" if changes else ""
    return (
        f"After {row} counterfactuals, {TRIES} draws in a row gave no other one about {about}{wanted}. Ask for"
        f" fewer, or for less{hint}."
    )


def _check_size(size: object) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"size={size!r}: it must be a whole number, 1 or more.")


# --- columns --------------------------------------------------------------------------------------------------

Columns = dict[str, list[Any]]


def factual_columns(
    settings: Sequence[Setting], encode: Callable[[Setting], Any], label: Callable[[Setting], Any]
) -> Columns:
    """`input_ids` and `labels` of settings."""
    return {"input_ids": [encode(row) for row in settings], "labels": [label(row) for row in settings]}


def counterfactual_columns(
    drawn: Sequence[Counterfactual], encode: Callable[[Setting], Any], label: Callable[[Setting], Any]
) -> Columns:
    """The columns of counterfactuals; of several variables a source each, and a mask.

    A variable that is not set has the base as its source: an interchange with it changes nothing, unless it lies
    behind one that is set.
    """
    columns: Columns = {
        "input_ids": [encode(row.base) for row in drawn],
        "source_input_ids": [],
        "labels": [label(row.result) for row in drawn],
        "base_labels": [label(row.base) for row in drawn],
        "source_labels": [],
        "intervention_id": [row.subset for row in drawn],
    }
    several = len(drawn[0].variables) > 1
    if several:
        columns["source_mask"] = [[name in row.sources for name in row.variables] for row in drawn]
    for index, row in enumerate(drawn):
        base = columns["input_ids"][index]
        runs = [row.sources.get(name) for name in row.variables]
        inputs = [base if run is None else encode(run) for run in runs]
        answers = [label(row.base if run is None else run) for run in runs]
        columns["source_input_ids"].append(inputs if several else inputs[0])
        columns["source_labels"].append(answers if several else answers[0])
    return columns


def vector_dataset(columns: Columns) -> Dataset:
    """Columns of numbers as a data set, floats in float32."""
    from datasets import Dataset, Features, Sequence, Value

    number, whole, truth = Value("float32"), Value("int64"), Value("bool")
    several = "source_mask" in columns
    kinds = {
        "input_ids": Sequence(number),
        "source_input_ids": Sequence(Sequence(number)) if several else Sequence(number),
        "source_labels": Sequence(whole) if several else whole,
        "source_mask": Sequence(truth),
    }
    features = Features({name: kinds.get(name, whole) for name in columns})
    return Dataset.from_dict(columns, features=features)
