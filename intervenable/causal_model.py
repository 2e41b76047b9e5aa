"""`CausalModel`: variables, what each of them depends on, and what becomes of all when some are set."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import product
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from intervenable.causal_checks import (
    checked_names,
    checked_timesteps,
    longest_paths,
    read_domains,
    strangers,
    topological,
    unfit_functions,
)
from intervenable.causal_values import Domain, Setting, as_numbers
from intervenable.errors import (
    Fault,
    InputError,
    IntervenableError,
    UnknownNameError,
    raise_all,
    raise_listed,
    unknown_name,
)

if TYPE_CHECKING:
    from datasets import Dataset

    from intervenable.causal_datasets import Counterfactual
    from intervenable.causal_sampling import Sampler, Where
    from intervenable.drawing import Picture

Paths = dict[int, list[tuple[str, ...]]]

MOST_SETTINGS = 200_000
"""How many settings of a variable's parents are listed at most."""

_ELSEWHERE = {
    "generate_equiv_classes": "the property `equivalence_classes`",
    "sample_input_tree_balanced": "`sample_input(seed, balanced=True, where={'O': True})`",
    "find_live_paths": "`live_paths(inputs)`",
    "get_partial_filter": "`where={'O': True}` of the samplers, or `lambda setting: setting['O']`",
    "get_path_maxlen_filter": "`longest_path_filter(lengths)`",
    "get_specific_path_filter": "`path_filter(start, end)`",
    "generate_factual_dataset": "`factual_dataset(size, seed)`",
    "generate_counterfactual_dataset": "`counterfactual_dataset(size, variables, seed)`",
    "add_variable": "`with_variable(variable, values, parents, function)`, which returns a new model",
    "print_structure": "`draw()`",
    "print_setting": "`draw(setting)`",
}


class CausalModel:
    """Variables, the values they may take, their parents, and how each follows from its parents.

    Running it fills in all variables from the inputs. Interventions set some of them by hand; an interchange
    sets them to what they are for other inputs.

    Geiger et al. (2021), "Causal Abstractions of Neural Networks", https://arxiv.org/abs/2106.02997. Names and
    arguments are those of pyvene's class; what is computed is checked, nothing is shared between models, and
    whatever is drawn at random is drawn from a seed.

    Args:
        variables: Names of the variables. Inputs and outputs keep their order here.
        values: For each variable what it may be, such as `range(10)`; None, or no entry, if anything goes.
        parents: For each variable those that it depends on; an input has none, and may be left out.
        functions: For each variable its value as a function of its parents, in their order. That of an input takes
            nothing and is its default; without one, the input must be given.
        timesteps: For each variable when it is computed, parents before children. By default the length of the
            longest path from an input, and for outputs the end.
        equiv_classes: For some variables which settings of their parents make each value, where listing them
            all would take too long.
        pos: For some variables where they are drawn, as `(x, y)`.

    Raises:
        ConfigError: what was declared cannot be: a cycle, a function that takes another number of parents, a
            variable without a function. All faults are listed.
        UnknownNameError: a name that is none of the variables.

    Example:
        >>> model = CausalModel(
        ...     ["A", "B", "C"],
        ...     {name: [False, True] for name in "ABC"},
        ...     {"C": ["A", "B"]},
        ...     {"C": lambda a, b: a and b},
        ... )
        >>> model.run({"A": True, "B": False})
        {'A': True, 'B': False, 'C': False}
        >>> model.interchange({"A": True, "B": False}, {"B": {"A": False, "B": True}})
        {'A': True, 'B': True, 'C': True}
    """

    def __init__(
        self,
        variables: Sequence[str],
        values: Mapping[str, Sequence[Any] | None],
        parents: Mapping[str, Sequence[str]],
        functions: Mapping[str, Callable[..., Any]],
        timesteps: Mapping[str, int] | None = None,
        equiv_classes: Mapping[str, Mapping[Any, Sequence[Setting]]] | None = None,
        pos: Mapping[str, tuple[float, float]] | None = None,
    ) -> None:
        self.variables: tuple[str, ...] = checked_names(variables)
        raise_all(strangers(self.variables, locals()))
        self.parents: dict[str, tuple[str, ...]] = {
            name: tuple(parents.get(name, ())) for name in self.variables
        }
        self.functions: dict[str, Callable[..., Any]] = {
            name: functions[name] for name in self.variables if name in functions
        }
        domains, faults = read_domains(self.variables, values)
        raise_all([*faults, *unfit_functions(self.parents, self.functions)])
        self.domains: dict[str, Domain] = domains
        self.order: tuple[str, ...] = topological(self.parents)
        self.children: dict[str, tuple[str, ...]] = {
            name: tuple(child for child in self.variables if name in self.parents[child])
            for name in self.variables
        }
        self.timesteps: dict[str, int] = (
            longest_paths(self.parents, self.order)
            if timesteps is None
            else checked_timesteps(self.parents, timesteps)
        )
        self.pos: dict[str, tuple[float, float]] = dict(pos or {})
        self._given_classes = dict(equiv_classes or {})

    # --- what it is made of ---------------------------------------------------------------------------------

    @property
    def values(self) -> dict[str, Sequence[Any] | None]:
        """What each variable may be; None for anything."""
        return {name: domain.values for name, domain in self.domains.items()}

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The variables without parents."""
        return tuple(name for name in self.variables if not self.parents[name])

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """The variables without children."""
        return tuple(name for name in self.variables if not self.children[name])

    @cached_property
    def internal(self) -> tuple[str, ...]:
        """The variables between inputs and outputs, which a network may or may not have."""
        return tuple(name for name in self.variables if self.parents[name] and self.children[name])

    @property
    def output(self) -> str:
        """The one output.

        Raises:
            InputError: there are several.
        """
        if len(self.outputs) != 1:
            raise InputError(
                f"The model has {len(self.outputs)} outputs: {', '.join(self.outputs)}. Say which."
            )
        return self.outputs[0]

    def with_variable(
        self,
        variable: str,
        values: Sequence[Any] | None,
        parents: Sequence[str],
        function: Callable[..., Any] | None = None,
    ) -> CausalModel:
        """A model with one variable more; this one stays as it is.

        Raises:
            ConfigError: there is such a variable already, or it cannot be.

        Example:
            >>> model = CausalModel(["A"], {"A": range(3)}, {}, {})
            >>> model.with_variable("B", range(6), ["A"], lambda a: 2 * a).run({"A": 2})
            {'A': 2, 'B': 4}
        """
        functions = self.functions if function is None else {**self.functions, variable: function}
        return CausalModel(
            (*self.variables, variable),
            {**self.values, variable: values},
            {**self.parents, variable: parents},
            functions,
            equiv_classes=self._given_classes,
            pos=self.pos,
        )

    # --- running --------------------------------------------------------------------------------------------

    def run(self, setting: Setting | None = None) -> dict[str, Any]:
        """The values of all variables when some are set: inputs, and whatever else is forced.

        Args:
            setting: Values by variable. A variable that is not an input keeps the value given here whatever its
                parents are. An input without one takes that of its function.

        Raises:
            UnknownNameError: a name that is none of the variables.
            InputError: an input without a value, or a value that its variable cannot take. All are listed.

        Example:
            >>> model = CausalModel(["A", "B"], {}, {"B": ["A"]}, {"B": lambda a: a + 1})
            >>> model.run({"A": 1}), model.run({"A": 1, "B": 0})
            ({'A': 1, 'B': 2}, {'A': 1, 'B': 0})
        """
        given = self.checked(setting or {})
        missing = [name for name in self.inputs if name not in given and name not in self.functions]
        if missing:
            raise InputError(f"No value for {', '.join(map(repr, missing))}. Give one for each input.")
        found: dict[str, Any] = {}
        for name in self.order:
            found[name] = given[name] if name in given else self._computed(name, found)
        return {name: found[name] for name in self.variables}

    def interchange(self, base: Setting, sources: Mapping[str, Setting]) -> dict[str, Any]:
        """The values of all variables when some of them are set to what they are in runs of other inputs.

        Args:
            base: What the run itself is given.
            sources: For each variable that is set by hand the input in whose run it takes its value.

        Raises:
            UnknownNameError: a name that is none of the variables.
            InputError: an input without a value, or a value that its variable cannot take.

        Example:
            >>> add = lambda left, right: left + right
            >>> model = CausalModel(
            ...     ["X", "Y", "Z", "S", "O"], {}, {"S": ["X", "Y"], "O": ["S", "Z"]}, {"S": add, "O": add}
            ... )
            >>> model.interchange({"X": 1, "Y": 2, "Z": 3}, {"S": {"X": 4, "Y": 5, "Z": 6}})["O"]
            12
        """
        raise_all(self._unknown(sources))
        forced = {name: self.run(source)[name] for name, source in sources.items()}
        return self.run({**base, **forced})

    run_forward = run
    run_interchange = interchange

    def checked(self, setting: Setting) -> dict[str, Any]:
        """The setting with each value as it was declared.

        Raises:
            UnknownNameError: a name that is none of the variables.
            InputError: a value that its variable cannot take. All are listed.
        """
        raise_all(self._unknown(setting))
        found: dict[str, Any] = {}
        faults: list[IntervenableError] = []
        for name, value in setting.items():
            try:
                found[name] = self.domains[name].member(value)
            except InputError as error:
                faults.append(error)
        raise_listed(faults, "the setting")
        return found

    def _computed(self, name: str, found: Mapping[str, Any]) -> Any:
        arguments = [found[parent] for parent in self.parents[name]]
        value = self.functions[name](*arguments)
        try:
            return self.domains[name].member(value)
        except InputError as error:
            made_of = ", ".join(f"{parent}={found[parent]!r}" for parent in self.parents[name])
            raise InputError(
                f"The function of {name!r} returned {value!r} for {made_of or 'nothing'}: {error}"
            ) from None

    def _unknown(self, names: Mapping[str, Any]) -> list[Fault]:
        return [
            UnknownNameError(unknown_name("variable", name, self.variables))
            for name in names
            if name not in self.domains
        ]

    # --- all of them ----------------------------------------------------------------------------------------

    def input_settings(self) -> Iterator[dict[str, Any]]:
        """Every setting of the inputs, the last input changing fastest.

        Raises:
            InputError: an input that was declared without values.

        Example:
            >>> model = CausalModel(["A", "B"], {"A": [0, 1], "B": "xy"}, {}, {})
            >>> [tuple(setting.values()) for setting in model.input_settings()]
            [(0, 'x'), (0, 'y'), (1, 'x'), (1, 'y')]
        """
        columns = [self.domains[name].listed("list all inputs") for name in self.inputs]
        return (dict(zip(self.inputs, row, strict=True)) for row in product(*columns))

    @cached_property
    def equivalence_classes(self) -> dict[str, dict[Any, list[dict[str, Any]]]]:
        """For each variable but the inputs, and each of its values, the settings of its parents that make it.

        Raises:
            InputError: a variable without declared values, or too many settings to list.

        Example:
            >>> model = CausalModel(
            ...     ["A", "B", "C"], {name: [False, True] for name in "ABC"}, {"C": "AB"},
            ...     {"C": lambda a, b: a and b},
            ... )
            >>> model.equivalence_classes["C"][True]
            [{'A': True, 'B': True}]
        """
        return {name: self._classes(name) for name in self.order if self.parents[name]}

    @cached_property
    def possible_classes(self) -> dict[str, dict[Any, list[dict[str, Any]]]]:
        """The equivalence classes with only those settings that can come about themselves.

        Raises:
            InputError: as for `equivalence_classes`.
        """
        possible: dict[str, dict[Any, list[dict[str, Any]]]] = {}
        for name, classes in self.equivalence_classes.items():
            possible[name] = {
                value: [
                    row
                    for row in rows
                    if all(possible[parent][made] for parent, made in row.items() if parent in possible)
                ]
                for value, rows in classes.items()
            }
        return possible

    def _classes(self, name: str) -> dict[Any, list[dict[str, Any]]]:
        if name in self._given_classes:
            return {value: [dict(row) for row in rows] for value, rows in self._given_classes[name].items()}
        parents = self.parents[name]
        columns = [self.domains[parent].listed(f"list what makes {name!r}") for parent in parents]
        count = 1
        for column in columns:
            count *= len(column)
        if count > MOST_SETTINGS:
            raise InputError(
                f"The parents of {name!r} have {count} settings, more than {MOST_SETTINGS}. Draw with"
                f" sampler='uniform', or say in `equiv_classes` which settings make each value of {name!r}."
            )
        classes: dict[Any, list[dict[str, Any]]] = {
            value: [] for value in self.domains[name].listed("know which can be made")
        }
        for row in product(*columns):
            setting = dict(zip(parents, row, strict=True))
            classes[self._computed(name, setting)].append(setting)
        return classes

    def live_paths(self, inputs: Setting) -> Paths:
        """The paths along which a change would be felt, by how many variables they have.

        An edge is live where some value of the parent would change the child; a path is live where all its
        edges are.

        Raises:
            InputError: a variable on the way was declared without values.

        Example:
            >>> model = CausalModel(
            ...     ["A", "B", "C"], {name: [False, True] for name in "ABC"}, {"C": "AB"},
            ...     {"C": lambda a, b: a and b},
            ... )
            >>> model.live_paths({"A": True, "B": False})
            {2: [('B', 'C')]}
        """
        from intervenable.causal_paths import live_paths

        return live_paths(self, inputs)

    def longest_path_filter(self, lengths: int | Sequence[int]) -> Callable[[Setting], bool]:
        """Whether the longest live path has (one of) so many variables, as a function of a setting of all."""
        wanted = {lengths} if isinstance(lengths, int) else set(lengths)
        return lambda setting: max(self.live_paths(self._inputs_of(setting)), default=1) in wanted

    def path_filter(self, start: str, end: str) -> Callable[[Setting], bool]:
        """Whether a live path leads from one variable to another, as a function of a setting of all."""
        raise_all(self._unknown(dict.fromkeys((start, end))))
        return lambda setting: any(
            path[0] == start and path[-1] == end
            for paths in self.live_paths(self._inputs_of(setting)).values()
            for path in paths
        )

    def _inputs_of(self, setting: Setting) -> dict[str, Any]:
        return {name: setting[name] for name in self.inputs}

    # --- as numbers -----------------------------------------------------------------------------------------

    def input_to_tensor(self, setting: Setting) -> Tensor:
        """The inputs as floats, one after the other in the order of `inputs`."""
        return torch.tensor([number for name in self.inputs for number in as_numbers(setting[name])])

    def output_to_tensor(self, setting: Setting) -> Tensor:
        """The outputs as floats, one after the other in the order of `outputs`."""
        return torch.tensor([number for name in self.outputs for number in as_numbers(setting[name])])

    def label(self, setting: Setting, output: str | None = None) -> int:
        """The value of an output as the number of a class.

        A truth value or a whole number from 0 on is its own class. Where an output may be something else, the
        class is the place of its value among the declared ones.

        Raises:
            InputError: several outputs and none named, or a value that is no number of an output without values.

        Example:
            >>> model = CausalModel(["A"], {"A": ["red", "green"]}, {}, {})
            >>> model.label({"A": "green"})
            1
        """
        name = self.output if output is None else output
        domain = self.domains[name]
        if all(_is_class(value) for value in domain.values or (setting[name],)):
            return int(setting[name])
        place = domain.place(setting[name])
        if place is None:
            raise InputError(
                f"{setting[name]!r} is no class: {name!r} was declared without values. List them."
            )
        return place

    # --- at random ------------------------------------------------------------------------------------------

    def sample_input(
        self, seed: int | random.Random = 0, *, where: Where = None, balanced: bool = False
    ) -> dict[str, Any]:
        """Values for the inputs, drawn at random.

        Args:
            seed: The same seed gives the same inputs. A `random.Random` goes on where it is.
            where: What must hold in the run of what is drawn: values by variable, or a function of all values that
                says so.
            balanced: Draw an output first, each of its values equally often, and then what makes it, down to the
                inputs. Otherwise each input is drawn by itself.

        Raises:
            InputError: nothing that was drawn fits, or an input without declared values.

        Example:
            >>> names = "ABC"
            >>> model = CausalModel(
            ...     names, {name: [False, True] for name in names}, {"C": "AB"}, {"C": lambda a, b: a and b}
            ... )
            >>> model.sample_input(where={"C": True})
            {'A': True, 'B': True}
        """
        from intervenable.causal_sampling import sample_input

        return sample_input(self, seed, where, balanced)

    def sample_intervention(
        self, seed: int | random.Random = 0, variables: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Values for some of the internal variables, at least one, drawn at random.

        Args:
            seed: The same seed gives the same intervention. A `random.Random` goes on where it is.
            variables: To choose among; by default the internal ones.

        Raises:
            InputError: there are none to choose among, or one without declared values.
        """
        from intervenable.causal_sampling import sample_intervention

        return sample_intervention(self, seed, variables)

    # --- data sets and pictures -----------------------------------------------------------------------------

    def factual_dataset(
        self,
        size: int,
        seed: int = 0,
        *,
        sampler: Sampler = "uniform",
        filter: Callable[[Setting], bool] | None = None,
        encode: Callable[[Setting], Sequence[float]] | None = None,
        label: Callable[[Setting], int] | None = None,
    ) -> Dataset:
        """Inputs with the answers that the model gives, to train a network with.

        Args:
            size: How many examples.
            seed: The same seed gives the same examples.
            sampler: `"uniform"` draws each input by itself, `"balanced"` each output equally often; or a
                function of a `random.Random` and the values that must come out, returning inputs.
            filter: Keeps the examples for whose values, all of them, it is true.
            encode: The inputs as numbers; by default one after the other.
            label: The answer as a class; by default `label`.

        Returns:
            Columns `input_ids` (floats) and `labels`.

        Raises:
            InputError: nothing that was drawn fits.

        Example:
            >>> names = "ABC"
            >>> model = CausalModel(
            ...     names, {name: [False, True] for name in names}, {"C": "AB"}, {"C": lambda a, b: a and b}
            ... )
            >>> model.factual_dataset(3, sampler="balanced").column_names
            ['input_ids', 'labels']
        """
        from intervenable.causal_datasets import factual_columns, factual_settings, vector_dataset

        settings = factual_settings(self, size, seed, sampler, filter)
        return vector_dataset(factual_columns(settings, _encoding(self, encode), label or self.label))

    def counterfactual_dataset(
        self,
        size: int,
        variables: str | Sequence[str] | None = None,
        seed: int = 0,
        *,
        subsets: Sequence[Sequence[str]] | None = None,
        batch_size: int = 1,
        balance: bool = False,
        sampler: Sampler = "balanced",
        filter: Callable[[Counterfactual], bool] | None = None,
        encode: Callable[[Setting], Sequence[float]] | None = None,
        label: Callable[[Setting], int] | None = None,
    ) -> Dataset:
        """Pairs of inputs with the answer to the one when some variables are as in the other.

        Args:
            size: How many examples.
            variables: Which variables take their values from sources, each from one of its own; by default the
                internal ones. An example is about some of them, at least one.
            seed: The same seed gives the same examples.
            subsets: Which of them together, `[["WX"], ["YZ"]]` for one at a time; by default every combination.
            batch_size: So many consecutive examples are about the same variables.
            balance: Every pair of answers, without the intervention and with it, equally often, to within one: an
                answer can then not be guessed from the one before.
            sampler: As for `factual_dataset`; a balanced one also draws each value of a variable that is set equally
                often.
            filter: Keeps the examples for which it is true.
            encode: The inputs as numbers; by default one after the other.
            label: The answer as a class; by default `label`.

        Returns:
            Columns `input_ids`, `labels` (the answer with the intervention), `base_labels` (without),
            `source_input_ids`, `source_labels` (the answers to the sources) and `intervention_id` (which of
            `subsets`). With several variables the sources are `[variables, numbers]` and their answers
            `[variables]`, in the order of `variables`; `source_mask` says which of these the example is about,
            and the others have the base as source: that changes nothing, unless they lie behind one that is set.

        Raises:
            UnknownNameError: a name that is none of the variables.
            InputError: no variables, or nothing that was drawn fits.

        Example:
            >>> add = lambda left, right: left + right
            >>> model = CausalModel(
            ...     ["X", "Y", "Z", "S", "O"],
            ...     {"X": range(3), "Y": range(3), "Z": range(3), "S": range(5), "O": range(7)},
            ...     {"S": ["X", "Y"], "O": ["S", "Z"]},
            ...     {"S": add, "O": add},
            ... )
            >>> row = model.counterfactual_dataset(1)[0]
            >>> row["labels"] == sum(row["source_input_ids"][:2]) + row["input_ids"][2]
            True
        """
        from intervenable.causal_datasets import counterfactual_columns, draw_counterfactuals, vector_dataset

        drawn = draw_counterfactuals(
            self,
            size,
            variables,
            seed,
            subsets=subsets,
            batch_size=batch_size,
            balance=balance,
            sampler=sampler,
            filter=filter,
        )
        return vector_dataset(counterfactual_columns(drawn, _encoding(self, encode), label or self.label))

    def draw(self, setting: Setting | None = None, *, title: str = "") -> Picture:
        """The graph as a picture, inputs on the left; with a setting, the values of all variables in it.

        Args:
            setting: As for `run`. What is set beside the inputs has a bold frame.
            title: A line above.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from intervenable.causal_drawing import draw_model

        return draw_model(self, setting, title)

    def __getattr__(self, name: str) -> Any:
        hint = f" Here it is {_ELSEWHERE[name]}." if name in _ELSEWHERE else ""
        raise AttributeError(f"CausalModel has no {name!r}.{hint}")

    def __repr__(self) -> str:
        edges = [f"{name} <- {', '.join(self.parents[name])}" for name in self.order if self.parents[name]]
        return f"CausalModel(inputs {', '.join(self.inputs)}; {'; '.join(edges) or 'nothing else'})"


def _encoding(
    model: CausalModel, encode: Callable[[Setting], Sequence[float]] | None
) -> Callable[[Setting], Sequence[float]]:
    if encode is not None:
        return encode
    return lambda setting: [number for name in model.inputs for number in as_numbers(setting[name])]


def _is_class(value: Any) -> bool:
    return isinstance(value, (Integral, np.bool_)) and int(value) >= 0
