"""Wrappers that constrain the weights, carry or output of a cell."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jlstm.cells.dropout import fields_of, replace, weight_of
from jlstm.cells.gates import row
from jlstm.cells.wrappers import Wrapper
from jlstm.types import Array, PyTree, config


class WeightNormParams(NamedTuple):
    """Params of a cell whose weights are normalised.

    Attributes:
      cell: the params of the inner cell; of the weights that are normalised, only the
        directions count.
      scale: the lengths of their columns, an array ``[G]`` under each weight's name.
    """

    cell: PyTree
    scale: dict[str, Array]


@config
class WeightNorm(Wrapper):
    r"""Learns the length of each column of a weight apart from its direction.

    .. math::
        \hat W_{:,j} = \ell_j \, \frac{W_{:,j}}{\lVert W_{:,j} \rVert}

    At init, :math:`\ell_j` is the length that the column has, so nothing changes. The
    product is computed once a sequence, before the loop.

    Attributes:
      cell: the cell.
      names: the weights, by their names in the cell's params; the recurrent ones unless
        given.

    Example:
      >>> layer = jlstm.RNN(jlstm.WeightNorm(jlstm.LSTM(8)))
      >>> params = layer.init(jax.random.key(0), jnp.ones((2, 5, 3)))
      >>> params.scale["w_hh"].shape
      (32,)

    References:
      Salimans & Kingma, Weight normalization, 2016.
    """

    cell: Any
    names: tuple[str, ...] = ("w_hh",)

    def init(self, key: Array, x: PyTree) -> WeightNormParams:
        """Makes params for inputs like ``x``."""
        params = self.cell.init(key, x)
        lengths = {name: _lengths(weight_of(self, params, name)) for name in self.names}
        return WeightNormParams(params, lengths)

    def init_carry(
        self, params: WeightNormParams, batch_shape: tuple[int, ...]
    ) -> PyTree:
        """Makes the fresh carry."""
        return self.cell.init_carry(params.cell, batch_shape)

    def before(
        self, params: WeightNormParams, xs: PyTree, key: Array | None
    ) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Makes the weights."""
        del key
        inner = params.cell
        for name, scale in params.scale.items():
            weight = weight_of(self, inner, name)
            factor = row(scale / _lengths(weight), weight)
            inner = replace(inner, name, weight * factor)
        return inner, xs, None, None


def _lengths(weight: Array) -> Array:
    axes = tuple(range(weight.ndim - 1))
    # A column of zeros has no direction, but must not make NaN.
    tiny = jnp.finfo(weight.dtype).tiny
    return jnp.sqrt(jnp.maximum(jnp.square(weight).sum(axes), tiny))


@config
class ClipCarry(Wrapper):
    """Clips the carry after each step to :math:`[-l, l]`.

    Where a value is clipped, its gradient is 0. A cell whose output is its new
    :math:`h` outputs the clipped one.

    Attributes:
      cell: the cell.
      limit: ``l``, positive.
      names: the fields of the carry to clip, such as ``("c",)``; all of them if empty.

    Raises:
      ValueError: on construction, if ``limit`` is not positive.

    Example:
      >>> cell = jlstm.ClipCarry(jlstm.LSTM(8), 3.0, names=("c",))

    References:
      Sak, Senior & Beaufays, Long short-term memory recurrent neural network
      architectures for large scale acoustic modeling, 2014.
    """

    cell: Any
    limit: float
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"ClipCarry.limit: must be positive, got {self.limit}")

    def after(
        self, extra: PyTree, old: PyTree, new: PyTree, y: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Clips the new carry."""
        del extra, old

        def clip(leaf: Array) -> Array:
            nonlocal y
            clipped = jnp.clip(leaf, -self.limit, self.limit)
            y = clipped if y is leaf else y
            return clipped

        if not self.names:
            return jax.tree.map(clip, new), y
        missing = [name for name in self.names if not hasattr(new, name)]
        if missing:
            raise ValueError(
                f"ClipCarry.names: the carry of {self.cell!r} has no field "
                f"{missing[0]!r}; {fields_of(new)}"
            )
        parts = {name: jax.tree.map(clip, getattr(new, name)) for name in self.names}
        return new._replace(**parts), y


@config
class ResidualCell(Wrapper):
    """Adds the input of a cell to its output, :math:`y_t + x_t`.

    ``Residual(RNN(cell))`` does the same for a layer. Use this one for a cell in
    ``bidirectional``, or inside another wrapper.

    Attributes:
      cell: the cell, whose outputs must have the shape of its inputs.

    Example:
      >>> layer = jlstm.bidirectional(jlstm.ResidualCell(jlstm.GRU(8)))
      >>> ys, _ = layer.apply(
      ...     layer.init(jax.random.key(0), jnp.ones((2, 5, 8))), jnp.ones((2, 5, 8))
      ... )
      >>> ys.shape
      (2, 5, 16)
    """

    cell: Any

    def before(
        self, params: PyTree, xs: PyTree, key: Array | None
    ) -> tuple[PyTree, PyTree, PyTree, PyTree]:
        """Keeps the inputs."""
        del key
        return params, xs, None, xs

    def after(
        self, extra: PyTree, old: PyTree, new: PyTree, y: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Adds the input."""
        del old
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (extra, y)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"ResidualCell: the outputs of {self.cell!r} must have the shape of "
                f"its inputs, {shapes[0]}, got {shapes[1]}"
            )
        return new, jax.tree.map(jnp.add, extra, y)
