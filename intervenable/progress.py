"""How far a long computation is: a bar, a function of the user's, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from intervenable.errors import ConfigError

PATIENCE = 2.0
"""Seconds after which a bar is shown that nobody has asked for."""

Show = bool | Callable[[int, int], object] | None
"""Whether to show progress: yes, no, by a function of what is done and all there is, or None to see for oneself."""


class Progress:
    """Count what is done, and show it with rate and time left.

    Args:
        total: How much there is to do.
        show: True draws a bar on stderr, False nothing; a function is called with `(done, total)` after each step;
            None draws a bar if it takes longer than `PATIENCE` and stderr is a terminal.
        label: Stands before the bar.
        unit: What is counted.

    Raises:
        ConfigError: `show` is none of these.

    Example:
        >>> with Progress(3, lambda done, total: print(f"{done} of {total}")) as progress:
        ...     progress.advance(2)
        ...     progress.advance()
        2 of 3
        3 of 3
    """

    def __init__(self, total: int, show: Show = None, label: str = "", unit: str = " cells") -> None:
        if not (show is None or isinstance(show, bool) or callable(show)):
            raise ConfigError(f"progress={show!r} is none of True, False, None, a function of (done, total).")
        self.total = total
        self.done = 0
        self._report = show if callable(show) else None
        self._bar = None
        if show is True:
            self._bar = _bar(total, label, unit, delay=0.0)
        elif show is None and sys.stderr is not None and sys.stderr.isatty():
            self._bar = _bar(total, label, unit, delay=PATIENCE)

    def advance(self, count: int = 1, *, computed: bool = True, note: str = "") -> None:
        """So much more is done; not `computed` is what was done before and tells nothing about the rate.

        A bar has the note behind it: how good what was done is.
        """
        self.done += count
        if self._bar is not None and note:
            self._bar.set_postfix_str(note, refresh=False)
        if self._bar is not None and computed:
            self._bar.update(count)
        elif self._bar is not None:
            for counter in ("n", "initial", "last_print_n"):  # tqdm takes its rates from their differences
                setattr(self._bar, counter, getattr(self._bar, counter) + count)
        if self._report is not None:
            self._report(self.done, self.total)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bar(total: int, label: str, unit: str, delay: float) -> Any:
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        monitor_interval = 0  # no thread beside ours; `miniters` makes it needless

    return Bar(total=total, desc=label or None, unit=unit, delay=delay, miniters=1, file=sys.stderr)
