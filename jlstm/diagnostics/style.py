"""How the pictures look: one palette, one set of sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from jlstm.extras import import_optional

# Six colours that people with any common colour vision tell apart, and greys.
PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
GREY = "#555555"
# Maps of numbers: from nothing on, and both ways from zero.
SEQUENTIAL = "cividis"
DIVERGING = "RdBu_r"
WIDTH = 7.0  # inches


def settings() -> dict[str, Any]:
    """Returns matplotlib's settings of the style."""
    cycler = import_optional("cycler").cycler
    return {
        "axes.prop_cycle": cycler(color=list(PALETTE)),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": GREY,
        "axes.labelsize": 9,
        "axes.titlesize": 9,
        "axes.titlelocation": "left",
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.6,
        "font.size": 9,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "image.cmap": SEQUENTIAL,
        "image.interpolation": "nearest",
        "figure.figsize": (WIDTH, 3.0),
        "figure.dpi": 110,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 150,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draws what is drawn inside in the library's style.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> from matplotlib.figure import Figure
      >>> with jlstm.diagnostics.style():
      ...     figure = Figure()
      >>> figure.get_size_inches().tolist()
      [7.0, 3.0]
    """
    with import_optional("matplotlib").rc_context(settings()):
        yield
