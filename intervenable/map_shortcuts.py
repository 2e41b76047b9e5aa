"""What a model lets a run leave out: the blocks below a layer, the tokens before a position.

Sweeps and training try this for themselves before they use it (`wave_learning.py`, `training_suffix.py`); here it is
said of a model as a whole, beside the laws of its components.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from intervenable.errors import IntervenableError
from intervenable.hooks import Hook, hooked, stubbed
from intervenable.map_laws import deviation, limit_of
from intervenable.map_laws_examples import main_tensor
from intervenable.map_layers import blocks_at
from intervenable.passage import Passage
from intervenable.signatures import takes
from model_maps import ModelMap

START = "start at a layer"
SUFFIX = "leave earlier tokens out"


def shortcuts_of(model: nn.Module, model_map: ModelMap, inputs: Mapping[str, Any]) -> dict[str, str]:
    """What a run of a model can leave out, and how exactly.

    Args:
        model: The model, in evaluation mode.
        model_map: Its map, for its blocks.
        inputs: Keyword inputs.

    Returns:
        Shortcut -> "bit for bit", or how far the outputs are apart, or why it cannot be taken.
    """
    found = {}
    with torch.no_grad():
        for name, compared in ((START, _start), (SUFFIX, _suffix)):
            try:
                pair = compared(model, model_map, inputs)
            except (
                IntervenableError,
                RuntimeError,
                TypeError,
                ValueError,
                IndexError,
                AttributeError,
            ) as error:
                found[name] = (
                    f"not here: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
                )
                continue
            found[name] = pair if isinstance(pair, str) else _said(*pair)
    return found


def _said(found: Tensor, expected: Tensor) -> str:
    if torch.equal(found, expected):
        return "bit for bit"
    off, limit = deviation(found, expected), limit_of(expected.dtype)
    return f"off by {off:.1e} of the largest" + (
        "" if off <= limit else f", more than the {limit:.0e} of rounding"
    )


def _blocks(model: nn.Module, model_map: ModelMap) -> list[nn.Module]:
    path = model_map.blocks or model_map.stacks.get("decoder") or ""
    return blocks_at(model, path) if path else []


def _start(model: nn.Module, model_map: ModelMap, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | str:
    """The output with the lower half of the blocks handing over what they returned before, and the plain one."""
    blocks = _blocks(model, model_map)
    below = blocks[: len(blocks) // 2]
    if not below:
        return "not here: it has no list of blocks"
    options = {"use_cache": False} if takes(model, "use_cache") else {}
    returned: dict[nn.Module, list[Any]] = {block: [] for block in below}

    def keep(block: nn.Module) -> Callable[[Passage], None]:
        return lambda passage: returned[block].append(passage.output)

    with hooked([Hook(block, "output", keep(block)) for block in below], model):
        plain = main_tensor(model(**inputs, **options)).clone()
    if any(len(values) != 1 for values in returned.values()):
        return "not here: its blocks run more than once, or not at all"

    def handing(block: nn.Module) -> Callable[..., Any]:
        return lambda *args, **kwargs: returned[block][0]

    with stubbed({block: handing(block) for block in below}):
        return main_tensor(model(**inputs, **options)), plain


def _suffix(model: nn.Module, model_map: ModelMap, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | str:
    """The output at the last tokens, computed on the keys and values of the first, and in a whole run."""
    tokens = inputs.get("input_ids")
    if not isinstance(tokens, Tensor) or tokens.shape[1] < 2 or not takes(model, "past_key_values"):
        return "not here: it keeps nothing of earlier tokens"
    if not model_map.causal or model_map.stacks.get("decoder"):
        return "not here: what a token is depends on later ones, or on another stack"
    start = tokens.shape[1] // 2
    ones = torch.ones_like(tokens)
    masks = {"attention_mask": ones} if takes(model, "attention_mask") else {}
    plain = main_tensor(model(input_ids=tokens, **masks, use_cache=False))
    first = model(input_ids=tokens[:, :start], **dict.fromkeys(masks, ones[:, :start]), use_cache=True)
    cache = getattr(first, "past_key_values", None)
    if cache is None:
        return "not here: it keeps nothing of earlier tokens"
    rest = model(input_ids=tokens[:, start:], **masks, past_key_values=cache, use_cache=True)
    return main_tensor(rest), plain[:, start:]
