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


def cifg(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Greff et al. (2017): the input gate is 1 - f."""
    h, c = carry
    (w_f, w_g, w_o), (u_f, u_g, u_o), (b_f, b_g, b_o) = (
        np.split(a, 3, -1) for a in (p.w_ih, p.w_hh, p.b)
    )
    f = sigmoid(x @ w_f + h @ u_f + b_f)
    i = 1 - f
    block_input = np.tanh(x @ w_g + h @ u_g + b_g)
    c = block_input * i + c * f
    o = sigmoid(x @ w_o + h @ u_o + b_o)
    h = np.tanh(c) * o
    return (h, c), h


CASES = [
    Case(jlstm.PeepholeLSTM(3, learned_carry=True), loop(peephole), "Gers 2000"),
    Case(jlstm.CIFG(3, learned_carry=True), loop(cifg), "Greff 2017"),
]
