"""Files that are damaged, foreign or hostile are refused with an error of ours, and nothing in them is run."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import intervenable as iv
from intervenable.model import IntervenableModel
from intervenable.saving_files import TENSORS, digest_of
from intervenable.tensor_files import read_tensors, write_tensors
from tiny_models import HIDDEN, tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama")


@pytest.fixture
def saved(model: nn.Module, tmp_path: Path) -> Path:
    """A folder with a rotation, a constant and a partition."""
    torch.manual_seed(0)
    entries = [
        iv.RepresentationConfig(
            1, low_rank_dimension=3, intervention_type=iv.LowRankRotatedSpaceIntervention
        ),
        iv.RepresentationConfig(
            2, intervention_type=iv.AdditionIntervention, source_representation=torch.arange(float(HIDDEN))
        ),
        iv.RepresentationConfig(0, intervention=iv.VanillaIntervention(subspace_partition=[[0, 2], [2, 16]])),
    ]
    return IntervenableModel(entries, model).save_pretrained(tmp_path / "saved")


def load(folder: Path, model: nn.Module, **options: Any) -> IntervenableModel:
    return IntervenableModel.from_pretrained(folder, model, **options)


def tensor_file(folder: Path) -> Path:
    (file,) = folder.glob("interventions-*.safetensors")
    return file


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `config.json` as an attacker would, who leaves its checksum out."""
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content.pop("checksum", None)
    change(content)
    file.write_text(json.dumps(content))


def retensor(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors as an attacker would, who makes all names and sums right again."""
    file = tensor_file(folder)
    tensors, notes = read_tensors(file, TENSORS)
    change(tensors)
    file.unlink()
    name = f"interventions-{digest_of(tensors, notes)}.safetensors"
    write_tensors(folder / name, TENSORS, tensors, notes)
    rewrite(folder, lambda content: content["files"].update(tensors=name))


def refused(
    folder: Path, model: nn.Module, match: str, kind: type[Exception] = iv.StorageError, **options: Any
) -> None:
    with pytest.raises(kind, match=match) as caught:
        load(folder, model, **options)
    assert isinstance(caught.value, iv.IntervenableError)


# --- what json says ---------------------------------------------------------------------------------------


def at(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one entry."""

    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = to

    return change


def test_the_changes_of_these_tests_are_what_is_refused(saved, model):
    rewrite(saved, lambda content: None)
    load(saved, model)
    retensor(saved, lambda tensors: None)
    load(saved, model)


ROTATION = ("interventions", 0)
TAMPERED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a later version": (
        at("schema_version", to=2),
        r"version 2 of the schema .*reads versions up to 1. Update",
    ),
    "a version that is none": (at("schema_version", to="1"), "schema_version '1', which is no version"),
    "a version that is a yes": (at("schema_version", to=True), "schema_version True, which is no version"),
    "another format": (at("format", to="pt"), r"of another kind \(its format is 'pt'\)"),
    "no format": (
        lambda content: content.pop("format"),
        "It looks as if pyvene has written it: .*from_pyvene",
    ),
    "a path up": (
        at("files", "tensors", to="../interventions-0123456789abcdef.safetensors"),
        "which save_pretrained",
    ),
    "an absolute path": (
        at("files", "tensors", to="/etc/passwd"),
        "names the file '/etc/passwd', which save_pre",
    ),
    "a name with a line break": (
        at("files", "tensors", to="interventions-0123456789abcdef.safetensors\n"),
        "which save_pretrained would not",
    ),
    "a pickle for tensors": (
        at("files", "tensors", to="pytorch_model.bin"),
        "'pytorch_model.bin', which save_pre",
    ),
    "a number for a file": (at("files", "tensors", to=3), "names the file 3"),
    "a model up the path": (at("files", "model", to="../model"), "names the file '../model'"),
    "more files": (at("files", "code", to="run.py"), '"files" is'),
    "no files": (lambda content: content.pop("files"), '"files" is None'),
    "a list of files": (at("files", to=[]), r'"files" is \[\]'),
    "a tensor file that is not there": (
        at("files", "tensors", to="interventions-0123456789abcdef.safetensors"),
        "interventions-0123456789abcdef.safetensors, which config.json names, is not in",
    ),
    "an unknown class": (
        at(*ROTATION, "type", to="LowRankRotated"),
        "Unknown intervention class 'LowRankRotated'",
    ),
    "a class to import": (at(*ROTATION, "type", to="os.system"), "none is ever imported for a name"),
    "a dunder": (at(*ROTATION, "type", to="__import__"), "Unknown intervention class '__import__'"),
    "a module": (
        at(*ROTATION, "type", to="interventions.rotation"),
        "Unknown intervention class 'interventions.rot",
    ),
    "a class for all to import": (
        at("intervention_types", to="subprocess.Popen"),
        "Unknown intervention class",
    ),
    "a base class": (at(*ROTATION, "type", to="Intervention"), "Unknown intervention class 'Intervention'"),
    "an unknown function": (
        at(*ROTATION, to={"type": "CallableIntervention", "arguments": {"function": "os.system"}}),
        "Unknown function 'os.system'",
    ),
    "a dunder for an argument": (
        at(*ROTATION, "arguments", "__class__", to="x"),
        "LowRankRotatedSpaceIntervention cannot be made of the arguments",
    ),
    "an argument that is none": (at(*ROTATION, "arguments", "rank", to=3), "cannot be made of the arguments"),
    "a size that is a text": (
        at(*ROTATION, "arguments", "embed_dim", to="16"),
        "cannot be made of the arguments",
    ),
    "a size that no memory holds": (
        at(*ROTATION, "arguments", to={"embed_dim": 10**7, "low_rank_dimension": 10**7}),
        r"should have \(10000000, 10000000\)",
    ),
    "a negative size": (at(*ROTATION, "arguments", "embed_dim", to=-1), "cannot be made of the arguments"),
    "a partition that no memory holds": (
        at("interventions", 2, "arguments", "subspace_partition", to=[[0, 10**15]]),
        "indices above 10,000,000",
    ),
    "a declared partition that no memory holds": (
        at("representations", 0, "fields", "subspace_partition", to=[{"index_set": [0, 1e12]}]),
        "indices above 10,000,000",
    ),
    "an intervention that nobody has": (
        lambda content: content["interventions"].append({"type": "ZeroIntervention", "arguments": {}}),
        "has 4 interventions, and its representations speak of the numbers",
    ),
    "an intervention that is not there": (
        at("representations", 0, "intervention", to=-1),
        r"speak of the numbers \[-1, 1, 2\]",
    ),
    "a frozen weight that is not there": (
        at(*ROTATION, "frozen", to=["weight"]),
        "no parameter 'weight' to freeze",
    ),
    "an unknown field": (at("representations", 0, "fields", "code", to="x"), "has the field 'code'"),
    "an intervention among the fields": (
        at("representations", 0, "fields", "intervention", to={"function": "x"}),
        "has the field 'intervention'",
    ),
    "an unknown component": (
        at("representations", 0, "fields", "component", to="blok"),
        "Unknown component 'blok'",
    ),
    "a layer that is a text": (
        at("representations", 0, "fields", "layer", to="1; import os"),
        "layer is '1; import",
    ),
    "a function that was not one": (
        at("representations", 2, "given_as", to="function"),
        "where a function was decl",
    ),
    "another way to give one": (
        at("representations", 2, "given_as", to="code"),
        "Input should be 'type', 'instance'",
    ),
    "an unknown mode": (at("mode", to="exec"), "Unknown mode 'exec'"),
    "more entries": (at("code", to="import os"), "code: Extra inputs are not permitted"),
    "fewer entries": (lambda content: content.pop("representations"), "representations: Field required"),
    "sizes that are texts": (
        at("model", "sizes", "hidden", to="16"),
        "model.sizes.hidden: Input should be a valid int",
    ),
    "a constant that is missing": (
        at("representations", 0, "constant", to={"field": "source_representation"}),
        "the tensor 'constants.0' is missing",
    ),
    "a constant that is forgotten": (
        lambda content: content["representations"][1].pop("constant"),
        "tensors that belong to nothing: constants.1",
    ),
}


@pytest.mark.parametrize("kind", TAMPERED)
def test_what_save_pretrained_would_not_say_is_refused(saved, model, kind):
    change, message = TAMPERED[kind]
    rewrite(saved, change)
    with pytest.raises((iv.StorageError, iv.UnknownNameError), match=message):
        load(saved, model)


def test_a_changed_description_is_refused_and_one_changed_on_purpose_is_not(saved, model):
    file = saved / "config.json"
    text = file.read_text()
    assert '"layer": 1' in text
    file.write_text(text.replace('"layer": 1', '"layer": 0'))
    refused(saved, model, r"is damaged or was changed: .* remove its entry \"checksum\"")
    rewrite(saved, lambda content: None)
    assert load(saved, model).config.representations[0].layer == 0


NOT_OURS = {
    "nothing": "",
    "a text": '"words"',
    "a list": "[1, 2]",
    "no JSON": "{'format': 1}",
    "the half of it": '{"format": "intervenable.IntervenableModel", "schema_ver',
    "NaN": '{"format": "intervenable.IntervenableModel", "schema_version": NaN}',
    "Infinity": '{"format": "intervenable.IntervenableModel", "schema_version": Infinity}',
    "a number without end": '{"format": ' + "9" * 10_000 + "}",
    "endless lists": "[" * 200_000,
    "endless objects": '{"a":' * 100_000,
}


@pytest.mark.parametrize("kind", NOT_OURS)
def test_what_is_no_description_is_refused(saved, model, kind):
    (saved / "config.json").write_text(NOT_OURS[kind])
    refused(saved, model, r"config\.json (cannot be read as JSON|holds a|is nested too deeply)")


def test_nan_among_the_sizes_is_refused(saved, model):
    file = saved / "config.json"
    file.write_text(file.read_text().replace('"hidden": 16', '"hidden": NaN'))
    refused(saved, model, "NaN is no number of JSON")


def test_deep_nesting_within_a_description_is_refused(saved, model):
    for depth in (300, 900, 5000):
        nested = "[" * depth + "]" * depth
        for path in (
            ("representations", 0, "fields", "group_key"),
            ("interventions", 0, "arguments", "embed_dim"),
        ):
            text = (saved / "config.json").read_text()
            rewrite(saved, at(*path, to="HERE"))
            changed = (saved / "config.json").read_text().replace('"HERE"', nested)
            (saved / "config.json").write_text(changed)
            with pytest.raises(iv.StorageError):
                load(saved, model)
            (saved / "config.json").write_text(text)


def test_a_description_that_is_too_large_is_refused_unread(saved, model):
    with (saved / "config.json").open("ab") as file:
        file.truncate(10**11)  # a hole, that takes no room on the disk
    refused(saved, model, r"has 100.0 GB; what save_pretrained writes has at most 32.0 MB")


def test_bytes_that_are_no_text_are_refused(saved, model):
    (saved / "config.json").write_bytes(b"\xff\xfe{}")
    refused(saved, model, "cannot be read as JSON")


# --- tensors ----------------------------------------------------------------------------------------------

ROTATED = "interventions.0.rotation.weight"
TENSORS_TAMPERED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another shape": (
        lambda tensors: tensors.update({ROTATED: torch.zeros(HIDDEN, 4)}),
        r"'rotation.weight' has the shape \(16, 4\), and should have \(16, 3\)",
    ),
    "another kind of numbers": (
        lambda tensors: tensors.update({ROTATED: torch.zeros(HIDDEN, 3, dtype=torch.int64)}),
        r"'rotation.weight' is of torch.int64, and should be like torch.float32",
    ),
    "one missing": (lambda tensors: tensors.pop(ROTATED), "'rotation.weight' is missing"),
    "one more": (
        lambda tensors: tensors.update({"interventions.0.bias": torch.zeros(1)}),
        "'bias' is none of its tensors",
    ),
    "one of nobody": (
        lambda tensors: tensors.update({"interventions.3.weight": torch.zeros(1)}),
        "tensors that belong to nothing: interventions.3.weight",
    ),
    "one with a path for a name": (
        lambda tensors: tensors.update({"../../x": torch.zeros(1)}),
        "tensors that belong to nothing: ../../x",
    ),
    "a dunder": (
        lambda tensors: tensors.update({"interventions.0.__class__": torch.zeros(1)}),
        "'__class__' is none of its tensors",
    ),
    "no constant": (lambda tensors: tensors.pop("constants.1"), "the tensor 'constants.1' is missing"),
}


@pytest.mark.parametrize("kind", TENSORS_TAMPERED)
def test_tensors_that_do_not_fit_are_refused(saved, model, kind):
    change, message = TENSORS_TAMPERED[kind]
    retensor(saved, change)
    refused(saved, model, message)


def test_a_constant_of_another_width_is_refused_as_declared_for_another_model(saved, model):
    retensor(saved, lambda tensors: tensors.update({"constants.1": torch.zeros(7)}))
    refused(saved, model, r"source_representation has shape \(7,\)", iv.ModelMismatchError)


@pytest.mark.parametrize("keep", [0, 1, 8, 100, 0.5, -1])
def test_tensors_that_were_cut_off_are_refused(saved, model, keep):
    file = tensor_file(saved)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    refused(saved, model, r"cannot be read as the tensors of interventions: .* Take an intact copy")


def test_no_bit_of_the_tensors_can_flip_unseen(saved, model):
    file = tensor_file(saved)
    whole = file.read_bytes()
    expected = load(saved, model).state_dict()
    unseen = 0
    for place in range(0, len(whole), 31):
        content = bytearray(whole)
        content[place] ^= 1 << (place % 8)
        file.write_bytes(content)
        try:
            found = load(saved, model).state_dict()
        except iv.StorageError:
            continue
        unseen += 1
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert unseen < 10


def test_tensors_of_another_state_are_refused(saved, model, tmp_path):
    entry = iv.RepresentationConfig(
        1, low_rank_dimension=3, intervention_type=iv.LowRankRotatedSpaceIntervention
    )
    other = IntervenableModel([entry], model).save_pretrained(tmp_path / "other")
    shutil.copy(tensor_file(other), tensor_file(saved))
    refused(saved, model, "is damaged or another one: its name tells another content")


@pytest.mark.parametrize(
    "header", ['{"a":' * 50_000, json.dumps({"format": TENSORS.format, "version": 10**400})]
)
def test_headers_of_tensors_that_would_break_a_reader_are_refused(saved, model, header):
    file = tensor_file(saved)
    tensors = load_file(file)
    save_file(tensors, file, {"header": header})
    refused(saved, model, "tensors of interventions|version")


def test_a_header_that_claims_more_than_the_file_has_is_refused(saved, model):
    file = tensor_file(saved)
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    refused(saved, model, "cannot be read as the tensors of interventions")


# --- pickles, links and things that are no files ----------------------------------------------------------


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_are_never_loaded_whatever_they_are_called(saved, model, tmp_path):
    sprung = tmp_path / "sprung"
    trap = pickle.dumps(Trap(sprung))
    pickle.loads(trap)
    assert sprung.exists()  # it does work
    sprung.unlink()

    file = tensor_file(saved)
    file.write_bytes(trap)
    refused(saved, model, "cannot be read as the tensors of interventions")
    torch.save(Trap(sprung), file)
    refused(saved, model, "cannot be read as the tensors of interventions")
    (saved / "config.json").write_bytes(trap)
    refused(saved, model, "cannot be read as JSON")
    (saved / "config.json").unlink()
    file.rename(saved / "pytorch_model.bin")
    refused(
        saved,
        model,
        r"There is no config.json .*pickled files there \(pytorch_model.bin\) are not read",
        iv.MissingFileError,
    )
    assert not sprung.exists()


def test_pickles_instead_of_tensors_are_named(saved, model):
    tensor_file(saved).rename(saved / "interventions.bin")
    refused(
        saved,
        model,
        r"is not in .*\(interventions.bin\) are not read: pickles can run code",
        iv.MissingFileError,
    )


def test_links_out_of_the_folder_are_refused(saved, model, tmp_path):
    for file in (tensor_file(saved), saved / "config.json"):
        outside = tmp_path / "elsewhere" / file.name
        outside.parent.mkdir(exist_ok=True)
        file.rename(outside)
        file.symlink_to(outside)
        refused(saved, model, "is a link that leads out of the folder")
        file.unlink()
        outside.rename(file)
    load(saved, model)


def test_links_to_nowhere_and_in_circles_are_refused(saved, model):
    file = tensor_file(saved)
    file.unlink()
    for target in ("nothing", file.name):
        file.symlink_to(target)
        with pytest.raises(iv.StorageError):
            load(saved, model)
        file.unlink()


def test_links_as_the_cache_of_the_hub_has_them_are_followed(saved, model, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(saved.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    load(snapshot, model)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_pipes_and_folders_in_the_place_of_files_are_refused_without_waiting(saved, model):
    file = tensor_file(saved)
    file.unlink()
    os.mkfifo(file)
    refused(saved, model, "is not in", iv.MissingFileError)
    (saved / "config.json").unlink()
    os.mkfifo(saved / "config.json")
    with pytest.raises(iv.StorageError):
        load(saved, model)
    (saved / "config.json").unlink()
    (saved / "config.json").mkdir()
    with pytest.raises(iv.StorageError):
        load(saved, model)


def test_a_file_for_a_folder_is_said_to_be_none(saved, model):
    refused(saved / "config.json", model, "There is no folder", iv.MissingFileError)


# --- writing ----------------------------------------------------------------------------------------------


def test_what_others_have_written_is_not_written_over(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    wrapped = IntervenableModel([iv.RepresentationConfig(1)], model)
    with pytest.raises(iv.StorageError, match="was not written by save_pretrained of an IntervenableModel"):
        wrapped.save_pretrained(tmp_path)
    now = {path.name: path.read_bytes() for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert now == before


def test_files_that_are_not_ours_stay(saved, model):
    (saved / "notes.txt").write_text("kept")
    (saved / "interventions-old.safetensors").write_text("kept")
    IntervenableModel([iv.RepresentationConfig(1)], model).save_pretrained(saved)
    assert (saved / "notes.txt").exists()
    assert (saved / "interventions-old.safetensors").exists()
    assert len(list(saved.glob("interventions-*"))) == 2


def test_a_file_for_a_folder_cannot_be_written_to(model, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(iv.StorageError, match="cannot be used as a folder"):
        IntervenableModel([iv.RepresentationConfig(1)], model).save_pretrained(tmp_path / "file")


WRITE = """
import os, resource, sys
import intervenable as iv
from intervenable.model import IntervenableModel

folder = sys.argv[1]
mlp = iv.MLPClassifier(4, 2, 3)
old = iv.RepresentationConfig(1, intervention=iv.AutoencoderIntervention(4, 8))
IntervenableModel([old], mlp).save_pretrained(folder)
before = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
large = iv.RepresentationConfig(1, intervention=iv.AutoencoderIntervention(4, 10_000))
long = iv.RepresentationConfig(1, intervention=iv.ScaleIntervention(2.0), name="x" * 10_000)
for new, most in (large, 200_000), (large, 20_000), (long, 5_000):  # tensors, tensors, description
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    try:
        IntervenableModel([new], mlp).save_pretrained(folder)
    except iv.StorageError as error:
        print(error)
    now = {name: open(os.path.join(folder, name), "rb").read() for name in os.listdir(folder)}
    left = now.keys() - before.keys()
    print(sorted(left), all(now[name] == before[name] for name in before if name != ".saving.lock"))
IntervenableModel.from_pretrained(folder, mlp)
"""


def test_a_disk_without_room_leaves_the_old_state(tmp_path):
    pytest.importorskip("resource")
    done = subprocess.run(
        [sys.executable, "-c", WRITE, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert all(line.endswith("File too large. What was there before is as it was.") for line in lines[::2])
    assert "interventions-" in lines[0]
    assert "config.json could not be written" in lines[4]
    assert lines[1::2] == ["[] True"] * 3


# --- the package itself -----------------------------------------------------------------------------------

RISKY = {"eval", "exec", "__import__", "import_module", "_import_module", "run_path"}
CARELESS = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "runpy"}


def risks_in(source: str) -> list[str]:
    """Calls that run what is in a text or a file, and imports of what unpickles."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in CARELESS]
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            named_here = len(node.args) == 1 and isinstance(node.args[0], ast.Constant)
            if called.removeprefix("importlib.").removeprefix("builtins.") in RISKY and not named_here:
                found.append(called)
            if called == "torch.load" and options.get("weights_only") != "True":
                found.append(called)
            if options.get("trust_remote_code", "False") != "False":
                found.append(called)
    return found


def test_nothing_in_the_packages_unpickles_or_imports_by_a_name():
    files = [
        file
        for package in ("intervenable", "interventions", "model_maps")
        for file in (ROOT / package).rglob("*.py")
    ]
    assert len(files) > 100
    assert {str(file): risks for file in files if (risks := risks_in(file.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "importlib.import_module(name)",
        "__import__(name)",
        "exec(text)",
        "model.from_pretrained(x, trust_remote_code=flag)",
    ],
)
def test_the_check_sees_what_would_run_code(source):
    assert risks_in(source)
