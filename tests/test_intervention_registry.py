"""Names for interventions and functions."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

import interventions as iv
from interventions import Intervention


def test_every_exported_class_is_registered_under_its_name() -> None:
    exported = [getattr(iv, name) for name in iv.__all__]
    classes = [cls for cls in exported if inspect.isclass(cls) and issubclass(cls, Intervention)]

    assert len(classes) == 25
    for cls in classes:
        if cls is not Intervention:
            assert cls.__name__.endswith("Intervention")
            assert iv.intervention_named(cls.__name__) is cls
            assert iv.name_of(cls) == cls.__name__


def test_exported_names_are_sorted_and_complete() -> None:
    public = {
        name for name, value in vars(iv).items() if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert sorted(iv.__all__) == iv.__all__
    assert public == set(iv.__all__)


def test_a_class_is_registered_by_decorator_under_its_own_or_another_name() -> None:
    @iv.register_intervention
    class PlainlyRegistered(Intervention):
        pass

    @iv.register_intervention(name="test_registry/renamed")
    class Renamed(Intervention):
        pass

    assert iv.intervention_named("PlainlyRegistered") is PlainlyRegistered
    assert iv.name_of(Renamed) == "test_registry/renamed"
    assert (
        iv.register_intervention(Renamed, name="test_registry/renamed") is Renamed
    )  # again: nothing happens


def test_a_taken_name_is_refused_for_another_class_and_a_second_name_for_the_same() -> None:
    class VanillaIntervention(Intervention):
        pass

    with pytest.raises(
        iv.DuplicateInterventionError, match="The intervention name 'VanillaIntervention' is taken by"
    ):
        iv.register_intervention(VanillaIntervention)
    with pytest.raises(iv.DuplicateInterventionError, match="is already registered as 'ZeroIntervention'"):
        iv.register_intervention(iv.ZeroIntervention, name="test_registry/zero")
    assert iv.intervention_named("VanillaIntervention") is iv.VanillaIntervention


def test_an_unknown_name_is_an_error_with_the_nearest_one() -> None:
    with pytest.raises(LookupError) as caught:
        iv.intervention_named("VanilaIntervention")
    lines = str(caught.value).splitlines()
    assert lines[0] == "Unknown intervention 'VanilaIntervention'. Did you mean 'VanillaIntervention'?"
    assert lines[1].startswith("Allowed: AdditionIntervention, AutoencoderIntervention, ")
    assert lines[2] == "Classes of your own are made known with register_intervention."


def test_a_class_that_is_not_registered_has_no_name() -> None:
    class Stranger(Intervention):
        pass

    with pytest.raises(
        iv.UnknownInterventionError, match=r"Make it known: register_intervention\(Stranger\)"
    ):
        iv.name_of(Stranger)


def test_names_are_never_imported() -> None:
    for name in ("torch.nn.Linear", "interventions.VanillaIntervention", "os.system"):
        with pytest.raises(iv.UnknownInterventionError):
            iv.intervention_named(name)
        with pytest.raises(iv.UnknownInterventionError):
            iv.callable_named(name)


@pytest.mark.parametrize("cls", [torch.nn.Linear, int, lambda base: base])
def test_only_interventions_are_registered_as_such(cls: object) -> None:
    with pytest.raises(iv.InterventionArgumentError, match="is no subclass of Intervention"):
        iv.register_intervention(cls)  # type: ignore[call-overload]


def test_functions_have_names_of_their_own_also_bound_methods() -> None:
    class Holder:
        def method(self, base: Tensor) -> Tensor:
            return base

    holder = Holder()
    iv.register_callable("test_registry/method", holder.method)
    iv.register_callable("test_registry/method", holder.method)

    assert iv.callable_named("test_registry/method") == holder.method
    assert iv.name_of_callable(holder.method) == "test_registry/method"
    with pytest.raises(iv.DuplicateInterventionError):
        iv.register_callable("test_registry/method", torch.relu)
    with pytest.raises(iv.InterventionArgumentError, match="cannot be called"):
        iv.register_callable("test_registry/number", 3)  # type: ignore[arg-type]
