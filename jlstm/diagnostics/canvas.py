"""The look of the plots: one palette, one set of sizes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jlstm.extras import import_optional

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
"""The six colours of plots; people with any usual colour vision can tell them apart."""
GREY = "#555555"
# Colour maps: for numbers from zero up, and for numbers on both sides of zero.
SEQUENTIAL = "cividis"
DIVERGING = "RdBu_r"
WIDTH = 7.0  # inches


def settings() -> dict[str, Any]:
    """Returns the matplotlib settings of the library's style."""
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
    """A context in which matplotlib draws in the library's style.

    Figures made inside ``with style():`` have its palette, sizes and fonts. The
    settings are restored afterwards.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> from matplotlib.figure import Figure
      >>> with jlstm.diagnostics.style():
      ...     figure = Figure()
      >>> figure.get_size_inches().tolist()
      [7.0, 3.0]
    """
    made = settings()
    parameters = import_optional("matplotlib").rcParams
    before = {name: parameters[name] for name in made}
    parameters.update(made)
    try:
        yield
    finally:
        # Only these: an rc_context would also undo what the first figure of a notebook
        # sets when it loads its backend, and no later figure would be shown.
        parameters.update(before)


@contextlib.contextmanager
def canvas(axes: Any = None, height: float = 3.0, **options: Any) -> Iterator[Any]:
    """Yields the given axes, or new ones in a figure of their own.

    Args:
      axes: matplotlib axes, or None.
      height: the height of a new figure, in inches.
      **options: options of ``Figure.subplots``.
    """
    with style():
        if axes is None:
            figure = import_optional("matplotlib.figure").Figure(
                figsize=(WIDTH, height), layout="constrained"
            )
            axes = figure.subplots(**options)
        yield axes


def label_steps(axes: Any, labels: Sequence[str] | None, time: int) -> None:
    """Labels the axis of steps."""
    if labels is None:
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        ticks(axes.xaxis, labels)
    axes.set_xlim(-0.5, time - 0.5)


def ticks(axis: Any, labels: Sequence[str]) -> None:
    """Puts a label on every step of an axis."""
    shown = [{"\n": "↵", " ": "␣"}.get(label, label) for label in labels]
    wide = max(map(len, shown), default=0) > 2
    rotation = 60 if wide and axis.axis_name == "x" else 0
    axis.set_ticks(np.arange(len(shown)), shown, rotation=rotation)
    for text in axis.get_ticklabels():
        text.set_parse_math(False)
        if rotation:
            text.set(ha="right", rotation_mode="anchor")


def plain_ticks(axes: Any, low: float, high: float) -> None:
    """Writes powers of ten as plain numbers, with more ticks on short axes."""
    ticker = import_optional("matplotlib.ticker")
    subs = (1.0, 2.0, 5.0) if high / low < 300 else (1.0,)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=subs))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())


def colors() -> Iterator[str]:
    """Yields the colours of the palette again and again."""
    while True:
        yield from PALETTE
