"""Results of sweeps as files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from intervenable.errors import StorageError
from intervenable.tensor_files import FileKind, read_tensors, write_tensors

SWEEP = FileKind(
    "intervenable.SweepResult",
    version=1,
    file_name="sweep.safetensors",
    noun="the result of a sweep",
    writer="SweepResult.save",
    remedy="Run the sweep again.",
)


def write_sweep(target: Path, tables: Mapping[str, Mapping[Any, Tensor]], rest: Mapping[str, Any]) -> Path:
    """Write tables of tensors, by names or tuples of names, and what else a result holds.

    Raises:
        StorageError: it could not be written, or holds what JSON has no form for.
    """
    tensors: dict[str, Tensor] = {}
    keys: dict[str, list[Any]] = {}
    for table, values in tables.items():
        keys[table] = list(values)
        tensors |= {f"{table}.{number:04d}": values[key] for number, key in enumerate(values)}
    return write_tensors(target, SWEEP, tensors, {"keys": keys, **rest})


def read_sweep(target: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_sweep` has written.

    Raises:
        StorageError: a damaged file, or one of another kind.
        FileNotFoundError: no file.
    """
    tensors, content = read_tensors(target, SWEEP)
    try:
        tables = {
            table: {_tuples(key): tensors[f"{table}.{number:04d}"] for number, key in enumerate(keys)}
            for table, keys in content.pop("keys").items()
        }
        rest = {name: content[name] for name in ("axes", "shortcuts")}
        rest |= {name: dict(content[name]) for name in ("labels", "entries")}
        return tables, {
            **{name: _tuples(value) for name, value in rest.items()},
            "settings": content["settings"],
        }
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise StorageError(f"{target} is not {SWEEP.noun} ({error}). {SWEEP.remedy}") from error


def _tuples(value: Any) -> Any:
    """Tuples again where JSON has lists."""
    if isinstance(value, list):
        return tuple(_tuples(one) for one in value)
    if isinstance(value, dict):
        return {name: _tuples(one) for name, one in value.items()}
    return value
