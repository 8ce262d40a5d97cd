"""Guarantees of the built-in cells that torch cannot vouch for: the published GRU,
initialisation, configs, gates and dtypes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CELLS, TOLERANCE

import jlstm
from jlstm import testing

B, T, D = 3, 6, 4

each_cell = pytest.mark.parametrize("cell", CELLS, ids=map(repr, CELLS))
each_implementation = pytest.mark.parametrize("implementation", ["scan", "fused"])
learned = [cell for cell in CELLS if cell.learned_carry]
plain = [cell for cell in CELLS if not cell.learned_carry]


def make_inputs(cell, dtype="float32", time=T):
    """Random params, none of them zero, and xs ``[B, T, D]``."""
    xs = testing.random_like(jnp.zeros((B, time, D), dtype), seed=1)
    return testing.moved(cell.init(jax.random.key(0), xs[:, 0]), seed=2), xs


def relative_error(got, expected):
    """The largest error of a tree's arrays, each relative to its magnitude."""
    got, expected = (
        [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
        for tree in (got, expected)
    )
    pairs = zip(got, expected, strict=True)
    return np.max([np.abs(a - b).max() / np.abs(b).max() for a, b in pairs])


# The formula that torch does not have: the reset gate before the product.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def published_gru(w_ih, w_hh, b, xs, h):
    """Cho et al. (2014), as printed: one loop, one gate at a time."""
    (w_r, w_z, w_n), (u_r, u_z, u_n) = np.split(w_ih, 3, 1), np.split(w_hh, 3, 1)
    b_r, b_z, b_n = np.split(b, 3)
    ys = []
    for x in np.swapaxes(xs, 0, 1):
        r = sigmoid(x @ w_r + h @ u_r + b_r)
        z = sigmoid(x @ w_z + h @ u_z + b_z)
        candidate = np.tanh(x @ w_n + (r * h) @ u_n + b_n)
        h = z * h + (1 - z) * candidate
        ys.append(h)
    return np.stack(ys, 1)


@pytest.mark.core
@each_implementation
@pytest.mark.parametrize("double_bias", [False, True])
def test_gru_reset_before_equals_the_published_loop(implementation, double_bias):
    cell = jlstm.GRU(3, reset_after=False, double_bias=double_bias)
    with jax.enable_x64(True):
        params, xs = make_inputs(cell, "float64")
        carry = testing.random_like(cell.init_carry(params, (B,)), seed=3)
        direction = testing.random_like(params, seed=4)

        @jax.jit
        def loss_fn(params):
            out = jlstm.unroll(cell, params, xs, carry, implementation=implementation)
            return out[0].sum(), out

        gradients, (ys, last) = jax.grad(loss_fn, has_aux=True)(params)
        slope = sum(map(jnp.vdot, *map(jax.tree.leaves, (gradients, direction))))

    inputs, along, xs, h = jax.device_get((params, direction, xs, carry.h))

    def oracle(distance):
        p = jax.tree.map(lambda a, b: a + distance * b, inputs, along)
        b = p.b + p.b_hh if double_bias else p.b
        return published_gru(p.w_ih, p.w_hh, b, xs, h)

    np.testing.assert_allclose(ys, oracle(0.0), rtol=0, atol=TOLERANCE["float64"])
    np.testing.assert_array_equal(last.h, ys[:, -1])
    difference = (oracle(1e-5).sum() - oracle(-1e-5).sum()) / 2e-5
    np.testing.assert_allclose(slope, difference, rtol=1e-7)


def test_gru_conventions_differ():
    params, xs = make_inputs(jlstm.GRU(3, double_bias=True))
    after, _ = jlstm.unroll(jlstm.GRU(3), params, xs)
    before, _ = jlstm.unroll(jlstm.GRU(3, reset_after=False), params, xs)
    assert float(jnp.abs(after - before).max()) > 0.01


# The second bias, and the learned carry.


def with_one_bias(params):
    """The params of the same function, where the two biases are summed."""
    b, b_hh = params.b, params.b_hh
    if not isinstance(params, jlstm.GRUParams):
        return dataclasses.replace(params, b=b + b_hh, b_hh=None)
    size = b_hh.shape[0] // 3  # inside r * (.), the last third stays apart
    b = b + jnp.concatenate([b_hh[: 2 * size], jnp.zeros_like(b_hh[:size])])
    return dataclasses.replace(params, b=b, b_hh=b_hh[2 * size :])


@pytest.mark.parametrize("name", ["LSTM", "GRU", "Elman"])
def test_double_bias_is_the_function_of_the_sum_with_twice_its_gradient(name):
    make = getattr(jlstm, name)
    two, one = make(3, double_bias=True), make(3)
    params, xs = make_inputs(two)
    summed = with_one_bias(params)
    assert jax.tree.map(jnp.shape, summed) == jax.tree.map(
        jnp.shape, one.init(jax.random.key(0), xs[:, 0])
    )

    @jax.jit
    def results(params):
        def loss_fn(params):
            ys, _ = jlstm.unroll(one, params, xs)
            return jnp.square(ys).sum(), ys

        return jax.grad(loss_fn, has_aux=True)(params)

    gradients, ys = results(params)
    summed_gradients, summed_ys = results(summed)
    assert relative_error(summed_ys, ys) <= TOLERANCE["float32"]
    shared = slice(None, 2 * two.hidden_size if name == "GRU" else None)
    for bias in (gradients.b, gradients.b_hh):
        error = relative_error(bias[shared], summed_gradients.b[shared])
        assert error <= TOLERANCE["float32"]


@pytest.mark.parametrize("cell", learned, ids=map(repr, learned))
def test_learned_carry_starts_at_zero_and_serves_every_row(cell):
    params, xs = make_inputs(cell)
    initial = cell.init_carry(cell.init(jax.random.key(0), xs[:, 0]), (B,))
    assert all(not leaf.any() for leaf in initial)
    fields = type(initial)._fields
    for field, leaf in zip(fields, cell.init_carry(params, (B, 2)), strict=True):
        row = getattr(params, f"{field}0")
        assert float(jnp.abs(row).min()) > 0
        np.testing.assert_array_equal(leaf, np.broadcast_to(row, (B, 2, *row.shape)))


@pytest.mark.parametrize("cell", learned, ids=map(repr, learned))
def test_learned_carry_has_the_gradient_of_the_rows_that_begin_with_it(cell):
    params, xs = make_inputs(cell)

    @jax.jit
    @jax.grad
    def gradient(params_and_carry):
        params, carry = params_and_carry
        return jnp.square(jlstm.unroll(cell, params, xs, carry)[0]).sum()

    of_params, _ = gradient((params, None))
    _, of_carry = gradient((params, cell.init_carry(params, (B,))))
    for field in of_carry._fields:
        got = getattr(of_params, f"{field}0")
        expected = getattr(of_carry, field).sum(0)
        assert relative_error(got, expected) <= TOLERANCE["float32"]


# Initialisation.


def make_params(cell, dtype=jnp.float32):
    return cell.init(jax.random.key(0), jnp.zeros((1, D), dtype))


def test_forget_bias_moves_the_forget_gate_alone():
    params = make_params(jlstm.LSTM(3, forget_bias=2.5))
    np.testing.assert_array_equal(params.b, np.repeat([0, 2.5, 0, 0], 3))
    drawn = make_params(jlstm.LSTM(3, forget_bias=0.0, b_init=jlstm.init.Normal(1.0)))
    moved = make_params(jlstm.LSTM(3, forget_bias=2.5, b_init=jlstm.init.Normal(1.0)))
    np.testing.assert_array_equal(moved.b, drawn.b + params.b)


def test_chrono_spreads_memory_times_up_to_max_time():
    size, max_time = 2000, 50
    chrono, zeros = jlstm.init.Chrono(max_time), jlstm.init.zeros
    params = make_params(jlstm.LSTM(size, forget_bias=chrono, w_hh_init=zeros))
    b_i, b_f, b_g, b_o = np.split(np.asarray(params.b, np.float64), 4)
    np.testing.assert_array_equal(b_i, -b_f)
    assert not b_g.any()
    assert not b_o.any()
    times = np.sort(np.exp(b_f))  # uniform on (1, max_time - 1)
    assert times[0] >= 1 - 1e-6
    assert times[-1] <= max_time - 1 + 1e-4
    quantiles = 1 + (max_time - 2) * (np.arange(size) + 0.5) / size
    # Kolmogorov-Smirnov, at a level of 1e-4.
    assert np.abs(times - quantiles).max() / (max_time - 2) < 2.23 / np.sqrt(size)


def test_chrono_refuses_a_time_that_leaves_no_range():
    with pytest.raises(ValueError, match=r"^Chrono.max_time: must be >= 3, got 2$"):
        jlstm.init.Chrono(2)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "Elman"])
def test_weights_are_drawn_gate_by_gate(name):
    size = 16
    params = make_params(getattr(jlstm, name)(size))
    gates = params.w_hh.shape[1] // size
    assert gates == {"LSTM": 4, "GRU": 3, "Elman": 1}[name]
    recurrent = np.split(np.asarray(params.w_hh), gates, axis=1)
    for w in recurrent:
        np.testing.assert_allclose(w.T @ w, np.eye(size), atol=1e-5)
    limit = np.sqrt(6 / (D + size))
    for w in (inputs := np.split(np.asarray(params.w_ih), gates, axis=1)):
        assert 0.9 * limit < np.abs(w).max() <= limit
    for blocks in (recurrent, inputs):
        assert len({block.tobytes() for block in blocks}) == gates


def test_initialisers_are_exchangeable():
    cell = jlstm.GRU(
        3,
        w_ih_init=jlstm.init.Uniform(0.1),
        w_hh_init=jlstm.init.zeros,
        b_init=jlstm.init.ones,
    )
    params = make_params(cell)
    assert 0.05 < float(jnp.abs(params.w_ih).max()) <= 0.1
    assert not params.w_hh.any()
    assert bool((params.b == 1).all())


# Configs.


@each_cell
def test_config_prints_as_it_is_written(cell):
    names = {name: getattr(jlstm, name) for name in jlstm.__all__}
    assert eval(repr(cell), {**names, "jax": jax}) == cell


@pytest.mark.parametrize(
    ("cell", "written"),
    [
        (jlstm.LSTM(256), "LSTM(256)"),
        (jlstm.LSTM(8, forget_bias=2.0), "LSTM(8, forget_bias=2.0)"),
        (
            jlstm.LSTM(8, forget_bias=jlstm.init.Chrono(100)),
            "LSTM(8, forget_bias=Chrono(100))",
        ),
        (jlstm.GRU(8, reset_after=False), "GRU(8, reset_after=False)"),
        (
            jlstm.Elman(8, w_hh_init=jlstm.init.Normal(0.1)),
            "Elman(8, w_hh_init=Normal(0.1))",
        ),
        (jlstm.Elman(8, learned_carry=True), "Elman(8, learned_carry=True)"),
    ],
)
def test_config_prints_what_is_not_default(cell, written):
    assert repr(cell) == written


@each_cell
def test_config_is_frozen_and_compared_by_value(cell):
    copy = dataclasses.replace(cell)
    assert copy == cell
    assert hash(copy) == hash(cell)
    assert dataclasses.replace(cell, hidden_size=7) != cell
    with pytest.raises(dataclasses.FrozenInstanceError):
        cell.hidden_size = 7


def test_config_refuses_a_lambda_and_says_what_to_write():
    message = (
        r"^Elman\.activation: must be a module-level function or a frozen dataclass, "
        r"got .*<lambda>; define it at the top of a module$"
    )
    with pytest.raises(ValueError, match=message):
        jlstm.Elman(8, activation=lambda x: x)


def test_config_refuses_a_local_function():
    def local(key, shape, dtype):
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"^LSTM\.w_ih_init: .*<locals>\.local; "):
        jlstm.LSTM(8, w_ih_init=local)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "Elman"])
@pytest.mark.parametrize("size", [0, -1, 2.0, True])
def test_config_refuses_a_size_that_is_no_positive_int(name, size):
    message = rf"^{name}\.hidden_size: must be a positive int, got {size!r}$"
    with pytest.raises(ValueError, match=message):
        getattr(jlstm, name)(size)


# Gates.

ACTIVATION = {"s": sigmoid, "t": np.tanh}


@pytest.mark.parametrize("kinds", ["ssts", "ss", "tt", "t", "sts"])
def test_gates_equal_sigmoid_and_tanh(kinds):
    z = np.linspace(-30, 30, 2 * 20 * len(kinds)).reshape(2, -1)
    with jax.enable_x64(True):
        outs = jlstm.gates(jnp.asarray(z), kinds)
    blocks = np.split(z, len(kinds), axis=1)
    for kind, out, block in zip(kinds, outs, blocks, strict=True):
        np.testing.assert_allclose(out, ACTIVATION[kind](block), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gates_saturate_without_overflow(dtype):
    with jax.enable_x64(dtype == "float64"):
        large = float(jnp.finfo(dtype).max)
        z = jnp.asarray([-jnp.inf, -large, large, jnp.inf] * 2, dtype)
        s, t = jlstm.gates(z, "st")
        assert s.dtype == t.dtype == dtype
        np.testing.assert_array_equal(s, jnp.asarray([0, 0, 1, 1], dtype))
        np.testing.assert_array_equal(t, jnp.asarray([-1, -1, 1, 1], dtype))
        gradient = jax.grad(lambda z: sum(g.sum() for g in jlstm.gates(z, "st")))(z)
        np.testing.assert_array_equal(gradient, jnp.zeros_like(z))


@pytest.mark.parametrize(
    ("function", "slope"), [(jlstm.sigmoid, 0.25), (jlstm.tanh, 1)]
)
def test_activations_take_a_number(function, slope):
    value, found = jax.value_and_grad(function)(0.0)
    assert value == function(jnp.zeros((1, 1)))[0, 0]
    assert found == slope


@pytest.mark.parametrize("kinds", ["", "sx"])
def test_gates_refuses_other_letters(kinds):
    message = rf"^gates: kinds must consist of the letters s and t, got '{kinds}'$"
    with pytest.raises(ValueError, match=message):
        jlstm.gates(jnp.zeros((2, 4)), kinds)


def test_gates_refuses_an_axis_that_does_not_divide():
    message = r"^gates: the last axis must be a multiple of 4 \('ssts'\), got \[2, 6\]$"
    with pytest.raises(ValueError, match=message):
        jlstm.gates(jnp.zeros((2, 6)), "ssts")


# Dtypes.


def dtypes(tree):
    """The names of the dtypes of a tree's leaves."""
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


@each_cell
def test_params_and_carry_have_the_dtype_of_x(cell):
    for dtype in TOLERANCE:
        with jax.enable_x64(dtype == "float64"):
            x = jax.ShapeDtypeStruct((1, D), dtype)
            params = jax.eval_shape(cell.init, jax.random.key(0), x)
            carry = jax.eval_shape(lambda p: cell.init_carry(p, (B,)), params)
        assert dtypes((params, carry)) == {dtype}


@pytest.mark.parametrize("cell", plain, ids=map(repr, plain))
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_near_single(cell, dtype):
    half = make_inputs(cell, dtype)
    # Rounding the inputs is not the cell's error.
    rounded = jax.tree.map(lambda leaf: leaf.astype("float32"), half)
    run = jax.jit(lambda *runs: [jlstm.unroll(cell, *inputs) for inputs in runs])
    got, expected = run(half, rounded)
    assert dtypes(got) == {dtype}
    assert relative_error(got, expected) <= TOLERANCE[dtype]


@pytest.mark.core
@each_implementation
@pytest.mark.parametrize("name", ["LSTM", "GRU", "Elman"])
def test_policy_gives_each_array_its_dtype_and_stays_near_single(name, implementation):
    cell = getattr(jlstm, name)(3)
    policy = jlstm.Policy(param="float32", compute="bfloat16", carry="float32")
    mixed = jlstm.RNN(cell, implementation=implementation, policy=policy)
    single = dataclasses.replace(mixed, policy=None)
    params, xs = make_inputs(cell)
    assert dtypes(mixed.init(jax.random.key(0), xs.astype("float16"))) == {"float32"}

    @jax.jit
    def results(params):
        def loss_fn(params, layer):
            ys, carry = layer.apply(params, xs)
            return ys.astype("float32").sum(), (ys, carry)

        gradient = jax.grad(loss_fn, has_aux=True)
        return gradient(params, mixed), gradient(params, single)

    got, expected = results(params)
    gradients, (ys, carry) = got
    assert dtypes(ys) == {"bfloat16"}
    assert dtypes((carry, gradients)) == {"float32"}
    # Not zero: bfloat16 was in fact computed with.
    assert 1e-4 < relative_error(got, expected) <= TOLERANCE["bfloat16"]


def test_carry_in_single_precision_keeps_what_half_precision_loses():
    # An open forget gate adds up small increments, which vanish in a bfloat16 sum.
    cell = jlstm.LSTM(3, forget_bias=8.0)
    params, xs = make_inputs(cell, time=500)
    policies = [
        None,
        jlstm.Policy(compute="bfloat16", carry="float32"),
        jlstm.Policy(compute="bfloat16"),
    ]
    layers = [jlstm.RNN(cell, policy=policy) for policy in policies]
    run = jax.jit(lambda xs: [layer.apply(params, xs)[1].c for layer in layers])
    expected, single, half = run(jnp.ones_like(xs))
    assert relative_error(single, expected) <= TOLERANCE["bfloat16"]
    assert relative_error(half, expected) > TOLERANCE["bfloat16"]
