"""GRU for series with missing values, which lets old observations fade."""

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
    """Input of a GRU-D: values, which of them were observed, and how long ago.

    Attributes:
      x: the values, ``[..., D]``; where one is missing, anything may stand, even NaN.
      mask: true, or above 0, where a value was observed, ``[..., D]``.
      delta: the time since each variable was observed last, ``[..., D]``, in any unit,
        the same for training and use; :func:`jlstm.data.elapsed` computes it.
    """

    x: Array
    mask: Array
    delta: Array


@struct.dataclass
class GRUDParams:
    """Weights of a GRU-D; gates stand in the order r, z, n.

    Attributes:
      w_ih: weights of the values, ``[D, 3H]``.
      w_mh: weights of the mask, ``[D, 3H]``.
      w_hh: recurrent weights, ``[H, 3H]``.
      b: biases, ``[3H]``.
      w_dx: rate at which each variable decays to its mean, per unit of time, ``[D]``.
      b_dx: bias of that rate, ``[D]``.
      w_dh: rates at which ``h`` decays, per unit of time, ``[D, H]``.
      b_dh: bias of these rates, ``[H]``.
      mean: the value to which each variable decays, ``[D]``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_mh: Array
    w_hh: Array
    b: Array
    w_dx: Array
    b_dx: Array
    w_dh: Array
    b_dh: Array
    mean: Array
    h0: Array | None = None


class GRUDCarry(NamedTuple):
    """Carry of a GRU-D.

    Attributes:
      h: memory and output in one, ``[..., H]``.
      x: the last observation of each variable, ``[..., D]``.
    """

    h: Array
    x: Array


class GRUDProjection(NamedTuple):
    """What a GRU-D makes of its input alone."""

    z: Array  # [..., 3H], pre-activations
    decay_h: Array  # [..., H]
    decay_x: Array  # [..., D], 0 where x was observed
    x: Array  # [..., D], 0 where it is missing
    missing: Array  # [..., D], 1 or 0


def gru_d_project(params: GRUDParams, x: GRUDInput) -> GRUDProjection:
    """Computes decays, and the pre-activations less what the last observations add."""
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
            (\gamma_x \odot x_{last} + (1 - \gamma_x) \odot \bar{x}) \\
        \hat{h} &= \gamma_h \odot h \\
        r, z &= \sigma(\hat{x} W_{ih}^{r,z} + m W_{mh}^{r,z}
            + \hat{h} W_{hh}^{r,z} + b^{r,z}) \\
        n &= \tanh(\hat{x} W_{ih}^n + m W_{mh}^n
            + (r \odot \hat{h}) W_{hh}^n + b^n) \\
        h' &= (1 - z) \odot \hat{h} + z \odot n \\
        x_{last}' &= m \odot x + (1 - m) \odot x_{last}

    where :math:`m` is the mask, 1 or 0, and :math:`\delta` the time since a variable
    was observed. A missing value is replaced by one between the last observation
    :math:`x_{last}` and :math:`\bar{x}`, the param ``mean``; and :math:`h` fades too.
    As in the paper, the larger :math:`z`, the more of :math:`\hat{h}` is replaced, the
    opposite of :func:`jlstm.gru_step`.

    Args:
      params: the weights ``w_ih [D, 3H]``, ``w_mh [D, 3H]``, ``w_hh [H, 3H]`` and
        ``b [3H]``; the decays ``w_dx [D]``, ``b_dx [D]``, ``w_dh [D, H]`` and
        ``b_dh [H]``; and ``mean [D]``. See :class:`jlstm.cells.GRUDParams`.
      carry: ``h [..., H]`` after the step before, and the last observation
        ``x [..., D]`` of each variable.
      x: a :class:`jlstm.GRUDInput`: ``x``, ``mask`` and ``delta``, ``[..., D]`` each;
        leading dimensions are batch dimensions.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

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
    """GRU for series with missing values; :func:`jlstm.cells.gru_d_step` computes it.

    A layer takes a :class:`GRUDInput` of three arrays ``[B, T, D]``. At init nothing
    decays: the last observation stands in for a missing value. The rates are learned. A
    variable that has not been observed yet has its mean. Give the means of the training
    data as ``mean_init=jlstm.init.Pretrained(means)``; they are params, so leave the
    leaf ``mean`` out of training if they are to stay.

    A layer that runs in reverse reads ``delta`` as it stands: nothing turns it into the
    time to the next observation.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      learned_carry: true makes the fresh ``h`` a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih`` and of ``w_mh``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      b_init: initialiser of the biases of the gates.
      decay_init: initialiser of the weights and biases of the decays.
      mean_init: initialiser of ``mean [D]``, zeros unless given.

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
        """Makes the fresh carry: ``h``, and means in the place of last observations."""
        h = fresh(params.h0, self.hidden_size, batch_shape, params.b)
        mean = fresh(params.mean, params.mean.shape[0], batch_shape, params.b)
        return GRUDCarry(h, mean)
