"""The simple recurrent network."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, tanh
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
class ElmanParams:
    """Weights of a simple recurrent network.

    Attributes:
      w_ih: input weights, ``[D, H]``.
      w_hh: recurrent weights, ``[H, H]``.
      b: biases, ``[H]``.
      b_hh: second biases, ``[H]``; ``None`` without ``double_bias``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    b_hh: Array | None = None
    h0: Array | None = None


class ElmanCarry(NamedTuple):
    """Carry of a simple recurrent network.

    Attributes:
      h: memory and output in one, ``[..., H]``.
    """

    h: Array


def elman_project(params: ElmanParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    b = params.b if params.b_hh is None else params.b + params.b_hh
    return affine(x, params.w_ih, b)


def elman_mix(params: ElmanParams, carry: ElmanCarry, zx: Array) -> Array:
    """Computes the recurrent product ``h @ w_hh``, ``[..., H]``."""
    del zx
    return carry.h @ params.w_hh


def elman_step(
    params: ElmanParams,
    carry: ElmanCarry,
    x: Array,
    activation: Activation = tanh,
) -> tuple[ElmanCarry, Array]:
    r"""Advances a simple recurrent network by one time step.

    .. math::
        h' = \tanh(x W_{ih} + h W_{hh} + b)

    Args:
      params: the weights ``w_ih [D, H]``, ``w_hh [H, H]`` and ``b [H]``.
      carry: ``h`` after the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      activation: a function in the place of the tanh.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.Elman(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = jlstm.elman_step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Elman, Finding structure in time, 1990.
    """
    zx = elman_project(params, x)
    h = activation(zx + elman_mix(params, carry, zx))
    return ElmanCarry(h), h


@config
class Elman:
    """Simple recurrent network; :func:`jlstm.elman_step` has the formula.

    It is fast, and its memory is short. With rectified linear units, and an identity
    for its recurrent weights, it is the IRNN of Le, Jaitly & Hinton (2015), whose
    gradients do not fade:
    ``Elman(H, activation=jax.nn.relu, w_hh_init=jlstm.init.Identity())``.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      activation: ``jlstm.tanh``, ``jax.nn.relu``, or any module-level function or
        frozen dataclass that is called with an array ``[..., H]``.
      double_bias: adds a second bias, as PyTorch has it.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``; see :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``.
      b_init: initialiser of the biases.

    Example:
      >>> layer = jlstm.RNN(jlstm.Elman(8, activation=jax.nn.relu))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    activation: Activation = tanh
    double_bias: bool = False
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    project = staticmethod(elman_project)
    mix = staticmethod(elman_mix)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")
        check_activations(self, "activation")

    def update(
        self, params: ElmanParams, carry: ElmanCarry, zx: Array, zh: Array
    ) -> tuple[ElmanCarry, Array]:
        """Applies the activation to ``zx + zh``, ``[..., H]``."""
        del params, carry
        h = self.activation(zx + zh)
        return ElmanCarry(h), h

    def step(
        self, params: ElmanParams, carry: ElmanCarry, x: Array
    ) -> tuple[ElmanCarry, Array]:
        """Advances one step."""
        return elman_step(params, carry, x, self.activation)

    def init(self, key: Array, x: Array) -> ElmanParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 4)
        size, dtype = self.hidden_size, float_dtype(x)
        return ElmanParams(
            w_ih=self.w_ih_init(keys[0], (x.shape[-1], size), dtype),
            w_hh=self.w_hh_init(keys[1], (size, size), dtype),
            b=self.b_init(keys[2], (size,), dtype),
            b_hh=self.b_init(keys[3], (size,), dtype) if self.double_bias else None,
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(
        self, params: ElmanParams, batch_shape: tuple[int, ...]
    ) -> ElmanCarry:
        """Makes the fresh carry, ``[*batch_shape, H]``."""
        return ElmanCarry(fresh(params.h0, self.hidden_size, batch_shape, params.w_hh))
