"""Cells of one formula each: simple ones, on grids, and at irregular times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlstm
from tests.oracles import Case, loop, sigmoid


def relu(x: np.ndarray) -> np.ndarray:
    """The positive part."""
    return np.maximum(x, 0)


def ind_rnn(activation: Callable) -> Callable:
    """Li et al. (2018), equation 2; each unit has one weight of its own."""

    def step(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
        (h,) = carry
        h = activation(x @ p.w_ih + p.u * h + p.b)
        return (h,), h

    return step


def irnn(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
    """Le et al. (2015): a simple recurrent network of rectified linear units."""
    (h,) = carry
    h = relu(x @ p.w_ih + h @ p.w_hh + p.b)
    return (h,), h


def convolved(
    x: np.ndarray,
    w: np.ndarray,
    strides: tuple[int, ...] | None = None,
    dilation: tuple[int, ...] | None = None,
    valid: bool = False,
) -> np.ndarray:
    """Correlates ``x [B, *S, D]`` with ``w [*K, D, G]``, one place after another."""
    kernel = w.shape[:-2]
    strides, dilation = strides or (1,) * len(kernel), dilation or (1,) * len(kernel)
    sizes, pads = [], []
    for n, k, s, d in zip(x.shape[1:-1], kernel, strides, dilation, strict=True):
        span = d * (k - 1) + 1
        sizes.append((n - span) // s + 1 if valid else -(-n // s))
        missing = max((sizes[-1] - 1) * s + span - n, 0)
        pads.append((missing // 2, missing - missing // 2))
    x = np.pad(x, [(0, 0), *pads, (0, 0)])
    out = np.zeros((len(x), *sizes, w.shape[-1]))
    for place in np.ndindex(*sizes):
        for tap in np.ndindex(*kernel):
            at = zip(place, strides, tap, dilation, strict=True)
            seen = x[(slice(None), *(p * s + t * d for p, s, t, d in at))]
            out[(slice(None), *place)] += seen @ w[tap]
    return out


def conv_lstm(**options: Any) -> Callable:
    """Shi et al. (2015), equations 3, without the terms of the peepholes."""

    def step(p: Any, carry: Any, x: np.ndarray) -> tuple[Any, np.ndarray]:
        h, c = carry
        z = []
        for w_x, w_h, b in zip(
            *(np.split(leaf, 4, -1) for leaf in (p.w_ih, p.w_hh, p.b)), strict=True
        ):
            z.append(convolved(x, w_x, **options) + convolved(h, w_h) + b)
        c = sigmoid(z[1]) * c + sigmoid(z[0]) * np.tanh(z[2])
        h = sigmoid(z[3]) * np.tanh(c)
        return (h, c), h

    return step


def gru_d(p: Any, carry: Any, given: Any) -> tuple[Any, np.ndarray]:
    """Che et al. (2018), equations 10 to 17, with both decays and the mask."""
    (h, last), (x, mask, delta) = carry, given
    m = (mask > 0).astype(float)
    gamma_x = np.exp(-relu(delta * p.w_dx + p.b_dx))
    gamma_h = np.exp(-relu(delta @ p.w_dh + p.b_dh))
    imputed = m * x + (1 - m) * (gamma_x * last + (1 - gamma_x) * p.mean)
    h = gamma_h * h
    (w_r, w_z, w_n), (v_r, v_z, v_n), (u_r, u_z, u_n), (b_r, b_z, b_n) = (
        np.split(leaf, 3, -1) for leaf in (p.w_ih, p.w_mh, p.w_hh, p.b)
    )
    r = sigmoid(imputed @ w_r + h @ u_r + m @ v_r + b_r)
    z = sigmoid(imputed @ w_z + h @ u_z + m @ v_z + b_z)
    n = np.tanh(imputed @ w_n + (r * h) @ u_n + m @ v_n + b_n)
    h = (1 - z) * h + z * n
    return (h, np.where(mask > 0, x, last)), h


def time_lstm(decay: Callable) -> Callable:
    """Baytas et al. (2017), section 3.2."""

    def step(p: Any, carry: Any, given: Any) -> tuple[Any, np.ndarray]:
        (h, c), (x, elapsed) = carry, given
        short = np.tanh(c @ p.w_d + p.b_d)
        discounted = short * decay(elapsed.reshape(-1, 1))
        c = (c - short) + discounted
        (w_i, w_f, w_g, w_o), (u_i, u_f, u_g, u_o), (b_i, b_f, b_g, b_o) = (
            np.split(leaf, 4, -1) for leaf in (p.w_ih, p.w_hh, p.b)
        )
        f = sigmoid(x @ w_f + h @ u_f + b_f)
        i = sigmoid(x @ w_i + h @ u_i + b_i)
        o = sigmoid(x @ w_o + h @ u_o + b_o)
        c = f * c + i * np.tanh(x @ w_g + h @ u_g + b_g)
        h = o * np.tanh(c)
        return (h, c), h

    return step


def inverse_log(elapsed: np.ndarray) -> np.ndarray:
    """Its decay for long times; times below zero count as zero."""
    return 1 / np.log(np.e + relu(elapsed))


def inverse(elapsed: np.ndarray) -> np.ndarray:
    """Its decay for short times, where they are above 1."""
    return np.where(elapsed > 1, 1 / np.where(elapsed > 1, elapsed, 1), 1)


def like(*shape: int) -> Any:
    """An array of an input at one step."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def slow(*args: Any, **options: Any) -> Any:
    """A case for the slow tests alone."""
    return pytest.param(Case(*args, **options), marks=pytest.mark.slow)


SERIES = jlstm.GRUDInput(like(4), like(4), like(4))
IRNN = {"activation": jax.nn.relu, "w_hh_init": jlstm.init.Identity(0.5)}
CASES = [
    Case(
        jlstm.IndRNN(3, learned_carry=True),
        loop(ind_rnn(relu)),
        "Li 2018",
        smooth=False,
    ),
    slow(jlstm.IndRNN(3, activation=jlstm.tanh), loop(ind_rnn(np.tanh)), "Li 2018"),
    slow(jlstm.Elman(3, **IRNN), loop(irnn), "Le 2015", smooth=False),
    Case(
        jlstm.ConvLSTM(2, (2, 3), (3, 4), learned_carry=True),
        loop(conv_lstm()),
        "Shi 2015",
        like(3, 4, 2),
    ),
    slow(
        jlstm.ConvLSTM(2, 2, (7,), strides=2, padding="VALID", dilation=2),
        loop(conv_lstm(strides=(2,), dilation=(2,), valid=True)),
        "Shi 2015, Keras",
        like(7, 3),
    ),
    slow(
        jlstm.ConvLSTM(1, 2, (2, 3, 2), strides=(1, 2, 1), dilation=(1, 1, 2)),
        loop(conv_lstm(strides=(1, 2, 1), dilation=(1, 1, 2))),
        "Shi 2015, Keras",
        like(2, 3, 2, 2),
    ),
    Case(jlstm.GRUD(3, learned_carry=True), loop(gru_d), "Che 2018", SERIES),
    Case(
        jlstm.TimeLSTM(3, learned_carry=True),
        loop(time_lstm(inverse_log)),
        "Baytas 2017",
        jlstm.TimeLSTMInput(like(4), like()),
    ),
    slow(
        jlstm.TimeLSTM(3, decay=jlstm.cells.inverse),
        loop(time_lstm(inverse)),
        "Baytas 2017",
        jlstm.TimeLSTMInput(like(4), like(1)),
    ),
]
