"""The model that interventions were saved with: compared on loading, saved along, and put on the Hub."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import intervenable as iv
from intervenable.model import IntervenableModel
from intervenable.saving_hub import is_on_the_hub
from tiny_models import HIDDEN, tiny

BASE = {"input_ids": torch.tensor([[3, 5, 7, 9, 11], [4, 6, 8, 10, 12]])}
SOURCE = {"input_ids": torch.tensor([[13, 15, 17, 19, 21], [14, 16, 18, 20, 22]])}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama")


def das(model: nn.Module) -> IntervenableModel:
    entry = iv.RepresentationConfig(
        1, low_rank_dimension=3, intervention_type=iv.LowRankRotatedSpaceIntervention
    )
    return IntervenableModel([entry], model)


def logits(wrapped: IntervenableModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = wrapped(BASE, [SOURCE], {"sources->base": (2, 4)}).intervened.logits
    return result


# --- another model ----------------------------------------------------------------------------------------


def test_a_copy_of_the_model_in_another_dtype_or_place_is_the_model(model, tmp_path):
    das(model).save_pretrained(tmp_path)
    for same in (copy.deepcopy(model), copy.deepcopy(model).bfloat16(), copy.deepcopy(model).double()):
        IntervenableModel.from_pretrained(tmp_path, same)
    das(copy.deepcopy(model).bfloat16()).save_pretrained(tmp_path)
    IntervenableModel.from_pretrained(tmp_path, model)
    without_values = copy.deepcopy(model).to("meta")
    IntervenableModel.from_pretrained(tmp_path, without_values)


def test_a_model_of_another_class_or_size_is_refused_with_what_differs(model, tmp_path):
    das(model).save_pretrained(tmp_path)
    others: dict[str, tuple[nn.Module, list[str]]] = {
        "class": (
            tiny("mistral"),
            [
                "- its class was 'LlamaForCausalLM' and is 'MistralForCausalLM'",
                "- its model_type was 'llama' and is",
            ],
        ),
        "head": (tiny("llama", head="base"), ["- its class was 'LlamaForCausalLM' and is 'LlamaModel'"]),
        "kind": (
            iv.MLPClassifier(HIDDEN, 3, 3),
            ["- its model_type was 'llama' and is None", "- query_heads was 4 and is None"],
        ),
    }
    wider = copy.deepcopy(model.config)
    wider.intermediate_size, wider.num_hidden_layers = 48, 2
    others["sizes"] = (type(model)(wider), ["- layers was 3 and is 2", "- mlp was 40 and is 48"])
    biased = copy.deepcopy(model.config)
    biased.attention_bias = True
    others["parameters"] = (type(model)(biased), ["- it had 11,632 parameters and has "])
    for other, expected in others.values():
        with pytest.raises(iv.ModelMismatchError) as caught:
            IntervenableModel.from_pretrained(tmp_path, other)
        assert f"were saved with another model than this {type(other).__name__}:\n- " in str(caught.value)
        assert str(caught.value).endswith("; check_model=False loads them all the same.")
        for line in expected:
            assert line in str(caught.value)


def test_other_weights_of_the_same_sizes_are_refused_unless_they_are_meant(model, tmp_path):
    wrapped = das(model)
    wrapped.save_pretrained(tmp_path)
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.layers[2].mlp.up_proj.weight.mul_(1.001)
    with pytest.raises(iv.ModelMismatchError) as caught:
        IntervenableModel.from_pretrained(tmp_path, tuned)
    assert "- 1 of its 30 weights have other values (model.layers.2.mlp.up_proj.weight began with " in str(
        caught.value
    )
    assert "check_model='sizes' loads them onto other weights" in str(caught.value)
    for check in ("sizes", False):
        again = IntervenableModel.from_pretrained(tmp_path, tuned, check_model=check)
        assert again.model is tuned
        assert torch.equal(
            again.state_dict()[next(iter(again.state_dict()))], next(iter(wrapped.parameters()))
        )
    with pytest.raises(iv.ConfigError, match="check_model is 'all'; give True"):
        IntervenableModel.from_pretrained(tmp_path, tuned, check_model="all")


def test_weights_that_are_called_otherwise_are_compared_as_far_as_they_can_be(tmp_path):
    class Plain(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.at = nn.Identity()
            self.register_parameter(name, nn.Parameter(torch.ones(4)))

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.at(inputs)
            return result

    entry = iv.RepresentationConfig(component="at.output", intervention_type=iv.ZeroIntervention)
    IntervenableModel([entry], Plain("one")).save_pretrained(tmp_path)
    IntervenableModel.from_pretrained(tmp_path, Plain("one"))
    with pytest.raises(iv.ModelMismatchError, match=r"none of its weights is called as before \(one, ...\)"):
        IntervenableModel.from_pretrained(tmp_path, Plain("other"))


def test_a_size_that_does_not_fit_is_still_refused_where_models_are_not_compared(model, tmp_path):
    das(model).save_pretrained(tmp_path)
    narrow = iv.MLPClassifier(8, 2, 3)
    with pytest.raises(iv.ModelMismatchError, match=r"made for embed_dim=16, and .* is 8 wide here"):
        IntervenableModel.from_pretrained(tmp_path, narrow, check_model=False)
    with pytest.raises(iv.LayerRangeError, match="Layer 1 is out of range"):
        IntervenableModel.from_pretrained(tmp_path, iv.MLPClassifier(16, 1, 3), check_model=False)


def test_a_declared_class_of_models_is_kept_to_as_well(model, tmp_path):
    entry = iv.RepresentationConfig(1, intervention_type=iv.ZeroIntervention)
    config = iv.IntervenableConfig([entry], model_type="LlamaForCausalLM")
    IntervenableModel(config, model).save_pretrained(tmp_path)
    with pytest.raises(iv.ModelMismatchError, match="The configuration is for LlamaForCausalLM"):
        IntervenableModel.from_pretrained(tmp_path, tiny("mistral"), check_model=False)


# --- the model along --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "head", "loader"),
    [
        ("llama", "lm", "AutoModelForCausalLM"),
        ("gpt2", "base", "AutoModel"),
        ("llama", "classifier", "AutoModelForSequenceClassification"),
        ("t5", "lm", "AutoModelForSeq2SeqLM"),
        ("bert", "lm", "AutoModelForMaskedLM"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_was_saved_along_comes_back_with_its_weights(tmp_path, family, head, loader, dtype):
    trained = tiny(family, head=head).to(dtype)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(0.01)
    name = "decoder_block_output" if family == "t5" else "block_output"
    entry = iv.RepresentationConfig(
        1, name, low_rank_dimension=2, intervention_type=iv.LowRankRotatedSpaceIntervention
    )
    wrapped = IntervenableModel([entry], trained.eval())
    wrapped.save_pretrained(tmp_path, include_model=True)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["loader"] == loader
    again = IntervenableModel.from_pretrained(tmp_path)
    assert type(again.model) is type(trained)
    assert not again.model.training
    state, expected = again.model.state_dict(), trained.state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert state[key].dtype == value.dtype
        assert torch.equal(state[key], value)
    if dtype == torch.bfloat16:
        return  # in which transformers does not keep the frequencies of rotary positions
    inputs = BASE | ({"decoder_input_ids": BASE["input_ids"]} if family == "t5" else {})
    other = SOURCE | ({"decoder_input_ids": SOURCE["input_ids"]} if family == "t5" else {})
    with torch.no_grad():
        one, two = (
            wrap(inputs, [other], {"sources->base": (2, 4)}).intervened[0] for wrap in (wrapped, again)
        )
    assert torch.equal(one, two)


def test_the_folder_of_a_model_is_replaced_with_the_rest(tmp_path):
    trained = iv.MLPClassifier(4, 2, 3)
    wrapped = IntervenableModel([iv.RepresentationConfig(1, intervention_type=iv.ZeroIntervention)], trained)
    for value in (1.0, 2.0, 2.0):
        nn.init.constant_(trained.score.bias, value)
        wrapped.save_pretrained(tmp_path, include_model=True)
        again = IntervenableModel.from_pretrained(tmp_path)
        assert torch.equal(again.model.score.bias, trained.score.bias)
        assert len(os.listdir(tmp_path)) == 4
    wrapped.save_pretrained(tmp_path)
    assert len(os.listdir(tmp_path)) == 3
    with pytest.raises(
        iv.ConfigError, match=r"No model was saved in .*: give the MLPClassifier .* as model=\.\.\."
    ):
        IntervenableModel.from_pretrained(tmp_path)


def test_a_model_that_nothing_loads_by_its_config_alone_is_not_saved_along(tmp_path):
    class Mine(iv.MLPClassifier):
        pass

    wrapped = IntervenableModel([iv.RepresentationConfig(1)], Mine(4, 2, 3))
    with pytest.raises(
        iv.ConfigError, match="A Mine cannot be saved along: no class of transformers loads it"
    ):
        wrapped.save_pretrained(tmp_path / "new", include_model=True)
    assert not (tmp_path / "new").exists()


def tampered(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content.pop("checksum", None)
    content["model"] |= changes
    file.write_text(json.dumps(content))


def test_a_model_is_loaded_by_the_classes_of_the_table_alone(model, tmp_path):
    das(model).save_pretrained(tmp_path, include_model=True)
    for name in ("os.system", "pipeline", "AutoTokenizer", "LlamaForCausalLM", "__class__"):
        tampered(tmp_path, loader=name)
        with pytest.raises(iv.StorageError, match=f"wants its model loaded by '{name}', which is none of"):
            IntervenableModel.from_pretrained(tmp_path)
    tampered(tmp_path, loader="AutoModel")
    with pytest.raises(iv.StorageError, match="holds a LlamaModel, and should hold a LlamaForCausalLM"):
        IntervenableModel.from_pretrained(tmp_path)


def test_code_and_pickles_that_come_with_a_model_are_not_run(model, tmp_path):
    das(model).save_pretrained(tmp_path, include_model=True)
    (folder,) = tmp_path.glob("model-*")
    sprung = tmp_path / "sprung"
    (folder / "code.py").write_text(
        f"import pathlib; pathlib.Path({str(sprung)!r}).touch()\nclass Model: pass\n"
    )
    config = json.loads((folder / "config.json").read_text())
    for changes in (
        {"auto_map": {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Model"}},
        {
            "auto_map": {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Model"},
            "model_type": "mine",
        },
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        if "model_type" in changes:
            with pytest.raises(iv.StorageError, match="cannot be loaded"):
                IntervenableModel.from_pretrained(tmp_path)
        else:  # its own class, which is installed
            IntervenableModel.from_pretrained(tmp_path)
        assert not sprung.exists()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(iv.StorageError, match="cannot be loaded"):
        IntervenableModel.from_pretrained(tmp_path)


def test_a_model_whose_folder_is_gone_is_missing(model, tmp_path):
    das(model).save_pretrained(tmp_path, include_model=True)
    (folder,) = tmp_path.glob("model-*")
    shutil.rmtree(folder)
    with pytest.raises(iv.MissingFileError, match=f"{folder.name}, which config.json names, is not in"):
        IntervenableModel.from_pretrained(tmp_path, model)


# --- the hub ----------------------------------------------------------------------------------------------


class Hub:
    """Repositories in a folder, as much of `huggingface_hub.HfApi` as is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: list[str] = []

    def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        self.calls.append(f"create {repo_id} private={private}")
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        self.calls.append(f"branch {branch}")

    def file_exists(self, repo_id: str, filename: str, *, revision: str | None) -> bool:
        return (self.root / repo_id / filename).exists()

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        revision: str | None,
        commit_message: str,
        allow_patterns: list[str],
        delete_patterns: list[str],
    ) -> Any:
        self.calls.append(f"upload {commit_message!r} revision={revision}")
        there = self.root / repo_id
        for pattern in delete_patterns:
            for old in there.glob(pattern):
                old.unlink()
        for pattern in allow_patterns:
            for file in Path(folder_path).glob(pattern):
                target = there / file.relative_to(folder_path)
                target.parent.mkdir(exist_ok=True)
                shutil.copy(file, target)
        return type("Commit", (), {"commit_url": f"https://hub.test/{repo_id}/commit/1"})()

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.calls.append(f"download {repo_id} revision={revision}")
        if not (self.root / repo_id).exists():
            raise OSError("404: no such repository")
        return str(self.root / repo_id)


@pytest.mark.parametrize("include_model", [False, True])
def test_what_is_pushed_to_the_hub_comes_back_from_there(model, tmp_path, include_model):
    hub, wrapped = Hub(tmp_path), das(model)
    address = wrapped.push_to_hub("someone/capital-das", api=hub, private=True, include_model=include_model)
    assert address == "https://hub.test/someone/capital-das/commit/1"
    given = None if include_model else model
    again = IntervenableModel.from_pretrained("someone/capital-das", given, api=hub)
    assert torch.equal(logits(wrapped), logits(again))
    assert hub.calls == [
        "create someone/capital-das private=True",
        "upload 'Save interventions' revision=None",
        "download someone/capital-das revision=None",
    ]
    files = {path.name for path in (tmp_path / "someone" / "capital-das").iterdir()}
    assert len(files) == 3 + include_model
    assert {"README.md", "config.json"} <= files


def test_a_second_push_replaces_the_first_and_leaves_the_card_alone(model, tmp_path):
    hub = Hub(tmp_path)
    repository = tmp_path / "someone" / "das"
    das(model).push_to_hub("someone/das", api=hub)
    (repository / "README.md").write_text("mine")
    changed = das(model)
    nn.init.orthogonal_(next(iter(changed.parameters())))
    changed.push_to_hub("someone/das", api=hub, revision="v2", commit_message="Train longer")
    assert (repository / "README.md").read_text() == "mine"
    assert len(list(repository.glob("interventions-*"))) == 1
    assert hub.calls[-2:] == ["branch v2", "upload 'Train longer' revision=v2"]
    again = IntervenableModel.from_pretrained("someone/das", model, api=hub, revision="v2")
    assert torch.equal(logits(changed), logits(again))
    das(model).push_to_hub("someone/das", api=hub, card="# Anew")
    assert (repository / "README.md").read_text() == "# Anew"


def test_the_card_says_what_is_there_and_how_to_load_it(model, tmp_path):
    hub, named = Hub(tmp_path), copy.deepcopy(model)
    named.config._name_or_path = "somebody/tiny-llama"
    das(named).push_to_hub("someone/das", api=hub)
    card = (tmp_path / "someone" / "das" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: intervenable\n")
    assert "base_model: somebody/tiny-llama\n---\n" in card
    row = "| `layer_1.block_output.pos` | LowRankRotatedSpaceIntervention | 'block_output' of layer 1 | pos |"
    assert row in card or "| `layer_1.block_output.pos` | LowRankRotatedSpaceIntervention |" in card
    assert 'lm = LlamaForCausalLM.from_pretrained("somebody/tiny-llama")' in card
    assert 'model = iv.IntervenableModel.from_pretrained("someone/das", model=lm)' in card


def test_nothing_is_sent_where_something_cannot_be_saved_or_has_no_name(model, tmp_path):
    hub = Hub(tmp_path)
    with pytest.raises(iv.ConfigError, match="'das' is no name of a repository; give 'owner/name'"):
        das(model).push_to_hub("das", api=hub)
    function = IntervenableModel([iv.RepresentationConfig(1, intervention=lambda base: base)], model)
    with pytest.raises(iv.ConfigError, match="Unknown function '<lambda>'"):
        function.push_to_hub("someone/das", api=hub)
    assert hub.calls == []


def test_a_hub_that_fails_is_an_error_of_ours(model, tmp_path):
    class Broken(Hub):
        def upload_folder(self, **options: Any) -> Any:
            raise ConnectionError("no network")

    with pytest.raises(
        iv.StorageError, match=r"someone/das could not be put on the Hub: no network .*logged in"
    ):
        das(model).push_to_hub("someone/das", api=Broken(tmp_path))
    with pytest.raises(
        iv.StorageError, match=r"'no/body' could not be fetched from the Hub: 404.* write './no/body'"
    ):
        IntervenableModel.from_pretrained("no/body", model, api=Hub(tmp_path))
    with pytest.raises(
        iv.ConfigError, match=r"revision='main' is for repositories of the Hub, and '.*' is a folder"
    ):
        IntervenableModel.from_pretrained(tmp_path, model, revision="main")


def test_the_hub_is_asked_only_for_what_can_be_nothing_else(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    asked = {
        "owner/name": True,
        "owner/name.v2": True,
        "runs/das": False,
        "./owner/name": False,
        "name": False,
    }
    asked |= {
        "/owner/name": False,
        "../owner/name": False,
        "a/b/c": False,
        "owner/": False,
        "owner\\name": False,
    }
    for name, expected in asked.items():
        assert is_on_the_hub(name) == expected, name
    assert not is_on_the_hub(Path("owner/name"))
    with pytest.raises(iv.MissingFileError, match="There is no folder 'runs/das'"):
        IntervenableModel.from_pretrained("runs/das", model, api=None)
