"""Initialisers: module-level functions or configs, called as ``(key, shape, dtype)``.

Cells call them once *per gate*, so that a recurrent matrix is orthogonal gate by gate
and the scale of an input matrix does not depend on the number of gates.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jlstm.types import Array, Initializer, common_dtype, config

CellT = TypeVar("CellT", bound=Any)


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
class Identity:
    r"""Fills a square matrix with ``scale`` times the identity.

    A simple recurrent network with rectified linear units that starts here is an IRNN:
    ``Elman(H, activation=jax.nn.relu, w_hh_init=Identity())``. Without input it keeps
    its carry, and gradients, as they are; a scale below 1 makes it forget.

    References:
      Le, Jaitly & Hinton, A simple way to initialize recurrent networks of rectified
      linear units, 2015.
    """

    scale: float = 1.0

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Makes the matrix.

        Raises:
          ValueError: the shape is not square.
        """
        del key
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(
                f"Identity: expected the shape of a square matrix, got {list(shape)}; "
                "it is for recurrent weights, such as w_hh [H, H]"
            )
        return jnp.eye(shape[0], dtype=dtype) * jnp.asarray(self.scale, dtype)


@config
class Chrono:
    r"""Chrono initialisation of the gate biases of an LSTM, or a GRU.

    .. math::
        b_f \sim \log U(1, T_{max} - 1), \qquad b_i = -b_f

    so that the memory times of the cells spread up to ``max_time`` steps. Give it as
    ``LSTM(H, forget_bias=Chrono(max_time))``, or as ``GRU(H, update_bias=...)``, whose
    :math:`b_z` is :math:`b_f`.

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

    Compared and hashed by content, so that it can stand in a config. One that
    :func:`jlstm.load` made from a file lacks the array: it compares equal, and cannot
    hand anything out.

    Example:
      >>> vectors = np.ones((100, 16), np.float32)
      >>> jlstm.Embed(100, 16, table_init=jlstm.init.Pretrained(vectors))
      Embed(100, 16, table_init=Pretrained([100, 16], sha256='cd22e001'))
    """

    def __init__(self, values: Any) -> None:
        self.values: np.ndarray | None = np.array(values)
        self.values.setflags(write=False)
        self.shape = self.values.shape
        digest = hashlib.sha256(self.values.tobytes())
        digest.update(f"{self.values.dtype}{self.values.shape}".encode())
        self.digest = digest.hexdigest()

    @classmethod
    def absent(cls, shape: tuple[int, ...], sha256: str) -> Pretrained:
        """Stands for an array that is not at hand."""
        made = cls.__new__(cls)
        made.values, made.shape, made.digest = None, tuple(shape), str(sha256)
        return made

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Returns the array.

        Raises:
          ValueError: its shape is not the one asked for, or it is not at hand.
        """
        del key
        if self.values is None:
            raise ValueError(
                f"{self!r}: the array is not in the file that this was loaded from; "
                "give jlstm.init.Pretrained(vectors) to init anew"
            )
        if self.shape != tuple(shape):
            raise ValueError(
                f"Pretrained: expected an array of shape {list(shape)}, got "
                f"{list(self.shape)}; match the layer's sizes to the vectors"
            )
        return jnp.asarray(self.values, dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pretrained) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Pretrained({list(self.shape)}, sha256='{self.digest[:8]}')"


@config
class Joint:
    """Draws the matrix of all gates at once, not gate by gate.

    Keras and ``nnx.OptimizedLSTMCell`` do so: the rows of an orthogonal ``[H, 4H]`` are
    orthonormal, and the gates in it are not.

    Example:
      >>> jlstm.LSTM(8, w_hh_init=jlstm.init.Joint(jlstm.init.orthogonal))
      LSTM(8, w_hh_init=Joint(jlstm.init.orthogonal))
    """

    init: Initializer

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Draws an array."""
        return self.init(key, shape, dtype)


@config
class TruncatedNormal:
    """Draws from a normal of mean 0, cut at two deviations; ``stddev`` is before that.

    Haiku's LSTM has ``stddev = (D + H) ** -0.5``.
    """

    stddev: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Draws an array."""
        drawn = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
        return drawn * jnp.asarray(self.stddev, dtype)


def per_gate(
    init: Initializer, key: Array, gates: int, shape: tuple[int, ...], dtype: Any
) -> Array:
    """Draws one block a gate and joins them on the last axis, ``[..., gates * H]``."""
    if isinstance(init, Joint):
        return init(key, (*shape[:-1], gates * shape[-1]), dtype)
    keys = jax.random.split(key, gates)
    return jnp.concatenate([init(k, shape, dtype) for k in keys], axis=-1)


def per_head(
    init: Initializer, key: Array, heads: int, gates: int, size: int, dtype: Any
) -> Array:
    """Draws a recurrent matrix a head, gate by gate, ``[heads, n, gates * n]``.

    That is for ``n = size / heads``.
    """
    keys, shape = jax.random.split(key, heads), (size // heads, size // heads)
    return jnp.stack([per_gate(init, k, gates, shape, dtype) for k in keys])


# The distributions of other libraries, so that runs can be compared with theirs.


def as_torch(cell: CellT) -> CellT:
    r"""Gives a cell PyTorch's initialisation, :math:`U(-H^{-1/2}, H^{-1/2})`.

    Both biases are drawn, where the cell has two; none is added to the forget gate.

    Args:
      cell: ``LSTM``, ``GRU`` or ``Elman``.

    Returns:
      The cell with these options.

    Example:
      >>> jlstm.init.as_torch(jlstm.Elman(4)).w_hh_init
      Uniform(0.5)
    """
    draw = Uniform(_size(cell) ** -0.5)
    return _with(cell, draw, draw, draw, forget_bias=0.0, double_bias=True)


def as_equinox(cell: CellT) -> CellT:
    """Gives a cell Equinox's initialisation: PyTorch's, with one bias.

    Example:
      >>> jlstm.init.as_equinox(jlstm.GRU(4)).b_init
      Uniform(0.5)
    """
    draw = Uniform(_size(cell) ** -0.5)
    return _with(cell, draw, draw, draw, forget_bias=0.0, double_bias=False)


def as_keras(cell: CellT) -> CellT:
    """Gives a cell Keras' initialisation, of the matrices of all gates at once.

    Example:
      >>> jlstm.init.as_keras(jlstm.LSTM(4)).w_hh_init
      Joint(jlstm.init.orthogonal)
    """
    double_bias = getattr(cell, "reset_after", False)  # its GRU has two
    matrices = Joint(glorot_uniform), Joint(orthogonal)
    return _with(cell, *matrices, zeros, forget_bias=1.0, double_bias=double_bias)


def as_flax(cell: CellT) -> CellT:
    """Gives a cell the initialisation of Flax's linen, and of ``nnx.LSTMCell``.

    Example:
      >>> jlstm.init.as_flax(jlstm.LSTM(4)).forget_bias
      0.0
    """
    options = {"forget_bias": 0.0, "double_bias": False}
    return _with(cell, lecun_normal, orthogonal, zeros, **options)


def as_nnx(cell: CellT) -> CellT:
    """Gives a cell the initialisation of ``nnx.OptimizedLSTMCell`` and ``nnx.GRUCell``.

    Example:
      >>> jlstm.init.as_nnx(jlstm.GRU(4)).w_hh_init
      Joint(jlstm.init.orthogonal)
    """
    options = {"forget_bias": 0.0, "double_bias": False}
    return _with(cell, lecun_normal, Joint(orthogonal), zeros, **options)


def as_haiku(cell: CellT, input_size: int) -> CellT:
    """Gives a cell Haiku's initialisation.

    Args:
      cell: ``LSTM`` or ``GRU(H, reset_after=False)``.
      input_size: ``D``, which the recurrent weights of its LSTM depend on too.

    Returns:
      The cell with these options.

    Example:
      >>> jlstm.init.as_haiku(jlstm.LSTM(9), input_size=7).w_hh_init
      TruncatedNormal(0.25)
    """
    if hasattr(cell, "reset_after"):
        return _with(cell, lecun_normal, lecun_normal, zeros, double_bias=False)
    draw = TruncatedNormal((input_size + _size(cell)) ** -0.5)
    return _with(cell, draw, draw, zeros, forget_bias=1.0, double_bias=False)


def _with(
    cell: Any, w_ih: Initializer, w_hh: Initializer, b: Initializer, **options: Any
) -> Any:
    _size(cell)
    given = {"w_ih_init": w_ih, "w_hh_init": w_hh, "w_hr_init": w_hh, "b_init": b}
    names = {field.name for field in dataclasses.fields(cell)}
    chosen = {k: v for k, v in (given | options).items() if k in names}
    return dataclasses.replace(cell, **chosen)


def _size(cell: Any) -> int:
    needed = ("hidden_size", "w_ih_init", "w_hh_init", "b_init")
    if missing := [name for name in needed if not hasattr(cell, name)]:
        raise ValueError(
            f"init: needs a cell that has {', '.join(needed)}, got {cell!r} without "
            f"{missing[0]}; wrap it afterwards"
        )
    return cell.hidden_size
