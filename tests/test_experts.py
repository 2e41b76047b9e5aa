"""Mixtures of experts: routers are met before they choose, what they chose is read, experts are switched off."""

from __future__ import annotations

import copy
import re

import pytest
import tiny_registry
import torch
import transformers
from torch import nn
from torch.testing import assert_close

import intervenable as iv
import tiny_models
from intervenable.map_routers import MASKED, UNTOLD, expert_sites
from intervenable.map_trace import trace
from intervenable.maps import described_by
from model_maps import LayerKind, ModelMap, sizes_of

ROUTED = ("router_output", "expert_choice", "expert_weight")
FAMILIES = ("mixtral", "gpt_oss")
LAYER = 1


def tiny(family="mixtral", **options):
    return tiny_models.tiny(family, **options)


def prompt(model, seed=0):
    return tiny_models.tiny_inputs(model, seed=seed)


def router_of(model, layer=LAYER):
    mlp = model.model.layers[layer].mlp
    return mlp.router if hasattr(mlp, "router") else mlp.gate


class RouterByHand(nn.Module):
    """A router whose logits are what `change` makes of them; it has no weights of its own."""

    def __init__(self, router, change):
        super().__init__()
        self.router, self.change = [router], change

    def forward(self, hidden):
        (router,) = self.router
        bias = getattr(router, "bias", None)
        logits = self.change(torch.nn.functional.linear(hidden, router.weight, bias))
        if bias is not None:  # gpt-oss: the softmax is over the chosen
            top, ids = logits.topk(router.top_k, dim=-1)
            return logits, top.softmax(-1), ids
        top, ids = logits.float().softmax(-1).topk(router.top_k, dim=-1)
        return logits, top / top.sum(-1, keepdim=True), ids


def with_router(model, change, layer=LAYER):
    changed = copy.deepcopy(model)
    mlp = changed.model.layers[layer].mlp
    setattr(
        mlp, "router" if hasattr(mlp, "router") else "gate", RouterByHand(router_of(model, layer), change)
    )
    return changed


# --- what a router does -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_choice_and_weight_are_those_of_a_router_written_by_hand(family):
    model = tiny(family)
    inputs = prompt(model)
    entering = []
    handle = router_of(model).register_forward_pre_hook(lambda _, args: entering.append(args[0].clone()))
    model(**inputs)
    handle.remove()
    cache = iv.collect(model, inputs, ROUTED, layers=LAYER)

    logits, weight, choice = RouterByHand(router_of(model), lambda logits: logits)(entering[0])
    assert torch.equal(cache["router_output", LAYER], logits.view(2, 7, -1))
    assert torch.equal(cache["expert_choice", LAYER], choice.view(2, 7, -1))
    assert_close(cache["expert_weight", LAYER], weight.view(2, 7, -1))
    assert cache.axes["router_output", LAYER] == ("batch", "position", "expert")
    assert cache.axes["expert_choice", LAYER] == ("batch", "position", "choice")


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_logits_choose_and_weigh_as_they_did_in_the_source(family):
    model = tiny(family)
    base, source = prompt(model), prompt(model, seed=1)
    given = iv.collect(model, source, "router_output", layers=LAYER)["router_output", LAYER]
    at = 3

    def change(logits):
        new = logits.view(2, 7, -1).clone()
        new[:, at] = given[:, at]
        return new.view_as(logits)

    expected = with_router(model, change)(**base).logits
    swap = iv.IntervenableModel(
        iv.IntervenableConfig([iv.RepresentationConfig(LAYER, "router_output")], iv.VanillaIntervention),
        model,
    )
    swapped = swap(base, [source], {"sources->base": at}).intervened.logits
    assert_close(swapped, expected)
    assert not torch.equal(swapped, model(**base).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_an_identity_at_what_a_router_computes_changes_no_bit(family):
    model = tiny(family)
    entries = [
        iv.RepresentationConfig(LAYER, name, intervention=lambda base: base)
        for name in ("router_output", "expert_weight")
    ]
    for entry in (*entries, entries):
        output = iv.IntervenableModel(entry, model)(prompt(model))
        assert torch.equal(output.intervened.logits, model(**prompt(model)).logits)


def test_gradients_reach_what_is_written_into_logits():
    model = tiny()
    shift = iv.AdditionIntervention(source_representation=nn.Parameter(torch.zeros(3)))
    steered = iv.IntervenableModel(iv.RepresentationConfig(LAYER, "router_output", intervention=shift), model)
    steered(prompt(model)).intervened.logits.square().sum().backward()
    assert float(shift.source_representation.grad.abs().sum()) > 0


@torch.no_grad()
def test_weights_of_experts_are_written_as_they_are_used():
    model, inputs = tiny(), prompt(tiny())

    def halved(module, args):
        return (args[0], args[1], args[2] * 0.5)

    handle = model.model.layers[LAYER].mlp.experts.register_forward_pre_hook(halved)
    expected = model(**inputs).logits
    handle.remove()
    half = iv.RepresentationConfig(LAYER, "expert_weight", intervention=iv.ScaleIntervention(0.5))
    assert torch.equal(iv.IntervenableModel(half, model)(inputs).intervened.logits, expected)


def test_the_numbers_of_chosen_experts_are_not_to_be_written():
    entry = iv.RepresentationConfig(LAYER, "expert_choice", intervention=iv.ZeroIntervention())
    with pytest.raises(iv.ConfigError) as error:
        iv.IntervenableModel(entry, tiny())
    assert str(error.value).endswith(
        "expert_choice of layer 1 can be read and not written in MixtralForCausalLM: its numbers name experts; write"
        " 'router_output' or 'expert_weight' instead."
    )


def test_whole_numbers_have_no_gradient():
    model = tiny()
    with pytest.raises(
        iv.InputError, match=r"expert_choice of layer 1 has whole numbers, which have no gradient"
    ):
        iv.collect(
            model, prompt(model), "expert_choice", layers=1, gradients_of=lambda out: out.logits[:, -1, 0]
        )
    found = iv.collect(
        model, prompt(model), "router_output", layers=1, gradients_of=lambda out: out.logits[:, -1, 0]
    )
    assert float(found["router_output.gradient", 1].abs().sum()) > 0


def test_logits_of_experts_are_swept_like_anything_else():
    model = tiny()
    clean, corrupted = prompt(model), prompt(model, seed=1)
    found = iv.patching.sweep(
        model, clean, corrupted, "router_output", ("layer", "pos"), lambda logits: logits[:, -1].mean(-1)
    )
    swap = iv.IntervenableModel(
        iv.IntervenableConfig([iv.RepresentationConfig(LAYER, "router_output")], iv.VanillaIntervention),
        model,
    )
    with torch.no_grad():
        one = swap(corrupted, [clean], {"sources->base": 2}).intervened.logits[:, -1].mean(-1)
    assert_close(found.values[LAYER, 2], one, atol=1e-5, rtol=1e-4)


# --- experts switched off ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("off", [[0], [2]])
def test_an_expert_that_is_off_is_one_whose_logit_is_minus_infinity(family, off):
    model, inputs = tiny(family), prompt(tiny(family))

    def forbid(logits):
        logits = logits.clone()
        logits[:, off] = -torch.inf
        return logits

    expected = with_router(model, forbid)(**inputs).logits
    without = iv.IntervenableModel(iv.experts.switched_off(LAYER, off), model)
    assert_close(without(inputs).intervened.logits, expected)
    assert not torch.equal(expected, model(**inputs).logits)

    before = iv.collect(model, inputs, ROUTED, layers=LAYER)
    after = iv.collect(without, inputs, ROUTED, layers=LAYER)
    assert set(off) <= set(before["expert_choice", LAYER].flatten().tolist())
    assert not set(off) & set(after["expert_choice", LAYER].flatten().tolist())
    assert_close(after["expert_weight", LAYER].sum(-1), torch.ones(2, 7))


@torch.no_grad()
def test_an_expert_is_off_where_it_is_said_and_nowhere_else():
    model, inputs = tiny(), prompt(tiny())
    without = iv.IntervenableModel(iv.experts.switched_off(LAYER, 1, where=[2, 4]), model)
    before = iv.collect(model, inputs, "router_output", layers=LAYER)["router_output", LAYER]
    after = iv.collect(without, inputs, "router_output", layers=LAYER)["router_output", LAYER]
    off = torch.zeros_like(before, dtype=torch.bool)
    off[:, [2, 4], 1] = True
    assert torch.equal(after, before.masked_fill(off, -torch.inf))


def test_experts_are_off_in_one_layer_in_several_or_in_all():
    assert iv.experts.switched_off(0, 1).layer == 0
    assert [entry.layer for entry in iv.experts.switched_off([0, 1], [1, 2])] == [0, 1]
    entries = iv.experts.switched_off("all", 1, model=tiny())
    assert [(entry.layer, entry.intervention.coordinates) for entry in entries] == [
        (0, (1,)),
        (1, (1,)),
        (2, (1,)),
    ]
    assert iv.experts.switched_off(0, 1, stack="encoder").component == "encoder_router_output"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: iv.experts.switched_off(0, []), "experts=[]: give at least one number of an expert"),
        (lambda: iv.experts.switched_off(0, -1), "experts=-1: give at least one number of an expert"),
        (lambda: iv.experts.switched_off(0, "all"), "Unknown experts"),
        (lambda: iv.experts.switched_off("all", 1), "layers='all' needs the model"),
        (lambda: iv.experts.switched_off(0, 1, stack="encodr"), "Did you mean 'encoder'?"),
        (lambda: iv.KnockoutIntervention([]), "coordinates=[]: give at least one number from 0 on"),
    ],
)
def test_what_cannot_be_switched_off_is_refused(call, message):
    with pytest.raises((iv.IntervenableError, ValueError)) as error:
        call()
    assert message in str(error.value)


def test_an_expert_that_is_not_there_is_refused_with_those_that_are():
    model = iv.IntervenableModel(iv.experts.switched_off(LAYER, 3), tiny())
    with pytest.raises(iv.EditError, match="coordinate 3, and the activation has 0 to 2"):
        model(prompt(tiny()))


def test_a_dense_model_says_that_it_has_no_experts():
    with pytest.raises(iv.UnsupportedModelError, match="its MLP is dense: it has no router and no experts"):
        iv.IntervenableModel(iv.experts.switched_off(0, 1), tiny("llama"))


# --- experts that are modules -----------------------------------------------------------------------------


def switch():
    """A Switch Transformer: each expert is a module, and a mask tells them which positions are theirs."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=50,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_decoder_layers=2,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_heads=4,
        num_experts=3,
        expert_capacity=64,
        dropout_rate=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    for block in model.encoder.block:
        torch.nn.init.normal_(block.layer[-1].mlp.router.classifier.weight)
    return model


def encoder_of(model, inputs):
    with torch.no_grad():
        block = trace(model, inputs).of("encoder.block.1")[0]
    found = expert_sites(block, sizes_of(model.config))
    sites = {f"encoder_{word}": site for word, site in found.sites.items()}
    stacks = {"encoder": "encoder.block", "decoder": "decoder.block"}
    return found, ModelMap((type(model).__name__,), None, sites, stacks=stacks)


@torch.no_grad()
def test_experts_that_are_told_by_a_mask_are_switched_off_too():
    model = switch()
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "decoder_input_ids": ids[:, :3]}
    found, described = encoder_of(model, inputs)
    assert found.absent == {"expert_choice": MASKED}
    router = model.encoder.block[1].layer[-1].mlp.router
    path = "encoder.block[1].layer[1].mlp.experts.expert_{}.output"
    with described_by(model, described):
        logits = iv.collect(model, inputs, "encoder_router_output", layers=1)["encoder_router_output", 1]
        assert logits.shape == (2, 6, 3)
        most, other = logits.argmax(-1).flatten().bincount(minlength=3).argsort(descending=True)[:2].tolist()

        without = iv.IntervenableModel(iv.experts.switched_off(1, most, stack="encoder"), model)
        chosen = []
        handle = router.register_forward_hook(lambda *call: chosen.append(call[-1][0].clone()))
        off = without(inputs).intervened.logits
        handle.remove()
        second = logits.index_fill(-1, torch.tensor([most]), -torch.inf).argmax(-1)
        assert torch.equal(chosen[0].argmax(-1), second)
        assert not torch.equal(off, model(**inputs).logits)

        # One of them by its path: what comes out for the positions that it was given.
        given = int((logits.argmax(-1) == other).sum())
        output = iv.collect(model, inputs, path.format(other))[path.format(other), None]
        assert output.reshape(-1, 16).shape == (given, 16)
        expert = model.encoder.block[1].layer[-1].mlp.experts[f"expert_{other}"]
        handle = expert.register_forward_hook(lambda *call: call[-1] * 0)
        expected = model(**inputs).logits
        handle.remove()
        silent = iv.RepresentationConfig(None, path.format(other), intervention=iv.ZeroIntervention())
        assert torch.equal(iv.IntervenableModel(silent, model)(inputs).intervened.logits, expected)


# --- every mixture ----------------------------------------------------------------------------------------

MIXTURES = re.findall(
    r"\w+",
    """
    afmoe aria_text axk1 axk2 bailing_hybrid beam cohere2_moe dbrx deepseek_v2 deepseek_v3 deepseek_v32
    deepseek_v4 dots1 dots3_note_text ernie4_5_moe exaone_moe flex_olmo flint glm4_moe glm4_moe_lite
    glm_moe_dsa gpt_oss granitemoe granitemoe_swa granitemoehybrid granitemoeshared hunyuan_v1_moe hy_v3
    hy_v4 inkling2_text inkling_text jamba jetmoe kimi_linear kolibri1 laguna lfm2_moe llama4_text
    longcat_flash mellum mimo_v2_flash minimax minimax_m2 minimax_m3_vl_text mixtral nemotron_h olmoe
    phimoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next qwen4_exp_text solar_open zaya
    """,
)
ODD = ("dbrx", "deepseek_v3", "jamba", "jetmoe", "llama4_text", "olmoe", "phimoe", "zaya")
"""Those whose routers differ most; the others are looked at with the whole registry."""
CASES = [name if name in ODD else pytest.param(name, marks=pytest.mark.registry) for name in MIXTURES]


def blocks_of(model):
    """The path of the list of blocks: the longest list of modules that is not inside another."""
    lists = [(path, part) for path, part in model.named_modules() if isinstance(part, nn.ModuleList)]
    outer = [(path, part) for path, part in lists if not any(path.startswith(f"{one}.") for one, _ in lists)]
    return max(outer, key=lambda entry: len(entry[1]))


def routed(model, inputs):
    """A map that has experts and nothing else, of each layer as it was found in a run."""
    path, blocks = blocks_of(model)
    with torch.no_grad():
        seen = trace(model, inputs)
    found = [
        expert_sites(seen.of(f"{path}.{layer}")[0], sizes_of(model.config)) for layer in range(len(blocks))
    ]
    kinds = [LayerKind((layer,), sites=one.sites, absent=one.absent) for layer, one in enumerate(found)]
    return ModelMap((type(model).__name__,), path, {}, kinds=tuple(kinds))


def told_to_experts(model, path, inputs):
    """What the module that all experts are in is given, by hand: the stream, the numbers and the weights."""
    given = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: given.append([one.clone() for one in args])
    )
    model(**inputs)
    handle.remove()
    return given[0]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_in_every_mixture_an_expert_that_is_off_gets_no_weight(name):
    built = tiny_registry.build(name)
    model, inputs = built.model, dict(built.inputs)
    described = routed(model, inputs)
    with described_by(model, described):
        layer = next(kind.layers[0] for kind in described.kinds[::-1] if kind.sites)
        site = described.site("expert_choice", layer)
        has_weights = described.site("expert_weight", layer) is not None
        names = [word for word in ROUTED if has_weights or word != "expert_weight"]
        before = iv.collect(model, inputs, names, layers=layer)
        choice = before["expert_choice", layer]

        if described.site("expert_output", layer) is not None:
            _, numbers, weights = told_to_experts(model, f"{described.blocks}.{layer}.{site.path}", inputs)
            assert torch.equal(choice.flatten(0, 1), numbers)
            assert torch.equal(before["expert_weight", layer].flatten(0, 1), weights)
        else:  # the largest logits
            assert torch.equal(choice, before["router_output", layer].topk(choice.shape[-1]).indices)

        same = iv.RepresentationConfig(layer, "router_output", intervention=lambda base: base)
        base = iv.IntervenableModel(same, model)(inputs).intervened.logits
        assert torch.equal(base, model(**inputs).logits)

        expert = int(choice.flatten().mode().values)
        without = iv.IntervenableModel(iv.experts.switched_off(layer, expert), model)
        after = iv.collect(without, inputs, names, layers=layer)
        chosen = after["expert_choice", layer] == expert
        if has_weights:  # some add a bias to what they rank, or look the choice up by the token
            assert not bool((chosen & (after["expert_weight", layer] != 0)).any())
        else:
            assert not bool(chosen.any())
        assert not torch.equal(after["router_output", layer], before["router_output", layer])
        logits = without(inputs).intervened.logits
        assert not logits.isnan().any()
        assert not torch.equal(logits, base)


@torch.no_grad()
def test_a_choice_that_no_module_hands_over_is_said_to_be_one():
    built = tiny_registry.build("doge")
    described = routed(built.model, dict(built.inputs))
    assert {why for kind in described.kinds for why in kind.absent.values()} == {UNTOLD}
