"""Progress: a bar where it is asked for or of use, a function's calls, and else not a byte."""

from __future__ import annotations

import io
import sys
import threading
import time

import pytest

import intervenable as iv
from intervenable import progress as module
from intervenable.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def on_terminal(monkeypatch, stream=None):
    """A terminal for stderr; to be called in the test itself, since pytest sets stderr anew before."""
    stream = stream or Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def test_a_bar_that_was_asked_for_shows_label_count_unit_and_time(monkeypatch):
    stream = on_terminal(monkeypatch, io.StringIO())  # none, in fact
    with Progress(30, True, "layers") as progress:
        progress.advance(10)
        progress.advance(20)
    assert stream.getvalue().count("\n") == 1
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("layers: 100%")
    assert "30/30" in last
    assert "cells/s" in last


def test_no_bar_writes_nothing(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with Progress(3, False) as progress:
        progress.advance(3)
    assert terminal.getvalue() == ""


def test_what_is_over_soon_shows_nothing(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with Progress(3) as progress:
        progress.advance(3)
    assert terminal.getvalue() == ""


def test_what_lasts_shows_a_bar_on_a_terminal(monkeypatch):
    terminal = on_terminal(monkeypatch)
    monkeypatch.setattr(module, "PATIENCE", 0.15)
    with Progress(3) as progress:
        progress.advance(1)
        assert terminal.getvalue() == ""
        time.sleep(0.3)
        progress.advance(1)
        assert "2/3" in terminal.getvalue()
    assert terminal.getvalue().endswith("\n")


def test_what_lasts_shows_nothing_where_there_is_no_terminal(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.0)
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress(3) as progress:
            time.sleep(0.15)
            progress.advance(3)
        assert stream is None or stream.getvalue() == ""


def test_a_function_is_told_what_is_done_after_each_step(capfd):
    told = []
    with Progress(7, lambda *numbers: told.append(numbers)) as progress:
        for count in (3, 0, 4):
            progress.advance(count)
    assert told == [(3, 7), (3, 7), (7, 7)]
    assert capfd.readouterr() == ("", "")


def test_what_was_done_before_says_nothing_about_the_rate(monkeypatch):
    terminal = on_terminal(monkeypatch)
    with Progress(1_000_001, True) as progress:
        progress.advance(1_000_000, computed=False)
        time.sleep(0.3)
        progress.advance(1)
    last = terminal.getvalue().split("\r")[-1]
    assert "1000001/1000001" in last
    rate = last.rsplit(",", 1)[1]
    assert " cells/s" in rate or "s/ cells" in rate
    assert float(rate.split("cells")[0].strip(" s/")) < 1000


def test_a_bar_is_closed_whatever_is_raised(monkeypatch):
    terminal = on_terminal(monkeypatch)
    progress = Progress(3, True)

    def interrupted():
        with progress:
            progress.advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    ended = terminal.getvalue()
    assert ended.endswith("\n")
    assert "1/3" in ended
    progress.close()
    assert terminal.getvalue() == ended


def test_what_a_function_raises_comes_out():
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Progress(3, stop) as progress:
        progress.advance(1)


def test_no_thread_is_started(monkeypatch):
    on_terminal(monkeypatch)
    before = threading.active_count()
    with Progress(3, True) as progress:
        progress.advance(3)
        assert threading.active_count() == before


@pytest.mark.parametrize("show", ["yes", 1, 0.5])
def test_what_is_no_way_to_show_progress_is_refused(show):
    with pytest.raises(iv.ConfigError) as error:
        Progress(3, show)
    assert str(error.value) == f"progress={show!r} is none of True, False, None, a function of (done, total)."
