"""Any layer as a module of Flax; :func:`jlstm.lift` goes the other way."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlstm.layers.recurrent import check_layer_field
from jlstm.types import Array, Layer, PyTree, is_inexact


class Module(nnx.Module):
    """Any layer or model as an ``nnx.Module``.

    Each leaf of the params is an ``nnx.Param``, under ``weights`` and then its path in
    the params. So ``nnx.state``, ``nnx.grad``, ``nnx.jit``, ``nnx.Optimizer`` and
    checkpoints treat it like any other module. Leaves that are not floating are an
    ``nnx.Variable``, since they have no gradient.

    Attributes:
      layer: the layer.
      weights: the params, as ``nnx.Param`` in nested dicts.

    Example:
      >>> from flax import nnx
      >>> import jlstm.flax
      >>> layer, xs = jlstm.bidirectional(jlstm.LSTM(8)), jnp.ones((2, 5, 3))
      >>> module = jlstm.flax.Module(layer, xs, rngs=nnx.Rngs(0))
      >>> ys, carry = module(xs, lengths=jnp.array([5, 2]))
      >>> ys.shape, module.weights.forward.w_hh.shape
      ((2, 5, 16), (8, 32))
    """

    def __init__(
        self,
        layer: Layer,
        xs: PyTree = None,
        *,
        rngs: nnx.Rngs | None = None,
        params: PyTree = None,
    ) -> None:
        """Makes params by ``layer.init``, or takes those that exist.

        Give ``xs`` and ``rngs``, or ``params``.

        Args:
          layer: a layer or model.
          xs: an example of its input, arrays or ``jax.ShapeDtypeStruct``.
          rngs: draws the params, from the stream ``params``.
          params: existing params of the layer.

        Raises:
          TypeError: a cell is in the place of the layer.
          ValueError: neither ``xs`` and ``rngs`` nor ``params`` are given, or both.
        """
        check_layer_field("flax.Module.layer", layer)
        if (params is None) == (xs is None or rngs is None):
            raise ValueError(
                "flax.Module: give either params, or xs and rngs to make them"
            )
        if params is None:
            assert rngs is not None
            xs = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), xs)
            params = layer.init(rngs.params(), xs)
        leaves, self.structure = jax.tree_util.tree_flatten_with_path(params)
        self.layer = layer
        self.weights = nnx.Dict()
        self.paths = tuple(_names(path) for path, _ in leaves)
        for names, (_, leaf) in zip(self.paths, leaves, strict=True):
            inner = self.weights
            for name in names[:-1]:
                inner = inner.setdefault(name, nnx.Dict())
            # What is not floating has no gradient.
            kind = nnx.Param if is_inexact(leaf) else nnx.Variable
            inner[names[-1]] = kind(leaf)

    @property
    def params(self) -> PyTree:
        """The params in the structure that the layer takes."""
        leaves = []
        for names in self.paths:
            inner: Any = self.weights
            for name in names:
                inner = inner[name]
            leaves.append(inner[...])
        return jax.tree.unflatten(self.structure, leaves)

    def __call__(
        self,
        xs: PyTree,
        carry: PyTree = None,
        *,
        lengths: Array | None = None,
        mask: Array | None = None,
        resets: Array | None = None,
        key: Array | None = None,
        rngs: nnx.Rngs | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Runs the layer.

        Args:
          xs: inputs ``[B, T, ...]``.
          carry: the incoming carry; ``None`` means the fresh one.
          lengths: the number of valid steps in each row, as for :func:`jlstm.unroll`.
          mask: true at valid steps, as for :func:`jlstm.unroll`.
          resets: boundaries within rows, as for :func:`jlstm.unroll`.
          key: a typed key for noise; ``None`` means no noise.
          rngs: gives the key, from its stream ``dropout``, instead of ``key``.

        Returns:
          ``(ys, carry)``, as ``layer.apply`` does.

        Raises:
          ValueError: both ``key`` and ``rngs`` are given.
        """
        if rngs is not None:
            if key is not None:
                raise ValueError("flax.Module: give key or rngs, not both; got both")
            key = rngs.dropout()
        masking: dict[str, Any] = {"lengths": lengths, "mask": mask, "resets": resets}
        return self.layer.apply(self.params, xs, carry, key=key, **masking)


def _names(path: tuple) -> tuple[str, ...]:
    names = (jax.tree_util.keystr((key,), simple=True) for key in path)
    return tuple(names) or ("leaf",)
