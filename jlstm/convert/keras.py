"""Keras 3: ``LSTM``, ``GRU``, ``SimpleRNN``, ``ConvLSTM2D``, both ways, stacked cells.

The LSTM has the same matrices and order of gates as here. The GRU has the order z, r,
h, and two rows of biases if it resets after the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from jlstm.cells import GRU, LSTM, ConvLSTM, Elman
from jlstm.convert.cells import (
    Weights,
    fold,
    guess,
    reorder,
    shapes,
)
from jlstm.convert.keras_config import layer_of
from jlstm.convert.layouts import no_grid
from jlstm.convert.parts import (
    Part,
    Peer,
    Place,
    drop_bias,
    in_order,
    parts_of,
    read_layer,
    write_layer,
)
from jlstm.convert.tensors import Leaves, Tensors, flatten
from jlstm.types import PyTree

LEAVES = ("kernel", "recurrent_kernel", "bias")
Z_FIRST = (1, 0, 2)  # from z, r, h to r, z, n, and back
TWO = [Place(directions=2), Place(direction=1, directions=2)]


def from_keras(
    weights: Any, layer: Any = None, *, prefix: str = ""
) -> tuple[Any, PyTree]:
    """Converts the weights of Keras' recurrent layers, and of ``Bidirectional``.

    A GRU that resets after the product keeps its two biases (``double_bias=True``),
    unless ``layer`` has cells with one, for which they are added. Layers without biases
    give zeros.

    Args:
      weights: ``layer.get_weights()``; or ``{v.path: v for v in layer.weights}``; or
        the Keras layer itself, whose config is then read too.
      layer: the layer to fill. ``None`` makes it from the weights, which do not tell
        activations or how directions are merged: unless a Keras layer is given, tanh
        and ``"concat"`` are taken. It is needed for a list of more than one cell, for
        ``StackedRNNCells`` or several layers, which are a ``stack`` here, and for a
        ``ConvLSTM``.
      prefix: what the paths begin with, such as ``"model/lstm/"``; other paths are left
        alone.

    Returns:
      ``(layer, params)``.

    Raises:
      ValueError: a tensor is missing, left over or of another shape, or one of the two
        libraries has no such layer.

    Example:
      >>> weights = [np.ones(shape, np.float32) for shape in ((3, 32), (8, 32), (32,))]
      >>> layer, params = jlstm.convert.from_keras(weights)
      >>> layer, params.w_ih.shape
      (RNN(LSTM(8)), (3, 32))
    """
    if hasattr(weights, "get_config"):
        layer = layer_of(type(weights).__name__, weights.get_config(), layer)
        weights = weights.get_weights()
    if not isinstance(weights, list | tuple):
        arrays = flatten("from_keras", weights, "/")
        tensors = Tensors("from_keras", arrays, prefix, "/")
        begins, places = _by_cell(tensors)
        found, name = in_order("from_keras", layer, begins, places)
    else:
        if prefix:
            raise ValueError(
                f"from_keras: prefix={prefix!r} needs paths, and a list has none; "
                "give {v.path: v for v in model.weights}"
            )
        tensors, found, name = _from_list(weights, layer)
    return read_layer(_peer(), tensors, layer, found, name)


def to_keras(layer: Any, params: PyTree, *, bias: bool = True) -> list[np.ndarray]:
    """Converts params to a list for ``set_weights`` of Keras.

    Args:
      layer: ``RNN`` or ``bidirectional``; a stack gives the list for an ``RNN`` of
        ``StackedRNNCells``, or for a ``Sequential`` of recurrent layers.
      params: its params.
      bias: false for layers with ``use_bias=False``.

    Returns:
      A list of NumPy arrays.

    Raises:
      ValueError: Keras has no place for the layer, or ``bias=False`` would lose a bias
        that is not zero.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.GRU(8)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> [array.shape for array in jlstm.convert.to_keras(layer, params)]
      [(3, 24), (8, 24), (2, 24)]
    """

    def name(place: Place, leaf: str) -> str:
        return f"{place.level}.{place.direction}.{leaf}"

    arrays = write_layer(_peer(bias=bias), "to_keras", layer, params, name)
    return list(arrays.values())


def _from_list(weights: Sequence[Any], layer: Any) -> tuple[Tensors, Any, Any]:
    """Names the arrays of a list by their numbers."""
    count = 1 if layer is None else len(parts_of("from_keras", layer))
    each = len(weights) // count
    if len(weights) % count or each not in (2, 3):
        what = "one cell" if layer is None else f"{layer!r}"
        hint = "; give layer= for more cells" if layer is None else ""
        raise ValueError(
            f"from_keras: weights: expected {count} times 2 or 3 arrays for {what}, "
            f"got {len(weights)}{hint}"
        )
    arrays = {f"weights[{i}]": array for i, array in enumerate(weights)}
    tensors = Tensors("from_keras", arrays)
    found, name = in_order("from_keras", layer, [f"{each * i}" for i in range(count)])

    def numbered(place: Place, leaf: str) -> str:
        begin, number = int(name(place, "")), LEAVES.index(leaf)
        if number < each:
            return f"weights[{begin + number}]"
        return f"{leaf} beside weights[{begin}]"  # of a layer without

    return tensors, found, numbered


def _by_cell(tensors: Tensors) -> tuple[list[str], list[Place] | None]:
    """Tells the cells apart by their paths, forward before backward.

    Returns:
      What the names of each begin with, and their places, if the paths tell.
    """
    cells = list(dict.fromkeys(name.rpartition("/")[0] for name in tensors))

    def side(path: str) -> tuple[str, int | None]:
        words = path.split("/")
        for i, word in enumerate(words):
            for direction, begin in enumerate(("forward_", "backward_")):
                if word.startswith(begin):
                    return "/".join(words[:i]), direction
        return path, None

    sides = [side(path) for path in cells]
    order = list(dict.fromkeys(parent for parent, _ in sides))
    ranks = [(order.index(parent), direction or 0) for parent, direction in sides]
    begins = [path for _, path in sorted(zip(ranks, cells, strict=True))]
    both = len(order) == 1 and {direction for _, direction in sides} == {0, 1}
    return [f"{path}/" if path else "" for path in begins], TWO if both else None


def _peer(*, bias: bool = True) -> Peer:
    return Peer("Keras", _why_not, _read, partial(_write, bias=bias))


def _why_not(cell: Any) -> str | None:
    known = isinstance(cell, LSTM | GRU | Elman | ConvLSTM)
    return None if known else "it has no such cell"


def _read(leaves: Leaves, cell: Any) -> tuple[Any, Weights]:
    cell = _guess(leaves) if cell is None else cell
    shape = shapes(cell, leaves.inputs)
    w_ih = leaves.take("kernel", *shape["w_ih"])
    w_hh = leaves.take("recurrent_kernel", *shape["w_hh"])
    b, b_hh = np.zeros(w_hh.shape[-1], w_hh.dtype), None
    if "bias" in leaves:
        if isinstance(cell, GRU) and cell.reset_after:
            b, b_hh = leaves.take("bias", 2, *shape["b"])
        else:
            b = leaves.take("bias", *shape["b"])
    weights = Weights(w_ih, w_hh, b, b_hh)
    return cell, _swap(weights) if isinstance(cell, GRU) else weights


def _guess(leaves: Leaves) -> Any:
    leaf = "recurrent_kernel"
    if leaf in leaves and len(leaves.shape(leaf, "")) > 2:
        raise no_grid(leaves, leaf)
    cell = guess(leaves, "recurrent_kernel", {4: LSTM, 3: GRU, 1: Elman})
    if not isinstance(cell, GRU):
        return cell
    if "bias" not in leaves:
        raise leaves.error(
            "bias",
            "[2, 3H] or [3H], which tells whether the GRU resets after the product",
            "no such tensor; give layer=",
        )
    if len(leaves.shape("bias", "")) == 1:
        return GRU(cell.hidden_size, reset_after=False)
    return GRU(cell.hidden_size, double_bias=True)


def _swap(weights: Weights) -> Weights:
    """Swaps r and z, as both ways do."""
    swapped: Any = [None if a is None else reorder(a, Z_FIRST) for a in weights]
    return Weights(*swapped)


def _write(part: Part, weights: Weights, *, bias: bool) -> dict[str, np.ndarray]:
    is_gru = isinstance(part.cell, GRU)
    arrays = _swap(weights) if is_gru else weights
    out = {"kernel": arrays.w_ih, "recurrent_kernel": arrays.w_hh}
    if not bias:
        drop_bias("to_keras", part, weights)
        return out
    if is_gru and part.cell.reset_after:
        b_hh = np.zeros_like(arrays.b) if arrays.b_hh is None else arrays.b_hh
        return out | {"bias": np.stack([arrays.b, b_hh])}
    return out | {"bias": fold(part.cell, arrays)[0]}
