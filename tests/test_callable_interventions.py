"""Any callable as an intervention."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import interventions as iv
from interventions import CallableIntervention

BASE, SOURCE = torch.tensor([-1.0, 2.0]), torch.tensor([10.0, 20.0])


def add(base: Tensor, source: Tensor) -> Tensor:
    return base + source


def scale(base: Tensor, factor: float = 3.0) -> Tensor:
    return base * factor


class Shift:
    def __init__(self, by: float) -> None:
        self.by = by

    def __call__(self, base: Tensor) -> Tensor:
        return base + self.by

    def method(self, base: Tensor, source: Tensor) -> Tensor:
        return base + source + self.by


@pytest.mark.parametrize(
    ("function", "accepts_source", "result"),
    [
        (torch.relu, False, [0, 2]),
        (nn.functional.relu, False, [0, 2]),
        (nn.ReLU(), False, [0, 2]),
        (lambda base: -base, False, [1, -2]),
        (scale, False, [-3, 6]),
        (functools.partial(scale, factor=2.0), False, [-2, 4]),
        (functools.partial(add, source=torch.ones(2)), False, [0, 3]),
        (functools.partial(lambda by, base: base + by, 5.0), False, [4, 7]),
        (Shift(1.0), False, [0, 3]),
        (lambda *tensors: tensors[0] * len(tensors), False, [-1, 2]),
        (add, True, [9, 22]),
        (lambda b, s: b - s, True, [-11, -18]),
        (Shift(1.0).method, True, [10, 23]),
        (lambda base, source=None: source, True, [10, 20]),
        (lambda base, *, source: source, True, [10, 20]),
        (lambda base, source, subspaces: base + source, True, [9, 22]),
        (lambda base, other, third: other, True, [10, 20]),
    ],
)
def test_a_callable_gets_what_its_signature_has_room_for(
    function: Callable[..., Tensor], accepts_source: bool, result: list[float]
) -> None:
    intervention = CallableIntervention(function)

    assert intervention(BASE, SOURCE).tolist() == result
    assert intervention.accepts_source is accepts_source
    assert not intervention.needs_source


def test_subspaces_reach_a_function_that_takes_them_and_are_refused_for_others() -> None:
    seen: list[object] = []
    for function in (
        lambda base, source, subspaces: seen.append(subspaces),
        lambda base, subspaces=None: seen.append(subspaces),
        lambda base, source, ids: seen.append(ids),
    ):
        CallableIntervention(function)(BASE, SOURCE, [1])
    assert seen == [[1], [1], [1]]

    for refuse in (lambda f: f(BASE, SOURCE, [1]), lambda f: f.check_subspaces([1])):
        with pytest.raises(iv.SubspaceError, match="takes no subspaces"):
            refuse(CallableIntervention(add))


def test_a_source_it_takes_may_be_missing() -> None:
    assert CallableIntervention(lambda base, source: base if source is None else source)(BASE).tolist() == [
        -1,
        2,
    ]


def test_a_constant_source_is_used_where_the_function_takes_one() -> None:
    assert CallableIntervention(add, source_representation=SOURCE)(BASE).tolist() == [9, 22]
    with pytest.raises(iv.UnusedSourceError):
        CallableIntervention(torch.relu, source_representation=SOURCE)


def test_returning_none_leaves_the_activation_as_it_is() -> None:
    assert CallableIntervention(lambda base: None)(BASE) is BASE


def test_a_function_may_work_in_place_on_what_it_gets_if_it_returns_it() -> None:
    base, source = BASE.clone(), SOURCE.clone()

    result = CallableIntervention(lambda b, s: s.zero_().add_(b.mul_(2)))(base, source)

    assert result.tolist() == [-2, 4]
    assert base.tolist() == [-1, 2]
    assert source.tolist() == [10, 20]


def test_a_change_in_place_that_is_not_returned_is_an_error() -> None:
    def forgets(base: Tensor) -> None:
        base.zero_()

    with pytest.raises(iv.InterventionError, match="changed its argument in place and returned None"):
        CallableIntervention(forgets)(BASE)


@pytest.mark.parametrize(
    ("function", "got"),
    [
        (lambda base: base[:1], "(1,) torch.float32"),
        (lambda base: base.double(), "(2,) torch.float64"),
        (lambda base: 3, "a int"),
    ],
)
def test_a_result_of_another_shape_or_dtype_is_an_error_with_both(
    function: Callable[..., Tensor], got: str
) -> None:
    with pytest.raises(iv.InterventionShapeError) as caught:
        CallableIntervention(function)(BASE)
    assert str(caught.value) == (
        f"{function!r} returned {got} for an activation of (2,) torch.float32. Return a tensor of the same shape and"
        f" dtype, or None to leave it as it is."
    )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: None, "takes no positional argument"),
        (lambda *, base: base, "takes no positional argument"),
        (lambda a, b, c, d: a, "also requires 'd'"),
        (lambda a, *, strength: a, "also requires 'strength'"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused_when_wrapped(
    function: Callable[..., Tensor], message: str
) -> None:
    with pytest.raises(iv.InterventionArgumentError, match=message):
        CallableIntervention(function)


def test_a_modules_parameters_are_trained() -> None:
    intervention = CallableIntervention(nn.Linear(2, 2))
    intervention(BASE).sum().backward()

    assert sorted(name for name, _ in intervention.named_parameters()) == ["function.bias", "function.weight"]
    assert all(parameter.grad is not None for parameter in intervention.parameters())


def test_only_a_registered_function_can_be_saved() -> None:
    def mine(base: Tensor) -> Tensor:
        return base * 2

    with pytest.raises(iv.UnknownInterventionError) as caught:
        CallableIntervention(mine).to_config()
    assert str(caught.value).startswith("Unknown function 'mine'.")
    assert 'Only registered functions can be saved: register_callable("a/name", function).' in str(
        caught.value
    )

    iv.register_callable("test_callable_interventions/mine", mine)
    config = CallableIntervention(mine, embed_dim=2).to_config()
    assert config == {"function": "test_callable_interventions/mine", "embed_dim": 2}
    assert CallableIntervention(**config)(BASE).tolist() == [-2, 4]  # type: ignore[arg-type]


def test_gradients_flow_through_the_function() -> None:
    base = BASE.clone().requires_grad_()
    CallableIntervention(lambda b: b * b)(base).sum().backward()

    assert base.grad is not None
    assert base.grad.tolist() == [-2, 4]
