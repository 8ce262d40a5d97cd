"""Initialisers draw what other libraries draw, and cells can be given theirs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlstm

D, H = 30, 60
KEY = jax.random.key(0)
XS = jnp.ones((2, D))


def weights(cell, seed=0):
    return jax.device_get(cell.init(jax.random.key(seed), XS))


def moments(array):
    return np.array([np.mean(array), np.std(array), np.min(array), np.max(array)])


def torch_weights(kind):
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    module = getattr(torch.nn, kind)(D, H)
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "cell"),
    [("LSTM", jlstm.LSTM(H)), ("GRU", jlstm.GRU(H)), ("RNN", jlstm.Elman(H))],
)
def test_as_torch_draws_as_torch(kind, cell):
    theirs, ours = torch_weights(kind), weights(jlstm.init.as_torch(cell))
    for name, array in (
        ("weight_ih_l0", ours.w_ih.T),
        ("weight_hh_l0", ours.w_hh.T),
        ("bias_ih_l0", ours.b),
        ("bias_hh_l0", ours.b_hh),
    ):
        assert array.shape == theirs[name].shape
        few = array.ndim == 1
        np.testing.assert_allclose(
            moments(array), moments(theirs[name]), atol=0.03 if few else 0.004
        )


def flax_kernels(cell, names):
    found = cell.init(KEY, cell.initialize_carry(KEY, XS.shape), XS)["params"]
    return np.concatenate([found[name]["kernel"] for name in names], -1)


@pytest.mark.parametrize(
    ("kind", "gates", "cell"),
    [
        ("LSTMCell", ["i", "f", "g", "o"], jlstm.LSTM(H)),
        ("GRUCell", ["r", "z", "n"], jlstm.GRU(H)),
    ],
)
def test_as_flax_draws_as_linen(kind, gates, cell):
    import flax.linen as nn

    theirs, ours = getattr(nn, kind)(H), weights(jlstm.init.as_flax(cell))
    inputs = flax_kernels(theirs, [f"i{gate}" for gate in gates])
    np.testing.assert_allclose(moments(ours.w_ih), moments(inputs), atol=0.01)
    recurrent = flax_kernels(theirs, [f"h{gate}" for gate in gates])
    for matrix in (ours.w_hh, recurrent):
        for block in np.split(matrix, len(gates), -1):
            np.testing.assert_allclose(block @ block.T, np.eye(H), atol=1e-5)
    assert not ours.b.any()


def test_as_nnx_draws_as_nnx():
    from flax import nnx

    theirs = nnx.OptimizedLSTMCell(D, H, rngs=nnx.Rngs(0))
    ours = weights(jlstm.init.as_nnx(jlstm.LSTM(H)))
    inputs, recurrent = (
        np.asarray(layer.kernel[...]) for layer in (theirs.dense_i, theirs.dense_h)
    )
    np.testing.assert_allclose(moments(ours.w_ih), moments(inputs), atol=0.01)
    for matrix in (ours.w_hh, recurrent):
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(H), atol=1e-5)


def test_as_keras_draws_all_gates_at_once():
    ours = weights(jlstm.init.as_keras(jlstm.LSTM(H)))
    limit = (6 / (D + 4 * H)) ** 0.5
    assert 0.98 * limit < np.abs(ours.w_ih).max() <= limit
    np.testing.assert_allclose(ours.w_hh @ ours.w_hh.T, np.eye(H), atol=1e-5)
    blocks = np.split(ours.w_hh, 4, -1)
    assert np.abs(blocks[0] @ blocks[0].T - np.eye(H)).max() > 0.1
    np.testing.assert_array_equal(ours.b, np.repeat([0, 1, 0, 0], H))
    assert weights(jlstm.init.as_keras(jlstm.GRU(H))).b_hh.shape == (3 * H,)
    assert weights(jlstm.init.as_keras(jlstm.GRU(H, reset_after=False))).b_hh is None


def test_as_haiku_and_as_equinox_draw_as_their_sources_say():
    ours = weights(jlstm.init.as_haiku(jlstm.LSTM(H), D))
    deviation = (D + H) ** -0.5
    for matrix in (ours.w_ih, ours.w_hh):
        assert 1.95 * deviation < np.abs(matrix).max() <= 2 * deviation
        np.testing.assert_allclose(matrix.std(), 0.8796 * deviation, rtol=0.02)
    np.testing.assert_array_equal(ours.b, np.repeat([0, 1, 0, 0], H))
    gru = weights(jlstm.init.as_haiku(jlstm.GRU(H, reset_after=False), D))
    np.testing.assert_allclose(gru.w_ih.std(), D**-0.5, rtol=0.02)
    np.testing.assert_allclose(gru.w_hh.std(), H**-0.5, rtol=0.02)
    ours = weights(jlstm.init.as_equinox(jlstm.LSTM(H)))
    for array in (ours.w_ih, ours.w_hh, ours.b):
        assert 0.9 * H**-0.5 < np.abs(array).max() <= H**-0.5
    assert ours.b_hh is None


def test_default_recurrent_matrix_is_orthogonal_gate_by_gate():
    for cell, count in ((jlstm.LSTM(H), 4), (jlstm.GRU(H), 3)):
        for block in np.split(weights(cell).w_hh, count, -1):
            np.testing.assert_allclose(block @ block.T, np.eye(H), atol=1e-5)


def test_chrono_spreads_the_memory_times_of_both_cells():
    chrono = jlstm.init.Chrono(100)
    lstm = weights(jlstm.LSTM(400, forget_bias=chrono))
    i, f, g, o = np.split(lstm.b, 4)
    gru = weights(jlstm.GRU(400, update_bias=chrono))
    r, z, n = np.split(gru.b, 3)
    np.testing.assert_array_equal(i, -f)
    for bias in (f, z):
        times = np.exp(bias)
        assert 1 <= times.min() < 3
        assert 96 < times.max() <= 99
        np.testing.assert_allclose(times.mean(), 50, rtol=0.1)
    for rest in (g, o, r, n):
        assert not rest.any()


def test_a_cell_without_these_options_is_refused():
    with pytest.raises(
        ValueError, match=r"init: needs a cell .* without hidden_size; give the bare"
    ):
        jlstm.init.as_torch(jlstm.Zoneout(jlstm.LSTM(4), h=0.1))
