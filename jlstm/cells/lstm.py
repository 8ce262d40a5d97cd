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
    """Weights of an LSTM; gates stand in the order i, f, g, o.

    Attributes:
      w_ih: input weights, ``[D, 4H]``.
      w_hh: recurrent weights, ``[H, 4H]``.
      b: biases, ``[4H]``.
      b_hh: second biases, ``[4H]``; ``None`` without ``double_bias``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
      c0: the learned fresh ``c``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    b_hh: Array | None = None
    h0: Array | None = None
    c0: Array | None = None


class LSTMCarry(NamedTuple):
    """Carry of an LSTM.

    Attributes:
      h: the output of the step, ``[..., H]``.
      c: the memory, also called the cell state, ``[..., H]``.
    """

    h: Array
    c: Array


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
    """Makes the gates from the pre-activations ``zx + zh``, and applies them."""
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
        a_i, a_f, a_g, a_o &= x W_{ih} + h W_{hh} + b \\
        i, f, o &= \sigma(a_i), \sigma(a_f), \sigma(a_o), \qquad g = \tanh(a_g) \\
        c' &= f \odot c + i \odot g \\
        h' &= o \odot \tanh(c')

    where a prime marks what is new. The input gate :math:`i` says how much of the
    candidate :math:`g` is written to the memory, the forget gate :math:`f` how much of
    the memory is kept, and the output gate :math:`o` how much of it is shown. The
    pre-activations :math:`a_i, a_f, a_g, a_o` lie side by side in one array
    ``[..., 4H]``.

    Args:
      params: the weights ``w_ih [D, 4H]``, ``w_hh [H, 4H]`` and ``b [4H]``; see
        :class:`jlstm.LSTMParams`.
      carry: ``h`` and ``c`` after the step before, ``[..., H]`` each.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      activation: a function in the place of both tanh.
      gate_activation: a function in the place of the sigmoids.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

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
    """Long short-term memory; :func:`jlstm.lstm_step` has the formula.

    It is the cell to begin with. Its memory ``c`` is a sum, along which gradients reach
    further back than in a simple network.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      forget_bias: a number that ``init`` adds to the forget gate's bias, so that a new
        LSTM remembers (Jozefowicz et al., 2015). While inputs are small, the memory
        keeps the fraction ``sigmoid(forget_bias)`` of itself at each step: 0.5 for 0,
        0.73 for 1, 0.95 for 3. For long dependencies, ``jlstm.init.Chrono(max_time)``
        gives each unit a bias of its own, and sets the input gate's bias too.
      activation: the function of the candidate and of the memory, any module-level
        function of an array. With another than tanh the native loop cannot run, and the
        fused one does.
      gate_activation: the function of the three gates; the same holds for another than
        the sigmoid.
      double_bias: adds a second bias, as PyTorch has it. The formula stays the same,
        but an optimizer that follows the gradient moves the sum of two biases twice as
        far.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

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
