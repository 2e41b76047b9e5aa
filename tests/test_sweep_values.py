"""What `sweep` can put in besides the other run's activations: numbers, tensors, means, other examples' values."""

from __future__ import annotations

import patched_by_hand as hand
import pytest
import torch
from attention_by_hand import attention_written_out
from patched_by_hand import PLACES, ByHand, batch, grid, near, prompts, told

from intervenable import ConfigError, ModelMismatchError, wave_plan
from intervenable.sweeping import sweep
from tiny_models import tiny

LAYERS, LENGTH = 3, 6


@pytest.fixture(params=["all tokens", "later tokens alone"], autouse=True)
def leaving_out(request, monkeypatch):
    """Waves that compute all tokens, as of tiny models, and such as begin at the first token that they change."""
    if request.param == "all tokens":
        monkeypatch.setattr(wave_plan, "WORTH", torch.inf)
    else:
        for name in ("WORTH", "READ", "OVERHEAD"):  # and one wave for each token
            monkeypatch.setattr(wave_plan, name, 0.0)


def width_of(family, component):
    return {"block_input": 16, "head_attention_value_output": 24 if family == "llama" else 16}[component]


def seen(model, family, component, layer, ids):
    """`[s, d]` a component in a run of one prompt."""
    return ByHand(model, family, [ids], [ids]).seen(0, component, layer)[0]


# --- numbers and tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "number"), [("zero", 0.0), (0, 0.0), (-1.5, -1.5)])
@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_number_is_put_into_every_unit(family, value, number):
    model, clean = tiny(family), prompts(LENGTH, LENGTH)
    by_hand = ByHand(model, family, clean, clean)

    def fill(own, layer):
        return torch.full_like(own, number)

    inputs = batch(clean)
    result = sweep(model, inputs, None, "block_input", ("layer", "pos"), told(inputs), value=value)
    near(
        result.values,
        grid(
            lambda layer, pos: by_hand.cell("block_input", [layer], [pos], values=fill),
            range(LAYERS),
            range(LENGTH),
        ),
    )
    assert result.corrupted == {}
    heads = sweep(
        model, inputs, None, "head_attention_value_output", ("layer", "head"), told(inputs), value=value
    )
    near(
        heads.values,
        grid(
            lambda layer, head: by_hand.cell(
                "head_attention_value_output", [layer], heads=[head], values=fill
            ),
            range(LAYERS),
            range(4),
        ),
    )


def test_an_ablation_is_of_the_clean_run_unless_the_other_is_asked_for():
    model, clean, corrupted = tiny("llama"), prompts(LENGTH), prompts(LENGTH, seed=1)
    inputs = batch(clean), batch(corrupted)
    given = {"metric": told(inputs[0]), "value": "zero", "layers": 1, "positions": 3}
    for direction, base in ((None, clean), ("noise", clean), ("denoise", corrupted)):
        by_hand = ByHand(model, "llama", base, base)
        result = sweep(model, *inputs, direction=direction, **given)
        near(
            result.values[0, 0],
            by_hand.cell("block_input", [1], [3], values=lambda own, layer: own * 0),
        )
        near(result.baseline_clean, ByHand(model, "llama", clean, clean).plain())
        near(result.baseline_corrupted, ByHand(model, "llama", corrupted, corrupted).plain())


@pytest.mark.parametrize("shape", [(16,), (LENGTH, 1), (2, LENGTH, 16), ()])
def test_a_tensor_broadcasts_to_the_tokens(shape):
    model, clean = tiny("gpt2"), prompts(LENGTH, LENGTH)
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    by_hand = ByHand(model, "gpt2", clean, clean)
    inputs = batch(clean)
    result = sweep(model, inputs, None, metric=told(inputs), value=value, layers=[0, 2])
    full = value.expand(2, LENGTH, 16)

    def expected(layer, pos):
        return torch.stack(
            [
                by_hand.run(
                    e, "block_input", [layer], [(pos, pos)], values=lambda own, _, e=e: full[e : e + 1]
                )[[1, -1]]
                for e in range(2)
            ]
        )

    near(result.values, grid(expected, [0, 2], range(LENGTH)))


def test_a_tensor_broadcasts_to_the_heads():
    model, clean = tiny("llama"), prompts(LENGTH)
    value = torch.randn(4, 1, 6)
    by_hand = ByHand(model, "llama", clean, clean)
    inputs = batch(clean)
    component = "head_attention_value_output"
    result = sweep(model, inputs, None, component, ("layer", "head"), told(inputs), value=value)
    full = value[:, 0].flatten().expand(1, LENGTH, 24)
    near(
        result.values,
        grid(
            lambda layer, head: by_hand.cell(component, [layer], heads=[head], values=lambda own, _: full),
            range(LAYERS),
            range(4),
        ),
    )


def test_each_layer_may_have_a_value_of_its_own():
    model, clean = tiny("gpt2"), prompts(LENGTH, LENGTH)
    values = {0: torch.randn(16), 1: 0.5, 2: torch.randn(LENGTH, 16)}
    by_hand = ByHand(model, "gpt2", clean, clean)
    inputs = batch(clean)
    result = sweep(model, inputs, None, metric=told(inputs), value=values)

    def put(own, layer):
        return torch.as_tensor(values[layer]).expand(own.shape)

    near(
        result.values,
        grid(
            lambda layer, pos: by_hand.cell("block_input", [layer], [pos], values=put),
            range(LAYERS),
            range(LENGTH),
        ),
    )


def test_padding_is_left_alone_by_constants():
    model, clean = tiny("llama"), prompts(6, 4)
    by_hand = ByHand(model, "llama", clean, clean)
    for padding in ("left", "right"):
        inputs = batch(clean, padding)
        result = sweep(model, inputs, None, metric=told(inputs), value=2.0)
        near(
            result.values,
            grid(
                lambda layer, pos: by_hand.cell(
                    "block_input", [layer], [pos], values=lambda own, _: torch.full_like(own, 2.0)
                ),
                range(LAYERS),
                range(LENGTH),
            ),
        )


# --- means ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    ("family", "component"),
    [("gpt2", "block_input"), ("llama", "head_attention_value_output")],
)
@pytest.mark.parametrize("given", ["reference", "other run", "own run"])
def test_a_mean_is_over_the_real_tokens_of_the_reference(family, component, padding, given):
    model = tiny(family)
    clean, corrupted, others = prompts(6, 4), prompts(6, 4, seed=1), prompts(3, 7, 5, seed=2)
    inputs = batch(clean, padding), batch(corrupted, padding)
    counted = {"reference": others, "other run": corrupted, "own run": clean}[given]
    result = sweep(
        model,
        inputs[0],
        None if given == "own run" else inputs[1],
        component,
        ("layer", "pos"),
        told(inputs[0]),
        value="mean",
        reference=batch(others, padding) if given == "reference" else None,
        layers=[0, 2],
    )
    means = {
        layer: torch.cat([seen(model, family, component, layer, ids) for ids in counted]).mean(0)
        for layer in (0, 2)
    }
    by_hand = ByHand(model, family, clean, clean)
    near(
        result.values,
        grid(
            lambda layer, pos: by_hand.cell(
                component, [layer], [pos], values=lambda own, layer: means[layer].expand(own.shape)
            ),
            [0, 2],
            range(LENGTH),
        ),
    )


def pattern_run(model, ids, layer, change=None):
    """Logits and pattern of a run of several prompts of one length, attention written out."""
    with (
        torch.no_grad(),
        attention_written_out(model, layer=layer, **({"pattern": change} if change else {})) as at,
    ):
        logits = model(input_ids=torch.stack(ids)).logits
    return logits, at.pattern[0]


@pytest.mark.parametrize("value", ["mean", "zero", "resample", "tensor"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_patterns_can_be_set_too(family, value):
    model = tiny(family, attention="eager")
    clean = prompts(LENGTH, LENGTH)
    inputs = batch(clean)
    own = torch.rand(LENGTH, LENGTH)
    result = sweep(
        model,
        inputs,
        None,
        "attention_pattern",
        ("layer", "head"),
        told(inputs),
        value=own if value == "tensor" else value,
    )

    def expected(layer, head):
        _, there = pattern_run(model, clean, layer)
        new = {
            "mean": there.mean(0, keepdim=True).expand(there.shape),
            "zero": torch.zeros_like(there),
            "resample": there.flip(0),  # of two examples each gets the other's
            "tensor": own.expand(there.shape),
        }[value]

        def change(pattern):
            pattern = pattern.clone()
            pattern[:, head] = new[:, head]
            return pattern

        return pattern_run(model, clean, layer, change)[0][:, [1, -1]]

    near(result.values, grid(expected, range(LAYERS), range(4)))


# --- other examples ---------------------------------------------------------------------------------------


def resampled_from(model, family, base, drawn, layers=range(LAYERS)):
    by_hand = ByHand(model, family, base, drawn)
    return grid(lambda layer, pos: by_hand.cell("block_input", [layer], [pos]), layers, range(LENGTH))


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_no_example_is_given_its_own_values(family):
    """Each of three examples gets another's, and none is drawn twice: one of two rotations."""
    model, clean = tiny(family), prompts(LENGTH, LENGTH, LENGTH)
    inputs = batch(clean)
    rotations = [clean[1:] + clean[:1], clean[2:] + clean[:2]]
    expected = [resampled_from(model, family, clean, drawn, [1])[0] for drawn in rotations]
    which = []
    for seed in range(6):
        given = {"metric": told(inputs), "value": "resample", "layers": 1, "seed": seed}
        values = sweep(model, inputs, None, **given).values[0]
        fits = [bool((values - one).abs().max() < 1e-4) for one in expected]
        assert sum(fits) == 1
        which.append(fits.index(True))
        assert torch.equal(values, sweep(model, inputs, None, **given).values[0])
    assert set(which) == {0, 1}


def test_examples_may_be_drawn_from_a_reference():
    model, clean, others = tiny("llama"), prompts(LENGTH, LENGTH), prompts(LENGTH, LENGTH, LENGTH, seed=5)
    inputs = batch(clean)
    chosen = set()
    singles = [resampled_from(model, "llama", clean, [other] * 2, [1])[0] for other in others]
    for seed in range(5):
        values = sweep(
            model,
            inputs,
            None,
            metric=told(inputs),
            value="resample",
            reference=batch(others),
            seed=seed,
            layers=1,
        ).values[0]
        for example in range(2):
            close = [float((values - one)[:, example].abs().max()) < 1e-4 for one in singles]
            assert sum(close) == 1
            chosen.add(close.index(True))
    assert len(chosen) > 1


def test_other_runs_examples_may_be_drawn_with_their_own():
    """Where the values are of the other prompts, an example may get those of its own partner."""
    model, clean, corrupted = tiny("gpt2"), prompts(LENGTH, LENGTH), prompts(LENGTH, LENGTH, seed=7)
    inputs = batch(clean), batch(corrupted)
    singles = [resampled_from(model, "gpt2", clean, [one] * 2, [0])[0] for one in corrupted]
    drawn = set()
    for seed in range(5):
        values = sweep(model, *inputs, metric=told(inputs[0]), value="resample", seed=seed, layers=0).values[
            0
        ]
        for example in range(2):
            close = [float((values - one)[:, example].abs().max()) < 1e-4 for one in singles]
            assert sum(close) == 1
            drawn.add((example, close.index(True)))
    assert len(drawn) >= 3


# --- what cannot be ---------------------------------------------------------------------------------------


def refused(error, match, **options):
    model, inputs = tiny("llama"), batch(prompts(LENGTH, LENGTH))
    with pytest.raises(error, match=match):
        sweep(model, inputs, None, metric=told(inputs), **options)


def test_values_that_cannot_be_are_refused():
    refused(ConfigError, "value is a list", value=[1.0])
    refused(ConfigError, "value is a bool", value=True)
    refused(LookupError, "'zeros'.*'zero'", value="zeros")
    refused(ModelMismatchError, r"shape \(5,\).*block_input.*\(2, 6, 16\)", value=torch.ones(5))
    refused(ModelMismatchError, r"\(3, 6, 16\)", value=torch.ones(3, 6, 16))
    refused(ConfigError, "nothing for .*It has: 0, 1", value={0: 1.0, 1: torch.ones(16)})
    refused(ConfigError, "reference is for", value="zero", reference=batch(prompts(4)))
    refused(ConfigError, "reference is for", value=1.0, reference=batch(prompts(4)))


def test_one_example_cannot_be_resampled_from_itself():
    model, inputs = tiny("llama"), batch(prompts(LENGTH))
    with pytest.raises(ConfigError, match="there is but one"):
        sweep(model, inputs, None, metric=told(inputs), value="resample")


def test_means_of_matrices_of_another_size_are_refused():
    refused(
        ModelMismatchError,
        "matrices of",
        component="attention_pattern",
        axes="head",
        value="mean",
        reference=batch(prompts(4, 4)),
    )


def test_places_of_the_loop_by_hand_are_as_wide_as_they_should_be():
    """The loop cuts columns into heads of equal width; this is the width that configs name."""
    for family, component in (("llama", "head_attention_value_output"), ("gpt2", "block_input")):
        ids = prompts(LENGTH)[0]
        assert seen(tiny(family), family, component, 0, ids).shape == (LENGTH, width_of(family, component))
        assert component in PLACES[family]
    assert hand.prompts(3)[0].shape == (3,)
