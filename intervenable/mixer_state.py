"""The state that a mixer hands on to the next token: where models keep it, and how it is read.

A state space, a linear attention or a linear recurrence keeps one tensor of what it has read so far. Nothing hands it
over in a forward pass: it is put into the model's cache, or kept by the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.hooks import Hook, hooked
from intervenable.passage import Passage
from intervenable.signatures import takes


def state_after(passage: Passage, layer: int | None) -> Tensor | None:
    """The state that a mixer leaves behind, when it has run; None if it keeps none, or no cache was filled.

    Args:
        passage: The call of the mixer's module, with its output.
        layer: The block it is in, for modules that do not know their own number.

    Shape:
        result: as the model has it: `[b, channels, state]` (Mamba), `[b, heads, head_dim, state]` (Mamba 2),
            `[b, heads, key_dim, value_dim]` (linear attention), `[b, width]` (RG-LRU), `[b, width, 3]` (RWKV: the
            numerator, the denominator and the largest exponent).
    """
    numbers: list[Any] = [getattr(part, "layer_idx", None) for part in passage.module.modules()]
    number = next((one for one in numbers if isinstance(one, int)), layer)
    found = next((state for state in _kept_in_caches(passage, number) if state is not None), None)
    if found is None:
        parts = (getattr(part, "recurrent_states", None) for part in passage.module.modules())
        found = next((state for state in parts if isinstance(state, Tensor)), None)
    return _of_rwkv(passage) if found is None else found


def layers_with_state(
    model: nn.Module, inputs: Mapping[str, Any], mixers: Mapping[int, str]
) -> dict[int, tuple[int, ...]]:
    """The layers whose mixers keep a state, each with the shape of the state, found out by a run.

    Args:
        model: The model.
        inputs: Its keyword inputs.
        mixers: Layer -> path of its mixer's module.
    """
    shapes: dict[int, tuple[int, ...]] = {}

    def looking(layer: int) -> Any:
        def look(passage: Passage) -> None:
            state = state_after(passage, layer)
            if state is not None:
                shapes[layer] = tuple(state.shape)

        return look

    hooks = [Hook(model.get_submodule(path), "output", looking(layer)) for layer, path in mixers.items()]
    options = with_cache(model, inputs)
    with torch.no_grad(), hooked(hooks, model):
        model(**{**inputs, **options})
    return shapes


def with_cache(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options by which a run fills a cache, unless something else was said."""
    return {"use_cache": True} if takes(model, "use_cache") and "use_cache" not in given else {}


def _kept_in_caches(passage: Passage, layer: int | None) -> Iterator[Tensor | None]:
    """The state of a layer in each cache that a call was given."""
    for value in (*passage.args, *passage.kwargs.values()):
        layers: Any = getattr(value, "layers", None)
        if layer is None or isinstance(value, (Tensor, nn.Module)):
            continue
        if isinstance(layers, Sequence) and layer < len(layers):
            states = getattr(layers[layer], "recurrent_states", None)
            if isinstance(states, Mapping):
                yield next((state for state in states.values() if isinstance(state, Tensor)), None)
        linear: Any = getattr(value, "linear_cache", None)  # MiniMax has a list of its own
        if isinstance(linear, Sequence) and layer < len(linear) and isinstance(linear[layer], Tensor):
            yield linear[layer]


def _of_rwkv(passage: Passage) -> Tensor | None:
    """What RWKV hands over beside its output: five tensors of all layers, of which three are the state."""
    output, number = passage.output, getattr(passage.module, "layer_id", None)
    states = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if number is None or not isinstance(states, list) or len(states) != 5:
        return None
    return torch.stack([state[:, :, number] for state in states[2:]], -1)
