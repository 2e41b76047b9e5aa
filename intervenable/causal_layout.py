"""Where the variables of a causal model are drawn: a column a time step, few crossings. Without any drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from intervenable.causal_model import CausalModel

Node = str | tuple[str, str, int]
"""A variable, or the bend at a column of a line that passes by it: parent, child, column."""

SWEEPS = 8


@dataclass(frozen=True)
class Layout:
    """Places of variables, and by which bends lines go."""

    places: Mapping[Node, tuple[float, float]]
    """Column and row, counted from 0."""

    routes: tuple[tuple[Node, ...], ...]
    """For each edge the parent, the bends, and the child."""

    @property
    def corner(self) -> tuple[float, float]:
        """The least column and row."""
        return min(x for x, _ in self.places.values()), min(y for _, y in self.places.values())

    @property
    def extent(self) -> tuple[float, float]:
        """How many columns and rows lie between the first and the last."""
        left, bottom = self.corner
        return max(x for x, _ in self.places.values()) - left, max(
            y for _, y in self.places.values()
        ) - bottom


def laid_out(model: CausalModel) -> Layout:
    """Places of all variables: those that the model says, and otherwise columns by time step.

    A line over several columns bends in each of them, where it takes a row like a variable, so that it meets no box.
    Rows are ordered by the mean row of the neighbours, from the left and from the right in turn, after Sugiyama et
    al. (1981), "Methods for Visual Understanding of Hierarchical System Structures".

    Example:
        >>> from intervenable.causal_model import CausalModel
        >>> model = CausalModel(["A", "B"], {}, {"B": "A"}, {"B": lambda a: a})
        >>> laid_out(model).places
        {'A': (0.0, 0.0), 'B': (1.0, 0.0)}
    """
    columns: dict[int, list[Node]] = {step: [] for step in range(max(model.timesteps.values()) + 1)}
    for name in model.variables:
        columns[model.timesteps[name]].append(name)
    routes = []
    for name in model.variables:
        for parent in model.parents[name]:
            bends = range(model.timesteps[parent] + 1, model.timesteps[name])
            between: list[Node] = [(parent, name, step) for step in bends]
            for step, node in zip(bends, between, strict=True):
                columns[step].append(node)
            routes.append((parent, *between, name))
    _order(columns, routes)
    left: dict[Node, list[Node]] = {}
    for route in routes:
        for before, after in pairwise(route):
            left.setdefault(after, []).append(before)
    places: dict[Node, tuple[float, float]] = {}
    for step, column in columns.items():
        rows = {node: y for node, (_, y) in places.items()}
        middle = (len(column) - 1) / 2
        wanted = [_mean(node, left, {node: middle - row, **rows}) for row, node in enumerate(column)]
        for node, row in zip(column, _apart(wanted), strict=True):
            places[node] = (float(step), row)
    places.update(model.pos)
    if model.pos:  # whoever says where boxes are has lines straight
        routes = [(route[0], route[-1]) for route in routes]
        places = {node: place for node, place in places.items() if isinstance(node, str)}
    return Layout(places, tuple(routes))


def _order(columns: dict[int, list[Node]], routes: list[tuple[Node, ...]]) -> None:
    """Sort each column in place, so that few lines cross."""
    neighbours: dict[bool, dict[Node, list[Node]]] = {True: {}, False: {}}
    for route in routes:
        for left, right in pairwise(route):
            neighbours[True].setdefault(right, []).append(left)
            neighbours[False].setdefault(left, []).append(right)
    steps = sorted(columns)
    best = {step: list(column) for step, column in columns.items()}
    fewest = _crossings(columns, neighbours[True])
    for sweep in range(SWEEPS):
        rightwards = sweep % 2 == 0
        for step in steps if rightwards else reversed(steps):
            rows = {node: float(row) for column in columns.values() for row, node in enumerate(column)}
            means = {node: _mean(node, neighbours[rightwards], rows) for node in columns[step]}
            columns[step].sort(key=means.__getitem__)
        crossings = _crossings(columns, neighbours[True])
        if crossings < fewest:
            fewest, best = crossings, {step: list(column) for step, column in columns.items()}
    columns.update(best)


def _mean(node: Node, neighbours: Mapping[Node, list[Node]], rows: Mapping[Node, float]) -> float:
    """The mean row of the neighbours of a node; its own if it has none."""
    beside = neighbours.get(node) or [node]
    return sum(rows[other] for other in beside) / len(beside)


def _apart(wanted: list[float]) -> list[float]:
    """Rows that fall by at least 1 from each to the next, as near to the wanted ones as can be (least squares).

    Example:
        >>> _apart([3.0, 0.0]), _apart([1.0, 1.0, 1.0])
        ([3.0, 0.0], [2.0, 1.0, 0.0])
    """
    pools: list[list[float]] = []
    for place, row in enumerate(wanted):
        pools.append([row + place])
        while len(pools) > 1 and sum(pools[-2]) / len(pools[-2]) < sum(pools[-1]) / len(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    flat = [sum(pool) / len(pool) for pool in pools for _ in pool]
    return [row - place for place, row in enumerate(flat)]


def _crossings(columns: Mapping[int, list[Node]], left: Mapping[Node, list[Node]]) -> int:
    """How many pairs of lines cross."""
    rows = {node: row for column in columns.values() for row, node in enumerate(column)}
    count = 0
    for column in columns.values():
        ends = [(rows[other], row) for row, node in enumerate(column) for other in left.get(node, [])]
        count += sum((a - c) * (b - d) < 0 for place, (a, b) in enumerate(ends) for c, d in ends[place + 1 :])
    return count
