"""Let trainings take turns, a step each.

Each runs in a thread of its own, of which one works at a time: after every step of its optimizer it waits until the
others have taken theirs. So all of them see the same machine, slow or fast, however long they take, and a loop that
is somebody else's can be stopped in the middle.
"""

from __future__ import annotations

import gc
import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.das_contenders import Learned, Training


@dataclass
class Run:
    """One training, and how long its turns took."""

    learned: Learned
    seconds: list[float] = field(default_factory=list)
    """CPU seconds of each turn: up to the end of the first step, of each further step, and of what comes after."""


class _EndedError(Exception):
    """Ends a training because another one failed."""


class _Runner:
    """A training in a thread, which works only when it is told to."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._go, self._waits = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = False
        self.learned: Learned | None = None
        self.error: BaseException | None = None
        self.seconds: list[float] = []
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return self.learned is not None or self.error is not None

    def turn(self) -> None:
        """Let it work up to its next pause, and count the seconds."""
        begun = time.process_time()
        self._go.release()
        self._waits.acquire()
        self.seconds.append(time.process_time() - begun)

    def end(self) -> None:
        """Let it go no further."""
        if not self.done:
            self._ended = True
            self._go.release()
        self._thread.join()

    def _pause(self) -> None:
        self._waits.release()
        self._go.acquire()
        if self._ended:
            raise _EndedError

    def _work(self) -> None:
        torch.set_num_threads(1)  # each thread has a number of its own
        self._go.acquire()
        try:
            if not self._ended:
                self.learned = self._training(self._pause)
        except BaseException as error:
            self.error = error
        finally:
            self._waits.release()


def take_turns(trainings: Mapping[str, Training]) -> dict[str, Run]:
    """Run all trainings to their end; each time round another one begins.

    Raises:
        What one of them raises; the others are ended.
    """
    runners = {label: _Runner(training) for label, training in trainings.items()}
    gc.collect()
    gc.freeze()  # what was prepared is not searched for garbage again and again
    first = 0
    try:
        while active := [runner for runner in runners.values() if not runner.done]:
            first += 1
            for runner in active[first % len(active) :] + active[: first % len(active)]:
                runner.turn()
                if runner.error is not None:
                    raise runner.error
    finally:
        for runner in runners.values():
            runner.end()
        gc.unfreeze()
    return {label: Run(_known(runner.learned), runner.seconds) for label, runner in runners.items()}


def _known(learned: Learned | None) -> Learned:
    assert learned is not None
    return learned


def steady(seconds: Sequence[float], steps_per_epoch: int) -> list[float]:
    """The seconds of the steps after the first epoch, when nothing is new; without such, of all but the first."""
    steps = len(seconds) - 1
    begin = steps_per_epoch if steps > steps_per_epoch else 1
    return list(seconds[begin:steps])


def whole(seconds: Sequence[float], steps: int, steps_per_epoch: int) -> float:
    """The seconds of a training of so many steps, of which the last ones may not have been taken."""
    missing = steps - (len(seconds) - 1)
    return sum(seconds) + (missing * statistics.mean(steady(seconds, steps_per_epoch)) if missing else 0.0)
