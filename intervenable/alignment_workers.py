"""Several processes that share the cells of a sweep.

Each is started anew (nothing is forked: threads and CUDA do not survive that) and has the model's weights from a file
that all of them map into memory. The processes are given a job whenever they have none, and hand back each cell as it
is finished, so that whoever asked can keep it.
"""

from __future__ import annotations

import copy
import multiprocessing
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from intervenable.errors import ConfigError, TrainingError
from intervenable.training_columns import Columns

if TYPE_CHECKING:
    from intervenable.alignment_sweep import Cell, Job, Work

DONE = None
"""What a process is told that has nothing left to do."""


def in_processes(work: Work, jobs: Sequence[tuple[Job, Any]], count: int) -> Iterator[tuple[Job, Cell]]:
    """The cells of all jobs as they are finished, in whatever order.

    Raises:
        ConfigError: something of the work cannot be handed to another process.
        TrainingError: a process ended before its time.
    """
    left = list(reversed(jobs))
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // count)
    with TemporaryDirectory(prefix="intervenable-") as folder:
        packed = _pack(work, Path(folder) / "weights.safetensors")
        running: dict[Connection, Any] = {}
        try:
            for _ in range(count):
                here, there = context.Pipe()
                process = context.Process(target=_work, args=(there, packed, threads), daemon=True)
                _start(process, count)
                there.close()
                running[here] = process
            while running:
                for connection in wait(list(running)):
                    assert isinstance(connection, Connection)
                    try:
                        kind, *content = connection.recv()
                    except (EOFError, ConnectionResetError) as error:
                        raise _ended(running[connection]) from error
                    if kind == "cell":
                        yield content[0], content[1]
                    elif kind == "error":
                        raise content[0]
                    elif left:
                        connection.send(left.pop())
                    else:
                        connection.send(DONE)
                        running.pop(connection).join()
                        connection.close()
        finally:
            for connection, process in running.items():
                process.terminate()
                process.join()
                connection.close()


def _start(process: Any, count: int) -> None:
    try:
        process.start()
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        if "bootstrapping" in str(error):
            raise
        with suppress(Exception):
            process.terminate()
        raise ConfigError(
            f"processes={count} hands model, data and options to other processes, and something among them cannot be"
            f" handed over ({type(error).__name__}: {error}). Functions and classes must be those of a module, not"
            " lambdas; or use processes=1."
        ) from error


def _ended(process: Any) -> TrainingError:
    process.join()
    return TrainingError(
        f"A process of the sweep has ended with exit code {process.exitcode} before its work was done; what it said"
        " is above. A script that starts processes does so below `if __name__ == '__main__':`, and what it hands over"
        " is defined in a module. Use processes=1 to see an error of a cell where it arises."
    )


def _work(connection: Connection, packed: _Packed, threads: int) -> None:
    """What a process does: ask for a job, hand back its cells, until there is none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started this process ends it
    torch.set_num_threads(threads)
    with suppress(BrokenPipeError, EOFError, ConnectionResetError):  # nobody is waiting any more
        try:
            work = _unpack(packed)
            while True:
                connection.send(("ready",))
                given = connection.recv()
                if given is DONE:
                    return
                job, done = given
                for cell in work(job, done):
                    connection.send(("cell", job, cell))
        except (BrokenPipeError, EOFError, ConnectionResetError):
            raise
        except BaseException as error:
            _report(connection, error)


def _report(connection: Connection, error: BaseException) -> None:
    told = traceback.format_exc()
    error.add_note(f"In a process of the sweep:\n{told}")
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))  # not every error can be handed over
    except Exception:
        error = TrainingError(f"{type(error).__name__}: {error}\n{told}")
    connection.send(("error", error))


# --- the model on its way ---------------------------------------------------------------------------------


class _Away:
    """Stands for a tensor that is in the file."""


@dataclass(frozen=True)
class _Kept:
    """What else is to be known of a tensor in the file."""

    away: _Away
    name: str
    device: str
    is_parameter: bool
    requires_grad: bool


@dataclass(frozen=True)
class _Packed:
    """Work without the weights of its model."""

    work: Any
    file: str
    kept: tuple[_Kept, ...]


def _pack(work: Work, file: Path) -> _Packed:
    """Put the weights into a file, and arrays in the place of the data's tensors.

    Through shared memory they would need a descriptor for each tensor, and in many containers there is little of it.
    """
    found = _tensors_of(work.study.model)
    kept = []
    weights: dict[str, Tensor] = {}
    memo: dict[int, Any] = {}
    for number, tensor in enumerate(found):
        away, name = _Away(), f"{number:06d}"
        memo[id(tensor)] = away
        weights[name] = tensor.detach().cpu().contiguous().clone()
        kept.append(
            _Kept(away, name, str(tensor.device), isinstance(tensor, nn.Parameter), tensor.requires_grad)
        )
    save_file(weights, file)
    study = replace(
        work.study,
        model=copy.deepcopy(work.study.model, memo),
        dataset=_arrays(work.study.dataset),
        evaluation=_arrays(work.study.evaluation),
    )
    return _Packed(replace(work, study=study), str(file), tuple(kept))


def _unpack(packed: _Packed) -> Work:
    memo: dict[int, Any] = {}
    with safe_open(packed.file, framework="pt", device="cpu") as file:
        for kept in packed.kept:
            tensor = file.get_tensor(kept.name).to(kept.device)
            if kept.is_parameter:
                tensor = nn.Parameter(tensor, requires_grad=kept.requires_grad)
            memo[id(kept.away)] = tensor
    work: Work = packed.work
    return replace(work, study=replace(work.study, model=copy.deepcopy(work.study.model, memo)))


def _tensors_of(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once, as far as a file can hold them."""
    distinct = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    plain = (Tensor, nn.Parameter)
    return [
        tensor
        for tensor in distinct.values()
        if type(tensor) in plain
        and tensor.layout == torch.strided
        and not tensor.is_meta
        and not tensor.is_quantized
    ]


def _arrays(columns: Columns) -> Columns:
    """Columns with arrays in the place of tensors, which are handed over by value."""
    return {name: [_array(value) for value in values] for name, values in columns.items()}


def _array(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
