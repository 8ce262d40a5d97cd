"""LSTM whose pre-activations are normalised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import add_vector, fresh, gates, normalise, tanh
from jlstm.cells.lstm import LSTMCarry
from jlstm.init import per_gate
from jlstm.types import (
    Array,
    Initializer,
    check_positive,
    config,
    float_dtype,
)


@struct.dataclass
class LayerNormLSTMParams:
    """Weights of a normalised LSTM; gates stand in the order i, f, g, o.

    Attributes:
      w_ih: input weights, ``[D, 4H]``.
      w_hh: recurrent weights, ``[H, 4H]``.
      b: biases, ``[4H]``.
      gamma_x: the scale of the normalised ``x @ w_ih``, ``[4H]``.
      gamma_h: the scale of the normalised ``h @ w_hh``, ``[4H]``.
      gamma_c: the scale of the normalised memory, ``[H]``.
      beta_c: the shift of the normalised memory, ``[H]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
      c0: the learned fresh ``c``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    gamma_x: Array
    gamma_h: Array
    gamma_c: Array
    beta_c: Array
    h0: Array | None = None
    c0: Array | None = None


def layer_norm_lstm_project(params: LayerNormLSTMParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return add_vector(normalise(x @ params.w_ih, params.gamma_x), params.b)


def layer_norm_lstm_mix(
    params: LayerNormLSTMParams, carry: LSTMCarry, zx: Array
) -> Array:
    """Computes the recurrent product ``h @ w_hh``, ``[..., 4H]``."""
    del zx
    return carry.h @ params.w_hh


def layer_norm_lstm_update(
    params: LayerNormLSTMParams, carry: LSTMCarry, zx: Array, zh: Array
) -> tuple[LSTMCarry, Array]:
    """Normalises ``zh [..., 4H]``, and applies the gates."""
    i, f, g, o = gates(zx + normalise(zh, params.gamma_h), "ssts", "ifgo")
    c = f * carry.c + i * g
    h = o * tanh(add_vector(normalise(c, params.gamma_c), params.beta_c))
    return LSTMCarry(h, c), h


def layer_norm_lstm_step(
    params: LayerNormLSTMParams, carry: LSTMCarry, x: Array
) -> tuple[LSTMCarry, Array]:
    r"""Advances a normalised LSTM by one time step.

    .. math::
        N(a; \gamma) &= \gamma \odot \frac{a - \mu}{\sqrt{s^2 + 10^{-5}}} \\
        a_i, a_f, a_g, a_o &= N(x W_{ih}; \gamma_x) + N(h W_{hh}; \gamma_h) + b \\
        i, f, o &= \sigma(a_i), \sigma(a_f), \sigma(a_o), \qquad g = \tanh(a_g) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(N(c'; \gamma_c) + \beta_c)

    where :math:`\mu` and :math:`s^2` are the mean and the variance of the last axis: of
    all four gates together, and of the memory. The other letters mean what they mean in
    :func:`jlstm.lstm_step`.

    Args:
      params: the weights ``w_ih [D, 4H]``, ``w_hh [H, 4H]``, ``b``, ``gamma_x`` and
        ``gamma_h`` ``[4H]``, ``gamma_c`` and ``beta_c`` ``[H]``.
      carry: ``h`` and ``c`` after the step before, ``[..., H]`` each.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.LayerNormLSTM(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Ba, Kiros & Hinton, Layer normalization, 2016.
    """
    zx = layer_norm_lstm_project(params, x)
    zh = layer_norm_lstm_mix(params, carry, zx)
    return layer_norm_lstm_update(params, carry, zx, zh)


@config
class LayerNormLSTM:
    """Normalised LSTM; :func:`jlstm.cells.layer_norm_lstm_step` has the formula.

    It is steadier than an LSTM where inputs vary much in size.

    Take care of sequences that begin with zeros. While inputs, carry and biases are all
    zero, a step divides by the square root of :math:`10^{-5}`, which multiplies
    gradients by hundreds or more, and ten such steps overflow. Mask these steps, or
    give ``b_init=jlstm.init.Normal(0.1)``.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      forget_bias: a number that ``init`` adds to the forget gate's bias; see
        :class:`jlstm.LSTM`.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      gamma_init: initialiser of the three scales.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added, and of
        ``beta_c``.

    Example:
      >>> layer = jlstm.RNN(jlstm.LayerNormLSTM(8))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    forget_bias: float = 1.0
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    gamma_init: Initializer = initialisers.ones
    b_init: Initializer = initialisers.zeros

    project = staticmethod(layer_norm_lstm_project)
    mix = staticmethod(layer_norm_lstm_mix)
    update = staticmethod(layer_norm_lstm_update)
    step = staticmethod(layer_norm_lstm_step)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def init(self, key: Array, x: Array) -> LayerNormLSTMParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 7)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 4, (size,), dtype)
        zeros = jnp.zeros((size,), dtype) if self.learned_carry else None
        return LayerNormLSTMParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 4, (x.shape[-1], size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 4, (size, size), dtype),
            b=b.at[size : 2 * size].add(jnp.asarray(self.forget_bias, dtype)),
            gamma_x=per_gate(self.gamma_init, keys[3], 4, (size,), dtype),
            gamma_h=per_gate(self.gamma_init, keys[4], 4, (size,), dtype),
            gamma_c=self.gamma_init(keys[5], (size,), dtype),
            beta_c=self.b_init(keys[6], (size,), dtype),
            h0=zeros,
            c0=zeros,
        )

    def init_carry(
        self, params: LayerNormLSTMParams, batch_shape: tuple[int, ...]
    ) -> LSTMCarry:
        """Makes the fresh carry, ``[*batch_shape, H]`` each."""
        h, c = (
            fresh(leaf, self.hidden_size, batch_shape, params.w_hh)
            for leaf in (params.h0, params.c0)
        )
        return LSTMCarry(h, c)
