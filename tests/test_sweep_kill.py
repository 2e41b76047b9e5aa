"""Killed at any moment: no file is half written, and the sweep that goes on has the same bytes in the end."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from intervenable.sweep_checkpoints import WAVE
from intervenable.tensor_files import read_tensors

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")

# Imports once and forks a process for each line that it reads: one more costs milliseconds, not an import.
SERVER = """
import json, os, signal, sys, time, traceback

sys.path[:0] = sys.argv[1:]
import torch
import intervenable as iv
from intervenable.sweep_checkpoints import Checkpoints
from tiny_models import tiny

torch.set_num_threads(1)
MODEL = tiny("llama")


def write_wave(folder, die_at):
    with Checkpoints(folder, {"sweep": "of nothing"}, 2) as kept:
        events = 0

        def count(frame, event, function):  # before and after each call that may reach the disk
            nonlocal events
            place = getattr(function, "__module__", None) or type(getattr(function, "__self__", None)).__module__
            if event in ("c_call", "c_return") and place.split(".")[0] in ("posix", "io", "_io", "safetensors"):
                events += 1
                if events == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        kept.write(1, {"value": torch.arange(50_000.0)})


def sweep(folder, out, tell_at):
    calls = 0

    def metric(logits):
        nonlocal calls
        if calls == tell_at:
            os.write(telling, b".")
        calls += 1
        return logits[0, -1, 5] - logits[0, -1, 7]

    clean, corrupted = torch.arange(1, 25)[None], torch.arange(2, 26)[None]
    where = "head_attention_value_output", ("layer", "pos", "head")
    iv.patching.sweep(
        MODEL, clean, corrupted, *where, {"difference": metric}, checkpoint=folder, memory=60_000, progress=False
    ).save(out)


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


def waves_in(folder):
    """The bytes of all finished waves; each must be whole."""
    files = sorted(folder.glob("wave-*"))
    for file in files:
        read_tensors(file, WAVE)
    return {file.name: file.read_bytes() for file in files}


def test_a_wave_is_whole_or_not_there_at_whatever_step_of_its_writing_the_process_is_killed(server, tmp_path):
    assert run(server, "write_wave", folder=str(tmp_path / "whole"), die_at=0) == 0
    whole = waves_in(tmp_path / "whole")
    step, states = 0, []
    while True:
        step += 1
        folder = tmp_path / str(step)
        code = run(server, "write_wave", folder=str(folder), die_at=step)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        states.append(waves_in(folder))
        assert states[-1] in ({}, whole)
    assert step > 20
    assert {} in states
    assert whole in states
    left = [folder for folder in tmp_path.iterdir() if list(folder.glob(".unfinished*"))]
    assert left
    assert run(server, "write_wave", folder=str(left[0]), die_at=0) == 0  # it goes on there
    assert waves_in(left[0]) == whole
    assert sorted(os.listdir(left[0])) == ["sweep.json", "sweep.lock", *whole]


def test_a_sweep_killed_twenty_times_ends_with_the_bytes_of_one_that_was_not(server, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    never = 10**9
    for folder, out in ((whole, "whole"), (None, "plain")):
        options = {"folder": folder and str(folder), "out": str(tmp_path / f"{out}.safetensors")}
        assert run(server, "sweep", tell_at=never, **options) == 0
    finished = waves_in(whole)
    assert len(finished) > 40

    moments, seen, out = random.Random(0), {}, tmp_path / "cut.safetensors"
    counts = []
    for _ in range(20):
        tell_at, delay = moments.randrange(18), moments.uniform(0, 0.01)
        code = run(server, "sweep", delay, folder=str(cut), out=str(out), tell_at=tell_at)
        assert code == -signal.SIGKILL
        now = waves_in(cut)
        assert now.items() <= finished.items()
        assert now.items() >= seen.items()
        counts.append(len(now))
        seen = now
    assert len(set(counts)) > 5, f"it was killed where nothing happened: {counts}"
    assert len(seen) < len(finished)
    assert not out.exists()

    assert run(server, "sweep", folder=str(cut), out=str(out), tell_at=never) == 0
    assert waves_in(cut) == finished
    assert out.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert out.read_bytes() == (tmp_path / "plain.safetensors").read_bytes()
