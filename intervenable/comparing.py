"""What a model answers when activations of one prompt are put into its run of another.

`compare_patched` is the workflow of activation patching: a run that gives values (`source`), a run that takes them
(`base`), and the second once more for each layer, patched. Everything is looked at where the answer begins, at the
last real token of each example.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from intervenable.config import IntervenableConfig, RepresentationConfig
from intervenable.errors import ConfigError, UnsupportedModelError
from intervenable.inputs import RunInputs, read_inputs
from intervenable.layer_lists import layers_with
from intervenable.model import IntervenableModel
from model_maps import ALIASES, COMPONENTS

Token = int | str
"""A token by its id, or by its text if there is a tokenizer."""


@dataclass(frozen=True, eq=False)
class PatchingComparison:
    """Logits of a source run, of a base run and of the base run patched, and how they compare.

    A pair of tokens is what the source says and what the base says; the logit difference of a run is the second less
    the first, `z[c] - z[s]`.

    Example:
        >>> one = torch.tensor([[2.0, 1.0]])
        >>> patched = torch.tensor([[[0.0, 3.0]]])
        >>> result = PatchingComparison(((4,),), one, one, patched, torch.tensor([[0, 1]]))
        >>> result.clean_difference, result.patched_difference, result.variation
        (tensor([-1.]), tensor([[3.]]), tensor([4.]))
    """

    layers: tuple[tuple[int, ...], ...]
    """For each patched run the layers that were patched in it."""

    source_logits: Tensor
    """`[b, V]` at the last token of the source."""

    clean_logits: Tensor
    """`[b, V]` at the last token of the base, unpatched."""

    patched_logits: Tensor
    """`[runs, b, V]` at the last token of the base, patched."""

    tokens: Tensor | None = None
    """`[b, 2]` the tokens of source and base whose logits are compared; None if none were given."""

    @property
    def clean_difference(self) -> Tensor:
        """`[b]` logit difference of the unpatched base."""
        return self._difference(self.clean_logits)

    @property
    def patched_difference(self) -> Tensor:
        """`[runs, b]` logit difference of the patched bases."""
        return self._difference(self.patched_logits)

    @property
    def variation(self) -> Tensor:
        """`[runs]` what patching adds to the logit difference, the mean over the examples."""
        return (self.patched_difference - self.clean_difference).mean(-1)

    @property
    def kl_source_clean(self) -> Tensor:
        """`KL(source || clean)`, the mean over the examples."""
        return _divergence(self.source_logits, self.clean_logits)

    @property
    def kl_source_patched(self) -> Tensor:
        """`[runs]` of `KL(source || patched)`, the mean over the examples."""
        return _divergence(self.source_logits, self.patched_logits)

    @property
    def kl_clean_patched(self) -> Tensor:
        """`[runs]` of `KL(clean || patched)`, the mean over the examples."""
        return _divergence(self.clean_logits, self.patched_logits)

    @property
    def kl_change(self) -> Tensor:
        """`[runs]` of `KL(source || patched) - KL(source || clean)`: below 0 where patching leads to the source."""
        return self.kl_source_patched - self.kl_source_clean

    def _difference(self, logits: Tensor) -> Tensor:
        if self.tokens is None:
            raise ConfigError(
                "Which logits? Give compare_patched the tokens: tokens=[(of the source, of the base)]."
            )
        index = self.tokens.to(logits.device).expand(*logits.shape[:-1], 2)
        source, base = logits.gather(-1, index).unbind(-1)
        return base - source

    def __str__(self) -> str:
        """A line for each patched run."""
        columns = {"KL(source||patched)": self.kl_source_patched, "change": self.kl_change}
        if self.tokens is not None:
            columns = {"variation": self.variation, **columns}
        head = "".join(f"{name:>20}" for name in columns)
        lines = [
            f"{', '.join(map(str, layers)):>12}"
            + "".join(f"{values[run]:>20.4f}" for values in columns.values())
            for run, layers in enumerate(self.layers)
        ]
        return "\n".join([f"{'layers':>12}{head}", *lines])


def compare_patched(
    model: nn.Module,
    base: Any,
    source: Any,
    component: str = "block_output",
    layers: int | Iterable[int | Iterable[int]] | Literal["all"] = (),
    positions: Any = None,
    tokens: Sequence[tuple[Token, Token]] | None = None,
    *,
    heads: Any = None,
    tokenizer: Any = None,
) -> PatchingComparison:
    """Run base and source, and the base once for each of `layers` with the source's activations in it.

    As everywhere here the source gives the values and the base is what is patched. No gradients are computed.

    Args:
        model: A model with logits `[b, s, V]`.
        base: Inputs of the run that is patched, batch and padding as usual.
        source: Inputs of the run that gives its activations, of as many examples.
        component: What is patched.
        layers: Layers for a patched run each; several together, `[(3, 4)]`, are patched in one run. Leave them out
            for a component outside the blocks.
        positions: Where, as in `RepresentationConfig.where`: an entry or a list, or a tuple `(source, base)` of them;
            for attention matrices a mapping of its levels. None for all.
        tokens: Pairs (token of the source, token of the base), one for all examples or one for each.
        heads: Which heads, for components by heads; None for all.
        tokenizer: For positions and tokens by name.

    Raises:
        ConfigError: layers, component or tokens that make no sense.
        UnsupportedModelError: the model has no such component, or no logits.
        InputError, LocationError: inputs or positions do not fit.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, lm = load_small_lm()
        >>> base = tokenizer("The capital of Spain is", return_tensors="pt")
        >>> source = tokenizer("The capital of Italy is", return_tensors="pt")
        >>> result = compare_patched(lm, base, source, "block_output", [0, 5], 3, [(" Rome", " Madrid")],
        ...                          tokenizer=tokenizer)
        >>> bool(result.variation[0] < result.variation[1])  # the country is read from its token in early layers
        True
    """
    runs = _runs(layers, component, model)
    examples = read_inputs(base, model, "base"), read_inputs(source, model, "source")
    pairs = None if tokens is None else _pairs(tokens, examples[0].batch, tokenizer)
    patched = [
        IntervenableModel(
            IntervenableConfig([_entry(component, layer, positions, heads) for layer in run or (None,)]),
            model,
            tokenizer,
        )
        for run in runs
    ]
    plain = IntervenableModel([], model)
    with torch.no_grad():
        source_logits = _last_logits(plain(source).intervened, examples[1], model)
        clean_logits = _last_logits(plain(base).intervened, examples[0], model)
        _check_vocabulary(pairs, clean_logits)
        found = [_last_logits(one(base, [source]).intervened, examples[0], model) for one in patched]
    return PatchingComparison(tuple(runs), source_logits, clean_logits, torch.stack(found), pairs)


def _runs(layers: Any, component: str, model: nn.Module) -> list[tuple[int, ...]]:
    """The layers of each patched run."""
    name = ALIASES.get(component, component)
    if isinstance(layers, str) and layers == "all":
        layers = layers_with(model, name)
    listed = list(layers) if hasattr(layers, "__iter__") else [layers]
    runs = [tuple(run) if hasattr(run, "__iter__") and not isinstance(run, str) else (run,) for run in listed]
    if not runs:
        if name in COMPONENTS and COMPONENTS[name].scope == "block":
            raise ConfigError(
                f"No layers were given to patch {component!r} in. Give at least one: layers=[3, 4]."
            )
        return [()]
    if any(not run for run in runs):
        raise ConfigError(f"layers={layers!r} has a run without layers. Give each at least one.")
    return runs


def _entry(component: str, layer: int | None, positions: Any, heads: Any) -> RepresentationConfig:
    known = COMPONENTS.get(ALIASES.get(component, component))
    axes = "stream" if known is None else known.axes
    unit = {"stream": "pos", "heads": "h.pos", "matrix": "h.query.key"}[axes]
    if heads is not None:
        if axes != "heads":
            raise ConfigError(
                f"heads={heads!r} makes no sense for {component!r}."
                + (
                    " Name the levels: positions={'heads': ..., 'queries': ..., 'keys': ...}."
                    * (axes == "matrix")
                )
            )
        sides = positions if isinstance(positions, tuple) else (positions,)
        levels = [{"heads": heads, **({} if side is None else {"positions": side})} for side in sides]
        positions = tuple(levels) if isinstance(positions, tuple) else levels[0]
    elif axes == "heads" and positions is not None:
        sides = positions if isinstance(positions, tuple) else (positions,)
        levels = [{"positions": side} for side in sides]
        positions = tuple(levels) if isinstance(positions, tuple) else levels[0]
    return RepresentationConfig(layer, component, unit, group_key="source", where=positions)


def _pairs(tokens: Sequence[Any], batch: int, tokenizer: Any) -> Tensor:
    """`[b, 2]` token ids."""
    paired = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in tokens)
    if not paired or len(tokens) not in (1, batch):
        raise ConfigError(
            f"tokens={tokens!r}: give pairs (token of the source, token of the base), one for all examples or one for"
            f" each of the {batch}."
        )
    ids = torch.tensor([[_token_id(token, tokenizer) for token in pair] for pair in tokens])
    return ids.expand(batch, 2)


def _token_id(token: Any, tokenizer: Any) -> int:
    if isinstance(token, int) and not isinstance(token, bool):
        return token
    if not isinstance(token, str):
        raise ConfigError(f"{token!r} is no token: give its id, or its text and the tokenizer.")
    encode = getattr(tokenizer, "encode", None)
    if encode is None:
        raise ConfigError(f"The token {token!r} is given by its text: give the tokenizer, or its id.")
    ids = encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise ConfigError(
            f"{token!r} is {len(ids)} tokens and not one. Give one of them, or ids; most words begin with a space."
        )
    return cast(int, ids[0])


def _check_vocabulary(pairs: Tensor | None, logits: Tensor) -> None:
    size = logits.shape[-1]
    if pairs is not None and not bool(((pairs >= 0) & (pairs < size)).all()):
        wrong = pairs[(pairs < 0) | (pairs >= size)].tolist()
        raise ConfigError(f"Token {wrong[0]} does not exist: the vocabulary has ids 0 to {size - 1}.")


def _last_logits(output: Any, inputs: RunInputs, model: nn.Module) -> Tensor:
    """`[b, V]` the logits at the last real token of each example, in a model of two stacks of the decoder's."""
    inputs = inputs.decoder or inputs
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3:
        raise UnsupportedModelError(
            f"{type(model).__name__} gives no logits [batch, positions, vocabulary] to compare. Use a language model."
        )
    if inputs.real_positions is None:
        return logits[:, -1].clone()
    last = torch.tensor([row[-1] for row in inputs.real_positions], device=logits.device)
    return logits[torch.arange(len(last), device=logits.device), last]


def _divergence(left: Tensor, right: Tensor) -> Tensor:
    """`KL(left || right)` of logits in float32, the mean over the examples."""
    p, q = left.float().log_softmax(-1), right.float().log_softmax(-1)
    # Tokens that cannot be said (logits of -inf) add nothing, where 0 * inf would be no number.
    terms = torch.where(p.exp() > 0, p.exp() * (p - q), torch.zeros_like(p - q))
    return terms.sum(-1).mean(-1)
