"""Guarantees that a mistake, and what would be lost, gets one line that names it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peers.samples import keras_layer, keras_weights, lstm_weights

import jlstm
from jlstm import convert

LSTM = jlstm.RNN(jlstm.LSTM(8))
GRU = jlstm.RNN(jlstm.GRU(8))


def init(layer):
    return layer.init(jax.random.key(0), jnp.ones((2, 5, 3)))


def moved(tree):
    return jax.tree.map(lambda leaf: leaf + 1, tree)


def torch_with(**changes):
    weights = lstm_weights() | changes
    return {name: array for name, array in weights.items() if array is not None}


F32 = np.float32
DEEPER = {"weight_ih_l1": (32, 7), "weight_hh_l1": (32, 8)}
DEEPER |= {"bias_ih_l1": (32,), "bias_hh_l1": (32,)}
SOFTPLUS = jlstm.RNN(jlstm.Elman(8, activation=jax.nn.softplus))
BEFORE = jlstm.RNN(jlstm.GRU(8, reset_after=False))
BOTH = jlstm.bidirectional(jlstm.LSTM(8))
CLIPPED = jlstm.RNN(jlstm.LSTMP(8, 4, cell_clip=3.0))
PROJECTED = jlstm.RNN(jlstm.LSTMP(8, 4))
STRIDED = jlstm.RNN(jlstm.ConvLSTM(8, 3, (5,), strides=2))


def keras_grid(**config):
    config = {"strides": [1], "padding": "same", "dilation_rate": [1]} | config
    config = {"data_format": "channels_last"} | config
    return keras_layer("ConvLSTM1D", [], **config)


PEEPHOLE = jlstm.RNN(jlstm.PeepholeLSTM(8))

MISTAKES = {
    "missing": (
        lambda: convert.from_torch(torch_with(bias_hh_l0=None)),
        "from_torch: bias_hh_l0: expected [32], got no such tensor; there are "
        "weight_ih_l0, weight_hh_l0, bias_ih_l0",
    ),
    "extra": (
        lambda: convert.from_torch(torch_with(peephole=np.ones(8, F32))),
        "from_torch: peephole: expected no such tensor for RNN(LSTM(8, "
        "double_bias=True)), got [8]",
    ),
    "misshapen": (
        lambda: convert.from_torch(torch_with(bias_hh_l0=np.ones(31, F32))),
        "from_torch: bias_hh_l0: expected [32], got [31]",
    ),
    "no gates": (
        lambda: convert.from_torch(torch_with(weight_hh_l0=np.ones((32, 9), F32))),
        "from_torch: weight_hh_l0: expected [G, H] with G = 4H of LSTM or 3H of GRU or "
        "1H of Elman, got [32, 9]",
    ),
    "depth": (
        lambda: convert.from_torch(
            torch_with(**{n: np.ones(s, F32) for n, s in DEEPER.items()})
        ),
        "from_torch: weight_ih_l1: expected [32, 8], got [32, 7]",
    ),
    "prefix": (
        lambda: convert.from_torch({f"a.{n}": x for n, x in lstm_weights().items()}),
        "there is a.weight_hh_l0: give prefix='a.'",
    ),
    "no prefix": (
        lambda: convert.from_torch(lstm_weights(), prefix="a."),
        "from_torch: expected tensors whose names begin with 'a.', got weight_ih_l0, ",
    ),
    "not by name": (
        lambda: convert.from_torch([np.ones(3)]),
        "from_torch: expected tensors by name, got a list",
    ),
    "nothing": (lambda: convert.from_nnx({}), "from_nnx: expected tensors, got none"),
    "integers": (
        lambda: convert.from_torch(torch_with(bias_hh_l0=np.ones(32, np.int32))),
        "from_torch: bias_hh_l0: expected floating numbers, got int32",
    ),
    "mixed dtypes": (
        lambda: convert.from_torch(torch_with(bias_hh_l0=np.ones(32, np.float16))),
        "from_torch: bias_hh_l0: expected float32, as the others, got float16",
    ),
    "float64": (
        lambda: convert.from_torch(lstm_weights(np.float64)),
        "from_torch: weight_ih_l0: expected float32 or shorter, got float64, which JAX "
        "has only with jax_enable_x64; enable it, or cast first",
    ),
    "layer of another size": (
        lambda: convert.from_torch(lstm_weights(), jlstm.RNN(jlstm.LSTM(9))),
        "from_torch: weight_ih_l0: expected [36, D] for LSTM(9), got [32, 3]",
    ),
    "layer of another kind": (
        lambda: convert.from_keras(keras_weights(), GRU),
        "from_keras: weights[0]: expected [D, 24] for GRU(8), got [3, 32]",
    ),
    "layer of more directions": (
        lambda: convert.from_torch(lstm_weights(), BOTH),
        "from_torch: weight_ih_l0_reverse: expected [32, D] for LSTM(8), got no such "
        "tensor",
    ),
    "layer of other parts": (
        lambda: convert.from_torch(
            lstm_weights(), jlstm.stack(jlstm.Embed(9, 3), LSTM)
        ),
        "from_torch: layer[0] must be an RNN, bidirectional, a stack of them, or a "
        "cell that is known here, got Embed(9, 3); convert only the recurrent layers",
    ),
    "no recurrent layer": (
        lambda: convert.from_torch(lstm_weights(), jlstm.Dropout(0.1)),
        "from_torch: Dropout(0.1) has no recurrent layer",
    ),
    "params of another cell": (
        lambda: convert.to_torch(LSTM, init(GRU)),
        "to_torch: params must be LSTMParams, got GRUParams",
    ),
    "params of another size": (
        lambda: convert.to_torch(
            jlstm.stack(LSTM, LSTM), (init(LSTM), init(jlstm.RNN(jlstm.LSTM(9))))
        ),
        "to_torch: params[1].w_ih: expected [D, 32] for LSTM(8), got [3, 36]",
    ),
    "params of a layer for a stack": (
        lambda: convert.to_torch(jlstm.stack(LSTM, LSTM), init(LSTM)),
        "to_torch: params must be a tuple of 2, got a LSTMParams",
    ),
    "params of one direction": (
        lambda: convert.to_linen(BOTH, init(LSTM)),
        "to_linen: params must be BidirectionalParams, got a LSTMParams",
    ),
    "bias=False": (
        lambda: convert.to_torch(BOTH, init(BOTH), bias=False),
        "to_torch: bias=False would lose params.forward.b, which is not zero",
    ),
    "torch: cell": (
        lambda: convert.to_torch(PEEPHOLE, init(PEEPHOLE)),
        "to_torch: PyTorch has no place for RNN(PeepholeLSTM(8)): it has no such cell",
    ),
    "torch: activation": (
        lambda: convert.to_torch(SOFTPLUS, init(SOFTPLUS)),
        "its RNN has only tanh and relu",
    ),
    "torch: clips": (
        lambda: convert.to_torch(CLIPPED, init(CLIPPED)),
        "to_torch: PyTorch has no place for RNN(LSTMP(8, 4, cell_clip=3.0)): its LSTM "
        "cannot clip",
    ),
    "torch: projecting cell": (
        lambda: convert.to_torch(PROJECTED.cell, init(PROJECTED)),
        "to_torch: PyTorch has no place for LSTMP(8, 4): its LSTMCell has no "
        "projection; convert RNN(cell)",
    ),
    "directions of a cell": (
        lambda: convert.from_torch(
            {n.removesuffix("_l0"): a for n, a in lstm_weights().items()}, BOTH
        ),
        "from_torch: weight_ih_l0: expected [32, D] for LSTM(8), got no such tensor",
    ),
    "torch: projection": (
        lambda: convert.from_torch(torch_with(weight_hr_l0=np.ones((4, 7), F32))),
        "from_torch: weight_ih_l0: expected [28, D], got [32, 3]",
    ),
    "torch: projection of no matrix": (
        lambda: convert.from_torch(torch_with(weight_hr_l0=np.ones(4, F32))),
        "from_torch: weight_hr_l0: expected [P, H], got [4]",
    ),
    "torch: reset": (
        lambda: convert.from_torch(lstm_weights(), BEFORE),
        "from_torch: PyTorch has no place for RNN(GRU(8, reset_after=False)): its GRU "
        "has only the form with reset_after=True",
    ),
    "torch: merge": (
        lambda: convert.from_torch(
            lstm_weights(), jlstm.bidirectional(jlstm.LSTM(8), merge="sum")
        ),
        "it merges two directions only by concat",
    ),
    "torch: reverse": (
        lambda: convert.from_torch(
            lstm_weights(), jlstm.RNN(jlstm.LSTM(8), reverse=True)
        ),
        "it has no layer that runs only backward; convert RNN(cell)",
    ),
    "torch: sizes": (
        lambda: convert.from_torch(
            lstm_weights(), jlstm.stack(LSTM, jlstm.RNN(jlstm.LSTM(9)))
        ),
        "from_torch: all layers of one PyTorch module must be alike, got LSTM(8) in "
        "layer[0] and LSTM(9) in layer[1]; convert each one separately",
    ),
    "nnx: bias": (
        lambda: convert.to_nnx(GRU, moved(init(GRU))),
        "to_nnx: params.b_hh, the bias inside the reset gate, is not zero, and "
        "nnx.GRUCell has no such bias; Linen's GRUCell has one, so use to_linen",
    ),
    "nnx: reset": (
        lambda: convert.to_nnx(BEFORE, init(BEFORE)),
        "its GRUCell has only the form with reset_after=True",
    ),
    "linen: reset": (
        lambda: convert.to_linen(BEFORE, init(BEFORE)),
        "its GRUCell has only the form with reset_after=True",
    ),
    "linen: projection": (
        lambda: convert.to_linen(CLIPPED, init(CLIPPED)),
        "it has no such cell",
    ),
    "linen: published unit": (
        lambda: convert.to_linen(jlstm.MGU(8), init(jlstm.RNN(jlstm.MGU(8)))),
        "to_linen: Flax Linen has no place for MGU(8): its MGUCell has only the "
        "form with reset_after=True",
    ),
    "linen: reset_gate": (
        lambda: convert.from_linen({"hf": {"kernel": np.ones((8, 8), F32)}}),
        "from_linen: hn/bias: expected [8], got no such tensor; jlstm has no cell "
        "like an MGUCell with reset_gate=False",
    ),
    "linen: grid": (
        lambda: convert.from_linen({"hh": {"kernel": np.ones((3, 8, 32), F32)}}),
        "from_linen: hh/kernel: expected no convolution, got [3, 8, 32]; give layer=, "
        "such as RNN(ConvLSTM(...)), because the weights do not tell its spatial shape",
    ),
    "haiku: strides": (
        lambda: convert.to_haiku(STRIDED, None),
        "its convolution has padding 'SAME', and no strides or dilation",
    ),
    "haiku: grid": (
        lambda: convert.from_haiku(
            {"conv1_dlstm/hidden_to_hidden": {"w": np.ones((3, 8, 32), F32)}}
        ),
        "from_haiku: conv1_dlstm/hidden_to_hidden/w: expected no convolution, got [3, "
        "8, 32]; give layer=, such as RNN(ConvLSTM(...)), because the weights do not "
        "tell its spatial shape",
    ),
    "keras: grid": (
        lambda: convert.from_keras([np.ones((3, 8, 32), F32)] * 2),
        "from_keras: weights[1]: expected no convolution, got [3, 8, 32]; give layer=, "
        "such as RNN(ConvLSTM(...)), because the weights do not tell its spatial shape",
    ),
    "keras: grid of a layer": (
        lambda: convert.from_keras(keras_grid()),
        "from_keras: the weights of a ConvLSTM1D do not tell its spatial shape; give "
        "layer=, such as RNN(ConvLSTM(...))",
    ),
    "keras: strides": (
        lambda: convert.from_keras(keras_grid(), STRIDED),
        "from_keras: strides of ConvLSTM(8, 3, (5,), strides=2) must be [1], as of the "
        "ConvLSTM1D",
    ),
    "keras: channels": (
        lambda: convert.from_keras(keras_grid(data_format="channels_first"), STRIDED),
        "from_keras: data_format must be 'channels_last', got 'channels_first'",
    ),
    "linen: unknown": (
        lambda: convert.from_linen({"Dense_0": {"kernel": np.ones((3, 8), F32)}}),
        "from_linen: ii/kernel: expected [D, H], got no such tensor; there are "
        "Dense_0/kernel",
    ),
    "linen: square": (
        lambda: convert.from_linen({"h": {"kernel": np.ones((3, 8), F32)}}),
        "from_linen: h/kernel: expected [H, H], got [3, 8]",
    ),
    "haiku: reset": (
        lambda: convert.to_haiku(GRU, init(GRU)),
        "its GRU has only the form with reset_after=False",
    ),
    "haiku: activation": (
        lambda: convert.to_haiku(SOFTPLUS, init(SOFTPLUS)),
        "its VanillaRNN has only the form with activation=jax.nn.relu",
    ),
    "haiku: directions": (
        lambda: convert.to_haiku(BOTH, init(BOTH)),
        "it has no bidirectional layer; convert each direction as an RNN",
    ),
    "haiku: several": (
        lambda: convert.from_haiku(
            {f"{n}/linear": {"w": np.ones((11, 32), F32)} for n in ("lstm", "lstm_1")}
        ),
        "from_haiku: the weights do not tell how 2 cells (lstm/, lstm_1/) are put "
        "together; give layer=, such as a stack, or prefix= of one of them",
    ),
    "haiku: no gates": (
        lambda: convert.from_haiku({"a/linear": {"w": np.ones((11, 31), F32)}}),
        "from_haiku: a/linear/w: expected [D + H, 4H], got [11, 31]",
    ),
    "haiku: no inputs": (
        lambda: convert.from_haiku(
            {"a/linear": {"w": np.ones((8, 32), F32), "b": np.ones(32, F32)}}
        ),
        "from_haiku: a/linear/w: expected [D + 8, 32], got [8, 32]",
    ),
    "equinox: cell": (
        lambda: convert.to_equinox(SOFTPLUS, init(SOFTPLUS)),
        "it has only an LSTMCell and a GRUCell",
    ),
    "equinox: reset": (
        lambda: convert.to_equinox(BEFORE, init(BEFORE)),
        "its GRUCell has only the form with reset_after=True",
    ),
    "jax: cell": (
        lambda: convert.to_jax_rnn(GRU, init(GRU)),
        "jax.experimental.rnn has no place for RNN(GRU(8)): it has only an LSTM",
    ),
    "jax: size": (
        lambda: convert.from_jax_rnn(np.ones(145, F32), jlstm.RNN(jlstm.LSTM(4))),
        "from_jax_rnn: weights: expected [96 + 16 * D] for RNN(LSTM(4)) and some D, "
        "got [145]",
    ),
    "keras: several": (
        lambda: convert.from_keras(keras_weights() * 2),
        "from_keras: weights: expected 1 times 2 or 3 arrays for one cell, got 6; give "
        "layer= for more cells",
    ),
    "keras: number": (
        lambda: convert.from_keras([*keras_weights(), *keras_weights()[:2]], BOTH),
        "from_keras: weights: expected 2 times 2 or 3 arrays for "
        "bidirectional(LSTM(8)), got 5",
    ),
    "keras: prefix": (
        lambda: convert.from_keras(keras_weights(), prefix="lstm/"),
        "from_keras: prefix='lstm/' needs paths, and a list has none; give "
        "{v.path: v for v in model.weights}",
    ),
    "keras: reset": (
        lambda: convert.from_keras(keras_weights(3)[:2]),
        "expected [2, 3H] or [3H], which tells whether the GRU resets after the "
        "product, got no such tensor; give layer=",
    ),
    "keras: cells": (
        lambda: convert.from_keras(
            {f"{n}/kernel": np.ones((3, 8), F32) for n in ("lstm", "dense")},
            BOTH.forward,
        ),
        "from_keras: expected 1 cell for RNN(LSTM(8)), got 2: lstm/, dense/",
    ),
    "keras: gate": (
        lambda: convert.from_keras(
            keras_layer("LSTM", keras_weights(), recurrent_activation="hard_sigmoid")
        ),
        "from_keras: a LSTM must have activation 'tanh' and recurrent_activation "
        "'sigmoid', got 'tanh' and 'hard_sigmoid'",
    ),
    "keras: activation": (
        lambda: convert.from_keras(
            keras_layer("SimpleRNN", keras_weights(1), activation="selu")
        ),
        "from_keras: activation must be one of tanh, relu, sigmoid, got 'selu'; give "
        "layer=RNN(Elman(8, activation=...))",
    ),
    "keras: backward": (
        lambda: convert.from_keras(
            keras_layer("LSTM", keras_weights(), go_backwards=True)
        ),
        "from_keras: go_backwards returns outputs in the order of processing, which no "
        "layer here does; give layer=RNN(cell, reverse=True), whose outputs stay in "
        "the order of inputs",
    ),
    "keras: kind": (
        lambda: convert.from_keras(keras_layer("Sequential", keras_weights())),
        "from_keras: expected an LSTM, GRU, SimpleRNN, Bidirectional or RNN of their "
        "cells, got a Sequential; give the recurrent layers one by one",
    ),
    "keras: another activation": (
        lambda: convert.from_keras(
            keras_layer("SimpleRNN", keras_weights(1), activation="relu"),
            jlstm.RNN(jlstm.Elman(8)),
        ),
        "relu)), got RNN(Elman(8))",
    ),
    "keras: another layer": (
        lambda: convert.from_keras(keras_layer("LSTM", keras_weights()), BEFORE),
        "from_keras: layer: expected RNN(LSTM(8)), got RNN(GRU(8, reset_after=False))",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_and_losses_get_one_line(name):
    convert_it, line = MISTAKES[name]
    with pytest.raises(ValueError, match=re.escape(line)) as caught:
        convert_it()
    assert "\n" not in str(caught.value)
