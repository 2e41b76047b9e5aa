"""Whether the mistakes in maps are found: the laws that cost nothing are asked first."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from map_sabotage import Spoiled, spoilt
from tiny_registry import TinyModel, build, spread_weights
from torch import nn

from intervenable.map_inference import infer_map
from intervenable.map_laws_runs import Bench
from intervenable.map_trace import trace
from intervenable.map_verification import check_map, plain_findings
from model_maps import ModelMap


def not_found(model: nn.Module, spoiled: Spoiled, inputs: Mapping[str, Any]) -> list[str]:
    """The components with a mistake that are not refused."""
    if set(spoiled.components) <= _refused_at_sight(model, spoiled.map, inputs):
        return []
    refused = check_map(model, spoiled.map, inputs).refused
    return [name for name in spoiled.components if name not in refused]


def _refused_at_sight(model: nn.Module, described: ModelMap, inputs: Mapping[str, Any]) -> set[str]:
    """The components that break a law of the plain pass: whatever other laws say, these are refused."""
    with torch.no_grad():
        bench = Bench(model, described.for_config(getattr(model, "config", None)), inputs)
        output = bench.plain()
        findings = plain_findings(bench, bench.traced(), output)
    return {finding.component for finding in findings if not finding.passed}


def missed(
    model: nn.Module, described: ModelMap, inputs: Mapping[str, Any], one_of: int = 1
) -> dict[str, list[str]]:
    """Mistake -> the components that are not refused, of every mistake or of so many one."""
    found = _each_once(spoilt(model, described, trace(model, inputs)))
    assert len(found) > 10, "hardly a mistake can be made in this map"
    return {one.mistake: names for one in found[::one_of] if (names := not_found(model, one, inputs))}


def _each_once(mistakes: Iterable[Spoiled]) -> list[Spoiled]:
    return list({one.mistake: one for one in mistakes}.values())


def proved_map(made: TinyModel) -> ModelMap:
    """The map that is inferred, without what was refused: nothing of what is left is refused again."""
    described = check_map(made.model, infer_map(made.model, made.inputs), made.inputs).map
    assert check_map(made.model, described, made.inputs).refused == {}
    return described


def of_two_layers(model_type: str, task: str = "causal-lm") -> TinyModel:
    """A tiny model of a type whose layers are all of one kind, with two of them."""
    made = build(model_type, task)
    config = copy.deepcopy(made.model.config)
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(made.model)(config).eval().float()
    spread_weights(model)
    return TinyModel(model_type, model, made.inputs, made.shape, task)
