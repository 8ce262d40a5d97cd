"""The fused loop cuts, checkpoints, stores and sums as it should, on every path."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CELLS
from jax.ad_checkpoint import print_saved_residuals

import jlstm
from jlstm.kernels import blocks, fused, layout, library, scan
from jlstm.testing import random_like

BATCH, TIME, SIZE = 2, 11, 3


@dataclasses.dataclass(frozen=True)
class Peephole:
    """Reads the carry through a vector in update, and weights laid out transposed."""

    hidden_size: int

    def init(self, key, x):
        keys, size = jax.random.split(key, 3), self.hidden_size
        return {
            "w": jax.random.normal(keys[0], (2 * size, x.shape[-1]), x.dtype),
            "u": jax.random.normal(keys[1], (2 * size, size), x.dtype),
            "p": jax.random.normal(keys[2], (size,), x.dtype),
        }

    def init_carry(self, params, batch_shape):
        return jnp.zeros((*batch_shape, self.hidden_size), params["p"].dtype)

    def project(self, params, x):
        return x @ params["w"].T

    def mix(self, params, carry, zx):
        return carry @ params["u"].T

    def update(self, params, carry, zx, zh):
        f, g = jlstm.gates(zx + zh, "st")
        new = f * carry + (1 - f) * g + jnp.sin(carry * params["p"][None])
        return new, new

    def step(self, params, carry, x):
        zx = self.project(params, x)
        return self.update(params, carry, zx, self.mix(params, carry, zx))


@pytest.fixture
def one_batch(monkeypatch):
    """The steps of a block as one batch, as on one device; the suite has two."""
    monkeypatch.setattr(fused, "may_be_sharded", lambda: False)


def results(
    kernel, cell, *, batch=BATCH, time=TIME, dtype=jnp.float64, grad=True, **options
):
    """Values and gradients of a kernel, with holes, resets and both carries."""
    with jax.enable_x64(True):
        xs = random_like(jnp.zeros((batch, time, SIZE), dtype), seed=0)
        params = random_like(jax.eval_shape(cell.init, KEY, xs[:, 0]), seed=1)
        carry = random_like(cell.init_carry(params, (batch,)), seed=2)
        draws = np.random.default_rng(3).random((2, batch, time))
        mask, resets = jnp.asarray(draws[0] < 0.7), jnp.asarray(draws[1] < 0.2)
        xs = jlstm.zero_rows(mask, xs)

        def run(params, xs, carry):
            fresh = jax.tree.map(lambda leaf: leaf + 1, carry)
            out = kernel.unroll(
                cell, params, xs, carry, fresh, mask=mask, resets=resets, **options
            )
            leaves = jax.tree.leaves(out)
            cotangents = random_like(leaves, seed=4)
            return sum(
                (a * b).sum() for a, b in zip(leaves, cotangents, strict=True)
            ), out

        if grad:
            run = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(run)(params, xs, carry)


KEY = jax.random.key(0)
close = partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-12)
cells = pytest.mark.parametrize("cell", [*CELLS, Peephole(3)], ids=repr)
kernels = pytest.mark.parametrize("kernel", [fused, scan])


@pytest.mark.parametrize("time", [1, 37])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", [jlstm.GRU(2), jlstm.LSTM(2)], ids=repr)
def test_values_alone_equal_those_of_scan(cell, reverse, time):
    options = {"time": time, "reverse": reverse, "return_carries": True, "grad": False}
    close(results(fused, cell, **options), results(scan, cell, **options))


def test_cells_that_cut_what_they_read_are_told_apart():
    def cuts(update):
        return layout.begins_by_cutting(
            lambda zx, zh: update(zx, zh), (jnp.ones((2, 4)),) * 2
        )

    assert cuts(lambda zx, zh: zx[:, :2] + zh[:, :2])
    assert cuts(lambda zx, zh: jnp.split(zx, 2, axis=1)[0] * zh[:, 2:])
    assert not cuts(lambda zx, zh: jnp.split(zx + zh, 2, axis=1)[0])
    assert not cuts(lambda zx, zh: zx + jnp.pad(zh[:, :2], ((0, 0), (2, 0))))


@cells
def test_steps_taken_as_one_batch_give_the_gradients_of_scan(cell, one_batch):
    assert not fused.may_be_sharded()
    close(results(fused, cell), results(scan, cell))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("time", [32, 37])  # blocks that divide T, and a rest
def test_blocks_join_without_a_seam(time, reverse, one_batch, monkeypatch):
    monkeypatch.setattr(fused, "BYTES", 1)
    options = {"batch": 3, "time": time, "reverse": reverse, "return_carries": True}
    assert len(blocks.segments(time, fused.STEPS)) == (1 if time == 32 else 2)
    cell = jlstm.GRU(2, reset_after=False)
    close(results(fused, cell, **options), results(scan, cell, **options))


@cache
def without_checkpoints(reverse):
    return results(scan, jlstm.LSTM(3), reverse=reverse, return_carries=True)


@kernels
@pytest.mark.parametrize(
    ("every", "reverse"),
    [
        (1, True),
        (4, False),
        (100, True),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(4, True, marks=pytest.mark.slow),
        pytest.param(TIME, False, marks=pytest.mark.slow),
        pytest.param(TIME, True, marks=pytest.mark.slow),
        pytest.param(100, False, marks=pytest.mark.slow),
    ],
)
def test_checkpoints_change_nothing(kernel, every, reverse):
    options = {"reverse": reverse, "return_carries": True, "checkpoint_every": every}
    found = results(kernel, jlstm.LSTM(3), **options)
    close(found, without_checkpoints(reverse))


@pytest.mark.parametrize("implementation", ["fused", "scan", "native"])
def test_checkpoints_save_memory(implementation, monkeypatch):
    if implementation == "native" and library.why_not() is not None:
        pytest.skip(str(library.why_not()))
    monkeypatch.setattr("jlstm.door.may_be_sharded", lambda: False)
    cell, xs = jlstm.LSTM(16), jnp.ones((2, 400, 4))
    params = cell.init(KEY, xs[:, 0])

    def temporary(every):
        def loss(params):
            options = {"checkpoint_every": every, "implementation": implementation}
            return jlstm.unroll(cell, params, xs, **options)[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary("sqrt") < temporary(200) < temporary(None)
    assert temporary("sqrt") < 0.5 * temporary(None)


def test_checkpoint_every_of_a_layer_reaches_the_loop():
    layer = jlstm.bidirectional(jlstm.LSTM(3), checkpoint_every="sqrt")
    assert repr(layer) == "bidirectional(LSTM(3), checkpoint_every='sqrt')"
    xs = random_like(jnp.zeros((BATCH, TIME, SIZE)), seed=0)
    params = layer.init(KEY, xs)
    plain = jlstm.bidirectional(jlstm.LSTM(3))
    close(layer.apply(params, xs), plain.apply(params, xs), rtol=1e-6)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "all"])
def test_checkpoint_every_is_refused_by_name(value):
    message = "checkpoint_every must be a positive int, 'sqrt' or None, got "
    with pytest.raises(ValueError, match=f"^RNN: {message}{value!r}$"):
        jlstm.RNN(jlstm.LSTM(3), checkpoint_every=value)


def layout_of(cell, batch=BATCH):
    xs = jnp.zeros((batch, TIME, SIZE))
    params = cell.init(KEY, xs[:, 0])
    carry = cell.init_carry(params, (batch,))
    step = layout.first_step(cell, params, carry, xs)
    found = layout.find(cell, params, step)
    kept = layout.update(cell, found, params, step)[1]
    return found, [leaf.shape for leaf in found.store(kept)]


@pytest.mark.parametrize(
    ("cell", "count"),
    [
        (jlstm.LSTM(4), 6),  # i, f, g, o; h, c
        (jlstm.GRU(4), 5),  # r, z, n, the product that r multiplies; h
        (jlstm.Elman(4), 2),  # the new h; h
        (Peephole(4), 4),  # f, g, cos; the carry
    ],
    ids=repr,
)
def test_what_is_stored_of_a_step_is_as_little_as_can_be(cell, count):
    shapes = layout_of(cell)[1]
    assert shapes == [(BATCH, 4)] * count


def test_what_update_reads_is_found():
    vector = layout_of(Peephole(4))[0]
    assert (vector.vectors, vector.matrices) == ((0,), ())
    matrix = layout_of(jlstm.GRU(4, reset_after=False))[0]
    assert (len(matrix.vectors), len(matrix.matrices)) == (0, 1)
    many = layout_of(jlstm.GRU(4, reset_after=False), batch=100)[0]
    assert many.matrices == matrix.matrices
    assert layout_of(jlstm.LSTM(4))[0].matrices == ()


def test_one_cotangent_is_computed_where_only_the_sum_is_read():
    assert layout_of(jlstm.LSTM(4))[0].dzx_is_dzh
    assert not layout_of(jlstm.GRU(4))[0].dzx_is_dzh


@pytest.mark.parametrize("name", ["jlstm_carry", "jlstm_zx"])
def test_names_let_an_outer_policy_save(name, capsys):
    cell, xs = jlstm.LSTM(5), jnp.ones((BATCH, TIME, SIZE))
    params = cell.init(KEY, xs[:, 0])

    def loss(params):
        return jlstm.unroll(cell, params, xs, implementation="fused")[0].sum()

    policy = jax.checkpoint_policies.save_only_these_names(name)
    saving = jax.checkpoint(loss, policy=policy)
    close(jax.grad(saving)(params), jax.grad(loss)(params), rtol=1e-6)
    print_saved_residuals(saving, params)
    shape = {"jlstm_carry": f"[{BATCH},5]", "jlstm_zx": f"[{TIME},{BATCH},20]"}
    assert f"f32{shape[name]}" in capsys.readouterr().out


def test_gradients_of_bfloat16_params_are_summed_in_float32():
    # 4096 ones: a sum in bfloat16 would stop at 256.
    policy = jlstm.Policy(compute=jnp.bfloat16)
    layer = jlstm.RNN(jlstm.Elman(1, activation=jax.nn.relu), policy=policy)
    xs = jnp.ones((4, 1024, 1))
    params = layer.init(KEY, xs)
    params = dataclasses.replace(
        jax.tree.map(jnp.zeros_like, params), b=jnp.ones_like(params.b)
    )
    grads = jax.grad(lambda p: layer.apply(p, xs)[0].astype(jnp.float32).sum())(params)
    np.testing.assert_allclose(grads.b, 4096)


@pytest.mark.parametrize("kind", ["s", "t"])
def test_gates_have_the_derivatives_of_their_activations(kind):
    function = {"s": jax.nn.sigmoid, "t": jnp.tanh}[kind]
    with jax.enable_x64(True):
        z = jnp.linspace(-9, 9, 13).reshape(1, -1)
        for order in (lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f))):
            found, expected = (
                jax.vmap(order(lambda x, f=f: f(x[None, None])[0, 0]))(z[0])
                for f in (lambda x: jlstm.gates(x, kind)[0], function)
            )
            close(found, expected, rtol=1e-9)
        tangent = jax.jvp(lambda z: jlstm.gates(z, kind)[0], (z,), (z,))[1]
        close(tangent, jax.jvp(function, (z,), (z,))[1], rtol=1e-9)
