"""The mLSTM: a matrix memory of keys and values, without a recurrent product."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, gates, named
from jlstm.types import (
    Array,
    Initializer,
    check_divides,
    check_positive,
    config,
    float_dtype,
)

# The logarithm of the weight of an empty memory. It is finite, because a masked step
# keeps it.
NOTHING = -1e4


@struct.dataclass
class MLSTMParams:
    """Weights of an mLSTM of ``N`` heads; parts stand in the order q, k, v, o, i, f.

    Attributes:
      w_ih: input weights, ``[D, G]`` with ``G = 2NK + 2H + 2N``: queries and keys of
        size K, values, output gates, and two scalar gates for each head.
      b: biases, ``[G]``.
    """

    w_ih: Array
    b: Array


class MLSTMCarry(NamedTuple):
    """Carry of an mLSTM of ``N`` heads, with keys of size ``K``, values of ``H/N``.

    Attributes:
      c: the memory divided by ``exp(m)``, a matrix for each head, ``[..., N, K, H/N]``.
      n: the weighted sum of the keys in it, divided by ``exp(m)``, ``[..., N, K]``.
      m: the logarithm of the scale of ``c`` and ``n``, ``[..., N]``.
    """

    c: Array
    n: Array
    m: Array


class MLSTMGates(NamedTuple):
    """What an input says, head by head."""

    q: Array  # [..., N, K]
    k: Array  # [..., N, K]
    v: Array  # [..., N, H/N]
    o: Array  # [..., H]
    log_i: Array  # [..., N]
    log_f: Array  # [..., N]


def mlstm_project(params: MLSTMParams, x: Array) -> Array:
    """Computes the pre-activations, ``[..., G]``."""
    return affine(x, params.w_ih, params.b)


def mlstm_mix(params: MLSTMParams, carry: MLSTMCarry, zx: Array) -> tuple:
    """Has no recurrent product."""
    del params, carry, zx
    return ()


def mlstm_gates(
    zx: Array, like: tuple[int, ...], exp_forget: bool = False
) -> MLSTMGates:
    """Cuts pre-activations ``zx [..., G]`` into parts, for ``(N, K, H/N)``."""
    count, key, value = like
    ends = np.cumsum([count * key] * 2 + [count * value] * 2 + [count])
    z_q, z_k, z_v, z_o, log_i, z_f = jnp.split(zx, ends, axis=-1)
    q, k, v = (z.reshape(*z.shape[:-1], count, -1) for z in (z_q, z_k, z_v))
    (o,) = gates(z_o, "s", "o")
    log_f = z_f if exp_forget else -jax.nn.softplus(-z_f)
    return MLSTMGates(q, k / math.sqrt(key), v, o, log_i, log_f)


def mlstm_read(o: Array, values: Array, weight: Array, m: Array) -> Array:
    """Normalises ``values``, ``q C e^-m``, by ``weight``, ``q . n e^-m``."""
    # Both sides of the fraction times e^m where m < 0, so that nothing overflows.
    scale, least = jnp.exp(jnp.minimum(m, 0)), jnp.exp(-jnp.maximum(m, 0))
    info = jnp.finfo(m.dtype)  # a query of zeros reads zeros, and so does its gradient
    least = jnp.maximum(least, min(float(info.tiny) ** 0.5, float(info.eps) ** 2))
    weight = jnp.maximum(jnp.abs(weight) * scale, least)
    return o * (values * (scale / weight)[..., None]).reshape(o.shape)


def mlstm_update(
    params: MLSTMParams,
    carry: MLSTMCarry,
    zx: Array,
    zh: tuple = (),
    exp_forget: bool = False,
) -> tuple[MLSTMCarry, Array]:
    """Writes to the memory, and reads from it."""
    del params, zh
    q, k, v, o, log_i, log_f = mlstm_gates(zx, carry.c.shape[-3:], exp_forget)
    kept = log_f + carry.m
    m = jnp.maximum(kept, log_i)
    i, f = named("i", jnp.exp(log_i - m)), named("f", jnp.exp(kept - m))
    i, f = i[..., None], f[..., None]
    c = f[..., None] * carry.c + (i * k)[..., None] * v[..., None, :]
    n = f * carry.n + i * k
    values, weight = (q[..., None] * c).sum(-2), (q * n).sum(-1)
    return MLSTMCarry(c, n, m), mlstm_read(o, values, weight, m)


def mlstm_step(
    params: MLSTMParams, carry: MLSTMCarry, x: Array, exp_forget: bool = False
) -> tuple[MLSTMCarry, Array]:
    r"""Advances an mLSTM by one time step.

    .. math::
        q, a_k, v, a_o, a_i, a_f &= x W_{ih} + b \\
        k &= a_k / \sqrt K, \qquad o = \sigma(a_o) \\
        i &= e^{a_i}, \qquad f = \sigma(a_f) \text{ or } e^{a_f} \\
        C' &= f C + i \, k^\top v, \qquad n' = f n + i \, k \\
        y &= o \odot \frac{q C'}{\max(|q \cdot n'|, 1)}

    for each head. The memory :math:`C` stores the value :math:`v` under the key
    :math:`k`, and the query :math:`q` reads it. So that no exponential overflows, the
    carry holds :math:`e^{-m} C` and :math:`e^{-m} n` instead of :math:`C` and
    :math:`n`, with

    .. math::
        m' = \max(\log f + m, a_i)

    The gates are scaled too: :func:`jlstm.diagnostics.trace` shows :math:`e^{-m'} i`
    and :math:`e^{m - m'} f`.

    Args:
      params: the weights ``w_ih [D, G]`` and ``b [G]``; see
        :class:`jlstm.cells.MLSTMParams`.
      carry: ``c [..., N, K, H/N]``, ``n [..., N, K]`` and ``m [..., N]`` after the step
        before.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      exp_forget: true makes the forget gate an exponential in the place of a sigmoid.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``.

    Example:
      >>> cell, x = jlstm.MLSTM(8, num_heads=2), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape, carry.c.shape
      ((2, 8), (2, 2, 4, 4))

    References:
      Beck et al., xLSTM: extended long short-term memory, 2024.
    """
    zx = mlstm_project(params, x)
    return mlstm_update(params, carry, zx, exp_forget=exp_forget)


@config
class MLSTM:
    """An LSTM with a matrix for memory; :func:`jlstm.cells.mlstm_step` has the formula.

    Its gates read the input alone, so many steps can be computed at once: it runs by
    ``"chunkwise"`` unless another implementation is named.

    Attributes:
      hidden_size: ``H``, the size of the output, of all heads together.
      num_heads: ``N``, which must divide ``H``. Each head has a memory of its own, a
        matrix ``[K, H/N]``.
      key_size: ``K``, the size of a head's keys and queries; ``None``, the default,
        means ``H/N``. A larger one lets a head keep more values apart, and takes
        proportionally more memory.
      exp_forget: true makes the forget gate an exponential, false, the default, a
        sigmoid. The paper allows both.
      forget_bias: a number that ``init`` adds to the forget gate's bias; see
        :class:`jlstm.LSTM`.
      w_ih_init: initialiser of ``w_ih``, called once for each of the parts q, k, v, o,
        i and f; see :mod:`jlstm.init`.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

    Example:
      >>> layer = jlstm.RNN(jlstm.MLSTM(8, num_heads=2))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    num_heads: int = 1
    key_size: int | None = None
    exp_forget: bool = False
    forget_bias: float = 1.0
    w_ih_init: Initializer = initialisers.glorot_uniform
    b_init: Initializer = initialisers.zeros

    project = staticmethod(mlstm_project)
    mix = staticmethod(mlstm_mix)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size", "num_heads")
        check_divides(self, "num_heads", "hidden_size")
        if self.key_size is not None:
            check_positive(self, "key_size")

    @property
    def _sizes(self) -> tuple[int, int, int]:
        value = self.hidden_size // self.num_heads
        return self.num_heads, self.key_size or value, value

    def update(
        self, params: MLSTMParams, carry: MLSTMCarry, zx: Array, zh: tuple
    ) -> tuple[MLSTMCarry, Array]:
        """Writes to the memory, and reads from it."""
        return mlstm_update(params, carry, zx, zh, self.exp_forget)

    def step(
        self, params: MLSTMParams, carry: MLSTMCarry, x: Array
    ) -> tuple[MLSTMCarry, Array]:
        """Advances one step."""
        return mlstm_step(params, carry, x, self.exp_forget)

    def init(self, key: Array, x: Array) -> MLSTMParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys, dtype = jax.random.split(key), float_dtype(x)
        count, size, _ = self._sizes
        parts = [count * size] * 2 + [self.hidden_size] * 2 + [count] * 2

        def join(init: Initializer, key: Array, *lead: int) -> Array:
            pairs = zip(jax.random.split(key, 6), parts, strict=True)
            made = [init(k, (*lead, part), dtype) for k, part in pairs]
            return jnp.concatenate(made, axis=-1)

        b = join(self.b_init, keys[1])
        b = b.at[-count:].add(jnp.asarray(self.forget_bias, dtype))
        return MLSTMParams(join(self.w_ih_init, keys[0], x.shape[-1]), b)

    def init_carry(
        self, params: MLSTMParams, batch_shape: tuple[int, ...]
    ) -> MLSTMCarry:
        """Makes the fresh carry: an empty memory, whose weight is next to nothing."""
        sizes, dtype = self._sizes, params.b.dtype
        c, n, m = (
            jnp.zeros((*batch_shape, *sizes[:axes]), dtype) for axes in (3, 2, 1)
        )
        return MLSTMCarry(c, n, m + NOTHING)
