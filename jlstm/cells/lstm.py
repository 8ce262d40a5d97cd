"""Long short-term memory with forget gates."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import activate, affine, fresh, sigmoid, tanh
from jlstm.init import Chrono, per_gate
from jlstm.types import (
    Activation,
    Array,
    Initializer,
    PyTree,
    check_activations,
    check_positive,
    config,
    float_dtype,
)


@struct.dataclass
class LSTMParams:
    """Weights of an LSTM; gates in the order i, f, g, o."""

    w_ih: Array  # [D, 4H]
    w_hh: Array  # [H, 4H]
    b: Array  # [4H]
    b_hh: Array | None = None  # [4H], the second bias
    h0: Array | None = None  # [H], the learned fresh carry
    c0: Array | None = None  # [H]


class LSTMCarry(NamedTuple):
    """Carry of an LSTM."""

    h: Array  # [..., H]
    c: Array  # [..., H]


def lstm_project(params: LSTMParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    b = params.b if params.b_hh is None else params.b + params.b_hh
    return affine(x, params.w_ih, b)


def lstm_mix(params: LSTMParams, carry: LSTMCarry, zx: Array) -> Array:
    """Computes the recurrent product ``h @ w_hh``, ``[..., 4H]``."""
    del zx
    return carry.h @ params.w_hh


def lstm_update(
    params: PyTree,
    carry: LSTMCarry,
    zx: Array,
    zh: Array,
    activation: Activation = tanh,
    gate_activation: Activation = sigmoid,
) -> tuple[LSTMCarry, Array]:
    """Applies the gates to the pre-activations ``zx + zh``, ``[..., 4H]``."""
    del params
    i, f, g, o = activate(zx + zh, "ssts", activation, gate_activation, "ifgo")
    c = f * carry.c + i * g
    h = o * activation(c)
    return LSTMCarry(h, c), h


def lstm_step(
    params: LSTMParams,
    carry: LSTMCarry,
    x: Array,
    activation: Activation = tanh,
    gate_activation: Activation = sigmoid,
) -> tuple[LSTMCarry, Array]:
    r"""Advances an LSTM by one time step.

    .. math::
        i, f, g, o &= x W_{ih} + h W_{hh} + b \\
        c' &= \sigma(f) \odot c + \sigma(i) \odot \tanh(g) \\
        h' &= \sigma(o) \odot \tanh(c')

    Args:
      params: ``w_ih [D, 4H]``, ``w_hh [H, 4H]``, ``b [4H]``.
      carry: ``h`` and ``c`` of the step before, ``[..., H]`` each.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      activation: replaces both tanh.
      gate_activation: replaces the sigmoids.

    Returns:
      The new carry, and the output ``[..., H]``, which is the new ``h``.

    Example:
      >>> cell, xs = jlstm.LSTM(8), jnp.ones((5, 2, 3))  # time-major
      >>> params = cell.init(jax.random.key(0), xs[0])
      >>> step = functools.partial(jlstm.lstm_step, params)
      >>> carry, ys = jax.lax.scan(step, cell.init_carry(params, (2,)), xs)
      >>> ys.shape
      (5, 2, 8)

    References:
      Hochreiter & Schmidhuber, 1997; Gers, Schmidhuber & Cummins, 2000 (forget gate).
    """
    zx = lstm_project(params, x)
    zh = lstm_mix(params, carry, zx)
    return lstm_update(params, carry, zx, zh, activation, gate_activation)


@config
class LSTM:
    """Long short-term memory; see :func:`jlstm.lstm_step` for the formula.

    Attributes:
      hidden_size: ``H``.
      forget_bias: added to the forget gate's bias at init (Jozefowicz et al., 2015),
        or ``jlstm.init.Chrono(max_time)``, which sets the input gate's bias too.
      activation: of the candidate and of the memory; any module-level function.
      gate_activation: of the three gates.
      double_bias: adds a second bias, as PyTorch has it; the function is the same, but
        an optimizer moves the sum of the two twice as far.
      learned_carry: learns the fresh carry, which starts at zero.
      w_ih_init: initialiser of ``w_ih``, gate by gate.
      w_hh_init: initialiser of ``w_hh``, gate by gate.
      b_init: initialiser of the biases, before ``forget_bias``.

    Example:
      >>> layer = jlstm.RNN(jlstm.LSTM(8))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape, carry.h.shape, carry.c.shape
      ((2, 5, 8), (2, 8), (2, 8))
    """

    hidden_size: int
    forget_bias: float | Chrono = 1.0
    activation: Activation = tanh
    gate_activation: Activation = sigmoid
    double_bias: bool = False
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    project = staticmethod(lstm_project)
    mix = staticmethod(lstm_mix)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")
        check_activations(self, "activation", "gate_activation")

    def update(
        self, params: LSTMParams, carry: LSTMCarry, zx: Array, zh: Array
    ) -> tuple[LSTMCarry, Array]:
        """Applies the gates."""
        functions = self.activation, self.gate_activation
        return lstm_update(params, carry, zx, zh, *functions)

    def step(
        self, params: LSTMParams, carry: LSTMCarry, x: Array
    ) -> tuple[LSTMCarry, Array]:
        """Advances one step."""
        return lstm_step(params, carry, x, self.activation, self.gate_activation)

    def init(self, key: Array, x: Array) -> LSTMParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 5)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 4, (size,), dtype)
        if isinstance(self.forget_bias, Chrono):
            forget = self.forget_bias(keys[4], (size,), dtype)
            b = b.at[:size].add(-forget)
        else:
            forget = jnp.full((size,), self.forget_bias, dtype)
        zeros = jnp.zeros((size,), dtype) if self.learned_carry else None
        return LSTMParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 4, (x.shape[-1], size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 4, (size, size), dtype),
            b=b.at[size : 2 * size].add(forget),
            b_hh=per_gate(self.b_init, keys[3], 4, (size,), dtype)
            if self.double_bias
            else None,
            h0=zeros,
            c0=zeros,
        )

    def init_carry(self, params: LSTMParams, batch_shape: tuple[int, ...]) -> LSTMCarry:
        """Makes the fresh carry, ``[*batch_shape, H]`` each."""
        h, c = (
            fresh(leaf, self.hidden_size, batch_shape, params.w_hh)
            for leaf in (params.h0, params.c0)
        )
        return LSTMCarry(h, c)
