"""Models in adapters, compiled, parallel, averaged: every component is there, and the results are their own."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
from declared import at, everything, hooks_of, located, main_output, map_of, same_bits, wrapped
from torch import nn
from torch.optim.swa_utils import AveragedModel

import intervenable as iv
from intervenable.binding import Places
from tiny_models import HIDDEN, tiny, tiny_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore::intervenable.CompiledModelWarning"),
    pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning"),
]


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def blocks_compiled(model: nn.Module) -> nn.Module:
    blocks = blocks_of(model)
    for layer, block in enumerate(blocks):
        blocks[layer] = torch.compile(block, backend="eager")
    return model


def blocks_compiled_in_place(model: nn.Module) -> nn.Module:
    for block in blocks_of(model):
        block.compile(backend="eager")
    return model


def forward_compiled(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_and_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(compiled(model))


COMPILED = [
    compiled,
    compiled_in_place,
    blocks_compiled,
    blocks_compiled_in_place,
    forward_compiled,
    compiled_and_parallel,
]
WRAPPERS = [*COMPILED, nn.DataParallel, AveragedModel]


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of blocks of a tiny model without wrappers."""
    found = model.get_submodule(map_of(model).blocks)
    assert isinstance(found, nn.ModuleList)
    return found


def prompts(model: nn.Module) -> tuple[dict, dict]:
    return tiny_inputs(model, seed=0), tiny_inputs(model, seed=1)


def state_of(model: nn.Module) -> dict:
    hidden = {"_compiled_call_impl"}
    return {
        path: {
            **{name: value for name, value in vars(module).items() if isinstance(value, (bool, int, str))},
            "attributes": sorted(set(vars(module)) - hidden),
            "forward": vars(module).get("forward"),
        }
        for path, module in model.named_modules()
    }


# --- the same as without the wrapper ----------------------------------------------------------------------


CASES = [
    *(("llama", wrap) for wrap in WRAPPERS),
    *(("mixtral", wrap) for wrap in (compiled, nn.DataParallel)),
]


@pytest.mark.parametrize(("family", "wrap"), [*CASES, ("gpt2", compiled), ("bert", compiled)])
def test_a_wrapper_has_all_components_of_the_model_inside_and_the_same_results(family, wrap):
    here, model = tiny(family), wrap(tiny(family)).eval()
    base, source = prompts(here)
    with torch.no_grad():
        model(**base)  # what is compiled is compiled without our hooks
    before = state_of(model)
    assert Places(model).components == Places(here).components
    places = everything(here)
    for chosen in ([place] for place in places) if wrap is nn.DataParallel else (places[::2], places[1::2]):
        where = [located(here, *place, "ragged") for place in chosen]
        with torch.no_grad():
            expected, result = (
                wrapped(one, *(at(here, *place) for place in chosen))(
                    base, [source], {"sources->base": (where, where)}
                ).intervened
                for one in (here, model)
            )
        assert same_bits(result, expected), chosen
    names = [name for name in Places(here).components if name != "head_attention_output"]
    padded = tiny_inputs(here, padding="left", batch=3)
    expected, found = (iv.collect(one, padded, names) for one in (here, model))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert hooks_of(model) == {}
    assert state_of(model) == before


# --- compiled ---------------------------------------------------------------------------------------------


def test_that_a_compiled_model_is_not_run_compiled_is_said_once():
    model = compiled(tiny("llama"))
    base, source = prompts(model)
    declared = wrapped(model, at(tiny("llama"), "block_output"))
    with pytest.warns(iv.CompiledModelWarning) as told:
        declared(base, [source])
    assert str(told[0].message) == (
        "OptimizedModule is compiled. Its runs with interventions use the modules as they were written, since"
        " compiled code does not look at hooks. Filter out intervenable.CompiledModelWarning to be rid of this note."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        declared(base, [source])


@pytest.mark.parametrize("wrap", [compiled, blocks_compiled_in_place])
def test_plain_runs_of_a_compiled_model_stay_compiled(wrap):
    calls = []

    def backend(graph, _):
        def run(*args):
            calls.append(1)
            return graph.forward(*args)

        return run

    model = tiny("gpt2")
    if wrap is compiled:
        model = torch.compile(model, backend=backend)
    else:
        for block in blocks_of(model):
            block.compile(backend=backend)
    base, source = prompts(model)
    declared = wrapped(model, at(tiny("gpt2"), "block_output"))
    with torch.no_grad():
        model(**base)
        before = len(calls)
        declared(base, [source], output_original_output=True)
        assert len(calls) == before > 0
        model(**base)
    assert len(calls) > before


def test_threads_may_edit_compiled_models_at_the_same_time():
    models = [compiled_in_place(tiny("llama")) for _ in range(2)]
    base, source = prompts(models[0])
    declared = [
        wrapped(model, at(model, component))
        for model, component in zip(models, ("query_output", "mlp_output"), strict=True)
    ]
    with torch.no_grad():
        expected = [one(base, [source]).intervened.logits for one in declared]
        found: dict[int, list[torch.Tensor]] = {0: [], 1: []}

        def work(index: int) -> None:
            with torch.no_grad():
                found[index] += [declared[index](base, [source]).intervened.logits for _ in range(10)]

        threads = [threading.Thread(target=work, args=(index,)) for index in found]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(one, expected[index]) for index, several in found.items() for one in several)
    assert all(len(several) == 10 for several in found.values())
    assert torch._dynamo.eval_frame._stance.stance == "default"


@pytest.mark.parametrize("wrap", [compiled, blocks_compiled])
def test_a_compiled_model_is_swept_and_trained_on_like_the_plain_one(wrap):
    here, model = tiny("llama"), wrap(tiny("llama"))
    clean, corrupted = (tiny_inputs(here, batch=1, seed=seed) for seed in (0, 1))
    metric = iv.metrics.logit_difference(None, 5, 6)
    for component in ("block_input", "attention_output"):
        plain, found = (
            iv.patching.sweep(one, clean, corrupted, component, axes=("layer", "pos"), metric=metric).values
            for one in (here, model)
        )
        assert torch.equal(plain, found)
    gradients = []
    for one in (here, model):
        torch.manual_seed(0)
        entry = at(here, "block_output", low_rank_dimension=2)
        das = wrapped(one, entry, types=iv.LowRankRotatedSpaceIntervention)
        main_output(das(clean, [corrupted], {"sources->base": 3}).intervened).pow(2).mean().backward()
        gradients.append(das.get_trainable_parameters()[0].grad)
    assert torch.equal(*gradients)


# --- what a wrapper hands on ------------------------------------------------------------------------------


def test_left_padding_gives_the_same_through_a_wrapper_that_names_no_inputs():
    here, model = tiny("gpt2"), nn.DataParallel(tiny("gpt2")).eval()
    base, source = (tiny_inputs(here, padding="left", batch=3, seed=seed) for seed in (0, 1))
    with torch.no_grad():
        expected, found = (
            wrapped(one, at(here, "block_output"))(base, [source], {"sources->base": 1}).intervened
            for one in (here, model)
        )
    assert same_bits(expected, found)


def test_misspelt_inputs_of_a_wrapped_model_are_refused_as_the_models_own_are():
    model = nn.DataParallel(tiny("gpt2")).eval()
    base = tiny_inputs(tiny("gpt2"))
    declared = wrapped(model, at(tiny("gpt2"), "block_output"), types=iv.ZeroIntervention)
    with pytest.raises(iv.InputError, match="Did you mean 'attention_mask'"):
        declared({"input_ids": base["input_ids"], "atention_mask": base["attention_mask"]})


def test_interventions_saved_from_a_wrapped_model_are_loaded_into_the_plain_one(tmp_path):
    model = nn.DataParallel(tiny("llama")).eval()
    here = tiny("llama")
    base, source = prompts(here)
    entry = at(here, "block_output", low_rank_dimension=2)
    declared = wrapped(model, entry, types=iv.LowRankRotatedSpaceIntervention)
    declared.save_pretrained(tmp_path)
    loaded = iv.IntervenableModel.from_pretrained(tmp_path, here)
    with torch.no_grad():
        where = {"sources->base": 2}
        assert same_bits(loaded(base, [source], where).intervened, declared(base, [source], where).intervened)


def test_paths_through_a_wrapper_and_through_a_wrapped_block_reach_the_same_place():
    model = nn.DataParallel(blocks_compiled(tiny("llama"))).eval()
    base, source = prompts(model)
    results = []
    for name in ("block_output", "module.model.layers[1].output", "module.model.layers[1]._orig_mod.output"):
        layer = 1 if name == "block_output" else None
        one = iv.IntervenableModel([iv.RepresentationConfig(layer, name, "pos")], model)
        with torch.no_grad():
            results.append(one(base, [source]).intervened)
    assert same_bits(results[0], results[1])
    assert same_bits(results[0], results[2])


def test_the_attention_of_all_layers_is_counted_in_a_wrapped_model():
    edits = iv.attention.columns("all", "all", 0, model=nn.DataParallel(tiny("llama")))
    assert [edit.layer for edit in edits] == [0, 1, 2]


def test_the_head_of_a_wrapped_model_reads_hidden_states_as_the_models_own():
    here, model = tiny("llama"), nn.DataParallel(tiny("llama"))
    states = torch.randn(3, HIDDEN)
    assert torch.equal(iv.embed_to_distrib(here, states), iv.embed_to_distrib(model, states))


# --- weights that are elsewhere ---------------------------------------------------------------------------


def on_disk(model: nn.Module, folder: Path) -> nn.Module:
    accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))
    return model


def dispatched(model: nn.Module, folder: Path) -> nn.Module:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    places |= {f"model.layers.{layer}": "disk" if layer else "cpu" for layer in range(3)}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=folder, force_hooks=True, offload_buffers=True
    )


@pytest.mark.parametrize("offload", [on_disk, dispatched])
def test_a_model_whose_weights_are_on_disk_is_swept_and_trained_on_like_the_model_in_memory(
    offload, tmp_path
):
    here, model = tiny("llama"), offload(tiny("llama"), tmp_path)
    elsewhere = [name for name, weight in model.named_parameters() if weight.is_meta]
    assert elsewhere
    clean, corrupted = (tiny_inputs(here, batch=1, seed=seed) for seed in (0, 1))
    metric = iv.metrics.logit_difference(None, 5, 6)
    for component, axis in (("block_input", "pos"), ("head_attention_output", "head"), ("block_mid", "pos")):
        plain, found = (
            iv.patching.sweep(one, clean, corrupted, component, axes=("layer", axis), metric=metric).values
            for one in (here, model)
        )
        assert torch.equal(plain, found), component
    for component in ("query_output", "mlp_hidden", "block_output"):
        gradients = []
        for one in (here, model):
            torch.manual_seed(0)
            entry = at(here, component, "pos", low_rank_dimension=2)
            das = wrapped(one, entry, types=iv.LowRankRotatedSpaceIntervention)
            das.disable_model_gradients()
            main_output(das(clean, [corrupted], {"sources->base": 3}).intervened).pow(2).mean().backward()
            gradients.append(das.get_trainable_parameters()[0].grad)
        assert torch.equal(*gradients), component
    assert [name for name, weight in model.named_parameters() if weight.is_meta] == elsewhere
