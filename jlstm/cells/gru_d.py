"""GRU for series with missing values, which decays what it has not seen for long."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import affine, fresh, gates, named, row, tanh
from jlstm.init import per_gate
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


class GRUDInput(NamedTuple):
    """Input of a GRU-D; ``delta`` is what :func:`jlstm.data.elapsed` computes."""

    x: Array  # [..., D], anything, NaN too, where it is missing
    mask: Array  # [..., D], true, or above 0, where x was observed
    delta: Array  # [..., D], time since x was observed last


@struct.dataclass
class GRUDParams:
    """Weights of a GRU-D; gates in the order r, z, n."""

    w_ih: Array  # [D, 3H]
    w_mh: Array  # [D, 3H], of the mask
    w_hh: Array  # [H, 3H]
    b: Array  # [3H]
    w_dx: Array  # [D], decay of each variable
    b_dx: Array  # [D]
    w_dh: Array  # [D, H], decay of h
    b_dh: Array  # [H]
    mean: Array  # [D], of each variable
    h0: Array | None = None  # [H], the learned fresh carry


class GRUDCarry(NamedTuple):
    """Carry of a GRU-D."""

    h: Array  # [..., H]
    x: Array  # [..., D], each variable as it was observed last


class GRUDProjection(NamedTuple):
    """What a GRU-D makes of its input alone."""

    z: Array  # [..., 3H], pre-activations
    decay_h: Array  # [..., H]
    decay_x: Array  # [..., D], 0 where x was observed
    x: Array  # [..., D], 0 where it is missing
    missing: Array  # [..., D], 1 or 0


def gru_d_project(params: GRUDParams, x: GRUDInput) -> GRUDProjection:
    """Computes decays, and pre-activations but for the last observations' part."""
    values, mask, delta = _checked(x)
    seen = mask > jnp.zeros_like(mask)
    # Selected, not multiplied: 0 * NaN is NaN, in a gradient too.
    values = jnp.where(seen, values, jnp.zeros_like(values))
    observed = seen.astype(values.dtype)
    missing = 1 - observed
    rate_x = row(params.w_dx, delta) * delta + row(params.b_dx, delta)
    # Not relu, whose derivative at 0 is 0: decays would stay at 1, where they begin.
    decay_x, decay_h = (
        jnp.exp(-jnp.maximum(rate, 0))
        for rate in (rate_x, affine(delta, params.w_dh, params.b_dh))
    )
    known = values + missing * (1 - decay_x) * row(params.mean, values)
    z = affine(known, params.w_ih, params.b) + observed @ params.w_mh
    return GRUDProjection(z, decay_h, missing * decay_x, values, missing)


def gru_d_mix(
    params: GRUDParams, carry: GRUDCarry, zx: GRUDProjection
) -> tuple[Array, Array]:
    """Computes the products of r and z, ``[..., 2H]``, and the known part of n's."""
    size = params.w_hh.shape[0]
    zh = (zx.decay_x * carry.x) @ params.w_ih
    z_gates, z_n = jnp.split(zh, [2 * size], axis=-1)
    return z_gates + (zx.decay_h * carry.h) @ params.w_hh[:, : 2 * size], z_n


def gru_d_update(
    params: GRUDParams, carry: GRUDCarry, zx: GRUDProjection, zh: tuple[Array, Array]
) -> tuple[GRUDCarry, Array]:
    """Applies the gates; the reset gate comes before a product of its own."""
    size = params.w_hh.shape[0]
    x_gates, x_n = jnp.split(zx.z, [2 * size], axis=-1)
    r, z = gates(x_gates + zh[0], "ss", "rz")
    h = zx.decay_h * carry.h
    n = x_n + zh[1] + (r * h) @ params.w_hh[:, 2 * size :]
    n = named("n", tanh(n), tanh)
    h = h - z * h + z * n
    return GRUDCarry(h, zx.x + zx.missing * carry.x), h


def gru_d_step(
    params: GRUDParams, carry: GRUDCarry, x: GRUDInput
) -> tuple[GRUDCarry, Array]:
    r"""Advances a GRU-D by one time step.

    .. math::
        \gamma_x &= \exp(-\max(0, w_{dx} \odot \delta + b_{dx})) \\
        \gamma_h &= \exp(-\max(0, \delta W_{dh} + b_{dh})) \\
        \hat{x} &= m \odot x + (1 - m) \odot
            (\gamma_x \odot x_{last} + (1 - \gamma_x) \odot mean) \\
        \hat{h} &= \gamma_h \odot h \\
        r, z &= \sigma(\hat{x} W_{ih}^{r,z} + m W_{mh}^{r,z}
            + \hat{h} W_{hh}^{r,z} + b^{r,z}) \\
        n &= \tanh(\hat{x} W_{ih}^n + m W_{mh}^n
            + (r \odot \hat{h}) W_{hh}^n + b^n) \\
        h' &= (1 - z) \odot \hat{h} + z \odot n

    As in the paper, ``z`` opens to ``n``; that of :func:`jlstm.gru_step` keeps ``h``.

    Args:
      params: weights ``w_ih [D, 3H]``, ``w_mh [D, 3H]``, ``w_hh [H, 3H]``, ``b [3H]``;
        decays ``w_dx [D]``, ``b_dx [D]``, ``w_dh [D, H]``, ``b_dh [H]``; ``mean [D]``.
      carry: ``h [..., H]``, and the last observation ``x [..., D]`` of each variable.
      x: ``x``, ``mask`` and ``delta``, ``[..., D]`` each; leading dimensions are batch
        dimensions.

    Returns:
      The new carry, and the output ``[..., H]``, which is the new ``h``.

    Example:
      >>> cell, ones = jlstm.GRUD(8), jnp.ones((2, 3))
      >>> x = jlstm.GRUDInput(ones, mask=ones > 0, delta=ones)
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Che, Purushotham, Cho, Sontag & Liu, Recurrent neural networks for multivariate
      time series with missing values, 2018.
    """
    zx = gru_d_project(params, x)
    return gru_d_update(params, carry, zx, gru_d_mix(params, carry, zx))


def _checked(x: GRUDInput) -> GRUDInput:
    if not isinstance(x, tuple) or len(x) != 3:
        raise TypeError(f"GRUD: x must be a GRUDInput, got a {type(x).__name__}")
    if len({leaf.shape for leaf in x}) > 1:
        shapes = ", ".join(str(list(leaf.shape)) for leaf in x)
        raise ValueError(f"GRUD: x, mask and delta must have one shape, got {shapes}")
    return GRUDInput(*x)


@config
class GRUD:
    """GRU for series with missing values; see :func:`jlstm.cells.gru_d_step`.

    Inputs are :class:`GRUDInput`, for a layer ``[B, T, D]`` each; one that runs in
    reverse takes ``delta`` as it is. Decays start at 1, where the last observation
    stands in for a missing one, and are learned. Before its first observation a
    variable is at its mean: give those of the training data as
    ``mean_init=jlstm.init.Pretrained(means)``. They are params, so exclude the leaf
    ``mean`` from training if they shall stay.

    Attributes:
      hidden_size: ``H``.
      learned_carry: learns the fresh ``h``, which starts at zero.
      w_ih_init: initialiser of ``w_ih`` and ``w_mh``, gate by gate.
      w_hh_init: initialiser of ``w_hh``, gate by gate.
      b_init: initialiser of the biases of the gates.
      decay_init: initialiser of the weights and biases of the decays.
      mean_init: initialiser of ``mean [D]``.

    Example:
      >>> x = np.array([[1.0], [np.nan], [3.0]], np.float32)
      >>> delta = jlstm.data.elapsed(~np.isnan(x), times=[0.0, 0.5, 2.0])
      >>> xs = jlstm.GRUDInput(x[None], ~np.isnan(x)[None], delta[None])
      >>> layer = jlstm.RNN(jlstm.GRUD(8))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (1, 3, 8)
    """

    hidden_size: int
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros
    decay_init: Initializer = initialisers.zeros
    mean_init: Initializer = initialisers.zeros

    project = staticmethod(gru_d_project)
    mix = staticmethod(gru_d_mix)
    update = staticmethod(gru_d_update)
    step = staticmethod(gru_d_step)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def init(self, key: Array, x: GRUDInput) -> GRUDParams:
        """Makes params for inputs like ``x``, ``[..., D]`` each."""
        values = _checked(x).x
        keys = jax.random.split(key, 9)
        size, features, dtype = self.hidden_size, values.shape[-1], float_dtype(values)
        return GRUDParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 3, (features, size), dtype),
            w_mh=per_gate(self.w_ih_init, keys[1], 3, (features, size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[2], 3, (size, size), dtype),
            b=per_gate(self.b_init, keys[3], 3, (size,), dtype),
            w_dx=self.decay_init(keys[4], (features,), dtype),
            b_dx=self.decay_init(keys[5], (features,), dtype),
            w_dh=self.decay_init(keys[6], (features, size), dtype),
            b_dh=self.decay_init(keys[7], (size,), dtype),
            mean=self.mean_init(keys[8], (features,), dtype),
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(self, params: GRUDParams, batch_shape: tuple[int, ...]) -> GRUDCarry:
        """Makes the fresh carry: ``h``, and the means for last observations."""
        h = fresh(params.h0, self.hidden_size, batch_shape, params.b)
        mean = fresh(params.mean, params.mean.shape[0], batch_shape, params.b)
        return GRUDCarry(h, mean)
