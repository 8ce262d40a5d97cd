"""The laws that every cell and layer obeys, for our tests and for your own cells.

``check_cell(MyCell(8))`` takes a few seconds and either returns, or raises an
``AssertionError`` that names the law that is broken. What is plainly a mistake gets one
line before that. The laws run in float64, so that a
difference is a mistake and not rounding.
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
