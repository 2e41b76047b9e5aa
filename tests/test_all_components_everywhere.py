"""What a map offers no other part of the library refuses: every component is read, swapped, swept and trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from declared import hooks_of, main_output
from tiny_registry import build
from torch import Tensor, nn

import intervenable as iv
from intervenable.binding import Places
from model_maps import COMPONENTS

USUAL = ["jamba", "deepseek_v3"]
MORE = ["llama", "bloom", "gpt_oss", "starcoder2", "falcon_h1", "qwen3_next"]
OTHERS = [("t5", "seq2seq-lm"), ("bart", "seq2seq-lm")]


class Blend(iv.Intervention):
    """A part of the way from the base to the source, how far is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(0.3))

    def forward(self, base: Tensor, source: Tensor | None = None, subspaces: Any = None) -> Tensor:
        assert source is not None
        hidden = ~(base.isfinite() & source.isfinite())  # scores that the mask leaves out
        change = (source - base).masked_fill(hidden, 0.0)
        return base + self.amount * change


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("INTERVENABLE_CACHE", str(tmp_path))


def layer_of(places: Places, component: str) -> int | None:
    """The first layer that has a component; None if it is in no block."""
    if COMPONENTS[component].scope == "model":
        return None
    for layer in range(places.layers_of(component)):
        try:
            places.at(component, layer)
        except iv.UnsupportedModelError:
            continue
        return layer
    raise AssertionError(f"{component} is offered, and no layer has it")


def refusals(model: nn.Module, base: dict, source: dict) -> Iterator[tuple[str, str, Exception]]:
    """Every use of every component that is refused."""
    places = Places(model)
    for component in places.components:
        layer, known = layer_of(places, component), COMPONENTS[component]
        uses: dict[str, Callable[[], None]] = {
            "collect": lambda c=component, at=layer: collects(model, base, c, at)
        }
        if not places.map.site(component, layer).read_only:
            unit = known.units[-1]
            entry = (layer, component, unit)
            uses["swap"] = lambda e=entry: swaps(model, base, source, e)
            uses["train"] = lambda e=entry: trains(model, base, source, e)
            uses["sweep"] = lambda c=component, at=layer: sweeps(model, base, source, c, at)
        for name, use in uses.items():
            try:
                use()
            except iv.IntervenableError as error:
                yield name, component, error


def collects(model, base, component, layer):
    cache = iv.collect(model, base, component, layers=None if layer is None else [layer])
    assert len(cache) == 1
    assert all(value.numel() for value in cache.values())


def swaps(model, base, source, entry):
    declared = iv.IntervenableModel([iv.RepresentationConfig(*entry)], model)
    with torch.no_grad():
        declared(base, [source])


def trains(model, base, source, entry):
    declared = iv.IntervenableModel([iv.RepresentationConfig(*entry, intervention=Blend())], model)
    wanted = [weight.requires_grad for weight in model.parameters()]
    declared.disable_model_gradients()
    try:
        main_output(declared(base, [source]).intervened).float().pow(2).mean().backward()
        (amount,) = declared.get_trainable_parameters()
        assert amount.grad is not None
        assert amount.grad.isfinite()
    finally:
        for weight, wants in zip(model.parameters(), wanted, strict=True):
            weight.requires_grad_(wants)


def sweeps(model, base, source, component, layer):
    units = COMPONENTS[component].units
    axis = "pos" if "pos" in units else "head"
    first = {name: value[:1] for name, value in base.items()}
    other = {name: value[:1] for name, value in source.items()}
    axes = (axis,) if layer is None else ("layer", axis)
    layers = None if layer is None else [layer]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1].float().pow(2).sum(-1)

    found = iv.patching.sweep(model, other, first, component, axes=axes, layers=layers, metric=metric)
    assert found.values.isfinite().all()


def two_prompts(inputs: dict[str, Tensor]) -> tuple[dict, dict]:
    """The inputs, and others of the same shapes: tokens in the other order, pictures and sounds turned in sign."""
    turned = {
        name: value.flip(1)
        if name in ("input_ids", "decoder_input_ids")
        else -value
        if value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    return dict(inputs), turned


def nothing_is_refused(model: nn.Module, inputs: dict[str, Tensor]) -> None:
    before = hooks_of(model)
    found = [f"{use} {component}: {error}" for use, component, error in refusals(model, *two_prompts(inputs))]
    assert not found, "\n".join(found)
    assert hooks_of(model) == before


@pytest.mark.parametrize("name", USUAL)
def test_whatever_a_language_model_is_said_to_have_is_read_swapped_swept_and_trained_on(name):
    tiny = build(name)
    nothing_is_refused(tiny.model, tiny.inputs)


@pytest.mark.registry
@pytest.mark.parametrize("name", MORE)
def test_so_it_is_in_more_language_models(name):
    tiny = build(name)
    nothing_is_refused(tiny.model, tiny.inputs)


@pytest.mark.registry
@pytest.mark.parametrize(("name", "task"), OTHERS)
def test_so_it_is_in_models_of_other_tasks(name, task):
    tiny = build(name, task)
    nothing_is_refused(tiny.model, tiny.inputs)
