"""The cells of xLSTM, without the stabiliser but for the carry that is compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import jlstm
from jlstm.cells import MLSTMCarry, SLSTMCarry
from tests.oracles import Case, loop, sigmoid


def stabiliser(i: np.ndarray, f: np.ndarray, m: np.ndarray) -> Any:
    """Beck et al. (2024), equation 15, of the gates themselves."""
    return np.maximum(np.log(f) + m, np.log(i))


def slstm(exp_forget: bool = False) -> Any:
    """Beck et al. (2024), equations 8 to 14, a head and a gate at a time."""

    def step(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
        heads, size = p.w_hh.shape[:2]
        pre = []
        for gate in range(4):
            z = x @ np.split(p.w_ih, 4, -1)[gate] + np.split(p.b, 4)[gate]
            for head in range(heads):
                at = slice(head * size, (head + 1) * size)
                w = p.w_hh[head][:, gate * size : (gate + 1) * size]
                z[:, at] += carry.h[:, at] @ w
            pre.append(z)
        i, o = np.exp(pre[0]), sigmoid(pre[3])
        f = np.exp(pre[1]) if exp_forget else sigmoid(pre[1])
        c = f * (carry.c * np.exp(carry.m)) + i * np.tanh(pre[2])
        n = f * (carry.n * np.exp(carry.m)) + i
        h, m = o * (c / n), stabiliser(i, f, carry.m)
        return SLSTMCarry(h, c * np.exp(-m), n * np.exp(-m), m), h

    return loop(step)


def mlstm(exp_forget: bool = False) -> Any:
    """Beck et al. (2024), equations 19 to 27, a row and a head at a time."""

    def step(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
        rows, heads, key, value = carry.c.shape
        sizes = [heads * key] * 2 + [heads * value] * 2 + [heads] * 2
        parts = np.split(x @ p.w_ih + p.b, np.cumsum(sizes)[:-1], -1)
        c, n = carry.c.copy(), carry.n.copy()
        m, y = carry.m.copy(), np.zeros((rows, heads * value), carry.c.dtype)
        for row in range(rows):
            for head in range(heads):
                q, k, v, o, i, f = (
                    part[row].reshape(heads, -1)[head] for part in parts
                )
                k = k / np.sqrt(key)
                i, f = np.exp(i), np.exp(f) if exp_forget else sigmoid(f)
                before = np.exp(carry.m[row, head])
                memory = f * before * carry.c[row, head] + i * np.outer(k, v)
                keys = f * before * carry.n[row, head] + i * k
                read = (memory.T @ q) / max(abs(keys @ q), 1)
                y[row, head * value : (head + 1) * value] = sigmoid(o) * read
                (m[row, head],) = stabiliser(i, f, carry.m[row, head])
                c[row, head] = memory * np.exp(-m[row, head])
                n[row, head] = keys * np.exp(-m[row, head])
        return MLSTMCarry(c, n, m), y

    return loop(step)


CASES = [
    # Its second derivatives are 1e5 here, too many for a difference of two values.
    Case(jlstm.SLSTM(4, num_heads=2), slstm(), "Beck 2024", smooth=False),
    pytest.param(
        Case(jlstm.SLSTM(3, exp_forget=True), slstm(True), "Beck 2024"),
        marks=pytest.mark.slow,
    ),
    Case(jlstm.MLSTM(4, 2, key_size=3), mlstm(), "Beck 2024"),
    pytest.param(
        Case(jlstm.MLSTM(3, exp_forget=True), mlstm(True), "Beck 2024"),
        marks=pytest.mark.slow,
    ),
]
