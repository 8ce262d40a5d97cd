"""What the configs of Keras layers tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jlstm.cells import GRU, LSTM, ConvLSTM, Elman, tanh
from jlstm.convert.cells import RELU, TANH, is_reset_after, sizes
from jlstm.convert.parts import Part, parts_of
from jlstm.layers import RNN, bidirectional, stack

MERGES = {
    "concat": "concat",
    "sum": "sum",
    "mul": "product",
    "ave": "mean",
    None: "none",
}
ACTIVATIONS = {"tanh": tanh, "relu": jax.nn.relu, "sigmoid": jax.nn.sigmoid}


def layer_of(kind: str, config: Mapping[str, Any], given: Any) -> Any:
    """Makes the layer that a config of Keras describes.

    Raises:
      ValueError: there is no such layer here, or ``given`` is another one.
    """
    if kind == "Bidirectional":
        pair = [config["layer"], config.get("backward_layer") or config["layer"]]
        cells = [_cell_of(part["class_name"], part["config"], given) for part in pair]
        merge: Any = MERGES[config["merge_mode"]]
        both = cells[0] == cells[1]
        made: Any = bidirectional(cells[0], None if both else cells[1], merge=merge)
    else:
        if config.get("go_backwards") and given is None:
            raise ValueError(
                "from_keras: go_backwards returns outputs in the order of processing, "
                "which no layer here does; give layer=RNN(cell, reverse=True), whose "
                "outputs stay in the order of inputs"
            )
        own = config.get("cell", {})
        if own.get("class_name") == "StackedRNNCells":
            cells = own["config"]["cells"]
            made = stack(
                *(RNN(_cell_of(c["class_name"], c["config"], given)) for c in cells)
            )
        else:
            made = RNN(_cell_of(kind, config, given))
    if given is None:
        return made
    expected, got = (
        list(map(_formula, parts_of("from_keras", x))) for x in (made, given)
    )
    if expected != got:
        raise ValueError(f"from_keras: layer: expected {made!r}, got {given!r}")
    return given


def _formula(part: Part) -> tuple[Any, ...]:
    cell, merge = part.cell, getattr(part.layer, "merge", None)
    activation = getattr(cell, "activation", None)
    known = activation in TANH, activation in RELU
    return type(cell), is_reset_after(cell), known, merge


def _cell_of(kind: str, config: Mapping[str, Any], given: Any) -> Any:
    if kind == "RNN":
        own = config["cell"]
        return _cell_of(own["class_name"], own["config"], given)
    if kind in ("ConvLSTM1D", "ConvLSTM2D", "ConvLSTM3D"):
        return _grid_of(kind, config, given)
    make = {"LSTM": LSTM, "GRU": GRU, "SimpleRNN": Elman}.get(kind.removesuffix("Cell"))
    if make is None:
        raise ValueError(
            f"from_keras: expected an LSTM, GRU, SimpleRNN, Bidirectional or RNN of "
            f"their cells, got a {kind}; give the recurrent layers one by one"
        )
    activation, size = config["activation"], config["units"]
    if make is Elman:
        if activation not in ACTIVATIONS and given is None:
            raise ValueError(
                f"from_keras: activation must be one of {', '.join(ACTIVATIONS)}, got "
                f"{activation!r}; give layer=RNN(Elman({size}, activation=...))"
            )
        # One that is not known here is at least none of the other two.
        return Elman(size, activation=ACTIVATIONS.get(activation, jax.nn.sigmoid))
    _check_gates(kind, config)
    if make is LSTM:
        return LSTM(size)
    after = config["reset_after"]
    return GRU(size, reset_after=after, double_bias=after and config["use_bias"])


def _check_gates(kind: str, config: Mapping[str, Any]) -> None:
    gates = config["activation"], config["recurrent_activation"]
    if gates != ("tanh", "sigmoid"):
        raise ValueError(
            f"from_keras: a {kind} must have activation 'tanh' and "
            f"recurrent_activation 'sigmoid', got {gates[0]!r} and {gates[1]!r}"
        )


def _grid_of(kind: str, config: Mapping[str, Any], given: Any) -> ConvLSTM:
    """Compares a cell that is given; Keras does not tell the shape of the grid."""
    _check_gates(kind, config)
    if config["data_format"] != "channels_last":
        raise ValueError(
            f"from_keras: data_format must be 'channels_last', got "
            f"{config['data_format']!r}"
        )
    cell = None if given is None else parts_of("from_keras", given)[0].cell
    if not isinstance(cell, ConvLSTM):
        raise ValueError(
            f"from_keras: the weights of a {kind} do not tell its spatial shape; give "
            "layer=, such as RNN(ConvLSTM(...))"
        )
    fields = {"strides": "strides", "padding": "padding", "dilation": "dilation_rate"}
    expected = [config[theirs] for theirs in fields.values()]
    got = [cell.padding.lower() if n == "padding" else sizes(cell, n) for n in fields]
    for name, a, b in zip(fields, expected, got, strict=True):
        if a != b and tuple(a) != b:
            raise ValueError(
                f"from_keras: {name} of {cell!r} must be {a!r}, as of the {kind}"
            )
    return cell
