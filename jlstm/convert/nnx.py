"""Flax NNX: ``nnx.RNN`` and ``nnx.Bidirectional`` of cells, ``nnx.Sequential`` of them.

``OptimizedLSTMCell`` has the same matrices as here, ``dense_i.kernel`` and
``dense_h.kernel``; ``LSTMCell`` has one for each gate; ``GRUCell`` has no bias beside
its recurrent matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jlstm.cells import GRU, LSTM, Elman
from jlstm.convert.cells import Weights, fold, guess, shapes
from jlstm.convert.layouts import find_places, read_gates, write_gates
from jlstm.convert.parts import Part, Peer, Place, read_layer, write_layer
from jlstm.convert.tensors import Leaves, Tensors, flatten, nest
from jlstm.types import PyTree

SIDES = ("forward_rnn.cell.", "backward_rnn.cell.")
KERNELS = (("ii", "if_", "ig", "io"),) + (("hi", "hf", "hg", "ho"),) * 2


def from_nnx(
    state: Mapping[Any, Any], layer: Any = None, *, prefix: str = ""
) -> tuple[Any, PyTree]:
    """Converts the state of NNX's ``nnx.RNN`` or ``nnx.Bidirectional``, or of a cell.

    Args:
      state: ``nnx.state(module)``, or a pure dict; the states of random generators in
        it are left alone.
      layer: the layer to fill. ``None`` makes it from the state, which does not tell
        activations or how directions are merged: tanh and ``"concat"`` are taken.
      prefix: what the paths begin with, such as ``"encoder."``; other paths are left
        alone.

    Returns:
      ``(layer, params)``.

    Raises:
      ValueError: a tensor is missing, left over or of another shape, or NNX has no such
        layer.

    Example:
      >>> from flax import nnx
      >>> cell = nnx.OptimizedLSTMCell(3, 8, rngs=nnx.Rngs(0))
      >>> layer, params = jlstm.convert.from_nnx(nnx.state(nnx.RNN(cell)))
      >>> layer, params.w_hh.shape
      (RNN(LSTM(8)), (8, 32))
    """
    leaves = flatten("from_nnx", state, ".")
    weights = {n: leaf for n, leaf in leaves.items() if "rngs" not in n.split(".")}
    tensors = Tensors("from_nnx", weights, prefix)
    return read_layer(_peer(), tensors, layer, _find(tensors), _name)


def to_nnx(
    layer: Any, params: PyTree, *, prefix: str = "", optimized: bool = True
) -> dict[Any, Any]:
    """Converts params to the state of NNX's ``nnx.RNN`` or ``nnx.Bidirectional``.

    Load it by ``nnx.update(module, state)``.

    Args:
      layer: ``RNN`` or ``bidirectional``; a stack gives the state of an
        ``nnx.Sequential``, a cell that of NNX's cell.
      params: its params.
      prefix: what to put before the paths, such as ``"encoder."``.
      optimized: true, the default, makes the state of an ``OptimizedLSTMCell``, false
        that of an ``nnx.LSTMCell``.

    Returns:
      A pure dict of NumPy arrays.

    Raises:
      ValueError: NNX has no place for the layer, or for a GRU's bias inside the reset
        gate.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.LSTM(8)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> state = jlstm.convert.to_nnx(layer, params)
      >>> state["cell"]["dense_h"]["kernel"].shape
      (8, 32)
    """
    arrays = write_layer(_peer(optimized=optimized), "to_nnx", layer, params, _name)
    return nest({prefix + name: array for name, array in arrays.items()}, ".")


def _name(place: Place, leaf: str) -> str:
    path = f"layers.{place.number}." if place.stacked else ""
    if not place.bare:
        path += "cell." if place.directions == 1 else SIDES[place.direction]
    return path + leaf.replace("/", ".")


def _find(tensors: Tensors) -> list[Place]:
    """Tells layers and directions from the paths."""
    return find_places(tensors, r"layers\.(\d+)\.", "cell.", SIDES)


def _peer(*, optimized: bool = True) -> Peer:
    return Peer("Flax NNX", _why_not, _read, partial(_write, optimized=optimized))


def _why_not(cell: Any) -> str | None:
    if not isinstance(cell, LSTM | GRU | Elman):
        return "it has no such cell"
    if isinstance(cell, GRU) and not cell.reset_after:
        return "its GRUCell has only the form with reset_after=True"
    return None


def _read(leaves: Leaves, cell: Any) -> tuple[Any, Weights]:
    split = "hi/kernel" in leaves or "ii/kernel" in leaves
    if cell is None:
        makes: dict[int, Any] = {4: LSTM, 3: GRU, 1: Elman}
        if split:
            makes = {1: LSTM}
        cell = guess(leaves, "hi/kernel" if split else "dense_h/kernel", makes)
    if split and isinstance(cell, LSTM):
        return cell, read_gates(leaves, cell, *KERNELS)
    shape = shapes(cell, leaves.inputs)
    w_ih = leaves.take("dense_i/kernel", *shape["w_ih"])
    w_hh = leaves.take("dense_h/kernel", *shape["w_hh"])
    where = "dense_h/bias" if isinstance(cell, LSTM) else "dense_i/bias"
    return cell, Weights(w_ih, w_hh, leaves.take(where, *shape["b"]))


def _write(part: Part, weights: Weights, *, optimized: bool) -> dict[str, np.ndarray]:
    b, apart = fold(part.cell, weights)
    if apart is not None and apart.any():
        raise ValueError(
            f"to_nnx: params{part.path}.b_hh, the bias inside the reset gate, is not "
            "zero, and nnx.GRUCell has no such bias; Linen's GRUCell has one, so use "
            "to_linen"
        )
    is_lstm = isinstance(part.cell, LSTM)
    if is_lstm and not optimized:
        return write_gates(part, weights, *KERNELS)
    return {
        "dense_i/kernel": weights.w_ih,
        "dense_h/kernel": weights.w_hh,
        "dense_h/bias" if is_lstm else "dense_i/bias": b,
    }
