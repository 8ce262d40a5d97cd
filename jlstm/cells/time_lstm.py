"""LSTM for steps at irregular times, whose memory fades with the time between them."""

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
    """Input of a time-aware LSTM.

    Attributes:
      x: the input, ``[..., D]``.
      elapsed: the time since the step before, 0 or more, ``[...]`` or ``[..., 1]``; its
        unit decides how fast memory fades, see :class:`jlstm.TimeLSTM`.
    """

    x: Array
    elapsed: Array


@struct.dataclass
class TimeLSTMParams:
    """Weights of a time-aware LSTM; gates stand in the order i, f, g, o.

    Attributes:
      w_ih: input weights, ``[D, 4H]``.
      w_hh: recurrent weights, ``[H, 4H]``.
      b: biases, ``[4H]``.
      w_d: weights that take the short-term part out of the memory, ``[H, H]``.
      b_d: their biases, ``[H]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
      c0: the learned fresh ``c``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    w_d: Array
    b_d: Array
    h0: Array | None = None
    c0: Array | None = None


def inverse_log(elapsed: Array) -> Array:
    r"""Decays from 1 as :math:`1 / \log(e + t)`, slowly: for times of many units.

    Args:
      elapsed: times ``t`` of any shape; negative ones count as 0.

    Example:
      >>> float(jlstm.cells.inverse_log(jnp.array(0.0)))
      1.0
    """
    # log(e + t), and exactly 1 at 0.
    return 1 / (1 + jnp.log1p(jnp.maximum(elapsed, 0) / math.e))


def inverse(elapsed: Array) -> Array:
    r"""Decays from 1 as :math:`1 / \max(t, 1)`, fast: for times of few units.

    The paper's :math:`1 / t` would amplify the memory for times below 1, and has no
    value at 0.

    Args:
      elapsed: times ``t`` of any shape.

    Example:
      >>> jlstm.cells.inverse(jnp.array([0.0, 1.0, 4.0])).tolist()
      [1.0, 1.0, 0.25]
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
    """Takes off what the short-term memory loses, and applies the gates."""
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
        c^* &= (c - c_s) + c_s \odot d(\Delta t),
            \qquad d(\Delta t) = 1 / \log(e + \Delta t) \\
        a_i, a_f, a_g, a_o &= x W_{ih} + h W_{hh} + b \\
        i, f, o &= \sigma(a_i), \sigma(a_f), \sigma(a_o), \qquad g = \tanh(a_g) \\
        c' &= f \odot c^* + i \odot g \\
        h' &= o \odot \tanh(c')

    where :math:`c_s` is the short-term part of the memory, which fades with the time
    :math:`\Delta t` since the step before; the rest, :math:`c - c_s`, does not. The
    other letters mean what they mean in :func:`jlstm.lstm_step`.

    Args:
      params: the weights ``w_ih [D, 4H]``, ``w_hh [H, 4H]``, ``b [4H]``, ``w_d [H, H]``
        and ``b_d [H]``.
      carry: ``h`` and ``c`` after the step before, ``[..., H]`` each.
      x: a :class:`jlstm.TimeLSTMInput`: ``x [..., D]`` and ``elapsed``, ``[...]`` or
        ``[..., 1]``; leading dimensions are batch dimensions.
      decay: the function :math:`d`, called with times ``[..., 1]``.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

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
            f"TimeLSTM: elapsed must be {list(lead)} or {[*lead, 1]}, one time for "
            f"each step, got {list(elapsed.shape)}"
        )
    return TimeLSTMInput(values, elapsed.reshape(*lead, 1).astype(float_dtype(values)))


@config
class TimeLSTM:
    """Time-aware LSTM; :func:`jlstm.cells.time_lstm_step` has the formula.

    A layer takes a :class:`TimeLSTMInput` of ``[B, T, D]`` and ``[B, T]``. One that
    runs in reverse reads the times as they stand: nothing turns them into the times to
    the next step.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      decay: the function by which the short-term memory fades:
        ``jlstm.cells.inverse_log``, the default, for times of many units, such as days
        over years; ``jlstm.cells.inverse`` for times of few units; or any module-level
        function that is finite at 0.
      forget_bias: a number that ``init`` adds to the forget gate's bias; see
        :class:`jlstm.LSTM`.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate, and of ``w_d``.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

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
