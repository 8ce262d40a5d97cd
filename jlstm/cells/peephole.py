"""LSTM whose gates look at the cell state."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, gates, named, row, tanh
from jlstm.init import per_gate
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


@struct.dataclass
class PeepholeLSTMParams:
    """Weights of an LSTM with peepholes; gates stand in the order i, f, g, o.

    Attributes:
      w_ih: input weights, ``[D, 4H]``.
      w_hh: recurrent weights, ``[H, 4H]``.
      b: biases, ``[4H]``.
      w_ci: peephole of the input gate, ``[H]``: each unit sees its own memory.
      w_cf: peephole of the forget gate, ``[H]``.
      w_co: peephole of the output gate, ``[H]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
      c0: the learned fresh ``c``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    w_ci: Array
    w_cf: Array
    w_co: Array
    h0: Array | None = None
    c0: Array | None = None


class PeepholeLSTMCarry(NamedTuple):
    """Carry of an LSTM with peepholes.

    Attributes:
      h: the output of the step, ``[..., H]``.
      c: the memory, ``[..., H]``.
    """

    h: Array
    c: Array


def peephole_lstm_project(params: PeepholeLSTMParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def peephole_lstm_mix(
    params: PeepholeLSTMParams, carry: PeepholeLSTMCarry, zx: Array
) -> Array:
    """Computes the recurrent product ``h @ w_hh``, ``[..., 4H]``."""
    del zx
    return carry.h @ params.w_hh


def peephole_lstm_update(
    params: PeepholeLSTMParams, carry: PeepholeLSTMCarry, zx: Array, zh: Array
) -> tuple[PeepholeLSTMCarry, Array]:
    """Adds the peepholes to ``zx + zh``, ``[..., 4H]``, and applies the gates."""
    c = carry.c
    w_i, w_f, w_o = (row(w, c) for w in (params.w_ci, params.w_cf, params.w_co))
    z_i, z_f, z_g, z_o = jnp.split(zx + zh, 4, axis=-1)
    i, f = gates(jnp.concatenate([z_i + w_i * c, z_f + w_f * c], axis=-1), "ss", "if")
    c = f * c + i * named("g", tanh(z_g), tanh)
    (o,) = gates(z_o + w_o * c, "s", "o")
    h = o * tanh(c)
    return PeepholeLSTMCarry(h, c), h


def peephole_lstm_step(
    params: PeepholeLSTMParams, carry: PeepholeLSTMCarry, x: Array
) -> tuple[PeepholeLSTMCarry, Array]:
    r"""Advances an LSTM with peepholes by one time step.

    .. math::
        a_i, a_f, a_g, a_o &= x W_{ih} + h W_{hh} + b \\
        i &= \sigma(a_i + w_{ci} \odot c) \\
        f &= \sigma(a_f + w_{cf} \odot c), \qquad g = \tanh(a_g) \\
        c' &= f \odot c + i \odot g \\
        o &= \sigma(a_o + w_{co} \odot c') \\
        h' &= o \odot \tanh(c')

    The letters mean what they mean in :func:`jlstm.lstm_step`, except that :math:`a_i`,
    :math:`a_f` and :math:`a_o` lack what the peepholes add. The output gate sees the
    new memory, the other two see the old one.

    Args:
      params: the weights ``w_ih [D, 4H]``, ``w_hh [H, 4H]``, ``b [4H]``, and the
        peepholes ``w_ci``, ``w_cf`` and ``w_co``, ``[H]`` each.
      carry: ``h`` and ``c`` after the step before, ``[..., H]`` each.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.PeepholeLSTM(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Gers & Schmidhuber, Recurrent nets that time and count, 2000.
    """
    zx = peephole_lstm_project(params, x)
    return peephole_lstm_update(params, carry, zx, peephole_lstm_mix(params, carry, zx))


@config
class PeepholeLSTM:
    """LSTM with peepholes; :func:`jlstm.cells.peephole_lstm_step` has the formula.

    Its gates see the memory even while the output gate is shut. It was made for tasks
    that need precise timing.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      forget_bias: a number that ``init`` adds to the forget gate's bias; see
        :class:`jlstm.LSTM`.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      w_c_init: initialiser of the three peepholes ``[H]``. With zeros, the default, the
        cell begins as an LSTM.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

    Example:
      >>> layer = jlstm.RNN(jlstm.PeepholeLSTM(8))
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
    w_c_init: Initializer = initialisers.zeros
    b_init: Initializer = initialisers.zeros

    project = staticmethod(peephole_lstm_project)
    mix = staticmethod(peephole_lstm_mix)
    update = staticmethod(peephole_lstm_update)
    step = staticmethod(peephole_lstm_step)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def init(self, key: Array, x: Array) -> PeepholeLSTMParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 6)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 4, (size,), dtype)
        zeros = jnp.zeros((size,), dtype) if self.learned_carry else None
        return PeepholeLSTMParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 4, (x.shape[-1], size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 4, (size, size), dtype),
            b=b.at[size : 2 * size].add(jnp.asarray(self.forget_bias, dtype)),
            w_ci=self.w_c_init(keys[3], (size,), dtype),
            w_cf=self.w_c_init(keys[4], (size,), dtype),
            w_co=self.w_c_init(keys[5], (size,), dtype),
            h0=zeros,
            c0=zeros,
        )

    def init_carry(
        self, params: PeepholeLSTMParams, batch_shape: tuple[int, ...]
    ) -> PeepholeLSTMCarry:
        """Makes the fresh carry, ``[*batch_shape, H]`` each."""
        h, c = (
            fresh(leaf, self.hidden_size, batch_shape, params.w_hh)
            for leaf in (params.h0, params.c0)
        )
        return PeepholeLSTMCarry(h, c)
