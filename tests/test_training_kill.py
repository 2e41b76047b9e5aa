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
NEVER = 10**9

# Imports once and forks a process for each line that it reads: one more costs milliseconds, not an import.
SERVER = """
import json, os, signal, sys, traceback

sys.path[:0] = sys.argv[1:]
import torch
from pathlib import Path
from intervenable import training
from intervenable.training_checkpoints import Checkpoint, Kept
from intervenable.training_processes import Processes
from training_by_hand import das, make_mlp, make_rows

torch.set_num_threads(1)
OPTIONS = dict(lr=0.05, epochs=8, batch_size=4, accumulate=2, checkpoint_every=1)


def die_at(event, counts):
    # at its event of that number from here on, of those that count: the calls of functions and their ends
    events = 0

    def count(frame, kind, function):
        nonlocal events
        events += counts(kind, function)
        if events == event:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def any_call(kind, function):
    return True


def call_that_may_reach_the_disk(kind, function):
    place = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
    return kind in ("c_call", "c_return") and place.split(".")[0] in ("posix", "io", "_io", "safetensors")


def train(folder, step, event):
    def told(done, total):
        if done == step:
            die_at(event, any_call)

    training.train(
        das(make_mlp()), make_rows(), **OPTIONS, evaluation=0.25, early_stopping=100, checkpoint=folder, progress=told
    )


def write(folder, event):
    kept = Checkpoint(Path(folder), {"of": "nothing"}, 1, Processes(torch.device("cpu")))
    kept.write(Kept({"weights": torch.zeros(20_000)}, {"step": 1}))
    die_at(event, call_that_may_reach_the_disk)
    kept.write(Kept({"weights": torch.ones(20_000)}, {"step": 2}))


training.train(das(make_mlp()), make_rows(), epochs=1)  # imports what is imported at the first step
print("ready", flush=True)
for line in sys.stdin:
    name, options = json.loads(line)
    child = os.fork()
    if not child:
        try:
            globals()[name](**options)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
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


def run(server, name, folder, **options):
    """Do it in a process of its own, which may kill itself on the way; its exit code."""
    print(json.dumps([name, {"folder": str(folder), **options}]), file=server.stdin, flush=True)
    return int(server.stdout.readline())


def step_of(folder):
    """How far the state in a folder is, which must be whole; 0 if there is none."""
    file = folder / FILE
    return read_tensors(file, STATE)[1]["step"] if file.exists() else 0


def test_a_training_killed_twenty_times_ends_with_the_bytes_of_one_that_was_not(server, tmp_path):
    whole, cut, never = tmp_path / "whole", tmp_path / "cut", {"step": NEVER, "event": NEVER}
    assert run(server, "train", whole, **never) == 0
    total = step_of(whole)
    assert total == 24
    moments, steps = random.Random(0), [0]
    for _ in range(20):
        # from right where it takes up the work to four steps on, of which one is 5,000 to 8,000 events
        step = min(max(steps[-1], 1) + moments.randrange(4), total - 1)
        assert run(server, "train", cut, step=step, event=moments.randrange(1, 6000)) == -signal.SIGKILL
        steps.append(step_of(cut))
    assert steps == sorted(steps)
    assert len(set(steps)) > 5, f"it was killed where nothing happened: {steps}"
    assert run(server, "train", cut, **never) == 0
    assert (cut / FILE).read_bytes() == (whole / FILE).read_bytes()
    assert run(server, "train", cut, **never) == 0  # it is done: nothing changes
    assert (cut / FILE).read_bytes() == (whole / FILE).read_bytes()


def test_the_state_is_whole_at_whatever_step_of_its_writing_the_process_is_killed(server, tmp_path):
    found, code = [], None
    while code != 0:
        folder = tmp_path / str(len(found))
        code = run(server, "write", folder, event=len(found) + 1)
        assert code in (0, -signal.SIGKILL)
        found.append(step_of(folder))
    assert len(found) > 20
    assert set(found) == {1, 2}
    left = [folder for folder in tmp_path.iterdir() if list(folder.glob(".unfinished*"))]
    assert left
    assert run(server, "write", left[0], event=NEVER) == 0  # it goes on there
    assert sorted(os.listdir(left[0])) == ["training.lock", FILE]
