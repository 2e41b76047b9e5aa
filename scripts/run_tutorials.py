"""Run the notebooks in tutorials/ from top to bottom; a cell that raises fails the script, after the others.

Example:
    python scripts/run_tutorials.py                       # every notebook, nothing is written
    python scripts/run_tutorials.py --write               # store the new outputs in the notebooks
    python scripts/run_tutorials.py --jobs 2              # two at a time
    python scripts/run_tutorials.py tutorials/swap.ipynb  # only this one
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

ROOT = Path(__file__).resolve().parents[1]


def run(path: Path, *, write: bool, timeout: float) -> None:
    """Execute one notebook in its own folder, as a reader would, and store its outputs if asked to.

    Raises:
        CellExecutionError: A cell raised; the message shows the cell and the traceback.
        CellTimeoutError: A cell took longer than it may.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
        # Times of day in the metadata would make every run a change.
        record_timing=False,
        # Or how often a cell flushes.
        coalesce_streams=True,
    )
    client.execute()
    if write:
        # The version of the interpreter at hand says nothing about the notebook.
        notebook.metadata.get("language_info", {}).pop("version", None)
        # Progress bars and where tqdm looks for them are no part of the story.
        for cell in notebook.cells:
            if "outputs" in cell:
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        nbformat.write(notebook, path)


def report(path: Path, *, write: bool, timeout: float) -> bool:
    """Run one notebook, say how long it took or what was raised in it, and return whether it ran to its end."""
    begun = time.monotonic()
    try:
        run(path, write=write, timeout=timeout)
    except (CellExecutionError, CellTimeoutError) as error:
        print(f"{path.name}: failed\n{error}", file=sys.stderr, flush=True)
        return False
    print(f"{path.name}: ran in {time.monotonic() - begun:.1f} s", flush=True)
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: every one in tutorials/")
    parser.add_argument("--write", action="store_true", help="store the outputs in the notebooks")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds that one cell may take")
    parser.add_argument("--jobs", type=int, default=1, help="notebooks that run at the same time")
    options = parser.parse_args(arguments)
    notebooks = [path.resolve() for path in options.notebooks] or sorted((ROOT / "tutorials").glob("*.ipynb"))
    if not notebooks:
        print("There is no notebook in tutorials/.", file=sys.stderr)
        return 1

    # The kernel inherits both: a checkout that is not installed is imported too, and nothing is downloaded.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The last are the longest: they come first, so that no process waits for one of them alone.
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        ran = list(
            pool.map(
                lambda path: report(path, write=options.write, timeout=options.timeout), reversed(notebooks)
            )
        )
    return 0 if all(ran) else 1


if __name__ == "__main__":
    sys.exit(main())
