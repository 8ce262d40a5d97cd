"""Wrappers of cells: the noise they draw, where it is drawn, and what they refuse."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlstm
from jlstm import testing
from tests.cases import TOLERANCE
from tests.oracles.wrappers import lstm

B, T, D, H = 3, 6, 4, 4
KEY = jax.random.key(7)
LSTM = jlstm.LSTM(H)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A cell of a step alone, whose carry is one array."""

    hidden_size: int

    def init(self, key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], self.hidden_size), x.dtype)}

    def init_carry(self, params, batch_shape):
        return jnp.zeros((*batch_shape, self.hidden_size), params["w"].dtype)

    def step(self, params, h, x):
        h = jnp.tanh(x @ params["w"] + h)
        return h, h


def make(cell, dtype="float64", batch=B, time=T) -> tuple[Any, Any, Any]:
    xs = testing.random_like(jnp.zeros((batch, time, D), dtype), seed=1)
    params = testing.moved(cell.init(jax.random.key(0), xs[:, 0]), seed=2)
    carry = testing.random_like(cell.init_carry(params, (batch,)), seed=3)
    return params, xs, carry


def drawn(cell, params, xs):
    """What a wrapper draws for a sequence, as NumPy's."""
    prepared, steps = cell.prepare(params, xs, key=KEY)
    return jax.device_get((prepared.extra, steps.extra))


def run(cell, params, xs, carry, implementation="fused", **options):
    return jax.jit(
        lambda *a: jlstm.unroll(
            cell, *a, key=KEY, implementation=implementation, **options
        )
    )(params, xs, carry)


# The noise equals its formula, given the masks.


def zoned(p, masks, carry, x, t):
    (h, c), _ = lstm(p, carry, x)
    h, c = (
        np.where(masks[k][:, t], a, b)
        for k, a, b in zip("hc", carry, (h, c), strict=True)
    )
    return (h, c), h


def masked(p, mask, carry, x, t):
    h, c = carry
    _, hidden = lstm(p, (h * mask, c), x)
    c_new = lstm(p, (h * mask, c), x)[0][1]
    return (hidden, c_new), hidden


@pytest.mark.core
@pytest.mark.parametrize("implementation", ["scan", "fused"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["zoneout", "variational", "drop connect"])
def test_noise_equals_its_formula(name, dtype, implementation):
    cell = {
        "zoneout": jlstm.Zoneout(LSTM, h=0.3, c=0.6),
        "variational": jlstm.VariationalDropout(LSTM, inputs=0.3, recurrent=0.5),
        "drop connect": jlstm.DropConnect(LSTM, 0.5),
    }[name]
    with jax.enable_x64(dtype == "float64"):
        params, xs, carry = make(cell, dtype)
        ys, last = run(cell, params, xs, carry, implementation)
        prepared, steps = cell.prepare(params, xs, key=KEY)
        made = jax.device_get((params, prepared, steps, carry, ys, last))
    params, prepared, steps, carry, ys, last = jax.tree.map(
        lambda a: np.asarray(a, np.float64), made
    )
    step = {
        "zoneout": lambda s, x, t: zoned(params, steps.extra, s, x, t),
        "variational": lambda s, x, t: masked(params, prepared.extra, s, x, t),
        "drop connect": lambda s, x, t: lstm(prepared.cell, s, x),
    }[name]
    expected = []
    for t in range(T):
        carry, y = step(carry, steps.cell[:, t], t)
        expected.append(y)
    for got, want in zip([ys, *last], [np.stack(expected, 1), *carry], strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    "cell",
    [
        jlstm.Zoneout(jlstm.VariationalDropout(LSTM, 0.2, 0.3), h=0.1, c=0.5),
        jlstm.WeightNorm(jlstm.DropConnect(jlstm.GRU(H), 0.5)),
    ],
    ids=repr,
)
def test_noise_has_the_same_gradient_in_every_loop(cell):
    lengths = jnp.array([6, 0, 3])
    with jax.enable_x64(True):
        params, xs, carry = make(cell)

        def loss(inputs, implementation):
            ys, last = jlstm.unroll(
                cell, *inputs, key=KEY, lengths=lengths, implementation=implementation
            )
            return jnp.sum(ys**2) + sum(jnp.sum(jnp.sin(x)) for x in last)

        fused, scan = (
            jax.jit(jax.grad(lambda i, n=name: loss(i, n)))((params, xs, carry))
            for name in ("fused", "scan")
        )
    for a, b in zip(jax.tree.leaves(fused), jax.tree.leaves(scan), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-10)


# What is drawn, and when.


def test_zoneout_draws_a_mask_a_step_and_unit():
    cell = jlstm.Zoneout(jlstm.LSTM(50), h=0.1, c=0.5)
    params, xs, _ = make(cell, "float32", batch=20, time=30)
    _, masks = drawn(cell, params, xs)
    for name, rate in (("h", 0.1), ("c", 0.5)):
        assert masks[name].shape == (20, 30, 50)
        assert set(np.unique(masks[name])) == {0.0, 1.0}
        assert abs(masks[name].mean() - rate) < 0.02
        assert (masks[name][:, 0] != masks[name][:, 1]).any()
    assert (masks["h"] != masks["c"]).any()


def test_variational_dropout_draws_a_mask_a_row_of_the_same_mean():
    cell = jlstm.VariationalDropout(jlstm.LSTM(200), inputs=0.5, recurrent=0.2)
    params, xs, _ = make(cell, "float32", batch=50)
    prepared, steps = cell.prepare(params, jnp.ones_like(xs), key=KEY)
    mask = np.asarray(prepared.extra)
    assert mask.shape == (50, 200)
    np.testing.assert_allclose(np.unique(mask), [0, 1 / 0.8], rtol=1e-6)
    assert abs(mask.mean() - 1) < 0.02
    inputs = np.asarray(steps.cell)
    assert (inputs == inputs[:, :1]).all()  # the same at all steps
    assert (inputs[0, 0] != inputs[1, 0]).any() or (inputs[0, 0] != inputs[2, 0]).any()
    assert set(np.unique(inputs)) == {0.0, 2.0}


def test_drop_connect_draws_a_mask_a_sequence():
    cell = jlstm.DropConnect(jlstm.LSTM(40), 0.25, names=("w_hh", "w_ih"))
    params, xs, _ = make(cell, "float32")
    prepared, _ = cell.prepare(params, xs, key=KEY)
    for name in cell.names:
        factor = np.asarray(getattr(prepared.cell, name) / getattr(params, name))
        assert abs((factor == 0).mean() - 0.25) < 0.03
        np.testing.assert_allclose(factor[factor != 0], 1 / 0.75, rtol=1e-6)
    assert prepared.cell.b is params.b


@pytest.mark.parametrize(
    "cell",
    [
        jlstm.Zoneout(LSTM, h=0.5),
        jlstm.VariationalDropout(LSTM, recurrent=0.5),
        jlstm.DropConnect(LSTM, 0.5),
    ],
    ids=repr,
)
def test_two_keys_and_both_directions_draw_different_noise(cell):
    layer = jlstm.bidirectional(cell)
    xs = testing.random_like(jnp.zeros((B, T, D)), seed=1)
    params = layer.init(jax.random.key(0), xs)
    params = dataclasses.replace(params, backward=params.forward)
    same, first, second = (
        layer.apply(params, jnp.ones_like(xs), key=key)[0]
        for key in (None, KEY, jax.random.key(8))
    )
    forward, backward = jnp.split(first, 2, axis=-1)
    assert float(jnp.abs(forward - backward[:, ::-1]).max()) > 1e-3
    assert float(jnp.abs(first - second).max()) > 1e-3
    forward, backward = jnp.split(same, 2, axis=-1)
    np.testing.assert_allclose(forward, backward[:, ::-1], atol=1e-6)


def test_no_random_numbers_are_drawn_inside_a_loop():
    cell = jlstm.Zoneout(jlstm.VariationalDropout(LSTM, 0.2, 0.3), h=0.1, c=0.5)
    params, xs, carry = make(cell, "float32")
    for implementation in ("scan", "fused"):
        text = str(
            jax.make_jaxpr(
                lambda *a, n=implementation: jlstm.unroll(
                    cell, *a, key=KEY, implementation=n
                )
            )(params, xs, carry)
        )
        loops = text.split("scan[")[1:] + text.split("while[")[1:]
        assert loops
        assert not any("random_bits" in loop.split("length=")[0] for loop in loops)


# Wrappers in company.


def test_output_is_the_carry_that_goes_on():
    for cell in (jlstm.Zoneout(LSTM, h=0.5), jlstm.ClipCarry(LSTM, 0.1)):
        params, xs, carry = make(cell, "float32")
        ys, last = run(cell, params, xs, carry)
        np.testing.assert_array_equal(ys[:, -1], last.h)
    assert float(jnp.abs(ys).max()) == np.float32(0.1)


@pytest.mark.parametrize("h", ["scan"])
def test_a_cell_of_a_step_alone_is_wrapped(h):
    for cell in (
        jlstm.Zoneout(Plain(H), h=0.5),
        jlstm.ClipCarry(Plain(H), 0.5),
        jlstm.ResidualCell(Plain(H)),
        jlstm.VariationalDropout(Plain(H), inputs=0.5),
        jlstm.DropConnect(Plain(H), 0.5, names=("w",)),
        jlstm.WeightNorm(Plain(H), names=("w",)),
    ):
        params, xs, carry = make(cell, "float32")
        ys, _ = run(cell, params, xs, carry, h)
        assert bool(jnp.isfinite(ys).all())
        assert not jlstm.gated(cell)
    testing.check_cell(jlstm.Zoneout(Plain(2), h=0.5), smooth=False)


def test_wrappers_run_in_everything():
    cell = jlstm.Zoneout(
        jlstm.WeightNorm(jlstm.DropConnect(jlstm.LSTM(5), 0.2)), h=0.1, c=0.2
    )
    policy = jlstm.Policy(compute=jnp.bfloat16, carry=jnp.float32)
    layer = jlstm.stack(jlstm.Embed(9, 4), jlstm.bidirectional(cell, policy=policy))
    tokens = jnp.arange(18).reshape(3, 6) % 9
    params = layer.init(jax.random.key(0), tokens)

    def loss(params):
        ys, _ = layer.apply(params, tokens, lengths=jnp.array([6, 0, 2]), key=KEY)
        return jnp.sum(ys.astype(jnp.float32) ** 2)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) > 0
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))
    assert float(jnp.abs(gradients[1].forward.scale["w_hh"]).max()) > 0


def test_a_wrapped_cell_streams_without_noise():
    layer = jlstm.RNN(jlstm.Zoneout(LSTM, h=0.3))
    xs = testing.random_like(jnp.zeros((B, T, D)), seed=1)
    params = layer.init(jax.random.key(0), xs)
    whole, _ = layer.apply(params, xs)
    carry = layer.init_carry(params, (B,))
    for t in range(T):
        carry, y = jlstm.step(layer, params, carry, xs[:, t])
        np.testing.assert_allclose(y, whole[:, t], atol=1e-6)


def test_weight_norm_changes_no_function_at_init():
    cell = jlstm.WeightNorm(LSTM, names=("w_ih", "w_hh"))
    xs = testing.random_like(jnp.zeros((B, T, D)), seed=1)
    params = cell.init(jax.random.key(0), xs[:, 0])
    ys, _ = jlstm.unroll(cell, params, xs)
    plain, _ = jlstm.unroll(LSTM, params.cell, xs)
    np.testing.assert_allclose(ys, plain, atol=1e-6)
    zero = jax.tree.map(jnp.zeros_like, params)
    gradients = jax.grad(lambda p: jlstm.unroll(cell, p, xs)[0].sum())(zero)
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(gradients))


# What is refused.


@pytest.mark.parametrize(
    ("make_cell", "line"),
    [
        (lambda: jlstm.Zoneout(LSTM), "Zoneout: give h or c above 0, or leave"),
        (lambda: jlstm.Zoneout(LSTM, h=1.0), r"Zoneout.h: must be in \[0, 1\), got 1"),
        (
            lambda: jlstm.VariationalDropout(LSTM, -0.1),
            r"VariationalDropout.inputs: must be in \[0, 1\), got -0.1",
        ),
        (
            lambda: jlstm.VariationalDropout(Plain(3), recurrent=0.1),
            "VariationalDropout.cell: recurrent dropout needs a cell with project, mix "
            "and update, got Plain",
        ),
        (lambda: jlstm.DropConnect(LSTM, 0), "DropConnect: give rate above 0"),
        (lambda: jlstm.ClipCarry(LSTM, 0), "ClipCarry.limit: must be positive, got 0"),
    ],
)
def test_construction_refuses(make_cell, line):
    with pytest.raises(ValueError, match=line):
        make_cell()


@pytest.mark.parametrize(
    ("cell", "line"),
    [
        (
            jlstm.Zoneout(jlstm.GRU(4), c=0.1),
            "Zoneout.c: the carry of GRU.* no field 'c'; its fields",
        ),
        (
            jlstm.DropConnect(LSTM, 0.1, ("w_hx",)),
            "DropConnect.names: .* no weight 'w_hx'; its weights are: w_ih, w_hh, b",
        ),
        (jlstm.WeightNorm(LSTM, ("w",)), "WeightNorm.names: .* no weight 'w'"),
        (jlstm.ClipCarry(LSTM, 1.0, ("n",)), "ClipCarry.names: .* no field 'n'"),
        (jlstm.ResidualCell(jlstm.LSTM(5)), "ResidualCell: the outputs of LSTM"),
    ],
    ids=repr,
)
def test_a_cell_that_does_not_fit_is_refused(cell, line):
    layer, xs = jlstm.RNN(cell), jnp.ones((B, T, D))
    with pytest.raises(ValueError, match=line):
        layer.apply(layer.init(jax.random.key(0), xs), xs)
