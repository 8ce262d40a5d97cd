"""Initialisers: module-level functions or configs, called as ``(key, shape, dtype)``.

Cells call them once *per gate*, so that a recurrent matrix is orthogonal gate by gate
and the scale of an input matrix does not depend on the number of gates.
"""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.types import Array, Initializer, common_dtype, config


def zeros(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Fills with zeros."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Fills with ones."""
    del key
    return jnp.ones(shape, dtype)


def glorot_uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    r"""Draws from :math:`U(-a, a)`, :math:`a = \sqrt{6 / (m + n)}` (Glorot, 2010)."""
    return jax.nn.initializers.glorot_uniform()(key, shape, dtype)


def lecun_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    r"""Draws from a truncated normal of variance :math:`1/m` (LeCun, 1998)."""
    return jax.nn.initializers.lecun_normal()(key, shape, dtype)


def orthogonal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draws an orthogonal matrix (Saxe et al., 2014)."""
    wide = common_dtype(dtype, jnp.float32)  # half precision has no QR
    return jax.nn.initializers.orthogonal()(key, shape, wide).astype(dtype)


@config
class Uniform:
    """Draws from ``U(-limit, limit)``; PyTorch's layers have ``limit = H ** -0.5``."""

    limit: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Draws an array."""
        return jax.random.uniform(key, shape, dtype, -self.limit, self.limit)


@config
class Normal:
    """Draws from a normal of mean 0 and deviation ``stddev``."""

    stddev: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Draws an array."""
        return jax.random.normal(key, shape, dtype) * jnp.asarray(self.stddev, dtype)


@config
class Chrono:
    r"""Chrono initialisation of an LSTM's gate biases.

    .. math::
        b_f \sim \log U(1, T_{max} - 1), \qquad b_i = -b_f

    so that the memory times of the cells spread up to ``max_time`` steps. Give it as
    ``LSTM(H, forget_bias=Chrono(max_time))``.

    References:
      Tallec & Ollivier, Can recurrent neural networks warp time?, 2018.
    """

    max_time: int

    def __post_init__(self) -> None:
        if self.max_time < 3:
            raise ValueError(f"Chrono.max_time: must be >= 3, got {self.max_time}")

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Draws forget biases; the input biases are their negatives."""
        return jnp.log(jax.random.uniform(key, shape, dtype, 1.0, self.max_time - 1.0))


class Pretrained:
    """Hands out a given array, such as word vectors, where its shape fits.

    Compared and hashed by content, so that it can stand in a config.

    Example:
      >>> vectors = np.ones((100, 16), np.float32)
      >>> jlstm.Embed(100, 16, table_init=jlstm.init.Pretrained(vectors))
      Embed(100, 16, table_init=Pretrained([100, 16], sha256='cd22e001'))
    """

    def __init__(self, values: Any) -> None:
        self.values = np.array(values)
        self.values.setflags(write=False)
        digest = hashlib.sha256(self.values.tobytes())
        digest.update(f"{self.values.dtype}{self.values.shape}".encode())
        self.digest = digest.hexdigest()

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Returns the array.

        Raises:
          ValueError: its shape is not the one asked for.
        """
        del key
        if self.values.shape != tuple(shape):
            raise ValueError(
                f"Pretrained: expected an array of shape {list(shape)}, got "
                f"{list(self.values.shape)}; match the layer's sizes to the vectors"
            )
        return jnp.asarray(self.values, dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pretrained) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Pretrained({list(self.values.shape)}, sha256='{self.digest[:8]}')"


def per_gate(
    init: Initializer, key: Array, gates: int, shape: tuple[int, ...], dtype: Any
) -> Array:
    """Draws one block a gate and joins them on the last axis, ``[..., gates * H]``."""
    keys = jax.random.split(key, gates)
    return jnp.concatenate([init(k, shape, dtype) for k in keys], axis=-1)
