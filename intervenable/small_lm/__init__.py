"""A language model of one million parameters that comes with the library: real effects without a network.

It completes capitals of countries, indirect objects and price tags. `README.md` in this folder is its card.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from intervenable.small_lm.tasks import (
    CAPITALS,
    NAMES,
    Prompt,
    fact_prompts,
    indirect_object_prompts,
    price_prompts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "CAPITALS",
    "NAMES",
    "Prompt",
    "fact_prompts",
    "indirect_object_prompts",
    "load_small_lm",
    "price_prompts",
]


def load_small_lm() -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model that ship with the library, in float32 and evaluation mode.

    Only local files are read. Each call reads them anew, so the model is the caller's own to train or break.

    Example:
        >>> tokenizer, model = load_small_lm()
        >>> logits = model(**tokenizer("The capital of Spain is", return_tensors="pt")).logits
        >>> tokenizer.decode(logits[0, -1].argmax())
        ' Madrid'
    """
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    folder = Path(__file__).parent
    shows_bars = logging.is_progress_bar_enabled()
    # A bar for a few megabytes would be noise.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        model = LlamaForCausalLM.from_pretrained(folder, local_files_only=True)
    finally:
        if shows_bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    model.train(False)
    return tokenizer, model
