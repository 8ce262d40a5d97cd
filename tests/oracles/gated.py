"""LSTMs and GRUs with other gates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jlstm
from tests.oracles import Case, loop, sigmoid


def lstm(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Gers et al. (2000): with a forget gate, and as many biases as there are."""
    h, c = carry
    bias = p.b if p.b_hh is None else p.b + p.b_hh
    w = np.concatenate([p.w_ih, p.w_hh])
    i, f, g, o = np.split(np.concatenate([x, h], -1) @ w + bias, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    return (h, c), h


def gru(reset_after: bool) -> Any:
    """Cho et al. (2014), the reset gate before the recurrent product or after it."""

    def step(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
        (h,) = carry
        x_r, x_z, x_n = np.split(x @ p.w_ih + p.b, 3, -1)
        u_r, u_z, u_n = np.split(p.w_hh, 3, -1)
        b_r, b_z, b_n = np.split(p.b_hh, 3)
        r, z = sigmoid(x_r + h @ u_r + b_r), sigmoid(x_z + h @ u_z + b_z)
        old = r * (h @ u_n + b_n) if reset_after else (r * h) @ u_n + b_n
        h = (1 - z) * np.tanh(x_n + old) + z * h
        return (h,), h

    return step


def elman(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Elman (1990)."""
    (h,) = carry
    h = np.tanh(x @ p.w_ih + h @ p.w_hh + p.b)
    return (h,), h


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


def lstmp(cell_clip: float = np.inf, proj_clip: float = np.inf) -> Any:
    """Sak et al. (2014) without peepholes and the second projection, with clips."""

    def step(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
        r, c = carry
        b = p.b if p.b_hh is None else p.b + p.b_hh
        i, f, g, o = (
            x @ w + r @ u + bias
            for w, u, bias in zip(
                np.split(p.w_ih, 4, -1),
                np.split(p.w_hh, 4, -1),
                np.split(b, 4),
                strict=True,
            )
        )
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        c = np.minimum(np.maximum(c, -cell_clip), cell_clip)
        m = sigmoid(o) * np.tanh(c)
        r = np.minimum(np.maximum(m @ p.w_hr, -proj_clip), proj_clip)
        return (r, c), r

    return step


def layer_norm(a: np.ndarray, gain: np.ndarray, bias: Any = 0.0) -> np.ndarray:
    """Ba et al. (2016), with haste's epsilon."""
    mean = a.mean(-1, keepdims=True)
    deviation = np.sqrt(np.mean((a - mean) ** 2, -1, keepdims=True) + 1e-5)
    return gain / deviation * (a - mean) + bias


def layer_norm_lstm(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Ba et al. (2016): gates normalised together, and the cell state."""
    h, c = carry
    normed = layer_norm(h @ p.w_hh, p.gamma_h) + layer_norm(x @ p.w_ih, p.gamma_x)
    i, f, g, o = np.split(normed + p.b, 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(layer_norm(c, p.gamma_c, p.beta_c))
    return (h, c), h


def layer_norm_gru(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """haste's GRU: Ba et al. (2016), but n normalised together with r and z."""
    (h,) = carry
    w_r, w_z, w_n = np.split(layer_norm(x @ p.w_ih, p.gamma_x), 3, -1)
    u_r, u_z, u_n = np.split(layer_norm(h @ p.w_hh, p.gamma_h), 3, -1)
    b_r, b_z, b_n = np.split(p.b, 3)
    r = sigmoid(w_r + u_r + b_r)
    z = sigmoid(w_z + u_z + b_z)
    n = np.tanh(w_n + b_n + r * (u_n + p.b_hh))
    h = z * h + (1 - z) * n
    return (h,), h


def block_diagonal(w_hh: np.ndarray, gate: int) -> np.ndarray:
    """The matrix ``[H, H]`` of one gate, zero between heads."""
    heads, size, _ = w_hh.shape
    whole = np.zeros((heads * size, heads * size))
    for n in range(heads):
        rows = slice(n * size, (n + 1) * size)
        whole[rows, rows] = w_hh[n, :, gate * size : (gate + 1) * size]
    return whole


def multi_head_lstm(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """An LSTM with recurrent matrices that are zero between heads."""
    h, c = carry
    i, f, g, o = (
        x @ w + h @ block_diagonal(p.w_hh, gate) + b
        for gate, (w, b) in enumerate(
            zip(np.split(p.w_ih, 4, -1), np.split(p.b, 4), strict=True)
        )
    )
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    h = sigmoid(o) * np.tanh(c)
    return (h, c), h


def multi_head_gru(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """A GRU with recurrent matrices that are zero between heads."""
    (h,) = carry
    w_r, w_z, w_n = np.split(p.w_ih, 3, -1)
    u_r, u_z, u_n = (block_diagonal(p.w_hh, gate) for gate in range(3))
    b_r, b_z, b_n = np.split(p.b, 3)
    r = sigmoid(x @ w_r + h @ u_r + b_r)
    z = sigmoid(x @ w_z + h @ u_z + b_z)
    n = np.tanh(x @ w_n + b_n + r * (h @ u_n + p.b_hh))
    h = z * h + (1 - z) * n
    return (h,), h


def mgu(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Zhou et al. (2016): one gate resets and updates."""
    (h,) = carry
    (w_f, w_n), (u_f, u_n) = np.split(p.w_ih, 2, -1), np.split(p.w_hh, 2, -1)
    b_f, b_n = np.split(p.b, 2)
    f = sigmoid(h @ u_f + x @ w_f + b_f)
    candidate = np.tanh((f * h) @ u_n + x @ w_n + b_n)
    h = (1 - f) * h + f * candidate
    return (h,), h


def mgu_reset_after(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """The formula in the docstring of flax.linen.MGUCell."""
    (h,) = carry
    (w_f, w_n), (u_f, u_n) = np.split(p.w_ih, 2, -1), np.split(p.w_hh, 2, -1)
    b_f, b_n = np.split(p.b, 2)
    f = sigmoid(x @ w_f + b_f + h @ u_f)
    n = np.tanh(x @ w_n + b_n + f * (h @ u_n + p.b_hh))
    h = (1 - f) * n + f * h
    return (h,), h


def known(cell: Any, step: Any, source: str) -> Any:
    """A cell that is held to torch with the fast tests."""
    return pytest.param(Case(cell, loop(step), source), marks=pytest.mark.slow)


CASES = [
    known(jlstm.LSTM(3, double_bias=True, learned_carry=True), lstm, "torch"),
    known(jlstm.GRU(3, double_bias=True), gru(True), "torch"),
    known(jlstm.GRU(3, double_bias=True, reset_after=False), gru(False), "Keras"),
    known(jlstm.Elman(3, learned_carry=True), elman, "torch"),
    Case(jlstm.PeepholeLSTM(3, learned_carry=True), loop(peephole), "Gers 2000"),
    Case(jlstm.CIFG(3, learned_carry=True), loop(cifg), "Greff 2017"),
    Case(
        jlstm.LSTMP(4, 2, double_bias=True, learned_carry=True),
        loop(lstmp()),
        "Sak 2014",
    ),
    Case(
        jlstm.LSTMP(2, 4, cell_clip=0.4, proj_clip=0.3),
        loop(lstmp(0.4, 0.3)),
        "Sak 2014",
        smooth=False,
    ),
    Case(
        jlstm.LayerNormLSTM(3, learned_carry=True),
        loop(layer_norm_lstm),
        "Ba 2016",
    ),
    Case(jlstm.LayerNormGRU(3, learned_carry=True), loop(layer_norm_gru), "Ba 2016"),
    Case(
        jlstm.MultiHeadLSTM(4, 2, learned_carry=True),
        loop(multi_head_lstm),
        "an LSTM whose matrices are block-diagonal",
    ),
    Case(
        jlstm.MultiHeadGRU(6, 3, learned_carry=True),
        loop(multi_head_gru),
        "a GRU whose matrices are block-diagonal",
    ),
    Case(jlstm.MGU(3, learned_carry=True), loop(mgu), "Zhou 2016"),
    Case(
        jlstm.MGU(3, reset_after=True, learned_carry=True),
        loop(mgu_reset_after),
        "flax.linen",
    ),
]
