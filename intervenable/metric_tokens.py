"""What metrics are asked for with: positions, and tokens by id or by text."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from intervenable.errors import ConfigError, listing


@dataclass(frozen=True)
class MetricArguments:
    """Reads what a metric is asked for with."""

    name: str
    """Of the metric, for messages."""

    tokenizer: Any
    """Reads strings."""

    def common(self, position: Any, reduce: Any) -> dict[str, Any]:
        """Position and reduction.

        Raises:
            ConfigError: they make no sense.
        """
        if reduce not in ("mean", "none"):
            raise ConfigError(f"reduce={reduce!r} of {self.name}. Allowed: 'mean', 'none'.")
        read = _whole(position)
        if read is None or read == ():
            raise ConfigError(
                f"position={position!r} of {self.name}. Give an int that counts real tokens (-1 is the last), or a"
                " list with one for each example."
            )
        return {"position": read, "reduce": reduce}

    def tokens(self, **given: Any) -> dict[str, Any]:
        """Ids of tokens by the name of the argument: one, or a tuple of them.

        Raises:
            ConfigError: one is missing, or is no token; all faults at once.
        """
        wanted = " and ".join(given)
        if self.tokenizer is not None and not hasattr(self.tokenizer, "encode"):
            raise ConfigError(
                f"The first argument of {self.name} is the tokenizer, and not {self.tokenizer!r:.60}. Without one,"
                f" for ids, give None: {self.name}(None, {', '.join('7' for _ in given)})."
            )
        missing = [name for name, tokens in given.items() if tokens is None]
        if missing:
            raise ConfigError(f"{self.name} needs {wanted}; {' and '.join(missing)} was not given.")
        faults: list[str] = []
        ids = {name: self._ids(name, tokens, faults) for name, tokens in given.items()}
        if faults:
            raise ConfigError(faults[0] if len(faults) == 1 else listing(faults, self.name), faults)
        return ids

    def _ids(self, argument: str, tokens: Any, faults: list[str]) -> int | tuple[int, ...]:
        given = tokens.tolist() if hasattr(tokens, "tolist") else tokens  # of torch and of numpy
        if not isinstance(given, (list, tuple)):
            return self._id(argument, given, faults)
        if not given:
            faults.append(f"{argument}={tokens!r} of {self.name} has no tokens. Give at least one.")
        return tuple(self._id(argument, token, faults) for token in given)

    def _id(self, argument: str, token: Any, faults: list[str]) -> int:
        if not isinstance(token, str):
            whole = _whole(token)
            if isinstance(whole, int) and whole >= 0:
                return whole
            faults.append(
                f"{argument}={token!r} of {self.name} is no token: give an id (0 or more) or a string."
            )
            return 0
        if self.tokenizer is None:
            faults.append(
                f"{argument}={token!r} of {self.name} is a string, and there is no tokenizer to read it. Give one:"
                f" {self.name}(tokenizer, {token!r}), or the id."
            )
            return 0
        ids = _encoded(self.tokenizer, token)
        fault = _fault_of(self.tokenizer, token, ids)
        if fault is not None:
            faults.append(f"{argument}={token!r} of {self.name} {fault}")
        return ids[0] if ids else 0


def _whole(given: Any) -> int | tuple[int, ...] | None:
    """An int or several; None if it is something else."""
    if isinstance(given, (bool, str)):
        return None
    if isinstance(given, (list, tuple)) or (hasattr(given, "tolist") and getattr(given, "ndim", 0) == 1):
        each = [_whole(one) for one in given]
        found = tuple(one for one in each if isinstance(one, int))
        return found if len(found) == len(each) else None
    try:
        return operator.index(given)
    except TypeError:
        return None


def _encoded(tokenizer: Any, text: str) -> list[int]:
    encoding = tokenizer.encode(text, add_special_tokens=False)
    return list(getattr(encoding, "ids", encoding))


def _fault_of(tokenizer: Any, text: str, ids: Sequence[int]) -> str | None:
    """Why a string is not one token, and what would be; None if it is one."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if len(ids) == 1:
        if ids[0] != unknown or text == getattr(tokenizer, "unk_token", None):
            return None
        return (
            "is not in the vocabulary: the tokenizer reads it as its unknown token. Give another, or an id."
        )
    if not ids:
        return "is no token: the tokenizer makes nothing of it. Give another, or an id."
    pieces = ", ".join(repr(tokenizer.decode([one])) for one in ids)
    other = text[1:] if text.startswith(" ") else f" {text}"
    as_other = _encoded(tokenizer, other)
    if len(as_other) == 1 and as_other[0] != unknown:
        hint = f"{other!r}, {'without' if text.startswith(' ') else 'with'} a leading space, is one."
    else:
        hint = "Give one of them, or an id."
    return f"is {len(ids)} tokens and not one: {pieces}. {hint}"
