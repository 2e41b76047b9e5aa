"""Killed at any moment while it saves: who loads afterwards has the old state or the new one, bit for bit."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import intervenable as iv
from intervenable.model import IntervenableModel

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

WIDTH = 40
STATES = 60

# Imports once and forks a process for each line that it reads: one more costs milliseconds, not an import.
SERVER = """
import json, os, signal, sys, time, traceback

sys.path[:0] = sys.argv[1:]
import torch
import intervenable as iv
from test_saving_kill import MLP, state

torch.set_num_threads(1)


def save(folder, number, include_model=False):
    state(number, include_model).save_pretrained(folder, include_model=include_model)


def save_until(folder, number, die_at, include_model=False):
    wrapped, events = state(number, include_model), 0

    def count(frame, event, function):  # before and after each call that may reach the disk
        nonlocal events
        place = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
        if event in ("c_call", "c_return") and place.split(".")[0] in ("posix", "io", "_io", "safetensors", "fcntl"):
            events += 1
            if events == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    wrapped.save_pretrained(folder, include_model=include_model)


def save_many(folder, numbers):
    several = [state(number) for number in numbers]
    os.write(telling, b".")
    for wrapped in several:
        wrapped.save_pretrained(folder)


print("ready", flush=True)
for line in sys.stdin:
    name, options, delay = json.loads(line)
    told, telling = os.pipe()
    child = os.fork()
    if not child:
        try:
            globals()[name](**options)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(telling)
    if delay is not None:
        os.read(told, 1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.close(told)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

torch.manual_seed(0)
MLP = iv.MLPClassifier(WIDTH, 2, 3)


def state(number: int, own_model: bool = False) -> IntervenableModel:
    """A model with a rotation, a constant and a name of that number's own, and weights of its own if asked for."""
    random_numbers = torch.Generator().manual_seed(number)
    swap = iv.LowRankRotatedSpaceIntervention(WIDTH, 1 + number % 7)
    swap.rotation.weight.data = torch.randn(WIDTH, 1 + number % 7, generator=random_numbers)
    constant = torch.full((WIDTH,), float(number))
    add = iv.RepresentationConfig(
        1, intervention_type=iv.AdditionIntervention, source_representation=constant, name=f"number {number}"
    )
    model = copy.deepcopy(MLP) if own_model else MLP
    if own_model:
        nn.init.constant_(model.score.bias, number)
    return IntervenableModel([iv.RepresentationConfig(0, intervention=swap), add], model)


def number_in(folder: Path, own_model: bool = False) -> int:
    """Which state is in the folder; all of it must be there, bit for bit."""
    found = IntervenableModel.from_pretrained(folder, None if own_model else MLP)
    number = int(found.names[1].removeprefix("number "))
    expected = state(number, own_model)
    for (name, have), want in zip(
        found.model.state_dict().items(), expected.model.state_dict().values(), strict=True
    ):
        assert torch.equal(have, want), name
    assert found.names == expected.names
    assert torch.equal(found._bound[1].constant, expected._bound[1].constant)
    have, want = found.state_dict(), expected.state_dict()
    assert have.keys() == want.keys()
    assert all(torch.equal(have[name], want[name]) for name in want)
    return number


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER, str(ROOT), str(ROOT / "tests")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def run(server, name, delay=None, **options):
    """Do it in a process of its own, which is killed that many seconds after it tells; its exit code."""
    print(json.dumps([name, options, delay]), file=server.stdin, flush=True)
    return int(server.stdout.readline())


@pytest.mark.parametrize("include_model", [False, True])
def test_old_or_new_is_there_at_whatever_step_of_saving_the_process_is_killed(
    server, tmp_path, include_model
):
    folder, step, replaced = tmp_path / "kept", 0, []
    options = {"folder": str(folder), "include_model": include_model}
    assert run(server, "save", number=0, **options) == 0
    current, left_behind = 0, 0
    while True:
        step += 3 if include_model else 1
        code = run(server, "save_until", number=step, die_at=step, **options)
        now = number_in(folder, include_model)
        assert now in (current, step)
        replaced.append(now == step)
        current = now
        if code == 0:
            break
        assert code == -signal.SIGKILL
        left_behind += len(os.listdir(folder)) > 3 + include_model
    assert step > 100
    assert True in replaced[:-1]  # and died after it
    assert replaced == sorted(replaced)
    assert left_behind > 10
    assert len(os.listdir(folder)) == 3 + include_model  # the last, which lived, has swept up


def test_a_folder_that_was_new_is_whole_or_said_to_hold_nothing(server, tmp_path):
    seen = []
    for step in range(1, 1000, 7):
        folder = tmp_path / str(step)
        code = run(server, "save_until", folder=str(folder), number=2, die_at=step)
        if (folder / "config.json").exists():
            seen.append(number_in(folder))
        else:
            seen.append(0)
            with pytest.raises(iv.StorageError, match="There is no "):
                number_in(folder)
        if code == 0:
            break
    assert seen == sorted(seen)
    assert set(seen) == {0, 2}


def test_saving_killed_twenty_times_at_random_leaves_a_state_that_was_saved(server, tmp_path):
    folder = tmp_path / "kept"
    assert run(server, "save", folder=str(folder), number=0) == 0
    moments, next_one, counts = random.Random(0), 1, []
    for _ in range(20):
        numbers = list(range(next_one, next_one + STATES))
        before = number_in(folder)
        code = run(server, "save_many", moments.uniform(0, 0.25), folder=str(folder), numbers=numbers)
        assert code in (-signal.SIGKILL, 0)
        now = number_in(folder)
        assert now in (before, *numbers)
        counts.append(now - before if now != before else 0)
        next_one += STATES
    assert len(set(counts)) > 5, f"it was killed where nothing happened: {counts}"
    assert run(server, "save", folder=str(folder), number=1) == 0
    assert number_in(folder) == 1
    assert len(os.listdir(folder)) == 3
