"""Initialisers, which draw the weights of cells and layers.

An initialiser is a module-level function or a config that is called as
``(key, shape, dtype)``: with a typed key, the shape of the array to make and its dtype.
A function of your own may be given to any field whose name ends in ``_init``. What
``jax.nn.initializers.normal()`` returns is a local function, which a config refuses:
call it inside a function of your own.

Cells call an initialiser once *for each gate*. So the recurrent matrix is orthogonal
within each gate, and the scale of the input matrix does not depend on the number of
gates. Below, ``m`` is the number of rows of a matrix (inputs) and ``n`` the number of
its columns (outputs).
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
    """Fills an array with zeros, the default for biases."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Fills an array with ones, the default for scales of normalisations."""
    del key
    return jnp.ones(shape, dtype)


def glorot_uniform(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    r"""Draws from :math:`U(-a, a)` with :math:`a = \sqrt{6 / (m + n)}` (Glorot, 2010).

    It keeps the size of activations and of gradients about the same from layer to
    layer, and is the default for input weights of cells. It needs at least two
    dimensions.
    """
    return jax.nn.initializers.glorot_uniform()(key, shape, dtype)


def lecun_normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draws from a truncated normal of variance :math:`1/m` (LeCun, 1998).

    It keeps the size of activations about the same, and is the default of ``Dense`` and
    ``Conv``. It needs at least two dimensions.
    """
    return jax.nn.initializers.lecun_normal()(key, shape, dtype)


def orthogonal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draws a matrix with orthonormal rows or columns (Saxe et al., 2014).

    A square one keeps the length of every vector, so that a recurrent product neither
    grows nor shrinks its input. It is the default for recurrent weights, and needs at
    least two dimensions.
    """
    wide = common_dtype(dtype, jnp.float32)  # half precision has no QR
    return jax.nn.initializers.orthogonal()(key, shape, wide).astype(dtype)


@config
class Uniform:
    """Draws from ``U(-limit, limit)``.

    PyTorch's recurrent layers draw all their weights so, with ``limit = H ** -0.5``.

    Attributes:
      limit: the largest absolute value.
    """

    limit: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Draws an array."""
        return jax.random.uniform(key, shape, dtype, -self.limit, self.limit)


@config
class Normal:
    """Draws from a normal distribution of mean 0.

    Attributes:
      stddev: its standard deviation.
    """

    stddev: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Draws an array."""
        return jax.random.normal(key, shape, dtype) * jnp.asarray(self.stddev, dtype)


@config
class Identity:
    """Fills a square matrix with ``scale`` times the identity.

    It is for the recurrent weights of a simple network with rectified linear units,
    which is then called an IRNN:
    ``Elman(H, activation=jax.nn.relu, w_hh_init=Identity())``. Without input, such a
    network keeps its carry as it is, and gradients pass unchanged.

    Attributes:
      scale: what stands on the diagonal. 1, the default, keeps the carry; a value below
        1 makes it decay by this factor at each step.

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
    r"""Draws the biases of an LSTM or GRU whose units remember for different times.

    .. math::
        b^f \sim \log U(1, T_{max} - 1), \qquad b^i = -b^f

    A unit whose forget bias is :math:`\log(t - 1)` forgets over about :math:`t` steps.
    So the memory times of the units spread from 2 steps up to ``max_time``, where a
    constant ``forget_bias`` gives all units the same one. Give it as
    ``LSTM(H, forget_bias=Chrono(max_time))``, or as ``GRU(H, update_bias=...)``, whose
    :math:`b^z` is then :math:`b^f`.

    Attributes:
      max_time: :math:`T_{max}`, in steps, at least 3: how far back the longest
        dependencies of the task reach, such as the length of its sequences.

    Raises:
      ValueError: on construction, if ``max_time`` is below 3.

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

    It is compared and hashed by content, so it can stand in a config. If
    :func:`jlstm.load` makes it from a file, it lacks the array, because the file has
    the params already. It still compares equal, but raises an error if it is called.

    Args:
      values: the array, such as ``[V, size]`` for the table of an ``Embed``. It is
        copied, and cast to the dtype of the params.

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
        """Stands for an array that is not at hand.

        Args:
          shape: the shape of the array.
          sha256: the hash of its content.
        """
        made = cls.__new__(cls)
        made.values, made.shape, made.digest = None, tuple(shape), str(sha256)
        return made

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Returns the array.

        Raises:
          ValueError: its shape is not the one asked for, or there is no array.
        """
        del key
        if self.values is None:
            raise ValueError(
                f"{self!r}: was loaded from a file, which does not hold the array; to "
                "init again, give jlstm.init.Pretrained(vectors)"
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
    """Draws the matrix of all gates at once, where cells draw it gate by gate.

    Keras and ``nnx.OptimizedLSTMCell`` do so. With :func:`orthogonal`, the rows of the
    whole ``[H, 4H]`` are then orthonormal, and the matrix of a single gate is not
    orthogonal.

    Attributes:
      init: the initialiser that draws the whole matrix.

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
    """Draws from a normal distribution of mean 0, cut off at two standard deviations.

    Haiku's LSTM draws its weights so, with ``stddev = (D + H) ** -0.5``.

    Attributes:
      stddev: the standard deviation before the cut; that of the drawn numbers is 0.88
        times as large.
    """

    stddev: float

    def __call__(self, key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        """Draws an array."""
        drawn = jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)
        return drawn * jnp.asarray(self.stddev, dtype)


def per_gate(
    init: Initializer, key: Array, gates: int, shape: tuple[int, ...], dtype: Any
) -> Array:
    """Draws one block for each gate and joins them on the last axis.

    The ``init`` of a cell of your own calls it for its weights.

    Args:
      init: the initialiser; one that is a :class:`Joint` draws all gates at once.
      key: a typed key.
      gates: the number of gates.
      shape: the shape of one block, such as ``(D, H)``.
      dtype: the dtype of the array.

    Returns:
      An array ``[..., gates * H]``.

    Example:
      >>> draw, key = jlstm.init.orthogonal, jax.random.key(0)
      >>> jlstm.init.per_gate(draw, key, 4, (8, 8), jnp.float32).shape
      (8, 32)
    """
    if isinstance(init, Joint):
        return init(key, (*shape[:-1], gates * shape[-1]), dtype)
    keys = jax.random.split(key, gates)
    return jnp.concatenate([init(k, shape, dtype) for k in keys], axis=-1)


def per_head(
    init: Initializer, key: Array, heads: int, gates: int, size: int, dtype: Any
) -> Array:
    """Draws a recurrent matrix for each head, gate by gate.

    Args:
      init: the initialiser.
      key: a typed key.
      heads: the number of heads ``N``, which divides ``size``.
      gates: the number of gates.
      size: ``H``, the units of all heads together.
      dtype: the dtype of the array.

    Returns:
      An array ``[N, H/N, gates * H/N]``.

    Example:
      >>> draw, key = jlstm.init.orthogonal, jax.random.key(0)
      >>> jlstm.init.per_head(draw, key, 2, 4, 8, jnp.float32).shape
      (2, 4, 16)
    """
    keys, shape = jax.random.split(key, heads), (size // heads, size // heads)
    return jnp.stack([per_gate(init, k, gates, shape, dtype) for k in keys])


# The distributions of other libraries, so that runs can be compared with theirs.


def as_torch(cell: CellT) -> CellT:
    """Gives a cell PyTorch's initialisation, :math:`U(-H^{-1/2}, H^{-1/2})`.

    The two biases that PyTorch has are both drawn, where the cell can have two. Nothing
    is added to the forget gate's bias.

    Args:
      cell: ``LSTM``, ``GRU`` or ``Elman``, or another cell whose fields have the same
        names.

    Returns:
      The cell with these initialisers and options.

    Example:
      >>> jlstm.init.as_torch(jlstm.Elman(4)).w_hh_init
      Uniform(0.5)
    """
    draw = Uniform(_size(cell) ** -0.5)
    return _with(cell, draw, draw, draw, forget_bias=0.0, double_bias=True)


def as_equinox(cell: CellT) -> CellT:
    """Gives a cell Equinox's initialisation: PyTorch's, with one bias.

    Args:
      cell: ``LSTM`` or ``GRU``.

    Returns:
      The cell with these initialisers and options.

    Example:
      >>> jlstm.init.as_equinox(jlstm.GRU(4)).b_init
      Uniform(0.5)
    """
    draw = Uniform(_size(cell) ** -0.5)
    return _with(cell, draw, draw, draw, forget_bias=0.0, double_bias=False)


def as_keras(cell: CellT) -> CellT:
    """Gives a cell Keras' initialisation, which draws the gates' matrices at once.

    Input weights are Glorot uniform, recurrent weights orthogonal and biases zero. An
    LSTM has 1 added to the forget gate's bias.

    Args:
      cell: ``LSTM``, ``GRU`` or ``Elman``.

    Returns:
      The cell with these initialisers and options.

    Example:
      >>> jlstm.init.as_keras(jlstm.LSTM(4)).w_hh_init
      Joint(jlstm.init.orthogonal)
    """
    double_bias = getattr(cell, "reset_after", False)  # its GRU has two
    matrices = Joint(glorot_uniform), Joint(orthogonal)
    return _with(cell, *matrices, zeros, forget_bias=1.0, double_bias=double_bias)


def as_flax(cell: CellT) -> CellT:
    """Gives a cell the initialisation of Flax's linen, and of ``nnx.LSTMCell``.

    Input weights are LeCun normal, recurrent weights orthogonal gate by gate, biases
    zero.

    Args:
      cell: ``LSTM``, ``GRU`` or ``Elman``.

    Returns:
      The cell with these initialisers and options.

    Example:
      >>> jlstm.init.as_flax(jlstm.LSTM(4)).forget_bias
      0.0
    """
    options = {"forget_bias": 0.0, "double_bias": False}
    return _with(cell, lecun_normal, orthogonal, zeros, **options)


def as_nnx(cell: CellT) -> CellT:
    """Gives a cell the initialisation of ``nnx.OptimizedLSTMCell`` and ``nnx.GRUCell``.

    It is that of :func:`as_flax`, except that the recurrent weights of all gates are
    drawn at once.

    Args:
      cell: ``LSTM`` or ``GRU``.

    Returns:
      The cell with these initialisers and options.

    Example:
      >>> jlstm.init.as_nnx(jlstm.GRU(4)).w_hh_init
      Joint(jlstm.init.orthogonal)
    """
    options = {"forget_bias": 0.0, "double_bias": False}
    return _with(cell, lecun_normal, Joint(orthogonal), zeros, **options)


def as_haiku(cell: CellT, input_size: int) -> CellT:
    """Gives a cell Haiku's initialisation.

    An LSTM's weights are truncated normal of deviation :math:`(D + H)^{-1/2}`, a GRU's
    are LeCun normal.

    Args:
      cell: ``LSTM`` or ``GRU(H, reset_after=False)``.
      input_size: ``D``, on which the weights of the LSTM depend.

    Returns:
      The cell with these initialisers and options.

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
            f"{missing[0]}; give the bare cell, and wrap the result"
        )
    return cell.hidden_size
