"""Cells whose recurrence is linear."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jlstm
from tests.oracles import Case, loop, sigmoid


def positive(x: np.ndarray) -> np.ndarray:
    """The candidate of Feng et al. (2024), appendix B."""
    return np.piecewise(x, [x >= 0, x < 0], [lambda x: x + 0.5, sigmoid])


def min_lstm(activation: Any = lambda x: x) -> Any:
    """Feng et al. (2024), section 3.2."""

    def step(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
        w_i, w_f, w_g = np.split(p.w_ih, 3, -1)
        b_i, b_f, b_g = np.split(p.b, 3)
        f, i = sigmoid(x @ w_f + b_f), sigmoid(x @ w_i + b_i)
        candidate = activation(x @ w_g + b_g)
        h = f / (f + i) * carry.h + i / (f + i) * candidate
        return jlstm.cells.MinLSTMCarry(h), h

    return loop(step)


def min_gru(activation: Any = lambda x: x) -> Any:
    """Feng et al. (2024), section 3.1."""

    def step(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
        w_z, w_n = np.split(p.w_ih, 2, -1)
        b_z, b_n = np.split(p.b, 2)
        z = sigmoid(x @ w_z + b_z)
        h = (1 - z) * carry.h + z * activation(x @ w_n + b_n)
        return jlstm.cells.MinGRUCarry(h), h

    return loop(step)


def lru(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Orvieto et al. (2023), appendix A, in complex numbers."""
    eigenvalues = np.exp(-np.exp(p.nu_log) + 1j * np.exp(p.theta_log))
    b, c = p.b_re + 1j * p.b_im, p.c_re + 1j * p.c_im
    s = eigenvalues * (carry.re + 1j * carry.im) + np.exp(p.gamma_log) * (x @ b)
    return jlstm.cells.LRUCarry(s.real, s.imag), (s @ c).real + x @ p.d


_POSITIVE = jlstm.cells.positive

CASES = [
    Case(jlstm.MinLSTM(3, learned_carry=True), min_lstm(), "Feng 2024"),
    pytest.param(
        Case(
            jlstm.MinLSTM(3, _POSITIVE), min_lstm(positive), "Feng 2024", smooth=False
        ),
        marks=pytest.mark.slow,
    ),
    Case(jlstm.MinGRU(3, learned_carry=True), min_gru(), "Feng 2024"),
    pytest.param(
        Case(jlstm.MinGRU(3, jax.numpy.tanh), min_gru(np.tanh), "with a tanh"),
        marks=pytest.mark.slow,
    ),
    Case(jlstm.LRU(3, state_size=2), loop(lru), "Orvieto 2023"),
]
