"""What tells one wrapped model from another: its class, its sizes, and some of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.unwrapping import unwrapped
from model_maps import sizes_of

SAMPLES = 4
"""How many values of each weight are kept."""

Notes = Mapping[str, Mapping[str, Any]]
"""Some values of each weight by its name, with its shape and dtype."""


def description_of(model: nn.Module) -> dict[str, Any]:
    """The class and the sizes of a model, for people to read too."""
    model = unwrapped(model).module
    config = getattr(model, "config", None)
    sizes = {} if config is None else asdict(sizes_of(config))
    packed = getattr(model, "is_quantized", False)
    return {
        "class_name": type(model).__name__,
        "model_type": _text(getattr(config, "model_type", None)),
        "sizes": {name: size for name, size in sizes.items() if size is not None},
        # Packed weights have fewer numbers than the same ones unpacked.
        "parameters": None if packed else sum(weight.numel() for weight in model.parameters()),
    }


def weights_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """A few values of each weight, evenly spread; none of packed ones and of those that are elsewhere."""
    found: dict[str, dict[str, Any]] = {}
    for name, weight in unwrapped(model).module.named_parameters():
        if not weight.is_floating_point() or weight.is_meta or hasattr(weight, "full_tensor"):
            continue
        found[name] = {
            "shape": list(weight.shape),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "values": _sampled(weight),
        }
    return found


def differences(
    saved: Mapping[str, Any], weights: Notes, model: nn.Module, *, compare_weights: bool = True
) -> list[str]:
    """What differs between the model that something was saved with and another, in words; nothing if it is the same.

    Args:
        saved: What `description_of` said.
        weights: What `weights_of` said.
        model: The other model.
        compare_weights: Whether the values of weights count. Those of another dtype are compared to its rounding.
    """
    now = description_of(model)
    found = [
        f"{label} was {saved[name]!r} and is {now[name]!r}"
        for name, label in (("class_name", "its class"), ("model_type", "its model_type"))
        if saved[name] != now[name]
    ]
    before, after = saved["sizes"], now["sizes"]
    found += [
        f"{name} was {before.get(name)} and is {after.get(name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    ]
    counts = saved["parameters"], now["parameters"]
    if None not in counts and counts[0] != counts[1]:
        found.append(f"it had {counts[0]:,} parameters and has {counts[1]:,}")
    return found or (_of_weights(weights, weights_of(model)) if compare_weights else [])


def _of_weights(before: Notes, after: Notes) -> list[str]:
    """The weights that differ, among those that have kept their names."""
    common = [name for name in before if name in after]
    if before and after and not common:
        return [f"none of its weights is called as before ({next(iter(before))}, ...)"]
    changed = []
    for name in common:
        was, now = before[name], after[name]
        if was["shape"] != now["shape"]:
            changed.append(f"{name} had the shape {was['shape']} and has {now['shape']}")
        elif not _alike(was["values"], now["values"], exactly=was["dtype"] == now["dtype"]):
            changed.append(f"{name} began with {was['values'][0]} and begins with {now['values'][0]}")
    if not changed:
        return []
    return [f"{len(changed)} of its {len(common)} weights have other values ({'; '.join(changed[:2])})"]


def _alike(one: Sequence[float | None], other: Sequence[float | None], *, exactly: bool) -> bool:
    if exactly or len(one) != len(other):
        return list(one) == list(other)
    pairs = zip(one, other, strict=True)
    return all(
        a == b or (a is not None and b is not None and abs(a - b) <= 1e-6 + abs(a) / 64) for a, b in pairs
    )


def _sampled(weight: Tensor) -> list[float | None]:
    flat = weight.detach().reshape(-1)
    count = min(SAMPLES, flat.numel())
    rows = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long().to(flat.device)
    values = flat[rows].double().tolist()
    return [value if abs(value) < float("inf") else None for value in values]  # JSON has no others


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
