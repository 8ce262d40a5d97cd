"""Layers that see one step at a time and carry nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jlstm import door
from jlstm import init as initialisers
from jlstm.cells.gates import affine
from jlstm.cells.wrappers import look_up
from jlstm.layers.recurrent import wrong_carry
from jlstm.types import (
    Array,
    Initializer,
    PyTree,
    check_activations,
    check_positive,
    common_dtype,
    config,
    float_dtype,
    zero_rows,
)


class Pointwise:
    """What these layers share: no carry, clean input, zeros at masked steps."""

    pointwise = True

    def init(self, key: Array, xs: PyTree) -> PyTree:
        """Makes no params."""
        del key, xs
        return ()

    def init_carry(self, params: PyTree, batch_shape: tuple[int, ...]) -> tuple[()]:
        """Makes the empty carry."""
        del params, batch_shape
        return ()

    def apply(
        self,
        params: PyTree,
        xs: PyTree,
        carry: PyTree = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
    ) -> tuple[PyTree, tuple[()]]:
        """Maps each step by itself."""
        where = type(self).__name__
        if jax.tree.leaves(carry):
            raise wrong_carry(where, "() or None", carry)
        mask = door.valid_steps(
            xs, lengths=lengths, mask=mask, resets=resets, where=where
        )
        return zero_rows(mask, self._map(params, zero_rows(mask, xs), key)), ()

    def _map(self, params: PyTree, xs: PyTree, key: Array | None) -> PyTree:
        raise NotImplementedError


@config
class Dropout(Pointwise):
    """Drops features at random and scales the others by ``1 / (1 - rate)``.

    It does so where ``apply`` is given a ``key``; without one it returns its input.

    Attributes:
      rate: the probability that a feature is dropped, in [0, 1).
      shared_over_time: true draws one mask for all steps of a row (Gal & Ghahramani,
        2016), false, the default, another one for each step.

    Raises:
      ValueError: on construction, if ``rate`` is out of range.

    Example:
      >>> layer, xs = jlstm.Dropout(0.5, shared_over_time=True), jnp.ones((1, 4, 8))
      >>> ys, _ = layer.apply((), xs, key=jax.random.key(0))
      >>> bool((ys[:, 0] == ys[:, 3]).all()), layer.apply((), xs)[0] is xs
      (True, True)
    """

    rate: float
    shared_over_time: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"Dropout.rate: must be in [0, 1), got {self.rate}")

    def _map(self, params: PyTree, xs: PyTree, key: Array | None) -> PyTree:
        del params
        if key is None or self.rate == 0:
            return xs
        leaves, structure = jax.tree.flatten(xs)
        keys = jax.random.split(key, len(leaves))

        def drop(leaf: Array, key: Array) -> Array:
            time = 1 if self.shared_over_time else leaf.shape[1]
            shape = (leaf.shape[0], time, *leaf.shape[2:])
            keep = jax.random.bernoulli(key, 1 - self.rate, shape)
            # A product, because a select refuses a mask of another sharding.
            return leaf * (keep.astype(leaf.dtype) / (1 - self.rate))

        return structure.unflatten(map(drop, leaves, keys))


@struct.dataclass
class DenseParams:
    """Weights of an affine map.

    Attributes:
      w: ``[D, H]``, for ``H = size``.
      b: biases, ``[H]``, or ``None``.
    """

    w: Array
    b: Array | None


@config
class Dense(Pointwise):
    r"""Maps the features of each step by :math:`y = \phi(x W + b)`.

    Attributes:
      size: features of the output.
      activation: :math:`\phi`, a module-level function such as ``jax.nn.relu``, or
        ``None`` for none.
      bias: true adds ``b``.
      w_init: initialiser of ``w [D, size]``; see :mod:`jlstm.init`.
      b_init: initialiser of ``b [size]``.

    Example:
      >>> layer, xs = jlstm.Dense(4), jnp.ones((2, 5, 3))
      >>> layer.apply(layer.init(jax.random.key(0), xs), xs)[0].shape
      (2, 5, 4)
    """

    size: int
    activation: Callable[[Array], Array] | None = None
    bias: bool = True
    w_init: Initializer = initialisers.lecun_normal
    b_init: Initializer = initialisers.zeros

    def __post_init__(self) -> None:
        check_positive(self, "size")
        check_activations(self, "activation", optional=True)

    def init(self, key: Array, xs: Array) -> DenseParams:
        """Makes params for inputs like ``xs [B, T, D]``."""
        if len(jax.tree.leaves(xs)) != 1:
            raise door.error(
                "Dense", f"xs must be one array [B, T, D], got {door.shapes(xs)}"
            )
        keys = jax.random.split(key)
        dtype = float_dtype(xs)
        w = self.w_init(keys[0], (xs.shape[-1], self.size), dtype)
        return DenseParams(
            w, self.b_init(keys[1], (self.size,), dtype) if self.bias else None
        )

    def _map(self, params: DenseParams, xs: Array, key: Array | None) -> Array:
        del key
        if xs.shape[-1] != params.w.shape[0]:
            raise door.error(
                "Dense",
                f"xs must be [B, T, D={params.w.shape[0]}], got {list(xs.shape)}",
            )
        dtype = common_dtype(xs.dtype, params.w.dtype)
        ys = affine(
            xs.astype(dtype),
            *jax.tree.map(lambda leaf: leaf.astype(dtype), (params.w, params.b)),
        )
        return ys if self.activation is None else self.activation(ys)


@struct.dataclass
class EmbedParams:
    """A table of vectors.

    Attributes:
      table: one row for each symbol, ``[V, H]``, for ``H = size``.
    """

    table: Array


@config
class Embed(Pointwise):
    """Looks up a vector for each token id, ``[B, T] -> [B, T, size]``.

    In a stack with a recurrent layer, or in a language model, a table of few symbols is
    multiplied with the cell's input weights once, instead of the vector of each step;
    the results are the same.

    Attributes:
      vocab_size: ``V``, the number of symbols; ids are integers from 0 to V - 1.
      size: features of a vector.
      frozen: true keeps gradients from the table. An optimizer with weight decay would
        still change it, so leave it out of that too.
      table_init: initialiser of the table ``[V, size]``; for vectors that exist, give
        ``jlstm.init.Pretrained(vectors)``.
      dtype: the dtype of the table; ``None``, the default, means float32, or float64 in
        JAX's 64-bit mode.

    Example:
      >>> layer, tokens = jlstm.Embed(10, 4), jnp.array([[1, 2, 3]])
      >>> layer.apply(layer.init(jax.random.key(0), tokens), tokens)[0].shape
      (1, 3, 4)
    """

    vocab_size: int
    size: int
    frozen: bool = False
    table_init: Initializer = initialisers.Normal(1.0)
    dtype: Any = None

    def __post_init__(self) -> None:
        check_positive(self, "vocab_size", "size")
        if self.dtype is not None:
            # By name: NumPy's dtype of float64 equals None.
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)

    def init(self, key: Array, xs: Array) -> EmbedParams:
        """Makes the table ``[V, size]``."""
        self._check_dtype(xs)
        dtype = float_dtype(0) if self.dtype is None else self.dtype
        return EmbedParams(self.table_init(key, (self.vocab_size, self.size), dtype))

    def check(self, xs: Array) -> None:
        """Refuses inputs that are not token ids.

        Raises:
          ValueError: the dtype is not an integer one, or an id is outside the
            vocabulary. Under ``jax.jit`` ids are not known, and are clipped instead.
        """
        self._check_dtype(xs)
        if not door.is_concrete(xs) or not xs.size:
            return
        low, high = door.value_range(xs)
        if low < 0 or high >= self.vocab_size:
            raise door.error(
                "Embed",
                f"ids must lie in 0..{self.vocab_size - 1}, got values from {low} to "
                f"{high}",
            )

    def _check_dtype(self, xs: Array) -> None:
        if not jnp.issubdtype(xs.dtype, jnp.integer):
            raise door.error("Embed", f"xs must be integer token ids, got {xs.dtype}")

    def _map(self, params: EmbedParams, xs: Array, key: Array | None) -> Array:
        del key
        self.check(xs)
        return look_up(self.table(params), xs)

    def table(self, params: EmbedParams) -> Array:
        """Returns the table, without gradients if it is frozen."""
        shape = (self.vocab_size, self.size)
        if params.table.shape != shape:
            raise door.error(
                "Embed",
                f"table must be {list(shape)}, got {list(params.table.shape)}; were "
                "the params made for another config?",
            )
        return jax.lax.stop_gradient(params.table) if self.frozen else params.table


@struct.dataclass
class LayerNormParams:
    """Scale and shift of a normalisation.

    Attributes:
      scale: ``[D]``, or ``None``.
      shift: ``[D]``, or ``None``.
    """

    scale: Array | None
    shift: Array | None


@config
class LayerNorm(Pointwise):
    r"""Normalises the features of each step.

    .. math::
        y = \gamma \odot \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta

    with the mean :math:`\mu` and the variance :math:`\sigma^2` over the features of
    that step.

    Attributes:
      epsilon: :math:`\epsilon`, which keeps the division finite where all features are
        equal.
      scale: true learns :math:`\gamma`, false leaves it at 1.
      shift: true learns :math:`\beta`, false leaves it at 0.

    Example:
      >>> layer, xs = jlstm.LayerNorm(), jnp.array([[[1.0, 3.0]]])
      >>> layer.apply(layer.init(jax.random.key(0), xs), xs)[0].round(3).tolist()
      [[[-1.0, 1.0]]]

    References:
      Ba, Kiros & Hinton, Layer normalization, 2016.
    """

    epsilon: float = 1e-5
    scale: bool = True
    shift: bool = True

    def init(self, key: Array, xs: Array) -> LayerNormParams:
        """Makes params for inputs like ``xs [B, T, D]``."""
        del key
        size, dtype = xs.shape[-1:], float_dtype(xs)
        return LayerNormParams(
            jnp.ones(size, dtype) if self.scale else None,
            jnp.zeros(size, dtype) if self.shift else None,
        )

    def _map(self, params: LayerNormParams, xs: Array, key: Array | None) -> Array:
        del key
        sizes = {leaf.shape[0] for leaf in jax.tree.leaves(params)}
        if sizes - {xs.shape[-1]}:
            raise door.error(
                "LayerNorm",
                f"xs must be [B, T, D={min(sizes)}], got {list(xs.shape)}",
            )
        # Moments of low-precision inputs need float32.
        wide = common_dtype(xs.dtype, jnp.float32)
        centred = xs.astype(wide) - xs.astype(wide).mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        ys = centred * jax.lax.rsqrt(variance + self.epsilon)
        broadcast = (1,) * (xs.ndim - 1) + (-1,)
        if params.scale is not None:
            ys = ys * params.scale.astype(wide).reshape(broadcast)
        if params.shift is not None:
            ys = ys + params.shift.astype(wide).reshape(broadcast)
        return ys.astype(xs.dtype)
