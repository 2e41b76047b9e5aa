"""Compiled models: while hooks of ours are on them, their modules run as they were written.

Compiled code does not look at hooks that came after it was made, and an edit that is not made must never go
unnoticed. What is compiled stays compiled: runs without interventions are as fast as before.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from intervenable.errors import CompiledModelWarning

_found: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_running: list[AbstractContextManager[Any]] = []
"""One entry for each run that is under way, in whichever thread; the first one holds what torch gave for all."""


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[bool]:
    """Run the block with the modules of a model as they were written; tells whether any of them was compiled.

    Warns:
        CompiledModelWarning: the first time for a model that is compiled, or has modules that are.
    """
    if not _has_compiled(model):
        yield False
        return
    _enter()
    try:
        yield True
    finally:
        _leave()


def is_compiled(module: nn.Module) -> bool:
    """Whether a module runs compiled code: it was made by `torch.compile`, or compiled in place.

    Example:
        >>> linear = nn.Linear(2, 2)
        >>> is_compiled(linear), is_compiled(torch.compile(linear, backend="eager"))
        (False, True)
    """
    return (
        "_orig_mod" in module._modules
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")
    )


def _has_compiled(model: nn.Module) -> bool:
    """Whether any part is compiled. All parts are looked at once; the model itself each time."""
    known = _found.get(model, False)
    if known or (model in _found and not is_compiled(model)):
        return known
    found = _found[model] = any(map(is_compiled, model.modules()))
    if found:
        warnings.warn(
            f"{type(model).__name__} is compiled. Its runs with interventions use the modules as they were written,"
            " since compiled code does not look at hooks. Filter out intervenable.CompiledModelWarning to be rid of"
            " this note.",
            CompiledModelWarning,
            stacklevel=2,
        )
    return found


def _enter() -> None:
    # Torch has one setting for all threads, so that the last to leave has to put it back.
    with _lock:
        if not _running:
            _running.append(torch.compiler.set_stance("force_eager"))
        _running.append(_running[0])


def _leave() -> None:
    with _lock:
        _running.pop()
        if len(_running) == 1:
            _running.pop().__exit__(None, None, None)
