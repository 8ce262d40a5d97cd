"""Text coloured by numbers, as HTML and as plain text."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable

import numpy as np

from jlstm import door
from jlstm.diagnostics.canvas import PALETTE

POSITIVE, NEGATIVE = PALETTE[1], PALETTE[0]
# The strongest mixture of a colour on which dark letters have a contrast of 7 to 1.
MOST = 0.65
# Marks of the plain form, from the most negative numbers to the most positive.
MARKS = "=- +#"
SHOWN = {"\n": "↵", "\t": "→", "\r": "␍", "": "∅"}


@dataclasses.dataclass(frozen=True, repr=False)
class ColouredText:
    """Symbols with a number each, shown as colours in a notebook and marks elsewhere.

    Attributes:
      symbols: the characters or words.
      values: the number of each symbol, ``[T]``.
      scale: the absolute value that gets the strongest colour.
    """

    symbols: tuple[str, ...]
    values: np.ndarray
    scale: float

    @property
    def html(self) -> str:
        """The text as a ``<pre>`` element: red above zero, blue below."""
        parts = []
        for symbol, value in zip(self.symbols, self.values, strict=True):
            colour = background(value / self.scale)
            shown = html.escape(_shown(symbol)) + ("\n" if symbol == "\n" else "")
            parts.append(
                f'<span style="background:{colour};color:#111" title="{value:.3g}">'
                f"{shown}</span>"
            )
        legend = (
            f"red is above 0, blue below; the strongest colours are {self.scale:.3g}"
        )
        return (
            '<pre style="white-space:pre-wrap;line-height:1.5;background:#fff;'
            f'color:#111" aria-label="{legend}">' + "".join(parts) + "</pre>"
        )

    @property
    def text(self) -> str:
        """The text with a line of marks under each line: ``=`` and ``-`` below zero."""
        lines, symbols, marks = [], "", ""
        for symbol, value in zip(self.symbols, self.values, strict=True):
            shown = _shown(symbol)
            symbols += shown
            marks += _mark(value / self.scale) * len(shown)
            if symbol == "\n" or len(symbols) >= 76:
                lines += [symbols, marks.rstrip()]
                symbols = marks = ""
        lines += [symbols, marks.rstrip()] if symbols else []
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        half, fifth = self.scale * 0.6, self.scale * 0.2
        return (
            f"{self.text}\n# above {half:.2g}, + above {fifth:.2g}, - below "
            f"{-fifth:.2g}, = below {-half:.2g}"
        )


def colour_text(
    symbols: Iterable[str], values: Iterable[float], *, scale: float | None = None
) -> ColouredText:
    """Colours text by one number for each symbol, such as a unit's activation.

    A notebook shows red above zero and blue below, with the numbers as tooltips. A
    terminal shows a line of marks under each line of text.

    Args:
      symbols: characters or words; a string counts as its characters. They are escaped,
        so text with HTML in it is safe.
      values: one number for each symbol.
      scale: the absolute value that gets the strongest colour. None takes the largest;
        give the same number for texts that are to be compared.

    Returns:
      The coloured text.

    Raises:
      ValueError: there are more or fewer values than symbols, or the scale is not
        positive.

    Example:
      >>> jlstm.diagnostics.colour_text("a(b)", [0.1, 0.9, 1.0, -0.3])
      a(b)
       ##-
      # above 0.6, + above 0.2, - below -0.2, = below -0.6
    """
    made = tuple(symbols)
    numbers = np.asarray(values, np.float64)
    if numbers.shape != (len(made),):
        raise door.error(
            "colour_text",
            f"values must be [{len(made)}], one for each symbol, got "
            f"{list(numbers.shape)}",
        )
    if scale is None:
        finite = np.abs(numbers[np.isfinite(numbers)])
        scale = float(finite.max(initial=0)) or 1.0
    if not scale > 0:
        raise door.error("colour_text", f"scale must be > 0, got {scale}")
    return ColouredText(made, numbers, scale)


def background(part: float) -> str:
    """Returns the colour of a number from -1 to 1; white for NaN."""
    part = float(np.nan_to_num(np.clip(part, -1, 1)))
    colour = POSITIVE if part > 0 else NEGATIVE
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    mixed = (round(255 + (c - 255) * abs(part) * MOST) for c in channels)
    return "#" + "".join(f"{c:02x}" for c in mixed)


def _mark(part: float) -> str:
    part = float(np.nan_to_num(part))
    return MARKS[int(np.searchsorted([-0.6, -0.2, 0.2, 0.6], part))]


def _shown(symbol: str) -> str:
    if symbol in SHOWN:
        return SHOWN[symbol]
    return "".join(c if c.isprintable() else "·" for c in symbol)
