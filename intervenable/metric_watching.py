"""What a call of a metric looks at. The only file that knows which operations hide that a value is unknown.

Unknown logits are NaN. Sums, products and softmaxes of them are NaN again, and so is the metric's value; but a
comparison, an argmax, a `.item()` or a `.numpy()` turns them into something that nobody sees it in. A `Watch` sees it
happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from threading import RLock
from types import TracebackType
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

SWALLOWS = frozenset(
    {
        "nan_to_num",
        "nan_to_num_",
        "nansum",
        "nanmedian",
        "fmax",
        "fmin",
        "sign",
        "sign_",
        "sgn",
        "sgn_",
        "heaviside",
        "heaviside_",
        "threshold",
        "threshold_",
        "bernoulli",
        "bernoulli_",
        "histc",
        "gt_",
        "ge_",
        "lt_",
        "le_",
        "eq_",
        "ne_",
        "logical_not_",
        "logical_and_",
        "logical_or_",
        "logical_xor_",
    }
)
"""Operations whose results are of floating point and may be numbers where they are given NaN."""

MAKES = frozenset(
    {
        "empty_like",
        "zeros_like",
        "ones_like",
        "full_like",
        "rand_like",
        "randn_like",
        "randint_like",
        "new_empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty_strided",
    }
)
"""Operations that ask a tensor for its shape alone."""

LEAVES = frozenset(
    {
        "numpy",
        "tolist",
        "__array__",
        "__dlpack__",
        "data_ptr",
        "untyped_storage",
        "storage",
        "_typed_storage",
        "__reduce_ex__",
        "__deepcopy__",
    }
)
"""Ways out of torch, beyond which nothing is seen; some of them hand out the memory itself."""


COUNTS = frozenset({"nonzero", "unique_dim", "_unique2", "unique_consecutive"})
"""Operations the shape of whose result, which Python sees, depends on numbers."""

_ONE_AT_A_TIME = RLock()
"""Torch marks that operations are watched in the process, and not in the thread."""


class Watch:
    """Sees what is done in a `with` block, in this thread: whether anybody looks at numbers, and at unknown ones.

    Example:
        >>> import torch
        >>> logits = torch.tensor([1.0, 2.0, torch.nan])
        >>> with Watch() as watch:
        ...     answer = logits[0] > logits[1]
        >>> watch.looked, watch.unknown
        (True, False)
        >>> with watch:
        ...     answer = logits.argmax()
        >>> watch.unknown
        True
    """

    def __init__(self) -> None:
        self.unknown = False
        """Whether NaN became a truth, an index or a number of Python, so that the result says nothing."""

        self.depends = False
        """Whether what was done, and so what was read, may depend on numbers."""

        self.leaves = False
        """Whether something may hold or change the memory of a tensor without torch knowing."""

        self.looked = False
        """Whether numbers became truths, indices or numbers of Python."""

        self._decided = False
        self._modes = ExitStack()

    def __enter__(self) -> Watch:
        self._modes.enter_context(_ONE_AT_A_TIME)
        self._modes.enter_context(_Calls(self))
        self._modes.enter_context(_Operations(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._modes.close()

    def call(self, metric: Callable[[Tensor], Any], logits: Tensor) -> Any:
        """What a metric gives, watched."""
        with self:
            return metric(logits)

    def begins(self, given: Any) -> None:
        """Note that an operation is done with these."""
        # Once Python has seen a number it can do anything. Tensors of truths and indices can only choose numbers.
        self.depends = self.depends or self._decided or (self.looked and _is_a_choice(given))

    def looks(self, given: Any) -> None:
        """Note that somebody looks at these."""
        self.looked = True
        self.unknown = self.unknown or any(bool(tensor.isnan().any()) for tensor in _numbers(given))

    def decides(self, given: Any) -> None:
        """Note that Python is told of these."""
        self.looks(given)
        self._decided = True


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees each operation, whoever calls it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first operation imports the compiler, for a second or two

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = (args, kwargs or {})
        name = func.overloadpacket.__name__
        self._watch.begins(given)
        if name in SWALLOWS:  # some write over what they are given: look first
            self._watch.looks(given)
        result = func(*args, **(kwargs or {}))
        if name in MAKES or _is_of_numbers(result):
            return result
        if any(True for _ in _numbers(given)):
            self._watch.looks(given)
        if self._watch.looked and (name in COUNTS or not _is_of_tensors(result)):
            self._watch.decides(given)
        return result


class _Calls(TorchFunctionMode):
    """Sees each call of a function or method of torch: what leaves torch is no operation."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # .data has a count of changes of its own
            self._watch.leaves |= getattr(getattr(func, "__self__", None), "__name__", "") == "data"
        elif name in LEAVES:
            self._watch.leaves = True
            self._watch.decides((args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_of_numbers(result: Any) -> bool:
    """Whether a result is nothing but tensors of floating point: in those NaN shows."""
    return all(isinstance(part, Tensor) and _is_floating(part) for part in _parts(result))


def _is_of_tensors(result: Any) -> bool:
    return all(isinstance(part, Tensor) for part in _parts(result))


def _is_a_choice(given: Any) -> bool:
    """Whether there are tensors of floating point and others among arguments."""
    return len({_is_floating(part) for part in _parts(given) if isinstance(part, Tensor)}) > 1


def _numbers(given: Any) -> Iterator[Tensor]:
    """The tensors of floating point among arguments."""
    return (part for part in _parts(given) if isinstance(part, Tensor) and _is_floating(part))


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _parts(given: Any) -> Iterator[Any]:
    if isinstance(given, (tuple, list)):
        for part in given:
            yield from _parts(part)
    elif isinstance(given, Mapping):
        yield from _parts(list(given.values()))
    elif given is not None:
        yield given
