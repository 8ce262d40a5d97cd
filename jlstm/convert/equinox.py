"""Equinox's ``eqx.nn.LSTMCell`` and ``eqx.nn.GRUCell``.

Gates are in our order; matrices are transposed to ours, ``weight_ih [4H, D]``; there is
one bias, and a GRU's ``bias_n [H]`` inside its reset gate; or there is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from jlstm.cells import GRU, LSTM
from jlstm.convert.cells import Weights, fold, guess, shapes
from jlstm.convert.parts import (
    Part,
    Peer,
    drop_bias,
    in_order,
    parts_of,
    read_layer,
    write_layer,
)
from jlstm.convert.tensors import Leaves, Tensors
from jlstm.types import PyTree

LEAVES = ("weight_ih", "weight_hh", "bias", "bias_n")


def from_equinox(cell: Any, layer: Any = None) -> tuple[Any, PyTree]:
    """Converts the weights of an Equinox ``LSTMCell`` or ``GRUCell``.

    Args:
      cell: the cell, or a dict of its arrays by field. For a ``layer`` of several
        cells, a list of them: by depth, forward before backward.
      layer: the layer to fill; ``None`` makes an ``RNN`` of the cell.

    Returns:
      ``(layer, params)``.

    Raises:
      ValueError: a tensor is missing, left over or of another shape, or Equinox has no
        such layer.

    Example:
      >>> arrays = {
      ...     "weight_ih": np.ones((32, 3), np.float32),
      ...     "weight_hh": np.ones((32, 8), np.float32),
      ...     "bias": np.zeros(32, np.float32),
      ... }
      >>> layer, params = jlstm.convert.from_equinox(arrays)
      >>> layer, params.w_ih.shape
      (RNN(LSTM(8)), (3, 32))
    """
    single = not isinstance(cell, list | tuple)
    cells = [cell] if single else cell
    begins = [""] if single else [f"[{i}]." for i in range(len(cells))]
    arrays: dict[str, Any] = {}
    for begin, each in zip(begins, cells, strict=True):
        found = each if isinstance(each, Mapping) else _arrays(each)
        arrays |= {begin + n: a for n, a in found.items() if a is not None}
    tensors = Tensors("from_equinox", arrays)
    found, name = in_order("from_equinox", layer, begins)
    return read_layer(_peer(), tensors, layer, found, name)


def to_equinox(layer: Any, params: PyTree, *, bias: bool = True) -> Any:
    """Converts params to the arrays of an Equinox ``LSTMCell`` or ``GRUCell``.

    Put them into a cell by::

        names, values = list(arrays), list(map(jnp.array, arrays.values()))
        cell = eqx.tree_at(lambda c: [getattr(c, n) for n in names], cell, values)

    Args:
      layer: an ``RNN``, or a layer of several cells.
      params: its params.
      bias: false for cells without biases.

    Returns:
      A dict of NumPy arrays by field; of several cells, a list of such dicts, by depth
      and forward before backward.

    Raises:
      ValueError: Equinox has no such cell, or ``bias=False`` would lose a bias that is
        not zero.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.GRU(8)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> list(jlstm.convert.to_equinox(layer, params))
      ['weight_ih', 'weight_hh', 'bias', 'bias_n']
    """
    begins = [f"[{i}]." for i in range(len(parts_of("to_equinox", layer)))]
    _, name = in_order("to_equinox", layer, begins)
    arrays = write_layer(_peer(bias=bias), "to_equinox", layer, params, name)
    cells = [
        {n.removeprefix(begin): a for n, a in arrays.items() if n.startswith(begin)}
        for begin in begins
    ]
    return cells[0] if len(cells) == 1 else cells


def _arrays(cell: Any) -> dict[str, Any]:
    return {leaf: getattr(cell, leaf, None) for leaf in LEAVES}


def _peer(*, bias: bool = True) -> Peer:
    return Peer("Equinox", _why_not, _read, partial(_write, bias=bias))


def _why_not(cell: Any) -> str | None:
    if not isinstance(cell, LSTM | GRU):
        return "it has only an LSTMCell and a GRUCell"
    if isinstance(cell, GRU) and not cell.reset_after:
        return "its GRUCell has only the form with reset_after=True"
    return None


def _read(leaves: Leaves, cell: Any) -> tuple[Any, Weights]:
    if cell is None:
        cell = guess(leaves, "weight_hh", {4: LSTM, 3: GRU}, transposed=True)
    shape = shapes(cell, leaves.inputs)
    w_ih = leaves.take("weight_ih", *reversed(shape["w_ih"])).T
    w_hh = leaves.take("weight_hh", *reversed(shape["w_hh"])).T
    b, b_hh = np.zeros(w_hh.shape[-1], w_hh.dtype), None
    if "bias" in leaves or "bias_n" in leaves:
        b = leaves.take("bias", *shape["b"])
        if isinstance(cell, GRU):
            apart = leaves.take("bias_n", cell.hidden_size)
            b_hh = np.pad(apart, (len(b) - len(apart), 0))
    return cell, Weights(w_ih, w_hh, b, b_hh)


def _write(part: Part, weights: Weights, *, bias: bool) -> dict[str, np.ndarray]:
    arrays = {"weight_ih": weights.w_ih.T, "weight_hh": weights.w_hh.T}
    if not bias:
        drop_bias("to_equinox", part, weights)
        return arrays
    arrays["bias"], apart = fold(part.cell, weights)
    return arrays if apart is None else arrays | {"bias_n": apart}
