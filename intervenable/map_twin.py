"""A tiny random model of the same structure as a given one, so that looking into a large model costs nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from intervenable.errors import InputError, IntervenableError, UnsupportedModelError
from intervenable.map_inputs import example_inputs
from intervenable.map_layers import block_signature, layers_shown
from intervenable.map_twin_config import small_config
from intervenable.map_twin_scale import settle
from intervenable.map_twin_shape import TwinShape
from intervenable.unwrapping import unwrapped

SHAPES = (
    TwinShape(),
    TwinShape(first_layers=True),
    TwinShape(stages=1),
    TwinShape(most_columns=2048),
    TwinShape(narrow=16),
    TwinShape(stated_fields_alone=True),
    TwinShape(window=64),
    TwinShape(even_stacks=True),
    TwinShape(heads_divide=True),
    TwinShape(most_columns=0),
    TwinShape(most_columns=0, stated_fields_alone=True),
    TwinShape(narrow=32, window=64, mlp=64, heads_divide=True),
)
"""What is tried, in this order."""

LARGEST = 16_000_000
"""A model of more parameters is no twin: a field that its config is known by has been missed."""

_TOO_LARGE = f"It would still have more than {LARGEST / 1e6:.0f} million parameters."


def twin_of(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A tiny random model of the same class and structure as a model of transformers, on the CPU in float32.

    It has as many heads and key-value heads as the model and every kind of its layers; heads are as wide where the
    config states their width apart from the hidden size, else narrower by a whole factor. Its weights are spread so
    that no path through it is lost in the others. The model is not run, and the state of random numbers stays.

    Args:
        model: The model, which may be on the meta device, quantised, or wrapped (compiled, with adapters).
        seed: Of the twin's weights.

    Raises:
        UnsupportedModelError: it has no config of transformers, or no small model made from it runs.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> with torch.device("meta"):
        ...     large = GPT2LMHeadModel(GPT2Config(n_embd=1600, n_head=25, n_layer=48))
        >>> twin = twin_of(large)
        >>> twin.config.n_head, twin.config.n_embd, twin.config.n_layer
        (25, 200, 3)
    """
    inner = unwrapped(model).module
    config = getattr(inner, "config", None)
    if not (hasattr(config, "to_dict") and hasattr(config, "model_type")):
        raise UnsupportedModelError(
            f"{type(inner).__name__} has no config of transformers, so no tiny model can be made like it."
            "\nIts map can still be found by running the model itself."
        )
    faults: list[Exception] = []
    incomplete: nn.Module | None = None
    with warnings.catch_warnings():
        # About small fields, or some that are going to be renamed.
        warnings.simplefilter("ignore")
        for shape in SHAPES:
            if incomplete is not None and not shape.first_layers:
                break
            try:
                twin = _twin(inner, config, shape, seed)
            except InputError as fault:  # of its signature, whatever its shape
                faults.append(fault)
                break
            except Exception as fault:
                faults.append(fault)
                continue
            if _has_all_kinds(twin, inner):
                return twin
            incomplete = incomplete or twin
    if incomplete is not None:
        return incomplete
    raise UnsupportedModelError(
        f"No tiny model like {type(inner).__name__} runs. {_one_line(faults[0])}"
        "\nIts map can still be found by running the model itself: pass example_inputs=, or register_map() one."
    ) from faults[0]


def _has_all_kinds(twin: nn.Module, model: nn.Module) -> bool:
    """Whether each block of the model is like one of the twin's."""
    for path, blocks in twin.named_modules():
        if isinstance(blocks, nn.ModuleList) and len(blocks) > 1:
            try:
                real = model.get_submodule(path)
            except AttributeError:
                continue
            if not {block_signature(block) for block in real.children()} <= {*map(block_signature, blocks)}:
                return False
    return True


def _twin(model: nn.Module, config: Any, shape: TwinShape, seed: int) -> nn.Module:
    small = small_config(config, shape, layers_shown(model, even=shape.even_stacks), _sections(model))
    cls: Any = type(model)
    usual = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.random.fork_rng(devices=[]), on_cpu(), torch.no_grad():
            torch.manual_seed(seed)
            with _SmallOnly():
                made: nn.Module = cls(small).eval().float().requires_grad_(False)
            if sum(parameter.numel() for parameter in made.parameters()) > LARGEST:
                raise UnsupportedModelError(_TOO_LARGE)
            spread_weights(made, seed)
            inputs = example_inputs(made)
            try:
                output = settle(made, lambda: made(**inputs))
            except Exception:
                if not _can_pad(made):
                    raise
                output = settle(made, lambda: made(**inputs))
            for value in _floats(output):
                if not torch.isfinite(value[..., :FIRST_IDS]).all():
                    raise UnsupportedModelError("What it returns is not finite.")
    finally:
        torch.set_default_dtype(usual)
    return made


def on_cpu() -> AbstractContextManager[object]:
    """Have new tensors on the CPU, whatever device the caller has asked them to be on."""
    usual = torch.get_default_device().type == "cpu"  # each function takes longer where a device is asked for
    return nullcontext() if usual else torch.device("cpu")


class _SmallOnly(TorchFunctionMode):
    """Lets no model be made that is no twin, before it fills the memory."""

    def __init__(self) -> None:
        super().__init__()
        self._entries = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func in _MAKING:
            self._entries += made.numel()
            if self._entries > 2 * LARGEST:  # tables that are no parameters are among them
                raise UnsupportedModelError(_TOO_LARGE)
        return made


_MAKING = (torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn)


def _sections(model: nn.Module) -> list[int] | None:
    """How the model shares its rotation out among axes of positions, as its modules keep it."""
    kept = (getattr(module, "mrope_section", None) for module in model.modules())
    return next((list(sections) for sections in kept if isinstance(sections, (list, tuple))), None)


def _can_pad(model: nn.Module) -> bool:
    """Name a token for padding if none is, as a classifier of several texts looks for one; whether none was."""
    config: Any = model.config
    text = config.get_text_config()
    if getattr(text, "pad_token_id", None) is not None:
        return False
    text.pad_token_id = config.pad_token_id = 0  # none of the tokens that are made up
    return True


FIRST_IDS = 100
"""Logits of special tokens, which come after, are -inf in some models."""


def _floats(output: Any) -> Iterator[Tensor]:
    first = output.get("logits", next(iter(output.values()), None)) if isinstance(output, Mapping) else output
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    if isinstance(first, Tensor) and first.is_floating_point():
        yield first


def _one_line(fault: Exception) -> str:
    text = " ".join(str(fault).split())
    return text if isinstance(fault, IntervenableError) else f"{type(fault).__name__}: {text[:300]}"


def spread_weights(model: nn.Module, seed: int = 0) -> None:
    """Give every parameter a spread that makes all paths count: the usual deviation of 0.02 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.is_floating_point():
                _spread(parameter, name, generator)
        for module in model.modules():
            _spread_choices(module, generator)


def _spread_choices(module: nn.Module, generator: torch.Generator) -> None:
    """Fill a table of the experts of each token, which a checkpoint brings, with different ones."""
    experts = getattr(module, "num_experts", None)
    for table in module.buffers(recurse=False):
        whole = table.dim() == 2 and not table.is_floating_point() and not table.any()
        if isinstance(experts, int) and whole and table.shape[-1] <= experts:
            order = torch.rand(len(table), experts, generator=generator).argsort(-1)
            table.copy_(order[:, : table.shape[-1]])


def _spread(parameter: Tensor, name: str, generator: torch.Generator) -> None:
    leaf = name.rpartition(".")[2]

    def normal(deviation: float) -> Tensor:
        return torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator).to(parameter.dtype)

    if parameter.dim() >= 2 and leaf not in ("A_log", "conv_weight", "D"):
        if any(word in name for word in ("embed", "wte", "wpe", "word")):
            parameter.copy_(normal(1.0))
        elif parameter.dim() == 2:
            parameter.copy_(normal(1 / math.sqrt(parameter.shape[-1])))
        elif parameter.dim() == 3 and "conv" not in name:
            parameter.copy_(normal(1 / math.sqrt(max(parameter.shape[-2:]))))
        elif parameter.dim() == 4:  # of convolutions over images and spectra
            parameter.copy_(normal(1 / math.sqrt(parameter[0].numel())))
    elif parameter.dim() == 1:
        bias = leaf == "bias" or (leaf.endswith("_bias") and "dt" not in leaf and "correction" not in leaf)
        small = float(parameter.abs().max()) < 1e-3  # as the scale of a branch may be at first
        if bias or "norm" in name.lower() or "ln" in name or small:
            parameter.add_(normal(0.1))
        elif torch.equal(parameter, parameter[:1].expand_as(parameter)):
            parameter.mul_(1 + normal(0.1))  # a factor that is learned, and may not pass for a fixed one
