"""Gated recurrent unit, with the reset gate after or before the recurrent product."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import activate, add_vector, affine, fresh, named, sigmoid, tanh
from jlstm.init import Chrono, per_gate
from jlstm.types import (
    Activation,
    Array,
    Initializer,
    check_activations,
    check_positive,
    config,
    float_dtype,
)


@struct.dataclass
class GRUParams:
    """Weights of a GRU; gates stand in the order r, z, n.

    Attributes:
      w_ih: input weights, ``[D, 3H]``.
      w_hh: recurrent weights, ``[H, 3H]``.
      b: biases, ``[3H]``.
      b_hh: biases that are added to the recurrent product: ``[3H]`` with
        ``double_bias``; else ``[H]``, for ``n`` alone, if ``reset_after``; else
        ``None``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    b_hh: Array | None = None
    h0: Array | None = None


class GRUCarry(NamedTuple):
    """Carry of a GRU.

    Attributes:
      h: memory and output in one, ``[..., H]``.
    """

    h: Array


def gru_project(params: GRUParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def gru_mix(params: GRUParams, carry: GRUCarry, zx: Array) -> Array:
    """Computes the recurrent product with its bias, ``[..., 3H]``."""
    del zx
    zh, b = carry.h @ params.w_hh, params.b_hh
    if b is None:
        return zh
    return add_vector(zh, jnp.pad(b, (zh.shape[-1] - b.shape[0], 0)))


def gru_update(
    params: GRUParams,
    carry: GRUCarry,
    zx: Array,
    zh: Array,
    activation: Activation = tanh,
    gate_activation: Activation = sigmoid,
) -> tuple[GRUCarry, Array]:
    """Makes the gates from ``zx [..., 3H]`` and ``zh [..., 3H]``, and applies them."""
    del params
    size = carry.h.shape[-1]
    # By split: the transpose of a slice pads with zeros, which XLA does not vectorise.
    x_gates, x_n = jnp.split(zx, [2 * size], axis=-1)
    h_gates, h_n = jnp.split(zh, [2 * size], axis=-1)
    r, z = activate(x_gates + h_gates, "ss", tanh, gate_activation, "rz")
    n = named("n", activation(x_n + r * h_n), activation)
    h = n - z * n + z * carry.h
    return GRUCarry(h), h


def gru_step(
    params: GRUParams,
    carry: GRUCarry,
    x: Array,
    activation: Activation = tanh,
    gate_activation: Activation = sigmoid,
) -> tuple[GRUCarry, Array]:
    r"""Advances a GRU, reset gate after the recurrent product, by one time step.

    .. math::
        r, z &= \sigma(x W_{ih}^{r,z} + h W_{hh}^{r,z} + b^{r,z}) \\
        n &= \tanh(x W_{ih}^n + b^n + r \odot (h W_{hh}^n + b_{hh}^n)) \\
        h' &= (1 - z) \odot n + z \odot h

    where a prime marks what is new, and a superscript takes the columns of a gate. The
    reset gate :math:`r` says how much of the past the candidate :math:`n` sees, and the
    update gate :math:`z` how much of :math:`h` is kept.

    Args:
      params: the weights ``w_ih [D, 3H]``, ``w_hh [H, 3H]``, ``b [3H]`` and ``b_hh``,
        ``[H]`` or ``[3H]``; see :class:`jlstm.GRUParams`.
      carry: ``h`` after the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      activation: a function in the place of the tanh.
      gate_activation: a function in the place of the sigmoids.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.GRU(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = jlstm.gru_step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Cho et al., 2014; the form with one product is cuDNN's.
    """
    zx = gru_project(params, x)
    zh = gru_mix(params, carry, zx)
    return gru_update(params, carry, zx, zh, activation, gate_activation)


def gru_reset_before_mix(params: GRUParams, carry: GRUCarry, zx: Array) -> Array:
    """Computes the recurrent product of r and z, ``[..., 2H]``."""
    del zx
    size = params.w_hh.shape[0]
    b = None if params.b_hh is None else params.b_hh[: 2 * size]
    return affine(carry.h, params.w_hh[:, : 2 * size], b)


def gru_reset_before_update(
    params: GRUParams,
    carry: GRUCarry,
    zx: Array,
    zh: Array,
    activation: Activation = tanh,
    gate_activation: Activation = sigmoid,
) -> tuple[GRUCarry, Array]:
    """Makes the gates from ``zx [..., 3H]`` and ``zh [..., 2H]``, and applies them."""
    size = carry.h.shape[-1]
    x_gates, x_n = jnp.split(zx, [2 * size], axis=-1)
    r, z = activate(x_gates + zh, "ss", tanh, gate_activation, "rz")
    b = None if params.b_hh is None else params.b_hh[2 * size :]
    n = x_n + affine(r * carry.h, params.w_hh[:, 2 * size :], b)
    n = named("n", activation(n), activation)
    h = n - z * n + z * carry.h
    return GRUCarry(h), h


def gru_reset_before_step(
    params: GRUParams,
    carry: GRUCarry,
    x: Array,
    activation: Activation = tanh,
    gate_activation: Activation = sigmoid,
) -> tuple[GRUCarry, Array]:
    r"""Advances a GRU, reset gate before the recurrent product, by one time step.

    .. math::
        r, z &= \sigma(x W_{ih}^{r,z} + h W_{hh}^{r,z} + b^{r,z}) \\
        n &= \tanh(x W_{ih}^n + (r \odot h) W_{hh}^n + b^n) \\
        h' &= (1 - z) \odot n + z \odot h

    Arguments and results are those of :func:`jlstm.gru_step`, except that ``b_hh`` is
    ``[3H]`` or ``None``. Each step computes two recurrent products, one after the
    other, where that function computes one.

    Example:
      >>> cell, x = jlstm.GRU(8, reset_after=False), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Cho et al., 2014, version 3 and later.
    """
    zx = gru_project(params, x)
    zh = gru_reset_before_mix(params, carry, zx)
    return gru_reset_before_update(params, carry, zx, zh, activation, gate_activation)


@config
class GRU:
    """Gated recurrent unit; :func:`jlstm.gru_step` has the formula.

    It has three quarters of an LSTM's weights and half of its carry.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      reset_after: true applies the reset gate after the recurrent product, as cuDNN,
        PyTorch and Keras by default; it is the faster form. False is the published
        form, :func:`jlstm.gru_reset_before_step`, which Haiku has.
      update_bias: a number that ``init`` adds to the bias of the update gate z. While
        inputs are small, the fraction ``sigmoid(update_bias)`` of ``h`` is kept at each
        step: 0.5 for 0, 0.73 for 1. For long dependencies,
        ``jlstm.init.Chrono(max_time)`` gives each unit a bias of its own.
      activation: the function of the candidate, any module-level function of an array.
        With another than tanh the native loop cannot run, and the fused one does.
      gate_activation: the function of the two gates; the same holds for another than
        the sigmoid.
      double_bias: adds a second bias to every gate, as PyTorch has it.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      b_init: initialiser of the biases, to which ``update_bias`` is then added.

    Example:
      >>> layer = jlstm.RNN(jlstm.GRU(8))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape, carry.h.shape
      ((2, 5, 8), (2, 8))
    """

    hidden_size: int
    reset_after: bool = True
    update_bias: float | Chrono = 0.0
    activation: Activation = tanh
    gate_activation: Activation = sigmoid
    double_bias: bool = False
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    project = staticmethod(gru_project)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")
        check_activations(self, "activation", "gate_activation")

    def mix(self, params: GRUParams, carry: GRUCarry, zx: Array) -> Array:
        """Computes the recurrent product."""
        mix = gru_mix if self.reset_after else gru_reset_before_mix
        return mix(params, carry, zx)

    def update(
        self, params: GRUParams, carry: GRUCarry, zx: Array, zh: Array
    ) -> tuple[GRUCarry, Array]:
        """Applies the gates."""
        update = gru_update if self.reset_after else gru_reset_before_update
        functions = self.activation, self.gate_activation
        return update(params, carry, zx, zh, *functions)

    def step(
        self, params: GRUParams, carry: GRUCarry, x: Array
    ) -> tuple[GRUCarry, Array]:
        """Advances one step."""
        step = gru_step if self.reset_after else gru_reset_before_step
        return step(params, carry, x, self.activation, self.gate_activation)

    def init(self, key: Array, x: Array) -> GRUParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 5)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 3, (size,), dtype)
        if isinstance(self.update_bias, Chrono):
            update = self.update_bias(keys[4], (size,), dtype)
        else:
            update = jnp.full((size,), self.update_bias, dtype)
        b_hh = None
        if self.double_bias or self.reset_after:
            gate_count = 3 if self.double_bias else 1
            b_hh = per_gate(self.b_init, keys[3], gate_count, (size,), dtype)
        return GRUParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 3, (x.shape[-1], size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 3, (size, size), dtype),
            b=b.at[size : 2 * size].add(update),
            b_hh=b_hh,
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(self, params: GRUParams, batch_shape: tuple[int, ...]) -> GRUCarry:
        """Makes the fresh carry, ``[*batch_shape, H]``."""
        return GRUCarry(fresh(params.h0, self.hidden_size, batch_shape, params.w_hh))
