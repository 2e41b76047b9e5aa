"""Whether a map is right about a model: every law looked at in runs of the model itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import (
    ConfigError,
    MapError,
    UnknownNameError,
    UnsupportedModelError,
    unknown_component,
)
from intervenable.map_arguments import check_runs, inputs_in, model_in
from intervenable.map_inputs import example_inputs as made_inputs
from intervenable.map_laws import (
    ADDED,
    LAWS,
    TELLS_NOTHING,
    TELLS_NOTHING_OF,
    Finding,
    deviation,
    limit_of,
    named,
)
from intervenable.map_laws_banded import roles
from intervenable.map_laws_branches import BRANCHES, branches, within
from intervenable.map_laws_ends import ends, entered, lookup, single_layers
from intervenable.map_laws_experts import chosen, numbered, weighs
from intervenable.map_laws_focus import groups_about, of_the_same_parts, with_what_they_are_made_from
from intervenable.map_laws_groups import Key
from intervenable.map_laws_heads import heads, shares
from intervenable.map_laws_linear import affine, straight
from intervenable.map_laws_order import apart, given_to_experts, given_to_routers, order
from intervenable.map_laws_places import bound, layout, once, viewed
from intervenable.map_laws_reach import about, mixes
from intervenable.map_laws_residual import residual
from intervenable.map_laws_runs import Bench
from intervenable.map_laws_stacks import attends, followed
from intervenable.map_laws_swaps import Swaps, adds, determines, elementwise, moves, stays
from intervenable.map_laws_values import (
    chain,
    logits,
    norm,
    projection,
    projects,
    reads,
    rows,
    weighted,
)
from intervenable.map_shortcuts import shortcuts_of
from intervenable.map_trace import Trace
from intervenable.map_verification_result import WAY_OUT, Verification
from intervenable.maps import map_of
from intervenable.sites import BoundSite
from model_maps import COMPONENTS, LayerKind, ModelMap, Site, UnmappedModelError


def check_map(
    model: nn.Module,
    model_map: ModelMap,
    inputs: Mapping[str, Any],
    *,
    components: Iterable[str] | None = None,
) -> Verification:
    """Look at every law of a map in runs of a model; nothing about the model changes.

    Args:
        model: The model, in evaluation mode.
        model_map: What is to be looked at.
        inputs: Keyword inputs of the model: a prompt of some tokens that differ.
        components: Which components to look at, with what they are compared with; all by default.

    Raises:
        MapError: the model gives other numbers each time it is run.
        UnknownNameError: no component is called so.
    """
    described = model_map.for_config(getattr(model, "config", None))
    wanted = None if components is None else _known(components, model, described)
    bench = Bench(model, described, inputs)
    return _looked_at(bench, _steady_output(bench), wanted)


def proved(model: nn.Module, model_map: ModelMap, inputs: Mapping[str, Any]) -> Verification:
    """What keeps every law where nothing is left that breaks one: looked at again without that, until it stands.

    A component that is told from other places only by its relation to one that is wrong is told by nothing.

    Args:
        model: The model, in evaluation mode.
        model_map: What is to be looked at.
        inputs: Keyword inputs of the model: a prompt of some tokens that differ.

    Returns:
        The findings about the whole map; what was refused in any round; the map of the last.
    """
    bench = Bench(model, model_map.for_config(getattr(model, "config", None)), inputs)
    output = _steady_output(bench)
    first = last = _looked_at(bench, output, None)
    refused = dict(first.refused)
    left = frozenset(model_map.components())
    while gone := left - frozenset(last.map.components()):  # where other layers keep one, they tell as much
        left -= gone
        asked = of_the_same_parts(gone, left)
        if not asked:
            break
        bench = bench.of_less(last.map)
        last = _looked_at(bench, output, asked)
        refused |= last.refused
    passed = tuple(name for name in first.components if name not in refused)
    return dataclasses.replace(first, refused=refused, map=last.map, components=passed)


def verify(
    model: nn.Module,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    model_map: ModelMap | None = None,
    components: Iterable[str] | None = None,
) -> Verification:
    """Whether what the library says of this model's parts is true: every law, in runs of the model itself.

    Args:
        model: The model, with its own weights, dtype and attention; or an `IntervenableModel` of it.
        example_inputs: Keyword inputs to run it on; by default a short prompt is made.
        model_map: The map to look at, such as one of your own; by default the one that the library uses.
        components: Which components to look at; all by default.

    Raises:
        ConfigError: no model, no map, or no mapping of inputs is given where one is due.
        InputError: the model does not run on the inputs given.
        MapError: the model is in training mode and gives other numbers each time it is run.
        UnsupportedModelError: there is no map.
        UnknownNameError: no component is called so.
    """
    inside = model_in(model)
    if model_map is not None and not isinstance(model_map, ModelMap):
        raise ConfigError(
            f"model_map is a {type(model_map).__name__}, not an iv.ModelMap. That of a model is"
            " iv.model_map(model).map."
        )
    try:
        described = map_of(inside) if model_map is None else model_map
    except UnmappedModelError as error:
        raise UnsupportedModelError(str(error)) from error
    given = made_inputs(inside) if example_inputs is None else inputs_in(example_inputs, inside)
    if example_inputs is not None:
        check_runs(inside, given)
    found = check_map(inside, described, given, components=components)
    if components is not None:
        return found
    return dataclasses.replace(found, shortcuts=shortcuts_of(inside, found.map, given))


def _known(components: Iterable[str], model: nn.Module, described: ModelMap) -> frozenset[str]:
    names = frozenset([components] if isinstance(components, str) else components)
    for name in sorted(names - COMPONENTS.keys()):
        raise UnknownNameError(unknown_component(name, described.components(), type(model).__name__))
    return names


def _steady_output(bench: Bench) -> Tensor:
    """What the model returns, if it returns the same twice."""
    one = bench.plain()
    if not bench.narrow(one) and deviation(one, bench.plain()) > limit_of(one.dtype):
        name = type(bench.model).__name__
        remedy = (
            "It is in training mode, in which dropout is on: call model.eval() first."
            if bench.model.training
            else "Laws about numbers can only be looked at in a model that repeats itself."
        )
        raise MapError(f"{name} gave two different results for the same inputs. {remedy}")
    return one


def _looked_at(bench: Bench, output: Tensor, wanted: frozenset[str] | None) -> Verification:
    """What the laws come to for some components, or for all.

    Args:
        bench: The model and the map.
        output: What the model returns.
        wanted: The components; None for all.
    """
    asked = None if wanted is None else with_what_they_are_made_from(wanted)
    with torch.no_grad():
        findings = _findings(bench, output, asked)
    return _verification(bench, findings, wanted, asked)


def _findings(bench: Bench, output: Tensor, asked: frozenset[str] | None) -> list[Finding]:
    traced = bench.traced()
    swaps = Swaps(bench)
    judges = [
        law(bench, swaps)
        for law in (
            determines,
            stays,
            adds,
            elementwise,
            moves,
            within,
            ends,
            entered,
            order,
            single_layers,
            lookup,
        )
    ]
    judges += [roles(bench, swaps), heads(bench), shares(bench), affine(bench), straight(bench, traced)]
    judges += [mixes(bench), about(bench), attends(bench), followed(bench), chosen(bench), weighs(bench)]
    whole = branches(bench, swaps)
    if asked is not None:
        bench.groups = groups_about(bench.groups, asked)
    bench.run()
    plain = plain_findings(bench, traced, output, asked)
    found = [finding for judge in judges for finding in judge()]
    # What was written back before and changed nothing does not without the rest either.
    identity = () if bench.known else _identity(bench, output, asked)
    return [*plain, *found, *whole(plain), *identity]


def plain_findings(
    bench: Bench, traced: Trace, output: Tensor, asked: frozenset[str] | None = None
) -> list[Finding]:
    """What the laws come to that look at a plain pass and make no experiments.

    Args:
        bench: The model and the map.
        traced: The pass written down.
        output: What the model returned.
        asked: The components that are looked at; None for all.
    """
    found = [*bound(bench, traced), *numbered(bench), *viewed(bench)]
    for law in (once, layout, chain, apart, reads, projects, rows, weighted, projection, norm):
        found += law(bench, traced)
    summed = (*ADDED, *BRANCHES.values(), "block_mid")
    if asked is None or any(COMPONENTS[name].word in summed for name in asked):
        found += residual(bench, traced)
    found += [*given_to_experts(bench, traced), *given_to_routers(bench, traced)]
    return [*found, *logits(bench, traced, output)]


def _identity(bench: Bench, output: Tensor, asked: frozenset[str] | None) -> list[Finding]:
    """Writing everything back changes nothing: of what modules hand over bit for bit."""
    found: list[Finding] = []
    eager = all(_is_eager(bench.model, site.module) for site in bench.sites.values() if _under_a_mode(site))
    for inside in (False, True):
        keys = [
            key
            for key, site in bench.sites.items()
            if _under_a_mode(site) == inside and key not in bench.faults and not site.read_only
            if asked is None or key[0] in asked
        ]
        exact = not inside or eager
        limit = 0.0 if exact else _rounding(output.dtype)
        names = dict.fromkeys(name for name, _ in keys)
        if not names:
            continue
        off = _off_by(bench, keys, output)
        for name in names:
            own = off if off <= limit else _off_by(bench, [key for key in keys if key[0] == name], output)
            why = "the same to the last bit" if exact else "the same up to rounding"
            layers = [layer for other, layer in keys if other == name]
            found += [Finding(name, "identity", layer, own <= limit, own, limit, why) for layer in layers]
    return found


def _under_a_mode(site: BoundSite) -> bool:
    """Whether a site is in an attention module whose functions are met: torch's own takes no short cut then."""
    return site.kind == "inside" or (site.function is not None and site.function.weight is not None)


def _rounding(dtype: torch.dtype) -> float:
    """How far attention that is done again by hand may be from a kernel that does all at once."""
    return limit_of(dtype) * (0.5 if dtype in (torch.float32, torch.float64) else 1.0)


def _is_eager(model: nn.Module, module: nn.Module) -> bool:
    """Whether an attention module multiplies matrices one by one, so that it is done again bit for bit."""
    config = getattr(module, "config", getattr(model, "config", None))
    return getattr(config, "_attn_implementation", None) == "eager"


def _off_by(bench: Bench, keys: Sequence[Key], output: Tensor) -> float:
    return deviation(bench.identity(keys), output)


# --- what is refused --------------------------------------------------------------------------------------


def _verification(
    bench: Bench,
    findings: Sequence[Finding],
    wanted: frozenset[str] | None,
    asked: frozenset[str] | None,
) -> Verification:
    described = bench.map
    names = [
        name
        for name in dict.fromkeys(name for name, _ in (*bench.sites, *bench.faults))
        if asked is None or name in asked
    ]
    names = [name for name in COMPONENTS if name in names]
    refused: dict[str, str] = {}
    partly: dict[str, tuple[tuple[int, ...], str]] = {}
    broken = {(finding.component, finding.layer) for finding in findings if not finding.passed}
    for name in names:
        own = [finding for finding in findings if finding.component == name]
        failed = [finding for finding in own if not finding.passed]
        placed = {layer for other, layer in (*bench.sites, *bench.faults) if other == name}
        if failed:
            bad = {finding.layer for finding in failed}
            reason = _reason(failed)
            if placed - bad and None not in bad:
                partly[name] = (tuple(sorted(layer for layer in bad if layer is not None)), reason)
            refused[name] = reason
        elif untold := placed - {finding.layer for finding in own if _tells(finding, broken, described)}:
            if placed - untold:
                partly[name] = (tuple(sorted(layer for layer in untold if layer is not None)), UNTOLD)
            refused[name] = UNTOLD
    for name in names:
        above = COMPONENTS[name].heads_of or COMPONENTS[name].derived_from
        while above and name not in refused:
            if above in refused and above not in partly:
                refused[name] = f"it is made from {above!r}, of which this holds: {refused[above]}"
            above = COMPONENTS[above].heads_of or COMPONENTS[above].derived_from
    if wanted is not None:
        names = [name for name in names if name in wanted]
        refused = {name: why for name, why in refused.items() if name in wanted}
        partly = {name: why for name, why in partly.items() if name in wanted}
        findings = [finding for finding in findings if finding.component in wanted]
    absent = {
        name: described.reason(name)
        for name in COMPONENTS
        if described.site(name) is None and name not in names and _could_be(name, described)
    }
    result = _without(described, bench, refused, partly)
    passed = tuple(name for name in names if name not in refused)
    return Verification(type(bench.model).__name__, tuple(findings), refused, absent, result, passed)


UNTOLD = (
    "none of the laws that tell it from other places could be looked at, as the components that they compare it with"
    f" are missing; {WAY_OUT}"
)


def _tells(finding: Finding, broken: Set[Key], described: ModelMap) -> bool:
    """Whether a place with another meaning would not have kept the law as well.

    Args:
        finding: A law that was kept.
        broken: Where components have broken one: there they are nothing to compare another with.
        described: The map.
    """
    name, compared, layer = finding.component, finding.compared, finding.layer
    word = COMPONENTS[name].word
    if finding.law in TELLS_NOTHING or finding.law in TELLS_NOTHING_OF.get(word, ()):
        return False
    if (compared, layer) in broken:
        return False
    site = described.site(name, layer)
    if word in ADDED and finding.law != "residual" and site is not None and site.scale != 1.0:
        return False  # the sum alone tells by how much it was multiplied
    # What is added to the stream follows from all that comes before what a branch returns as well.
    before = word in BRANCHES.values() and compared == named(
        word.replace("output", "contribution"), COMPONENTS[name].prefix
    )
    return not before or site == described.site(compared, layer)


def _reason(failed: Sequence[Finding]) -> str:
    worst = max(failed, key=lambda finding: (finding.law in ("bound", "once"), finding.deviation))
    layers = sorted(
        {finding.layer for finding in failed if finding.layer is not None and finding.law == worst.law}
    )
    where = f" in layer{'s' if len(layers) > 1 else ''} {_ranges(layers)}" if layers else ""
    laws = sorted({finding.law for finding in failed} - {worst.law})
    also = f"; also {', '.join(repr(law) for law in laws)}" if laws else ""
    numbers = (
        f", off by {worst.deviation:.2g} where {worst.limit:.2g} is allowed"
        if worst.deviation < float("inf")
        else ""
    )
    return (
        f"what the map places there breaks the law {worst.law!r} ({LAWS[worst.law]}){where}: {worst.why}{numbers}"
        f"{also}; {WAY_OUT}"
    )


def _ranges(layers: Sequence[int]) -> str:
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][-1] == layer - 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    return ", ".join(f"{part[0]}" if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts)


def _could_be(name: str, described: ModelMap) -> bool:
    """Whether a component is about a stack that a model has; in one without any stack, about the model."""
    prefix = COMPONENTS[name].prefix
    if prefix == "cross":
        return "decoder" in described.stacks
    stackless = described.blocks is None and not described.stacks
    return not prefix if stackless else described.blocks_of(name) is not None


def _without(
    described: ModelMap,
    bench: Bench,
    refused: Mapping[str, str],
    partly: Mapping[str, tuple[tuple[int, ...], str]],
) -> ModelMap:
    """The map without what was refused; what passed and was only answered with such a site gets it for its own."""
    whole = {name: why for name, why in refused.items() if name not in partly}
    kinds = [
        dataclasses.replace(
            kind, sites={name: site for name, site in kind.sites.items() if name not in whole}
        )
        for kind in described.kinds
    ]
    for name, (layers, why) in partly.items():
        kinds.append(LayerKind(layers, described.blocks_stack_of(name), absent={name: why}))
    result = dataclasses.replace(
        described,
        sites={name: site for name, site in described.sites.items() if name not in whole},
        absent={**described.absent, **whole},
        kinds=tuple(kinds),
    )
    lost: dict[str, dict[Site, list[int | None]]] = {}
    for name, layer in bench.sites:
        if name in refused or result.site(name, layer) is not None:
            continue
        site = described.site(name, layer)
        if site is not None:
            lost.setdefault(name, {}).setdefault(site, []).append(layer)
    own: dict[str, Site] = {}
    more: list[LayerKind] = []
    for name, by_site in lost.items():
        if len(by_site) == 1 and not result.kinds:
            own[name] = next(iter(by_site))
        else:
            more += [
                LayerKind(
                    tuple(layer or 0 for layer in layers), described.blocks_stack_of(name), sites={name: site}
                )
                for site, layers in by_site.items()
            ]
    return dataclasses.replace(result, sites={**result.sites, **own}, kinds=(*result.kinds, *more))
