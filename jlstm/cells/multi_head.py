"""LSTM and GRU in heads: a head's recurrent weights meet its own ``h`` alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import add_vector, affine, fresh, gates, tanh
from jlstm.cells.gru import GRUCarry
from jlstm.cells.lstm import LSTMCarry
from jlstm.init import per_gate
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
    """Weights of an LSTM of ``N`` heads; gates in the order i, f, g, o."""

    w_ih: Array  # [D, 4H], in each gate head by head
    w_hh: Array  # [N, H/N, 4H/N], in each head gate by gate
    b: Array  # [4H]
    h0: Array | None = None  # [H], the learned fresh carry
    c0: Array | None = None  # [H]


def _product(h: Array, w_hh: Array) -> Array:
    """Computes ``h @ w_hh`` head by head, ``[..., G]``, in each gate head by head."""
    heads, size, width = w_hh.shape
    # One product a head: a batched one is slower on a CPU, and cannot run in C++.
    weights = [w.reshape(size, width) for w in jnp.split(w_hh, heads)]
    pairs = zip(jnp.split(h, heads, axis=-1), weights, strict=True)
    by_head = [jnp.split(part @ w, width // size, axis=-1) for part, w in pairs]
    by_gate = zip(*by_head, strict=True)
    return jnp.concatenate([part for gate in by_gate for part in gate], axis=-1)


def _check_heads(cell: Any) -> None:
    check_positive(cell, "hidden_size", "num_heads")
    check_divides(cell, "num_heads", "hidden_size")


def _heads_init(
    init: Initializer, key: Array, heads: int, gates: int, size: int, dtype: Any
) -> Array:
    """Draws ``w_hh``, head by head and gate by gate."""
    keys, shape = jax.random.split(key, heads), (size // heads, size // heads)
    return jnp.stack([per_gate(init, k, gates, shape, dtype) for k in keys])


def multi_head_lstm_project(params: MultiHeadLSTMParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def multi_head_lstm_mix(
    params: MultiHeadLSTMParams, carry: LSTMCarry, zx: Array
) -> Array:
    """Computes the recurrent products of the heads, ``[..., 4H]``."""
    del zx
    return _product(carry.h, params.w_hh)


def multi_head_lstm_update(
    params: MultiHeadLSTMParams, carry: LSTMCarry, zx: Array, zh: Array
) -> tuple[LSTMCarry, Array]:
    """Applies the gates to the pre-activations ``zx + zh``, ``[..., 4H]``."""
    del params
    i, f, g, o = gates(zx + zh, "ssts")
    c = f * carry.c + i * g
    h = o * tanh(c)
    return LSTMCarry(h, c), h


def multi_head_lstm_step(
    params: MultiHeadLSTMParams, carry: LSTMCarry, x: Array
) -> tuple[LSTMCarry, Array]:
    r"""Advances an LSTM of several heads by one time step.

    .. math::
        i, f, g, o &= x W_{ih} + (h_1 W_{hh,1}, \dots, h_N W_{hh,N}) + b \\
        c' &= \sigma(f) \odot c + \sigma(i) \odot \tanh(g) \\
        h' &= \sigma(o) \odot \tanh(c')

    where :math:`h_n` are the ``H/N`` features of head n, so that heads meet in the
    layer above alone.

    Args:
      params: ``w_ih [D, 4H]``, ``w_hh [N, H/N, 4H/N]``, ``b [4H]``, for ``N`` heads.
      carry: ``h`` and ``c`` of the step before, ``[..., H]`` each.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      The new carry, and the output ``[..., H]``, which is the new ``h``.

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
    """LSTM in heads; see :func:`jlstm.cells.multi_head_lstm_step` for the formula.

    With one head, it is :class:`jlstm.LSTM`.

    Attributes:
      hidden_size: ``H``, of all heads together.
      num_heads: ``N``, which divides ``H``.
      forget_bias: added to the forget gate's bias at init.
      learned_carry: learns the fresh carry, which starts at zero.
      w_ih_init: initialiser of ``w_ih``, gate by gate.
      w_hh_init: initialiser of ``w_hh``, head by head and gate by gate.
      b_init: initialiser of the biases, before ``forget_bias``.

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
        _check_heads(self)

    def init(self, key: Array, x: Array) -> MultiHeadLSTMParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 3)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 4, (size,), dtype)
        zeros = jnp.zeros((size,), dtype) if self.learned_carry else None
        return MultiHeadLSTMParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 4, (x.shape[-1], size), dtype),
            w_hh=_heads_init(self.w_hh_init, keys[1], self.num_heads, 4, size, dtype),
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


@struct.dataclass
class MultiHeadGRUParams:
    """Weights of a GRU of ``N`` heads; gates in the order r, z, n."""

    w_ih: Array  # [D, 3H], in each gate head by head
    w_hh: Array  # [N, H/N, 3H/N], in each head gate by gate
    b: Array  # [3H]
    b_hh: Array  # [H], inside r * (.)
    h0: Array | None = None  # [H], the learned fresh carry


def multi_head_gru_project(params: MultiHeadGRUParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def multi_head_gru_mix(params: MultiHeadGRUParams, carry: GRUCarry, zx: Array) -> Array:
    """Computes the recurrent products of the heads with their bias, ``[..., 3H]``."""
    del zx
    b = jnp.pad(params.b_hh, (2 * params.b_hh.shape[0], 0))
    return add_vector(_product(carry.h, params.w_hh), b)


def multi_head_gru_update(
    params: MultiHeadGRUParams, carry: GRUCarry, zx: Array, zh: Array
) -> tuple[GRUCarry, Array]:
    """Applies the gates to ``zx [..., 3H]`` and ``zh [..., 3H]``."""
    del params
    size = carry.h.shape[-1]
    x_gates, x_n = jnp.split(zx, [2 * size], axis=-1)
    h_gates, h_n = jnp.split(zh, [2 * size], axis=-1)
    r, z = gates(x_gates + h_gates, "ss")
    n = tanh(x_n + r * h_n)
    h = n - z * n + z * carry.h
    return GRUCarry(h), h


def multi_head_gru_step(
    params: MultiHeadGRUParams, carry: GRUCarry, x: Array
) -> tuple[GRUCarry, Array]:
    r"""Advances a GRU of several heads by one time step.

    .. math::
        u &= (h_1 W_{hh,1}, \dots, h_N W_{hh,N}) \\
        r, z &= \sigma(x W_{ih}^{r,z} + u^{r,z} + b^{r,z}) \\
        n &= \tanh(x W_{ih}^n + b^n + r \odot (u^n + b_{hh})) \\
        h' &= (1 - z) \odot n + z \odot h

    where :math:`h_n` are the ``H/N`` features of head n.

    Args:
      params: ``w_ih [D, 3H]``, ``w_hh [N, H/N, 3H/N]``, ``b [3H]``, ``b_hh [H]``.
      carry: ``h`` of the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      The new carry, and the output ``[..., H]``, which is the new ``h``.

    Example:
      >>> cell, x = jlstm.MultiHeadGRU(8, num_heads=2), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape, params.w_hh.shape
      ((2, 8), (2, 4, 12))

    References:
      Beck et al., xLSTM: extended long short-term memory, 2024 (heads).
    """
    zx = multi_head_gru_project(params, x)
    zh = multi_head_gru_mix(params, carry, zx)
    return multi_head_gru_update(params, carry, zx, zh)


@config
class MultiHeadGRU:
    """GRU in heads; see :func:`jlstm.cells.multi_head_gru_step` for the formula.

    With one head, it is :class:`jlstm.GRU`.

    Attributes:
      hidden_size: ``H``, of all heads together.
      num_heads: ``N``, which divides ``H``.
      learned_carry: learns the fresh carry, which starts at zero.
      w_ih_init: initialiser of ``w_ih``, gate by gate.
      w_hh_init: initialiser of ``w_hh``, head by head and gate by gate.
      b_init: initialiser of the biases.

    Example:
      >>> layer = jlstm.RNN(jlstm.MultiHeadGRU(8, num_heads=2))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    num_heads: int
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    project = staticmethod(multi_head_gru_project)
    mix = staticmethod(multi_head_gru_mix)
    update = staticmethod(multi_head_gru_update)
    step = staticmethod(multi_head_gru_step)

    def __post_init__(self) -> None:
        _check_heads(self)

    def init(self, key: Array, x: Array) -> MultiHeadGRUParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 4)
        size, dtype = self.hidden_size, float_dtype(x)
        return MultiHeadGRUParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 3, (x.shape[-1], size), dtype),
            w_hh=_heads_init(self.w_hh_init, keys[1], self.num_heads, 3, size, dtype),
            b=per_gate(self.b_init, keys[2], 3, (size,), dtype),
            b_hh=self.b_init(keys[3], (size,), dtype),
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(
        self, params: MultiHeadGRUParams, batch_shape: tuple[int, ...]
    ) -> GRUCarry:
        """Makes the fresh carry, ``[*batch_shape, H]``."""
        return GRUCarry(fresh(params.h0, self.hidden_size, batch_shape, params.w_hh))
