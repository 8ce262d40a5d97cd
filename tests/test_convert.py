"""Guarantees that converted weights compute what they did: results and all gradients.

Flax is here, PyTorch where it is installed, and of Keras, Haiku and Equinox there are
golden files. ``tests/convert_matrix.py`` compares with all that are installed.
"""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch_oracle
from golden import make_golden, make_peers
from peers import of_flax, of_torch
from peers.samples import Keras, keras_layer, keras_weights, lstm_weights, nested

import jlstm
from jlstm import convert

QUICK = {
    "linen-LSTMCell RNN",
    "linen-GRUCell Bidirectional",
    "linen-SimpleCell RNN",
    "linen-MGUCell RNN",
    "nnx-OptimizedLSTMCell Sequential",
    "nnx-GRUCell cell",
    "jax_rnn-lstm 1x forward",
    "torch-LSTM 2xbidirectional",
    "torch-GRU to one bias",
    "torch-LSTM projected to one bias",
    "torch-RNN relu",
}


def by_speed(modules):
    return [
        pytest.param(m, id=str(m), marks=[] if str(m) in QUICK else pytest.mark.slow)
        for m in modules
    ]


def assert_exact(errors):
    assert max(errors) <= peers.TOLERANCE, errors


@pytest.mark.parametrize("module", by_speed([*of_flax.MODULES, *of_torch.MODULES]))
def test_converted_weights_equal_the_library_that_is_installed(module):
    if not module.installed:
        pytest.skip(f"{module.peer} is not installed")
    with jax.enable_x64(True):
        rows = peers.compare(module)
    assert_exact(rows["from"])
    assert_exact(rows["to"])


@pytest.mark.core
@pytest.mark.parametrize("module", make_peers.MODULES, ids=str)
def test_converted_weights_equal_a_golden_file(module):
    with jax.enable_x64(True):
        drawn, expected = make_peers.load(module)
        assert_exact(peers.compare_from(module, drawn, expected))
        layer, params = module.read(drawn["weights"], given=True)
        back = module.write(params)
        _, again = module.read(back, given=True)
    assert layer is module.layer
    assert peers.error(again, params) <= 1e-15
    if not module.folds:
        assert peers.error(back, drawn["weights"]) <= 1e-15


@pytest.mark.parametrize("module", make_peers.MODULES, ids=str)
def test_golden_results_are_what_the_installed_library_computes(module):
    if not module.installed:
        pytest.skip(f"{module.peer} is not installed")
    with jax.enable_x64(True):
        drawn, expected = make_peers.load(module)
        got = peers.evaluate_peer(module.live(), drawn)
    assert max(peers.errors(got, expected)) <= 1e-12


@pytest.mark.parametrize("case", make_golden.CASES, ids=lambda case: case.name)
def test_torch_weights_are_laid_out_as_the_golden_results_need_them(case):
    arrays = make_golden.load(case)
    weights = {n: a for n, a in arrays.items() if n.startswith(("weight", "bias"))}
    layer: Any = torch_oracle.make_layer(case, "scan")
    layer = layer if case.layers > 1 else layer.layers[0]
    expected = torch_oracle.make_params(case, arrays)
    expected = expected if case.layers > 1 else expected[0]
    with jax.enable_x64(True):
        _, params = convert.from_torch(weights, layer)
    assert peers.error(params, expected) == 0
    back = convert.to_torch(layer, params)
    assert list(back) == list(weights)
    assert peers.error(back, weights) == 0


def test_vector_of_two_layers_and_directions_is_as_jax_unpacks_it():
    rnn = pytest.importorskip("jax.experimental.rnn")
    sizes = {"input_size": 5, "hidden_size": 4, "num_layers": 2, "bidirectional": True}
    weights = rnn.init_lstm_weight(jax.random.key(0), **sizes)
    layer = jlstm.stack(*[jlstm.bidirectional(jlstm.LSTM(4, double_bias=True))] * 2)
    _, params = convert.from_jax_rnn(weights, layer)
    cells = [cell for pair in params for cell in (pair.forward, pair.backward)]
    for kinds, name in zip(
        rnn.unpack_lstm_weights(weights, **sizes),
        ("w_ih", "w_hh", "b", "b_hh"),
        strict=True,
    ):
        for number, cell in enumerate(cells):
            np.testing.assert_array_equal(getattr(cell, name).T, kinds[number])
    np.testing.assert_array_equal(convert.to_jax_rnn(layer, params), weights)


LSTM = jlstm.RNN(jlstm.LSTM(8))
GRU = jlstm.RNN(jlstm.GRU(8))
XS = jnp.ones((2, 5, 3))


def init(layer):
    return layer.init(jax.random.key(0), XS)


def test_two_biases_are_added_for_a_cell_with_one():
    weights = lstm_weights()
    _, one = convert.from_torch(weights, LSTM)
    _, two = convert.from_torch(weights)
    assert one.b_hh is None
    np.testing.assert_array_equal(one.b, two.b + two.b_hh)
    back = convert.to_torch(LSTM, one)
    assert not back["bias_hh_l0"].any()
    np.testing.assert_array_equal(back["bias_ih_l0"], one.b)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_dtypes_are_kept(dtype):
    layer, params = convert.from_torch(lstm_weights(dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    for to in (convert.to_torch, convert.to_keras, convert.to_haiku, convert.to_linen):
        arrays = jax.tree.leaves(to(layer, params))
        assert {array.dtype for array in arrays} == {jnp.dtype(dtype)}


def test_converted_weights_share_no_memory_with_those_they_were_made_of():
    weights = lstm_weights()
    layer, params = convert.from_torch(weights)
    before = jax.tree.map(np.array, params)
    back = convert.to_torch(layer, params)
    for array in [*weights.values(), *back.values()]:
        array += 1
    assert peers.error(params, before) == 0


def test_learned_fresh_carry_begins_at_zero_and_goes_nowhere_else():
    layer = jlstm.RNN(jlstm.LSTM(8, learned_carry=True))
    weights = keras_weights()
    _, params = convert.from_keras(weights, layer)
    assert not params.h0.any()
    assert not params.c0.any()
    for array, back in zip(weights, convert.to_keras(layer, params), strict=True):
        np.testing.assert_array_equal(array, back)
    params = params.replace(c0=params.c0 + 1)
    with pytest.raises(ValueError, match=r"params.c0 is a learned fresh carry, which"):
        convert.to_keras(layer, params)


def test_layer_is_filled_beside_its_options():
    cell = jlstm.LSTM(8)
    layer = jlstm.stack(
        jlstm.bidirectional(cell, checkpoint_every=2, implementation="scan"),
        jlstm.Dropout(0.1),
        jlstm.bidirectional(jlstm.Precision(cell, jlstm.Policy(compute=jnp.bfloat16))),
    )
    params = init(layer)
    got, back = convert.from_torch(convert.to_torch(layer, params), layer)
    assert got is layer
    assert peers.error(back, params) == 0
    assert back[1] == ()
    for name in ("linen", "nnx", "keras"):
        weights = getattr(convert, f"to_{name}")(layer, params)
        _, back = getattr(convert, f"from_{name}")(weights, layer)
        assert peers.error(back, params) == 0


def test_dropout_is_counted_among_the_layers_of_a_sequential_or_not():
    layer = jlstm.stack(GRU, jlstm.Dropout(0.1), GRU)
    params = init(layer)
    variables = convert.to_linen(layer, params)
    assert set(variables["params"]) == {"layers_0", "layers_2"}
    other = {"layers_0": variables["params"]["layers_0"]}
    other["layers_1"] = variables["params"]["layers_2"]
    for weights in (variables, other):
        assert peers.error(convert.from_linen(weights, layer)[1], params) == 0


@pytest.mark.parametrize("name", ["torch", "linen", "nnx"])
def test_cell_by_itself_and_in_a_layer_have_the_same_weights(name):
    to, read = (getattr(convert, f"{way}_{name}") for way in ("to", "from"))
    params = init(LSTM)
    alone, whole = to(LSTM.cell, params), to(LSTM, params)
    for weights in (alone, whole):
        for layer in (LSTM, LSTM.cell):
            got, back = read(weights, layer)
            assert got is layer
            assert peers.error(back, params) == 0
    assert read(alone)[0].cell.hidden_size == 8


@pytest.mark.parametrize("name", ["torch", "linen", "nnx", "haiku"])
def test_prefix_names_a_part_of_a_model(name):
    prefix = {"torch": "a.rnn.", "nnx": "a.rnn."}.get(name, "a/~/")
    layer = jlstm.RNN(jlstm.LSTM(8))
    params = init(layer)
    to, read = (getattr(convert, f"{way}_{name}") for way in ("to", "from"))
    weights = to(layer, params, prefix=prefix)
    tree = weights.get("params", weights)
    tree["other"] = {"kernel": np.ones(3)} if name != "torch" else np.ones(3)
    _, back = read(weights, layer, prefix=prefix)
    assert peers.error(back, params) <= 1e-6  # Haiku's forget bias is less by 1


def test_params_of_a_compact_linen_model_are_those_of_cells():
    linen = pytest.importorskip("flax.linen")

    class Model(linen.Module):
        @linen.compact
        def __call__(self, xs):
            xs = linen.RNN(linen.GRUCell(4))(xs)
            rnns = linen.RNN(linen.LSTMCell(4)), linen.RNN(linen.LSTMCell(4))
            return linen.Dense(2)(linen.Bidirectional(*rnns)(xs))

    model = Model()
    variables = model.init(jax.random.key(0), XS)
    first, first_params = convert.from_linen(variables, prefix="GRUCell_0/")
    forward, backward = (
        convert.from_linen(variables, prefix=f"LSTMCell_{i}/") for i in (0, 1)
    )
    layer = jlstm.stack(first, jlstm.bidirectional(forward[0].cell), jlstm.Dense(2))
    dense = variables["params"]["Dense_0"]
    params = (
        first_params,
        jlstm.BidirectionalParams(forward[1], backward[1]),
        jlstm.DenseParams(dense["kernel"], dense["bias"]),
    )
    ys, _ = layer.apply(params, XS)
    assert peers.error(ys, model.apply(variables, XS)) <= 1e-5
    hint = "there is LSTMCell_0/ii/kernel: give prefix='LSTMCell_0/'"
    with pytest.raises(ValueError, match=hint):
        convert.from_linen(variables)


def test_random_states_of_nnx_are_left_alone():
    nnx = pytest.importorskip("flax.nnx")
    module = nnx.RNN(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)))
    state = nnx.state(module)
    assert "rngs" in state
    layer, params = convert.from_nnx(state)
    nnx.update(module, convert.to_nnx(layer, params.replace(b=params.b + 1)))
    np.testing.assert_array_equal(module.cell.dense_i.bias[...], params.b + 1)


def test_torch_module_tells_its_activation():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    module = torch.nn.ModuleDict({"rnn": torch.nn.RNN(3, 8, nonlinearity="relu")})
    module["rnn"].to(torch.bfloat16)
    layer, params = convert.from_torch(module, prefix="rnn.")
    assert layer == jlstm.RNN(jlstm.Elman(8, activation=jax.nn.relu, double_bias=True))
    assert params.w_ih.dtype == jnp.bfloat16
    expected = module["rnn"].weight_ih_l0.detach().float().numpy().T
    np.testing.assert_array_equal(params.w_ih.astype(np.float32), expected)
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' for Elman"):
        convert.from_torch(module, jlstm.RNN(jlstm.Elman(8)), prefix="rnn.")


def test_equinox_cells_are_taken_by_their_fields():
    params = init(GRU)
    fields = convert.to_equinox(GRU, params)
    cell = types.SimpleNamespace(**fields, hidden_size=8, use_bias=True)
    layer, back = convert.from_equinox(cell)
    assert layer == GRU
    assert peers.error(back, params) == 0


def test_keras_paths_tell_forward_from_backward():
    layer = jlstm.bidirectional(jlstm.LSTM(8))
    params = init(layer)
    names = [
        f"model/bidirectional/{side}_lstm/lstm_cell/{leaf}"
        for side in ("forward", "backward")
        for leaf in ("kernel", "recurrent_kernel", "bias")
    ]
    weights = dict(zip(names, convert.to_keras(layer, params), strict=True))
    for order in (names, sorted(names)):
        got, back = convert.from_keras({name: weights[name] for name in order})
        assert got == layer
        assert peers.error(back, params) == 0
    forward = "model/bidirectional/forward_lstm/"
    assert convert.from_keras(weights, prefix=forward)[0] == LSTM


def test_activation_that_keras_alone_knows_is_as_the_layer_says():
    source = keras_layer("SimpleRNN", keras_weights(1), activation="selu")
    for activation in (jax.nn.selu, jax.nn.elu):
        layer = jlstm.RNN(jlstm.Elman(8, activation=activation))
        assert convert.from_keras(source, layer)[0] is layer
    source.config["activation"] = "tanh"
    layer = jlstm.RNN(jlstm.Elman(8, activation=jnp.tanh))
    assert convert.from_keras(source, layer)[0] is layer


@pytest.mark.parametrize(
    ("source", "layer"),
    [
        (keras_layer("LSTM", keras_weights()), LSTM),
        (
            keras_layer("GRU", keras_weights(3), reset_after=False),
            jlstm.RNN(jlstm.GRU(8, reset_after=False)),
        ),
        (
            keras_layer("GRU", keras_weights(3)[:2], use_bias=False),
            GRU,
        ),
        (
            keras_layer("SimpleRNN", keras_weights(1), activation="relu"),
            jlstm.RNN(jlstm.Elman(8, activation=jax.nn.relu)),
        ),
        (
            keras_layer(
                "Bidirectional",
                keras_weights() * 2,
                layer=nested("LSTM"),
                backward_layer=nested("LSTM", go_backwards=True),
                merge_mode="ave",
            ),
            jlstm.bidirectional(jlstm.LSTM(8), merge="mean"),
        ),
        (keras_layer("RNN", keras_weights(), cell=nested("LSTMCell")), LSTM),
        (
            keras_layer(
                "RNN",
                keras_weights() + keras_weights(1, inputs=8),
                cell={
                    "class_name": "StackedRNNCells",
                    "config": {"cells": [nested("LSTMCell"), nested("SimpleRNNCell")]},
                },
            ),
            jlstm.stack(LSTM, jlstm.RNN(jlstm.Elman(8))),
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Keras) else "",
)
def test_keras_layer_tells_what_it_is(source, layer):
    got, params = convert.from_keras(source)
    assert got == layer
    bias = source.config["use_bias"]
    back = convert.to_keras(got, params, bias=bias)
    assert peers.error(back, source.weights) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of get_weights
def test_keras_layers_that_are_installed_tell_what_they_are():
    keras = pytest.importorskip("keras", reason="keras is not installed")
    layers = keras.layers
    cells = [layers.LSTMCell(8), layers.GRUCell(4, reset_after=False)]
    for source, layer in (
        (layers.LSTM(8, dropout=0.1), LSTM),
        (layers.GRU(8), jlstm.RNN(jlstm.GRU(8, double_bias=True))),
        (
            layers.Bidirectional(layers.SimpleRNN(8, activation="relu"), "mul"),
            jlstm.bidirectional(
                jlstm.Elman(8, activation=jax.nn.relu), merge="product"
            ),
        ),
        (
            layers.RNN(layers.StackedRNNCells(cells)),
            jlstm.stack(LSTM, jlstm.RNN(jlstm.GRU(4, reset_after=False))),
        ),
    ):
        with peers.lenient():
            source.build((2, 5, 3))
        got, params = convert.from_keras(source)
        assert got == layer
        paths = {v.path: v for v in source.weights}
        assert convert.from_keras(source, layer)[0] is layer
        _, same = convert.from_keras(paths, layer)
        assert peers.error(params, same) == 0
        source.set_weights(convert.to_keras(got, params))
    grid = layers.ConvLSTM2D(8, (3, 2), strides=(1, 2))
    with peers.lenient():
        grid.build((2, 5, 6, 7, 3))
    cell = jlstm.ConvLSTM(8, (3, 2), (6, 7), strides=(1, 2), padding="VALID")
    _, params = convert.from_keras(grid, jlstm.RNN(cell))
    grid.set_weights(convert.to_keras(jlstm.RNN(cell), params))
