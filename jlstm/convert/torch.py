"""PyTorch's ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, and their cells.

Gates are in the same order as here. Matrices are transposed, ``weight_ih_l0 [4H, D]``;
there are two biases, or none. An LSTM with ``proj_size`` is an ``LSTMP`` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from jlstm.cells import GRU, LSTM, LSTMP, Elman
from jlstm.convert.cells import RELU, TANH, Weights, emits, guess, shapes
from jlstm.convert.parts import (
    Part,
    Peer,
    Place,
    drop_bias,
    parts_of,
    read_layer,
    write_layer,
)
from jlstm.convert.tensors import Leaves, Tensors, flatten, text
from jlstm.types import PyTree

BIASES = ("bias_ih", "bias_hh")


def from_torch(
    weights: Any, layer: Any = None, *, prefix: str = ""
) -> tuple[Any, PyTree]:
    """Converts weights of PyTorch's ``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` or their cells.

    Both biases are kept (``double_bias=True``), as further training needs, unless
    ``layer`` has cells with one, for which they are added. A module without biases
    gives zeros.

    Args:
      weights: a ``state_dict``, of tensors or arrays; or the module itself.
      layer: the layer to fill. ``None`` makes it from the weights, which do not tell
        the activation of an ``nn.RNN``: unless the module is given, tanh is taken.
      prefix: what the names begin with, such as ``"encoder.rnn."``; other names are
        left alone.

    Returns:
      ``(layer, params)``.

    Raises:
      ValueError: a tensor is missing, left over or of another shape, or PyTorch has no
        such layer.

    Example:
      >>> state_dict = {
      ...     "rnn.weight_ih_l0": np.ones((32, 3), np.float32),
      ...     "rnn.weight_hh_l0": np.ones((32, 8), np.float32),
      ...     "rnn.bias_ih_l0": np.zeros(32, np.float32),
      ...     "rnn.bias_hh_l0": np.zeros(32, np.float32),
      ... }
      >>> layer, params = jlstm.convert.from_torch(state_dict, prefix="rnn.")
      >>> layer, params.w_ih.shape
      (RNN(LSTM(8, double_bias=True)), (3, 32))
    """
    module = weights if hasattr(weights, "state_dict") else None
    state_dict: Mapping[str, Any] = weights if module is None else module.state_dict()
    tensors = Tensors("from_torch", flatten("from_torch", state_dict, "."), prefix)
    activation = None
    if module is not None:
        module = module.get_submodule(prefix.rstrip("."))
        activation = getattr(module, "nonlinearity", None)
    if layer is not None:
        check_alike("from_torch", layer)
    return read_layer(_peer(activation=activation), tensors, layer, find(tensors), name)


def to_torch(
    layer: Any, params: PyTree, *, prefix: str = "", bias: bool = True
) -> dict[str, np.ndarray]:
    """Converts params to a ``state_dict`` for PyTorch, of NumPy arrays.

    Load it by
    ``module.load_state_dict({n: torch.tensor(a) for n, a in arrays.items()})``. A cell
    with one bias has it in ``bias_ih``, and zeros in ``bias_hh``.

    Args:
      layer: ``RNN``, ``bidirectional``, or a stack of one of them, with or without
        dropout between, all of one size; a cell gives the names of PyTorch's cell.
      params: its params.
      prefix: what to put before the names, such as ``"encoder.rnn."``.
      bias: false for a module without biases.

    Returns:
      A dict of NumPy arrays by name.

    Raises:
      ValueError: PyTorch has no place for the layer, or ``bias=False`` would lose a
        bias that is not zero.

    Example:
      >>> layer, xs = jlstm.RNN(jlstm.GRU(8)), jnp.ones((2, 5, 3))
      >>> params = layer.init(jax.random.key(0), xs)
      >>> list(jlstm.convert.to_torch(layer, params))
      ['weight_ih_l0', 'weight_hh_l0', 'bias_ih_l0', 'bias_hh_l0']
    """
    check_alike("to_torch", layer)
    arrays = write_layer(_peer(bias=bias), "to_torch", layer, params, name)
    return {prefix + name: array for name, array in arrays.items()}


def name(place: Place, leaf: str) -> str:
    """The name of a tensor, such as ``weight_hh_l1_reverse``."""
    if place.bare:
        return leaf
    return f"{leaf}_l{place.level}{'_reverse' if place.direction else ''}"


def find(tensors: Tensors) -> list[Place]:
    """Tells layers and directions from the names."""
    if "weight_hh" in tensors:
        return [Place(bare=True)]
    directions = 1 + ("weight_hh_l0_reverse" in tensors)
    levels = 1
    while f"weight_hh_l{levels}" in tensors:
        levels += 1
    return [
        Place(level, level, direction, directions, stacked=levels > 1)
        for level in range(levels)
        for direction in range(directions)
    ]


def check_alike(where: str, layer: Any) -> None:
    """Refuses layers that are not of one kind and size, as those of a module are.

    Raises:
      ValueError: naming the first that differs.
    """
    first, *others = parts_of(where, layer)

    def kind(part: Part) -> tuple[Any, ...]:
        cell = part.cell
        return type(cell), cell.hidden_size, emits(cell), part.place.directions

    for part in others:
        if kind(part) != kind(first):
            raise ValueError(
                f"{where}: all layers of one PyTorch module must be alike, got "
                f"{first.cell!r} in layer{first.path} and {part.cell!r} in "
                f"layer{part.path}; convert each one separately"
            )


def _peer(*, bias: bool = True, activation: str | None = None) -> Peer:
    return Peer(
        "PyTorch",
        _why_not,
        partial(read_cell, activation=activation),
        partial(write_cell, bias=bias),
        merges=("concat",),
        reverse=False,
    )


def _why_not(cell: Any) -> str | None:
    if isinstance(cell, Elman) and cell.activation not in (*TANH, *RELU):
        return "its RNN has only tanh and relu"
    if isinstance(cell, GRU) and not cell.reset_after:
        return "its GRU has only the form with reset_after=True"
    if isinstance(cell, LSTMP) and (cell.cell_clip or cell.proj_clip):
        return "its LSTM cannot clip"
    if not isinstance(cell, LSTM | GRU | Elman | LSTMP):
        return "it has no such cell"
    return None


def read_cell(
    leaves: Leaves, cell: Any, *, activation: str | None = None
) -> tuple[Any, Weights]:
    """Reads the tensors of one layer and direction."""
    double = any(leaf in leaves for leaf in BIASES)
    if cell is None:
        cell = _guess(leaves, double, activation)
    if isinstance(cell, Elman) and activation is not None:
        wanted = "relu" if cell.activation in RELU else "tanh"
        if activation != wanted:
            raise ValueError(
                f"from_torch: nonlinearity must be {wanted!r} for {cell!r}, got "
                f"{activation!r}"
            )
    wide = shapes(cell, leaves.inputs)
    w_ih = leaves.take("weight_ih", *reversed(wide["w_ih"])).T
    w_hh = leaves.take("weight_hh", *reversed(wide["w_hh"])).T
    b, b_hh = np.zeros(w_hh.shape[-1], w_hh.dtype), None
    if double:
        b, b_hh = (leaves.take(leaf, *wide["b"]) for leaf in BIASES)
    if not isinstance(cell, LSTMP):
        return cell, Weights(w_ih, w_hh, b, b_hh)
    w_hr = leaves.take("weight_hr", *reversed(wide["w_hr"])).T
    return cell, Weights(w_ih, w_hh, b, b_hh, w_hr)


def _guess(leaves: Leaves, double: bool, activation: str | None) -> Any:
    if "weight_hr" in leaves:
        shape = leaves.shape("weight_hr", "[P, H]")
        if len(shape) != 2:
            raise leaves.error("weight_hr", "[P, H]", text(shape))
        return LSTMP(shape[1], shape[0], double_bias=double)
    options = {"activation": jax.nn.relu} if activation == "relu" else {}
    makes: dict[int, Any] = {
        4: partial(LSTM, double_bias=double),
        3: partial(GRU, double_bias=double),
        1: partial(Elman, double_bias=double, **options),
    }
    return guess(leaves, "weight_hh", makes, transposed=True)


def write_cell(
    part: Part, weights: Weights, *, bias: bool = True
) -> dict[str, np.ndarray]:
    """Writes the tensors of one layer and direction."""
    arrays = {"weight_ih": weights.w_ih.T, "weight_hh": weights.w_hh.T}
    if bias:
        b_hh = np.zeros_like(weights.b) if weights.b_hh is None else weights.b_hh
        arrays |= {"bias_ih": weights.b, "bias_hh": b_hh}
    else:
        drop_bias("to_torch", part, weights)
    if weights.w_hr is not None:
        if part.place.bare:
            raise ValueError(
                f"to_torch: PyTorch has no place for {part.cell!r}: its LSTMCell has "
                "no projection; convert RNN(cell)"
            )
        arrays["weight_hr"] = weights.w_hr.T
    return arrays
