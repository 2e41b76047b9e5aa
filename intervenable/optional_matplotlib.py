"""The names of matplotlib that pictures use; the one place that says what to install where it is missing."""

from __future__ import annotations

from intervenable.errors import MissingExtraError

try:
    from matplotlib import colormaps, font_manager
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Colormap, ListedColormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise MissingExtraError(
        f'Pictures need matplotlib, which is not installed ({error}). Run: pip install "intervenable[plots]"'
    ) from error

__all__ = [
    "Axes",
    "Colormap",
    "Figure",
    "Line2D",
    "ListedColormap",
    "Normalize",
    "Rectangle",
    "ScalarMappable",
    "colormaps",
    "font_manager",
]
