"""Estimates are differences times gradients: exact on straight lines, slopes elsewhere, and near the sweep."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import intervenable as iv
from intervenable.patching import attribution_patch, sweep
from model_maps import COMPONENTS
from tiny_models import HEADS, KEY_VALUE_HEADS, LAYERS, tiny, tiny_inputs

OUTPUT = "blocks[{layer}].output"


class Blocks(nn.Module):
    """What goes in is the activation of the first block, `[b, s, d]`; `logits` is what the last one gives."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.eval()

    def forward(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return inputs


class Mix(nn.Module):
    """A linear map within tokens, and each token's sum of those before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.within = nn.Linear(width, width)

    def forward(self, x):
        return x + self.within(x).cumsum(1)


def row(*numbers: float) -> torch.Tensor:
    """Activations of one example, `[1, positions, 1]`."""
    return torch.tensor(numbers).view(1, -1, 1)


# --- by hand ----------------------------------------------------------------------------------------------


def three_and_square(logits):
    return 3 * logits[0, 0, 0] + logits[0, 1, 0] ** 2


def test_the_estimate_of_a_straight_part_is_exact_and_that_of_a_bent_part_is_its_tangent():
    model = Blocks(nn.Identity())
    clean, corrupted = row(2.0, 5.0), row(1.0, 2.0)
    result = attribution_patch(model, clean, corrupted, OUTPUT, metric=three_and_square)
    assert result.baseline_corrupted == 7
    assert result.baseline_clean == 31
    assert result.values.tolist() == [[10.0, 19.0]]
    exact = sweep(model, clean, corrupted, OUTPUT, metric=three_and_square)
    assert exact.values.tolist() == [[10.0, 28.0]]
    noised = attribution_patch(model, clean, corrupted, OUTPUT, metric=three_and_square, direction="noise")
    assert noised.values.tolist() == [[31.0 - 3.0, 31.0 - 3 * 10.0]]


def cube(logits):
    return logits[0, 0, 0] ** 3


def test_integrated_gradients_take_the_mean_slope_at_the_midpoints_of_the_line():
    model = Blocks(nn.Identity())
    clean, corrupted = row(3.0), row(1.0)

    def estimate(**options):
        return attribution_patch(model, clean, corrupted, OUTPUT, metric=cube, **options).values.item()

    # 1 at the base, 27 at the source, in truth; slopes 3 a^2 at 1, at 2, and at 1.5 and 2.5.
    assert estimate() == 1 + 2 * 3
    assert estimate(method="integrated") == 1 + 2 * 12
    assert estimate(method="integrated", steps=2) == 1 + 2 * (6.75 + 18.75) / 2
    assert_close(estimate(method="integrated", steps=100), 27.0, atol=1e-3, rtol=0)
    square = attribution_patch(
        model, row(2.0, 5.0), row(1.0, 2.0), OUTPUT, metric=three_and_square, method="integrated"
    )
    assert square.values.tolist() == [[10.0, 28.0]]


def test_integrated_gradients_move_all_that_the_cells_of_a_layer_patch_at_once():
    """For a product the line gives each factor its share, where single patches leave the other as it was."""
    model = Blocks(nn.Identity())

    def product(logits):
        return logits[0, 0, 0] * logits[0, 1, 0]

    given = (model, row(3.0, 5.0), row(1.0, 2.0), OUTPUT)
    integrated = attribution_patch(*given, metric=product, method="integrated", steps=1)
    assert integrated.values.tolist() == [[2 + 2 * 3.5, 2 + 3 * 2.0]]
    added = (integrated.values - integrated.baseline_corrupted).sum()
    assert added == integrated.baseline_clean - integrated.baseline_corrupted
    alone = attribution_patch(*given, metric=product, method="integrated", positions=[1])
    assert alone.values.tolist() == [[2 + 3 * 1.0]]


def test_what_is_no_axis_is_summed_over_and_a_window_is_the_sum_of_its_tokens():
    model = Blocks(nn.Identity())
    given = (model, row(2.0, 5.0, 7.0), row(1.0, 2.0, 3.0), OUTPUT)

    def metric(logits):
        return (logits[0, :, 0] * torch.tensor([3.0, 4.0, 5.0])).sum()

    base = 3 + 8 + 15
    assert attribution_patch(*given, ("layer",), metric).values.tolist() == [base + 3 + 12 + 20]
    windows = attribution_patch(*given, metric=metric, positions=[(0, 1), 2, (0, 2)])
    assert windows.values.tolist() == [[base + 15, base + 20, base + 23]]
    assert windows.labels["pos"] == ("0-1", "2", "0+2")
    part = attribution_patch(*given, ("layer",), metric, positions=[0, (1, 0)])
    assert part.values.tolist() == [base + 15]  # the first token is named twice and patched once


def test_the_estimate_is_the_sweep_where_the_model_is_linear():
    torch.manual_seed(0)
    model = Blocks(*(Mix(3) for _ in range(3)))
    clean, corrupted = torch.randn(2, 2, 4, 3).unbind()
    weights = torch.randn(2, 4, 3)
    metrics = {"all": lambda z: (z * weights).sum(), "each": lambda z: (z * weights).sum((1, 2))}
    estimate = attribution_patch(model, clean, corrupted, OUTPUT, metric=metrics)
    exact = sweep(model, clean, corrupted, OUTPUT, metric=metrics)
    for key, values in exact.results.items():
        assert_close(estimate.results[key], values, atol=1e-5, rtol=1e-5)
        assert not torch.equal(values[0, 0], values[0, 1])
    assert estimate.results[OUTPUT, "each"].shape == (3, 4, 2)


# --- finite differences -----------------------------------------------------------------------------------


def difference(logits):
    return logits[:, -1, 5] - logits[:, -1, 7] + logits[:, 2, 9].sigmoid()


def exact_model():
    """One with two key-value heads that computes in float64 throughout, where llama's norms do not."""
    return tiny("falcon", variant="grouped", dtype=torch.float64)


def slope(model, base, source, component, unit, layer, location):
    """How fast the metric changes as one place begins to move towards its source, by an independent machinery."""
    values = []
    for step in (1e-5, -1e-5):
        config = iv.RepresentationConfig(
            layer, component, unit, intervention=lambda a, s, step=step: a + step * (s - a)
        )
        edited = iv.IntervenableModel(iv.IntervenableConfig([config]), model)
        with torch.no_grad():
            values.append(difference(edited(base, [source], {"sources->base": location}).intervened.logits))
    return (values[0] - values[1]) / 2e-5


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("component", "axes"),
    [
        ("block_output", ("layer", "pos")),
        ("mlp_output", ("layer", "pos")),
        ("head_attention_value_output", ("head", "layer", "pos")),
        ("head_attention_output", ("layer", "head", "pos")),
        ("head_key_output", ("layer", "pos", "head")),
        ("rotary_query", ("layer", "pos", "head")),
    ],
)
def test_the_estimate_is_the_slope_towards_the_source_at_every_token_and_head(component, axes, direction):
    model = exact_model()
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    result = attribution_patch(model, clean, corrupted, component, axes, difference, direction=direction)
    base, source = (clean, corrupted) if direction == "noise" else (corrupted, clean)
    with torch.no_grad():
        baseline = difference(model(**base).logits)
    unit = "h.pos" if "head" in axes else "pos"
    for layer, position, head in ((0, 1, 1), (2, 6, 1), (1, 2, 0)):
        at = {"layer": layer, "pos": position, "head": head}
        place = ([[[[head]] * 2, [[position]] * 2]],) * 2 if "head" in axes else ([[[position]] * 2],) * 2
        expected = slope(model, base, source, component, unit, layer, place)
        found = result.values[tuple(at[axis] for axis in axes)]
        assert_close(found - baseline, expected, atol=1e-8, rtol=1e-5)
        assert bool((expected.abs() > 1e-4).any())


@pytest.mark.parametrize("component", ["attention_pattern", "attention_scores"])
def test_the_estimate_is_the_slope_at_every_entry_of_an_attention_matrix(component):
    model = exact_model()
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    axes = ("layer", "head", "query", "key")
    result = attribution_patch(model, clean, corrupted, component, axes, difference)
    assert result.values.shape == (LAYERS, HEADS, 7, 7, 2)
    with torch.no_grad():
        baseline = difference(model(**corrupted).logits)
    for layer, head, query, key in ((0, 1, 5, 2), (2, 3, 6, 6)):
        place = [[[[head]] * 2, [[query]] * 2, [[key]] * 2]]
        expected = slope(model, corrupted, clean, component, "h.query.key", layer, (place, place))
        assert_close(result.values[layer, head, query, key] - baseline, expected, atol=1e-8, rtol=1e-5)
    assert torch.equal(result.values[1, 2, 3, 4], result.baseline_corrupted)  # under the mask
    by_rows = attribution_patch(model, clean, corrupted, component, ("layer", "query"), difference)
    added = (result.values - baseline).sum((1, 3))
    assert_close(by_rows.values - baseline, added, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_examples_in_a_padded_batch_are_estimated_as_each_by_itself(padding):
    model = exact_model()
    clean = tiny_inputs(model, batch=3, padding=padding, seed=1)
    corrupted = tiny_inputs(model, batch=3, padding=padding, seed=2)
    last = iv.metrics.logit_difference(None, 5, 7, reduce="none")
    components = ["block_output", "head_value_output", "attention_scores"]
    for component in components:
        batch = attribution_patch(model, clean, corrupted, component, ("layer",), last)
        for example in range(3):
            real = corrupted["attention_mask"][example].bool()
            alone = [{"input_ids": run["input_ids"][example, real][None]} for run in (clean, corrupted)]
            single = attribution_patch(model, *alone, component, ("layer",), last)
            assert_close(batch.values[:, example], single.values[:, 0], atol=1e-9, rtol=1e-7)


# --- metrics ----------------------------------------------------------------------------------------------


def test_numbers_of_several_shapes_and_metrics_that_mix_examples_are_each_estimated_by_themselves():
    model = tiny("gpt2", dtype=torch.float64)
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    metrics = {
        "each": lambda z: z[:, -1, 5],
        "matrix": lambda z: z[:, -1, :3],
        "mixed": lambda z: torch.stack([z[0, -1, 5] * z[1, -1, 5], z[0, -1, 5], z[1, 0, 4].exp()]),
        "mean": lambda z: z[:, -1, 5].mean(),
    }
    result = attribution_patch(model, clean, corrupted, "mlp_output", ("layer", "pos"), metrics)
    shapes = {name: tuple(result.results["mlp_output", name].shape[2:]) for name in metrics}
    assert shapes == {"each": (2,), "matrix": (2, 3), "mixed": (3,), "mean": ()}
    for name, metric in metrics.items():
        found = result.results["mlp_output", name].reshape(LAYERS, 7, -1)
        for number in range(found.shape[2]):
            one = partial(number_of, metric, number)
            alone = attribution_patch(model, clean, corrupted, "mlp_output", ("layer", "pos"), one)
            assert_close(found[..., number], alone.values, atol=1e-10, rtol=1e-8)


def number_of(metric, number, logits):
    return metric(logits).flatten()[number]


def test_a_metric_may_work_in_place_and_read_the_clean_run():
    model = tiny("gpt2")
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)

    def in_place(logits):
        return logits.mul_(2)[:, -1, 5].sum()

    doubled = attribution_patch(model, clean, corrupted, metric=in_place)
    plain = attribution_patch(model, clean, corrupted, metric=lambda z: 2 * z[:, -1, 5].sum())
    assert_close(doubled.values, plain.values)
    near = attribution_patch(model, clean, corrupted, metric=iv.metrics.kl_divergence("clean"))
    assert_close(near.baseline_clean, torch.zeros(()), atol=1e-6, rtol=0)
    assert bool((near.values != near.baseline_corrupted).any())


@pytest.mark.parametrize(
    ("metric", "got"),
    [
        (lambda z: z[0, -1, 5].item(), "a float"),
        (lambda z: z[0, -1].argmax(), "a tensor of torch.int64"),
        (lambda z: z[0, -1, 5].detach(), "a tensor of torch.float32"),
        (lambda z: (z[0, -1, 5] > 0).float(), "a tensor of torch.float32"),
        (iv.metrics.accuracy(None, 5), "a tensor of torch.float32"),
    ],
)
def test_a_metric_without_a_gradient_is_refused(metric, got):
    model = tiny("gpt2")
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    with pytest.raises(iv.MetricError) as caught:
        attribution_patch(model, clean, corrupted, metric={"mine": metric})
    assert str(caught.value) == (
        f"The metric 'mine' gave {got} without a gradient, and attribution patching needs one. Compute a tensor from"
        " the logits without detach(), item(), argmax or comparisons, such as a difference of logits or a"
        " log-probability; iv.patching.sweep takes any metric."
    )


def test_a_metric_that_gives_nan_is_refused():
    model = tiny("gpt2")
    inputs = tiny_inputs(model)
    with pytest.raises(iv.MetricError, match=r"The metric 'mine' gives NaN on the unpatched run\."):
        attribution_patch(model, inputs, inputs, metric={"mine": lambda z: (z[0, 0, 0] - 1e9).sqrt()})


# --- beside the sweep -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_axes_labels_and_baselines_are_those_of_the_sweep(method):
    model = tiny("llama")
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    given = (model, clean, corrupted, ["head_query_output", "head_key_output"], ("head", "layer", "pos"))
    options = {"metric": {"a": difference}, "positions": [0, (2, 3), -1], "layers": [2, 0]}
    estimate = attribution_patch(*given, method=method, **options)
    exact = sweep(*given, **options)
    assert estimate.axes == exact.axes
    assert estimate.labels == exact.labels
    assert estimate.entries == exact.entries
    assert estimate.results.keys() == exact.results.keys()
    for key, values in exact.results.items():
        assert estimate.results[key].shape == values.shape
        assert estimate.results[key].dtype == values.dtype
    assert estimate.results["head_key_output", "a"].shape[0] == KEY_VALUE_HEADS
    assert_close(estimate.clean["a"], exact.clean["a"])
    assert_close(estimate.corrupted["a"], exact.corrupted["a"])
    assert estimate.settings["method"] == method


def test_the_same_prompt_twice_gives_the_metric_of_the_unpatched_run_everywhere():
    model = tiny("llama")
    inputs = tiny_inputs(model)
    for component in ("block_output", "attention_scores", "head_attention_output"):
        result = attribution_patch(model, inputs, inputs, component, ("layer",), difference)
        assert_close(result.values, result.baseline_corrupted.expand(LAYERS, -1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("component", ["attention_output", "mlp_output", "head_attention_value_output"])
def test_the_screen_points_where_the_sweep_does_on_the_model_that_ships(component):
    tokenizer, model = iv.load_small_lm()
    clean = tokenizer("The capital of Spain is", return_tensors="pt")
    corrupted = tokenizer("The capital of Italy is", return_tensors="pt")
    metric = iv.metrics.logit_difference(tokenizer, " Madrid", " Rome")
    axes = ("layer", "head") if COMPONENTS[component].axes == "heads" else ("layer", "pos")
    exact = sweep(model, clean, corrupted, component, axes, metric)
    errors = {}
    for name, options in {"plain": {}, "integrated": {"method": "integrated", "steps": 4}}.items():
        estimate = attribution_patch(model, clean, corrupted, component, axes, metric, **options)
        both = torch.stack([estimate.values.flatten(), exact.values.flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.9
        effects = both - exact.baseline_corrupted
        strong = effects[1].abs() > 0.1 * effects[1].abs().max()
        assert bool((effects[0].sign() == effects[1].sign())[strong].all())
        errors[name] = (both[0] - both[1]).abs().mean()
    assert errors["integrated"] < errors["plain"]


@pytest.mark.parametrize("component", ["mlp_output", "attention_scores"])
def test_many_steps_lead_to_what_patching_a_whole_layer_does(component):
    model = exact_model()
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    given = (model, clean, corrupted, component, ("layer",), difference)
    options = {"layers": [0, 2]}
    exact = sweep(*given, **options).values
    errors = [
        (attribution_patch(*given, method="integrated", steps=steps, **options).values - exact).abs().max()
        for steps in (3, 12)
    ]
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.02 * exact.abs().max()


def test_a_cache_stands_for_the_clean_run_and_one_prompt_for_many():
    model = tiny("llama")
    clean, corrupted = tiny_inputs(model, batch=1, seed=1), tiny_inputs(model, batch=3, seed=2)
    given = ("block_output", ("layer", "pos"), lambda z: z[:, -1, 5].sum())
    expected = attribution_patch(model, clean, corrupted, *given)
    repeated = {name: value.repeat(3, 1) for name, value in clean.items()}
    assert_close(attribution_patch(model, repeated, corrupted, *given).values, expected.values)
    cache = iv.collect(model, repeated, "block_output")
    by_cache = attribution_patch(model, cache, corrupted, *given)
    assert_close(by_cache.values, expected.values)
    assert by_cache.clean == {}


def test_prompts_of_different_length_are_paired_and_what_has_no_partner_is_left_alone():
    model = tiny("llama")
    clean = {"input_ids": torch.tensor([[5, 9, 7, 8]])}
    corrupted = {"input_ids": torch.tensor([[5, 6, 4, 7, 8]])}
    with pytest.raises(iv.ConfigError, match="align='auto'"):
        attribution_patch(model, clean, corrupted, metric=difference)
    for pairs in ([(0, 0), (2, 3), (3, 4)], "auto"):
        result = attribution_patch(model, clean, corrupted, metric=difference, align=pairs)
        moved = (result.values - result.baseline_corrupted).abs().amax(-1) > 1e-4
        partners = [
            False,
            False,
            pairs == "auto",
            True,
            True,
        ]  # 9 is the partner of 4, the last of what it replaces
        assert moved[2].tolist() == partners


# --- what stays as it was ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
def test_the_model_has_no_gradients_and_no_hooks_afterwards(trained):
    model = tiny("llama").requires_grad_(trained)
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    with torch.no_grad():
        result = attribution_patch(model, clean, corrupted, metric=difference)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert not result.values.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad is trained for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert float((result.values - result.baseline_corrupted).abs().max()) > 0


def test_interventions_of_the_model_act_in_both_runs():
    model = tiny("llama")
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    config = iv.IntervenableConfig(
        [iv.RepresentationConfig(2, "mlp_output", "pos", intervention=iv.ZeroIntervention())]
    )
    edited = iv.IntervenableModel(config, model)
    result = attribution_patch(edited, clean, corrupted, "mlp_output", ("layer",), difference)
    with torch.no_grad():
        expected = difference(edited(corrupted).intervened.logits)
    assert_close(result.baseline_corrupted, expected)
    assert_close(result.values[2], result.baseline_corrupted)  # nothing passes there
    assert not torch.allclose(result.values[1], result.baseline_corrupted)


# --- what cannot be ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [0, (1, 2)]}, "The cell block_input, layer 1-2, pos 0 patches layers 1, 2 together"),
        ({"axes": ("pos",)}, "The cell block_input, pos 0 patches layers 0, 1, 2 together"),
        ({"steps": 4}, "steps=4 are points on the line of integrated gradients"),
        ({"steps": 0, "method": "integrated"}, "steps=0 makes no sense"),
        ({"method": "integrate"}, "Unknown method 'integrate'. Did you mean 'integrated'?"),
    ],
)
def test_what_cannot_be_estimated_is_refused(options, message):
    model = tiny("gpt2")
    clean, corrupted = tiny_inputs(model, seed=1), tiny_inputs(model, seed=2)
    with pytest.raises(iv.ConfigError) as caught:
        attribution_patch(model, clean, corrupted, **{"metric": difference, **options})
    assert message in str(caught.value)
