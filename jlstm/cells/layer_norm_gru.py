"""GRU whose pre-activations are normalised."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import add_vector, fresh, gates, named, normalise, tanh
from jlstm.cells.gru import GRUCarry
from jlstm.init import per_gate
from jlstm.types import (
    Array,
    Initializer,
    check_positive,
    config,
    float_dtype,
)


@struct.dataclass
class LayerNormGRUParams:
    """Weights of a normalised GRU; gates stand in the order r, z, n.

    Attributes:
      w_ih: input weights, ``[D, 3H]``.
      w_hh: recurrent weights, ``[H, 3H]``.
      b: biases, ``[3H]``.
      b_hh: biases of the candidate's recurrent part, inside the reset gate, ``[H]``.
      gamma_x: the scale of the normalised ``x @ w_ih``, ``[3H]``.
      gamma_h: the scale of the normalised ``h @ w_hh``, ``[3H]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    b_hh: Array
    gamma_x: Array
    gamma_h: Array
    h0: Array | None = None


def layer_norm_gru_project(params: LayerNormGRUParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return add_vector(normalise(x @ params.w_ih, params.gamma_x), params.b)


def layer_norm_gru_mix(params: LayerNormGRUParams, carry: GRUCarry, zx: Array) -> Array:
    """Computes the recurrent product ``h @ w_hh``, ``[..., 3H]``."""
    del zx
    return carry.h @ params.w_hh


def layer_norm_gru_update(
    params: LayerNormGRUParams, carry: GRUCarry, zx: Array, zh: Array
) -> tuple[GRUCarry, Array]:
    """Normalises ``zh [..., 3H]``, and applies the gates."""
    size = carry.h.shape[-1]
    x_gates, x_n = jnp.split(zx, [2 * size], axis=-1)
    zh = normalise(zh, params.gamma_h)
    h_gates, h_n = jnp.split(zh, [2 * size], axis=-1)
    r, z = gates(x_gates + h_gates, "ss", "rz")
    n = named("n", tanh(x_n + r * add_vector(h_n, params.b_hh)), tanh)
    h = n - z * n + z * carry.h
    return GRUCarry(h), h


def layer_norm_gru_step(
    params: LayerNormGRUParams, carry: GRUCarry, x: Array
) -> tuple[GRUCarry, Array]:
    r"""Advances a normalised GRU by one time step.

    .. math::
        v &= N(x W_{ih}; \gamma_x) + b, \qquad u = N(h W_{hh}; \gamma_h) \\
        r, z &= \sigma(v^{r,z} + u^{r,z}) \\
        n &= \tanh(v^n + r \odot (u^n + b_{hh}^n)) \\
        h' &= (1 - z) \odot n + z \odot h

    with :math:`N` as in :func:`jlstm.cells.layer_norm_lstm_step`, and the other letters
    as in :func:`jlstm.gru_step`. :math:`N` normalises all three gates together; the
    paper normalises the candidate :math:`n` apart from the two gates.

    Args:
      params: the weights ``w_ih [D, 3H]``, ``w_hh [H, 3H]``, ``b``, ``gamma_x`` and
        ``gamma_h`` ``[3H]``, ``b_hh [H]``.
      carry: ``h`` after the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.LayerNormGRU(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Ba, Kiros & Hinton, Layer normalization, 2016.
    """
    zx = layer_norm_gru_project(params, x)
    zh = layer_norm_gru_mix(params, carry, zx)
    return layer_norm_gru_update(params, carry, zx, zh)


@config
class LayerNormGRU:
    """Normalised GRU; :func:`jlstm.cells.layer_norm_gru_step` has the formula.

    Sequences that begin with zeros need the care that :class:`jlstm.LayerNormLSTM`
    describes.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      gamma_init: initialiser of the two scales.
      b_init: initialiser of the biases.

    Example:
      >>> layer = jlstm.RNN(jlstm.LayerNormGRU(8))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    gamma_init: Initializer = initialisers.ones
    b_init: Initializer = initialisers.zeros

    project = staticmethod(layer_norm_gru_project)
    mix = staticmethod(layer_norm_gru_mix)
    update = staticmethod(layer_norm_gru_update)
    step = staticmethod(layer_norm_gru_step)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def init(self, key: Array, x: Array) -> LayerNormGRUParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 6)
        size, dtype = self.hidden_size, float_dtype(x)
        return LayerNormGRUParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 3, (x.shape[-1], size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 3, (size, size), dtype),
            b=per_gate(self.b_init, keys[2], 3, (size,), dtype),
            b_hh=self.b_init(keys[3], (size,), dtype),
            gamma_x=per_gate(self.gamma_init, keys[4], 3, (size,), dtype),
            gamma_h=per_gate(self.gamma_init, keys[5], 3, (size,), dtype),
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(
        self, params: LayerNormGRUParams, batch_shape: tuple[int, ...]
    ) -> GRUCarry:
        """Makes the fresh carry, ``[*batch_shape, H]``."""
        return GRUCarry(fresh(params.h0, self.hidden_size, batch_shape, params.w_hh))
