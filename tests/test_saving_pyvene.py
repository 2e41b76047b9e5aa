"""Folders that pyvene has saved give what pyvene gives, and are refused where they are not sound."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from pyvene_folders import CLASS, listed, rotation_state, sized, write
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close

import intervenable as iv
from intervenable.model import IntervenableModel
from tiny_models import HIDDEN, tiny

BASE = {"input_ids": torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])}
SOURCE = {"input_ids": torch.tensor([[13, 15, 17, 19, 21], [14, 16, 18, 20, 22]])}
KEY = "layer_1_comp_block_output_unit_pos_nunit_1#0"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("gpt2")


def only(wrapped: IntervenableModel) -> Any:
    (intervention,) = wrapped.interventions.values()
    return intervention


def read(folder: Path, model: nn.Module) -> IntervenableModel:
    return IntervenableModel.from_pyvene(folder, model)


# --- what comes of each class -----------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [None, 3])
def test_a_rotation_becomes_the_matrix_that_it_stands_for(model, tmp_path, rank):
    state, columns = rotation_state(HIDDEN, rank or HIDDEN)
    kind = "RotatedSpaceIntervention" if rank is None else "LowRankRotatedSpaceIntervention"
    partition = None if rank is None else [[0, 1], [1, 3]]
    entry = listed(layer=1, low_rank_dimension=rank, subspace_partition=partition)
    write(tmp_path, [kind], [entry], {KEY: sized(state, HIDDEN)}, intervention_dimensions=[HIDDEN])
    wrapped = read(tmp_path, model)
    loaded = only(wrapped)
    assert type(loaded).__name__ == kind
    assert_close(loaded.rotation.weight.detach(), columns, rtol=0, atol=1e-6)
    assert_close(loaded.rotation().detach(), columns, rtol=0, atol=1e-6)
    assert loaded.subspace_partition == (None if rank is None else ((0,), (1, 2)))
    base, source = torch.randn(2, HIDDEN)
    assert_close(
        loaded(base, source).detach(), base + (source - base) @ columns @ columns.T, atol=1e-5, rtol=0
    )
    assert wrapped.config.representations[0].intervention_type is type(loaded)
    assert not wrapped.training


def test_plain_rotations_of_older_versions_are_read(model, tmp_path):
    columns = torch.linalg.qr(torch.randn(HIDDEN, 2, generator=torch.Generator().manual_seed(0)))[0]
    state = {"rotate_layer.weight": columns}
    write(
        tmp_path, ["LowRankRotatedSpaceIntervention"], [listed(layer=1, low_rank_dimension=2)], {KEY: state}
    )
    assert torch.equal(only(read(tmp_path, model)).rotation.weight, columns)


def test_masks_and_temperatures_come_along(model, tmp_path):
    rotation, columns = rotation_state(HIDDEN, HIDDEN)
    share, temperature = torch.tensor([0.3]), torch.tensor(0.7)
    mask = torch.linspace(-2, 2, HIDDEN)
    states = {
        "BoundlessRotatedSpaceIntervention": {
            **rotation,
            "intervention_boundaries": share,
            "intervention_population": torch.arange(HIDDEN),
        },
        "SigmoidMaskRotatedSpaceIntervention": {**rotation, "masks": mask},
        "SigmoidMaskIntervention": {"mask": mask},
    }
    for number, (kind, state) in enumerate(states.items()):
        folder = tmp_path / str(number)
        write(folder, [kind], [listed(layer=1)], {KEY: sized({**state, "temperature": temperature}, HIDDEN)})
        loaded = only(read(folder, model))
        assert type(loaded).__name__ == kind
        assert torch.equal(loaded.temperature, temperature)
        assert not loaded.temperature.requires_grad
        if hasattr(loaded, "rotation"):
            assert_close(loaded.rotation.weight.detach(), columns, rtol=0, atol=1e-6)
        learned, expected = (
            (loaded.intervention_boundaries, share) if "Bound" in kind else (loaded.mask, mask)
        )
        assert torch.equal(learned, expected)


def test_autoencoders_come_along(model, tmp_path):
    torch.manual_seed(0)
    state = {
        "autoencoder.encoder.0.weight": torch.randn(40, HIDDEN),
        "autoencoder.encoder.0.bias": torch.randn(40),
        "autoencoder.decoder.0.weight": torch.randn(HIDDEN, 40),
        "autoencoder.decoder.0.bias": torch.randn(HIDDEN),
    }
    write(
        tmp_path / "one",
        ["AutoencoderIntervention"],
        [listed(layer=1, latent_dim=40)],
        {KEY: sized(state, HIDDEN)},
    )
    loaded = only(read(tmp_path / "one", model))
    base, source = torch.randn(2, HIDDEN)
    encoder = state["autoencoder.encoder.0.weight"], state["autoencoder.encoder.0.bias"]
    latents = torch.relu(linear(source - state["autoencoder.decoder.0.bias"], *encoder))
    expected = linear(latents, state["autoencoder.decoder.0.weight"], state["autoencoder.decoder.0.bias"])
    assert_close(loaded(base, source).detach(), expected)

    shapes = {
        "W_enc": (HIDDEN, 20),
        "b_enc": (20,),
        "threshold": (20,),
        "W_dec": (20, HIDDEN),
        "b_dec": (HIDDEN,),
    }
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    entry = listed(layer=1, low_rank_dimension=20)
    folder = write(tmp_path / "two", ["JumpReLUAutoencoderIntervention"], [entry], {KEY: tensors})
    loaded = only(read(folder, model))
    assert all(torch.equal(getattr(loaded, name), value) for name, value in tensors.items())


def test_what_has_no_weights_is_made_anew(model, tmp_path):
    kinds = [
        "VanillaIntervention",
        "ZeroIntervention",
        "CollectIntervention",
        "SkipIntervention",
        "NoiseIntervention",
    ]
    entries = [
        listed(layer=1, component="mlp_output"),
        listed(),
        listed(layer=2, unit="pos"),
        listed(layer=1),
    ]
    write(tmp_path, kinds, [*entries, listed(layer=2, component="block_input")])
    wrapped = read(tmp_path, model)
    assert [type(one).__name__ for one in wrapped.interventions.values()] == kinds
    noise = list(wrapped.interventions.values())[-1]
    assert_close(noise(torch.zeros(1, 1, 3)), torch.tensor([[[0.2187, -0.0824, -0.0711]]]), atol=1e-4, rtol=0)


def test_constant_sources_come_along(model, tmp_path):
    constant = torch.linspace(-1, 1, HIDDEN)
    entries = [listed(layer=1, hidden_source_representation=True), listed(layer=2)]
    write(
        tmp_path,
        ["AdditionIntervention", "VanillaIntervention"],
        entries,
        {KEY: sized({"source_representation": constant}, HIDDEN)},
        intervention_constant_sources=[True, False],
    )
    wrapped = read(tmp_path, model)
    assert torch.equal(wrapped._bound[0].constant, constant)
    assert wrapped._bound[1].constant is None


def test_keys_count_what_is_alike_and_links_and_groups_stay(model, tmp_path):
    (first, one), (second, two) = (rotation_state(HIDDEN, 2, seed) for seed in range(2))
    third = {"source_representation": torch.ones(HIDDEN)}
    entries = [
        listed(layer=1, low_rank_dimension=2, group_key=0, intervention_link_key=7),
        listed(layer=1, low_rank_dimension=2, group_key=0),
        listed(component="transformer.h[0].mlp.output", group_key=1, hidden_source_representation=True),
        listed(layer=2, low_rank_dimension=2, group_key=1, intervention_link_key=7),
    ]
    states = {
        KEY: first,
        "layer_1_comp_block_output_unit_pos_nunit_1#1": second,
        "comp_transformer_h[0]_mlp_output_unit_pos_nunit_1#0": third,
        "layer_2_comp_block_output_unit_pos_nunit_1#0": first,
    }
    kinds = ["LowRankRotatedSpaceIntervention"] * 4
    kinds[2] = "VanillaIntervention"
    wrapped = read(write(tmp_path, kinds, entries, states), model)
    loaded = list(wrapped.interventions.values())
    assert loaded[0] is loaded[3]
    for intervention, columns in zip(loaded, (one, two), strict=False):
        assert_close(intervention.rotation.weight.detach(), columns, rtol=0, atol=1e-6)
    assert torch.equal(wrapped._bound[2].constant, torch.ones(HIDDEN))
    assert [entry.group for entry in wrapped._bound] == [0, 0, 1, 1]


def test_several_units_in_one_rotation_and_heads_come_along(model, tmp_path):
    state, columns = rotation_state(2 * HIDDEN, 2 * HIDDEN)
    key = "layer_1_comp_block_output_unit_pos_nunit_2#0"
    write(
        tmp_path / "a", ["RotatedSpaceIntervention"], [listed(layer=1, max_number_of_units=2)], {key: state}
    )
    assert_close(only(read(tmp_path / "a", model)).rotation.weight.detach(), columns, rtol=0, atol=1e-6)
    state, columns = rotation_state(HIDDEN // 4, 2)
    key = "layer_1_comp_head_attention_value_output_unit_h_pos_nunit_1#0"
    entry = listed(layer=1, component="head_attention_value_output", unit="h.pos", low_rank_dimension=2)
    write(tmp_path / "b", ["LowRankRotatedSpaceIntervention"], [entry], {key: state})
    assert_close(only(read(tmp_path / "b", model)).rotation.weight.detach(), columns, rtol=0, atol=1e-6)


def test_fewer_coordinates_than_there_are_stay_fewer_or_are_spoken_of(model, tmp_path):
    write(tmp_path / "a", ["VanillaIntervention"], [listed(layer=1)], intervention_dimensions=[5])
    swap = only(read(tmp_path / "a", model))
    base, source = torch.zeros(HIDDEN), torch.ones(HIDDEN)
    assert swap(base, source).tolist() == [1.0] * 5 + [0.0] * (HIDDEN - 5)

    state, _ = rotation_state(HIDDEN, HIDDEN)
    write(
        tmp_path / "b",
        ["RotatedSpaceIntervention"],
        [listed(layer=1)],
        {KEY: state},
        intervention_dimensions=[5],
    )
    with pytest.warns(
        iv.IntervenableWarning, match=r"first 5 of 16 coordinates .* Give subspaces=list\(range\(5\)\)"
    ):
        read(tmp_path / "b", model)


def test_what_was_read_can_be_saved_in_our_way(model, tmp_path):
    state, _ = rotation_state(HIDDEN, 3)
    folder = write(
        tmp_path / "theirs",
        ["LowRankRotatedSpaceIntervention"],
        [listed(layer=1, low_rank_dimension=3)],
        {KEY: state},
    )
    wrapped = read(folder, model)
    wrapped.save_pretrained(tmp_path / "ours")
    again = IntervenableModel.from_pretrained(tmp_path / "ours", model)
    assert torch.equal(only(again).rotation.weight, only(wrapped).rotation.weight)
    with pytest.raises(iv.StorageError, match=r"It looks as if pyvene has written it: .*from_pyvene"):
        IntervenableModel.from_pretrained(folder, model)
    with pytest.raises(iv.StorageError, match="What save_pretrained has written is read by from_pretrained"):
        read(tmp_path / "ours", model)
    with pytest.raises(iv.StorageError, match="would be lost"):
        wrapped.save_pretrained(folder)


def test_reading_draws_no_random_numbers(model, tmp_path):
    state, _ = rotation_state(HIDDEN, 3)
    write(
        tmp_path, ["LowRankRotatedSpaceIntervention"], [listed(layer=1, low_rank_dimension=3)], {KEY: state}
    )
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    read(tmp_path, model)
    assert torch.equal(torch.randn(3), expected)


# --- what is refused --------------------------------------------------------------------------------------


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_pickles_that_would_run_something_are_not_run(model, tmp_path):
    folder, sprung = tmp_path / "folder", tmp_path / "sprung"
    write(folder, ["SigmoidMaskIntervention"], [listed(layer=1)])
    file = folder / f"intkey_{KEY}.bin"
    for content in (Trap(sprung), {"mask": Trap(sprung), "temperature": torch.tensor(1.0)}):
        torch.save(content, file)
        with pytest.raises(
            iv.StorageError, match=r"cannot be read as tensors alone: .* Nothing in it was run"
        ):
            read(folder, model)
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(iv.StorageError, match="cannot be read as tensors alone"):
            read(folder, model)
    assert not sprung.exists()


@pytest.mark.parametrize(
    "kind",
    [
        "<class 'os.system'>",
        "<class 'pyvene.models.interventions.LambdaIntervention'>",
        "<class 'pyvene.models.interventions.PCARotatedSpaceIntervention'>",
        "<class '__main__.MyIntervention'>",
        "<class 'pyvene.models.interventions.__builtins__'>",
        "<class 'pyvene.models.interventions.ZeroIntervention'>; import os",
        "ZeroIntervention",
    ],
)
def test_classes_that_are_not_in_the_table_are_refused(model, tmp_path, kind):
    write(tmp_path, ["ZeroIntervention"], [listed(layer=1)], intervention_types=[kind])
    with pytest.raises(
        iv.StorageError, match=r"which has no counterpart to load\. Those that have one: Addition"
    ):
        read(tmp_path, model)


STATE: dict[str, Tensor] = {"mask": torch.zeros(HIDDEN), "temperature": torch.tensor(1.0)}
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a file that is missing": (
        {"states": {}},
        "There is no intkey_layer_1_.*bin' ?in|There is no intkey_layer_1_",
    ),
    "a file too many": (
        {"states": {KEY: STATE, "layer_9_comp_block_output_unit_pos_nunit_1#0": STATE}},
        r"intkey_layer_9_.*\.bin belongs to none of its representations",
    ),
    "a tensor too few": (
        {"states": {KEY: {"mask": STATE["mask"]}}},
        "has mask, and a SigmoidMaskIntervention is made",
    ),
    "a tensor too many": (
        {"states": {KEY: {**STATE, "x": STATE["mask"]}}},
        "has mask, temperature, x, and a",
    ),
    "something else": ({"states": {KEY: {"mask": [1.0]}}}, "holds something else than tensors with names"),
    "a list": ({"states": {KEY: [STATE["mask"]]}}, "holds something else than tensors with names"),
    "more values than there are": (
        {"states": {KEY: {**STATE, "mask": torch.zeros(1).expand(10**12)}}},
        "'mask' claims more values than the file has",
    ),
    "fewer types than representations": (
        {"intervention_types": []},
        "no list of representations with one of",
    ),
    "dimensions of others": (
        {"intervention_dimensions": [1, 2]},
        "intervention_dimensions is not one for each",
    ),
    "a dimension that is none": ({"intervention_dimensions": [-3]}, "intervention_dimension is -3"),
    "a representation that is none": (
        {"representations": ["block_output"]},
        "not the fields of a representation",
    ),
    "too many fields": ({"representations": [[0] * 15]}, "not the fields of a representation"),
    "a path for a component": (
        {"representations": [listed(layer=1, component="../../x")]},
        r"Unknown component '../../x'",
    ),
    "a path for a unit": (
        {"representations": [listed(layer=1, unit="/etc/passwd")]},
        "Unknown unit '/etc/passwd'",
    ),
    "a path for a number of units": (
        {"representations": [listed(layer=1, max_number_of_units="1/../../x")]},
        "max_number_of_units is '1/../../x'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_pyvene_would_not_write_is_refused(model, tmp_path, kind):
    changes, message = BROKEN[kind]
    given = {"representations": [listed(layer=1)], "states": {KEY: STATE}} | changes
    write(tmp_path, ["SigmoidMaskIntervention"], given.pop("representations"), given.pop("states"), **given)
    with pytest.raises(iv.StorageError, match=message):
        read(tmp_path, model)


def test_another_size_is_another_model(model, tmp_path):
    state, _ = rotation_state(8, 3)
    write(
        tmp_path, ["LowRankRotatedSpaceIntervention"], [listed(layer=1, low_rank_dimension=3)], {KEY: state}
    )
    with pytest.raises(
        iv.ModelMismatchError, match=r"has the shape \(8, 3\), and in this model it is \(16, 3\)"
    ):
        read(tmp_path, model)
    deep = write(tmp_path / "deep", ["ZeroIntervention"], [listed(layer=30)])
    with pytest.raises(iv.LayerRangeError):
        read(deep, model)


def test_a_rotation_of_tensors_that_are_none_is_refused(model, tmp_path):
    state, _ = rotation_state(HIDDEN, 3)
    name = "rotate_layer.parametrizations.weight.0.base"
    whole = state["rotate_layer.parametrizations.weight.original"]
    decayed = {"rotate_layer.parametrizations.weight.original": 0.99 * whole}
    for changes in ({name: torch.zeros(3)}, {"rotate_layer.x": torch.zeros(1)}, decayed):
        write(
            tmp_path,
            ["LowRankRotatedSpaceIntervention"],
            [listed(layer=1, low_rank_dimension=3)],
            {KEY: state | changes},
        )
        with pytest.raises(iv.StorageError, match="does not hold a LowRankRotatedSpaceIntervention"):
            read(tmp_path, model)


def test_serial_mode_is_not_there(model, tmp_path):
    write(tmp_path, ["ZeroIntervention"], [listed(layer=1)], mode="serial")
    with pytest.raises(iv.NotAvailableError, match="mode='serial' is not available yet"):
        read(tmp_path, model)


def test_weights_of_the_model_are_spoken_of(model, tmp_path):
    write(tmp_path, ["ZeroIntervention"], [listed(layer=1)])
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.warns(
        iv.IntervenableWarning, match="has trained weights of the wrapped model, which are not loaded"
    ):
        read(tmp_path, model)


def test_no_folder_is_said_to_be_none(model, tmp_path):
    with pytest.raises(
        iv.MissingFileError, match=r"There is no config.json in '.*nothing'. Give a folder that pyvene"
    ):
        read(tmp_path / "nothing", model)


# --- pyvene itself ----------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "rotation": ("RotatedSpaceIntervention", {}),
    "rotation of two units": ("RotatedSpaceIntervention", {"max_number_of_units": 2}),
    "parts of a rotation": ("RotatedSpaceIntervention", {"subspace_partition": [[0, 4], [4, 16]]}),
    "low rank": ("LowRankRotatedSpaceIntervention", {"low_rank_dimension": 3}),
    "low rank of two units": (
        "LowRankRotatedSpaceIntervention",
        {"low_rank_dimension": 3, "max_number_of_units": 2},
    ),
    "sigmoid mask": ("SigmoidMaskIntervention", {}),
    "sigmoid mask in a rotation": ("SigmoidMaskRotatedSpaceIntervention", {}),
    "boundless": ("BoundlessRotatedSpaceIntervention", {}),
    "swap": ("VanillaIntervention", {}),
    "zero": ("ZeroIntervention", {}),
    "constant": ("AdditionIntervention", {"source_representation": torch.linspace(-1, 1, HIDDEN)}),
    "noise": ("NoiseIntervention", {}),
    "reading": ("CollectIntervention", {}),
}


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_what_pyvene_saved_gives_what_pyvene_gives(tmp_path, name):
    pv = pytest.importorskip("pyvene")
    kind, fields = CASES[name]
    model = tiny("gpt2")
    entry = pv.RepresentationConfig(1, "block_output", "pos", fields.get("max_number_of_units", 1))
    entry = entry._replace(**fields)
    theirs = pv.IntervenableModel(pv.IntervenableConfig([entry], getattr(pv, kind)), copy.deepcopy(model))
    torch.manual_seed(0)
    (intervention,) = theirs.interventions.values()
    with torch.no_grad():
        for key, weight in intervention.named_parameters():
            if weight.is_floating_point() and weight.dim():
                step = 0.05 * torch.randn_like(weight)
                weight.add_(step.tril(-1) if key.endswith("original") else step)
        if name == "boundless":  # the half by which the masks differ
            positions = torch.arange(HIDDEN) + 0.5
            intervention.intervention_population = nn.Parameter(positions, requires_grad=False)
            intervention.set_temperature(torch.tensor(2.0))
    theirs.save(str(tmp_path))
    ours = read(tmp_path, model)

    count = 4 if name == "noise" else fields.get("max_number_of_units", 1)
    where = [[[0, 2, 1, 3][:count]] * 2]
    sourceless = (
        kind in ("ZeroIntervention", "NoiseIntervention", "CollectIntervention")
        or "source_representation" in fields
    )
    sources = None if sourceless else [SOURCE]
    locations = {"base": where} if sourceless else {"sources->base": (where, where)}
    options = {"subspaces": [[[1], [1]]]} if "subspace_partition" in fields else {}
    if "source_representation" in fields:
        locations = {"sources->base": (None, where)}
    with torch.no_grad():
        expected = theirs(BASE, sources, locations, **options)
        found = ours(BASE, sources, locations, **options)
    if kind == "CollectIntervention":
        assert_close(
            next(iter(found.collected.values())), expected[0][1][0].reshape(2, 1, HIDDEN), rtol=0, atol=1e-5
        )
        return
    assert_close(found.intervened.logits, expected[1].logits, rtol=0, atol=1e-5)
    assert (found.intervened.logits - model(**BASE).logits).abs().max() > 1e-3


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")
def test_the_folders_made_by_hand_are_as_pyvene_makes_them(tmp_path):
    pv = pytest.importorskip("pyvene")
    entries = [
        pv.RepresentationConfig(1, "block_output", "pos", 1, low_rank_dimension=3),
        pv.RepresentationConfig(component="transformer.h[0].mlp.output"),
    ]
    kinds = [pv.LowRankRotatedSpaceIntervention, pv.VanillaIntervention]
    pv.IntervenableModel(pv.IntervenableConfig(entries, kinds), tiny("gpt2")).save(str(tmp_path / "theirs"))
    state, _ = rotation_state(HIDDEN, 3)
    byhand = [listed(layer=1, low_rank_dimension=3), listed(component="transformer.h[0].mlp.output")]
    names = [kind.__name__ for kind in kinds]
    write(
        tmp_path / "ours", names, byhand, {KEY: sized(state, HIDDEN)}, intervention_dimensions=[HIDDEN, None]
    )
    assert sorted(os.listdir(tmp_path / "ours")) == sorted(os.listdir(tmp_path / "theirs"))
    theirs, ours = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "ours"))
    assert {**theirs, "sorted_keys": []} == ours
    one, other = (
        torch.load(tmp_path / name / f"intkey_{KEY}.bin", weights_only=True) for name in ("theirs", "ours")
    )
    assert {key: value.shape for key, value in one.items()} == {
        key: value.shape for key, value in other.items()
    }
    assert ours["intervention_types"][0] == CLASS.format("LowRankRotatedSpaceIntervention")
