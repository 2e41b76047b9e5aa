"""What is saved comes back bit for bit, whichever way it was declared; what has no form in a file is refused."""

from __future__ import annotations

import copy
import json
import os
import threading
from typing import Any

import pytest
import torch
from built_in_interventions import BUILT_INS, halfway, moved_off_start
from torch import Tensor, nn

import intervenable as iv
import interventions
from intervenable.model import IntervenableModel
from interventions import Intervention
from tiny_models import HIDDEN, tiny

BASE = {"input_ids": torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])}
SOURCE = {"input_ids": torch.tensor([[13, 15, 17, 19, 21], [14, 16, 18, 20, 22]])}
CLASSES = [
    cls
    for cls in vars(interventions).values()
    if isinstance(cls, type) and issubclass(cls, Intervention) and cls is not Intervention
]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama")


def entry(intervention: Any = None, layer: int = 1, **fields: Any) -> iv.RepresentationConfig:
    """The output of one block, with an instance or a function."""
    return iv.RepresentationConfig(layer, "block_output", intervention=intervention, **fields)


def kept(wrapped: IntervenableModel, folder: Any, **options: Any) -> IntervenableModel:
    """The same model from a folder."""
    wrapped.save_pretrained(folder)
    return IntervenableModel.from_pretrained(folder, wrapped.model, **options)


def bits(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.shape, tensor.detach().reshape(-1).contiguous().view(torch.uint8).tolist()


def states_agree(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(bits(left[name]) == bits(right[name]) for name in left)


def run(wrapped: IntervenableModel, positions: Any = ([1], [3]), **options: Any) -> Tensor:
    """Logits after the interventions, in evaluation mode, from the same random numbers."""
    torch.manual_seed(5)
    wrapped.eval()
    entries = wrapped._bound
    sources = [
        SOURCE if one.intervention.accepts_source and one.constant is None else None for one in entries
    ]
    groups = {one.group: source for one, source in zip(entries, sources, strict=True)}
    locations = {"sources->base": tuple([[side] * 2] * len(entries) for side in positions)}
    with torch.no_grad():
        output = wrapped(BASE, list(groups.values()), locations, **options)
    result: Tensor = output.intervened.logits
    return torch.cat([result.flatten(), *(value.flatten() for value in output.collected.values())])


def same(one: IntervenableModel, other: IntervenableModel, **options: Any) -> bool:
    assert states_agree(one, other)
    assert one.names == other.names
    return torch.equal(run(one, **options), run(other, **options))


# --- every class ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_INS)
def test_every_intervention_comes_back_bit_for_bit(model, tmp_path, name):
    wrapped = IntervenableModel([entry(moved_off_start(BUILT_INS[name](HIDDEN)))], model)
    again = kept(wrapped, tmp_path)
    assert same(wrapped, again)
    (one,), (other,) = wrapped.interventions.values(), again.interventions.values()
    assert type(one) is type(other)
    assert one is not other
    assert one.to_config() == other.to_config()
    assert not again.training


def test_those_are_all_classes_there_are():
    covered = {type(make(HIDDEN)) for make in BUILT_INS.values()}
    assert set(CLASSES) - covered == {interventions.KnockoutIntervention}  # for scores alone: below


def test_a_knockout_comes_back(tmp_path):
    eager = tiny("llama")
    place = iv.RepresentationConfig(
        1,
        "attention_scores",
        "h.query.key",
        intervention_type=iv.KnockoutIntervention,
        where={"heads": 0, "queries": 4, "keys": 1},
    )
    wrapped = IntervenableModel([place], eager)
    again = kept(wrapped, tmp_path)
    with torch.no_grad():
        results = [one(BASE).intervened.logits for one in (wrapped, again)]
    assert torch.equal(*results)
    assert not torch.equal(results[0], eager(**BASE).logits)
    assert again.config == wrapped.config


DECLARED = {
    "RotatedSpaceIntervention": {"subspace_partition": [[0, 4], [4, 16]]},
    "LowRankRotatedSpaceIntervention": {"low_rank_dimension": 3, "subspace_partition": [[0, 1], [1, 3]]},
    "BoundlessRotatedSpaceIntervention": {},
    "SigmoidMaskIntervention": {},
    "SigmoidMaskRotatedSpaceIntervention": {},
    "AutoencoderIntervention": {"latent_dim": 40},
    "JumpReLUAutoencoderIntervention": {"low_rank_dimension": 40},
    "LoreftIntervention": {"low_rank_dimension": 3},
    "ConsreftIntervention": {"low_rank_dimension": 3},
    "NodireftIntervention": {"low_rank_dimension": 3},
    "CollectIntervention": {},
    "NoiseIntervention": {},
}


@pytest.mark.parametrize("name", DECLARED)
def test_what_was_declared_by_its_class_comes_back_as_it_was_declared(model, tmp_path, name):
    config = iv.IntervenableConfig([entry(**DECLARED[name])], name)
    wrapped = IntervenableModel(config, model)
    moved_off_start(wrapped)
    again = kept(wrapped, tmp_path)
    assert again.config == config
    assert again.config.model_dump_json() == config.model_dump_json()
    assert again.config.type_of(0) is interventions.intervention_named(name)
    assert same(wrapped, again)
    # And it goes on from there.
    assert states_agree(kept(again, tmp_path), wrapped)


# --- how interventions are shared and declared ------------------------------------------------------------


def test_linked_ones_are_kept_once_and_stay_one(model, tmp_path):
    linked = [entry(layer=layer, low_rank_dimension=2, intervention_link_key="b") for layer in (0, 2)]
    other = entry(layer=1, low_rank_dimension=2)
    wrapped = IntervenableModel(
        iv.IntervenableConfig([linked[0], other, linked[1]], iv.LowRankRotatedSpaceIntervention), model
    )
    moved_off_start(wrapped)
    again = kept(wrapped, tmp_path)
    one, between, two = again.interventions.values()
    assert one is two
    assert one is not between
    assert len(list(again.parameters())) == 2
    assert same(wrapped, again)
    assert len(json.loads((tmp_path / "config.json").read_text())["interventions"]) == 2


def test_one_instance_given_twice_stays_one(model, tmp_path):
    shared = iv.LowRankRotatedSpaceIntervention(HIDDEN, 2)
    wrapped = IntervenableModel([entry(shared, layer=0), entry(shared, layer=2)], model)
    again = kept(wrapped, tmp_path)
    one, two = again.interventions.values()
    assert one is two
    assert again.config.representations[0].intervention is one
    assert same(wrapped, again)


def test_groups_names_and_places_come_back(model, tmp_path):
    entries = [
        entry(group_key=("a", 1), name="first", where=("last", 0)),
        iv.RepresentationConfig(
            0, "mlp_output", group_key=("a", 1), where={"positions": [1, 2]}, name="second one"
        ),
        iv.RepresentationConfig(2, "head_attention_value_output", "h.pos", group_key=2.5),
        iv.RepresentationConfig(component="model.layers[1].mlp.output"),
        iv.RepresentationConfig(component="logits"),
    ]
    config = iv.IntervenableConfig(entries, iv.VanillaIntervention, model_type="LlamaForCausalLM")
    wrapped = IntervenableModel(config, model)
    again = kept(wrapped, tmp_path)
    assert again.config == wrapped.config
    assert again.names == wrapped.names
    assert [one.group for one in again._bound] == [0, 0, 1, 2, 3]


def test_types_for_all_for_each_and_none_come_back(model, tmp_path):
    own = iv.RepresentationConfig(0, "block_output", intervention_type=iv.AdditionIntervention)
    for listed in (
        iv.SubtractionIntervention,
        [iv.SubtractionIntervention, None, iv.AdditionIntervention],
    ):
        config = iv.IntervenableConfig([entry(), entry(iv.ZeroIntervention()), own], listed)
        again = kept(IntervenableModel(config, model), tmp_path)
        assert again.config == config
        kinds = [type(one).__name__ for one in again.interventions.values()]
        assert kinds == ["SubtractionIntervention", "ZeroIntervention", "AdditionIntervention"]


def test_registered_functions_come_back_as_functions(model, tmp_path):
    wrapped = IntervenableModel([entry(halfway), entry(iv.CallableIntervention(halfway), layer=2)], model)
    again = kept(wrapped, tmp_path)
    assert again.config.representations[0].intervention is halfway
    assert isinstance(again.config.representations[1].intervention, iv.CallableIntervention)
    assert again.config.representations[1].intervention.function is halfway
    assert same(wrapped, again)


def test_a_function_within_an_intervention_comes_back_by_its_name(model, tmp_path):
    if "test_saving/softplus" not in interventions.registry._callables:
        iv.register_callable("test_saving/softplus", nn.functional.softplus)
    wrapped = IntervenableModel(
        [entry(iv.LoreftIntervention(HIDDEN, 2, act_fn=nn.functional.softplus, dropout=0.1))], model
    )
    again = kept(wrapped, tmp_path)
    (loaded,) = again.interventions.values()
    assert loaded.act_fn is nn.functional.softplus
    assert loaded.dropout == 0.1
    assert same(wrapped, again)


# --- constants --------------------------------------------------------------------------------------------

RANDOM = torch.Generator().manual_seed(0)
CONSTANT = torch.randn(HIDDEN, generator=RANDOM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_declared_constants_come_back_in_their_dtype(model, tmp_path, dtype):
    value = CONSTANT.to(dtype)
    one = IntervenableModel(
        iv.IntervenableConfig([entry(source_representation=value)], iv.AdditionIntervention), model
    )
    several = IntervenableModel(
        iv.IntervenableConfig(
            [entry(), entry(layer=2)], iv.AdditionIntervention, intervention_constant_sources=[None, value]
        ),
        model,
    )
    for wrapped in (one, several):
        again = kept(wrapped, tmp_path)
        assert again.config == wrapped.config
        assert bits(again._bound[-1].constant) == bits(value)
        assert same(wrapped, again)


def test_constants_that_are_no_numbers_come_back(model, tmp_path):
    value = CONSTANT.clone()
    value[:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    wrapped = IntervenableModel(
        iv.IntervenableConfig([entry(source_representation=value)], iv.VanillaIntervention), model
    )
    assert bits(kept(wrapped, tmp_path)._bound[0].constant) == bits(value)


def test_a_constant_that_is_trained_comes_back_as_it_is_now(model, tmp_path):
    parameter, tensor = nn.Parameter(CONSTANT.clone()), CONSTANT.clone().requires_grad_()
    wrapped = IntervenableModel(
        iv.IntervenableConfig(
            [entry(source_representation=parameter), entry(layer=2, source_representation=tensor)],
            iv.AdditionIntervention,
        ),
        model,
    )
    with torch.no_grad():
        parameter.add_(1)
        tensor.mul_(2)
    first, second = (one.constant for one in kept(wrapped, tmp_path)._bound)
    assert isinstance(first, nn.Parameter)
    assert not isinstance(second, nn.Parameter)
    assert second.requires_grad
    assert second.is_leaf
    assert torch.equal(first, CONSTANT + 1)
    assert torch.equal(second, CONSTANT * 2)


@pytest.mark.parametrize("trained", [False, True])
def test_constants_of_interventions_come_back(model, tmp_path, trained):
    value = nn.Parameter(CONSTANT.clone()) if trained else CONSTANT
    wrapped = IntervenableModel([entry(iv.AdditionIntervention(source_representation=value))], model)
    again = kept(wrapped, tmp_path)
    (loaded,) = again.interventions.values()
    assert isinstance(loaded.source_representation, nn.Parameter) == trained
    assert len(list(again.parameters())) == int(trained)
    with torch.no_grad():
        one, other = (wrap(BASE, unit_locations={"base": 1}).intervened.logits for wrap in (wrapped, again))
    assert torch.equal(one, other)
    assert states_agree(wrapped, again)


def test_a_constant_set_after_all_was_declared_comes_back(model, tmp_path):
    wrapped = IntervenableModel(iv.IntervenableConfig([entry()], iv.AdditionIntervention), model)
    next(iter(wrapped.interventions.values())).set_source_representation(CONSTANT)
    again = kept(wrapped, tmp_path)
    assert torch.equal(next(iter(again.interventions.values())).source_representation, CONSTANT)
    assert again.config == wrapped.config


# --- state beyond the tensors -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_come_back(model, tmp_path, dtype):
    wrapped = IntervenableModel(
        [entry(moved_off_start(iv.BoundlessRotatedSpaceIntervention(HIDDEN)).to(dtype))], model
    )
    again = kept(wrapped, tmp_path)
    assert {weight.dtype for weight in again.parameters()} == {dtype}
    assert same(wrapped, again)


def test_a_whole_model_in_half_precision_comes_back(tmp_path):
    half = tiny("llama").bfloat16()
    wrapped = IntervenableModel(
        iv.IntervenableConfig([entry(low_rank_dimension=3)], iv.LowRankRotatedSpaceIntervention), half
    ).to(torch.bfloat16)
    assert same(wrapped, kept(wrapped, tmp_path))


def test_temperatures_frozen_weights_and_settings_come_back(model, tmp_path):
    wrapped = IntervenableModel(
        [
            entry(iv.BoundlessRotatedSpaceIntervention(HIDDEN, 3.0, trainable_temperature=True)),
            entry(iv.SigmoidMaskIntervention(HIDDEN), layer=2),
            entry(iv.LowRankRotatedSpaceIntervention(HIDDEN, 2, sees="per_unit"), layer=0),
        ],
        model,
    )
    wrapped.set_temperature(0.37)
    next(iter(wrapped.parameters())).requires_grad_(False)
    again = kept(wrapped, tmp_path)
    flags = [[weight.requires_grad for weight in one.parameters()] for one in (wrapped, again)]
    assert flags[0] == flags[1]
    assert flags[0].count(False) == 1
    first, second, third = again.interventions.values()
    assert isinstance(first.temperature, nn.Parameter)
    temperatures = [one.temperature.item() for one in (first, second)]
    assert temperatures == [torch.tensor(0.37).item()] * 2
    assert third.sees == "per_unit"


def test_loading_draws_no_random_numbers_and_saving_changes_nothing(model, tmp_path):
    wrapped = IntervenableModel([entry(iv.RotatedSpaceIntervention(HIDDEN))], model).train()
    before = copy.deepcopy(wrapped.state_dict())
    torch.manual_seed(1)
    expected = torch.randn(3)
    torch.manual_seed(1)
    kept(wrapped, tmp_path)
    assert torch.equal(torch.randn(3), expected)
    assert wrapped.training
    assert all(torch.equal(value, wrapped.state_dict()[name]) for name, value in before.items())


def test_the_same_state_gives_the_same_bytes_and_no_other_files(model, tmp_path):
    wrapped = IntervenableModel([entry(iv.RotatedSpaceIntervention(HIDDEN))], model)
    contents = []
    for _ in range(3):
        wrapped.save_pretrained(tmp_path)
        files = sorted(path for path in tmp_path.iterdir() if path.suffix in (".json", ".safetensors"))
        contents.append({path.name: path.read_bytes() for path in files})
        assert len(os.listdir(tmp_path)) == 3  # and the lock
    assert contents[0] == contents[1] == contents[2]
    moved_off_start(wrapped)
    assert wrapped.save_pretrained(str(tmp_path)) == tmp_path
    assert len(os.listdir(tmp_path)) == 3
    assert states_agree(wrapped, IntervenableModel.from_pretrained(tmp_path, model))


def test_several_threads_that_save_to_one_folder_leave_the_state_of_one(model, tmp_path):
    several = [IntervenableModel([entry(iv.RotatedSpaceIntervention(HIDDEN))], model) for _ in range(4)]
    threads = [
        threading.Thread(target=one.save_pretrained, args=(tmp_path,)) for one in several for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = IntervenableModel.from_pretrained(tmp_path, model)
    assert sum(states_agree(one, again) for one in several) == 1
    assert len(os.listdir(tmp_path)) == 3


def test_who_reads_while_others_write_finds_one_state_or_another(model, tmp_path):
    several = [IntervenableModel([entry(iv.RotatedSpaceIntervention(HIDDEN))], model) for _ in range(2)]
    several[0].save_pretrained(tmp_path)
    done = threading.Event()
    writer = threading.Thread(
        target=lambda: [one.save_pretrained(tmp_path) for _ in range(10) for one in several] and done.set()
    )
    writer.start()
    read = 0
    while not done.is_set():
        again = IntervenableModel.from_pretrained(tmp_path, model)
        assert sum(states_agree(one, again) for one in several) == 1
        read += 1
    writer.join()
    assert read > 3


# --- classes of the user's --------------------------------------------------------------------------------


class Turned(Intervention):
    """A class with arguments, a parameter, a buffer and a submodule of its own."""

    def __init__(self, embed_dim: int, angle: float, labels: list[str] | None = None) -> None:
        super().__init__(embed_dim=embed_dim)
        self.angle = angle
        self.labels = labels
        self.weight = nn.Parameter(torch.randn(embed_dim))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.inner = nn.Linear(embed_dim, embed_dim)

    def forward(self, base: Tensor, source: Tensor) -> Tensor:
        return base + self.angle * self.inner(source) * self.weight


def test_classes_of_the_users_come_back_by_the_name_in_a_registry(model, tmp_path):
    wrapped = IntervenableModel([entry(Turned(HIDDEN, 0.25, ["a", "b"]))], model)
    next(iter(wrapped.interventions.values())).count += 2**60 + 1
    wrapped.save_pretrained(tmp_path, registry={"Turned": Turned})
    again = IntervenableModel.from_pretrained(tmp_path, model, registry={"Turned": Turned})
    assert same(wrapped, again)
    (loaded,) = again.interventions.values()
    assert loaded.labels == ["a", "b"]
    with pytest.raises(iv.UnknownNameError) as caught:
        IntervenableModel.from_pretrained(tmp_path, model)
    assert str(caught.value).startswith("Unknown intervention class 'Turned'.")
    assert "registry={'Turned': TheClass}; none is ever imported for a name." in str(caught.value)


def test_registered_classes_of_the_users_come_back(model, tmp_path):
    cls = type("Registered", (Turned,), {})
    name = "test_saving/registered"
    if name not in interventions.registry._classes:
        iv.register_intervention(cls, name=name)
    cls = interventions.intervention_named(name)
    wrapped = IntervenableModel([entry(cls(HIDDEN, 1.5))], model)
    assert same(wrapped, kept(wrapped, tmp_path))


def test_a_registry_comes_before_what_is_registered(model, tmp_path):
    class MyZero(iv.ZeroIntervention):
        pass

    IntervenableModel([entry(iv.ZeroIntervention())], model).save_pretrained(tmp_path)
    again = IntervenableModel.from_pretrained(tmp_path, model, registry={"ZeroIntervention": MyZero})
    assert type(next(iter(again.interventions.values()))) is MyZero
    with pytest.raises(iv.ConfigError, match=r"registry gives the name 'ZeroIntervention' to .*MyZero"):
        IntervenableModel([entry(iv.ZeroIntervention())], model).save_pretrained(
            tmp_path, registry={"ZeroIntervention": MyZero}
        )


@pytest.mark.parametrize(
    "registry", [{"a": nn.Linear}, {"": Turned}, {3: Turned}, [Turned], {"a": "os.system"}]
)
def test_a_registry_of_something_else_is_refused(model, tmp_path, registry):
    with pytest.raises(iv.ConfigError, match="registry"):
        IntervenableModel([entry(iv.ZeroIntervention())], model).save_pretrained(tmp_path, registry=registry)
    assert os.listdir(tmp_path) == []


# --- what has no form in a file ---------------------------------------------------------------------------


class Forgetful(Intervention):
    """A class that does not keep its argument."""

    def __init__(self, secret: int) -> None:
        super().__init__()

    def forward(self, base: Tensor) -> Tensor:
        return base


class Unnamed(Turned):
    """A class that nobody knows."""


class Chatty(Intervention):
    """A class with state that is no tensor."""

    def get_extra_state(self) -> str:
        return "words"

    def set_extra_state(self, state: str) -> None:
        pass

    def forward(self, base: Tensor) -> Tensor:
        return base


WITHOUT_FORM = {
    "an unregistered class": (lambda: Unnamed(HIDDEN, 1.0), "The intervention class Unnamed has no name"),
    "a lambda": (lambda: lambda base: base, r"Unknown function '<lambda>'.*\n.*\n.*register_callable"),
    "an unregistered function": (lambda: iv.CallableIntervention(torch.tanh), "Unknown function 'tanh'"),
    "an unregistered activation": (
        lambda: iv.LoreftIntervention(HIDDEN, 2, act_fn=torch.cosh),
        "Unknown function 'cosh'",
    ),
    "a module with weights": (
        lambda: iv.CallableIntervention(nn.Linear(HIDDEN, HIDDEN)),
        "has weights of its own",
    ),
    "a forgotten argument": (lambda: Forgetful(3), "does not keep its constructor argument 'secret'"),
    "state that is no tensor": (Chatty, "keeps '_extra_state', a str; only tensors can be saved"),
    "a number that is none": (
        lambda: Turned(HIDDEN, float("inf")),
        "Turned has an argument that JSON has no form for: Out of range float values",
    ),
    "a tensor without values": (
        lambda: iv.LowRankRotatedSpaceIntervention(HIDDEN, 2).to("meta"),
        "on the meta device, without values",
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_FORM)
def test_what_has_no_form_in_a_file_is_refused_before_anything_is_written(model, tmp_path, kind):
    make, message = WITHOUT_FORM[kind]
    names = {"Forgetful": Forgetful, "Chatty": Chatty, "Turned": Turned}
    wrapped = IntervenableModel([entry(iv.ZeroIntervention()), entry(make(), layer=2)], model)
    with pytest.raises(iv.ConfigError, match=message) as caught:
        wrapped.save_pretrained(tmp_path / "new", registry=names)
    assert str(caught.value).startswith("representation 1 (layer_2.block_output.pos): ")
    assert not (tmp_path / "new").exists()


def test_all_that_has_no_form_is_said_at_once(model, tmp_path):
    wrapped = IntervenableModel([entry(lambda base: base), entry(Turned(HIDDEN, 1.0), layer=2)], model)
    with pytest.raises(iv.ConfigError) as caught:
        wrapped.save_pretrained(tmp_path)
    assert len(caught.value.faults) == 2
    assert os.listdir(tmp_path) == []


def test_positions_that_a_function_says_have_no_form(model, tmp_path):
    wrapped = IntervenableModel([entry(iv.ZeroIntervention(), where=lambda view: [0])], model)
    with pytest.raises(iv.ConfigError, match=r"representation 0"):
        wrapped.save_pretrained(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_configuration_that_was_changed_since_is_not_saved_for_what_it_was(model, tmp_path):
    wrapped = IntervenableModel(iv.IntervenableConfig([entry()]), model)
    wrapped.config.add_intervention(entry(layer=2))
    with pytest.raises(iv.ConfigError, match="configuration was changed since"):
        wrapped.save_pretrained(tmp_path)


def test_a_missing_folder_is_said_to_be_missing(model, tmp_path):
    for name in (tmp_path / "nothing", f"{tmp_path}/nothing", "./nothing", "nothing"):
        with pytest.raises(iv.MissingFileError, match=r"There is no folder '.*nothing'"):
            IntervenableModel.from_pretrained(name, model)
    with pytest.raises(FileNotFoundError, match=r"There is no config.json in"):
        IntervenableModel.from_pretrained(tmp_path, model)
