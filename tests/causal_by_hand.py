"""Causal models drawn by hypothesis, and what they compute, found out the slow way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from hypothesis import strategies as st

from intervenable.causal_model import CausalModel


@dataclass(frozen=True)
class Tables:
    """For each variable its parents, how many values it has, and its value for each of theirs."""

    parents: Mapping[str, tuple[str, ...]]
    sizes: Mapping[str, int]
    table: Mapping[str, Mapping[tuple[int, ...], int]]

    def value(self, name: str, forced: Mapping[str, int]) -> int:
        """The value of a variable, by asking each of its parents anew."""
        if name in forced:
            return forced[name]
        return self.table[name][tuple(self.value(parent, forced) for parent in self.parents[name])]

    def interchanged(
        self, name: str, base: Mapping[str, int], sources: Mapping[str, Mapping[str, int]]
    ) -> int:
        """The value of a variable where some are as in other runs, by asking each of its parents anew."""
        if name in sources:
            return self.value(name, sources[name])
        if name in base:
            return base[name]
        above = tuple(self.interchanged(parent, base, sources) for parent in self.parents[name])
        return self.table[name][above]

    def is_behind(self, name: str, other: str) -> bool:
        """Whether a variable depends on another one."""
        above = self.parents[name]
        return other in above or any(self.is_behind(parent, other) for parent in above)

    def inputs(self) -> list[str]:
        return [name for name, above in self.parents.items() if not above]

    def input_settings(self) -> list[dict[str, int]]:
        names = self.inputs()
        return [
            dict(zip(names, row, strict=True))
            for row in product(*(range(self.sizes[name]) for name in names))
        ]

    def model(self, order: list[str] | None = None) -> CausalModel:
        """The same model, declared in any order."""

        def function(name: str) -> Any:
            arguments = [f"a{index}" for index in range(len(self.parents[name]))]
            code = (
                f"lambda {', '.join(arguments)}: table[({''.join(f'{argument},' for argument in arguments)})]"
            )
            return eval(code, {"table": self.table[name]})

        return CausalModel(
            order or list(self.parents),
            {name: range(size) for name, size in self.sizes.items()},
            self.parents,
            {name: function(name) for name, above in self.parents.items() if above},
        )


@st.composite
def tables(draw: st.DrawFn, most: int = 6) -> Tables:
    """Models of two to so many variables, at least one of which has parents."""
    count = draw(st.integers(2, most))
    names = [f"v{index}" for index in range(count)]
    parents: dict[str, tuple[str, ...]] = {}
    sizes = {name: draw(st.integers(2, 3)) for name in names}
    table: dict[str, dict[tuple[int, ...], int]] = {}
    for index, name in enumerate(names):
        least = 1 if index == count - 1 else 0
        above = (
            draw(st.lists(st.sampled_from(names[:index]), min_size=least, max_size=3, unique=True))
            if index
            else []
        )
        parents[name] = tuple(above)
        rows = list(product(*(range(sizes[parent]) for parent in above)))
        values = draw(st.lists(st.integers(0, sizes[name] - 1), min_size=len(rows), max_size=len(rows)))
        table[name] = dict(zip(rows, values, strict=True))
    return Tables(parents, sizes, table)
