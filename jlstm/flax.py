"""The other way round: any layer as a module of Flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jlstm.layers.recurrent import check_layer_field
from jlstm.types import Array, Layer, PyTree, is_inexact


class Module(nnx.Module):
    """Any layer or model as an ``nnx.Module``.

    The leaves of the params are each an ``nnx.Param``, under ``weights`` and then the
    path that they have in the params, so that ``nnx.state``, ``nnx.grad``, ``nnx.jit``,
    ``nnx.Optimizer`` and checkpoints see what they are used to.

    Attributes:
      layer: the layer.

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

        Args:
          layer: a layer or model.
          xs: an example of its input, arrays or ``jax.ShapeDtypeStruct``.
          rngs: draws the params, from the stream ``params``.
          params: those of the layer, in the place of ``xs`` and ``rngs``.

        Raises:
          TypeError: a cell in the place of a layer.
          ValueError: neither ``xs`` and ``rngs``, nor ``params``.
        """
        check_layer_field("flax.Module.layer", layer)
        if (params is None) == (xs is None or rngs is None):
            raise ValueError(
                "flax.Module: give xs and rngs, which make params, or params"
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
        """The params, as the layer takes them."""
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
        """Runs the layer and returns ``(ys, carry)``.

        Args:
          xs: inputs ``[B, T, ...]``.
          carry: the incoming carry; ``None`` means the fresh one.
          lengths: as of :func:`jlstm.unroll`, as are the rest.
          mask: as above.
          resets: as above.
          key: draws noise; ``None`` is the deterministic form.
          rngs: draws the key from its stream ``dropout``.

        Raises:
          ValueError: both ``key`` and ``rngs``.
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
