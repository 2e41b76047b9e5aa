"""How much memory activations take, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from intervenable.errors import CacheError

_UNITS = ("kB", "MB", "GB", "TB")


def format_bytes(count: int) -> str:
    """A number of bytes with a decimal unit: 1 kB is 1000 B.

    Example:
        >>> format_bytes(999), format_bytes(1500), format_bytes(2_000_000)
        ('999 B', '1.5 kB', '2.0 MB')
    """
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in _UNITS:
        size /= 1000
        if round(size, 1) < 1000 or unit == _UNITS[-1]:
            break
    return f"{size:.1f} {unit}"


def memory_table(sizes: Mapping[tuple[str, int | None], int], by: str) -> str:
    """A table of what activations take, with a line for each component or for each activation.

    Example:
        >>> sizes = {("block_output", 0): 600, ("block_output", 1): 600, ("logits", None): 20}
        >>> print(memory_table(sizes, "component"))
        activation    layers    size
        block_output  0-1     1.2 kB
        logits                  20 B
        all                   1.2 kB
    """
    if by not in ("component", "key"):
        raise CacheError(f"by={by!r} is unknown. Allowed: 'component', 'key'.")
    groups: dict[tuple[str, int | None], list[tuple[int | None, int]]] = {}
    for (component, layer), size in sizes.items():
        groups.setdefault((component, layer if by == "key" else None), []).append((layer, size))
    rows = [("activation", "layers", "size")]
    for (component, _), members in groups.items():
        layers = [layer for layer, _ in members if layer is not None]
        rows.append((component, _ranges(layers), format_bytes(sum(size for _, size in members))))
    rows.append(("all", "", format_bytes(sum(sizes.values()))))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def _ranges(layers: Sequence[int]) -> str:
    """Layers in order, neighbours as a range.

    Example:
        >>> _ranges([3, 0, 1, 2, 7])
        '0-3, 7'
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
