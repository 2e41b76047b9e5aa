"""Patched runs written out, one example at a time: no padding, no batch, no map, and nothing of the engine.

Where a component is in a model and which columns are a head's are read off the models' own source code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("llama", "gpt2", "bloom")
"""Rotary with grouped heads, learned positions, and ALiBi, which has an axis for examples times heads."""

PLACES = {
    "llama": {
        "block_input": ("model.layers.{}", "input", 1),
        "block_output": ("model.layers.{}", "output", 1),
        "mlp_output": ("model.layers.{}.mlp", "output", 1),
        "attention_output": ("model.layers.{}.self_attn.o_proj", "output", 1),
        "head_attention_value_output": ("model.layers.{}.self_attn.o_proj", "input", 4),
        "head_query_output": ("model.layers.{}.self_attn.q_proj", "output", 4),
        "head_value_output": ("model.layers.{}.self_attn.v_proj", "output", 2),
    },
    "gpt2": {
        "block_input": ("transformer.h.{}", "input", 1),
        "block_output": ("transformer.h.{}", "output", 1),
        "mlp_output": ("transformer.h.{}.mlp", "output", 1),
        "attention_output": ("transformer.h.{}.attn.c_proj", "output", 1),
        "head_attention_value_output": ("transformer.h.{}.attn.c_proj", "input", 4),
    },
    "bloom": {
        "block_input": ("transformer.h.{}", "input", 1),
        "block_output": ("transformer.h.{}", "output", 1),
        "head_attention_value_output": ("transformer.h.{}.self_attention.dense", "input", 4),
    },
}
"""Family -> component -> path of a module, its side, and the number of heads in its columns."""

Change = Callable[[Tensor], Tensor]
Tokens = Iterable[tuple[int, int]]
"""Pairs: a token of the patched run, and the token of the other whose values it gets."""


@contextmanager
def changed(model: nn.Module, path: str, side: str, change: Change) -> Iterator[None]:
    """Replace what goes into or comes out of a module; `[1, s, d]`."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    module = model.get_submodule(path)
    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "input"
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def logits_with(
    model: nn.Module, inputs: dict[str, Any], changes: Sequence[tuple[str, str, Change]]
) -> Tensor:
    """`[b, s, V]` with changes at modules, the first named first."""
    if changes:
        (path, side, change), *rest = changes
        with changed(model, path, side, change):
            return logits_with(model, inputs, rest)
    with torch.no_grad():
        output = model(**inputs)
    logits: Tensor = output.logits
    return logits


def put(value: Tensor, heads: int, chosen: Sequence[int] | None, tokens: Tokens, new: Tensor) -> Tensor:
    """A copy of `[1, s, d]` with other values at some tokens in some heads' columns."""
    result = value.clone()
    width = value.shape[-1] // heads
    for here, there in tokens:
        for head in range(heads) if chosen is None else chosen:
            columns = slice(head * width, (head + 1) * width)
            result[0, here, columns] = new[0, there, columns]
    return result


@dataclass
class ByHand:
    """Patched runs of pairs of prompts, `[s]` token ids each."""

    model: nn.Module
    family: str
    base: Sequence[Tensor]
    """The prompts that are patched."""

    source: Sequence[Tensor]
    """Those that give the values."""

    always: Sequence[tuple[str, str, Change]] = ()
    """Changes that act in every run."""

    _seen: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)

    def seen(self, example: int, component: str, layer: int) -> Tensor:
        """`[1, s, d]` a component in the run that gives the values."""
        key = example, component, layer
        if key not in self._seen:
            path, side, _ = PLACES[self.family][component]

            def look(value: Tensor) -> Tensor:
                self._seen[key] = value.clone()
                return value

            inputs = {"input_ids": self.source[example][None]}
            logits_with(self.model, inputs, [*self.always, (path.format(layer), side, look)])
        return self._seen[key]

    def run(
        self,
        example: int,
        component: str,
        layers: Iterable[int] = (),
        tokens: Tokens | None = None,
        heads: Sequence[int] | None = None,
        values: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        """`[s, V]` the logits of one example.

        Args:
            example: Which.
            component: What is patched.
            layers: In which layers.
            tokens: Which tokens with which; all with their like by default.
            heads: Which heads; all by default.
            values: What to put in, of what is there `[1, s, d]` and the layer; by default the other run's values.
        """
        ids = self.base[example]
        pairs = [(j, j) for j in range(len(ids))] if tokens is None else list(tokens)
        changes = list(self.always)
        for layer in layers:
            path, side, count = PLACES[self.family][component]
            other = self.seen(example, component, layer) if values is None else None

            def change(
                value: Tensor, layer: int = layer, count: int = count, other: Tensor | None = other
            ) -> Tensor:
                new = values(value, layer) if values is not None else other
                assert new is not None
                return put(value, count, heads, pairs, new)

            changes.append((path.format(layer), side, change))
        return logits_with(self.model, {"input_ids": ids[None]}, changes)[0]

    def cell(self, component: str, layers: Iterable[int], tokens: Any = None, **options: Any) -> Tensor:
        """`[b, 2, V]` the logits of all examples at their second and their last token; `tokens` for each or for all.

        Where tokens are ints, each gets the value of its like, and those that an example has not are left out.
        """
        found = []
        for example, ids in enumerate(self.base):
            here = tokens[example] if isinstance(tokens, dict) else tokens
            if here is not None:
                pairs = [(j, j) if isinstance(j, int) else j for j in here]
                here = [(a, b) for a, b in pairs if a < len(ids)]
            found.append(self.run(example, component, list(layers), here, **options)[[1, -1]])
        return torch.stack(found)

    def plain(self) -> Tensor:
        """`[b, 2, V]` without a patch."""
        return self.cell("block_input", ())


def prompts(
    *lengths: int, seed: int = 0, like: Sequence[Tensor] | None = None, start: int = 0
) -> list[Tensor]:
    """Random prompts, `[s]` token ids each; from `start` on other ones than those of `like`."""
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randint(3, 72, (length,), generator=generator) for length in lengths]
    if like is not None:
        for ids, other in zip(found, like, strict=True):
            ids[:start] = other[:start]
            same = ids == other
            same[:start] = False
            ids[same] = (ids[same] - 2) % 69 + 3
    return found


def batch(rows: Sequence[Tensor], padding: str | None = None, length: int | None = None) -> dict[str, Tensor]:
    """Prompts as the inputs of a model, padded to the longest of them or to a length."""
    longest = length or max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        there = slice(longest - len(row), longest) if padding == "left" else slice(0, len(row))
        ids[number, there], mask[number, there] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def told(inputs: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    """A metric: `[b, 2, V]` all logits at the second and the last real token of each example."""
    places = [row.nonzero().flatten()[[1, -1]].tolist() for row in inputs["attention_mask"]]

    def metric(logits: Tensor) -> Tensor:
        last = logits.shape[1] - 1  # the other run may be shorter
        return torch.stack(
            [logits[example, [min(place, last) for place in at]] for example, at in enumerate(places)]
        )

    return metric


def near(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """That values are equal up to rounding, of the largest of them."""
    assert found.shape == expected.shape
    off = float((found - expected).abs().max()) / float(expected.abs().max())
    assert off < tolerance, f"off by {off:.1e} of the largest"


def grid(cell: Callable[..., Tensor], *axes: Iterable[Any]) -> Tensor:
    """`[sizes of axes, ...]` what a function gives for each combination of entries."""
    if not axes:
        return cell()
    first, *rest = axes
    return torch.stack([grid(lambda *more, entry=entry: cell(entry, *more), *rest) for entry in first])
