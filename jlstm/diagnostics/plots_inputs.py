"""Plots of contributions of inputs and symbols: bars, coloured text, attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jlstm import door
from jlstm.diagnostics.attribution import Attribution
from jlstm.diagnostics.canvas import GREY, PALETTE, WIDTH, canvas, label_steps, ticks
from jlstm.diagnostics.text import background, colour_text
from jlstm.extras import import_optional


def plot_attribution(
    found: Attribution,
    *,
    row: int = 0,
    labels: Sequence[str] | None = None,
    axes: Any = None,
) -> Any:
    """Plots how much each step of one row contributed, as bars.

    Args:
      found: what :func:`attribute` or :func:`occlude` returned.
      row: the row of the batch.
      labels: labels of the steps, such as the symbols that were read; None numbers
        them.
      axes: matplotlib axes to draw into; None makes a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      ImportError: matplotlib is not installed.
    """
    values = found.steps[row]
    with canvas(axes, height=2.4) as axes:
        colors = [PALETTE[1] if value >= 0 else PALETTE[0] for value in values]
        axes.bar(np.arange(len(values)), values, color=colors, width=0.85)
        axes.axhline(0, color=GREY, lw=0.8)
        axes.set_ylabel("contribution")
        axes.grid(axis="x", visible=False)
        label_steps(axes, labels, len(values))
        return axes.figure


def plot_text(
    symbols: Sequence[str],
    values: Any,
    *,
    scale: float | None = None,
    columns: int = 72,
) -> Any:
    """Draws text coloured by one number for each symbol.

    It makes a figure; :func:`colour_text` makes HTML and plain text instead.

    Args:
      symbols: characters or words; a string counts as its characters.
      values: one number for each symbol.
      scale: the absolute value that gets the strongest colour; None takes the largest.
      columns: the number of characters on a line.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: there are more or fewer values than symbols.
      ImportError: matplotlib is not installed.
    """
    text = colour_text(symbols, values, scale=scale)
    places, line, column = [], 0, 0
    for symbol in text.symbols:
        shown = "↵" if symbol == "\n" else symbol
        if column + len(shown) > columns:
            line, column = line + 1, 0
        places.append((line, column, shown))
        line, column = (line + 1, 0) if symbol == "\n" else (line, column + len(shown))
    lines = places[-1][0] + 1 if places else 1
    with canvas(height=0.25 * lines + 0.1) as axes:
        rectangle = import_optional("matplotlib.patches").Rectangle
        for (y, x, shown), value in zip(places, text.values, strict=True):
            color = background(value / text.scale)
            axes.add_patch(rectangle((x, y), len(shown), 1, color=color, lw=0))
            for i, letter in enumerate(shown):
                axes.text(
                    x + i + 0.5,
                    y + 0.52,
                    letter,
                    ha="center",
                    va="center",
                    family="monospace",
                    fontsize=min(9.0, 560 / columns),
                    color="#111111",
                    parse_math=False,
                )
        axes.set(xlim=(0, columns), ylim=(lines, 0))
        axes.set_axis_off()
        return axes.figure


def plot_attention(
    weights: Any,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    axes: Any = None,
) -> Any:
    """Plots attention weights as a map, with a row for each output.

    Args:
      weights: ``[T_out, T_in]``, the weights of one example.
      inputs: labels of the inputs, along the horizontal axis; None numbers them.
      outputs: labels of the outputs, along the vertical axis; None numbers them.
      axes: matplotlib axes to draw into; None makes a new figure.

    Returns:
      The matplotlib figure.

    Raises:
      ValueError: the weights are not a matrix.
      ImportError: matplotlib is not installed.
    """
    matrix = np.asarray(weights)
    if matrix.ndim != 2:
        raise door.error(
            "plot_attention",
            f"weights must be [T_out, T_in], of one row, got {list(matrix.shape)}",
        )
    height = min(7.0, max(2.0, 1.0 + WIDTH * 0.8 * len(matrix) / matrix.shape[1]))
    with canvas(axes, height=height) as axes:
        image = axes.imshow(matrix, aspect="auto", cmap="Blues", vmin=0)
        axes.grid(False)
        axes.set(xlabel="input", ylabel="output")
        if inputs is not None:
            ticks(axes.xaxis, inputs)
        if outputs is not None:
            ticks(axes.yaxis, outputs)
        axes.figure.colorbar(image, ax=axes, label="weight", pad=0.01)
        return axes.figure
