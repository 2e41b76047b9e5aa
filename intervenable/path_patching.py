"""Direct paths between heads: what one head adds to the stream, read by one later head alone.

To patch the path from head A into a later head B takes two runs of the corrupted prompt. In the first A has its
clean value and every other head and MLP is held at its corrupted one, so that what A adds is all that changes in the
stream: there B's query (key, value) is recorded, computed by the model's own norm and projection. In the second B has
that query, and everything behind B follows. The second is a sweep over all heads B.

Wang et al. (2022), "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2 small",
https://arxiv.org/abs/2211.00593; Goldowsky-Dill et al. (2023), "Localizing Model Behavior with Path Patching",
https://arxiv.org/abs/2304.05969.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from intervenable.binding import Places
from intervenable.cache import ActivationCache
from intervenable.cache_layout import POSITION
from intervenable.collecting import collect
from intervenable.config import RepresentationConfig
from intervenable.errors import (
    ConfigError,
    InputError,
    LayerRangeError,
    LocationRangeError,
    UnknownNameError,
    UnsupportedModelError,
    unknown_name,
)
from intervenable.map_layers import block_at
from intervenable.model import IntervenableModel
from intervenable.norms import centred, norm_scale
from intervenable.progress import Progress
from intervenable.sweeping import sweep
from interventions import VanillaIntervention
from model_maps import path_in_layer

Receiver = Literal["q", "k", "v"]
"""Which input of the receiving head is patched."""

Mode = Literal["exact", "linear"]
"""`"exact"`: the norm before the receiver is computed anew; `"linear"`: its divisor is that of the corrupted run."""

RECEIVERS: Mapping[str, str] = {
    "q": "head_query_output",
    "k": "head_key_output",
    "v": "head_value_output",
}
SENDER = "head_attention_value_output"
_READS = "attention_input"
_ADDED = ("attention_output", "mlp_output")
_STREAM = ("block_input", "block_output", "attention_contribution", "mlp_contribution")
_CLOSE = 1e-3
"""How far something may be from its formula, of the largest value."""


def get_act_patch_direct_path(
    model: nn.Module,
    corrupted_tokens: Any,
    clean_cache: Any,
    corrupted_cache: Any,
    patching_metric: Any,
    src_layer: int,
    src_head: int,
    component: Receiver = "q",
    verbose: bool = True,
    *,
    mode: Mode = "exact",
    **options: Any,
) -> Tensor:
    """Patch what one head adds to the stream into the query, key or value of each later head alone.

    The path is exact: every other head and MLP between the two is held at its corrupted value, the norm before the
    receiver is computed anew, and everything behind the receiver follows. Arguments are as in TransformerLens.

    Args:
        model: A model of one stack.
        corrupted_tokens: Inputs of the run that is patched: tokens, or a mapping of the model's inputs.
        clean_cache: Inputs of the clean run, or an `ActivationCache` with `head_attention_value_output` of the
            layer that sends.
        corrupted_cache: Not needed, as the corrupted run is made in any case; give None.
        patching_metric: What is measured, as in `sweep`.
        src_layer: Layer of the head that sends.
        src_head: That head.
        component: What of the receiving heads is patched: `"q"`, `"k"` or `"v"`.
        verbose: Whether a bar may be drawn.
        mode: `"linear"` keeps the divisor of the norm before the receiver at its corrupted value, so that what
            arrives is linear in what was sent: `q += (w * centred(d) / s) @ W_Q` with the norm's weight `w`, where
            `d` is what the sender adds more and centring is that of LayerNorm.
        **options: Further arguments of `sweep`: `memory`, `exact_check`, `tokenizer`.

    Shape:
        result: `[layers, heads]`, and the axes of the metric. Rows up to `src_layer` are NaN, as nothing there is
        reached. For keys and values heads are key-value heads, each of which serves its whole group of queries.

    Raises:
        LayerRangeError, LocationRangeError: no such sender.
        InputError: the clean run has other tokens or another padding.
        UnsupportedModelError: a model without such heads, or a norm that `mode="linear"` cannot take apart.

    Example:
        >>> from intervenable import load_small_lm, metrics
        >>> tokenizer, model = load_small_lm()
        >>> clean = tokenizer("The capital of Spain is", return_tensors="pt")
        >>> corrupted = tokenizer("The capital of Italy is", return_tensors="pt")
        >>> metric = metrics.logit_difference(tokenizer, " Madrid", " Rome")
        >>> result = get_act_patch_direct_path(model, corrupted, clean, None, metric, src_layer=4, src_head=0)
        >>> result.shape, result[:5].isnan().all().item(), result[5].isfinite().all().item()
        (torch.Size([6, 6]), True, True)
    """
    paths = _Paths(model, corrupted_tokens, clean_cache, component, mode)
    layer, head = paths.sender(src_layer, src_head)
    options.setdefault("progress", None if verbose else False)
    found = paths.from_head(layer, head, patching_metric, options)
    return paths.unreached() if found is None else found


def get_act_patch_direct_path_all_sources(
    model: nn.Module,
    corrupted_tokens: Any,
    clean_cache: Any,
    corrupted_cache: Any,
    patching_metric: Any,
    component: Receiver = "q",
    verbose: bool = True,
    *,
    mode: Mode = "exact",
    **options: Any,
) -> Tensor:
    """Patch the direct path from every head into every later one: `get_act_patch_direct_path` for all senders.

    Arguments are those of that function.

    Shape:
        result: `[layers, heads, layers, heads]`, and the axes of the metric: `result[l, h]` is that of the sender
        `(l, h)`; NaN where nothing is reached.

    Example:
        >>> from intervenable import load_small_lm
        >>> tokenizer, model = load_small_lm()
        >>> clean = tokenizer("The capital of Spain is", return_tensors="pt")
        >>> corrupted = tokenizer("The capital of Italy is", return_tensors="pt")
        >>> result = get_act_patch_direct_path_all_sources(model, corrupted, clean, None, lambda z: z[0, -1, 7])
        >>> result.shape, result[2, 0, :3].isnan().all().item()
        (torch.Size([6, 6, 6, 6]), True)
    """
    paths = _Paths(model, corrupted_tokens, clean_cache, component, mode)
    show = options.pop("progress", None if verbose else False)
    found: dict[tuple[int, int], Tensor] = {}
    with Progress(paths.layers * paths.heads, show, "direct paths", " heads") as bar:
        for layer in range(paths.layers):
            for head in range(paths.heads):
                one = paths.from_head(layer, head, patching_metric, {**options, "progress": False})
                if one is not None:
                    found[layer, head] = one
                bar.advance()
    nothing = torch.full_like(next(iter(found.values())), torch.nan) if found else paths.unreached()
    rows = [
        torch.stack([found.get((layer, head), nothing) for head in range(paths.heads)])
        for layer in range(paths.layers)
    ]
    return torch.stack(rows)


class _Paths:
    """The direct paths between the heads of one model, for one pair of prompts.

    What the corrupted run computes is read once, for all senders.
    """

    def __init__(self, model: nn.Module, corrupted: Any, clean: Any, component: str, mode: str) -> None:
        if component not in RECEIVERS:
            raise UnknownNameError(unknown_name("component", component, RECEIVERS, "of a receiving head"))
        if mode not in get_args(Mode):
            raise UnknownNameError(unknown_name("mode", mode, get_args(Mode)))
        if isinstance(model, IntervenableModel):
            raise ConfigError(
                "Direct paths are between the heads of a plain model: give the one that the IntervenableModel wraps."
            )
        places = Places(model)
        self.model, self.corrupted = model, corrupted
        self.receiver, self.mode = RECEIVERS[component], mode
        self.layers = places.layers_of(SENDER)
        there = places.layers_with(SENDER)
        if len(there) < self.layers:
            raise UnsupportedModelError(
                f"Direct paths go from heads of every layer, and {type(model).__name__} has heads in layers"
                f" {', '.join(map(str, there))} alone. Patch the heads by themselves: iv.patching.sweep."
            )
        self.heads = places.at(SENDER, 0).heads or 0
        self.receivers = places.at(self.receiver, 0).heads or 0
        self.blocks = places.map.blocks
        read = [*_ADDED, SENDER, *([_READS, *_STREAM] if mode == "linear" else [])]
        self.own = collect(model, corrupted, read, device=None)
        if mode == "linear":
            self._check_sums()
        self.clean = self._clean(clean)

    def _clean(self, clean: Any) -> ActivationCache:
        """The clean values of the heads that send, checked against the corrupted ones."""
        given = isinstance(clean, ActivationCache)
        cache: ActivationCache = clean if given else collect(self.model, clean, SENDER, device=None)
        for layer in range(self.layers) if not given else cache.require([SENDER]).layers_of(SENDER):
            value, own = cache[SENDER, layer], self.own[SENDER, layer]
            if value.shape[1:] != own.shape[1:] or value.shape[0] not in (1, own.shape[0]):
                raise InputError(
                    f"{SENDER} of layer {layer} is {tuple(value.shape)} in the clean run and {tuple(own.shape)} in"
                    " the corrupted one. Give prompts of one length, as many clean ones as corrupted ones or one."
                )
        tokens = cache.layouts[SENDER, cache.layers_of(SENDER)[0]].tokens.get(POSITION)
        there = self.own.layouts[SENDER, 0].tokens[POSITION].positions
        if tokens is not None and not torch.equal(tokens.positions.expand_as(there), there):
            raise InputError("The clean run is padded in another way than the corrupted one. Pad both alike.")
        return cache

    def sender(self, layer: int, head: int) -> tuple[int, int]:
        """A head that sends, counted from 0.

        Raises:
            LayerRangeError, LocationRangeError: there is none.
        """
        if not -self.layers <= layer < self.layers:
            raise LayerRangeError(
                f"src_layer={layer} is out of range: {type(self.model).__name__} has layers 0 to {self.layers - 1}."
            )
        if not -self.heads <= head < self.heads:
            raise LocationRangeError(
                f"src_head={head} is out of range: {type(self.model).__name__} has heads 0 to {self.heads - 1}."
            )
        return layer % self.layers, head % self.heads

    def unreached(self) -> Tensor:
        """The result of a sender that nothing reads."""
        return torch.full((self.layers, self.receivers), torch.nan)

    def from_head(self, layer: int, head: int, metric: Any, options: Mapping[str, Any]) -> Tensor | None:
        """`[layers, heads]` the metric with the path into each later head patched; None if there is no later head."""
        later = range(layer + 1, self.layers)
        if not later:
            return None
        received = (
            self._received(layer, head) if self.mode == "exact" else self._received_linearly(layer, head)
        )
        axes = ("layer", "head")
        values = sweep(
            self.model, received, self.corrupted, self.receiver, axes, metric, layers=list(later), **options
        ).values
        before = values.new_full((layer + 1, *values.shape[1:]), torch.nan)
        return torch.cat([before, values])

    # -- what receivers are given

    def _received(self, layer: int, head: int) -> ActivationCache:
        """What each later head would read if this one alone had its clean value."""
        value = self.clean.require([(SENDER, layer)])[SENDER, layer][:, head : head + 1]
        own = self.own[SENDER, layer]
        sent = _constant(
            layer, SENDER, value.to(own).expand(len(own), -1, -1, -1), "h", where={"heads": head}
        )
        held = [
            _constant(at, name, self.own[name, at])
            for name, first in (("mlp_output", layer), ("attention_output", layer + 1))
            for at in range(first, self.layers - 1)
        ]
        return self._recorded(layer, [sent, *held])

    def _received_linearly(self, layer: int, head: int) -> ActivationCache:
        """The same with the divisors of the norms before them as they are in the corrupted run."""
        clean = self.clean.require([(SENDER, layer)])[SENDER, layer].to(self.own[SENDER, layer])
        weight = (
            Places(self.model).at("head_attention_output", layer).output_projection(clean.device)[0][head]
        )
        change = (clean[:, head] - self.own[SENDER, layer][:, head]) @ weight
        fed = [
            _constant(at, _READS, self.own[_READS, at] + self._normed(change, at))
            for at in range(layer + 1, self.layers)
        ]
        return self._recorded(layer, fed)

    def _recorded(self, layer: int, entries: list[RepresentationConfig]) -> ActivationCache:
        """What later heads read in the corrupted run with these values put in."""
        return collect(
            IntervenableModel(entries, self.model),
            self.corrupted,
            self.receiver,
            layers=list(range(layer + 1, self.layers)),
            device=None,
        )

    def _check_sums(self) -> None:
        """That what heads add goes into the stream as it is, and the stream is a sum."""
        for layer in range(self.layers):
            entering, leaving, attention, mlp = (self.own[name, layer] for name in _STREAM)
            off = (leaving - entering - attention - mlp).abs().max()
            if bool(off > _CLOSE * leaving.abs().max()) or not torch.equal(
                attention, self.own["attention_output", layer]
            ):
                raise UnsupportedModelError(
                    f"mode='linear' needs a stream to which heads add as they are, and in block {layer} of"
                    f" {type(self.model).__name__} a norm comes between. Take mode='exact'."
                )

    def _normed(self, change: Tensor, layer: int) -> Tensor:
        """A change of the stream as the norm before attention hands it on, its divisor kept: `w * centred(d) / s`.

        The norm is found among the parts of the block by what it computes.
        """
        stream, read = self.own["block_input", layer], self.own[_READS, layer]
        if torch.equal(stream, read):  # no norm before attention
            return change
        block = block_at(self.model, path_in_layer(self.blocks, layer, ""))
        for module in block.modules():
            if "Norm" not in type(module).__name__ or any(True for _ in module.children()):
                continue
            weight, bias = _affine(module, stream)
            formula = weight * centred(module, stream) / norm_scale(module, stream) + bias
            if formula.shape == read.shape and bool(
                (formula - read).abs().max() <= _CLOSE * read.abs().max()
            ):
                return (weight * centred(module, change) / norm_scale(module, stream)).to(change.dtype)
        raise UnsupportedModelError(
            f"mode='linear' finds no norm in block {layer} of {type(self.model).__name__} that makes what attention"
            " reads of the stream. Take mode='exact'."
        )


def _constant(
    layer: int, component: str, value: Tensor, unit: str = "pos", **fields: Any
) -> RepresentationConfig:
    """A value put in at a place."""
    return RepresentationConfig(
        layer,
        component,
        unit,
        intervention_type=VanillaIntervention,
        source_representation=value.detach(),
        **fields,
    )


def _affine(module: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm, found by what it makes of two vectors: some keep their weight less one."""
    width = like.shape[-1]
    probe = torch.arange(width, device=like.device).remainder(2).to(like.dtype) * 2 - 1
    probe = probe + torch.linspace(0.1, 0.2, width, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        try:
            bias = module(torch.zeros_like(probe)[None, None])[0, 0]
            spread = module(probe[None, None])[0, 0] - bias
        except RuntimeError:  # of another width
            return torch.full_like(probe, torch.nan), torch.zeros_like(probe)
    return spread * norm_scale(module, probe) / centred(module, probe), bias
