"""Each row of the semantics holds, on every path that can run it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlstm
from jlstm.testing import random_like

BATCH, TIME, SIZE, HIDDEN = 3, 5, 2, 3
CELL = jlstm.LSTM(HIDDEN, learned_carry=True)
XS = random_like(jnp.zeros((BATCH, TIME, SIZE)), seed=0)
PARAMS = random_like(jax.eval_shape(CELL.init, jax.random.key(0), XS[:, 0]), seed=1)
CARRY = random_like(CELL.init_carry(PARAMS, (BATCH,)), seed=2)
FRESH = CELL.init_carry(PARAMS, (BATCH,))
HOLES = jnp.array([[0, 1, 1, 0, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], bool)
LENGTHS = jnp.array([3, TIME, 0])

paths = pytest.mark.parametrize("implementation", ["scan", "fused"])
directions = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "back"])


@dataclasses.dataclass(frozen=True)
class StepOnly:
    """A leaky integrator, without a gated form; counts how often it is traced."""

    hidden_size: int
    name: str = ""

    def init(self, key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], self.hidden_size), x.dtype)}

    def init_carry(self, params, batch_shape):
        return jnp.zeros((*batch_shape, self.hidden_size), params["w"].dtype)

    def step(self, params, carry, x):
        TRACES.append(self.name)
        carry = carry / 2 + jnp.tanh(x @ params["w"])
        return carry, carry


TRACES: list[str] = []

close = partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def run(xs=XS, carry: Any = CARRY, **options: Any) -> Any:
    return jlstm.unroll(CELL, PARAMS, xs, carry, **options)


def loop(mask=None, resets=None, reverse=False, carry: Any = CARRY) -> Any:
    """What a Python loop over rows and time gives, from the words of the design."""
    ys, finals = np.zeros((BATCH, TIME, HIDDEN), np.float32), []
    for b in range(BATCH):
        state = jax.tree.map(lambda leaf, b=b: leaf[b], carry)
        fresh = jax.tree.map(lambda leaf, b=b: leaf[b], FRESH)
        for t in reversed(range(TIME)) if reverse else range(TIME):
            boundary = resets is not None and bool(resets[b, t])
            if boundary and not reverse:
                state = fresh
            if mask is None or bool(mask[b, t]):
                state, ys[b, t] = STEP(PARAMS, state, XS[b, t])
            if boundary and reverse:
                state = fresh
        finals.append(state)
    return ys, jax.tree.map(lambda *rows: jnp.stack(rows), *finals)


STEP = jax.jit(CELL.step)


def value_and_grads(**options: Any) -> Any:
    """Outputs, and gradients of random projections of outputs and final carry."""

    @jax.jit
    def loss(params, xs, carry):
        out = jlstm.unroll(CELL, params, xs, carry, **options)
        weights = random_like(jax.eval_shape(lambda: out), seed=5)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, weights, out))), out

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    return grad(PARAMS, options.pop("xs", XS), CARRY)


# Layout, gates and weights.


def test_layout_is_batch_major_and_gates_are_i_f_g_o():
    w_ih, w_hh = np.asarray(PARAMS.w_ih), np.asarray(PARAMS.w_hh)
    assert (w_ih.shape, w_hh.shape) == ((SIZE, 4 * HIDDEN), (HIDDEN, 4 * HIDDEN))
    z = XS[:, 0] @ w_ih + CARRY.h @ w_hh + PARAMS.b[None]
    i, f, g, o = np.split(np.asarray(z), 4, axis=-1)

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    c = sigmoid(f) * CARRY.c + sigmoid(i) * np.tanh(g)
    ys, _ = run()
    assert ys.shape == (BATCH, TIME, HIDDEN)
    close(ys[:, 0], sigmoid(o) * np.tanh(c))


@pytest.mark.parametrize("reset_after", [True, False])
def test_layout_of_a_gru_is_r_z_n_with_both_reset_conventions(reset_after):
    cell = jlstm.GRU(HIDDEN, reset_after=reset_after)
    params = random_like(cell.init(jax.random.key(0), XS[:, 0]), seed=1)
    zx = np.asarray(XS[:, 0] @ params.w_ih + params.b[None])
    (xr, xz, xn), h = np.split(zx, 3, axis=-1), np.asarray(CARRY.h)
    wr, wz, wn = np.split(np.asarray(params.w_hh), 3, axis=-1)
    r, z = 1 / (1 + np.exp(-(xr + h @ wr))), 1 / (1 + np.exp(-(xz + h @ wz)))
    inner = r * (h @ wn + params.b_hh[None]) if reset_after else (r * h) @ wn
    n = np.tanh(xn + inner)
    _, y = cell.step(params, jlstm.GRUCarry(CARRY.h), XS[:, 0])
    close(y, (1 - z) * n + z * h)


# Two carries.


@paths
def test_carry_none_means_fresh_and_gradients_reach_both(implementation):
    @jax.jit
    def grads(params, carry):
        def loss(params, carry):
            resets = jnp.zeros((BATCH, TIME), bool).at[0, 2].set(True)
            options = {"resets": resets, "implementation": implementation}
            return jlstm.unroll(CELL, params, XS, carry, **options)[0].sum()

        return jax.grad(loss, argnums=(0, 1))(params, carry)

    close(run(carry=None), run(carry=FRESH))
    params, carry = grads(PARAMS, CARRY)
    assert bool((params.h0 != 0).all())
    assert bool((params.c0 != 0).all())
    assert bool((carry.h != 0).all())
    assert bool((carry.c != 0).all())


# Masking, final carry, padding.


@paths
@directions
def test_masking_holds_the_carry_and_emits_exact_zeros(implementation, reverse):
    ys, carry = run(mask=HOLES, reverse=reverse, implementation=implementation)
    close((ys, carry), loop(HOLES, reverse=reverse))
    assert bool((ys[~HOLES] == 0).all())


@paths
@directions
def test_masking_by_lengths_equals_the_mask(implementation, reverse):
    options = {"reverse": reverse, "implementation": implementation}
    mask = jnp.arange(TIME)[None] < LENGTHS[:, None]
    by_mask = run(mask=mask, **options)
    chex.assert_trees_all_equal(run(lengths=LENGTHS, **options), by_mask)
    close(by_mask, loop(mask, reverse=reverse))


@paths
@directions
def test_final_carry_of_length_0_is_the_incoming_one(implementation, reverse):
    def rows(carry):
        options = {"reverse": reverse, "implementation": implementation}
        ys, out = jlstm.unroll(CELL, PARAMS, XS, carry, mask=HOLES, **options)
        return jax.tree.map(lambda leaf: leaf[2], (ys, out))

    (ys, final), pull = jax.vjp(jax.jit(rows), CARRY)
    chex.assert_trees_all_equal(final, jax.tree.map(lambda leaf: leaf[2], CARRY))
    cotangent = jax.tree.map(jnp.ones_like, (ys, final))
    (gradient,) = pull(cotangent)
    expected = jax.tree.map(lambda leaf: jnp.zeros_like(leaf).at[2].set(1.0), CARRY)
    chex.assert_trees_all_equal(gradient, expected)


@paths
def test_final_carry_is_that_after_the_last_valid_step(implementation):
    options = {"return_carries": True, "implementation": implementation}
    ys, carry, carries = run(lengths=LENGTHS, **options)
    chex.assert_trees_all_equal(carry.c[0], carries.c[0, 2])
    chex.assert_trees_all_equal(carry.c[1], carries.c[1, -1])
    chex.assert_trees_all_equal(carries.h[0, 2:], jnp.stack([ys[0, 2]] * 3))


@paths
@directions
def test_padding_of_nan_changes_no_output_and_no_gradient(implementation, reverse):
    options = {"mask": HOLES, "reverse": reverse, "implementation": implementation}
    clean = value_and_grads(xs=jnp.where(HOLES[..., None], XS, 0.0), **options)
    dirty = value_and_grads(xs=jnp.where(HOLES[..., None], XS, jnp.nan), **options)
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(dirty, clean)


LAYERS = {
    "rnn": jlstm.RNN(jlstm.LSTM(2)),
    "bidirectional": jlstm.bidirectional(jlstm.GRU(2)),
    "dense": jlstm.Dense(2, activation=jnp.exp),
    "norm": jlstm.LayerNorm(),
    "dropout": jlstm.Dropout(0.5),
    "same": jlstm.Conv(2, width=3),
    "strided": jlstm.Conv(2, width=3, stride=2),
    "valid": jlstm.Conv(2, width=2, padding="VALID"),
    "causal": jlstm.Conv(2, width=3, padding="CAUSAL"),
    "residual": jlstm.Residual(jlstm.Dense(SIZE)),
    "stack": jlstm.stack(jlstm.Conv(2, width=3, stride=2), jlstm.RNN(jlstm.LSTM(2))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_padding_of_nan_is_inert_in_every_layer(name):
    layer = LAYERS[name]
    params = jax.jit(layer.init)(jax.random.key(0), XS)

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def results(params, xs):
        ys, carry = layer.apply(params, xs, lengths=LENGTHS, key=jax.random.key(1))
        return jnp.square(ys).sum(), (ys, carry)

    valid = (jnp.arange(TIME)[None] < LENGTHS[:, None])[..., None]
    clean = results(params, jnp.where(valid, XS, 0.0))
    chex.assert_tree_all_finite(clean)
    chex.assert_trees_all_equal(results(params, jnp.where(valid, XS, jnp.nan)), clean)
    (_, (ys, _)), (_, dxs) = clean
    assert bool((ys[2] == 0).all())
    assert bool((ys[1] != 0).any())
    assert bool((jnp.where(valid, 0.0, dxs) == 0).all())


# Resets.

RESETS = jnp.array([[1, 0, 0, 1, 0], [0, 0, 1, 0, 1], [0, 1, 0, 0, 0]], bool)


@paths
@directions
@pytest.mark.parametrize("mask", [None, HOLES], ids=["whole", "masked"])
def test_resets_restore_the_fresh_carry(implementation, reverse, mask):
    options = {"mask": mask, "resets": RESETS, "reverse": reverse}
    got = run(**options, implementation=implementation)
    close(got, loop(**options))


def test_resets_follow_done_flags_of_the_step_before():
    done = jnp.zeros((BATCH, TIME), bool).at[:, 1].set(True)
    resets = jnp.roll(done, 1, axis=1).at[:, 0].set(False)
    ys, carry = run(resets=resets)
    second, after = run(XS[:, 2:], None)
    close((ys[:, 2:], carry), (second, after))
    close(ys[:, :2], run(XS[:, :2])[0])


# Reverse.


@paths
def test_reverse_starts_at_the_last_valid_step_and_stays_aligned(implementation):
    options = {"implementation": implementation, "carry": CARRY}
    ys, carry = run(lengths=LENGTHS, reverse=True, **options)
    for row, length in ((0, 3), (1, TIME)):
        alone, after = run(XS[:, :length][:, ::-1], **options)
        close(ys[row, :length], alone[row, ::-1])
        close(carry.c[row], after.c[row])


# Causal.


@paths
@pytest.mark.parametrize("cut", [0, 1, 3])
def test_causal_chunks_equal_one_pass(implementation, cut):
    whole = run(implementation=implementation)
    first, carry = run(XS[:, :cut], implementation=implementation)
    second, carry = run(XS[:, cut:], carry, implementation=implementation)
    close((jnp.concatenate([first, second], 1), carry), whole)


def test_causal_is_what_a_layer_says():
    assert jlstm.is_causal(jlstm.RNN(CELL))
    assert not jlstm.is_causal(jlstm.RNN(CELL, reverse=True))
    assert not jlstm.is_causal(jlstm.stack(jlstm.bidirectional(CELL), jlstm.Dense(2)))
    assert not jlstm.is_causal(jlstm.Residual(jlstm.Conv(2, width=3)))


def test_bidirectional_takes_and_returns_both_carries():
    layer = jlstm.bidirectional(CELL)
    params = jlstm.BidirectionalParams(PARAMS, PARAMS)
    other = random_like(CARRY, seed=9)
    carry = jlstm.BidirectionalCarry(CARRY, other)
    ys, after = layer.apply(params, XS, carry, lengths=LENGTHS)
    forward = run(lengths=LENGTHS)
    backward = run(carry=other, lengths=LENGTHS, reverse=True)
    close(ys, jnp.concatenate([forward[0], backward[0]], axis=-1))
    close(after, jlstm.BidirectionalCarry(forward[1], backward[1]))


# Pooling.


def test_pooling_last_is_the_last_processed_step_of_each_direction():
    layer = jlstm.bidirectional(CELL)
    params = jlstm.BidirectionalParams(PARAMS, PARAMS)
    ys, _ = layer.apply(params, XS, mask=HOLES)
    pooled, _ = jlstm.pool(layer, params, XS, mask=HOLES)
    for row, (first, last) in enumerate([(1, 4), (0, 4)]):
        expected = [ys[row, last, :HIDDEN], ys[row, first, HIDDEN:]]
        close(pooled[row], jnp.concatenate(expected))


@pytest.mark.parametrize("kind", ["last", "first", "mean", "max", "sum"])
def test_pooling_of_length_0_is_zero_with_finite_gradients(kind):
    cell = jlstm.Elman(HIDDEN, learned_carry=True)
    layer = jlstm.stack(jlstm.bidirectional(cell), jlstm.LayerNorm())
    params = jax.jit(layer.init)(jax.random.key(0), XS)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def results(params):
        pooled, _ = jlstm.pool(layer, params, XS, kind=kind, mask=HOLES)
        return jnp.square(pooled - 1).sum(), pooled

    (_, pooled), grads = results(params)
    chex.assert_tree_all_finite(grads)
    assert bool((pooled[2] == 0).all())
    assert bool((pooled[:2] != 0).any())


# Dropout.


def test_dropout_without_a_key_is_the_deterministic_form():
    layer = jlstm.stack(jlstm.Dropout(0.5), jlstm.Dropout(0.5, shared_over_time=True))
    chex.assert_trees_all_equal(layer.apply(((), ()), XS)[0], XS)


def dropped(ys) -> np.ndarray:
    return np.asarray(ys == 0)


def test_dropout_draws_distinct_masks_for_the_parts_of_a_stack():
    ones = jnp.ones((1, 50, 20))
    key = jax.random.key(3)
    kept = dropped(jlstm.Dropout(0.5).apply((), ones, key=key)[0]).mean()
    both = jlstm.stack(jlstm.Dropout(0.5), jlstm.Dropout(0.5))
    assert 0.45 < kept < 0.55
    assert 0.7 < dropped(both.apply(((), ()), ones, key=key)[0]).mean() < 0.8


def test_dropout_scales_what_it_keeps_and_repeats_with_its_key():
    ones, layer = jnp.ones((2, 4, 8)), jlstm.Dropout(0.75)
    ys, _ = layer.apply((), ones, key=jax.random.key(0))
    assert set(np.unique(ys)) == {0.0, 4.0}
    again, _ = layer.apply((), ones, key=jax.random.key(0))
    other, _ = layer.apply((), ones, key=jax.random.key(1))
    chex.assert_trees_all_equal(ys, again)
    assert bool((ys != other).any())


@pytest.mark.parametrize("shared", [False, True])
def test_dropout_shared_over_time_draws_one_mask_a_row(shared):
    ones = jnp.ones((3, 6, 16))
    layer = jlstm.Dropout(0.5, shared_over_time=shared)
    flags = dropped(layer.apply((), ones, key=jax.random.key(0))[0])
    assert (flags == flags[:, :1]).all() == shared
    assert (flags[0] != flags[1]).any()


@dataclasses.dataclass(frozen=True)
class Noisy(StepOnly):
    """Adds the noise that ``prepare`` draws, outside the loop."""

    def prepare(self, params, xs, *, key=None):
        drawn = None if key is None else jax.random.normal(key, xs.shape, xs.dtype)
        return params, xs if drawn is None else xs + drawn


def test_dropout_in_a_cell_is_drawn_once_and_differs_by_direction():
    layer = jlstm.bidirectional(Noisy(HIDDEN))
    params = layer.init(jax.random.key(0), XS)
    params = jlstm.BidirectionalParams(params.forward, params.forward)
    plain, _ = layer.apply(params, XS)
    zeros, key = jnp.zeros_like(XS), jax.random.key(4)
    ys, _ = layer.apply(params, zeros, key=key)
    # Equal params and a still input: only the noise can tell the directions apart.
    forward, backward = ys[..., :HIDDEN], ys[:, ::-1, HIDDEN:]
    assert bool((jnp.abs(forward - backward) > 1e-3).any())
    again, _ = layer.apply(params, zeros, key=key)
    chex.assert_trees_all_equal(ys, again)
    chex.assert_tree_all_finite(plain)
    jaxpr = jax.make_jaxpr(lambda k: layer.apply(params, XS, key=k))(key)
    bodies = [str(body) for body in scan_bodies(jaxpr)]
    assert len(bodies) == 2
    assert "random_bits" in str(jaxpr)
    assert not any("random" in body for body in bodies)


def scan_bodies(jaxpr: Any) -> list[Any]:
    """All loop bodies inside a jaxpr."""
    found = []
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if not hasattr(inner, "eqns"):
                continue
            if equation.primitive.name == "scan":
                found.append(inner)
            found.extend(scan_bodies(inner))
    return found


# Implementation.


def test_implementation_none_picks_one_that_explain_names():
    for cell in (CELL, StepOnly(2)):
        chosen = jlstm.explain(cell).implementation
        assert jlstm.explain(cell, implementation=chosen).implementation == chosen
    assert jlstm.explain(StepOnly(2)).implementation == "scan"
    assert "fused cannot: StepOnly" in str(jlstm.explain(StepOnly(2)))


def test_implementation_named_never_falls_back():
    cell = StepOnly(HIDDEN)
    params = cell.init(jax.random.key(0), XS[:, 0])
    for call in (
        lambda: jlstm.unroll(cell, params, XS, implementation="fused"),
        lambda: jlstm.RNN(cell, implementation="fused"),
        lambda: jlstm.explain(cell, implementation="fused"),
        lambda: jlstm.with_implementation(jlstm.stack(jlstm.RNN(cell)), "fused"),
    ):
        with pytest.raises(NotImplementedError, match="has no gated form"):
            call()


@directions
def test_implementation_changes_no_output_and_no_gradient(reverse):
    options = {"mask": HOLES, "resets": RESETS, "reverse": reverse}
    options["return_carries"] = True
    results = [value_and_grads(**options, implementation=i) for i in ("scan", "fused")]
    close(*results)


# Differentiation.


def loss_of(implementation: str | None) -> Any:
    def loss(w_hh, xs):
        params = PARAMS.replace(w_hh=w_hh)
        options = {"mask": HOLES, "implementation": implementation}
        return jnp.square(jlstm.unroll(CELL, params, xs, CARRY, **options)[0]).sum()

    return loss


@paths
def test_differentiation_reverse_over_reverse(implementation):
    v = random_like(PARAMS.w_hh, seed=3)

    @jax.jit
    def curvature(w_hh):
        gradient = jax.grad(loss_of(implementation))
        return jax.grad(lambda w: jnp.vdot(gradient(w, XS), v))(w_hh)

    @jax.jit
    def reference(w_hh):  # forward over reverse, on the reference loop
        return jax.jvp(lambda w: jax.grad(loss_of("scan"))(w, XS), (w_hh,), (v,))[1]

    got, expected = curvature(PARAMS.w_hh), reference(PARAMS.w_hh)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(got).max()) > 1e-2


@paths
def test_differentiation_vmap_over_inputs_and_params(implementation):
    ws = jnp.stack([PARAMS.w_hh, -PARAMS.w_hh])
    xss = jnp.stack([XS, XS * 2])
    gradient = jax.jit(jax.grad(loss_of(implementation), argnums=(0, 1)))
    together = jax.jit(jax.vmap(gradient))(ws, xss)
    for i in range(2):
        close(
            jax.tree.map(lambda leaf, i=i: leaf[i], together), gradient(ws[i], xss[i])
        )


def test_differentiation_jvp_is_one_call_away():
    layer = jlstm.with_implementation(
        jlstm.stack(jlstm.RNN(CELL, implementation="fused")), "scan"
    )
    primal, tangent = jax.jvp(lambda xs: layer.apply((PARAMS,), xs)[0], (XS,), (XS,))
    step = 1e-2
    high = layer.apply((PARAMS,), XS * (1 + step))[0]
    low = layer.apply((PARAMS,), XS * (1 - step))[0]
    close(primal, layer.apply((PARAMS,), XS)[0])
    chex.assert_trees_all_close(tangent, (high - low) / (2 * step), atol=1e-3)


# Compiled.


def test_compiled_once_a_config_and_shape():
    def traces(cell, xs) -> int:
        before = len(TRACES)
        params = cell.init(jax.random.key(0), xs[:, 0])
        layer = jlstm.stack(jlstm.RNN(cell))
        jlstm.unroll(cell, params, xs)
        layer.apply((params,), xs)
        return len(TRACES) - before

    assert traces(StepOnly(2, "a"), XS) > 0
    assert traces(StepOnly(2, "a"), XS * 2) == 0  # an equal config, other values
    assert traces(StepOnly(2, "a"), XS[:, :4]) > 0
    assert traces(StepOnly(2, "b"), XS) > 0


# Dtype.


@paths
def test_dtype_of_outputs_is_compute_and_of_carries_is_carry(implementation):
    policy = jlstm.Policy(
        param=jnp.float32, compute=jnp.bfloat16, carry=jnp.float32, accumulate=None
    )
    layer = jlstm.RNN(CELL, implementation=implementation, policy=policy)
    params = layer.init(jax.random.key(0), XS)
    ys, carry = layer.apply(params, XS, CARRY, mask=HOLES)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert ys.dtype == jnp.bfloat16
    assert (carry.h.dtype, carry.c.dtype) == (jnp.float32, jnp.float32)
    exact, _ = jlstm.RNN(CELL).apply(params, XS, CARRY, mask=HOLES)
    chex.assert_trees_all_close(ys.astype(jnp.float32), exact, atol=0.05)


def test_dtype_of_a_plain_zeros_carry_is_fitted():
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (PARAMS, XS, FRESH))
        carry = jax.tree.map(jnp.zeros_like, FRESH)
        assert carry.h.dtype == jnp.float32
        ys, after = jlstm.unroll(CELL, wide[0], wide[1], carry)
        assert (ys.dtype, after.c.dtype) == (jnp.float64, jnp.float64)


# Small sizes.


@paths
@directions
@pytest.mark.parametrize(("batch", "time"), [(1, TIME), (BATCH, 1), (BATCH, 0)])
def test_sizes_of_one_and_zero(implementation, reverse, batch, time):
    xs = XS[:batch, :time]
    carry = jax.tree.map(lambda leaf: leaf[:batch], CARRY)
    options = {"reverse": reverse, "implementation": implementation}

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def results(params):
        lengths = jnp.full(batch, time, jnp.int32)
        resets = jnp.zeros((batch, time), bool)
        masking = {"lengths": lengths, "resets": resets}
        out = jlstm.unroll(CELL, params, xs, carry, **masking, **options)
        return jnp.square(out[0]).sum() + out[1].c.sum(), out

    (_, (ys, after)), grads = results(PARAMS)
    assert ys.shape == (batch, time, HIDDEN)
    chex.assert_tree_all_finite(grads)
    if time == 0:
        chex.assert_trees_all_equal(after, carry)
    elif time == 1:
        expected, y = CELL.step(PARAMS, carry, xs[:, 0])
        close((ys[:, 0], after), (y, expected))
    else:
        whole, _ = run(**options)
        close(ys[0], whole[0])
