"""What the simple cells, and those on grids and at irregular times, have of their own.

That they equal their formulas is in ``test_oracles.py``.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import TOLERANCE

import jlstm
from jlstm.testing import check_cell, check_layer, moved, random_like

B, T, D = 3, 6, 4
KEY = jax.random.key(0)
close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
slow = partial(pytest.param, marks=pytest.mark.slow)


def draw(*shape: int, seed: int = 0) -> Any:
    return random_like(jnp.zeros(shape), seed=seed)


def made(cell: Any, x: Any) -> Any:
    """Random params for an input at one step."""
    return moved(cell.init(KEY, x), seed=2)


def results(cell: Any, params: Any, xs: Any) -> tuple:
    """A loss, outputs, the carry; gradients of params and of inputs."""

    @jax.jit
    def run(params, xs):
        def loss(params, xs):
            out = jlstm.unroll(cell, params, xs)
            return jnp.square(out[0]).sum(), out

        values, pull, out = jax.vjp(loss, params, xs, has_aux=True)
        return values, out, pull(jnp.ones_like(values))

    return run(params, xs)


# Simple recurrent networks.


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_identity_fills_a_square_matrix(dtype):
    matrix = jlstm.init.Identity(0.5)(KEY, (3, 3), dtype)
    assert matrix.dtype == dtype
    np.testing.assert_array_equal(matrix, np.eye(3) / 2)


@pytest.mark.parametrize("shape", [(3, 8), (3,), (2, 3, 3)])
def test_identity_refuses_what_is_not_square(shape):
    message = (
        r"^Identity: expected the shape of a square matrix, got \[.*\]; it is for "
        r"recurrent weights, such as w_hh \[H, H\]$"
    )
    with pytest.raises(ValueError, match=message):
        jlstm.init.Identity()(KEY, shape, "float32")


def test_irnn_keeps_what_it_holds_without_input():
    cell = jlstm.Elman(3, activation=jax.nn.relu, w_hh_init=jlstm.init.Identity())
    params, held = cell.init(KEY, jnp.zeros((B, D))), jnp.abs(draw(B, 3))
    zeros, carry = jnp.zeros((B, 100, D)), jlstm.ElmanCarry(held)
    _, last = jlstm.unroll(cell, params, zeros, carry)
    np.testing.assert_array_equal(last.h, held)
    assert repr(jlstm.LSTM(3, w_hh_init=jlstm.init.Identity(0.5))) == (
        "LSTM(3, w_hh_init=Identity(scale=0.5))"
    )


def leaky(x):
    return jnp.where(x > 0, x, x / 10)


@dataclasses.dataclass(frozen=True)
class Leaky:
    slope: float

    def __call__(self, x):
        return jnp.where(x > 0, x, x * self.slope)


@pytest.mark.parametrize("name", ["Elman", "IndRNN"])
def test_activation_may_be_a_function_or_a_frozen_dataclass(name):
    make = getattr(jlstm, name)
    by_function, by_dataclass = (
        make(3, activation=leaky),
        make(3, activation=Leaky(0.1)),
    )
    assert by_dataclass == make(3, activation=Leaky(0.1)) != make(3, activation=leaky)
    xs = draw(B, T, D)
    params = made(by_function, xs[:, 0])
    close(results(by_function, params, xs), results(by_dataclass, params, xs))
    ys, _ = jlstm.unroll(make(3), params, xs)
    assert float(jnp.abs(ys - results(by_function, params, xs)[1][0]).max()) > 0.01


@pytest.mark.parametrize("name", ["Elman", "IndRNN"])
def test_activation_that_is_a_lambda_is_refused(name):
    message = rf"^{name}\.activation: must be a module-level function or a frozen data"
    with pytest.raises(ValueError, match=message):
        getattr(jlstm, name)(8, activation=lambda x: x)


def test_ind_rnn_is_an_elman_whose_recurrent_matrix_is_diagonal():
    cell, xs = jlstm.IndRNN(3), draw(B, T, D)
    params = made(cell, xs[:, 0])
    whole = jlstm.ElmanParams(params.w_ih, jnp.diag(params.u), params.b)
    elman = jlstm.Elman(3, activation=jax.nn.relu)
    value, (ys, carry), (dparams, dxs) = results(cell, params, xs)
    expected = results(elman, whole, xs)
    close(
        (value, ys, carry.h, dxs),
        (*expected[:1], expected[1][0], expected[1][1].h, expected[2][1]),
    )
    close(dparams.u, jnp.diag(expected[2][0].w_hh))


def test_ind_rnn_starts_within_the_limit_that_is_given():
    x = jnp.zeros((1, D))
    assert float(jnp.abs(jlstm.IndRNN(500).init(KEY, x).u).max()) <= 1
    limit = 2 ** (1 / 20)
    u = jlstm.IndRNN(500, u_init=jlstm.init.Uniform(limit)).init(KEY, x).u
    assert 1 < float(jnp.abs(u).max()) <= limit


# On grids.


@pytest.mark.parametrize("shape", [(3, 4), slow((5,)), slow((2, 3, 2))])
def test_conv_lstm_equals_flax(shape):
    size, kernel = 2, (3, 2, 3)[: len(shape)]
    cell = jlstm.ConvLSTM(size, kernel, shape)
    module = nn.ConvLSTMCell(size, kernel)
    order = np.r_[0:2, 4:6, 2:4, 6:8]  # i, g, f, o
    forget = np.repeat([0.0, 1.0, 0.0, 0.0], size)

    def by_flax(params, xs, carry):
        # Flax adds 1 to the forget gate when it runs, and has a bias a convolution.
        b = (params.b - forget)[order]
        variables = {
            "ih": {"kernel": params.w_ih[..., order], "bias": b / 4},
            "hh": {"kernel": params.w_hh[..., order], "bias": b * 3 / 4},
        }
        state, ys = (carry.c, carry.h), []
        for t in range(xs.shape[1]):
            state, y = module.apply({"params": variables}, state, xs[:, t])
            ys.append(y)
        return jnp.stack(ys, 1), jlstm.LSTMCarry(state[1], state[0])

    def by_jlstm(params, xs, carry):
        return jlstm.unroll(cell, params, xs, carry)

    @jax.jit
    def both(inputs, directions):
        def one(run):
            out, pull = jax.vjp(run, *inputs)
            return out, pull(directions)

        return one(by_flax), one(by_jlstm)

    with jax.enable_x64(True):
        xs = random_like(jnp.zeros((B, 3, *shape, 3)), seed=1)
        params = made(cell, xs[:, 0])
        carry = random_like(cell.init_carry(params, (B,)), seed=3)
        like = jax.eval_shape(by_jlstm, params, xs, carry)
        found = both((params, xs, carry), random_like(like, seed=4))
        chex.assert_trees_all_close(*found, rtol=0, atol=TOLERANCE["float64"])


def test_conv_lstm_with_a_kernel_of_one_is_an_lstm_at_each_place():
    cell, xs = jlstm.ConvLSTM(2, 1, (3, 4)), draw(B, T, 3, 4, D)
    params = made(cell, xs[:, 0])
    ys, _ = jlstm.unroll(cell, params, xs)
    places = jnp.moveaxis(xs, 1, 3).reshape(-1, T, D)
    lstm = jlstm.LSTMParams(params.w_ih[0, 0], params.w_hh[0, 0], params.b)
    expected, _ = jlstm.unroll(jlstm.LSTM(2), lstm, places)
    close(ys, jnp.moveaxis(expected.reshape(B, 3, 4, T, 2), 3, 1))


def test_conv_lstm_takes_any_leading_dimensions():
    cell, x = jlstm.ConvLSTM(2, 3, (5,), strides=2), draw(2, B, 5, D)
    params = made(cell, x)
    carry = random_like(cell.init_carry(params, (2, B)), seed=3)
    whole = cell.step(params, carry, x)
    assert whole[1].shape == (2, B, 3, 2)
    close(whole, jax.vmap(partial(cell.step, params))(carry, x))
    row, one = jax.tree.map(lambda leaf: leaf[0, 0], (carry, x))
    alone = cell.step(params, row, one)
    close(alone, jax.tree.map(lambda leaf: leaf[0, 0], whole))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (8, 5)),
        ({"strides": (2, 3)}, (4, 2)),
        ({"padding": "VALID"}, (6, 4)),
        ({"padding": "VALID", "dilation": 2}, (4, 3)),
        ({"padding": "VALID", "dilation": (2, 1), "strides": 2}, (2, 2)),
    ],
)
def test_conv_lstm_knows_the_shape_of_its_carry(options, expected):
    cell = jlstm.ConvLSTM(2, (3, 2), (8, 5), **options)
    assert cell.carry_shape == expected
    x = jax.ShapeDtypeStruct((B, 8, 5, D), jnp.float32)
    params = jax.eval_shape(cell.init, KEY, x)
    fresh = jax.eval_shape(lambda p: cell.init_carry(p, (B,)), params)
    carry, y = jax.eval_shape(cell.step, params, fresh, x)
    assert carry == fresh
    assert y.shape == (B, *expected, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"spatial_shape": 8},
            r"spatial_shape: must be a tuple of one to three ints, such as \(height, "
            r"width\), got 8$",
        ),
        ({"spatial_shape": ()}, r"spatial_shape: must be a tuple of one to three"),
        ({"spatial_shape": (8, 8, 8, 8)}, r"spatial_shape: must be a tuple of one to"),
        (
            {"spatial_shape": (8, 0)},
            r"spatial_shape: must be a positive int, or a tuple of 2, one for "
            r"each spatial axis, got \(8, 0\)$",
        ),
        (
            {"kernel_size": (3, 3, 3)},
            r"kernel_size: must be a positive int, or a tuple",
        ),
        ({"kernel_size": 3.0}, r"kernel_size: must be a positive int, .*, got 3\.0$"),
        ({"strides": 0}, r"strides: must be a positive int, .*, got 0$"),
        (
            {"dilation": (1, True)},
            r"dilation: must be a positive int, .*, got \(1, Tru",
        ),
        ({"padding": "CAUSAL"}, r"padding: must be 'SAME' or 'VALID', got 'CAUSAL'$"),
        (
            {"padding": "VALID", "kernel_size": 9},
            r"kernel_size: must fit into spatial_shape \(8, 8\) with padding='VALID', "
            r"got 9$",
        ),
        ({"hidden_size": 0}, r"hidden_size: must be a positive int, got 0$"),
    ],
)
def test_conv_lstm_refuses_sizes_that_do_not_fit(options, message):
    given: Any = {"hidden_size": 2, "kernel_size": 3, "spatial_shape": (8, 8)}
    with pytest.raises(ValueError, match=r"^ConvLSTM\." + message):
        jlstm.ConvLSTM(**given | options)


def test_conv_lstm_refuses_another_spatial_shape():
    cell, xs = jlstm.ConvLSTM(2, 3, (5, 4)), draw(B, T, 5, 4, D)
    params = cell.init(KEY, xs[:, 0])
    message = (
        r"ConvLSTM: x must be \[\.\.\., 5, 4, D\], as spatial_shape says, got "
        r"\[3, 4, 5, 4\]"
    )
    turned = jnp.swapaxes(xs, 2, 3)
    with pytest.raises(ValueError, match="^" + message):
        cell.step(params, cell.init_carry(params, (B,)), turned[:, 0])
    with pytest.raises(ValueError, match="^" + message):
        jlstm.RNN(cell).init(KEY, turned)
    with pytest.raises(ValueError, match="^unroll: .*" + message):
        jlstm.unroll(cell, params, turned)
    message = (
        r"^unroll: xs must be \[B, T, \.\.\.\], got shape \(3, 6, 5, 4\); .* 3 feat"
    )
    with pytest.raises(ValueError, match=message):
        jlstm.unroll(cell, params, xs[..., 0])


GRID = jnp.zeros((B, T, 3, 2, 2))
CONV = jlstm.ConvLSTM(1, 2, (3, 2))
STRIDED = jlstm.ConvLSTM(2, 2, (3, 2), strides=(2, 1), learned_carry=True)


@pytest.mark.parametrize(
    "layer",
    [
        slow(jlstm.stack(jlstm.bidirectional(CONV), jlstm.RNN(STRIDED))),
        slow(jlstm.bidirectional(CONV, jlstm.ConvLSTM(2, 3, (3, 2)))),
        slow(jlstm.RNN(STRIDED, reverse=True, checkpoint_every=2)),
    ],
    ids=["stack", "bidirectional", "reverse"],
)
def test_layers_of_conv_lstm_obey_the_laws(layer):
    check_layer(layer, GRID, smooth=False)


# Missing values.


def series(mask: Any = None) -> jlstm.GRUDInput:
    """Series in which about half of the values are observed."""
    delta = jnp.abs(draw(B, T, D, seed=1))
    seen = draw(B, T, D, seed=2) > 0 if mask is None else mask
    return jlstm.GRUDInput(draw(B, T, D), seen, delta)


def first(xs: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[:, 0], xs)


GRU_D = jlstm.GRUD(3)


@pytest.mark.parametrize("implementation", ["fused", "scan", "one device"])
def test_missing_values_may_be_nan(implementation, monkeypatch):
    if implementation == "one device":
        # Whose steps are in C++, where the library was built.
        for name in ("door", "kernels.fused", "kernels.product"):
            monkeypatch.setattr(f"jlstm.{name}.may_be_sharded", lambda: False)
    name = None if implementation == "one device" else implementation
    layer = jlstm.stack(jlstm.RNN(GRU_D, implementation=name), jlstm.Dense(2))
    xs = jax.tree.map(lambda leaf: jnp.tile(leaf, (8, 1, 1)), series())
    params = layer.init(KEY, xs)

    @jax.jit
    def run(values):
        def loss(params, values):
            ys, carry = layer.apply(params, xs._replace(x=values))
            return jnp.square(ys).sum(), (ys, carry)

        return jax.grad(loss, (0, 1), has_aux=True)(params, values)

    zeros, garbage, nans = (
        run(jnp.where(xs.mask, xs.x, value)) for value in (0, 1e30, np.nan)
    )
    chex.assert_tree_all_finite(nans)
    chex.assert_trees_all_equal(nans, zeros)
    chex.assert_trees_all_equal(garbage, zeros)
    dx = nans[0][1]
    assert not dx[~np.asarray(xs.mask)].any()
    assert dx[np.asarray(xs.mask)].all()


def test_masks_of_any_dtype_mean_the_same():
    seen = series().mask
    params = made(GRU_D, first(series()))
    expected = jlstm.unroll(GRU_D, params, series())
    for dtype in ("int32", "float32"):
        close(jlstm.unroll(GRU_D, params, series(seen.astype(dtype))), expected)


def test_gru_d_that_observes_everything_is_a_gru():
    xs = series(jnp.ones((B, T, D), bool))._replace(delta=jnp.zeros((B, T, D)))
    params = made(GRU_D, first(xs))
    # Without what a rate adds that does not depend on time.
    params = dataclasses.replace(params, b_dh=-jnp.abs(params.b_dh))
    flip = jnp.repeat(jnp.array([1.0, -1.0, 1.0]), 3)  # z opens to the other side
    b = params.b + params.w_mh.sum(0)
    gru = jlstm.GRUParams(params.w_ih * flip[None], params.w_hh * flip[None], b * flip)
    expected, _ = jlstm.unroll(jlstm.GRU(3, reset_after=False), gru, xs.x)
    ys, carry = jlstm.unroll(GRU_D, params, xs)
    close(ys, expected)
    np.testing.assert_array_equal(carry.x, xs.x[:, -1])


def test_what_was_never_observed_is_at_its_mean():
    means = np.arange(D, dtype=np.float32)
    cell = jlstm.GRUD(3, mean_init=jlstm.init.Pretrained(means))
    xs = series(jnp.zeros((B, T, D), bool))
    params = made(cell, first(xs))
    params = dataclasses.replace(params, mean=jnp.asarray(means))
    fresh = cell.init_carry(params, (B,))
    np.testing.assert_array_equal(fresh.x, np.broadcast_to(means, (B, D)))
    ys, carry = jlstm.unroll(cell, params, xs)
    close(carry.x, fresh.x)
    # As if the means were observed, but for what the mask itself says.
    seen = xs._replace(x=jnp.broadcast_to(means, (B, T, D)), mask=jnp.ones((B, T, D)))
    blind = dataclasses.replace(params, w_mh=jnp.zeros_like(params.w_mh))
    close(ys, jlstm.unroll(cell, blind, seen)[0])


def test_decays_begin_at_one_and_are_learned():
    xs = series()
    params = GRU_D.init(KEY, first(xs))
    zx = GRU_D.project(params, xs)
    np.testing.assert_array_equal(zx.decay_h, jnp.ones_like(zx.decay_h))
    np.testing.assert_array_equal(zx.decay_x, ~np.asarray(xs.mask))
    _, _, (gradient, _) = results(
        GRU_D, params, xs._replace(mask=xs.mask.astype(float))
    )
    for leaf in (gradient.w_dx, gradient.b_dx, gradient.w_dh, gradient.b_dh):
        assert leaf.all()


def test_gru_d_refuses_other_inputs():
    xs: Any = series()
    params = GRU_D.init(KEY, first(xs))
    message = r"GRUD: x must be a GRUDInput, got a ArrayImpl$"
    with pytest.raises(TypeError, match="^" + message):
        GRU_D.init(KEY, xs.x[:, 0])
    with pytest.raises(
        ValueError, match=r"^unroll: .*GRUD: x must be a GRUDInput, got"
    ):
        jlstm.unroll(GRU_D, params, xs.x)
    message = (
        r"GRUD: x, mask and delta must have one shape, got \[3, 4\], \[3, 4\], \[3, 1\]"
    )
    short = xs._replace(delta=xs.delta[..., :1])
    with pytest.raises(ValueError, match=f"^{message}$"):
        GRU_D.init(KEY, first(short))
    with pytest.raises(
        ValueError, match=r"^unroll: .*GRUD: x, mask and delta must have"
    ):
        jlstm.unroll(GRU_D, params, short)


# Irregular times.


def test_time_lstm_without_time_between_steps_is_an_lstm():
    cell, xs = jlstm.TimeLSTM(3), jlstm.TimeLSTMInput(draw(B, T, D), jnp.zeros((B, T)))
    params = made(cell, first(xs))
    lstm = jlstm.LSTMParams(params.w_ih, params.w_hh, params.b)
    close(jlstm.unroll(cell, params, xs), jlstm.unroll(jlstm.LSTM(3), lstm, xs.x))
    later = xs._replace(elapsed=jnp.full((B, T), 9.0))
    ys, carry = jlstm.unroll(cell, params, later)
    assert float(jnp.abs(carry.c - jlstm.unroll(cell, params, xs)[1].c).max()) > 0.01
    # Times may be a column, or integers.
    for elapsed in (later.elapsed[..., None], jnp.full((B, T), 9)):
        close(jlstm.unroll(cell, params, later._replace(elapsed=elapsed))[0], ys)


def test_decays_of_time_lstm_begin_at_one_and_fall():
    times = jnp.array([-1.0, 0.0, 0.5, 1.0, 10.0, 1000.0])
    by_log, by_time = jlstm.cells.inverse_log(times), jlstm.cells.inverse(times)
    np.testing.assert_array_equal(by_log[:2], [1, 1])
    np.testing.assert_allclose(by_log[2:], 1 / np.log(np.e + times[2:]), rtol=1e-6)
    np.testing.assert_allclose(by_time, [1, 1, 1, 1, 0.1, 0.001], rtol=1e-6)


def half_life(elapsed):
    return 2.0**-elapsed


def test_time_lstm_takes_a_decay_of_ones_own():
    cell = jlstm.TimeLSTM(3, decay=half_life)
    xs = jlstm.TimeLSTMInput(draw(B, T, D), jnp.abs(draw(B, T, seed=1)))
    params = made(cell, first(xs))
    # 1 / log(e + t) = 2 ** -s
    other = xs._replace(elapsed=jnp.exp(2.0**xs.elapsed) - np.e)
    expected = jlstm.unroll(jlstm.TimeLSTM(3), params, other)
    close(jlstm.unroll(cell, params, xs), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"^TimeLSTM\.decay: must be a module-level fun"
    ):
        jlstm.TimeLSTM(3, decay=lambda elapsed: 1 / (1 + elapsed))


def test_time_lstm_refuses_other_inputs():
    cell, xs = jlstm.TimeLSTM(3), draw(B, T, D)
    with pytest.raises(
        TypeError, match=r"^TimeLSTM: x must be a TimeLSTMInput, got a A"
    ):
        jlstm.RNN(cell).init(KEY, xs)
    given = jlstm.TimeLSTMInput(xs, jnp.ones((B, T)))
    params = cell.init(KEY, first(given))
    message = r"TimeLSTM: elapsed must be \[3\] or \[3, 1\], .* each step, got \[3, 4\]"
    with pytest.raises(ValueError, match="^unroll: .*" + message):
        jlstm.unroll(cell, params, given._replace(elapsed=xs))


# Layers of cells whose input is a tree.

TIMES = jlstm.TimeLSTMInput(jnp.zeros((B, T, D)), jnp.zeros((B, T)))


@pytest.mark.parametrize(
    ("layer", "xs"),
    [
        (jlstm.stack(jlstm.bidirectional(jlstm.TimeLSTM(2)), jlstm.Dense(2)), TIMES),
        slow(jlstm.RNN(jlstm.TimeLSTM(2), checkpoint_every="sqrt"), TIMES),
        slow(
            jlstm.stack(jlstm.bidirectional(GRU_D), jlstm.RNN(jlstm.LSTM(2))), series()
        ),
        slow(jlstm.RNN(GRU_D, reverse=True), series()),
    ],
    ids=["both-times", "times", "both", "reverse"],
)
def test_layers_of_series_obey_the_laws(layer, xs):
    check_layer(layer, xs, smooth=False)


@pytest.mark.slow
def test_gru_d_obeys_the_laws_with_a_mask_of_booleans():
    check_cell(GRU_D, first(series()))


@pytest.mark.parametrize(
    ("cell", "xs"),
    [
        (GRU_D, series()),
        (jlstm.TimeLSTM(3), TIMES),
        (jlstm.ConvLSTM(2, 2, (3, 2)), GRID),
    ],
    ids=["series", "times", "grid"],
)
def test_step_of_a_stack_equals_the_sequence(cell, xs):
    layer = jlstm.stack(jlstm.RNN(cell), jlstm.Dense(2))
    xs = random_like(xs, seed=5)
    params = layer.init(KEY, xs)
    ys, _ = layer.apply(params, xs)
    carry, steps = None, []
    for t in range(T):
        x = jax.tree.map(lambda leaf, t=t: leaf[:, t], xs)
        carry, y = jlstm.step(layer, params, carry, x)
        steps.append(y)
    close(jnp.stack(steps, 1), ys)
