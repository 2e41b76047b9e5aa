"""The component names users write, and what each of them is.

One table for all architectures: a `ModelMap` says where a component lives in one of them, this table says
what the word means everywhere. Symbols: `b` batch, `s` positions, `D` hidden size, `H` query heads,
`K` key-value heads, `dh` width of a head, `M` width of the MLP, `V` vocabulary, `E` experts, `n` experts that a
position is sent to, `q` and `k` positions of queries (rows) and keys (columns).

In a model of several stacks each word says which: `encoder_block_output`, `decoder_block_output`; `vision_`, `audio_`
and `text_` begin the words for towers. What the decoder's blocks do to attend to the encoder begins with `cross_`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

Scope = Literal["block", "model"]
Axes = Literal["stream", "heads", "matrix", "state"]
Stack = Literal["encoder", "decoder", "vision", "audio", "text", "cross"]
"""A list of blocks with positions of its own; `cross` is none, but what blocks beside a tower attend to."""

Prefix = Literal["", "encoder", "decoder", "vision", "audio", "text", "cross"]

UNITS: Mapping[Axes, tuple[str, ...]] = {
    "stream": ("pos",),
    "heads": ("h", "h.pos"),
    "matrix": ("h", "h.query", "h.query.key"),
    "state": ("pos",),
}
"""The units in which the tensors of each kind are located."""


@dataclass(frozen=True, slots=True)
class Component:
    """What a component name means, whatever the architecture."""

    shape: str
    """Shape of the tensor a user gets, in the symbols of this module."""

    meaning: str
    """Where in the computation it is, in one line."""

    scope: Scope = "block"
    """Whether there is one in each block (`layer` says which) or one in the model (no `layer`)."""

    heads_of: str | None = None
    """The component of which this is the view by heads (`head_query_output` of `query_output`)."""

    derived_from: str | None = None
    """The component from whose module this one is computed, where no module hands it over as it is."""

    fallback: str | None = None
    """The component that this one equals in architectures whose map does not place it apart."""

    inside: str | None = None
    """The component at whose module this one is computed, by a function and not by a module of its own."""

    axes: Axes = "stream"
    """Whether it is a vector at each position, one for each head there, a matrix of queries by keys, or a state: one
    tensor for each example, in which no position can be named."""

    word: str = ""
    """The component's name without its prefix."""

    prefix: Prefix = ""
    """Which stack of a model of several it is in, or "cross": the decoder's attention to the encoder."""

    @property
    def stack(self) -> Stack | None:
        """The stack whose positions it has (a matrix: in its rows); None where there is but one stack."""
        if self.prefix == "cross":
            return "encoder" if self.word in OF_KEYS else "decoder"
        return self.prefix or None

    @property
    def key_stack(self) -> Stack | None:
        """The stack whose positions the columns of a matrix have."""
        return "encoder" if self.prefix == "cross" else self.stack

    @property
    def units(self) -> tuple[str, ...]:
        """The units in which it is located."""
        return UNITS[self.axes]


OF_KEYS = (
    "key_output",
    "value_output",
    "head_key_output",
    "head_value_output",
    "expanded_head_key",
    "expanded_head_value",
)
"""Words for what is at the positions that are read, and not at those that read: other ones in cross attention."""

_WORDS: Mapping[str, Component] = {
    "embedding_output": Component("[b, s, D]", "output of the token embedding", scope="model"),
    "block_input": Component("[b, s, D]", "residual stream entering the block"),
    "block_mid": Component(
        "[b, s, D]", "residual stream after attention, to which the MLP is added (sequential blocks)"
    ),
    "block_output": Component("[b, s, D]", "residual stream leaving the block"),
    "attention_input": Component("[b, s, D]", "input of the attention module, after its norm"),
    "query_output": Component("[b, s, H*dh]", "query projection, before query norm and rotary"),
    "key_output": Component("[b, s, K*dh]", "key projection, before key norm and rotary"),
    "value_output": Component("[b, s, K*dh]", "value projection"),
    "attention_value_output": Component(
        "[b, s, H*dh]", "pattern times values: input of the output projection"
    ),
    "attention_output": Component("[b, s, D]", "output of the attention module, before any post-norm"),
    "attention_contribution": Component(
        "[b, s, D]", "what attention adds to the residual stream", fallback="attention_output"
    ),
    "head_query_output": Component(
        "[b, H, s, dh]", "query projection by heads", heads_of="query_output", axes="heads"
    ),
    "head_key_output": Component(
        "[b, K, s, dh]", "key projection by key-value heads", heads_of="key_output", axes="heads"
    ),
    "head_value_output": Component(
        "[b, K, s, dh]", "value projection by key-value heads", heads_of="value_output", axes="heads"
    ),
    "head_attention_value_output": Component(
        "[b, H, s, dh]", "pattern times values by heads", heads_of="attention_value_output", axes="heads"
    ),
    "head_attention_output": Component(
        "[b, H, s, D]",
        "what each head adds to the attention output, without bias",
        derived_from="attention_value_output",
        axes="heads",
    ),
    "rotary_query": Component(
        "[b, H, s, dh]", "queries after rotary embedding", inside="attention_input", axes="heads"
    ),
    "rotary_key": Component(
        "[b, K, s, dh]", "keys after rotary embedding", inside="attention_input", axes="heads"
    ),
    "expanded_head_key": Component(
        "[b, H, s, dh]",
        "keys as each query head reads them: shared heads repeated",
        inside="attention_input",
        axes="heads",
    ),
    "expanded_head_value": Component(
        "[b, H, s, dh]",
        "values as each query head reads them: shared heads repeated",
        inside="attention_input",
        axes="heads",
    ),
    "attention_scores": Component(
        "[b, H, q, k]",
        "input of the softmax; entries under the mask read as -inf and cannot be changed",
        inside="attention_input",
        axes="matrix",
    ),
    "attention_scores_masked": Component(
        "[b, H, q, k]",
        "input of the softmax as it is, entries under the mask included",
        inside="attention_input",
        axes="matrix",
    ),
    "attention_pattern": Component(
        "[b, H, q, k]",
        "output of the softmax, before dropout: how much each query reads of each key",
        inside="attention_input",
        axes="matrix",
    ),
    "mixer_input": Component(
        "[b, s, D]",
        "input of what mixes positions without a pattern: state space, linear attention, convolution",
    ),
    "mixer_output": Component("[b, s, D]", "output of what mixes positions without a pattern"),
    "mixer_contribution": Component(
        "[b, s, D]", "what the mixer adds to the residual stream", fallback="mixer_output"
    ),
    "mixer_state": Component(
        "[b, ...]", "what the mixer keeps of all positions for the next token", axes="state"
    ),
    "mlp_input": Component("[b, s, D]", "input of the MLP, after its norm"),
    "mlp_pre_activation": Component("[b, s, M]", "input of the nonlinearity (gate projection if gated)"),
    "mlp_activation": Component("[b, s, M]", "output of the nonlinearity alone"),
    "mlp_hidden": Component("[b, s, M]", "input of the down projection (gate times up if gated)"),
    "mlp_output": Component("[b, s, D]", "output of the MLP, before any post-norm"),
    "mlp_contribution": Component(
        "[b, s, D]", "what the MLP adds to the residual stream", fallback="mlp_output"
    ),
    "router_input": Component("[b, s, D]", "input of the router of a mixture of experts"),
    "router_output": Component("[b, s, E]", "router logits"),
    "expert_choice": Component("[b, s, n]", "numbers of the experts that each position is sent to"),
    "expert_weight": Component("[b, s, n]", "what the output of each of these experts is multiplied with"),
    "expert_input": Component("[b, s, D]", "input of the experts"),
    "expert_output": Component("[b, s, D]", "weighted sum of the experts' outputs"),
    "final_norm_input": Component("[b, s, D]", "input of the last norm", scope="model"),
    "final_norm_output": Component("[b, s, D]", "output of the last norm", scope="model"),
    "final_norm_scale": Component(
        "[b, s, 1]",
        "divisor of the last norm, its epsilon inside the root",
        scope="model",
        derived_from="final_norm_output",
    ),
    "logits": Component("[b, s, V]", "output of the head (before a final soft-cap, if any)", scope="model"),
}


_IN_A_STACK = tuple(word for word in _WORDS if word != "logits")
"""What an encoder and a decoder have, each for itself."""

_IN_CROSS_ATTENTION = (
    "block_mid",
    "attention_input",
    "query_output",
    "key_output",
    "value_output",
    "attention_value_output",
    "attention_output",
    "attention_contribution",
    "head_query_output",
    "head_key_output",
    "head_value_output",
    "head_attention_value_output",
    "head_attention_output",
    "expanded_head_key",
    "expanded_head_value",
    "attention_scores",
    "attention_scores_masked",
    "attention_pattern",
)
"""What a decoder's attention to the encoder has; the rest of its blocks is the decoder's."""


def _in(prefix: Prefix, words: Iterable[str], where: str) -> dict[str, Component]:
    """The components of one stack, by their names."""

    def named(word: str | None) -> str | None:
        return word and f"{prefix}_{word}"

    return {
        f"{prefix}_{word}": replace(
            known,
            meaning=f"{where}: {known.meaning}",
            word=word,
            prefix=prefix,
            heads_of=named(known.heads_of),
            derived_from=named(known.derived_from),
            fallback=named(known.fallback),
            inside=named(known.inside),
        )
        for word in words
        for known in (_WORDS[word],)
    }


COMPONENTS: Mapping[str, Component] = {
    **{word: replace(known, word=word) for word, known in _WORDS.items()},
    **_in("encoder", _IN_A_STACK, "in the encoder"),
    **_in("decoder", _IN_A_STACK, "in the decoder"),
    **_in("vision", _IN_A_STACK, "in the vision tower"),
    **_in("audio", _IN_A_STACK, "in the audio tower"),
    **_in("text", _IN_A_STACK, "in the text tower"),
    **_in("cross", _IN_CROSS_ATTENTION, "in the decoder's attention to the encoder"),
}
"""Every component by its name."""

WORDS = tuple(_WORDS)
"""The names without a prefix, in a model of one stack all there are."""


ALIASES: Mapping[str, str] = {
    f"{prefix}attention_weight": f"{prefix}attention_pattern"
    for prefix in ("", "encoder_", "decoder_", "vision_", "audio_", "text_", "cross_")
}
"""Other names of components."""


PREFIXED = "In a model of several stacks with encoder_, decoder_, cross_, vision_, audio_ or text_ before it."
"""What a list of `WORDS` leaves out, as a sentence."""


def in_short(names: Iterable[str]) -> str:
    """Names of components as a list in which each word stands once, with the prefixes that it has.

    Example:
        >>> in_short(["logits", "encoder_mlp_input", "decoder_mlp_input", "encoder_mlp_output", "decoder_mlp_output"])
        'logits; with encoder_ or decoder_ before it: mlp_input, mlp_output'
    """
    prefixes: dict[str, list[str]] = {}
    for name in names:
        known = COMPONENTS.get(name)
        prefixes.setdefault(known.word if known else name, []).append(known.prefix if known else "")
    groups: dict[tuple[str, ...], list[str]] = {}
    for word in sorted(prefixes):
        groups.setdefault(tuple(prefixes[word]), []).append(word)
    return "; ".join(_before(groups[which], which) for which in sorted(groups, key=len))


def _before(words: Iterable[str], prefixes: Iterable[str]) -> str:
    """Words that have the same prefixes, after these; "" is none."""
    said = [f"{prefix}_" for prefix in prefixes if prefix]
    listed = ", ".join(words)
    if not said:
        return listed
    alone = ", or nothing," if "" in prefixes else ""
    return f"with {' or '.join([', '.join(said[:-1]), said[-1]] if said[1:] else said)}{alone} before it: {listed}"


def is_head_component(name: str) -> bool:
    """Whether `name` has a vector for each head and position, so that its units are `h` and `h.pos`."""
    return COMPONENTS[name].axes == "heads"
