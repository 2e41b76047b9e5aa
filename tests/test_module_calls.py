"""Sites at one of the calls of a module that its block calls several times, compared with passes made by hand."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tiny_registry import build
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.modeling_layers import GradientCheckpointingLayer

import intervenable as iv
from intervenable.hooks import hooked
from intervenable.map_inference import infer_map
from intervenable.map_laws_runs import Bench, GivenPlaces
from intervenable.map_verification import check_map
from intervenable.sites import hook_at
from intervenable.sweeping import sweep
from model_maps import ModelMap, Site, lookup


class TwiceBlock(GradientCheckpointingLayer):
    """Adds what one matrix makes of the stream, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Linear(8, 8)

    def forward(self, stream: Tensor) -> Tensor:
        for _ in range(2):
            stream = stream + self.matrix(stream).tanh()
        return stream


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.layers = nn.ModuleList(TwiceBlock() for _ in range(3))
        self.head = nn.Linear(8, 30)

    def forward(self, input_ids: Tensor) -> Tensor:
        stream = self.table(input_ids)
        for layer in self.layers:
            stream = layer(stream)
        return self.head(stream)


MAP = ModelMap(
    classes=("Twice",),
    blocks="layers",
    sites={
        "block_input": Site("", "input"),
        "block_output": Site(""),
        "attention_output": Site("matrix", call=0),
        "mlp_output": Site("matrix", call=1),
    },
)
"""Words for the two calls; what they say does not matter here."""


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(lookup, "_MAPS", dict(lookup._MAPS))
    iv.register_map(MAP)
    torch.manual_seed(0)
    return Twice().eval()


TOKENS = torch.tensor([[3, 7, 1, 20]])
OTHERS = torch.tensor([[9, 2, 14, 5]])


def by_hand(model, tokens, at=None, values=None):
    """The logits and what the matrix returned at each (layer, call); one of these may be another value."""
    stream, returned = model.table(tokens), {}
    for number, layer in enumerate(model.layers):
        for call in range(2):
            made = layer.matrix(stream)
            if at == (number, call):
                made = values
            returned[number, call] = made
            stream = stream + made.tanh()
    return model.head(stream), returned


def swapped(model, component, layer, **options):
    entry = iv.RepresentationConfig(layer, component, intervention=iv.VanillaIntervention())
    return iv.IntervenableModel(iv.IntervenableConfig([entry]), model)(
        {"input_ids": TOKENS}, [{"input_ids": OTHERS}], unit_locations=None, **options
    )


@pytest.mark.parametrize(("component", "call"), [("attention_output", 0), ("mlp_output", 1)])
def test_each_call_is_read_and_written_by_itself(model, component, call):
    reading = iv.RepresentationConfig(1, component, intervention=iv.CollectIntervention(), name="it")
    seen = iv.IntervenableModel(iv.IntervenableConfig([reading]), model)({"input_ids": TOKENS})
    _, base = by_hand(model, TOKENS)
    _, source = by_hand(model, OTHERS)
    expected, _ = by_hand(model, TOKENS, (1, call), source[1, call])

    assert torch.equal(seen.collected["it"], base[1, call])
    assert torch.equal(swapped(model, component, 1).intervened, expected)


def test_calls_are_counted_anew_in_every_block_run_and_thread(model):
    wanted = {}
    for layer in range(3):
        for call, component in enumerate(("attention_output", "mlp_output")):
            _, source = by_hand(model, OTHERS)
            wanted[component, layer], _ = by_hand(model, TOKENS, (layer, call), source[layer, call])

    with ThreadPoolExecutor(4) as pool:
        runs = {key: pool.submit(swapped, model, *key) for key in [*wanted] * 3}

    for key, run in runs.items():
        assert torch.equal(run.result().intervened, wanted[key]), key


def test_both_calls_of_one_module_can_be_written_in_one_run(model):
    entries = [
        iv.RepresentationConfig(1, component, intervention=iv.ZeroIntervention())
        for component in ("attention_output", "mlp_output")
    ]
    run = iv.IntervenableModel(iv.IntervenableConfig(entries), model)({"input_ids": TOKENS})

    stream = model.layers[0](model.table(TOKENS))
    assert_close(run.intervened, model.head(model.layers[2](stream)))


def test_a_sweep_patches_one_call_of_each_layer(model):
    found = sweep(
        model,
        {"input_ids": TOKENS},
        {"input_ids": OTHERS},
        "mlp_output",
        metric=lambda output: output[:, -1, 4],
        direction="noise",
    )

    _, source = by_hand(model, OTHERS)
    for layer in range(3):
        _, base = by_hand(model, TOKENS)
        for position in range(4):
            value = base[layer, 1].clone()
            value[:, position] = source[layer, 1][:, position]
            logits, _ = by_hand(model, TOKENS, (layer, 1), value)
            assert_close(found.values[layer, position], logits[:, -1, 4])


def test_a_call_that_backward_computes_again_is_edited_again(model):
    model.train()
    gradients = []
    for checkpointed in (False, True):
        for layer in model.layers:
            layer.gradient_checkpointing = checkpointed
            layer._gradient_checkpointing_func = lambda function, *args: torch.utils.checkpoint.checkpoint(
                function, *args, use_reentrant=False
            )
        model.zero_grad()
        entry = iv.RepresentationConfig(1, "mlp_output", intervention=iv.ScaleIntervention(3.0))
        run = iv.IntervenableModel(iv.IntervenableConfig([entry]), model)
        run({"input_ids": TOKENS}).intervened.square().sum().backward()
        gradients.append([layer.matrix.weight.grad.clone() for layer in model.layers])
    for plain, again in zip(*gradients, strict=True):
        assert_close(plain, again)


# --- found out --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pegasus_x():
    made = build("pegasus_x", "seq2seq-lm")
    return made, infer_map(made.model, made.inputs)


def test_parts_of_a_block_that_serve_tokens_beside_the_inputs_too_are_placed_by_their_call(pegasus_x):
    made, described = pegasus_x
    block, given = made.model.model.encoder.layers[2], {}
    names = ("fc1", "fc2", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
    for name in names:
        module = block.get_submodule(name)
        module.register_forward_hook(
            lambda _, args, returned, name=name: given.setdefault(name, []).append((args[0], returned))
        )
    with torch.no_grad():
        made.model(**made.inputs)
    expected = {
        "encoder_mlp_input": given["fc1"][0][0],
        "encoder_mlp_hidden": given["fc2"][0][0],
        "encoder_mlp_output": given["fc2"][0][1],
        "encoder_query_output": given["self_attn.q_proj"][0][1],
        "encoder_key_output": given["self_attn.k_proj"][0][1],
        "encoder_value_output": given["self_attn.v_proj"][0][1],
        "encoder_attention_value_output": given["self_attn.out_proj"][1][0],
    }
    assert all(len(calls) == 2 for calls in given.values())
    bench = Bench(made.model, described, made.inputs)
    bench.traced()
    for name, value in expected.items():
        found = bench.plainly[name, 2]
        assert torch.equal(found, value if found.dim() == 3 else by_heads(value)), name
    verified = check_map(made.model, described, made.inputs)
    assert {*expected} <= {*verified.components}


def by_heads(tensor):
    return tensor.unflatten(-1, (4, -1)).transpose(1, 2)


@pytest.mark.parametrize(
    "name",
    ["encoder_mlp_hidden", "encoder_mlp_output", "encoder_query_output", "encoder_attention_value_output"],
)
def test_a_map_that_takes_the_other_call_is_refused(pegasus_x, name):
    made, described = pegasus_x
    site = described.site(name, 0)
    other = replace(described, sites={**described.sites, name: replace(site, call=1 - site.call)})

    assert name in check_map(made.model, other, made.inputs).refused


def test_of_keys_and_values_of_two_stacks_made_by_one_module_those_of_the_own_stack_are_taken():
    made = build("t5gemma2", "seq2seq-lm")
    attention, returned = made.model.model.decoder.layers[1].self_attn, {"k_proj": [], "v_proj": []}
    handles = [
        getattr(attention, name).register_forward_hook(lambda _, __, value, seen=seen: seen.append(value))
        for name, seen in returned.items()
    ]
    described = infer_map(made.model, made.inputs)
    for seen in returned.values():
        seen.clear()
    with torch.no_grad():
        made.model(**made.inputs)
    for handle in handles:
        handle.remove()
    bench = Bench(made.model, described, made.inputs)
    bench.traced()

    for name, word in (("k_proj", "decoder_key_output"), ("v_proj", "decoder_value_output")):
        own, others = returned[name]
        assert own.shape[1] == made.inputs["decoder_input_ids"].shape[1] != others.shape[1]
        assert torch.equal(bench.plainly[word, 1], own)
    assert {"decoder_head_key_output", "decoder_head_value_output"} <= {
        *check_map(made.model, described, made.inputs).components
    }


def test_in_each_step_of_generation_the_calls_are_counted_anew():
    made = build("t5gemma2", "seq2seq-lm")
    attention = made.model.model.decoder.layers[1].self_attn
    site = GivenPlaces(made.model, infer_map(made.model, made.inputs)).at("decoder_value_output", 1)
    values = {"entered": 0}
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }

    def enters(*_):
        values["entered"] = 0

    def leaves(_, __, value):
        values["entered"] += 1
        return value * 3 if values["entered"] == 1 else None

    handles = [attention.register_forward_pre_hook(enters), attention.v_proj.register_forward_hook(leaves)]
    ids = {"input_ids": made.inputs["input_ids"]}
    with torch.no_grad():
        expected = made.model.generate(**ids, **options)
        for handle in handles:
            handle.remove()
        plain = made.model.generate(**ids, **options)
        with hooked([hook_at(site, triple, writes=True)], made.model):
            found = made.model.generate(**ids, **options)

    assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    assert not torch.equal(torch.stack(found.logits), torch.stack(plain.logits))


def triple(passage):
    passage.put("output", None, passage.take("output", None) * 3)
