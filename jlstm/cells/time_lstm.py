"""LSTM for steps at irregular times, which discounts its memory by the time between."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, tanh
from jlstm.cells.lstm import LSTMCarry, lstm_update
from jlstm.init import per_gate
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


class TimeLSTMInput(NamedTuple):
    """Input of a time-aware LSTM."""

    x: Array  # [..., D]
    elapsed: Array  # [...] or [..., 1], time since the step before, 0 or more


@struct.dataclass
class TimeLSTMParams:
    """Weights of a time-aware LSTM; gates in the order i, f, g, o."""

    w_ih: Array  # [D, 4H]
    w_hh: Array  # [H, 4H]
    b: Array  # [4H]
    w_d: Array  # [H, H], of the short-term memory
    b_d: Array  # [H]
    h0: Array | None = None  # [H], the learned fresh carry
    c0: Array | None = None  # [H]


def inverse_log(elapsed: Array) -> Array:
    r"""Decays from 1 as :math:`1 / \log(e + t)`; for times of many units."""
    # log(e + t), and exactly 1 at 0.
    return 1 / (1 + jnp.log1p(jnp.maximum(elapsed, 0) / math.e))


def inverse(elapsed: Array) -> Array:
    r"""Decays as :math:`1 / \max(t, 1)`; for times of few units.

    The paper's :math:`1 / t` would amplify memory over less than a unit of time, and
    has no value at 0.
    """
    return 1 / jnp.maximum(elapsed, 1)


def time_lstm_project(
    params: TimeLSTMParams,
    x: TimeLSTMInput,
    decay: Callable[[Array], Array] = inverse_log,
) -> tuple[Array, Array]:
    """Computes pre-activations ``[..., 4H]`` and what short-term memory loses."""
    values, elapsed = _checked(x)
    return affine(values, params.w_ih, params.b), 1 - decay(elapsed)


def time_lstm_mix(
    params: TimeLSTMParams, carry: LSTMCarry, zx: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Computes the products of ``h``, ``[..., 4H]``, and of ``c``, ``[..., H]``."""
    del zx
    return carry.h @ params.w_hh, affine(carry.c, params.w_d, params.b_d)


def time_lstm_update(
    params: TimeLSTMParams,
    carry: LSTMCarry,
    zx: tuple[Array, Array],
    zh: tuple[Array, Array],
) -> tuple[LSTMCarry, Array]:
    """Discounts the short-term memory, and applies the gates to the sum."""
    kept = carry.c - tanh(zh[1]) * zx[1]
    return lstm_update(params, LSTMCarry(carry.h, kept), zx[0], zh[0])


def time_lstm_step(
    params: TimeLSTMParams,
    carry: LSTMCarry,
    x: TimeLSTMInput,
    decay: Callable[[Array], Array] = inverse_log,
) -> tuple[LSTMCarry, Array]:
    r"""Advances a time-aware LSTM by one time step.

    .. math::
        c_s &= \tanh(c W_d + b_d) \\
        c^* &= (c - c_s) + c_s \odot g(\Delta t),
            \qquad g(\Delta t) = 1 / \log(e + \Delta t) \\
        i, f, g, o &= x W_{ih} + h W_{hh} + b \\
        c' &= \sigma(f) \odot c^* + \sigma(i) \odot \tanh(g) \\
        h' &= \sigma(o) \odot \tanh(c')

    Args:
      params: ``w_ih [D, 4H]``, ``w_hh [H, 4H]``, ``b [4H]``, ``w_d [H, H]``,
        ``b_d [H]``.
      carry: ``h`` and ``c`` of the step before, ``[..., H]`` each.
      x: ``x [..., D]`` and ``elapsed``, ``[...]`` or ``[..., 1]``; leading dimensions
        are batch dimensions.
      decay: :math:`g`, of times ``[..., 1]``.

    Returns:
      The new carry, and the output ``[..., H]``, which is the new ``h``.

    Example:
      >>> cell, ones = jlstm.TimeLSTM(8), jnp.ones((2, 3))
      >>> x = jlstm.TimeLSTMInput(ones, elapsed=jnp.ones(2))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Baytas, Xiao, Zhang, Wang, Jain & Zhou, Patient subtyping via time-aware LSTM
      networks, 2017.
    """
    zx = time_lstm_project(params, x, decay)
    return time_lstm_update(params, carry, zx, time_lstm_mix(params, carry, zx))


def _checked(x: TimeLSTMInput) -> TimeLSTMInput:
    """Makes elapsed times ``[..., 1]``."""
    if not isinstance(x, tuple) or len(x) != 2:
        raise TypeError(
            f"TimeLSTM: x must be a TimeLSTMInput, got a {type(x).__name__}"
        )
    values, elapsed = x
    lead = values.shape[:-1]
    if elapsed.shape not in (lead, (*lead, 1)):
        raise ValueError(
            f"TimeLSTM: elapsed must be {list(lead)} or {[*lead, 1]}, one time a step, "
            f"got {list(elapsed.shape)}"
        )
    return TimeLSTMInput(values, elapsed.reshape(*lead, 1).astype(float_dtype(values)))


@config
class TimeLSTM:
    """Time-aware LSTM; see :func:`jlstm.cells.time_lstm_step` for the formula.

    Inputs are :class:`TimeLSTMInput`, for a layer ``[B, T, D]`` and ``[B, T]``. A layer
    that runs in reverse takes the times as they are.

    Attributes:
      hidden_size: ``H``.
      decay: of the short-term memory: ``jlstm.cells.inverse_log`` for times of many
        units, ``jlstm.cells.inverse`` for times of few, or any module-level function
        that is finite at 0.
      forget_bias: added to the forget gate's bias at init.
      learned_carry: learns the fresh carry, which starts at zero.
      w_ih_init: initialiser of ``w_ih``, gate by gate.
      w_hh_init: initialiser of ``w_hh``, gate by gate, and of ``w_d``.
      b_init: initialiser of the biases, before ``forget_bias``.

    Example:
      >>> layer = jlstm.RNN(jlstm.TimeLSTM(8))
      >>> xs = jlstm.TimeLSTMInput(jnp.ones((2, 5, 3)), jnp.ones((2, 5)))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    decay: Callable[[Array], Array] = inverse_log
    forget_bias: float = 1.0
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    mix = staticmethod(time_lstm_mix)
    update = staticmethod(time_lstm_update)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def project(self, params: TimeLSTMParams, x: TimeLSTMInput) -> tuple[Array, Array]:
        """Computes what depends on the input alone."""
        return time_lstm_project(params, x, self.decay)

    def step(
        self, params: TimeLSTMParams, carry: LSTMCarry, x: TimeLSTMInput
    ) -> tuple[LSTMCarry, Array]:
        """Advances one step."""
        return time_lstm_step(params, carry, x, self.decay)

    def init(self, key: Array, x: TimeLSTMInput) -> TimeLSTMParams:
        """Makes params for inputs like ``x [..., D]`` with their times."""
        values = _checked(x).x
        keys = jax.random.split(key, 5)
        size, features, dtype = self.hidden_size, values.shape[-1], float_dtype(values)
        b = per_gate(self.b_init, keys[2], 4, (size,), dtype)
        zeros = jnp.zeros((size,), dtype) if self.learned_carry else None
        return TimeLSTMParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 4, (features, size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 4, (size, size), dtype),
            b=b.at[size : 2 * size].add(jnp.asarray(self.forget_bias, dtype)),
            w_d=self.w_hh_init(keys[3], (size, size), dtype),
            b_d=self.b_init(keys[4], (size,), dtype),
            h0=zeros,
            c0=zeros,
        )

    def init_carry(
        self, params: TimeLSTMParams, batch_shape: tuple[int, ...]
    ) -> LSTMCarry:
        """Makes the fresh carry, ``[*batch_shape, H]`` each."""
        h, c = (
            fresh(leaf, self.hidden_size, batch_shape, params.w_hh)
            for leaf in (params.h0, params.c0)
        )
        return LSTMCarry(h, c)
