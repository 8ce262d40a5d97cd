"""Other activations, and wrappers in their deterministic forms."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

import jlstm
from tests.oracles import Case, loop, sigmoid
from tests.oracles.gated import lstm

LSTM = jlstm.LSTM(4)


def zoneout(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Krueger et al. (2017), the expectation."""
    (h, c), _ = lstm(p, carry, x)
    h, c = 0.3 * carry[0] + 0.7 * h, 0.6 * carry[1] + 0.4 * c
    return (h, c), h


def weight_norm(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Salimans & Kingma (2016), column by column."""
    columns = [
        g * v / np.sqrt((v**2).sum())
        for g, v in zip(p.scale["w_hh"], p.cell.w_hh.T, strict=True)
    ]
    return lstm(p.cell.replace(w_hh=np.stack(columns, 1)), carry, x)


def clipped(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Sak et al. (2014)."""
    (h, c), _ = lstm(p, carry, x)
    return (h, np.minimum(np.maximum(c, -0.4), 0.4)), h


def residual(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """The sum of input and output."""
    carry, y = lstm(p, carry, x)
    return carry, x + y


def hard(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Keras' LSTM of old: hard sigmoids, here with a softsign."""
    h, c = carry
    z = x @ p.w_ih + h @ p.w_hh + p.b
    i, f, g, o = np.split(z, 4, -1)
    i, f, o = (hard_sigmoid(a) for a in (i, f, o))
    c = f * c + i * soft_sign(g)
    h = o * soft_sign(c)
    return (h, c), h


def gru(p: Any, carry: Any, x: np.ndarray, gate: Any, activation: Any) -> Any:
    """Cho et al. (2014), reset after the product as in cuDNN."""
    (h,) = carry
    x_r, x_z, x_n = np.split(x @ p.w_ih + p.b, 3, -1)
    h_r, h_z, h_n = np.split(h @ p.w_hh, 3, -1)
    r, z = gate(x_r + h_r), gate(x_z + h_z)
    n = activation(x_n + r * (h_n + p.b_hh))
    h = (1 - z) * n + z * h
    return (h,), h


def hard_sigmoid(x: np.ndarray) -> np.ndarray:
    """Of Keras."""
    return np.clip(x / 6 + 0.5, 0, 1)


def soft_sign(x: np.ndarray) -> np.ndarray:
    """Turian et al. (2009)."""
    return x / (1 + np.abs(x))


SOFT = functools.partial(gru, gate=hard_sigmoid, activation=soft_sign)
PLAIN = functools.partial(gru, gate=sigmoid, activation=np.tanh)

CASES = [
    Case(LSTM, loop(lstm), "Gers 2000"),
    Case(jlstm.GRU(3), loop(PLAIN), "Cho 2014"),
    Case(
        jlstm.LSTM(4, 1.0, jax.nn.soft_sign, jax.nn.hard_sigmoid), loop(hard), "Keras 2"
    ),
    Case(
        jlstm.GRU(3, activation=jax.nn.soft_sign, gate_activation=jax.nn.hard_sigmoid),
        loop(SOFT),
        "Cho 2014",
    ),
    Case(jlstm.Zoneout(LSTM, h=0.3, c=0.6), loop(zoneout), "Krueger 2017"),
    Case(jlstm.VariationalDropout(LSTM, 0.2, 0.3), loop(lstm), "Gal 2016, no key"),
    Case(jlstm.DropConnect(LSTM, 0.5), loop(lstm), "Wan 2013, no key"),
    Case(jlstm.WeightNorm(LSTM), loop(weight_norm), "Salimans 2016"),
    Case(jlstm.ClipCarry(LSTM, 0.4, ("c",)), loop(clipped), "Sak 2014", smooth=False),
    Case(jlstm.ResidualCell(LSTM), loop(residual), "He 2016"),
]
