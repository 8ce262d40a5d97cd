"""Write the gate equations of a recurrent cell; jlstm supplies everything else."""

from jlstm import cells, data, decode, init, layers, models, testing, train
from jlstm.cells import *  # noqa: F403
from jlstm.decode import generate
from jlstm.door import Explanation, explain, unroll, valid_steps
from jlstm.layers import *  # noqa: F403
from jlstm.models import *  # noqa: F403
from jlstm.types import Cell, Layer, Policy, config, gated, where_rows, zero_rows

__version__ = "0.1.0"

__all__ = [
    "Cell",
    "Explanation",
    "Layer",
    "Policy",
    "config",
    "data",
    "decode",
    "explain",
    "gated",
    "generate",
    "init",
    "testing",
    "train",
    "unroll",
    "valid_steps",
    "where_rows",
    "zero_rows",
    *cells.__all__,
    *layers.__all__,
    *models.__all__,
]
