"""Maps of language models whose blocks mix positions by a state space and have no attention."""

from __future__ import annotations

from model_maps import ModelMap, Site
from model_maps.families import STATE_IS_READ, Head, family, lacking
from model_maps.vocabulary import COMPONENTS

_STREAM = {
    "embedding_output": Site("embeddings"),
    "block_input": Site("", "input"),
    "block_output": Site(""),
    "final_norm_input": Site("norm_f", "input"),
    "final_norm_output": Site("norm_f"),
}
_MIXER = {
    "mixer_input": Site("mixer", "input"),
    "mixer_output": Site("mixer"),
    "mixer_state": Site("mixer", width="any", read_only=STATE_IS_READ),
}
_DERIVED = ("final_norm_scale", "logits", "mixer_contribution")

MAMBA = family(
    heads=[
        Head(None, ("MambaModel", "Mamba2Model", "FalconMambaModel"), ""),
        Head(
            "lm_head",
            ("MambaForCausalLM", "Mamba2ForCausalLM", "FalconMambaForCausalLM"),
            "backbone.",
            width="vocabulary",
        ),
    ],
    blocks="layers",
    sites=_STREAM | _MIXER,
    absent=lacking(
        *(name for name in COMPONENTS if name not in (*_STREAM, *_MIXER, *_DERIVED)),
        why="its blocks mix positions by a state space and have neither attention nor an MLP",
    ),
    sequential=False,
)

STATE_SPACES: tuple[ModelMap, ...] = MAMBA
"""The maps of all state-space classes."""
