"""Saved interventions on the Hub: which names mean it, what is fetched, and what is put there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from intervenable._version import __version__
from intervenable.binding import BoundRepresentation
from intervenable.errors import ConfigError, StorageError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OURS = ("config.json", "interventions-*.safetensors", "model-*/*")
"""What a saved model consists of."""


def is_on_the_hub(name: str | Path) -> bool:
    """Whether a name means a repository of the Hub: `owner/name`, where no such folder, and no `owner`, is here.

    Example:
        >>> is_on_the_hub("someone/capital-das"), is_on_the_hub("./capital-das"), is_on_the_hub("capital-das")
        (True, False, False)
    """
    if isinstance(name, Path) or not REPOSITORY.fullmatch(name):
        return False
    return not Path(name).exists() and not Path(name).parent.exists()


def fetched(name: str | Path, revision: str | None, api: Any = None) -> Path:
    """The folder of a saved model: itself, or the copy of a repository in the Hub's cache.

    Args:
        name: A folder, or the `owner/name` of a repository.
        revision: Branch, tag or commit of the repository.
        api: What to ask instead of a new `huggingface_hub.HfApi`.

    Raises:
        ConfigError: a revision of a folder.
        StorageError: the repository could not be fetched.
    """
    if not is_on_the_hub(name):
        if revision is not None:
            raise ConfigError(
                f"revision={revision!r} is for repositories of the Hub, and {str(name)!r} is a folder."
            )
        return Path(name).expanduser()
    try:
        found = (api or _api()).snapshot_download(str(name), revision=revision, allow_patterns=list(OURS))
    except Exception as error:  # of the network, of the Hub, of its cache
        raise StorageError(
            f"{str(name)!r} could not be fetched from the Hub: {error} If it is a folder, write './{name}'."
        ) from error
    return Path(found)


def push(
    save: Callable[[Path], object],
    repo_id: str,
    card: str,
    *,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    replace_card: bool,
    api: Any = None,
) -> str:
    """Put what `save` writes into a repository, in one commit; its address.

    Raises:
        ConfigError: no name of a repository.
        StorageError: the Hub did not take it.
    """
    if not REPOSITORY.fullmatch(repo_id):
        raise ConfigError(f"{repo_id!r} is no name of a repository; give 'owner/name'.")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save(folder)
        hub = api or _api()
        try:
            hub.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None:
                hub.create_branch(repo_id, branch=revision, exist_ok=True)
            if replace_card or not hub.file_exists(repo_id, "README.md", revision=revision):
                (folder / "README.md").write_text(card, encoding="utf-8")
            commit = hub.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=commit_message,
                allow_patterns=[*OURS, "README.md"],
                delete_patterns=list(OURS[1:]),
            )
        except Exception as error:  # of the network, or of the Hub
            raise StorageError(
                f"{repo_id} could not be put on the Hub: {error} Is the name right, and are you logged in"
                " (`hf auth login`)?"
            ) from error
    return str(getattr(commit, "commit_url", None) or f"https://huggingface.co/{repo_id}")


CARD = """\
---
library_name: intervenable
tags:
- intervenable
- interpretability
{base_line}---

# {repo_id}

Interventions on a {model}, kept with `intervenable` {version}.

| name | intervention | where | unit |
| --- | --- | --- | --- |
{rows}

```python
import intervenable as iv
{load_model}
model = iv.IntervenableModel.from_pretrained("{repo_id}"{given})
```

The files are safetensors and JSON: loading them runs no code. Classes of interventions that are not part of the
library have to be made known first (`iv.register_intervention`, or `registry={{name: cls}}`).
"""


def card_for(
    repo_id: str, bound: Sequence[BoundRepresentation], model: nn.Module, *, includes_model: bool
) -> str:
    """The README of a repository: what is in it, and how to load it."""
    name, path = type(model).__name__, getattr(getattr(model, "config", None), "name_or_path", "")
    base = path if isinstance(path, str) and is_on_the_hub(path) else None
    load_model = f"\nlm = ...  # the {name} they are for\n"
    if base is not None and hasattr(model, "save_pretrained"):
        load_model = f'from transformers import {name}\n\nlm = {name}.from_pretrained("{base}")\n'
    return CARD.format(
        repo_id=repo_id,
        model=name,
        version=__version__,
        base_line="" if base is None else f"base_model: {base}\n",
        rows="\n".join(
            f"| `{entry.name}` | {type(entry.intervention).__name__} | {entry.site.label} | {entry.config.unit} |"
            for entry in bound
        ),
        load_model="" if includes_model else load_model,
        given="" if includes_model else ", model=lm",
    )


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="intervenable", library_version=__version__)
