"""What a run is given: its inputs, its batch and its real tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import InputError, NotAvailableError, UnsupportedModelError
from intervenable.maps import map_of
from intervenable.media_tokens import media_tokens
from intervenable.signatures import Signature, counts_time_first, forward_signature, misfit
from intervenable.stack_lengths import (
    StackSize,
    is_of_towers,
    main_size,
    mask_in_tower,
    reads_codes,
    stack_size,
)
from intervenable.unwrapping import unwrapped, virtual_tokens
from model_maps import Stack, UnmappedModelError

TOKENS = ("input_ids", "inputs_embeds")
DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")
PER_TOKEN = (
    *TOKENS,
    "attention_mask",
    "position_ids",
    "token_type_ids",
    *DECODER_TOKENS,
    "decoder_attention_mask",
)
"""Inputs that say something of each token."""


@dataclass(frozen=True)
class RunInputs:
    """The inputs of one run, checked against the model, and what locations need to know of them."""

    args: tuple[Any, ...]
    """Positional inputs of the model."""

    kwargs: Mapping[str, Any]
    """Keyword inputs of the model."""

    given: object
    """What the caller gave, to tell whether two runs are the same."""

    batch: int
    """Number of examples."""

    length: int
    """Positions of the longest example, padding included."""

    attention_mask: Tensor | None
    """`[batch, length]`, nonzero at real tokens; None if every position is one."""

    input_ids: Tensor | None
    """`[batch, length]` token ids, if the model was given any."""

    time_first: bool = False
    """Whether the position axis of its tensors comes first (a torch recurrent net without `batch_first`)."""

    decoder: RunInputs | None = None
    """The same run, counted in the positions of its decoder; None if the model has none, or was given none."""

    model: nn.Module | None = field(default=None, repr=False, compare=False)
    """What runs; it tells how long its towers are, and which tokens stand for pictures."""

    groups: int = 1
    """How many times the model is given what is in the inputs, where it is given that several times in one batch."""

    def of(self, stack: Stack | None) -> RunInputs:
        """The same run, counted in the examples and positions of one stack of a model of several.

        Raises:
            InputError: the stack was given nothing, or pictures of different sizes on one axis.
        """
        if stack is None or stack == "encoder":
            return self
        if stack != "decoder":
            return self._in_tower(stack)
        if self.decoder is None:
            raise InputError(
                "The decoder is given nothing, so that it has no positions. Put decoder_input_ids into the inputs, or"
                " labels if the model makes them of those."
            )
        return self.decoder

    @cached_property
    def media(self) -> Mapping[str, tuple[int, ...]]:
        """The token ids that stand for pictures and sounds, by medium."""
        return {} if self.model is None else media_tokens(unwrapped(self.model).module)

    @cached_property
    def _towers(self) -> dict[Stack, RunInputs]:
        return {}

    def _in_tower(self, stack: Stack) -> RunInputs:
        """The same run, counted in the examples and positions of a tower; found out when it is first asked for."""
        if self.model is None or (stack == "text" and self.input_ids is not None):
            return self
        if stack not in self._towers:
            size = stack_size(self.model, stack, self.args, self.kwargs)
            if stack == "cross":  # keys of all pictures of an example lie behind each other
                size = StackSize(
                    self.batch // self.groups, size.batch * size.length * self.groups // self.batch
                )
            mask = mask_in_tower(self.kwargs, size, self.input_ids is not None)
            self._towers[stack] = replace(
                self,
                batch=size.batch * self.groups,
                length=size.length,
                attention_mask=None if self.groups > 1 else mask,
                input_ids=None,
                decoder=None,
            )
        return self._towers[stack]

    @cached_property
    def real_positions(self) -> list[list[int]] | None:
        """For each example the tensor indices of its real tokens, in order; None if all positions are real."""
        if self.attention_mask is None or bool(self.attention_mask.all()):
            return None
        return [row.nonzero().flatten().tolist() for row in self.attention_mask]

    @property
    def padded_left(self) -> bool:
        """Whether any example begins with padding."""
        real = self.real_positions
        return real is not None and any(row and row[0] > 0 for row in real)

    def count(self, example: int) -> int:
        """How many real tokens an example has."""
        return self.length if self.real_positions is None else len(self.real_positions[example])

    def same_as(self, other: RunInputs) -> bool:
        """Whether both runs would compute the same, so that one of them will do."""
        if self.given is other.given:
            return True
        if len(self.args) != len(other.args) or self.kwargs.keys() != other.kwargs.keys():
            return False
        pairs = [
            *zip(self.args, other.args, strict=True),
            *((v, other.kwargs[k]) for k, v in self.kwargs.items()),
        ]
        return all(_equal(left, right) for left, right in pairs)


def _equal(left: object, right: object) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (
            left.shape == right.shape
            and left.dtype == right.dtype
            and left.device == right.device
            and not left.requires_grad
            and not right.requires_grad
            and torch.equal(left, right)
        )
    return left is right or (isinstance(left, (bool, int, float, str)) and left == right)


def read_inputs(given: object, model: nn.Module, name: str) -> RunInputs:
    """Check what a run is given against what the model takes, and find its batch and its real tokens.

    Args:
        given: Keyword inputs as a mapping (a tokenizer's output), a tensor (the first input), or a tuple of inputs.
        model: The wrapped model.
        name: What to call it in messages: `base`, `source 0`.

    Raises:
        InputError: not a form of inputs, names the model does not take, or no input to read the batch from.
        UnsupportedModelError: the model has no weights yet.
    """
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(given, Mapping):
        kwargs = dict(given)
    elif isinstance(given, Tensor):
        args = (given,)
    elif isinstance(given, tuple):
        args = given
    else:
        raise InputError(
            f"{name} is a {type(given).__name__}. Give a mapping of the model's inputs (what the tokenizer returns"
            " with return_tensors='pt'), a tensor, or a tuple of tensors."
        )
    added = virtual_tokens(model)
    if added:
        raise UnsupportedModelError(
            f"{type(model).__name__} puts {added} virtual tokens before every prompt, so that positions would not be"
            f" those of {name}. Give the model inside, model.get_base_model(), or switch them off:"
            " with model.disable_adapter()."
        )
    signature = forward_signature(model)
    _check_names(args, kwargs, signature, model, name)
    main_name, main = _main_input(args, kwargs, signature, model, name)
    _check_values(main, model, name)
    time_first = counts_time_first(model) and main.dim() == 3
    batch, length = _batch_and_length(main, time_first, name)
    named = {**dict(zip(signature.parameters, args, strict=False)), **kwargs}
    ids = named.get("input_ids")
    if ids is None and args and not args[0].is_floating_point() and args[0].dim() == 2:
        ids = args[0]
    of_towers = any(is_of_towers(key) and isinstance(item, Tensor) for key, item in named.items())
    measured = main_size(main_name, model, args, kwargs) if of_towers or reads_codes(model) else None
    if measured is None:
        mask = _mask(named, "attention_mask", (batch, length), name)
    else:
        ids = ids if isinstance(ids, Tensor) and tuple(ids.shape) == measured else None
        batch, length = measured
        mask = mask_in_tower(named, measured, False)
    inputs = RunInputs(args, kwargs, given, batch, length, mask, ids, time_first, model=model)
    if "decoder_input_ids" not in signature.parameters:
        return inputs
    return replace(inputs, decoder=_decoder(inputs, named, model, name))


def _mask(named: Mapping[str, Any], key: str, shape: tuple[int, int], name: str) -> Tensor | None:
    """A mask that says which positions are real, if one was given."""
    mask = named.get(key)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    if mask.shape != shape:
        raise InputError(f"The {key} of {name} has shape {tuple(mask.shape)}, and its tokens {shape}.")
    return mask


def _decoder(inputs: RunInputs, named: Mapping[str, Any], model: nn.Module, name: str) -> RunInputs | None:
    """What the decoder of a model of two stacks is given, or makes of what the model is given."""
    tokens = next((named[key] for key in DECODER_TOKENS if named.get(key) is not None), None)
    ids = named.get("decoder_input_ids")
    if tokens is None:
        reads = _decoder_reads(model)
        tokens = None if reads is None else named.get(reads)
        if tokens is None:
            return None
    batch, length = tokens.shape[:2]
    if batch != inputs.batch:
        raise InputError(
            f"{name} gives the encoder {inputs.batch} examples and the decoder {batch}. Give both the same number."
        )
    mask = _mask(named, "decoder_attention_mask", (batch, length), name)
    return replace(inputs, length=length, attention_mask=mask, input_ids=ids)


def _decoder_reads(model: nn.Module) -> str | None:
    """The input of which a model makes its decoder's, where it is given none."""
    try:
        described = map_of(model)
    except UnmappedModelError:
        return "labels" if hasattr(model, "prepare_decoder_input_ids_from_labels") else None
    return described.decoder_reads


def _check_values(main: Tensor, model: nn.Module, name: str) -> None:
    if main.is_meta:
        raise InputError(f"{name} is on the meta device, where tensors have no values. Give real tensors.")
    weight = _first_weight(model)
    # Accelerate keeps the weights of an offloaded model there between runs.
    if (
        weight is not None
        and weight.is_meta
        and not any("_hf_hook" in vars(part) for part in model.modules())
    ):
        raise UnsupportedModelError(
            f"The weights of this {type(model).__name__} are on the meta device, where tensors have no values."
            " Load them first: from_pretrained(...), or to_empty(device='cpu') and load_state_dict(...)."
        )


def _first_weight(module: nn.Module) -> Tensor | None:
    """The first of a model's parameters, in a tenth of the time that `parameters()` takes to begin."""
    for weight in module._parameters.values():
        if weight is not None:
            return weight
    for part in module._modules.values():
        found = None if part is None else _first_weight(part)
        if found is not None:
            return found
    return None


def _check_names(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    signature: Signature,
    model: nn.Module,
    name: str,
) -> None:
    for key, value in kwargs.items():
        if key in PER_TOKEN and value is not None and not isinstance(value, Tensor):
            raise InputError(
                f"{key} of {name} is a {type(value).__name__}, not a tensor: tokenize with return_tensors='pt'."
            )
        if key == "input_ids" and value is not None and value.is_floating_point():
            raise InputError(
                f"input_ids of {name} are {value.dtype}; ids are whole numbers. Vectors go in as inputs_embeds."
            )
    check_spelling(kwargs, signature, model, name)
    fault = misfit(signature, len(args), tuple(kwargs))
    if fault is not None:
        parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        taken = ", ".join(p.name for p in parameters)
        raise InputError(
            f"{name} does not fit {type(model).__name__}, which takes: {taken}. ({fault.capitalize()}.)"
        )


def check_options(options: Mapping[str, Any], base: RunInputs, model: nn.Module) -> None:
    """That what is given to the model beside the base is what it takes, and is not in the base already.

    Raises:
        InputError: if it is not.
        NotAvailableError: pyvene's `intervention_additional_kwargs`, which models of transformers would swallow.
    """
    if "intervention_additional_kwargs" in options:
        raise NotAvailableError(
            "intervention_additional_kwargs is not available. Give an intervention what it needs when it is made, or"
            " set it as an attribute of model.interventions[name] before the call."
        )
    signature = forward_signature(model)
    named = [*list(signature.parameters)[: len(base.args)], *base.kwargs]
    twice = [key for key in options if key in named]
    if twice:
        raise InputError(f"{', '.join(twice)} was given in the base and beside it; give one of the two.")
    check_spelling(options, signature, model, "the call")
    fault = misfit(signature, len(base.args), (*base.kwargs, *options))
    if fault is not None:
        raise InputError(
            f"{type(model).__name__} does not take what was given beside the base, {', '.join(options)}."
            f" ({fault.capitalize()}.)"
        )


def check_spelling(given: Iterable[str], signature: Signature, model: nn.Module, where: str) -> None:
    """That no name is a slip of one the model has: those that take any keyword would not look at it.

    Raises:
        InputError: one is; the message has the name that the model has.
    """
    for key in given:
        near = None if key in signature.parameters else _nearly(key, tuple(signature.parameters))
        if near is not None:
            raise InputError(
                f"{where} has {key!r}, which {type(model).__name__} does not take. Did you mean {near!r}?"
            )


@lru_cache(maxsize=256)
def _nearly(key: str, names: tuple[str, ...]) -> str | None:
    return next(iter(get_close_matches(key, names, n=1, cutoff=0.85)), None)


def _main_input(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    signature: Signature,
    model: nn.Module,
    name: str,
) -> tuple[str, Tensor]:
    first = next(iter(signature.parameters), None)
    names = [getattr(unwrapped(model).module, "main_input_name", None), *TOKENS, first]
    # Of models that read pictures too tokens are the main input, whichever these models name.
    if any(key in kwargs for key in TOKENS):
        names = [*TOKENS, *names]
    candidates = [(key, kwargs[key]) for key in names if key is not None and key in kwargs]
    candidates += [(first or "", value) for value in args[:1]]
    for key, value in candidates:
        if isinstance(value, Tensor) and value.dim() >= 1:
            return key, value
    encoded = kwargs.get("encoder_outputs")
    if encoded is not None:  # the encoder's part is done: its positions are those of what it gave
        states = encoded.get("last_hidden_state") if isinstance(encoded, Mapping) else encoded[0]
        if isinstance(states, Tensor):
            return "encoder_outputs", states
    expected = " or ".join(dict.fromkeys(str(key) for key in names if key and key in signature.parameters))
    given = ", ".join(kwargs) or "nothing"
    raise InputError(f"{name} has no {expected}, which {type(model).__name__} needs. Given: {given}.")


def _batch_and_length(main: Tensor, time_first: bool, name: str) -> tuple[int, int]:
    if 0 in main.shape:
        raise InputError(
            f"The input of {name} has shape {tuple(main.shape)}: there is nothing in it to run. Give at least one"
            " example of at least one position."
        )
    if main.is_floating_point() and main.dim() == 2:  # [batch, features]: one position
        return main.shape[0], 1
    if main.dim() < 2:
        raise InputError(
            f"The input of {name} has shape {tuple(main.shape)}; a batch axis is needed (for one example, [1, ...])."
        )
    return (main.shape[1], main.shape[0]) if time_first else (main.shape[0], main.shape[1])
