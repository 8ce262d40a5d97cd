"""Haiku's ``LSTM``, ``GRU``, ``VanillaRNN``, ``Conv2DLSTM``, and ``DeepRNN`` of them.

The LSTM has one matrix for inputs and carry, with gates in the order i, g, f, o, and
adds 1 to f whenever it runs; here that 1 is in the bias, rounded once. The GRU resets
before the product, and its z is ``1 - z`` here. The ``VanillaRNN`` has a ReLU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jlstm.cells import GRU, LSTM, ConvLSTM, Elman
from jlstm.convert.cells import RELU, Weights, fold, reorder, shapes
from jlstm.convert.layouts import (
    I_G_F_O,
    forget,
    no_grid,
    read_grid,
    why_not_plain,
    write_grid,
)
from jlstm.convert.parts import (
    Part,
    Peer,
    in_order,
    parts_of,
    read_layer,
    write_layer,
)
from jlstm.convert.tensors import Leaves, Tensors, flatten, text
from jlstm.types import PyTree

NAMES: dict[Any, str] = {LSTM: "lstm", GRU: "gru", Elman: "vanilla_rnn"}
GRID = ("input_to_hidden", "hidden_to_hidden"), ("w", "b")
Z_FIRST = (1, 0, 2)  # from z, r, n to r, z, n, and back


def from_haiku(
    params: Mapping[str, Any], layer: Any = None, *, prefix: str = ""
) -> tuple[Any, PyTree]:
    """Converts params of Haiku's ``LSTM``, ``GRU``, ``VanillaRNN`` or ``Conv2DLSTM``.

    Args:
      params: the params of ``hk.transform``, a dict of dicts.
      layer: the layer to fill. ``None`` makes it, from the params of a single core.
        Several cores, as in ``hk.DeepRNN``, need one, and must have the names that
        Haiku gives: ``lstm``, ``lstm_1``, ``gru``. A ``Conv2DLSTM`` needs one too.
      prefix: what the names begin with, such as ``"model/~/"``, or ``"encoder/"`` for a
        core of that name; other names are left alone.

    Returns:
      ``(layer, params)``.

    Raises:
      ValueError: a tensor is missing, left over or of another shape, or Haiku has no
        such layer.

    Example:
      >>> weights = {"w": jnp.ones((3 + 8, 32)), "b": jnp.zeros(32)}
      >>> layer, params = jlstm.convert.from_haiku({"lstm/linear": weights})
      >>> layer, params.b[8:16].tolist()
      (RNN(LSTM(8)), [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    """
    tensors = Tensors("from_haiku", flatten("from_haiku", params, "/"), prefix, "/")
    begins = _cores(tensors)
    if layer is not None and len(begins) != 1:
        begins = _default_names("from_haiku", layer)
    found, name = in_order("from_haiku", layer, begins)
    return read_layer(_PEER, tensors, layer, found, name)


def to_haiku(
    layer: Any, params: PyTree, *, prefix: str = ""
) -> dict[str, dict[str, np.ndarray]]:
    """Converts params to those of Haiku's ``LSTM``, ``GRU`` or ``VanillaRNN``.

    Args:
      layer: an ``RNN``, or a stack, which gives the params of an ``hk.DeepRNN``.
      params: its params.
      prefix: what to put before the names that Haiku gives: ``lstm``, ``lstm_1`` and so
        on.

    Returns:
      A dict of dicts of NumPy arrays.

    Raises:
      ValueError: Haiku has no place for the layer.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.LSTM(8)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> jax.tree.map(jnp.shape, jlstm.convert.to_haiku(layer, params))
      {'lstm/linear': {'b': (32,), 'w': (11, 32)}}
    """
    _, name = in_order("to_haiku", layer, _default_names("to_haiku", layer))
    modules: dict[str, dict[str, np.ndarray]] = {}
    for full, array in write_layer(_PEER, "to_haiku", layer, params, name).items():
        module, _, leaf = f"{prefix}{full}".rpartition("/")
        modules.setdefault(module, {})[leaf] = array
    return modules


def _cores(tensors: Tensors) -> list[str]:
    """Finds what the names of cores begin with."""
    ends = ("linear/w", "w_h", "hidden_to_hidden/w")
    found = [
        name.removesuffix(end)
        for name in tensors
        for end in ends
        if name == end or name.endswith(f"/{end}")
    ]
    return found or [""]


def _default_names(where: str, layer: Any) -> Sequence[str]:
    counts: dict[Any, int] = {}
    names = []
    for part in parts_of(where, layer):
        _PEER.check(where, part)
        if isinstance(part.cell, ConvLSTM):
            kind = f"conv{len(part.cell.spatial_shape)}_dlstm"
        else:
            kind = NAMES[type(part.cell)]
        number = counts.setdefault(kind, 0)
        names.append(f"{kind}{f'_{number}' if number else ''}/")
        counts[kind] += 1
    return names


def _why_not(cell: Any) -> str | None:
    if isinstance(cell, ConvLSTM):
        return why_not_plain(cell)
    if type(cell) not in NAMES:
        return "it has no such cell"
    if isinstance(cell, GRU) and cell.reset_after:
        return "its GRU has only the form with reset_after=False"
    if isinstance(cell, Elman) and cell.activation not in RELU:
        return "its VanillaRNN has only the form with activation=jax.nn.relu"
    return None


def _read(leaves: Leaves, cell: Any) -> tuple[Any, Weights]:
    cell = _guess(leaves) if cell is None else cell
    shape, size = shapes(cell, leaves.inputs), cell.hidden_size
    if isinstance(cell, ConvLSTM):
        return cell, read_grid(leaves, cell, *GRID)
    if isinstance(cell, GRU):
        arrays = {
            "w_ih": leaves.take("w_i", *shape["w_ih"]),
            "w_hh": leaves.take("w_h", *shape["w_hh"]),
            "b": leaves.take("b", *shape["b"]),
        }
        return cell, Weights(
            **{n: reorder(_negate(a, 0), Z_FIRST) for n, a in arrays.items()}
        )
    b = leaves.take("linear/b", *shape["b"])
    if isinstance(cell, Elman):
        w_ih = leaves.take("linear/w", *shape["w_ih"])
        w_hh = leaves.take("linear_1/w", *shape["w_hh"])
        double = "linear_1/b" in leaves
        b_hh = leaves.take("linear_1/b", *shape["b"]) if double else None
        return cell, Weights(w_ih, w_hh, b, b_hh)
    inputs = leaves.inputs
    rows = f"{inputs} + {size}" if isinstance(inputs, str) else inputs + size
    w = reorder(leaves.take("linear/w", rows, 4 * size), I_G_F_O)
    if len(w) <= size:
        raise leaves.error("linear/w", text((rows, 4 * size)), text(w.shape))
    return cell, Weights(w[:-size], w[-size:], reorder(b, I_G_F_O) + forget(cell, b))


def _write(part: Part, weights: Weights) -> dict[str, np.ndarray]:
    cell = part.cell
    if isinstance(cell, ConvLSTM):
        return write_grid(part, weights, *GRID)
    b, _ = fold(cell, weights)
    if isinstance(cell, GRU):
        arrays = {"w_i": weights.w_ih, "w_h": weights.w_hh, "b": b}
        return {n: _negate(reorder(a, Z_FIRST), 0) for n, a in arrays.items()}
    if isinstance(cell, Elman):
        arrays = {"linear/w": weights.w_ih, "linear_1/w": weights.w_hh}
        if weights.b_hh is None:
            return arrays | {"linear/b": b}
        return arrays | {"linear/b": weights.b, "linear_1/b": weights.b_hh}
    w = np.concatenate([weights.w_ih, weights.w_hh])
    b = reorder(b - forget(cell, b), I_G_F_O)
    return {"linear/w": reorder(w, I_G_F_O), "linear/b": b}


def _guess(leaves: Leaves) -> Any:
    """Tells a core by the names of its tensors, and its size by their shapes."""
    if "w_h" in leaves:
        size = leaves.shape("w_h", "[H, 3H]")[0]
        return GRU(size, reset_after=False)
    if "hidden_to_hidden/w" in leaves:
        raise no_grid(leaves, "hidden_to_hidden/w")
    size = leaves.shape("linear/w", "[D + H, 4H] of an LSTM, or w_h of a GRU")[-1]
    if "linear_1/w" in leaves:
        return Elman(size, activation=jax.nn.relu, double_bias="linear_1/b" in leaves)
    if size % 4 or not size:
        shape = leaves.shape("linear/w", "")
        raise leaves.error("linear/w", "[D + H, 4H]", text(shape))
    return LSTM(size // 4)


def _negate(array: np.ndarray, block: int) -> np.ndarray:
    r"""Negates one gate's block, since :math:`\sigma(-a) = 1 - \sigma(a)`."""
    blocks = np.split(array, 3, axis=-1)
    blocks[block] = -blocks[block]
    return np.concatenate(blocks, axis=-1)


_PEER = Peer("Haiku", _why_not, _read, _write, merges=())
