"""LSTM in heads: the recurrent weights of a head see the ``h`` of that head alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, gates, heads_product, tanh
from jlstm.cells.lstm import LSTMCarry
from jlstm.init import per_gate, per_head
from jlstm.types import (
    Array,
    Initializer,
    check_divides,
    check_positive,
    config,
    float_dtype,
)


@struct.dataclass
class MultiHeadLSTMParams:
    """Weights of an LSTM of ``N`` heads; gates stand in the order i, f, g, o.

    Attributes:
      w_ih: input weights, ``[D, 4H]``; within each gate, head by head.
      w_hh: recurrent weights, ``[N, H/N, 4H/N]``; within each head, gate by gate.
      b: biases, ``[4H]``, in the order of ``w_ih``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
      c0: the learned fresh ``c``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    h0: Array | None = None
    c0: Array | None = None


def multi_head_lstm_project(params: MultiHeadLSTMParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def multi_head_lstm_mix(
    params: MultiHeadLSTMParams, carry: LSTMCarry, zx: Array
) -> Array:
    """Computes the recurrent products of the heads, ``[..., 4H]``."""
    del zx
    return heads_product(carry.h, params.w_hh)


def multi_head_lstm_update(
    params: MultiHeadLSTMParams, carry: LSTMCarry, zx: Array, zh: Array
) -> tuple[LSTMCarry, Array]:
    """Makes the gates from the pre-activations ``zx + zh``, and applies them."""
    del params
    i, f, g, o = gates(zx + zh, "ssts", "ifgo")
    c = f * carry.c + i * g
    h = o * tanh(c)
    return LSTMCarry(h, c), h


def multi_head_lstm_step(
    params: MultiHeadLSTMParams, carry: LSTMCarry, x: Array
) -> tuple[LSTMCarry, Array]:
    r"""Advances an LSTM of several heads by one time step.

    .. math::
        a_i &= x W_{ih}^i + (h_1 W_{hh,1}^i, \dots, h_N W_{hh,N}^i) + b^i, \qquad
            \text{likewise } a_f, a_g, a_o \\
        i, f, o &= \sigma(a_i), \sigma(a_f), \sigma(a_o), \qquad g = \tanh(a_g) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    where :math:`h_1, \dots, h_N` are the ``H/N`` features of each head, and a
    superscript takes the columns of a gate. The other letters mean what they mean in
    :func:`jlstm.lstm_step`. Heads do not see each other within a layer; the next layer
    mixes them.

    Args:
      params: the weights ``w_ih [D, 4H]``, ``w_hh [N, H/N, 4H/N]`` and ``b [4H]``, for
        ``N`` heads.
      carry: ``h`` and ``c`` after the step before, ``[..., H]`` each.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.MultiHeadLSTM(8, num_heads=2), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape, params.w_hh.shape
      ((2, 8), (2, 4, 16))

    References:
      Beck et al., xLSTM: extended long short-term memory, 2024 (heads).
    """
    zx = multi_head_lstm_project(params, x)
    zh = multi_head_lstm_mix(params, carry, zx)
    return multi_head_lstm_update(params, carry, zx, zh)


@config
class MultiHeadLSTM:
    """LSTM in heads; :func:`jlstm.cells.multi_head_lstm_step` has the formula.

    It has an N-th of an LSTM's recurrent weights and operations. With one head it
    computes what :class:`jlstm.LSTM` computes.

    Attributes:
      hidden_size: ``H``, the number of units of all heads together, which is also the
        size of the output.
      num_heads: ``N``, which must divide ``H``.
      forget_bias: a number that ``init`` adds to the forget gate's bias; see
        :class:`jlstm.LSTM`.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate of each head.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

    Example:
      >>> layer = jlstm.RNN(jlstm.MultiHeadLSTM(8, num_heads=2))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    num_heads: int
    forget_bias: float = 1.0
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    project = staticmethod(multi_head_lstm_project)
    mix = staticmethod(multi_head_lstm_mix)
    update = staticmethod(multi_head_lstm_update)
    step = staticmethod(multi_head_lstm_step)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "num_heads")
        check_divides(self, "num_heads", "hidden_size")

    def init(self, key: Array, x: Array) -> MultiHeadLSTMParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 3)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 4, (size,), dtype)
        zeros = jnp.zeros((size,), dtype) if self.learned_carry else None
        return MultiHeadLSTMParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 4, (x.shape[-1], size), dtype),
            w_hh=per_head(self.w_hh_init, keys[1], self.num_heads, 4, size, dtype),
            b=b.at[size : 2 * size].add(jnp.asarray(self.forget_bias, dtype)),
            h0=zeros,
            c0=zeros,
        )

    def init_carry(
        self, params: MultiHeadLSTMParams, batch_shape: tuple[int, ...]
    ) -> LSTMCarry:
        """Makes the fresh carry, ``[*batch_shape, H]`` each."""
        h, c = (
            fresh(leaf, self.hidden_size, batch_shape, params.w_hh)
            for leaf in (params.h0, params.c0)
        )
        return LSTMCarry(h, c)
