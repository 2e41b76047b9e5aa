"""`python -m intervenable verify`: where the components of a model are, and whether that is true."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import nn

import intervenable as iv
from intervenable.command_line import told
from intervenable.map_twin import twin_of
from intervenable.map_view import model_map


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command line of a verification."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="NAME_OR_DIR",
        help="a model: a folder, or a name on the Hugging Face hub (default: the small one that comes with the"
        " library)",
    )
    parser.add_argument(
        "--twin",
        action="store_true",
        help="look at a tiny random model of the same structure; of the model itself only the config is read",
    )
    parser.add_argument(
        "--components",
        nargs="+",
        metavar="NAME",
        help="which components must keep all laws, as block_output query_output (default: all that the model has)",
    )
    parser.add_argument(
        "--no-tree", action="store_true", help="print the table alone, without the tree of modules"
    )


def run(options: argparse.Namespace) -> int:
    """Print the tree and the table; 0 if every component keeps every law, 1 if one does not, 2 on an error."""
    broken: list[str] = []
    code = told(lambda: broken.extend(_verified(options)))
    return code or int(bool(broken))


def _verified(options: argparse.Namespace) -> list[str]:
    """What breaks a law, or is asked for and not there."""
    model = _model_without_weights(options.model) if options.twin else _model(options.model)
    view = model_map(model)
    if not options.no_tree:
        print(view, end="\n\n")
    verification = iv.verify(twin_of(model) if options.twin else model, components=options.components)
    print(verification)
    wanted = options.components or verification.components
    missing = [name for name in wanted if name not in verification.components]
    for name in missing:
        if name not in verification.refused:
            print(f"{name} is not there: {view.refused.get(name, 'the model has no stack of that kind')}.")
    return [*verification.refused, *missing]


def _model(name: str | None) -> nn.Module:
    if name is None:
        model: nn.Module = iv.load_small_lm()[1]
        return model
    config = _config(name)
    try:
        loaded: nn.Module = _class_of(config).from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise iv.InputError(
            f"{name} is no model that can be loaded. {error}\nWith --twin its config alone is enough."
        ) from error
    return loaded.train(False)


def _model_without_weights(name: str | None) -> nn.Module:
    config = iv.load_small_lm()[1].config if name is None else _config(name)
    with torch.device("meta"):
        made: nn.Module = _class_of(config)._from_config(config)
    return made.train(False)


def _config(name: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise iv.InputError(f"{name} is no model whose config can be read. {error}") from error


def _class_of(config: Any) -> Any:
    """The class that a config names, else that of a language model of its type."""
    import transformers

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise iv.InputError(
        f"The config names no class of model that transformers has, and its type {config.model_type!r} has none."
    )
