"""LSTMs and GRUs with other gates."""

from __future__ import annotations

from typing import Any

import numpy as np

import jlstm
from tests.oracles import Case, loop, sigmoid


def peephole(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Gers & Schmidhuber (2000), one gate at a time."""
    h, c = carry
    (x_i, x_f, x_g, x_o), (h_i, h_f, h_g, h_o) = (
        np.split(a, 4, -1) for a in (x @ p.w_ih + p.b, h @ p.w_hh)
    )
    i = sigmoid(x_i + h_i + p.w_ci * c)
    f = sigmoid(x_f + h_f + p.w_cf * c)
    c = f * c + i * np.tanh(x_g + h_g)
    h = sigmoid(x_o + h_o + p.w_co * c) * np.tanh(c)
    return (h, c), h


CASES = [
    Case(jlstm.PeepholeLSTM(3, learned_carry=True), loop(peephole), "Gers 2000"),
]
