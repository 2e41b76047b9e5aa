"""How many rows a wave may have: from what a row takes, and from what there may be."""

from __future__ import annotations

import re
from typing import Any

from intervenable.errors import ConfigError

DEFAULT = 10**9
"""Bytes that the rows of a wave may take if nothing is said."""

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}


def bytes_of(memory: Any) -> int:
    """A budget as users write it.

    Raises:
        ConfigError: not an amount of memory.

    Example:
        >>> bytes_of("2 GB"), bytes_of(1024), bytes_of("1.5MiB")
        (2000000000, 1024, 1572864)
    """
    if memory is None:
        return DEFAULT
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-zA-Z]*)\s*", memory) if isinstance(memory, str) else None
    if found and found[2].lower() in ("", *_UNITS) and found[1].count(".") < 2 and found[1] != ".":
        amount = float(found[1]) * _UNITS.get(found[2].lower(), 1)
    elif isinstance(memory, (int, float)) and not isinstance(memory, bool):
        amount = float(memory)
    else:
        raise ConfigError(f"memory={memory!r} is no amount. Give bytes, or text such as '500MB' or '2GB'.")
    if not amount >= 1:
        raise ConfigError(
            f"memory={memory!r} is no room at all. Give bytes, or text such as '500MB' or '2GB'."
        )
    return int(amount)
