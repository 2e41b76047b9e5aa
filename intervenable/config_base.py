"""What the two records of a configuration have in common: how they are made, checked, compared and written."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticSerializationError
from torch import Tensor

from intervenable.errors import (
    ConfigError,
    Fault,
    IntervenableWarning,
    RenamedWarning,
    UnknownNameError,
    raise_all,
    unknown_name,
)
from interventions import Intervention


class SeveralFaultsError(ValueError):
    """Faults found together (inside validators, where pydantic wants one ValueError)."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)


def _faults_in(error: ValidationError, fields: Iterable[str]) -> list[Fault]:
    """Pydantic's findings as errors of ours."""
    faults: list[Fault] = []
    for found in error.errors():
        cause = found.get("ctx", {}).get("error")
        if isinstance(cause, SeveralFaultsError):
            faults.extend(cause.faults)
        elif isinstance(cause, ConfigError):
            faults.append(cause)
        elif found["type"] == "extra_forbidden":
            faults.append(UnknownNameError(unknown_name("field", found["loc"][-1], fields)))
        else:
            place = ".".join(map(str, found["loc"]))
            faults.append(ConfigError(f"{place}: {found['msg']}." if place else f"{found['msg']}."))
    return faults


def _user_level() -> int:
    """The `stacklevel` for which a warning points at the code that uses this library."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].split(".")[0] in (
        "intervenable",
        "pydantic",
    ):
        level, frame = level + 1, frame.f_back
    return level


class Declared(BaseModel):
    """Fields by position, old names, faults reported all at once, and errors of our own."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    POSITIONAL: ClassVar[tuple[str, ...]] = ()
    RENAMED: ClassVar[Mapping[str, str]] = {}
    IGNORED: ClassVar[Mapping[str, str]] = {}

    def __init__(self, *args: Any, **fields: Any) -> None:
        named = self._by_name(args, fields)
        try:
            super().__init__(**named)
        except ValidationError as error:
            faults = _faults_in(error, type(self).model_fields)
            wrong = {found["loc"][0] for found in error.errors() if found["loc"]}
            if wrong:  # pydantic has not come to what concerns several fields
                known = self._defaults() | named
                faults += self._faults_between({name: known[name] for name in known.keys() - wrong})
            raise_all(faults)

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {
            name: field.get_default(call_default_factory=True)
            for name, field in cls.model_fields.items()
            if not field.is_required()
        }

    @classmethod
    def _by_name(cls, args: tuple[Any, ...], fields: Mapping[str, Any]) -> dict[str, Any]:
        """All fields under the names they have now."""
        if len(args) > len(cls.POSITIONAL):
            raise ConfigError(
                f"{cls.__name__} takes at most {len(cls.POSITIONAL)} positional fields"
                f" ({', '.join(cls.POSITIONAL)}), not {len(args)}."
            )
        named = dict(fields)
        for old, new in cls.RENAMED.items():
            if old in named:
                warnings.warn(
                    f"{cls.__name__}: {old!r} is now called {new!r}.",
                    RenamedWarning,
                    stacklevel=_user_level(),
                )
                if new in named:
                    raise ConfigError(
                        f"Both {old!r} and its new name {new!r} were given; give one of the two."
                    )
                named[new] = named.pop(old)
        for name, reason in cls.IGNORED.items():
            if name in named:
                warnings.warn(
                    f"{cls.__name__}: {name!r} has no effect: {reason}",
                    IntervenableWarning,
                    stacklevel=_user_level(),
                )
                del named[name]
        placed = dict(zip(cls.POSITIONAL, args, strict=False))
        twice = sorted(placed.keys() & named.keys())
        if twice:
            raise ConfigError(f"{cls.__name__} was given {', '.join(twice)} both by position and by name.")
        return {**placed, **named}

    @model_validator(mode="after")
    def _check_between(self) -> Self:
        faults = list(self._faults_between({name: getattr(self, name) for name in type(self).model_fields}))
        if faults:
            raise SeveralFaultsError(faults)
        return self

    @classmethod
    def _faults_between(cls, fields: Mapping[str, Any]) -> Iterable[ConfigError]:
        """What is wrong between fields, each of which is right by itself; fields that are wrong are missing."""
        return ()

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        """Make one of a mapping of its fields.

        Raises:
            ConfigError: with every fault found.
        """
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            raise_all(_faults_in(error, cls.model_fields))
            raise

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Self:
        """Make one of what `model_dump_json` wrote.

        Raises:
            ConfigError: with every fault found.
        """
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:
            raise_all(_faults_in(error, cls.model_fields))
            raise

    def model_dump_json(self, **options: Any) -> str:
        """Write it as JSON: classes and functions by their registered names, tensors as numbers.

        Raises:
            ConfigError: something that JSON cannot hold.
        """
        try:
            return super().model_dump_json(**options)
        except PydanticSerializationError:
            self._raise_what_json_lacks()
            raise

    def _raise_what_json_lacks(self) -> None:
        try:
            self.model_dump(mode="json")
        except PydanticSerializationError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ConfigError):
                cause = cause.__cause__
            if cause is not None:
                raise cause from None

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """What differs from the defaults."""
        for name, value in self.__dict__.items():
            if not _same(value, type(self).model_fields[name].get_default(call_default_factory=True)):
                yield name, value

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return all(_same(getattr(self, name), getattr(other, name)) for name in type(self).model_fields)


def _same(left: object, right: object) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        if left.dtype != right.dtype or left.shape != right.shape:
            return False
        return bool(((left == right) | (left.isnan() & right.isnan())).all())
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        return False
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, Intervention) and isinstance(right, Intervention):
        return left is right or (
            type(left) is type(right) and not left.state_dict() and left.to_config() == right.to_config()
        )
    return bool(left == right)
