"""GRU in heads: the recurrent weights of a head see the ``h`` of that head alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import (
    add_vector,
    affine,
    fresh,
    gates,
    heads_product,
    named,
    tanh,
)
from jlstm.cells.gru import GRUCarry
from jlstm.init import per_gate, per_head
from jlstm.types import (
    Array,
    Initializer,
    check_divides,
    check_positive,
    config,
    float_dtype,
)


@struct.dataclass
class MultiHeadGRUParams:
    """Weights of a GRU of ``N`` heads; gates stand in the order r, z, n.

    Attributes:
      w_ih: input weights, ``[D, 3H]``; within each gate, head by head.
      w_hh: recurrent weights, ``[N, H/N, 3H/N]``; within each head, gate by gate.
      b: biases, ``[3H]``, in the order of ``w_ih``.
      b_hh: biases of the candidate's recurrent part, inside the reset gate, ``[H]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    b_hh: Array
    h0: Array | None = None


def multi_head_gru_project(params: MultiHeadGRUParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def multi_head_gru_mix(params: MultiHeadGRUParams, carry: GRUCarry, zx: Array) -> Array:
    """Computes the recurrent products of the heads with their bias, ``[..., 3H]``."""
    del zx
    b = jnp.pad(params.b_hh, (2 * params.b_hh.shape[0], 0))
    return add_vector(heads_product(carry.h, params.w_hh), b)


def multi_head_gru_update(
    params: MultiHeadGRUParams, carry: GRUCarry, zx: Array, zh: Array
) -> tuple[GRUCarry, Array]:
    """Makes the gates from ``zx [..., 3H]`` and ``zh [..., 3H]``, and applies them."""
    del params
    size = carry.h.shape[-1]
    x_gates, x_n = jnp.split(zx, [2 * size], axis=-1)
    h_gates, h_n = jnp.split(zh, [2 * size], axis=-1)
    r, z = gates(x_gates + h_gates, "ss", "rz")
    n = named("n", tanh(x_n + r * h_n), tanh)
    h = n - z * n + z * carry.h
    return GRUCarry(h), h


def multi_head_gru_step(
    params: MultiHeadGRUParams, carry: GRUCarry, x: Array
) -> tuple[GRUCarry, Array]:
    r"""Advances a GRU of several heads by one time step.

    .. math::
        u^r &= (h_1 W_{hh,1}^r, \dots, h_N W_{hh,N}^r), \qquad
            \text{likewise } u^z, u^n \\
        r, z &= \sigma(x W_{ih}^{r,z} + u^{r,z} + b^{r,z}) \\
        n &= \tanh(x W_{ih}^n + b^n + r \odot (u^n + b_{hh}^n)) \\
        h' &= (1 - z) \odot n + z \odot h

    where :math:`h_1, \dots, h_N` are the ``H/N`` features of each head. The other
    letters mean what they mean in :func:`jlstm.gru_step`. Heads do not see each other
    within a layer; the next layer mixes them.

    Args:
      params: the weights ``w_ih [D, 3H]``, ``w_hh [N, H/N, 3H/N]``, ``b [3H]`` and
        ``b_hh [H]``, for ``N`` heads.
      carry: ``h`` after the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

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
    """GRU in heads; :func:`jlstm.cells.multi_head_gru_step` has the formula.

    It has an N-th of a GRU's recurrent weights and operations. With one head it
    computes what :class:`jlstm.GRU` computes.

    Attributes:
      hidden_size: ``H``, the number of units of all heads together, which is also the
        size of the output.
      num_heads: ``N``, which must divide ``H``.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate of each head.
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
        check_positive(self, "hidden_size", "num_heads")
        check_divides(self, "num_heads", "hidden_size")

    def init(self, key: Array, x: Array) -> MultiHeadGRUParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 4)
        size, dtype = self.hidden_size, float_dtype(x)
        return MultiHeadGRUParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 3, (x.shape[-1], size), dtype),
            w_hh=per_head(self.w_hh_init, keys[1], self.num_heads, 3, size, dtype),
            b=per_gate(self.b_init, keys[2], 3, (size,), dtype),
            b_hh=self.b_init(keys[3], (size,), dtype),
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(
        self, params: MultiHeadGRUParams, batch_shape: tuple[int, ...]
    ) -> GRUCarry:
        """Makes the fresh carry, ``[*batch_shape, H]``."""
        return GRUCarry(fresh(params.h0, self.hidden_size, batch_shape, params.w_hh))
