"""Law 8: edits follow the activation's dtype and device; half precision, autocast and offloaded weights work."""

from __future__ import annotations

import accelerate
import by_hand
import pytest
import torch
from declared import (
    at,
    everything,
    exact,
    hooks_of,
    located,
    main_output,
    map_of,
    same_bits,
    stored,
    tensors_of,
    wrapped,
)
from torch.testing import assert_close

import intervenable as iv
from tiny_models import CASES, FAMILIES, HIDDEN, tiny, tiny_inputs

HALVES = [torch.bfloat16, torch.float16]
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def cast(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def two_prompts(model, dtype=torch.float32):
    return [cast(tiny_inputs(model, seed=seed), dtype) for seed in (0, 1)]


def halfway(base, source):
    """An edit that depends on both."""
    return (base + source) / 2


# Half precision


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_of_every_component_keep_the_models_dtype(family, dtype):
    if dtype == torch.float64 and family in ("mixtral", "gpt_oss"):
        pytest.skip("its experts do not run in float64")
    model = tiny(family, dtype=dtype)
    base, source = two_prompts(model, dtype)
    places = everything(model)
    swaps = wrapped(model, *(at(model, *place) for place in places))
    where = [located(model, *place, "ragged") for place in places]
    seen = []
    handle = by_hand.hook(model, "block_output", lambda value: seen.append(value.dtype))
    with torch.no_grad():
        plain = model(**base)
        whole = swaps(base, [source]).intervened
        ragged = swaps(base, [source], {"sources->base": (where, where)}).intervened
    handle.remove()

    dtypes = {name: tensor.dtype for name, tensor in tensors_of(plain).items()}
    for output in (whole, ragged):
        assert {name: tensor.dtype for name, tensor in tensors_of(output).items()} == dtypes
        assert not main_output(output).isnan().any()
    assert set(seen) == {dtype}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("family", "variant"), CASES)
def test_an_identity_is_bit_identical_in_half_precision(family, variant, dtype):
    model = tiny(family, variant=variant, dtype=dtype, attention="eager")
    base, _ = two_prompts(model, dtype)
    places = exact(model)
    declared = wrapped(
        model, *(at(model, *place, intervention=lambda base: base.clone()) for place in places)
    )
    with torch.no_grad():
        assert same_bits(declared(base).intervened, model(**base))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("family", ["gpt2", "llama", "falcon"])
def test_a_swap_in_half_precision_moves_the_very_bits(family, dtype):
    model = tiny(family, dtype=dtype)
    base, source = two_prompts(model)
    with torch.no_grad():
        value = by_hand.seen(model, "block_output", source)

        def put(stream):
            new = stream.clone()
            new[:, 3] = value[:, 1]
            return new

        expected = by_hand.run_with(model, "block_output", put, base)
        result = wrapped(model, at(model, "block_output"))(
            base, [source], {"sources->base": (1, 3)}
        ).intervened
    assert torch.equal(result.logits, expected.logits)


LEARNED = [
    (iv.RotatedSpaceIntervention, {}),
    (iv.LowRankRotatedSpaceIntervention, {"low_rank_dimension": 4}),
    (iv.BoundlessRotatedSpaceIntervention, {}),
    (iv.SigmoidMaskIntervention, {}),
]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("cls", "fields"), LEARNED)
def test_learned_interventions_stay_in_float32_and_compute_in_it(cls, fields, dtype):
    model = tiny("llama", dtype=dtype)
    base, source = two_prompts(model)
    declared = wrapped(model, at(model, "block_output", **fields), types=cls)
    (learned,) = declared.interventions.values()
    assert {p.dtype for p in learned.parameters()} == {torch.float32}

    found = []
    handle = by_hand.hook(model, "block_input", lambda value: found.append(value.clone()), layer=2)
    with torch.no_grad():
        given, taken = (by_hand.seen(model, "block_output", inputs)[:, 3:4] for inputs in (base, source))
        exact = learned(given.float(), taken.float())
        logits = declared(base, [source], {"sources->base": 3}).intervened.logits
    handle.remove()

    assert logits.dtype == dtype
    # One rounding of the float32 result and no more.
    assert_close(found[-1][:, 3:4].float(), exact, atol=ROUNDING[dtype] / 8, rtol=ROUNDING[dtype])

    declared(base, [source], {"sources->base": 3}).intervened.logits.float().square().sum().backward()
    gradients = [p.grad for p in learned.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", HALVES)
def test_constants_of_another_dtype_are_cast(dtype):
    model = tiny("llama", dtype=dtype)
    base, _ = two_prompts(model)
    constant = torch.randn(HIDDEN, dtype=torch.float64)
    declared = wrapped(model, at(model, "block_output", source_representation=constant))
    own = wrapped(model, at(model, "block_output", source_representation=constant.to(dtype)))
    with torch.no_grad():
        assert same_bits(declared(base).intervened, own(base).intervened)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_half_precision_edit_is_the_float32_one_up_to_rounding(dtype):
    model, exact = tiny("gpt2", dtype=dtype), tiny("gpt2")
    exact.load_state_dict(model.state_dict())
    base, source = two_prompts(model)
    for component in ("block_output", "head_attention_output", "final_norm_scale", "block_mid"):
        with torch.no_grad():
            half, full = (
                wrapped(one, at(one, component))(base, [source]).intervened.logits for one in (model, exact)
            )
        assert (half.float() - full).abs().max() <= 8 * ROUNDING[dtype] * full.abs().max(), component


# Autocast and inference mode


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "falcon", "bert"])
def test_edits_work_under_autocast(family):
    model = tiny(family, attention="eager")
    base, source = two_prompts(model)
    places = exact(model)
    identities = wrapped(
        model, *(at(model, *place, intervention=lambda base: base.clone()) for place in places)
    )
    swaps = wrapped(model, *(at(model, *place) for place in places))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**base)
        assert same_bits(identities(base).intervened, expected)
        assert main_output(swaps(base, [source]).intervened).dtype == main_output(expected).dtype


def test_a_learned_rotation_computes_in_float32_under_autocast():
    model = tiny("llama")
    base, source = two_prompts(model)
    declared = wrapped(
        model, at(model, "block_output", low_rank_dimension=4), types=iv.LowRankRotatedSpaceIntervention
    )
    (rotation,) = declared.interventions.values()
    found = []
    handle = by_hand.hook(model, "block_input", lambda value: found.append(value.clone()), layer=2)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            given, taken = (by_hand.seen(model, "block_output", inputs) for inputs in (base, source))
            declared(base, [source], {"sources->base": 3})
        expected = rotation(given[:, 3:4], taken[:, 3:4])
    handle.remove()
    assert_close(found[-1][:, 3:4], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_edits_work_in_inference_mode(family):
    model = tiny(family)
    base, source = two_prompts(model)
    places = everything(model)
    declared = wrapped(
        model, *(at(model, *place, intervention=lambda base, source: (base + source) / 2) for place in places)
    )
    where = [located(model, *place, "ragged") for place in places]
    call = base, [source], {"sources->base": (where, where)}
    with torch.no_grad():
        expected = declared(*call).intervened
    with torch.inference_mode():
        assert same_bits(declared(*call).intervened, expected)


# Weights elsewhere


def offload(model, how, folder):
    """Move a model's weights away, to be fetched when they are needed."""
    cpu = torch.device("cpu")
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device=cpu)
    elif how == "whole blocks":
        preload = [type(by_hand.block_of(model)).__name__]
        accelerate.cpu_offload(model, execution_device=cpu, preload_module_classes=preload)
    elif how == "disk":
        accelerate.disk_offload(model, folder, execution_device=cpu)
    else:
        blocks = map_of(model).blocks
        places = {}
        for name, _ in model.named_parameters():
            module = name.rpartition(".")[0]
            inside = module.startswith(f"{blocks}.")
            layer = int(module.removeprefix(f"{blocks}.").split(".")[0]) if inside else 0
            places[f"{blocks}.{layer}" if inside else module] = "disk" if layer else "cpu"
        places.setdefault("lm_head", "cpu")
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    return model


def away(model):
    return sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)


@pytest.mark.parametrize("how", ["cpu", "whole blocks", "disk", "dispatched"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "opt"])
def test_offloaded_models_give_the_same_with_interventions_at_every_component(family, how, tmp_path):
    here, model = tiny(family), offload(tiny(family), how, tmp_path)
    base, source = two_prompts(here)
    inside = [
        ("attention_pattern", "h.query.key"),
        ("attention_scores", "h"),
        ("expanded_head_value", "h.pos"),
    ]
    places, elsewhere = [*stored(here), *inside], away(model)
    assert elsewhere
    for place in places:
        where = [located(here, *place, "ragged")]
        with torch.no_grad():
            expected, result = (
                wrapped(one, at(one, *place))(base, [source], {"sources->base": (where, where)}).intervened
                for one in (here, model)
            )
        assert same_bits(result, expected), place
        assert away(model) == elsewhere, place
    assert hooks_of(model) == {}


@pytest.mark.parametrize("how", ["cpu", "whole blocks", "disk", "dispatched"])
@pytest.mark.parametrize("component", ["embedding_output", "query_output", "mlp_output", "block_output"])
def test_weights_are_back_where_they_were_after_a_source_run_that_stopped_early(component, how, tmp_path):
    model = offload(tiny("llama"), how, tmp_path)
    base, source = two_prompts(model)
    elsewhere = away(model)
    failing = wrapped(
        model,
        at(model, component),
        at(model, "block_input", layer=0, intervention=lambda base: base[:0]),  # ends the base run at once
    )
    with torch.no_grad(), pytest.raises(iv.EditError):
        failing(base, [source, None])
    assert away(model) == elsewhere

    blocks = []
    handles = [
        by_hand.block_of(model, layer).register_forward_pre_hook(lambda *_, layer=layer: blocks.append(layer))
        for layer in range(3)
    ]
    with torch.no_grad():
        wrapped(model, at(model, component))(base, [source])
    for handle in handles:
        handle.remove()
    assert len(blocks) < 6  # it did stop early
    assert away(model) == elsewhere


def test_a_model_without_values_is_refused_with_a_way_out():
    model = tiny("llama")
    base = tiny_inputs(model)
    declared = wrapped(model.to("meta"), at(model, "block_output"), types=iv.ZeroIntervention)
    with pytest.raises(
        iv.UnsupportedModelError, match=r"LlamaForCausalLM are on the meta device.*Load them first"
    ):
        declared(base)


def test_inputs_without_values_are_refused():
    model = tiny("llama")
    base = {name: value.to("meta") for name, value in tiny_inputs(model).items()}
    declared = wrapped(model, at(model, "block_output"), types=iv.ZeroIntervention)
    with pytest.raises(iv.InputError, match=r"base is on the meta device.*Give real tensors"):
        declared(base)
    assert hooks_of(model) == {}
