"""LSTM whose input gate is what its forget gate leaves."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, gates, tanh
from jlstm.init import per_gate
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


@struct.dataclass
class CIFGParams:
    """Weights of an LSTM with coupled gates; gates stand in the order f, g, o.

    Attributes:
      w_ih: input weights, ``[D, 3H]``.
      w_hh: recurrent weights, ``[H, 3H]``.
      b: biases, ``[3H]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
      c0: the learned fresh ``c``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    h0: Array | None = None
    c0: Array | None = None


class CIFGCarry(NamedTuple):
    """Carry of an LSTM with coupled gates.

    Attributes:
      h: the output of the step, ``[..., H]``.
      c: the memory, ``[..., H]``.
    """

    h: Array
    c: Array


def cifg_project(params: CIFGParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def cifg_mix(params: CIFGParams, carry: CIFGCarry, zx: Array) -> Array:
    """Computes the recurrent product ``h @ w_hh``, ``[..., 3H]``."""
    del zx
    return carry.h @ params.w_hh


def cifg_update(
    params: CIFGParams, carry: CIFGCarry, zx: Array, zh: Array
) -> tuple[CIFGCarry, Array]:
    """Makes the gates from the pre-activations ``zx + zh``, and applies them."""
    del params
    f, g, o = gates(zx + zh, "sts", "fgo")
    c = g - f * g + f * carry.c
    h = o * tanh(c)
    return CIFGCarry(h, c), h


def cifg_step(
    params: CIFGParams, carry: CIFGCarry, x: Array
) -> tuple[CIFGCarry, Array]:
    r"""Advances an LSTM with coupled input and forget gates by one time step.

    .. math::
        a_f, a_g, a_o &= x W_{ih} + h W_{hh} + b \\
        f, o &= \sigma(a_f), \sigma(a_o), \qquad g = \tanh(a_g) \\
        c' &= f \odot c + (1 - f) \odot g \\
        h' &= o \odot \tanh(c')

    The letters mean what they mean in :func:`jlstm.lstm_step`; the input gate is what
    the forget gate leaves, :math:`1 - f`.

    Args:
      params: the weights ``w_ih [D, 3H]``, ``w_hh [H, 3H]`` and ``b [3H]``.
      carry: ``h`` and ``c`` after the step before, ``[..., H]`` each.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.CIFG(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Greff, Srivastava, Koutník, Steunebrink & Schmidhuber, LSTM: a search space
      odyssey, 2017.
    """
    zx = cifg_project(params, x)
    return cifg_update(params, carry, zx, cifg_mix(params, carry, zx))


@config
class CIFG:
    """LSTM with coupled gates; :func:`jlstm.cells.cifg_step` has the formula.

    It has three quarters of an LSTM's weights. Its memory is an average of what is
    written, so it stays within -1 and 1 if it begins there.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      forget_bias: a number that ``init`` adds to the forget gate's bias; see
        :class:`jlstm.LSTM`.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

    Example:
      >>> layer = jlstm.RNN(jlstm.CIFG(8))
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
    b_init: Initializer = initialisers.zeros

    project = staticmethod(cifg_project)
    mix = staticmethod(cifg_mix)
    update = staticmethod(cifg_update)
    step = staticmethod(cifg_step)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def init(self, key: Array, x: Array) -> CIFGParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 3)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 3, (size,), dtype)
        zeros = jnp.zeros((size,), dtype) if self.learned_carry else None
        return CIFGParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 3, (x.shape[-1], size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 3, (size, size), dtype),
            b=b.at[:size].add(jnp.asarray(self.forget_bias, dtype)),
            h0=zeros,
            c0=zeros,
        )

    def init_carry(self, params: CIFGParams, batch_shape: tuple[int, ...]) -> CIFGCarry:
        """Makes the fresh carry, ``[*batch_shape, H]`` each."""
        h, c = (
            fresh(leaf, self.hidden_size, batch_shape, params.w_hh)
            for leaf in (params.h0, params.c0)
        )
        return CIFGCarry(h, c)
