"""Folders as pyvene 0.1.8 writes them, made by hand of JSON and of pickled tensors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

CLASS = "<class 'pyvene.models.interventions.{}'>"
FIELDS = (
    "layer",
    "component",
    "unit",
    "max_number_of_units",
    "low_rank_dimension",
    "intervention_type",
    "intervention",
    "subspace_partition",
    "group_key",
    "intervention_link_key",
    "moe_key",
    "source_representation",
    "hidden_source_representation",
    "latent_dim",
)


def listed(**fields: Any) -> list[Any]:
    """A representation as pyvene writes it: a list, with its defaults."""
    values = {"layer": 0, "component": "block_output", "unit": "pos", "max_number_of_units": 1} | fields
    return [values.get(name) for name in FIELDS]


def rotation_state(rows: int, columns: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a rotation that was trained for a while, and the matrix that they stand for."""
    torch.manual_seed(seed)
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.orthogonal_(layer.weight)
    parametrizations.orthogonal(layer)
    with torch.no_grad():
        original = layer.parametrizations.weight.original
        # On whose diagonal, or above it, nothing is learned.
        original.add_(0.1 * torch.randn_like(original).tril(-1))
    named = {f"rotate_layer.{name}": value.clone() for name, value in layer.state_dict().items()}
    return named, layer.weight.detach().clone()


def write(
    folder: Path,
    kinds: Sequence[str],
    representations: Sequence[Any],
    states: dict[str, dict[str, Tensor]] | None = None,
    **changes: Any,
) -> Path:
    """Write a folder; `states` has the tensors by the keys that pyvene gives representations."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "intervention_constant_sources": [False] * len(kinds),
        "intervention_dimensions": [None] * len(kinds),
        "intervention_types": [kind if kind.startswith("<") else CLASS.format(kind) for kind in kinds],
        "mode": "parallel",
        "representations": list(representations),
        "sorted_keys": [],
        "transformers_version": "5.23.0",
    }
    (folder / "config.json").write_text(json.dumps(content | changes))
    for key, state in (states or {}).items():
        torch.save(state, folder / f"intkey_{key}.bin")
    return folder


def sized(state: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    """A state with the two sizes that pyvene keeps in it."""
    return {"embed_dim": torch.tensor(width), "interchange_dim": torch.tensor(width), **state}
