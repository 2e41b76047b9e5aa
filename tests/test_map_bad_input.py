"""Models that maps could go wrong on: each is described rightly or refused with the reason, and is left as it was."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
import transformers
from declared import hooks_of
from test_torch_transformers import Block, Mini, ids, spread
from torch import nn
from torch.utils.checkpoint import checkpoint

import intervenable as iv
from intervenable.binding import Places
from intervenable.map_cache import cache_folder, notes_of
from intervenable.map_view import model_map
from intervenable.maps import map_of
from model_maps import Site

SIZES = {
    "vocab_size": 72,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """Every test begins with nothing found out."""
    monkeypatch.setenv("INTERVENABLE_CACHE", str(tmp_path))


def starcoder(**options) -> nn.Module:
    """A tiny model of an architecture that has no row."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.Starcoder2Config(**{**SIZES, **options})
        return spread(transformers.Starcoder2ForCausalLM._from_config(config))


def prompts(batch: int = 2) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 72, (batch, 7), generator=draw)} for _ in range(2)]


def swap(model: nn.Module, component: str, layer: int = 1) -> iv.IntervenableModel:
    return iv.IntervenableModel([iv.RepresentationConfig(layer, component, "pos")], model)


# --- lists of modules -------------------------------------------------------------------------------------


class Repeated(Mini):
    """Its blocks run twice."""

    def forward(self, idx):
        x = self.wte(idx)
        for _ in range(2):
            for block in self.h:
                x = block(x)
        return self.lm_head(self.ln_f(x))


class SideBySide(Mini):
    """Its list of modules is no chain: all read the same."""

    def forward(self, idx):
        x = self.wte(idx)
        return self.lm_head(self.ln_f(sum(block(x) for block in self.h)))


class Between(Mini):
    """Something happens to the stream between its blocks, in place."""

    def forward(self, idx):
        x = self.wte(idx)
        for block in self.h:
            x = block(x)
            x.mul_(1.5)
        return self.lm_head(self.ln_f(x))


class Skipping(Mini):
    """One of its blocks is not used."""

    def forward(self, idx):
        x = self.wte(idx)
        for block in (self.h[0], self.h[2]):
            x = block(x)
        return self.lm_head(self.ln_f(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Mini(shared=True), "its blocks run 3 times in a forward pass"),
        (Repeated(), "its blocks run 2 times in a forward pass"),
        (SideBySide(), "no list of its modules hands a stream of vectors from one entry to the next"),
        (Between(), "no list of its modules hands a stream of vectors from one entry to the next"),
    ],
    ids=["one block at all layers", "blocks that run twice", "no chain", "a stream changed in between"],
)
def test_what_is_no_chain_of_blocks_is_refused_with_the_reason(model, reason):
    model = spread(model)
    model_map(model, example_inputs=ids(0))
    for component in ("block_output", "query_output", "mlp_output", "block_mid"):
        with pytest.raises(iv.UnsupportedModelError, match=reason):
            swap(model, component, layer=0)


@pytest.mark.parametrize("model", [Mini(shared=True), Repeated()], ids=["shared", "repeated"])
def test_a_module_that_runs_several_times_is_no_place_for_one_edit(model):
    model = spread(model)
    entry = iv.RepresentationConfig(None, "h[0].mlp.output", "pos", intervention_type=iv.ZeroIntervention)
    with pytest.raises(iv.NotFiredError, match=r"was applied [23] times"), torch.no_grad():
        iv.IntervenableModel([entry], model)(ids(0))


def test_a_block_that_is_not_used_is_refused_and_the_others_are_not():
    model = spread(Skipping())
    model_map(model, example_inputs=ids(0))
    with torch.no_grad():
        for layer in (0, 2):
            found = swap(model, "block_output", layer)(ids(0), [ids(1)]).intervened
            assert not torch.equal(found, model(**ids(0)))
    with pytest.raises(iv.UnsupportedModelError, match="Layer 1 of Skipping has no 'block_output'"):
        swap(model, "block_output", 1)


# --- models that change what modules have returned -------------------------------------------------------


class InPlaceBlock(Block):
    """Adds to what its parts return where it stands."""

    def forward(self, x):
        stream = self.attn(self.ln_1(x))
        stream.add_(x)
        out = self.mlp(self.ln_2(stream))
        out += stream
        return out


class InPlace(Mini):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(InPlaceBlock() for _ in range(3))


def test_outputs_that_are_changed_in_place_afterwards_are_read_as_they_were():
    plain, model = spread(Mini()), spread(InPlace())
    model.load_state_dict(plain.state_dict())
    for one in (plain, model):
        model_map(one, example_inputs=ids(0))
    names = ("attention_output", "mlp_output", "block_mid", "block_output", "query_output")
    assert set(names) <= set(Places(model).components)
    expected, found = (iv.collect(one, ids(0), list(names)) for one in (plain, model))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-5, rtol=1e-4, msg=str(key))
    with torch.no_grad():
        for name in names:
            left, right = (swap(one, name)(ids(0), [ids(1)]).intervened for one in (plain, model))
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-4, msg=name)


# --- models that are in the middle of something -----------------------------------------------------------


def test_a_model_in_training_with_dropout_gets_its_map_and_stays_in_training():
    model = starcoder(residual_dropout=0.5, embedding_dropout=0.5).train()
    model.model.layers[0].eval()  # a mixed state is kept too
    before = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    found = map_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == before
    assert set(found.components()) == set(map_of(starcoder()).components())


def test_a_model_that_has_to_be_run_itself_is_not_run_with_dropout():
    model = spread(Mini())
    model.h[0].mlp.append(nn.Dropout(0.5))
    model.train()
    with pytest.raises(iv.IntervenableError, match=r"two different results.*call model\.eval\(\) first"):
        model_map(model, example_inputs=ids(0))
    assert all(module.training for module in model.modules())
    assert hooks_of(model) == {}
    assert "mlp_output" in model_map(model.eval(), example_inputs=ids(0)).components


def test_foreign_hooks_are_left_alone_and_change_no_map():
    model, calls = starcoder(), []
    block = model.model.layers[1]
    block.register_forward_hook(lambda *_: calls.append("after"))
    block.mlp.register_forward_pre_hook(lambda *_: calls.append("before"))
    before = hooks_of(model)
    found = map_of(model)
    assert calls == []  # what is run is a tiny model like it
    assert hooks_of(model) == before
    assert found.sites == map_of(starcoder()).sites
    with torch.no_grad():
        swap(model, "mlp_output")(*[prompts()[0], [prompts()[1]]])
    assert calls.count("after") == 1  # the source run ends before
    assert hooks_of(model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_changes_no_map(dtype):
    model = starcoder().to(dtype)
    assert map_of(model).sites == map_of(starcoder()).sites
    base, source = prompts()
    with torch.no_grad():
        found = swap(model, "query_output")(base, [source]).intervened.logits
    assert found.dtype == dtype
    assert not torch.equal(found, model(**base).logits)


def test_gradient_checkpointing_changes_no_map_and_no_gradient():
    gradients = []
    base, source = prompts()
    for checkpointed in (False, True):
        model = starcoder().train()
        if checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": False})
        before = hooks_of(model)  # transformers has one of its own for this
        swap(model, "mlp_output")(base, [source]).intervened.logits.pow(2).mean().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
        assert model.model.layers[1].gradient_checkpointing == checkpointed
        assert hooks_of(model) == before
    torch.testing.assert_close(*gradients)


class Checkpointed(Mini):
    """Calls torch's checkpointing itself, as models written by hand do."""

    reentrant = False

    def forward(self, idx):
        x = self.wte(idx)
        for block in self.h:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.training else block(x)
        return self.lm_head(self.ln_f(x))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("component", ["mlp_output", "block_input", "attention_pattern"])
def test_an_edit_that_backward_would_compute_again_without_is_refused(component, reentrant):
    model = spread(Checkpointed())
    model.reentrant = reentrant
    model_map(model, example_inputs=ids(0))
    model.train()
    unit = "h.query.key" if component == "attention_pattern" else "pos"
    entry = iv.RepresentationConfig(1, component, unit, intervention=iv.ScaleIntervention(0.5))
    declared = iv.IntervenableModel([entry], model)
    with pytest.raises(iv.UnsupportedModelError, match="backward would compute it again without the edit"):
        declared(ids(0))
    assert hooks_of(model) == {}
    with torch.no_grad():
        edited = declared(ids(0)).intervened
        assert not torch.equal(edited, model(**ids(0)))


def test_a_run_that_is_checkpointed_as_a_whole_has_the_gradients_of_the_plain_run():
    gradients, plain = [], spread(Mini())
    for whole in (False, True):
        model = copy.deepcopy(plain)
        entry = iv.RepresentationConfig(
            None, "h[1].mlp.output", "pos", intervention=iv.ScaleIntervention(0.5)
        )
        declared = iv.IntervenableModel([entry], model)

        def run(start, declared=declared):
            return declared(ids(0)).intervened * start

        start = torch.ones((), requires_grad=True)
        output = checkpoint(run, start, use_reentrant=False) if whole else run(start)
        output.pow(2).mean().backward()
        gradients.append(model.wte.weight.grad)
    torch.testing.assert_close(*gradients)


def test_tied_embeddings_stay_tied_and_change_no_map():
    tied, apart = starcoder(tie_word_embeddings=True), starcoder(tie_word_embeddings=False)
    weight = tied.lm_head.weight
    assert weight is tied.model.embed_tokens.weight
    before = weight.detach().clone()
    assert map_of(tied).sites == map_of(apart).sites
    assert tied.lm_head.weight is weight is tied.model.embed_tokens.weight
    assert torch.equal(weight, before)


def test_a_model_without_values_has_a_map_and_is_not_run():
    with torch.device("meta"):
        model = transformers.Starcoder2ForCausalLM(transformers.Starcoder2Config(**SIZES)).eval()
    assert map_of(model).sites == map_of(starcoder()).sites
    with pytest.raises(iv.UnsupportedModelError, match="meta device"):
        swap(model, "query_output")(*prompts()[:1], [prompts()[1]])


# --- sizes ------------------------------------------------------------------------------------------------


def test_one_layer_is_enough():
    model = starcoder(num_hidden_layers=1)
    assert set(map_of(model).components()) == set(map_of(starcoder()).components())
    assert Places(model).layers == 1
    with pytest.raises(iv.LayerRangeError, match="layers 0 to 0"):
        swap(model, "query_output", 1)


def test_a_model_without_layers_has_no_blocks_to_name():
    for model, inputs in ((starcoder(num_hidden_layers=0), None), (spread(Mini(0)), ids(0))):
        if inputs is not None:
            model_map(model, example_inputs=inputs)
        with pytest.raises((iv.UnsupportedModelError, iv.LayerRangeError)):
            swap(model, "block_output", 0)


@pytest.mark.parametrize("cls", ["Starcoder2", "Llama"])
def test_live_weights_win_over_a_config_that_lies_about_the_width_of_heads(cls):
    config = getattr(transformers, f"{cls}Config")(**{**SIZES, "hidden_size": 56, "head_dim": 14})
    model = spread(getattr(transformers, f"{cls}ForCausalLM")._from_config(config))
    told = {name: Places(model).at(name, 1).columns for name in ("query_output", "key_output")}
    lying = copy.deepcopy(model)
    lying.config.head_dim = 16
    for name, columns in told.items():
        assert (columns.width, columns.heads) == (14, 4 if name == "query_output" else 2)
        assert Places(lying).at(name, 1).columns == columns


@pytest.mark.parametrize("field", ["num_attention_heads", "num_key_value_heads"])
def test_no_heads_are_offered_where_queries_and_keys_contradict_each_other(field):
    """Which of the two numbers is wrong, the widths of the matrices do not tell."""
    lying = starcoder()
    setattr(lying.config, field, 2 if field == "num_attention_heads" else 4)
    for component in (
        "head_query_output",
        "head_key_output",
        "head_value_output",
        "head_attention_value_output",
    ):
        with pytest.raises(iv.UnsupportedModelError, match=r"another number of heads, or of key-value heads"):
            Places(lying).at(component, 1)
    assert "mlp_output" in Places(lying).components


@pytest.mark.parametrize("hidden", [16, 32])
def test_a_swap_is_refused_where_the_stream_is_not_as_wide_as_the_config_says(hidden):
    model = starcoder()
    model.config.hidden_size = hidden
    base, source = prompts()
    for component in ("mlp_output", "block_output"):
        with pytest.raises(
            iv.ModelMismatchError, match=rf"is 24 wide, where the model's config says {hidden}"
        ):
            swap(model, component)(base, [source])
    assert hooks_of(model) == {}


@pytest.mark.parametrize("vocabulary", [10, 100])
def test_a_config_that_lies_about_the_vocabulary_can_be_verified(vocabulary):
    model = starcoder()
    model.config.vocab_size = vocabulary
    assert iv.verify(model, components=["block_output"]).passed


# --- asking -----------------------------------------------------------------------------------------------


def test_streams_that_are_added_without_end_are_refused():
    model = starcoder()
    described = model_map(model).map
    sites = {**described.sites, "block_mid": Site("mlp", "input", plus="attention_output")}
    sites["attention_output"] = Site("self_attn", plus="block_mid")
    wrong = dataclasses.replace(described, sites=sites)

    refused = iv.verify(model, model_map=wrong, example_inputs=prompts()[0]).refused
    assert "block_mid + attention_output + block_mid" in refused["block_mid"]
    assert "mlp_output" not in refused


def test_a_stream_that_cannot_be_added_to_another_is_refused_and_stops_nothing_else():
    model = starcoder()
    described = model_map(model).map
    sites = {**described.sites, "block_mid": Site("mlp", plus="attention_contribution", width="any")}
    sites["attention_contribution"] = Site("mlp.c_fc", plus="block_input", width="any")
    wrong = dataclasses.replace(described, sites=sites)

    found = iv.verify(model, model_map=wrong, example_inputs=prompts()[0])
    assert {"block_mid", "attention_contribution"} <= {*found.refused}
    assert {"block_output", "mlp_output", "head_query_output"} <= {*found.components}


def test_two_threads_that_ask_at_once_are_given_the_same_map():
    model, found = starcoder(), []
    threads = [threading.Thread(target=lambda: found.append(map_of(model))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert found[0] is found[1] is found[2]


def test_a_model_whose_inputs_cannot_be_guessed_says_which_and_takes_examples():
    model = spread(Mini())
    with pytest.raises(iv.UnsupportedModelError, match=r"it needs 'idx'(.|\n)*example_inputs="):
        swap(model, "query_output")
    assert not Places(model).known
    model_map(model, example_inputs=ids(0))
    with torch.no_grad():
        assert not torch.equal(swap(model, "query_output")(ids(0), [ids(1)]).intervened, model(**ids(0)))


def test_examples_that_the_model_does_not_run_on_are_refused_with_the_models_own_words():
    with pytest.raises(
        iv.InputError, match=r"Mini does not run on the example_inputs given \(idy\): TypeError: .*idy"
    ):
        model_map(spread(Mini()), example_inputs={"idy": ids(0)["idx"]})


@pytest.mark.parametrize(
    "given",
    [{"ids": torch.ones(2, 5)}, {"input_ids": torch.full((2, 5), 72)}],
    ids=["another name", "no such token"],
)
def test_inputs_on_which_a_model_cannot_be_verified_are_refused_with_its_own_words(given):
    with pytest.raises(iv.InputError, match=r"does not run on the example_inputs given \(\w+\): \w+Error: "):
        iv.verify(starcoder(), example_inputs=given)


def test_inputs_that_are_no_tensors_are_refused():
    with pytest.raises(iv.ConfigError, match=r"has no tensor \(input_ids: ndarray\)\. Give tensors"):
        iv.verify(starcoder(), example_inputs={"input_ids": torch.ones(2, 5).numpy()})


@pytest.mark.parametrize("damage", ["cut short", "another word", "no JSON", "very deep", "a folder"])
def test_a_damaged_file_is_made_again_with_a_note(damage):
    expected = map_of(starcoder())
    (file,) = cache_folder().iterdir()
    text = file.read_text()
    if damage == "a folder":
        file.unlink()
        file.mkdir()
    else:
        damaged = {
            "cut short": text[:100],
            "no JSON": "no",
            "very deep": "[" * 100_000,
            "another word": text.replace("q_proj", "k_proj"),
        }
        file.write_text(damaged[damage])
    model = starcoder()
    found = map_of(model)
    assert found == expected
    assert any("could not be read" in note for note in notes_of(model))
    if damage != "a folder":
        assert file.read_text() == text


@pytest.mark.parametrize("run", [iv.verify, model_map])
def test_a_slip_in_the_name_of_an_input_is_told_with_the_name_meant(run):
    with pytest.raises(
        iv.InputError, match=r"example_inputs has 'inputs_ids', which .* Did you mean 'input_ids'\?"
    ):
        run(starcoder(), example_inputs={"inputs_ids": torch.ones(2, 5, dtype=torch.long)})


def test_inputs_made_in_inference_mode_show_what_others_show():
    given = {"input_ids": torch.arange(10).reshape(2, 5)}
    with torch.inference_mode():
        made_there = {"input_ids": torch.arange(10).reshape(2, 5)}

    assert (
        model_map(starcoder(), example_inputs=made_there).map
        == model_map(starcoder(), example_inputs=given).map
    )
    assert str(iv.verify(starcoder(), example_inputs=made_there)) == str(
        iv.verify(starcoder(), example_inputs=given)
    )
