"""``jax.experimental.rnn``: the LSTM of cuDNN, with all weights in one vector.

The vector holds PyTorch's matrices, layer by layer and forward before backward, each
row by row; then the biases in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jlstm.cells import LSTM
from jlstm.convert import torch
from jlstm.convert.parts import Part, Peer, parts_of, read_layer, write_layer
from jlstm.convert.tensors import Tensors, as_array, text
from jlstm.types import PyTree

MATRICES = ("weight_ih", "weight_hh")


def from_jax_rnn(weights: Any, layer: Any) -> tuple[Any, PyTree]:
    """Converts the weights of ``jax.experimental.rnn.lstm``.

    Args:
      weights: the vector ``[P]``, as ``init_lstm_weight`` makes it.
      layer: the layer to fill, which a vector cannot tell: an ``RNN`` or
        ``bidirectional`` of an ``LSTM``, or a stack of them. With ``double_bias=True``
        both biases are kept, as further training needs; otherwise they are added.

    Returns:
      ``(layer, params)``.

    Raises:
      ValueError: no number of inputs makes a vector of this size, or there is no such
        layer.

    Example:
      >>> layer = jlstm.bidirectional(jlstm.LSTM(4, double_bias=True))
      >>> weights = jnp.ones(2 * 16 * (3 + 4 + 2))
      >>> _, params = jlstm.convert.from_jax_rnn(weights, layer)
      >>> params.backward.w_ih.shape
      (3, 16)
    """
    vector = as_array(weights)
    parts = _parts("from_jax_rnn", layer)
    first = parts[0]
    size, directions = first.cell.hidden_size, first.place.directions
    # Of every cell all is known but D, the number of inputs of the first layer.
    rows, known = 4 * size, 0
    for part in parts:
        known += rows * (size + 2 + bool(part.place.level) * directions * size)
    inputs, rest = divmod(vector.size - known, rows * directions)
    if vector.ndim != 1 or rest or inputs < 1:
        raise ValueError(
            f"from_jax_rnn: weights: expected [{known} + {rows * directions} * D] for "
            f"{layer!r} and some D, got {text(vector.shape)}"
        )
    arrays: dict[str, np.ndarray] = {}
    for part, leaf in _order(parts):
        wide = directions * size if part.place.level else inputs
        shape = {"weight_ih": (rows, wide), "weight_hh": (rows, size)}
        count = np.prod(shape.get(leaf, (rows,)), dtype=int)
        piece, vector = vector[:count], vector[count:]
        arrays[torch.name(part.place, leaf)] = piece.reshape(shape.get(leaf, (rows,)))
    tensors = Tensors("from_jax_rnn", arrays)
    return read_layer(_PEER, tensors, layer, torch.find(tensors), torch.name)


def to_jax_rnn(layer: Any, params: PyTree) -> np.ndarray:
    """Converts params to the vector of ``jax.experimental.rnn.lstm``.

    Args:
      layer: an ``RNN`` or ``bidirectional`` of an ``LSTM``, or a stack of them, all of
        one size.
      params: its params.

    Returns:
      The vector ``[P]``, in NumPy.

    Raises:
      ValueError: there is no such layer.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.LSTM(4)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> jlstm.convert.to_jax_rnn(layer, params).shape
      (144,)
    """
    parts = _parts("to_jax_rnn", layer)
    arrays = write_layer(_PEER, "to_jax_rnn", layer, params, torch.name)
    names = [torch.name(part.place, leaf) for part, leaf in _order(parts)]
    return np.concatenate([arrays[name].ravel() for name in names])


def _parts(where: str, layer: Any) -> list[Part]:
    parts = parts_of(where, layer)
    for part in parts:
        _PEER.check(where, part)
    torch.check_alike(where, layer)
    return parts


def _order(parts: list[Part]) -> Iterator[tuple[Part, str]]:
    """Yields the pieces of the vector in their order."""
    for leaves in (MATRICES, torch.BIASES):
        yield from ((part, leaf) for part in parts for leaf in leaves)


def _why_not(cell: Any) -> str | None:
    return None if isinstance(cell, LSTM) else "it has only an LSTM"


_PEER = Peer(
    "jax.experimental.rnn",
    _why_not,
    torch.read_cell,
    torch.write_cell,
    merges=("concat",),
    reverse=False,
)
