"""What the `forward` of a model takes, read once for each class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn

from intervenable.unwrapping import unwrapped

TORCH_TRANSFORMERS = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerDecoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.MultiheadAttention,
)


def takes(model: nn.Module, name: str) -> bool:
    """Whether a model's `forward` has a parameter of this name."""
    return name in forward_signature(model).parameters


def counts_time_first(model: nn.Module) -> bool:
    """Whether the tensors given to a model have positions on their first axis and examples on the second.

    So it is in torch's recurrent nets and transformers unless they were made with `batch_first`.
    """
    inside = unwrapped(model).module
    if isinstance(inside, nn.RNNBase):
        return not inside.batch_first
    if not isinstance(inside, TORCH_TRANSFORMERS):
        return False
    attentions = (part for part in inside.modules() if isinstance(part, nn.MultiheadAttention))
    return any(not part.batch_first for part in attentions)


class Signature(inspect.Signature):
    """A signature that is compared by identity, which makes it a cheap key."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def forward_signature(model: nn.Module) -> Signature:
    """The signature of a model's `forward`, read once for each class; a wrapper takes what the model inside does."""
    inside = unwrapped(model).module
    if inside is model:
        return _own_signature(model)
    return _through(_own_signature(model), _own_signature(inside))


@lru_cache(maxsize=256)
def _through(wrapper: Signature, inside: Signature) -> Signature:
    """What can be given to a wrapper that hands on to the module inside whatever it does not name itself."""
    own = wrapper.parameters
    kinds = {parameter.kind for parameter in own.values()}
    if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        return inside
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        return wrapper
    handed_on = [
        parameter.replace(kind=parameter.KEYWORD_ONLY)
        for name, parameter in inside.parameters.items()
        if name not in own and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    named = [parameter for parameter in own.values() if parameter.kind is not parameter.VAR_KEYWORD]
    rest = [parameter for parameter in own.values() if parameter.kind is parameter.VAR_KEYWORD]
    return Signature([*named, *handed_on, *rest])


def _own_signature(model: nn.Module) -> Signature:
    function = getattr(model.forward, "__func__", None)
    # A `forward` put on the instance (accelerate's, for one) is read anew: another may come in its place.
    return _signature_of(model.forward) if function is None else _method_signature(function)


@lru_cache(maxsize=256)
def _method_signature(function: Callable[..., Any]) -> Signature:
    return _signature_of(function, skip=1)


def _signature_of(function: Callable[..., Any], skip: int = 0) -> Signature:
    return Signature(list(inspect.signature(function).parameters.values())[skip:])


@lru_cache(maxsize=256)
def misfit(signature: Signature, positional: int, keywords: tuple[str, ...]) -> str | None:
    """Why a call with so many positional and these keyword arguments does not fit; None if it does."""
    try:
        signature.bind(*range(positional), **dict.fromkeys(keywords))
    except TypeError as error:
        return str(error)
    return None
