"""Killed at any moment: the state of a training is whole, and the training that goes on ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from intervenable.tensor_files import read_tensors
from intervenable.training_checkpoints import STATE

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
FILE = "training.safetensors"

# Imports once and forks a process for each line that it reads: one more costs milliseconds, not an import.
SERVER = """
import json, os, signal, sys, time, traceback

sys.path[:0] = sys.argv[1:]
import torch
from pathlib import Path
from intervenable import training
from intervenable.training_checkpoints import Checkpoint, Kept
from intervenable.training_processes import Processes
from training_by_hand import das, make_mlp, make_rows

torch.set_num_threads(1)
OPTIONS = dict(lr=0.05, epochs=8, batch_size=4, accumulate=2, checkpoint_every=1)


def train(folder, tell_at):
    def told(done, total):
        if done == tell_at:
            os.write(telling, b".")

    training.train(
        das(make_mlp()), make_rows(), **OPTIONS, evaluation=0.25, early_stopping=100, checkpoint=folder, progress=told
    )


def write(folder, die_at):
    kept = Checkpoint(Path(folder), {"of": "nothing"}, 1, Processes(torch.device("cpu")))
    kept.write(Kept({"weights": torch.zeros(20_000)}, {"step": 1}))
    events = 0

    def count(frame, event, function):  # before and after each call that may reach the disk
        nonlocal events
        place = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
        if event in ("c_call", "c_return") and place.split(".")[0] in ("posix", "io", "_io", "safetensors"):
            events += 1
            if events == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    kept.write(Kept({"weights": torch.ones(20_000)}, {"step": 2}))


training.train(das(make_mlp()), make_rows(), epochs=1)  # imports what is imported at the first step
print("ready", flush=True)
for line in sys.stdin:
    name, options, delay = json.loads(line)
    heard, telling = os.pipe()
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
        os.read(heard, 1)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.close(heard)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def server():
    command = [sys.executable, "-c", SERVER, str(ROOT), str(ROOT / "tests")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def run(server, name, folder, delay=None, **options):
    """Do it in a process of its own, which is killed that many seconds after it tells; its exit code."""
    print(json.dumps([name, {"folder": str(folder), **options}, delay]), file=server.stdin, flush=True)
    return int(server.stdout.readline())


def step_of(folder):
    """How far the state in a folder is, which must be whole; 0 if there is none."""
    file = folder / FILE
    return read_tensors(file, STATE)[1]["step"] if file.exists() else 0


def test_a_training_killed_twenty_times_ends_with_the_bytes_of_one_that_was_not(server, tmp_path):
    whole, cut, never = tmp_path / "whole", tmp_path / "cut", 10**9
    assert run(server, "train", whole, tell_at=never) == 0
    total = step_of(whole)
    assert total == 24
    moments, steps = random.Random(0), [0]
    for _ in range(20):
        # from right where it takes up the work to two steps on
        tell_at = min(max(steps[-1], 1) + moments.randrange(3), total - 1)
        assert run(server, "train", cut, moments.uniform(0, 0.01), tell_at=tell_at) == -signal.SIGKILL
        steps.append(step_of(cut))
    assert steps == sorted(steps)
    assert len(set(steps)) > 5, f"it was killed where nothing happened: {steps}"
    assert run(server, "train", cut, tell_at=never) == 0
    assert (cut / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert run(server, "train", cut, tell_at=never) == 0  # it is done: nothing changes
    assert (cut / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_the_state_is_whole_at_whatever_step_of_its_writing_the_process_is_killed(server, tmp_path):
    found, code = [], None
    while code != 0:
        folder = tmp_path / str(len(found))
        code = run(server, "write", folder, die_at=len(found) + 1)
        assert code in (0, -signal.SIGKILL)
        found.append(step_of(folder))
    assert len(found) > 20
    assert set(found) == {1, 2}
    left = [folder for folder in tmp_path.iterdir() if list(folder.glob(".unfinished*"))]
    assert left
    assert run(server, "write", left[0], die_at=0) == 0  # it goes on there
    assert sorted(os.listdir(left[0])) == ["training.lock", FILE]
