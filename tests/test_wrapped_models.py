"""Models in adapters, compiled, parallel, averaged: every component is there, and the results are their own."""

from __future__ import annotations

import pytest
import torch
from declared import at, everything, hooks_of, located, map_of, same_bits, wrapped
from torch import nn
from torch.optim.swa_utils import AveragedModel

import intervenable as iv
from intervenable.binding import Places
from tiny_models import tiny, tiny_inputs

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
