"""The sLSTM: exponential gates, a normaliser, and heads that do not see each other."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, gates, heads_product, named
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
class SLSTMParams:
    """Weights of an sLSTM of ``N`` heads; gates stand in the order i, f, z, o.

    Attributes:
      w_ih: input weights, ``[D, 4H]``; within each gate, head by head.
      w_hh: recurrent weights, ``[N, H/N, 4H/N]``; within each head, gate by gate.
      b: biases, ``[4H]``, in the order of ``w_ih``.
    """

    w_ih: Array
    w_hh: Array
    b: Array


class SLSTMCarry(NamedTuple):
    """Carry of an sLSTM; where ``n`` is 0, nothing has been seen yet.

    Attributes:
      h: the output of the step, ``[..., H]``.
      c: the memory divided by ``exp(m)``, ``[..., H]``: a weighted sum of candidates.
      n: the sum of their weights divided by ``exp(m)``, ``[..., H]``.
      m: the logarithm of the scale of ``c`` and ``n``, ``[..., H]``.
    """

    h: Array
    c: Array
    n: Array
    m: Array


def slstm_project(params: SLSTMParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def slstm_mix(params: SLSTMParams, carry: SLSTMCarry, zx: Array) -> Array:
    """Computes the recurrent product, head by head, ``[..., 4H]``."""
    del zx
    return heads_product(carry.h, params.w_hh)


def slstm_update(
    params: SLSTMParams,
    carry: SLSTMCarry,
    zx: Array,
    zh: Array,
    exp_forget: bool = False,
) -> tuple[SLSTMCarry, Array]:
    """Makes the gates from the pre-activations ``zx + zh``, and applies them."""
    del params
    log_i, z_f, z_z, z_o = jnp.split(zx + zh, 4, axis=-1)
    z, o = gates(jnp.concatenate([z_z, z_o], axis=-1), "ts", "zo")
    log_f = z_f if exp_forget else -jax.nn.softplus(-z_f)
    # Before the first input m has no meaning; a large one must not hide the input.
    kept = jnp.where(carry.n == 0, log_i, log_f + carry.m)
    m = jnp.maximum(kept, log_i)
    i, f = named("i", jnp.exp(log_i - m)), named("f", jnp.exp(kept - m))
    c, n = f * carry.c + i * z, f * carry.n + i
    h = o * (c / n)
    return SLSTMCarry(h, c, n, m), h


def slstm_step(
    params: SLSTMParams, carry: SLSTMCarry, x: Array, exp_forget: bool = False
) -> tuple[SLSTMCarry, Array]:
    r"""Advances an sLSTM by one time step.

    .. math::
        a_i, a_f, a_z, a_o &= x W_{ih} + h W_{hh} + b \\
        i &= e^{a_i}, \qquad f = \sigma(a_f) \text{ or } e^{a_f} \\
        z &= \tanh(a_z), \qquad o = \sigma(a_o) \\
        c' &= f \odot c + i \odot z, \qquad n' = f \odot n + i \\
        h' &= o \odot c' / n'

    where the :math:`W_{hh}` of each gate is block-diagonal, with one block for each
    head. As in the paper, :math:`z` is the candidate, and :math:`n` the normaliser. An
    exponential input gate can outweigh everything that came before. So that no
    exponential overflows, the carry holds :math:`e^{-m} c` and :math:`e^{-m} n` instead
    of :math:`c` and :math:`n`, with

    .. math::
        m' = \max(\log f + m, a_i)

    and :math:`m' = a_i` at the first step. The gates are scaled too:
    :func:`jlstm.diagnostics.trace` shows :math:`e^{-m'} i` and :math:`e^{m - m'} f`,
    and 1 for the latter at the first step.

    Args:
      params: the weights ``w_ih [D, 4H]``, ``w_hh [N, H/N, 4H/N]`` and ``b [4H]``, for
        ``N`` heads.
      carry: ``h``, ``c``, ``n`` and ``m`` after the step before, ``[..., H]`` each.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      exp_forget: true makes the forget gate an exponential in the place of a sigmoid.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.SLSTM(8, num_heads=2), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Beck et al., xLSTM: extended long short-term memory, 2024.
    """
    zx = slstm_project(params, x)
    return slstm_update(params, carry, zx, slstm_mix(params, carry, zx), exp_forget)


@config
class SLSTM:
    """An LSTM with exponential gates; :func:`jlstm.cells.slstm_step` has the formula.

    A single step can outweigh all that came before it, and so revise what is stored.

    Attributes:
      hidden_size: ``H``, the number of units of all heads together, which is also the
        size of the output.
      num_heads: ``N``, which must divide ``H``. Units see the ``h`` of their own head
        alone; more heads mean fewer recurrent weights.
      exp_forget: true makes the forget gate an exponential, false, the default, a
        sigmoid. The paper allows both.
      forget_bias: a number that ``init`` adds to the forget gate's bias; see
        :class:`jlstm.LSTM`.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate of each head.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

    Example:
      >>> layer = jlstm.RNN(jlstm.SLSTM(8, num_heads=2))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape, carry.m.shape
      ((2, 5, 8), (2, 8))
    """

    hidden_size: int
    num_heads: int = 1
    exp_forget: bool = False
    forget_bias: float = 1.0
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    project = staticmethod(slstm_project)
    mix = staticmethod(slstm_mix)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "num_heads")
        check_divides(self, "num_heads", "hidden_size")

    def update(
        self, params: SLSTMParams, carry: SLSTMCarry, zx: Array, zh: Array
    ) -> tuple[SLSTMCarry, Array]:
        """Applies the gates."""
        return slstm_update(params, carry, zx, zh, self.exp_forget)

    def step(
        self, params: SLSTMParams, carry: SLSTMCarry, x: Array
    ) -> tuple[SLSTMCarry, Array]:
        """Advances one step."""
        return slstm_step(params, carry, x, self.exp_forget)

    def init(self, key: Array, x: Array) -> SLSTMParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 3)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 4, (size,), dtype)
        return SLSTMParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 4, (x.shape[-1], size), dtype),
            w_hh=per_head(self.w_hh_init, keys[1], self.num_heads, 4, size, dtype),
            b=b.at[size : 2 * size].add(jnp.asarray(self.forget_bias, dtype)),
        )

    def init_carry(
        self, params: SLSTMParams, batch_shape: tuple[int, ...]
    ) -> SLSTMCarry:
        """Makes the fresh carry, ``[*batch_shape, H]`` each."""
        size = self.hidden_size
        h, c, n, m = (fresh(None, size, batch_shape, params.b) for _ in range(4))
        return SLSTMCarry(h, c, n, m)
