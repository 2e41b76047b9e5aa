"""What `import intervenable` gives and what it leaves alone."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

import intervenable as iv
import interventions
import model_maps

ROOT = Path(__file__).parent.parent
PACKAGES = ("intervenable", "interventions", "model_maps")


@functools.cache
def in_a_fresh_process(code: str) -> object:
    """What a program prints as JSON in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", PACKAGES)
def test_exported_names_are_sorted_and_each_is_there_once(package):
    module = importlib.import_module(package)
    kinds = [
        (not name.isupper(), not name[0].isupper(), name) for name in module.__all__
    ]  # constants, classes, rest
    assert kinds == sorted(set(kinds))
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_exported(package):
    module = importlib.import_module(package)
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public - set(module.__all__) == set()


def test_every_intervention_and_error_is_exported_at_the_top():
    classes = {
        name
        for name in interventions.__all__
        if name.endswith("Intervention") and inspect.isclass(getattr(interventions, name))
    }
    assert len(classes) > 20
    assert classes <= set(iv.__all__)
    errors = importlib.import_module("intervenable.errors")
    ours = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, (iv.IntervenableError, iv.IntervenableWarning))
    }
    assert len(ours) > 10
    assert ours <= set(iv.__all__)


def test_interventions_are_the_same_objects_at_the_top_and_on_their_floor():
    assert iv.VanillaIntervention is interventions.VanillaIntervention
    assert iv.Site is model_maps.Site


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_object_has_a_docstring_of_its_own(package):
    module = importlib.import_module(package)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__, name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_has_a_docstring(package):
    for file in (ROOT / package).rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert text.startswith('"""') or file.name == "_version.py", file


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_marked_as_typed(package):
    assert (ROOT / package / "py.typed").is_file()


def test_names_that_are_not_there_are_plain_attribute_errors():
    with pytest.raises(AttributeError) as caught:
        iv.VanilaIntervention  # noqa: B018  # the look-up is the test
    assert str(caught.value) == "module 'intervenable' has no attribute 'VanilaIntervention'"
    assert not hasattr(iv, "__wrapped__")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("GET_LOC", "get_loc"),
        ("IntervenableRepresentationConfig", "RepresentationConfig"),
    ],
)
def test_old_names_lead_to_the_new_ones_with_a_warning(old, new):
    with pytest.warns(iv.RenamedWarning) as warned:
        found = getattr(iv, old)
    assert found is getattr(iv, new)
    assert str(warned[0].message) == f"{old!r} is now called {new!r}."
    assert warned[0].filename == __file__


def test_the_version_is_that_of_a_release():
    assert [part.isdigit() for part in iv.__version__.split(".")[:2]] == [True, True]


# --- imports ----------------------------------------------------------------------------------------------

LOADED = (
    "import sys, json; {first}; before = set(sys.modules); {then};"
    " print(json.dumps(sorted(set(sys.modules) - before)))"
)
UNWANTED = ("matplotlib", "plotnine", "pandas", "datasets", "accelerate", "seaborn", "scipy", "sklearn")


def test_importing_the_library_imports_no_plotting_training_or_data_package():
    new = in_a_fresh_process(LOADED.format(first="import torch, transformers", then="import intervenable"))
    assert "intervenable.model" in new
    assert {name.split(".")[0] for name in new} & set(UNWANTED) == set()


def test_importing_the_library_loads_nothing_more_of_transformers():
    new = in_a_fresh_process(LOADED.format(first="import torch, transformers", then="import intervenable"))
    assert [name for name in new if name.split(".")[0] == "transformers"] == []


def test_importing_and_using_the_library_alone_does_not_import_transformers():
    use = (
        "import torch, intervenable as iv;"
        "model = iv.IntervenableModel({'layer': 0}, iv.MLPClassifier(4, 2, 3));"
        "str(model(torch.ones(1, 4), [torch.zeros(1, 4)]).receipt)"
    )
    new = in_a_fresh_process(LOADED.format(first="import torch", then=use))
    assert {name.split(".")[0] for name in new} & {*UNWANTED, "transformers"} == set()


def test_the_lowest_floors_import_only_what_they_may():
    new = in_a_fresh_process(LOADED.format(first="pass", then="import model_maps"))
    assert {name.split(".")[0] for name in new} & {
        "torch",
        "transformers",
        "interventions",
        "intervenable",
    } == set()
    new = in_a_fresh_process(LOADED.format(first="import torch", then="import interventions"))
    assert {name.split(".")[0] for name in new} & {
        "transformers",
        "model_maps",
        "intervenable",
        "pydantic",
    } == set()


def test_the_look_at_imports_sees_what_is_imported():
    assert "json.tool" in in_a_fresh_process(LOADED.format(first="pass", then="import json.tool"))
