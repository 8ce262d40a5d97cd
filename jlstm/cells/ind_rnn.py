"""Recurrent network whose units do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, row
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


@struct.dataclass
class IndRNNParams:
    """Weights of an independently recurrent network.

    Attributes:
      w_ih: input weights, ``[D, H]``.
      u: the recurrent weight of each unit on its own past, ``[H]``.
      b: biases, ``[H]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    u: Array
    b: Array
    h0: Array | None = None


class IndRNNCarry(NamedTuple):
    """Carry of an independently recurrent network.

    Attributes:
      h: memory and output in one, ``[..., H]``.
    """

    h: Array


def ind_rnn_project(params: IndRNNParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def ind_rnn_mix(params: IndRNNParams, carry: IndRNNCarry, zx: Array) -> tuple[()]:
    """Mixes nothing: no unit sees another."""
    del params, carry, zx
    return ()


def ind_rnn_update(
    params: IndRNNParams,
    carry: IndRNNCarry,
    zx: Array,
    zh: tuple[()],
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> tuple[IndRNNCarry, Array]:
    """Applies the activation to ``zx + u * h``, ``[..., H]``."""
    del zh
    h = activation(zx + row(params.u, zx) * carry.h)
    return IndRNNCarry(h), h


def ind_rnn_step(
    params: IndRNNParams,
    carry: IndRNNCarry,
    x: Array,
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> tuple[IndRNNCarry, Array]:
    r"""Advances an independently recurrent network by one time step.

    .. math::
        h' = \mathrm{relu}(x W_{ih} + u \odot h + b)

    Args:
      params: the weights ``w_ih [D, H]``, ``u [H]`` and ``b [H]``.
      carry: ``h`` after the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      activation: a function in the place of the relu.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.IndRNN(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Li, Li, Cook, Zhu & Gao, Independently recurrent neural network (IndRNN): building
      a longer and deeper RNN, 2018.
    """
    zx = ind_rnn_project(params, x)
    zh = ind_rnn_mix(params, carry, zx)
    return ind_rnn_update(params, carry, zx, zh, activation)


@config
class IndRNN:
    """Independently recurrent network; :func:`jlstm.cells.ind_rnn_step` computes it.

    Units do not see each other within a layer, so put several layers into a stack. Over
    T steps a unit multiplies its past, and a gradient, by up to ``u ** T``. The paper
    therefore keeps ``u`` below ``2 ** (1 / T)``: for long sequences begin with
    ``u_init=jlstm.init.Uniform(2 ** (1 / T))``.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      activation: ``jax.nn.relu``, ``jlstm.tanh``, or any module-level function or
        frozen dataclass that is called with an array ``[..., H]``.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``; see :mod:`jlstm.init`.
      u_init: initialiser of ``u``; its absolute values say how long units remember.
      b_init: initialiser of ``b``.

    Example:
      >>> layer = jlstm.RNN(jlstm.IndRNN(8))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    activation: Callable[[Array], Array] = jax.nn.relu
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    u_init: Initializer = initialisers.Uniform(1.0)
    b_init: Initializer = initialisers.zeros

    project = staticmethod(ind_rnn_project)
    mix = staticmethod(ind_rnn_mix)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def update(
        self, params: IndRNNParams, carry: IndRNNCarry, zx: Array, zh: tuple[()]
    ) -> tuple[IndRNNCarry, Array]:
        """Applies the activation."""
        return ind_rnn_update(params, carry, zx, zh, self.activation)

    def step(
        self, params: IndRNNParams, carry: IndRNNCarry, x: Array
    ) -> tuple[IndRNNCarry, Array]:
        """Advances one step."""
        return ind_rnn_step(params, carry, x, self.activation)

    def init(self, key: Array, x: Array) -> IndRNNParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 3)
        size, dtype = self.hidden_size, float_dtype(x)
        return IndRNNParams(
            w_ih=self.w_ih_init(keys[0], (x.shape[-1], size), dtype),
            u=self.u_init(keys[1], (size,), dtype),
            b=self.b_init(keys[2], (size,), dtype),
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(
        self, params: IndRNNParams, batch_shape: tuple[int, ...]
    ) -> IndRNNCarry:
        """Makes the fresh carry, ``[*batch_shape, H]``."""
        return IndRNNCarry(fresh(params.h0, self.hidden_size, batch_shape, params.u))
