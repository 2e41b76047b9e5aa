"""Laws about the numbers of one plain pass: what is equal to what, what sums to what."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from intervenable.attention_bands import BandedMatrix
from intervenable.map_laws import Finding, deviation, limit_of, named
from intervenable.map_laws_allowances import beside_the_band
from intervenable.map_laws_branches import BRANCHES
from intervenable.map_laws_residual import calls_between
from intervenable.map_laws_runs import Bench
from intervenable.map_modules import has_own_matrix, is_norm
from intervenable.map_trace import Call, Trace
from intervenable.norms import centred
from model_maps import COMPONENTS, Bands

RETURNED = frozenset(BRANCHES.values())
"""What branches return."""


def chain(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """Each block is given what the one before it returned, bit for bit; the first one before its parts are."""
    for prefix in bench.prefixes:
        before, after = named("block_output", prefix), named("block_input", prefix)
        for layer in bench.layers(after):
            assert layer is not None
            one, other = bench.plainly.get((before, layer - 1)), bench.plainly.get((after, layer))
            if one is None or other is None:
                continue
            same = one.shape == other.shape and bool((one == other).all())
            why = f"{after} of layer {layer} is {before} of layer {layer - 1}"
            if not same and (factor := _power_of_two(one, other)) is not None:
                same, why = True, f"{why} times {factor:g}"  # some keep the stream small as it goes
            off = 0.0 if same else deviation(one, other)
            yield Finding(before, "chain", layer - 1, same, off, 0.0, why)
            yield Finding(after, "chain", layer, same, off, 0.0, why)
        yield from _first_of_all(bench, traced, prefix)


def _first_of_all(bench: Bench, traced: Trace, prefix: str) -> Iterator[Finding]:
    """No part of the first block is given anything before the block is: there is none before to compare it with."""
    name = named("block_input", prefix)
    parts = [(named(word, prefix), 0) for word in ("attention_input", "mixer_input", "mlp_input")]
    passed: dict[str, int] = {}
    for key in ((name, 0), *parts):
        site = bench.sites[key] if bench.has(*key) else None
        call = None if site is None else traced.call_at(site.path, site.call)
        if site is not None and call is not None:
            passed[key[0]] = call.entered if site.side == "input" else call.left
    if name in passed and len(passed) > 1:
        late = [other for other, time in passed.items() if time < passed[name]]
        why = f"{late[0]} is passed before it" if late else "it is passed before what is computed of it"
        yield Finding(name, "chain", 0, not late, math.inf if late else 0.0, 0.0, why)


def _power_of_two(before: Tensor, after: Tensor) -> float | None:
    """By which power of two a model multiplies one tensor to make another, bit for bit; None if it does not."""
    if before.shape != after.shape or not before.is_floating_point():
        return None
    ratio = after.double().norm() / before.double().norm().clamp(min=1e-30)
    factor = 2.0 ** round(math.log2(max(float(ratio), 1e-30)))
    return factor if torch.equal(before * factor, after) else None


def reads(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """What goes into a module that computes is what the first weights in it are multiplied with."""
    words = ("attention_input", "mlp_input", "mixer_input", "router_input")
    hybrid = _hybrid(bench, traced)
    for (name, layer), site in bench.sites.items():
        known = COMPONENTS[name]
        if known.word not in words or (name, layer) in bench.faults:
            continue
        call = traced.call_at(site.path, site.call)
        given = None if call is None else call.tensor_at(site.side, site.slot)
        if call is None or given is None:
            continue
        right = site.side == "input" and _multiplied(call, given)
        why = "a matrix of weights is multiplied with it"
        if right and known.word == "attention_input" and known.prefix != "cross":
            right = not _given_others(call, given)
            why = "matrices of weights are multiplied with it, and with nothing else that attention is given"
        yield Finding(name, "reads", layer, right, 0.0 if right else math.inf, 0.0, why)
        yield from _attends(bench, call, name, layer, known.prefix in hybrid)
        if known.word == "mlp_input":
            yield from _is_attention(bench, call, name, layer)


def _given_others(call: Call, given: Tensor) -> bool:
    """Whether vectors go into a module beside these, at as many positions, with which a matrix is multiplied."""
    beside = (value for value in call.inputs.values() if value.shape[:-1] == given.shape[:-1])
    return any(not torch.equal(value, given) and _multiplied(call, value) for value in beside)


def _hybrid(bench: Bench, traced: Trace) -> set[str]:
    """Prefixes of the stacks whose layers do not all mix alike; in others names of mixing are a matter of taste."""
    found = {prefix for prefix in bench.prefixes if bench.layers(named("attention_input", prefix))}
    ways: dict[str, set[bool]] = {}
    for (name, _), site in bench.sites.items():
        call = traced.call_at(site.path, site.call)
        if COMPONENTS[name].word == "mixer_input" and call is not None:
            ways.setdefault(COMPONENTS[name].prefix, set()).add(_computes_attention(call))
    return found | {prefix for prefix, both in ways.items() if len(both) > 1}


def _computes_attention(call: Call) -> bool:
    return any(one.name in ("softmax", "fused") for one in call.met_inside())


def _attends(bench: Bench, call: Call, name: str, layer: int | None, hybrid: bool) -> Iterator[Finding]:
    """Attention is computed in the module of attention's components, and in none that is said to mix otherwise."""
    known = COMPONENTS[name]
    kind = known.word.removesuffix("_input")
    if kind != "attention" and not (kind == "mixer" and hybrid):
        return
    right = _computes_attention(call) == (kind == "attention")
    what = "attention" if kind == "attention" else "no attention"
    for part, why in (("input", "is given it"), ("output", "returns it"), ("contribution", "returns it")):
        other = (named(f"{kind}_{part}", known.prefix), layer)
        if bench.has(*other) and bench.sites[other].path == bench.sites[name, layer].path:
            off = 0.0 if right else math.inf
            why = f"{what} is computed in the module that {why}"
            yield Finding(other[0], "reads", layer, right, off, 0.0, why)


def _is_attention(bench: Bench, call: Call, name: str, layer: int | None) -> Iterator[Finding]:
    """What is said to be an MLP, and is an attention with a nonlinearity in it, is none, whatever part of it."""
    prefix = COMPONENTS[name].prefix
    returned = bench.sites.get((named("mlp_output", prefix), layer))
    if returned is None or returned.path != bench.sites[name, layer].path:
        return
    weighed = (
        one.returned for one in call.met_inside() if one.name == "softmax"
    )  # a router's are of no heads
    if any(one is not None and one.dim() == 4 for one in weighed):
        for (other, at), site in bench.sites.items():
            within = f"{site.path}.".startswith(f"{returned.path}.") and COMPONENTS[other].prefix == prefix
            if at == layer and within and COMPONENTS[other].word.startswith("mlp_"):
                why = "no attention is computed in the module of the MLP"
                yield Finding(other, "reads", layer, False, math.inf, 0.0, why)


def projects(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """Queries, keys and values are what a matrix gives; heads and the MLP's hidden vector what one is given."""
    sides = {"query_output": "output", "key_output": "output", "value_output": "output"}
    sides |= {"attention_value_output": "input", "mlp_hidden": "input"}
    for (name, layer), site in bench.sites.items():
        known = COMPONENTS[name]
        side = sides.get(known.word)
        if side is None or (name, layer) in bench.faults:
            continue
        product = site.function is not None and (site.function.weight or site.function.name == "linear")
        inside = [*site.module.children()]  # one alone is a linear map in a wrapper
        linear = has_own_matrix(site.module) or (len(inside) == 1 and has_own_matrix(inside[0]))
        if not linear and COMPONENTS[name].word == "attention_value_output":
            linear = _is_normed_for_a_matrix(traced, site.path)
        right = bool(product) or (site.side == side and linear)
        why = f"the {side} of a module with a matrix of weights"
        yield Finding(name, "projects", layer, right, 0.0 if right else math.inf, 0.0, why)
        given = bench.plainly.get((named("mlp_input", known.prefix), layer))
        if known.word == "mlp_hidden" and given is not None and (name, layer) in bench.plainly:
            right = not _holds(bench.plainly[name, layer], given)
            why = "another matrix than the one that is given the MLP's input"
            yield Finding(name, "projects", layer, right, 0.0 if right else math.inf, 0.0, why)
    yield from _outputs_given_to_a_matrix(bench, traced)
    yield from _outputs_of_norms(bench, traced)


def _outputs_of_norms(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """What a branch returns comes before the norm behind it, if there is one: that returns what is added."""
    for (name, layer), site in bench.sites.items():
        if COMPONENTS[name].word not in RETURNED or site.side != "output" or site.function is not None:
            continue
        call = traced.call_at(site.path, site.call)
        if call is not None and is_norm(call):
            yield Finding(name, "projects", layer, False, math.inf, 0.0, "no norm returns it")


def _outputs_given_to_a_matrix(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """What a branch returns goes into no matrix of weights, unless it is what is added to the stream."""
    for name, layer in bench.sites:
        known = COMPONENTS[name]
        if known.word not in RETURNED:
            continue
        added = bench.plainly.get((name.replace("_output", "_contribution"), layer))
        value = bench.plainly.get((name, layer))
        if value is None or added is None or (added.shape == value.shape and torch.equal(added, value)):
            continue
        calls = calls_between(bench, traced, "decoder" if known.prefix == "cross" else known.prefix, layer)
        given = (call.main_input for call in calls if has_own_matrix(call.module))
        if any(one is not None and _holds(one, value) for one in given):
            why = "no matrix of weights is multiplied with it on its way to the stream"
            yield Finding(name, "projects", layer, False, math.inf, 0.0, why)


def _is_normed_for_a_matrix(traced: Trace, path: str) -> bool:
    """Whether a module has no matrix of its own, and one is given what it returns."""
    made = next((call.main_output for call in traced.of(path) if not call.children), None)
    around = next((call.parent for call in traced.of(path)), None)
    return (
        made is not None
        and around is not None
        and any(
            has_own_matrix(call.module) and call.main_input is not None and _holds(call.main_input, made)
            for call in around.inside()
        )
    )


def rows(bench: Bench, traced: Trace) -> Iterator[Finding]:
    """Rows of a pattern sum to one; to less where the softmax has one column more than there are keys."""
    for (name, layer), site in bench.sites.items():
        pattern = bench.plainly.get((name, layer))
        if COMPONENTS[name].word != "attention_pattern" or pattern is None:
            continue
        limit = limit_of(pattern.dtype)
        sums = pattern.float().sum(-1)
        keys = pattern.shape[-1]
        calls = traced.of(site.path)
        met = [one for call in calls[:1] for one in call.met_inside() if one.name == "softmax"]
        sink = any(_has_a_sink(one.returned, keys, site.bands) for one in met if one.returned is not None)
        off = (sums - 1).clamp(min=0) if sink else torch.where(sums == 0, sums, (sums - 1).abs())
        worst = float(off.max())
        negative = bool((pattern < 0).any())
        why = "rows sum to less than one, as there is a sink" if sink else "rows sum to one"
        yield Finding(name, "rows", layer, worst <= limit and not negative, worst, limit, why)
        if site.causal and pattern.shape[-2] == keys:
            behind = float(pattern.float().triu(1).abs().max())
            yield Finding(name, "causal", layer, behind == 0.0, behind, 0.0, "nothing behind the query")


def _has_a_sink(pattern: Tensor, keys: int, bands: Bands | None) -> bool:
    """Whether a softmax has columns that stand for no key."""
    if bands is None:
        return pattern.shape[-1] == keys + 1
    fits = len(bands.axes) == pattern.dim()
    return fits and BandedMatrix(pattern.shape, bands, keys).beside > 0


def weighted(bench: Bench, _: Trace) -> Iterator[Finding]:
    """Pattern times values is what the view by heads has, before the output projection."""
    for name, layer in bench.sites:
        known = COMPONENTS[name]
        if known.word != "head_attention_value_output":
            continue
        pattern = bench.plainly.get((named("attention_pattern", known.prefix), layer))
        values = bench.plainly.get((named("expanded_head_value", known.prefix), layer))
        found = bench.plainly.get((name, layer))
        if pattern is None or values is None or found is None:
            continue
        expected = pattern @ values if pattern.shape[-1] == values.shape[-2] else pattern
        off, limit = deviation(found, expected), limit_of(found.dtype)
        if off <= limit or found.shape != expected.shape:
            yield Finding(name, "sum", layer, off <= limit, off, limit, "pattern times values")
    yield from _weighted_in_bands(bench)


def _weighted_in_bands(bench: Bench) -> Iterator[Finding]:
    """Of attention in bands the values are known as the projection gives them, and the sum tells where keys are."""
    for (name, layer), site in bench.sites.items():
        known = COMPONENTS[name]
        if known.word != "attention_pattern" or site.bands is None:
            continue
        names = [
            named(word, known.prefix)
            for word in ("attention_pattern", "head_value_output", "head_attention_value_output")
        ]
        pattern, values, found = (bench.plainly.get((word, layer)) for word in names)
        if pattern is None or values is None or found is None or beside_the_band(bench, known.prefix, layer):
            continue  # what is read besides is of values of what is no position
        off, limit = math.inf, limit_of(found.dtype)
        if found.shape == values.shape == (*pattern.shape[:3], values.shape[-1]):
            there = found.abs().amax(-1, keepdim=True) > 0  # some take away what queries at padding have read
            off = deviation(found, (pattern @ values) * there)
        for one in names:
            yield Finding(one, "sum", layer, off <= limit, off, limit, "pattern times values of the band")


def projection(bench: Bench, _: Trace) -> Iterator[Finding]:
    """The shares of all heads and the projection's bias are the attention's output."""
    for (name, layer), site in bench.sites.items():
        known = COMPONENTS[name]
        shares = bench.plainly.get((name, layer))
        whole = bench.plainly.get((named("attention_output", known.prefix), layer))
        if known.word != "head_attention_output" or shares is None or whole is None:
            continue
        bias = site.output_projection(shares.device)[1]
        total = shares.sum(1) if bias is None else shares.sum(1) + bias.to(shares.dtype)
        off, limit = deviation(total, whole), limit_of(whole.dtype)
        why = f"the sum over heads and the bias is {named('attention_output', known.prefix)}"
        yield Finding(name, "projection", layer, off <= limit, off, limit, why)


def norm(bench: Bench, _: Trace) -> Iterator[Finding]:
    """The last norm divides what it is given by its scale, and multiplies it with weights."""
    for (name, layer), site in bench.sites.items():
        known = COMPONENTS[name]
        if known.word != "final_norm_scale" or (name, layer) in bench.faults:
            continue
        given = bench.plainly.get((named("final_norm_input", known.prefix), None))
        output = bench.plainly.get((named("final_norm_output", known.prefix), None))
        scale = bench.plainly.get((name, layer))
        if given is None or output is None or scale is None or given.shape != output.shape:
            continue
        wide = centred(site.module, given).double()
        unit = (wide / scale.double()).flatten(0, -2)
        bias = getattr(site.module, "bias", None)
        result = output.double().flatten(0, -2) - (bias.double() if isinstance(bias, Tensor) else 0.0)
        # One weight for each column, whatever the position.
        weight = (unit * result).sum(0) / (unit * unit).sum(0).clamp(min=1e-12)
        off, limit = deviation(unit * weight, result), limit_of(output.dtype)
        yield Finding(name, "norm", layer, off <= limit, off, limit, "the norm's output, divided by weights")


def logits(bench: Bench, traced: Trace, output: Tensor) -> Iterator[Finding]:
    """What the model returns is the head's output, or the same under a function that keeps the order."""
    found = bench.plainly.get(("logits", None))
    if found is None:
        return
    if found.shape != output.shape:
        right = found.shape[-1] == output.shape[-1] or found.shape[-1] == _labels(output)
        yield Finding(
            "logits", "logits", None, right, 0.0 if right else math.inf, 0.0, "as wide as what is returned"
        )
        return
    limit = limit_of(output.dtype)
    masked = output <= torch.finfo(output.dtype).min  # tokens that may not be said
    found, output = (torch.where(masked, torch.zeros_like(one), one) for one in (found, output))
    off = deviation(found, output)
    if off > limit:
        by_size = output.float().gather(-1, found.float().argsort(-1))
        falls = (by_size[..., :-1] - by_size[..., 1:]).nan_to_num(0.0).clamp(min=0)
        off = float(falls.max() / output.float().nan_to_num(0.0, 0.0, 0.0).abs().max().clamp(min=1e-12))
    yield Finding(
        "logits", "logits", None, off <= limit, off, limit, "what the model returns, or in its order"
    )


# --- shorthands -------------------------------------------------------------------------------------------


def _labels(output: Tensor) -> int:
    return 2 if output.dim() == 2 else output.shape[-1]  # the beginning and the end of an answer


def _multiplied(call: Call, given: Tensor) -> bool:
    """Whether a module in a call that has a matrix of weights, or a function of one, is given this very tensor."""
    for one in (call, *call.inside()):
        if has_own_matrix(one.module) and any(
            _holds(tensor, given) or (tensor.dim() == 3 and _holds(tensor.transpose(0, 1), given))
            for tensor in one.inputs.values()
        ):
            return True
    names = ("linear", "product", "einsum")
    return any(
        _holds(tensor, given) for met in call.met_inside() if met.name in names for tensor in met.given
    )


def _holds(tensor: Tensor, given: Tensor) -> bool:
    return tensor.numel() == given.numel() and bool((tensor.reshape(-1) == given.reshape(-1)).all())
