"""Boolean formulas as causal models: every part of a formula is a variable."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from typing import Any

from intervenable.causal_model import CausalModel
from intervenable.causal_tasks import VectorTask
from intervenable.errors import InputError

FORMULA = "(a and b) or (c and d)"

ALLOWED = "and, or, not, ==, !=, ^ and brackets"


def boolean_logic(formula: str = FORMULA) -> VectorTask:
    """Is a formula true? The variables are its parts, each by its text.

    Inputs are the letters or words of the formula in the order in which they occur, 0 or 1 each; the output is
    the whole formula. Inputs are drawn so that it is true as often as false.

    Geiger et al. (2021), "Causal Abstractions of Neural Networks", https://arxiv.org/abs/2106.02997.

    Args:
        formula: Words with `and`, `or`, `not`, `==`, `!=`, `^` (exclusive or) and brackets.

    Raises:
        InputError: something else in the formula, or nothing but one word.

    Example:
        >>> task = boolean_logic("(a and b) or not c")
        >>> task.model.inputs, task.model.internal, task.model.output
        (('a', 'b', 'c'), ('a and b', 'not c'), 'a and b or not c')
        >>> task.model.run({"a": True, "b": False, "c": True})["a and b or not c"]
        False
    """
    try:
        tree = ast.parse(formula.strip(), mode="eval").body
    except SyntaxError as error:
        raise InputError(f"{formula!r} is no formula: {error.msg}. Use words with {ALLOWED}.") from None
    parts = _Parts(formula)
    parts.add(tree)
    if not parts.functions:
        raise InputError(f"{formula!r} has nothing to compute. Use words with {ALLOWED}.")
    names = [*parts.inputs, *parts.functions]
    model = CausalModel(names, dict.fromkeys(names, (False, True)), parts.parents, parts.functions)
    return VectorTask(model, balance=False)


class _Parts:
    """The parts of a formula, the inner ones first."""

    def __init__(self, formula: str) -> None:
        self.formula = formula
        self.inputs: dict[str, None] = {}
        self.parents: dict[str, Sequence[str]] = {}
        self.functions: dict[str, Callable[..., bool]] = {}

    def add(self, node: ast.expr) -> str:
        """The name of a part, which is known from now on."""
        if isinstance(node, ast.Name):
            self.inputs.setdefault(node.id)
            return node.id
        function, operands = self._read(node)
        given = [self.add(operand) for operand in operands]
        above = tuple(dict.fromkeys(given))
        name = ast.unparse(node)
        self.parents[name] = above
        # One variable may occur twice in a part, and is one parent.
        self.functions[name] = lambda *values: function([values[above.index(part)] for part in given])
        return name

    def _read(self, node: ast.expr) -> tuple[Callable[[Sequence[bool]], bool], Sequence[ast.expr]]:
        match node:
            case ast.BoolOp(op=ast.And()):
                return all, node.values
            case ast.BoolOp(op=ast.Or()):
                return any, node.values
            case ast.UnaryOp(op=ast.Not()):
                return lambda values: not values[0], [node.operand]
            case ast.BinOp(op=ast.BitXor()):
                return lambda values: values[0] != values[1], [node.left, node.right]
            case ast.Compare(ops=[ast.Eq() | ast.NotEq()]):
                compare: Any = operator.eq if isinstance(node.ops[0], ast.Eq) else operator.ne
                return lambda values: bool(compare(*values)), [node.left, node.comparators[0]]
            case _:
                raise InputError(
                    f"{ast.unparse(node)!r} in {self.formula!r} is not known here. Use words with {ALLOWED}."
                )
