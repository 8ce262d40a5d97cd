"""LSTM without a recurrent product: its gates see the input alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, named, sigmoid
from jlstm.init import per_gate
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


@struct.dataclass
class MinLSTMParams:
    """Weights of a minLSTM; gates in the order i, f, g."""

    w_ih: Array  # [D, 3H]
    b: Array  # [3H]
    h0: Array | None = None  # [H], the learned fresh carry


class MinLSTMCarry(NamedTuple):
    """Carry of a minLSTM."""

    h: Array  # [..., H]


def min_lstm_project(params: MinLSTMParams, x: Array) -> Array:
    """Computes the pre-activations, ``[..., 3H]``."""
    return affine(x, params.w_ih, params.b)


def min_lstm_mix(params: MinLSTMParams, carry: MinLSTMCarry, zx: Array) -> tuple:
    """Has no recurrent product."""
    del params, carry, zx
    return ()


def min_lstm_update(
    params: MinLSTMParams,
    carry: MinLSTMCarry,
    zx: Array,
    zh: tuple = (),
    activation: Callable[[Array], Array] = jax.nn.identity,
) -> tuple[MinLSTMCarry, Array]:
    """Applies the gates to the pre-activations ``zx [..., 3H]``."""
    del params, zh
    z_i, z_f, z_g = jnp.split(zx, 3, axis=-1)
    # By e^-i and e^-f, scaled to be at most 1: far below zero both gates would be zero.
    most = jax.lax.stop_gradient(jnp.maximum(jnp.maximum(-z_i, -z_f), 0))
    one, i, f = jnp.exp(-most), jnp.exp(-z_i - most), jnp.exp(-z_f - most)
    keep = named("f", (one + i) / (one + i + one + f), sigmoid)
    g = named("g", activation(z_g), activation)
    h = g - keep * g + keep * carry.h
    return MinLSTMCarry(h), h


def min_lstm_step(
    params: MinLSTMParams,
    carry: MinLSTMCarry,
    x: Array,
    activation: Callable[[Array], Array] = jax.nn.identity,
) -> tuple[MinLSTMCarry, Array]:
    r"""Advances a minLSTM by one time step.

    .. math::
        i, f &= \sigma(x W_{ih}^{i,f} + b^{i,f}), \qquad
        g = x W_{ih}^g + b^g \\
        h' &= \frac{f}{f + i} \odot h + \frac{i}{f + i} \odot g

    Args:
      params: ``w_ih [D, 3H]``, ``b [3H]``.
      carry: ``h`` of the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      activation: of the candidate ``g``.

    Returns:
      The new carry, and the output ``[..., H]``, which is the new ``h``.

    Example:
      >>> cell, x = jlstm.MinLSTM(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Feng et al., Were RNNs all we needed?, 2024.
    """
    zx = min_lstm_project(params, x)
    return min_lstm_update(params, carry, zx, activation=activation)


@config
class MinLSTM:
    """A minLSTM; see :func:`jlstm.cells.min_lstm_step` for the formula.

    Attributes:
      hidden_size: ``H``.
      activation: of the candidate, which is linear unless given. With
        ``jlstm.cells.positive`` it is that of the paper's log-space form, whose carry
        stays positive.
      forget_bias: added to the forget gate's bias at init.
      learned_carry: learns the fresh carry, which starts at zero.
      w_ih_init: initialiser of ``w_ih``, gate by gate.
      b_init: initialiser of the biases, before ``forget_bias``.

    Example:
      >>> layer = jlstm.RNN(jlstm.MinLSTM(8))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    activation: Callable[[Array], Array] = jax.nn.identity
    forget_bias: float = 1.0
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    b_init: Initializer = initialisers.zeros

    project = staticmethod(min_lstm_project)
    mix = staticmethod(min_lstm_mix)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def update(
        self, params: MinLSTMParams, carry: MinLSTMCarry, zx: Array, zh: tuple
    ) -> tuple[MinLSTMCarry, Array]:
        """Applies the gates."""
        return min_lstm_update(params, carry, zx, zh, self.activation)

    def step(
        self, params: MinLSTMParams, carry: MinLSTMCarry, x: Array
    ) -> tuple[MinLSTMCarry, Array]:
        """Advances one step."""
        return min_lstm_step(params, carry, x, self.activation)

    def init(self, key: Array, x: Array) -> MinLSTMParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[1], 3, (size,), dtype)
        return MinLSTMParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 3, (x.shape[-1], size), dtype),
            b=b.at[size : 2 * size].add(jnp.asarray(self.forget_bias, dtype)),
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(
        self, params: MinLSTMParams, batch_shape: tuple[int, ...]
    ) -> MinLSTMCarry:
        """Makes the fresh carry, ``[*batch_shape, H]``."""
        return MinLSTMCarry(
            fresh(params.h0, self.hidden_size, batch_shape, params.w_ih)
        )
