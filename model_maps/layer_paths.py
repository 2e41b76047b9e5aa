"""Paths of the parts of a layer: in a list of blocks, or in several lists that lie beside each other."""

from __future__ import annotations


def layer_lists(blocks: str) -> tuple[str, ...]:
    """The paths of the lists that a path of blocks means: its own, or where it ends in braces those named there.

    Args:
        blocks: The path.

    Example:
        >>> layer_lists("model.layers")
        ('model.layers',)
        >>> layer_lists("model.{attentions,norms}")
        ('model.attentions', 'model.norms')
    """
    before, brace, names = blocks.partition("{")
    if not brace:
        return (blocks,)
    return tuple(f"{before}{name}" for name in names.rstrip("}").split(","))


def are_beside(blocks: str) -> bool:
    """Whether a layer is an entry of each of several lists, and no module by itself.

    Example:
        >>> are_beside("model.{attentions,norms}"), are_beside("model.layers")
        (True, False)
    """
    return blocks.endswith("}")


def path_in_layer(blocks: str | None, layer: int | str | None, path: str) -> str:
    """The path of a module from the model.

    Args:
        blocks: The path of its list of blocks. Of several lists beside each other a path begins with the list's name.
        layer: The layer; None if it is in none.
        path: Its path from the block; "" is the block.

    Example:
        >>> path_in_layer("model.layers", 3, "mlp.up"), path_in_layer("model.layers", 3, "")
        ('model.layers.3.mlp.up', 'model.layers.3')
        >>> path_in_layer("model.{attentions,norms}", 3, "attentions.query")
        'model.attentions.3.query'
        >>> path_in_layer(None, None, "head")
        'head'
    """
    if not blocks or layer is None:
        return path
    parts = [blocks, str(layer), path]
    if are_beside(blocks) and path:
        name, _, rest = path.partition(".")
        parts = [blocks.partition("{")[0] + name, str(layer), rest]
    return ".".join(part for part in parts if part)
