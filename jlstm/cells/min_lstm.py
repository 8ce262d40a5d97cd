"""LSTM without a recurrent product: its gates read the input alone."""

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
    """Weights of a minLSTM; gates stand in the order i, f, g.

    Attributes:
      w_ih: input weights, ``[D, 3H]``.
      b: biases, ``[3H]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    b: Array
    h0: Array | None = None


class MinLSTMCarry(NamedTuple):
    """Carry of a minLSTM.

    Attributes:
      h: memory and output in one, ``[..., H]``.
    """

    h: Array


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
    """Makes the gates from the pre-activations ``zx [..., 3H]``, and applies them."""
    del params, zh
    z_i, z_f, z_g = jnp.split(zx, 3, axis=-1)
    # By e^-i and e^-f, scaled to be at most 1: if both pre-activations are far below
    # zero, both sigmoids are 0, and their ratio is NaN.
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

    where :math:`i` and :math:`f` are the gates and :math:`g` is the candidate. Divided
    by their sum, the two gates make :math:`h'` an average;
    :func:`jlstm.diagnostics.trace` shows :math:`f / (f + i)` under the name ``f``.

    Args:
      params: the weights ``w_ih [D, 3H]`` and ``b [3H]``.
      carry: ``h`` after the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      activation: a function that is applied to the candidate :math:`g`.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

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
    """An LSTM linear in its carry; :func:`jlstm.cells.min_lstm_step` has the formula.

    Because its gates read the input alone, all steps can be computed at once, with
    ``RNN(cell, implementation="associative")``. For the same reason one layer cannot
    let what it remembers decide what it takes in: use a stack.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      activation: the function of the candidate; the identity unless given. With
        ``jlstm.cells.positive``, the carry stays positive, as in the paper's form in
        log space.
      forget_bias: a number that ``init`` adds to the forget gate's bias, so that more
        is kept.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

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
