"""The laws that every cell and layer obeys, as checks for cells and layers of your own.

``check_cell(MyCell(8))`` takes a few seconds. It returns, or raises an
``AssertionError`` that names the law that is broken. A plain mistake, such as a carry
without a batch, is told in one line before any law is tried. The laws run in float64,
so that a difference is a mistake and not rounding.
"""

from jlstm.testing.checks import check_cell, check_layer
from jlstm.testing.laws import (
    copy_of,
    fill,
    holes,
    law,
    moved,
    random_like,
    right_padding,
    sequence_of,
)

__all__ = [
    "check_cell",
    "check_layer",
    "copy_of",
    "fill",
    "holes",
    "law",
    "moved",
    "random_like",
    "right_padding",
    "sequence_of",
]
