"""Keras on JAX: layers, both directions, stacked cells."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlstm
from peers import B, D, Live, Module, T, load

H = 2


def exact_tanh(x: Any) -> Any:
    """The hyperbolic tangent, which Keras computes in float32."""
    return jnp.tanh(x)


def make_layer(build: Callable[[Any], Any], x: tuple[int, ...] = (D,)) -> Any:
    """Builds a layer of Keras, for inputs of a shape at one step."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = load("keras")
    keras.saving.register_keras_serializable("peers")(exact_tanh)
    layer = build(keras.layers)
    layer.build((B, T, *x))
    return layer


def _make(build: Callable[[Any], Any], x: tuple[int, ...] = (D,)) -> Live:
    layer = make_layer(build, x)
    names = [v.path for v in layer.trainable_variables]
    assert names == [v.path for v in layer.weights]

    def run(weights: Any, xs: Any, carry: list[Any], lengths: Any) -> Any:
        options: dict[str, Any] = {}
        if lengths is not None:
            options["mask"] = jnp.arange(T)[None] < jnp.asarray(lengths)[:, None]
        state = _nest(carry, getattr(getattr(layer, "cell", None), "state_size", None))
        other = [v.value for v in layer.non_trainable_variables]
        options["initial_state"] = state
        results, _ = layer.stateless_call(weights, other, xs, **options)
        leaves = jax.tree.leaves(results)
        return leaves[: -len(carry)], leaves[-len(carry) :]

    return Live([np.asarray(v) for v in layer.weights], run)


def _nest(carry: list[Any], sizes: Any) -> list[Any]:
    """Nests states as stacked cells have them."""
    if not isinstance(sizes, list | tuple) or not isinstance(sizes[0], list | tuple):
        return carry
    rest = iter(carry)
    return [
        [next(rest) for _ in size] if isinstance(size, list | tuple) else next(rest)
        for size in sizes
    ]


WIDE = {"dtype": "float64"}
TANH = {"activation": exact_tanh, **WIDE}
RETURNS = {"return_sequences": True, "return_state": True}


def _layer(kind: str, layers: Any, **options: Any) -> Any:
    return getattr(layers, kind)(H, **RETURNS | TANH | options)


def _both(kind: str, merge: str | None, layers: Any, **options: Any) -> Any:
    layer = _layer(kind, layers, **options)
    return layers.Bidirectional(layer, merge_mode=merge, **WIDE)


def _unlike(layers: Any) -> Any:
    # Of a cell with as many states, since Keras halves their list.
    backward = layers.LSTM(3, go_backwards=True, **RETURNS, **TANH)
    forward = _layer("LSTM", layers)
    return layers.Bidirectional(forward, backward_layer=backward, **WIDE)


def _stacked(layers: Any) -> Any:
    kinds = [(layers.LSTMCell, H), (layers.GRUCell, 3), (layers.SimpleRNNCell, H)]
    cells = [kind(size, **TANH) for kind, size in kinds]
    return layers.RNN(layers.StackedRNNCells(cells, **WIDE), **RETURNS, **WIDE)


LSTM, GRU = jlstm.LSTM(H), jlstm.GRU(H, double_bias=True)
BEFORE, ELMAN = jlstm.GRU(H, reset_after=False), jlstm.Elman(H)
RELU = jlstm.Elman(H, activation=jax.nn.relu)
DEEP = jlstm.stack(
    *map(jlstm.RNN, (LSTM, jlstm.GRU(3, double_bias=True), jlstm.Elman(H)))
)


def _module(name: str, layer: Any, build: Any, **options: Any) -> Module:
    options = {"lengths": True} | options
    x = options.get("x", (D,))
    return Module("keras", name, layer, partial(_make, build, x), **options)


def _grid(layers: Any) -> Any:
    return layers.ConvLSTM2D(H, (3, 2), padding="same", **RETURNS, **TANH)


def _strided(layers: Any) -> Any:
    return layers.ConvLSTM1D(H, 2, strides=2, use_bias=False, **RETURNS, **TANH)


GRID = (3, 2)


MERGES: tuple[tuple[Any, str | None], ...] = (
    ("concat", "concat"),
    ("product", "mul"),
    ("mean", "ave"),
    ("none", None),
)


def _merged(kind: str, cell: Any, ours: Any, theirs: str | None) -> Module:
    layer = jlstm.bidirectional(cell, merge=ours)
    name, build = f"Bidirectional {kind} {theirs}", partial(_both, kind, theirs)
    return _module(name, layer, build, told=False)


MODULES = [
    _module("LSTM", jlstm.RNN(LSTM), partial(_layer, "LSTM")),
    _module(
        "LSTM without bias",
        jlstm.RNN(LSTM),
        partial(_layer, "LSTM", use_bias=False),
        zero=("b",),
        options=(("bias", False),),
    ),
    _module("GRU", jlstm.RNN(GRU), partial(_layer, "GRU")),
    _module(
        "GRU to one bias",
        jlstm.RNN(jlstm.GRU(H)),
        partial(_layer, "GRU"),
        told=False,
        folds=True,
    ),
    _module("GRU before", jlstm.RNN(BEFORE), partial(_layer, "GRU", reset_after=False)),
    _module("SimpleRNN", jlstm.RNN(ELMAN), partial(_layer, "SimpleRNN")),
    _module(
        "SimpleRNN relu",
        jlstm.RNN(RELU),
        partial(_layer, "SimpleRNN", activation="relu"),
        told=False,
    ),
    *(_merged("LSTM", LSTM, ours, theirs) for ours, theirs in MERGES),
    _merged("GRU", GRU, "sum", "sum"),
    _module(
        "Bidirectional of two sizes",
        jlstm.bidirectional(LSTM, jlstm.LSTM(3)),
        _unlike,
        told=False,
    ),
    _module("StackedRNNCells", DEEP, _stacked, told=False),
    _module(
        "ConvLSTM2D",
        jlstm.RNN(jlstm.ConvLSTM(H, (3, 2), GRID)),
        _grid,
        told=False,
        lengths=False,  # where Keras fails on JAX
        x=(*GRID, D),
    ),
    _module(
        "ConvLSTM1D strided, without bias",
        jlstm.RNN(jlstm.ConvLSTM(H, 2, (5,), strides=2, padding="VALID")),
        _strided,
        told=False,
        lengths=False,
        x=(5, D),
        zero=("b",),
        options=(("bias", False),),
    ),
]
