"""Whether the mistakes in maps are found: the laws that cost nothing are asked first."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from map_sabotage import Spoiled, spoilt
from tiny_registry import TinyModel, build, spread_weights
from torch import nn

from intervenable.hooks import hooked
from intervenable.map_inference import infer_map
from intervenable.map_laws_groups import Group
from intervenable.map_laws_runs import Bench
from intervenable.map_trace import Trace, trace
from intervenable.map_verification import check_map, plain_findings, proved
from model_maps import ModelMap


def not_found(
    model: nn.Module, spoiled: Spoiled, inputs: Mapping[str, Any], traced: Trace | None = None
) -> list[str]:
    """The components with a mistake that are not refused."""
    traced = trace(model, inputs) if traced is None else traced
    if set(spoiled.components) <= _refused_at_sight(model, spoiled, inputs, traced):
        return []
    for asked in (spoiled.components, None):  # what no law about these alone refuses is asked of all
        refused = check_map(model, spoiled.map, inputs, components=asked).refused
        accepted = [name for name in spoiled.components if name not in refused]
        if not accepted:
            break
    return accepted


def _refused_at_sight(
    model: nn.Module, spoiled: Spoiled, inputs: Mapping[str, Any], traced: Trace
) -> set[str]:
    """The components that break a law of the plain pass: whatever other laws say, these are refused."""
    with torch.no_grad():
        bench = Bench(model, spoiled.map.for_config(getattr(model, "config", None)), inputs)
        output = _read_plainly(bench, traced)
        findings = plain_findings(bench, traced, output, frozenset(spoiled.components))
    return {finding.component for finding in findings if not finding.passed}


def _read_plainly(bench: Bench, traced: Trace) -> torch.Tensor:
    """Have the bench read its places in a plain pass, of which all else is written down already."""
    group = Group("plain", reads=set(bench.sites))
    with hooked(bench._hooks([group], bench.batch, bench.passes), bench.model):
        output = bench.plain()
    bench.plainly, bench._trace = group.seen, traced
    return output


def missed(
    model: nn.Module, described: ModelMap, inputs: Mapping[str, Any], one_of: int = 1
) -> dict[str, list[str]]:
    """Mistake -> the components that are not refused, of every mistake or of so many one."""
    found = _each_once(spoilt(model, described, trace(model, inputs)))
    assert len(found) > 10, "hardly a mistake can be made in this map"
    traced = trace(model, inputs)
    return {one.mistake: names for one in found[::one_of] if (names := not_found(model, one, inputs, traced))}


def _each_once(mistakes: Iterable[Spoiled]) -> list[Spoiled]:
    return list({one.mistake: one for one in mistakes}.values())


def proved_map(made: TinyModel) -> ModelMap:
    """The map that is inferred, without what was refused: nothing of what is left is refused again."""
    described = proved(made.model, infer_map(made.model, made.inputs), made.inputs).map
    assert check_map(made.model, described, made.inputs).refused == {}
    return described


def of_two_layers(model_type: str, task: str = "causal-lm") -> TinyModel:
    """A tiny model of a type whose layers are all of one kind, with two of them."""
    made = build(model_type, task)
    config = copy.deepcopy(made.model.config)
    for name in (
        "num_hidden_layers",
        "decoder_layers",
    ):  # of a decoder alone that has the config of two stacks
        if hasattr(config, name):
            setattr(config, name, 2)
    if vars(config).get("layer_types"):  # some make it of the number of layers
        config.layer_types = config.layer_types[:2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = type(made.model)(config).eval().float()
    spread_weights(model)
    return TinyModel(model_type, model, made.inputs, made.shape, task)


def smallest(model_type: str, task: str) -> tuple[TinyModel, ModelMap]:
    """A tiny model and its proved map: of two layers if the type's layers are all alike, as no mistake is lost then.

    A mistake is made in every layer there; with fewer of them less can contradict it.
    """
    made = build(model_type, task)
    described = infer_map(made.model, made.inputs)
    if not described.kinds and not described.stacks:
        made = of_two_layers(model_type, task)
    return made, proved_map(made)
