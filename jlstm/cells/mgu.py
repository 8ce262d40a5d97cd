"""Minimal gated unit: one gate both resets and updates."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import init as initialisers
from jlstm.cells.gates import add_vector, affine, fresh, gates, named, tanh
from jlstm.init import per_gate
from jlstm.types import Array, Initializer, check_positive, config, float_dtype


@struct.dataclass
class MGUParams:
    """Weights of a minimal gated unit; gates stand in the order f, n.

    Attributes:
      w_ih: input weights, ``[D, 2H]``.
      w_hh: recurrent weights, ``[H, 2H]``.
      b: biases, ``[2H]``.
      b_hh: biases of the candidate's recurrent part, inside the gate, ``[H]``; ``None``
        without ``reset_after``.
      h0: the learned fresh ``h``, ``[H]``; ``None`` without ``learned_carry``.
    """

    w_ih: Array
    w_hh: Array
    b: Array
    b_hh: Array | None = None
    h0: Array | None = None


class MGUCarry(NamedTuple):
    """Carry of a minimal gated unit.

    Attributes:
      h: memory and output in one, ``[..., H]``.
    """

    h: Array


def mgu_project(params: MGUParams, x: Array) -> Array:
    """Computes the part of the pre-activations that depends on ``x`` alone."""
    return affine(x, params.w_ih, params.b)


def mgu_mix(params: MGUParams, carry: MGUCarry, zx: Array) -> Array:
    """Computes the recurrent product of f, ``[..., H]``."""
    del zx
    return carry.h @ jnp.split(params.w_hh, 2, axis=-1)[0]


def mgu_update(
    params: MGUParams, carry: MGUCarry, zx: Array, zh: Array
) -> tuple[MGUCarry, Array]:
    """Makes the gate from ``zx [..., 2H]`` and ``zh [..., H]``, and applies it."""
    x_f, x_n = jnp.split(zx, 2, axis=-1)
    (f,) = gates(x_f + zh, "s", "f")
    held = f * carry.h
    n = x_n + held @ jnp.split(params.w_hh, 2, axis=-1)[1]
    n = named("n", tanh(n), tanh)
    h = carry.h - held + f * n
    return MGUCarry(h), h


def mgu_step(params: MGUParams, carry: MGUCarry, x: Array) -> tuple[MGUCarry, Array]:
    r"""Advances a minimal gated unit, as published, by one time step.

    .. math::
        f &= \sigma(x W_{ih}^f + h W_{hh}^f + b^f) \\
        n &= \tanh(x W_{ih}^n + (f \odot h) W_{hh}^n + b^n) \\
        h' &= (1 - f) \odot h + f \odot n

    where :math:`f` is the gate and :math:`n` the candidate: the larger :math:`f`, the
    more of :math:`h` is replaced.

    Args:
      params: the weights ``w_ih [D, 2H]``, ``w_hh [H, 2H]`` and ``b [2H]``.
      carry: ``h`` after the step before, ``[..., H]``.
      x: input at this step, ``[..., D]``; leading dimensions are batch dimensions.

    Returns:
      ``(carry, y)``: the new carry, and the output ``[..., H]``, which is the new
      ``h``.

    Example:
      >>> cell, x = jlstm.MGU(8), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      Zhou, Wu, Zhang & Zhou, Minimal gated unit for recurrent neural networks, 2016.
    """
    zx = mgu_project(params, x)
    return mgu_update(params, carry, zx, mgu_mix(params, carry, zx))


def mgu_reset_after_mix(params: MGUParams, carry: MGUCarry, zx: Array) -> Array:
    """Computes the recurrent product with its bias, ``[..., 2H]``."""
    del zx
    zh, b = carry.h @ params.w_hh, params.b_hh
    return zh if b is None else add_vector(zh, jnp.pad(b, (b.shape[0], 0)))


def mgu_reset_after_update(
    params: MGUParams, carry: MGUCarry, zx: Array, zh: Array
) -> tuple[MGUCarry, Array]:
    """Makes the gate from ``zx [..., 2H]`` and ``zh [..., 2H]``, and applies it."""
    del params
    x_f, x_n = jnp.split(zx, 2, axis=-1)
    h_f, h_n = jnp.split(zh, 2, axis=-1)
    (f,) = gates(x_f + h_f, "s", "f")
    n = named("n", tanh(x_n + f * h_n), tanh)
    h = n - f * n + f * carry.h
    return MGUCarry(h), h


def mgu_reset_after_step(
    params: MGUParams, carry: MGUCarry, x: Array
) -> tuple[MGUCarry, Array]:
    r"""Advances a minimal gated unit with one recurrent product by one time step.

    .. math::
        f &= \sigma(x W_{ih}^f + h W_{hh}^f + b^f) \\
        n &= \tanh(x W_{ih}^n + b^n + f \odot (h W_{hh}^n + b_{hh}^n)) \\
        h' &= (1 - f) \odot n + f \odot h

    This is Flax's form. Here the larger :math:`f`, the more of :math:`h` is kept, the
    opposite of :func:`mgu_step`. Arguments and results are those of that function, with
    ``b_hh [H]`` among the params.

    Example:
      >>> cell, x = jlstm.MGU(8, reset_after=True), jnp.ones((2, 3))
      >>> params = cell.init(jax.random.key(0), x)
      >>> carry, y = cell.step(params, cell.init_carry(params, (2,)), x)
      >>> y.shape
      (2, 8)

    References:
      ``flax.linen.MGUCell``; Zhou et al., 2016.
    """
    zx = mgu_project(params, x)
    zh = mgu_reset_after_mix(params, carry, zx)
    return mgu_reset_after_update(params, carry, zx, zh)


@config
class MGU:
    """Minimal gated unit; :func:`jlstm.cells.mgu_step` has the formula.

    It has one gate, and half of an LSTM's weights.

    Attributes:
      hidden_size: ``H``, the number of units, which is also the size of the output.
      reset_after: true is Flax's form, :func:`jlstm.cells.mgu_reset_after_step`, with
        one recurrent product a step instead of two, and with a gate that keeps where
        the published one replaces.
      forget_bias: a number that ``init`` adds to the bias of f. To remember for longer,
        make it negative in the published form, and positive in Flax's form, where Flax
        itself has 1.
      learned_carry: true makes the fresh carry a param, which starts at zero; otherwise
        each sequence begins with zeros.
      w_ih_init: initialiser of ``w_ih``, called once for each gate; see
        :mod:`jlstm.init`.
      w_hh_init: initialiser of ``w_hh``, called once for each gate.
      b_init: initialiser of the biases, to which ``forget_bias`` is then added.

    Example:
      >>> layer = jlstm.RNN(jlstm.MGU(8))
      >>> xs = jnp.ones((2, 5, 3))
      >>> ys, carry = layer.apply(layer.init(jax.random.key(0), xs), xs)
      >>> ys.shape
      (2, 5, 8)
    """

    hidden_size: int
    reset_after: bool = False
    forget_bias: float = 0.0
    learned_carry: bool = False
    w_ih_init: Initializer = initialisers.glorot_uniform
    w_hh_init: Initializer = initialisers.orthogonal
    b_init: Initializer = initialisers.zeros

    project = staticmethod(mgu_project)

    def __post_init__(self) -> None:
        check_positive(self, "hidden_size")

    def mix(self, params: MGUParams, carry: MGUCarry, zx: Array) -> Array:
        """Computes the recurrent product."""
        mix = mgu_reset_after_mix if self.reset_after else mgu_mix
        return mix(params, carry, zx)

    def update(
        self, params: MGUParams, carry: MGUCarry, zx: Array, zh: Array
    ) -> tuple[MGUCarry, Array]:
        """Applies the gate."""
        update = mgu_reset_after_update if self.reset_after else mgu_update
        return update(params, carry, zx, zh)

    def step(
        self, params: MGUParams, carry: MGUCarry, x: Array
    ) -> tuple[MGUCarry, Array]:
        """Advances one step."""
        step = mgu_reset_after_step if self.reset_after else mgu_step
        return step(params, carry, x)

    def init(self, key: Array, x: Array) -> MGUParams:
        """Makes params for inputs like ``x [..., D]``."""
        keys = jax.random.split(key, 4)
        size, dtype = self.hidden_size, float_dtype(x)
        b = per_gate(self.b_init, keys[2], 2, (size,), dtype)
        return MGUParams(
            w_ih=per_gate(self.w_ih_init, keys[0], 2, (x.shape[-1], size), dtype),
            w_hh=per_gate(self.w_hh_init, keys[1], 2, (size, size), dtype),
            b=b.at[:size].add(jnp.asarray(self.forget_bias, dtype)),
            b_hh=self.b_init(keys[3], (size,), dtype) if self.reset_after else None,
            h0=jnp.zeros((size,), dtype) if self.learned_carry else None,
        )

    def init_carry(self, params: MGUParams, batch_shape: tuple[int, ...]) -> MGUCarry:
        """Makes the fresh carry, ``[*batch_shape, H]``."""
        return MGUCarry(fresh(params.h0, self.hidden_size, batch_shape, params.w_hh))
