"""GRU without a recurrent product: its gate reads the input alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, gates, named
from jlstm.init import per_gate
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


@struct.dataclass
class MinGRUParams:
    """Weights of a minGRU; gates stand in the order z, n.

    Attributes:
      w_ih: input weights, ``[D, 2H]``.
      b: biases, ``[2H]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    b: Array
    h0: Array | None = None


class MinGRUCarry(NamedTuple):
    """Carry of a minGRU.

    Attributes:
      h: memory and output in one, ``[..., H]``.
    """

    h: Array


def min_gru_project(params: MinGRUParams, x: Array) -> Array:
    """Computes the pre-activations, ``[..., 2H]``."""
    return affine(x, params.w_ih, params.b)


def min_gru_mix(params: MinGRUParams, carry: MinGRUCarry, zx: Array) -> tuple:
    """Has no recurrent product."""
    del params, carry, zx
    return ()


def min_gru_update(
    params: MinGRUParams,
    carry: MinGRUCarry,
    zx: Array,
    zh: tuple = (),
    activation: Callable[[Array], Array] = jax.nn.identity,
) -> tuple[MinGRUCarry, Array]:
    """Makes the gate from the pre-activations ``zx [..., 2H]``, and applies it."""
    del params, zh
    z_z, z_n = jnp.split(zx, 2, axis=-1)
    (z,) = gates(z_z, "s", "z")
    h = carry.h - z * carry.h + z * named("n", activation(z_n), activation)
    return MinGRUCarry(h), h


def min_gru_step(
    params: MinGRUParams,
    carry: MinGRUCarry,
    x: Array,
    activation: Callable[[Array], Array] = jax.nn.identity,
) -> tuple[MinGRUCarry, Array]:
    r"""Advances a minGRU by one time step.

    .. math::
        z &= \sigma(x W_{ih}^z + b^z), \qquad n = x W_{ih}^n + b^n \\
        h' &= (1 - z) \odot h + z \odot n

    where :math:`z` is the gate and :math:`n` is the candidate. As in the paper, the
    larger :math:`z`, the more of :math:`h` is replaced, the opposite of
    :func:`jlstm.gru_step`.

    Args:
      params: the weights ``w_ih [D, 2H]`` and ``b [2H]``.
      carry: ``h`` after the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.
      activation: a function that is applied to the candidate :math:`n`.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.MinGRU(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Feng et al., Were RNNs all we needed?, 2024.
    """
    zx = min_gru_project(params, x)
    return min_gru_update(params, carry, zx, activation=activation)


@config
class MinGRU:
    """A GRU linear in its carry; :func:`jlstm.cells.min_gru_step` has the formula.

    Because its gate reads the input alone, all steps can be computed at once, with
    ``RNN(cell, implementation="associative")``. For the same reason one layer cannot
    let what it remembers decide what it takes in: use a stack.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      activation: the function of the candidate; the identity unless given. With
        ``jlstm.cells.positive``, the carry stays positive, as in the paper's form in
        log space.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      b_init: initialiser of the biases.

    Example:
      >>> layer = jlstm.RNN(jlstm.MinGRU(8))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    activation: Callable[[Array], Array] = jax.nn.identity
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    b_init: Initializer = initialisers.zeros

    project = staticmethod(min_gru_project)
    mix = staticmethod(min_gru_mix)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def update(
        self, params: MinGRUParams, carry: MinGRUCarry, zx: Array, zh: tuple
    ) -> tuple[MinGRUCarry, Array]:
        """Applies the gate."""
        return min_gru_update(params, carry, zx, zh, self.activation)

    def step(
        self, params: MinGRUParams, carry: MinGRUCarry, x: Array
    ) -> tuple[MinGRUCarry, Array]:
        """Advances one step."""
        return min_gru_step(params, carry, x, self.activation)

    def init(self, key: Array, x: Array) -> MinGRUParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key)
        size, dtype = self.hidden_size, float_dtype(x)
        return MinGRUParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 2, (x.shape[-1], size), dtype),
            b=per_gate(self.b_init, keys[1], 2, (size,), dtype),
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(
        self, params: MinGRUParams, batch_shape: tuple[int, ...]
    ) -> MinGRUCarry:
        """Makes the fresh carry, ``[*batch_shape, H]``."""
        return MinGRUCarry(fresh(params.h0, self.hidden_size, batch_shape, params.w_ih))
