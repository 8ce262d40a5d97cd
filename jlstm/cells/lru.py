"""The linear recurrent unit: a complex diagonal recurrence, as pairs of reals."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm.cells.gates import fresh, row
from jlstm.init import Normal
from jlstm.types import Array, check_positive, common_dtype, config, float_dtype


@struct.dataclass
class LRUParams:
    r"""Weights of an LRU with ``S`` complex states, as real and imaginary parts.

    Attributes:
      nu_log: :math:`\nu`, which sets the moduli of the eigenvalues, ``[S]``.
      theta_log: :math:`\theta`, which sets their angles, ``[S]``.
      gamma_log: :math:`\gamma`, which scales the input of each state, ``[S]``.
      b_re: input weights :math:`B`, real parts, ``[D, S]``.
      b_im: their imaginary parts, ``[D, S]``.
      c_re: output weights :math:`C`, real parts, ``[S, H]``.
      c_im: their imaginary parts, ``[S, H]``.
      d: weights from the input to the output, :math:`D`, ``[D, H]``.
      re: the eigenvalues' real parts, ``[S]``, which are computed once a sequence;
        ``None`` in what ``init`` makes.
      im: their imaginary parts, ``[S]``.
    """

    nu_log: Array
    theta_log: Array
    gamma_log: Array
    b_re: Array
    b_im: Array
    c_re: Array
    c_im: Array
    d: Array
    re: Array | None = None
    im: Array | None = None


class LRUCarry(NamedTuple):
    """Carry of an LRU, as two real arrays, since a dtype policy handles only reals.

    Attributes:
      re: the real parts of the states, ``[..., S]``.
      im: their imaginary parts, ``[..., S]``.
    """

    re: Array
    im: Array


def lru_eigenvalues(params: LRUParams) -> tuple[Array, Array]:
    """Computes the eigenvalues ``[S]``, in float32 at least: most are close to 1."""
    if params.re is not None and params.im is not None:
        return params.re, params.im
    dtype = common_dtype(params.nu_log.dtype, jnp.float32)
    modulus = jnp.exp(-jnp.exp(params.nu_log.astype(dtype)))
    angle = jnp.exp(params.theta_log.astype(dtype))
    return modulus * jnp.cos(angle), modulus * jnp.sin(angle)


def lru_project(params: LRUParams, x: Array) -> tuple[Array, Array, Array]:
    """Computes ``gamma * (x @ b)``, its two parts ``[..., S]``, and ``x @ d``."""
    gamma = row(jnp.exp(params.gamma_log), params.b_re)
    w = jnp.concatenate([gamma * params.b_re, gamma * params.b_im, params.d], axis=-1)
    size = params.nu_log.shape[0]
    re, im, skip = jnp.split(x @ w, [size, 2 * size], axis=-1)
    return re, im, skip


def lru_mix(params: LRUParams, carry: LRUCarry, zx: tuple) -> tuple:
    """Has no recurrent product."""
    del params, carry, zx
    return ()


def lru_update(
    params: LRUParams, carry: LRUCarry, zx: tuple[Array, Array, Array], zh: tuple = ()
) -> tuple[LRUCarry, Array]:
    """Turns the carry, adds the input, and reads the output off it."""
    del zh
    a, b = (row(v, zx[0]).astype(zx[0].dtype) for v in lru_eigenvalues(params))
    re = a * carry.re - b * carry.im + zx[0]
    im = b * carry.re + a * carry.im + zx[1]
    return LRUCarry(re, im), re @ params.c_re - im @ params.c_im + zx[2]


def lru_step(params: LRUParams, carry: LRUCarry, x: Array) -> tuple[LRUCarry, Array]:
    r"""Advances an LRU by one time step.

    .. math::
        \lambda &= \exp(-e^{\nu} + \mathrm{i} e^{\theta}), \qquad
            B, C \text{ complex} \\
        s' &= \lambda \odot s + e^{\gamma} \odot (x B) \\
        y &= \mathrm{Re}(s' C) + x D

    where :math:`\lambda` are the eigenvalues, one for each complex state in :math:`s`,
    and :math:`\mathrm{i}` is the imaginary unit. The weights :math:`B`, :math:`C` and
    :math:`D` have the paper's letters. A modulus :math:`|\lambda|` near 1 remembers for
    long, since a state is multiplied by it at each step.

    Args:
      params: ``nu_log``, ``theta_log`` and ``gamma_log`` ``[S]``, ``b_re`` and ``b_im``
        ``[D, S]``, ``c_re`` and ``c_im`` ``[S, H]``, ``d [D, H]``; see
        :class:`jlstm.cells.LRUParams`.
      carry: the real and the imaginary part of :math:`s` after the step before,
        ``[..., S]`` each.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``.

    Example:
      >>> cell, x = jlstm.LRU(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Orvieto et al., Resurrecting recurrent neural networks for long sequences, 2023.
    """
    return lru_update(params, carry, lru_project(params, x))


@config
class LRU:
    r"""A linear recurrent unit; :func:`jlstm.cells.lru_step` has the formula.

    It forgets at fixed rates, which do not depend on the input: ``init`` draws
    :math:`\lambda` uniformly from a ring of the complex plane, and sets
    :math:`e^\gamma = \sqrt{1 - |\lambda|^2}`. A unit of modulus r keeps the fraction
    :math:`r^t` after t steps. For very long sequences, use it in a stack with layers
    between that are not linear. All steps can be computed at once, with
    ``RNN(cell, implementation="associative")``.

    Attributes:
      hidden_size: ``H``, the size of the output.
      state_size: ``S``, the number of complex states; ``None``, the default, means
        ``H``.
      r_min: the inner radius of the ring, 0 or more. Raise it to remember for longer:
        with 0.99, half of a state is left after about 70 steps.
      r_max: the outer radius of the ring, at most 1.
      max_phase: the largest angle of an eigenvalue, in radians; 2π, the default, is the
        whole ring. A small one, such as 0.1, makes a long memory easier to learn.

    Raises:
      ValueError: on construction, unless ``0 <= r_min < r_max <= 1`` and
        ``max_phase > 0``.

    Example:
      >>> layer = jlstm.RNN(jlstm.LRU(8, state_size=16, r_min=0.9))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape, carry.re.shape
      ((2, 5, 8), (2, 16))
    """

    hidden_size: int
    state_size: int | None = None
    r_min: float = 0.0
    r_max: float = 1.0
    max_phase: float = 2 * math.pi

    project = staticmethod(lru_project)
    mix = staticmethod(lru_mix)
    update = staticmethod(lru_update)
    step = staticmethod(lru_step)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")
        if self.state_size is not None:
            check_positive(self, "state_size")
        if not 0 <= self.r_min < self.r_max <= 1:
            raise ValueError(
                "LRU.r_min, r_max: must be 0 <= r_min < r_max <= 1, got "
                f"{self.r_min!r} and {self.r_max!r}"
            )
        if not self.max_phase > 0:
            raise ValueError(f"LRU.max_phase: must be > 0, got {self.max_phase!r}")

    def init(self, key: Array, x: Array) -> LRUParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 7)
        features, dtype, out = x.shape[-1], float_dtype(x), self.hidden_size
        size = self.state_size or out
        tiny = float(jnp.finfo(dtype).eps)  # no logarithm of zero
        low, high = self.r_min**2, self.r_max**2
        square = jax.random.uniform(keys[0], (size,), dtype, low, high)
        square = jnp.clip(square, tiny, 1 - tiny)  # of the modulus
        phase = jax.random.uniform(keys[1], (size,), dtype, tiny) * self.max_phase
        small = Normal((2 * features) ** -0.5)
        return LRUParams(
            nu_log=jnp.log(-jnp.log(square) / 2),
            theta_log=jnp.log(phase),
            gamma_log=jnp.log(1 - square) / 2,
            b_re=small(keys[2], (features, size), dtype),
            b_im=small(keys[3], (features, size), dtype),
            c_re=Normal(size**-0.5)(keys[4], (size, out), dtype),
            c_im=Normal(size**-0.5)(keys[5], (size, out), dtype),
            d=Normal(features**-0.5)(keys[6], (features, out), dtype),
        )

    def prepare(
        self, params: LRUParams, xs: Array, *, key: Array | None = None
    ) -> tuple[LRUParams, Array]:
        """Makes the eigenvalues, outside the loop."""
        del key
        re, im = lru_eigenvalues(params)
        return dataclasses.replace(params, re=re, im=im), xs

    def init_carry(self, params: LRUParams, batch_shape: tuple[int, ...]) -> LRUCarry:
        """Makes the fresh carry, ``[*batch_shape, S]`` each."""
        size = params.nu_log.shape[0]
        re, im = (fresh(None, size, batch_shape, params.nu_log) for _ in range(2))
        return LRUCarry(re, im)
