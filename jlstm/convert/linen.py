"""Flax Linen: ``nn.RNN`` and ``nn.Bidirectional`` of cells, ``nn.Sequential`` of them.

Each gate has kernels of its own: ``ii``, ``if``, ``ig``, ``io`` for inputs and ``hi``,
``hf``, ``hg``, ``ho`` for the carry.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jlstm.cells import GRU, LSTM, MGU, ConvLSTM, Elman
from jlstm.convert.cells import (
    Weights,
)
from jlstm.convert.layouts import (
    find_places,
    no_grid,
    read_gates,
    read_grid,
    why_not_plain,
    write_gates,
    write_grid,
)
from jlstm.convert.parts import Part, Peer, Place, read_layer, write_layer
from jlstm.convert.tensors import Leaves, Tensors, flatten, nest, text
from jlstm.types import PyTree

SIDES = ("forward_rnn/cell/", "backward_rnn/cell/")
# The kernels of each gate in our order, of inputs and of the carry, and which of them
# have a bias; the last one's, of the carry, is inside r * (.) of a GRU.
KERNELS: dict[Any, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    LSTM: (
        ("ii", "if", "ig", "io"),
        ("hi", "hf", "hg", "ho"),
        ("hi", "hf", "hg", "ho"),
    ),
    GRU: (("ir", "iz", "in"), ("hr", "hz", "hn"), ("ir", "iz", "in", "hn")),
    Elman: (("i",), ("h",), ("i",)),
    MGU: (("if", "in"), ("hf", "hn"), ("if", "in", "hn")),
}


def from_linen(
    variables: Mapping[str, Any], layer: Any = None, *, prefix: str = ""
) -> tuple[Any, PyTree]:
    """Converts variables of Linen's ``nn.RNN`` or ``nn.Bidirectional``, or of a cell.

    In an ``nn.compact`` method, the params of ``nn.RNN(nn.LSTMCell(8))`` have the name
    of the cell, such as ``LSTMCell_0``: give ``prefix="LSTMCell_0/"``. Convert the two
    directions of an ``nn.Bidirectional`` there by two calls.

    Args:
      variables: what ``module.init`` returned, or its ``"params"``.
      layer: the layer to fill. ``None`` makes it from the variables, which do not tell
        activations or how directions are merged: tanh and ``"concat"`` are taken.
      prefix: what the paths begin with, such as ``"encoder/rnn/"``; other paths are
        left alone.

    Returns:
      ``(layer, params)``.

    Raises:
      ValueError: a tensor is missing, left over or of another shape, or Linen has no
        such layer.

    Example:
      >>> from flax import linen
      >>> module, xs = linen.RNN(linen.LSTMCell(8)), jnp.ones((2, 5, 3))
      >>> variables = module.init(jax.random.key(0), xs)
      >>> layer, params = jlstm.convert.from_linen(variables)
      >>> layer, params.w_hh.shape
      (RNN(LSTM(8)), (8, 32))
    """
    tree = variables
    if isinstance(tree, Mapping):
        tree = tree.get("params", tree)
    tensors = Tensors("from_linen", flatten("from_linen", tree, "/"), prefix, "/")
    return read_layer(_PEER, tensors, layer, _find(tensors), _name)


def to_linen(layer: Any, params: PyTree, *, prefix: str = "") -> dict[str, Any]:
    """Converts params to the variables of Linen's ``nn.RNN`` or ``nn.Bidirectional``.

    Args:
      layer: ``RNN`` or ``bidirectional``; a stack gives the variables of an
        ``nn.Sequential``, a cell those of Linen's cell.
      params: its params.
      prefix: what to put before the paths, such as ``"LSTMCell_0/"`` for a cell.

    Returns:
      ``{"params": ...}``, nested dicts of NumPy arrays.

    Raises:
      ValueError: Linen has no place for the layer.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.Elman(8)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> jax.tree.map(jnp.shape, jlstm.convert.to_linen(layer, params))["params"]
      {'cell': {'h': {'kernel': (8, 8)}, 'i': {'bias': (8,), 'kernel': (3, 8)}}}
    """
    arrays = write_layer(_PEER, "to_linen", layer, params, _name)
    return {"params": nest({prefix + name: a for name, a in arrays.items()}, "/")}


def _name(place: Place, leaf: str) -> str:
    path = f"layers_{place.number}/" if place.stacked else ""
    if not place.bare:
        path += "cell/" if place.directions == 1 else SIDES[place.direction]
    return path + leaf


def _find(tensors: Tensors) -> list[Place]:
    """Tells layers and directions from the paths."""
    return find_places(tensors, r"layers_(\d+)/", "cell/", SIDES)


def _why_not(cell: Any) -> str | None:
    if isinstance(cell, ConvLSTM):
        return why_not_plain(cell)
    if type(cell) not in KERNELS:
        return "it has no such cell"
    if isinstance(cell, GRU | MGU) and not cell.reset_after:
        name = type(cell).__name__
        return f"its {name}Cell has only the form with reset_after=True"
    return None


def _read(leaves: Leaves, cell: Any) -> tuple[Any, Weights]:
    cell = _guess(leaves) if cell is None else cell
    if isinstance(cell, ConvLSTM):
        return cell, read_grid(leaves, cell, ("ih", "hh"), ("kernel", "bias"))
    if isinstance(cell, MGU) and "hn/bias" not in leaves:
        hint = "; jlstm has no cell like an MGUCell with reset_gate=False"
        raise leaves.error("hn/bias", text((cell.hidden_size,)), "no such tensor", hint)
    return cell, read_gates(leaves, cell, *KERNELS[type(cell)])


def _guess(leaves: Leaves) -> Any:
    if "hh/kernel" in leaves:
        raise no_grid(leaves, "hh/kernel")
    for make, (inputs, carries, _) in KERNELS.items():
        if f"{inputs[0]}/kernel" in leaves or f"{carries[0]}/kernel" in leaves:
            leaf = f"{carries[0]}/kernel"
            shape = leaves.shape(leaf, "[H, H]")
            if len(shape) != 2 or shape[0] != shape[1]:
                raise leaves.error(leaf, "[H, H]", text(shape))
            return make(shape[0], reset_after=True) if make is MGU else make(shape[0])
    known = [f"{inputs[0]}/kernel" for inputs, _, _ in KERNELS.values()]
    ends = [
        leaf for leaf in known if any(n.endswith(f"/{leaf}") for n in leaves.tensors)
    ]
    raise leaves.missing((ends or known)[0], "[D, H]")


def _write(part: Part, weights: Weights) -> dict[str, np.ndarray]:
    if isinstance(part.cell, ConvLSTM):
        return write_grid(part, weights, ("ih", "hh"), ("kernel", "bias"))
    return write_gates(part, weights, *KERNELS[type(part.cell)])


_PEER = Peer("Flax Linen", _why_not, _read, _write)
