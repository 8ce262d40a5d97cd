"""Weights of cells in one form, in NumPy, between this library and the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlstm import cells
from jlstm.cells import GRU, LSTM, LSTMP, MGU, ConvLSTM, Elman, Precision
from jlstm.convert.tensors import Leaves, text
from jlstm.types import PyTree

TANH: tuple[Any, ...] = (cells.tanh, jnp.tanh, jax.nn.tanh)
RELU: tuple[Any, ...] = (jax.nn.relu,)


class Weights(NamedTuple):
    """Weights of one cell; ``G`` is gates times ``H``, ``R`` the size of its output."""

    w_ih: np.ndarray  # [*K, D, G]
    w_hh: np.ndarray  # [*K, R, G]
    b: np.ndarray  # [G]
    b_hh: np.ndarray | None = None  # [G], the second bias
    w_hr: np.ndarray | None = None  # [H, R], a projection


class Kind(NamedTuple):
    """What must be known of a kind of cell."""

    params: Any
    gates: int


KINDS: dict[Any, Kind] = {
    LSTM: Kind(cells.LSTMParams, 4),
    GRU: Kind(cells.GRUParams, 3),
    Elman: Kind(cells.ElmanParams, 1),
    LSTMP: Kind(cells.LSTMPParams, 4),
    MGU: Kind(cells.MGUParams, 2),
    ConvLSTM: Kind(cells.ConvLSTMParams, 4),
}


def inner(cell: Any) -> Any:
    """The cell whose params a cell has: that in a dtype policy."""
    return inner(cell.cell) if isinstance(cell, Precision) else cell


def emits(cell: Any) -> int:
    """The number of features that a cell outputs, and reads at the next step."""
    return getattr(cell, "proj_size", cell.hidden_size)


def is_reset_after(cell: Any) -> bool:
    """Tells whether a reset gate acts on a product, and so on a bias within."""
    return getattr(cell, "reset_after", False)


def sizes(cell: Any, field: str) -> tuple[int, ...]:
    """One size a spatial axis of a cell on a grid."""
    value = getattr(cell, field)
    return value if isinstance(value, tuple) else (value,) * len(cell.spatial_shape)


def shapes(cell: Any, inputs: int | str = "D") -> dict[str, tuple[int | str, ...]]:
    """The shapes of a cell's weights."""
    gates, size, out = KINDS[type(cell)].gates, cell.hidden_size, emits(cell)
    kernel = sizes(cell, "kernel_size") if isinstance(cell, ConvLSTM) else ()
    return {
        "w_ih": (*kernel, inputs, gates * size),
        "w_hh": (*kernel, out, gates * size),
        "w_hr": (size, out),
        "b": (gates * size,),
        "h0": (out,),
        "c0": (size,),
    }


def fold(cell: Any, weights: Weights) -> tuple[np.ndarray, np.ndarray | None]:
    """Adds the second bias to the first, but for what a reset gate acts on.

    Returns:
      The bias ``[G]``, and what stays apart, ``[H]``; None where nothing has to.
    """
    b, b_hh, size = weights.b, weights.b_hh, cell.hidden_size
    if not is_reset_after(cell):
        return (b if b_hh is None else b + b_hh), None
    if b_hh is None:
        return b, np.zeros(size, b.dtype)
    outside = np.concatenate([b_hh[:-size], np.zeros(size, b.dtype)])
    return b + outside, b_hh[-size:]


def make_params(cell: Any, weights: Weights) -> PyTree:
    """Makes a cell's params; a learned fresh carry begins at zero, as peers have it."""
    fields: dict[str, Any] = {"w_ih": weights.w_ih, "w_hh": weights.w_hh}
    if weights.w_hr is not None:
        fields["w_hr"] = weights.w_hr
    if getattr(cell, "double_bias", False):
        b, b_hh = weights.b, weights.b_hh
        fields |= {"b": b, "b_hh": np.zeros_like(b) if b_hh is None else b_hh}
    else:
        fields["b"], apart = fold(cell, weights)
        if apart is not None:
            fields["b_hh"] = apart
    params = KINDS[type(cell)].params
    if cell.learned_carry:
        for name in {"h0", "c0"} & set(params.__dataclass_fields__):
            size: Any = shapes(cell)[name]
            fields[name] = np.zeros(size, weights.b.dtype)
    # Copies, since an array that is shared with a peer would change with it.
    return params(**{name: jnp.array(array) for name, array in fields.items()})


def take_weights(where: str, path: str, cell: Any, params: PyTree) -> Weights:
    """Takes the weights out of a cell's params, which must be all that they hold.

    Raises:
      ValueError: they are another cell's, or there is a learned fresh carry.
    """
    kind = KINDS[type(cell)]
    if not isinstance(params, kind.params):
        name, got = kind.params.__name__, type(params).__name__
        raise ValueError(f"{where}: {path} must be {name}, got {got}")
    arrays = {
        name: np.asarray(getattr(params, name))
        for name in params.__dataclass_fields__
        if getattr(params, name) is not None
    }
    expected = shapes(cell)
    expected["b_hh"] = expected["b"]
    if is_reset_after(cell) and not getattr(cell, "double_bias", False):
        expected["b_hh"] = (cell.hidden_size,)
    for name, array in arrays.items():
        wanted = expected[name]
        if name == "w_ih" and array.ndim > 1:
            wanted = tuple(array.shape[-2] if size == "D" else size for size in wanted)
        if array.shape != wanted:
            raise ValueError(
                f"{where}: {path}.{name}: expected {text(expected[name])} for "
                f"{cell!r}, got {text(array.shape)}"
            )
    for name in ("h0", "c0"):
        if arrays.pop(name, np.zeros(1)).any():
            raise ValueError(
                f"{where}: {path}.{name} is a learned fresh carry, which no other "
                f"library has; give it as the initial state there, and convert "
                f"params.replace({name}=None)"
            )
    b_hh = arrays.get("b_hh")
    if b_hh is not None and b_hh.shape != arrays["b"].shape:
        rest = arrays["b"].size - b_hh.size
        arrays["b_hh"] = np.concatenate([np.zeros(rest, b_hh.dtype), b_hh])
    return Weights(**arrays)


def guess(
    leaves: Leaves,
    leaf: str,
    cells: dict[int, Callable[[int], Any]],
    *,
    transposed: bool = False,
) -> Any:
    """Tells a cell from the shape of its recurrent weights.

    Args:
      leaves: of the cell.
      leaf: the recurrent weights, ``[H, G]``.
      cells: makes a cell of ``H``, by the number of gates.
      transposed: they are ``[G, H]``.
    """
    order = ("G", "H") if transposed else ("H", "G")
    named = [f"{n}H of {type(make(1)).__name__}" for n, make in cells.items()]
    expected = f"{text(order)} with G = {' or '.join(named)}"
    shape = leaves.shape(leaf, expected)
    if len(shape) == 2 and min(shape):
        size, gates = reversed(shape) if transposed else shape
        if gates % size == 0 and gates // size in cells:
            return cells[gates // size](size)
    raise leaves.error(leaf, expected, text(shape))


def reorder(array: np.ndarray, order: tuple[int, ...]) -> np.ndarray:
    """Puts the blocks of the last axis in another order."""
    blocks = np.split(array, len(order), axis=-1)
    return np.concatenate([blocks[i] for i in order], axis=-1)
