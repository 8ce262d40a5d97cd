"""The cells of xLSTM stay finite, and an mLSTM is the same taken in chunks."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlstm
from jlstm.cells import MLSTMCarry, MLSTMParams, SLSTMParams
from jlstm.kernels import IMPLEMENTATIONS
from jlstm.kernels.mlstm import Chunks
from jlstm.testing import check_cell, random_like
from tests.oracles import errors, extended

BATCH, TIME, SIZE = 2, 11, 3
KEY = jax.random.key(0)
CELL = jlstm.MLSTM(4, num_heads=2, key_size=3)
MLSTMS = [case for case in extended.CASES[2:]]
close = partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-12)
kernels = pytest.mark.parametrize("name", ["chunkwise", "parallel"])
SLOW = pytest.mark.slow
forgets = pytest.mark.parametrize("exp_forget", [False, True])


# Large pre-activations.


def signs(shape, seed=0):
    """Pre-activations of 100 and -100."""
    return np.random.default_rng(seed).choice([-100.0, 100.0], shape)


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.longdouble), tree)


def finite_gradients(cell, params, xs, carry, **options):
    def loss(params, xs, carry):
        ys, after = jlstm.unroll(cell, params, xs, carry, **options)
        return sum(leaf.sum() for leaf in jax.tree.leaves((ys, after)))

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(params, xs, carry)
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("implementation", ["scan", "fused"])
@forgets
def test_an_slstm_is_finite_and_right_at_large_pre_activations(
    implementation, exp_forget
):
    cell = jlstm.SLSTM(4, num_heads=2, exp_forget=exp_forget)
    xs = jnp.asarray(signs((3, 6, 16)), jnp.float32)
    params = cell.init(KEY, xs[:, 0])
    params = SLSTMParams(jnp.eye(16), params.w_hh, jnp.zeros(16))
    carry = cell.init_carry(params, (3,))
    ys, after = jlstm.unroll(cell, params, xs, implementation=implementation)
    oracle, nothing = extended.slstm(exp_forget), jnp.full_like(carry.m, -1e4)
    expected = oracle(*map(wide, (params, carry._replace(m=nothing), xs)))
    for a, b in zip(
        jax.tree.leaves((ys, after)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b.astype(np.float64), rtol=2e-5, atol=1e-6)
    finite_gradients(cell, params, xs, carry, implementation=implementation)


@pytest.mark.parametrize("m", [-1e3, 0.0, 1e3])
@pytest.mark.parametrize("pre", [-100.0, 0.0, 100.0])
def test_an_slstm_that_has_seen_nothing_forgets_what_m_says(m, pre):
    cell = jlstm.SLSTM(2)
    params = jax.tree.map(jnp.zeros_like, cell.init(KEY, jnp.zeros((1, 3))))
    b = jnp.asarray([pre, pre, 1.0, 1.0]).repeat(2)
    params = SLSTMParams(params.w_ih, params.w_hh, b)
    carry = cell.init_carry(params, (1,))._replace(m=jnp.full((1, 2), m))
    after, y = cell.step(params, carry, jnp.zeros((1, 3)))
    np.testing.assert_allclose(y, np.tanh(1) / (1 + np.exp(-1)), rtol=1e-6)
    np.testing.assert_allclose(after.m, pre, rtol=1e-6)


@pytest.mark.parametrize("implementation", ["scan", "fused", "chunkwise", "parallel"])
@forgets
def test_an_mlstm_is_finite_and_right_at_large_pre_activations(
    implementation, exp_forget
):
    cell = jlstm.MLSTM(4, num_heads=2, key_size=3, exp_forget=exp_forget)
    draw = np.random.default_rng(1).standard_normal((3, 6, 16))
    xs = np.concatenate([draw, signs((3, 6, 8))], axis=-1)  # q, k, v; o, i, f
    xs[0, 2, :6] = 0  # a query of zeros
    xs = jnp.asarray(xs, jnp.float32)
    params = MLSTMParams(jnp.eye(24), jnp.zeros(24))
    carry = cell.init_carry(params, (3,))
    ys, after = jlstm.unroll(cell, params, xs, implementation=implementation)
    oracle = extended.mlstm(exp_forget)
    expected = oracle(*map(wide, (params, carry, xs)))
    for a, b in zip(
        jax.tree.leaves((ys, after)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b.astype(np.float64), rtol=2e-4, atol=1e-5)
    finite_gradients(cell, params, xs, carry, implementation=implementation)


# Chunks.


def results(kernel, cell=CELL, *, time=TIME, grad=True, **options):
    """Values and gradients of a kernel, with holes, resets and both carries."""
    with jax.enable_x64(True):
        xs = random_like(jnp.zeros((BATCH, time, SIZE), np.float64), seed=0)
        one = jnp.zeros((BATCH, SIZE), np.float64)
        params = random_like(jax.eval_shape(cell.init, KEY, one), seed=1)
        carry, fresh = (
            random_like(cell.init_carry(params, (BATCH,)), seed=seed) for seed in (2, 5)
        )
        draws = np.random.default_rng(3).random((2, BATCH, time))
        mask, resets = jnp.asarray(draws[0] < 0.7), jnp.asarray(draws[1] < 0.2)
        xs = jlstm.zero_rows(mask, xs)

        def run(*args):
            options.setdefault("mask", mask)
            options.setdefault("resets", resets)
            out = kernel.unroll(cell, *args, **options)
            leaves = jax.tree.leaves(out)
            weights = random_like(leaves, seed=4)
            return sum((a * b).sum() for a, b in zip(leaves, weights, strict=True)), out

        if grad:
            run = jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True)
        return jax.jit(run)(params, xs, carry, fresh)


SCAN = IMPLEMENTATIONS["scan"]


@kernels
@pytest.mark.parametrize("case", extended.CASES[2:], ids=str)
def test_cell_equals_its_formula(case, name):
    found = errors(case, name)
    assert found["value"] <= 1e-10
    assert found["gradient"] <= 1e-8


def test_cell_obeys_the_laws_of_sequences():
    check_cell(CELL, implementations=("chunkwise",), smooth=False)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        pytest.param({"mask": None}, marks=SLOW),
        pytest.param({"resets": None}, marks=SLOW),
    ],
)
@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=SLOW)])
def test_chunks_join_without_a_seam(reverse, flags):
    flags = flags | {"reverse": reverse, "return_carries": True}
    expected = results(SCAN, **flags)
    for steps in (4, None):
        close(results(Chunks(steps), **flags), expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("cell", "name", "value"),
    [
        (CELL, "chunkwise", np.nan),
        pytest.param(CELL, "parallel", np.nan, marks=SLOW),
        (jlstm.LRU(3, state_size=2), "associative", np.inf),
        pytest.param(jlstm.MinLSTM(4), "associative", np.nan, marks=SLOW),
    ],
    ids=repr,
)
def test_what_is_not_finite_reaches_what_it_does_in_a_scan(cell, name, value, reverse):
    with jax.enable_x64(True):
        xs = np.array(jax.random.normal(KEY, (4, TIME, SIZE), np.float64))
        xs[0, 3, 1] = xs[2, 6, 0] = value
        resets = np.zeros((4, TIME), bool)
        resets[0, [0, 5]] = resets[2, [2, 9]] = resets[3, [1, 6]] = True
        params = cell.init(KEY, xs[:, 0])
        carry = random_like(cell.init_carry(params, (4,)), 1)
        carry = jax.tree.map(lambda leaf: leaf.at[3].set(jnp.nan), carry)

        options: Any = {"resets": resets, "reverse": reverse, "return_carries": True}
        run = partial(jlstm.unroll, cell, params, xs, carry, **options)
        want = run(implementation="scan")
        got = run(
            implementation=name, checkpoint_every=None if name == "parallel" else 4
        )
        finite = partial(jax.tree.map, np.isfinite)
        chex.assert_trees_all_equal(finite(got), finite(want))
        clean = partial(jax.tree.map, lambda x: np.where(np.isfinite(x), x, 0))
        close(clean(got), clean(want))
        assert 0 < np.isfinite(want[0]).mean() < 1


@pytest.mark.parametrize(
    "every", [pytest.param(1, marks=SLOW), 4, pytest.param(100, marks=SLOW)]
)
def test_checkpoints_change_nothing(every):
    close(results(Chunks(5), checkpoint_every=every), results(SCAN))


@kernels
@pytest.mark.parametrize("time", [0, 1])
def test_sizes_of_one_and_zero(name, time):
    options = {"time": time, "grad": time > 0}
    close(results(IMPLEMENTATIONS[name], **options), results(SCAN, **options))


def test_a_padded_sequence_of_nothing_has_finite_gradients():
    xs = jnp.ones((BATCH, TIME, SIZE))
    params = CELL.init(KEY, xs[:, 0])
    carry = CELL.init_carry(params, (BATCH,))
    lengths, resets = jnp.array([0, 1]), jnp.ones((BATCH, TIME), bool)
    options: dict[str, Any] = {"lengths": lengths, "resets": resets}
    finite_gradients(CELL, params, xs, carry, implementation="chunkwise", **options)


def test_differentiation_in_every_mode():
    def derivatives(implementation):
        with jax.enable_x64(True):
            xs = random_like(jnp.zeros((BATCH, TIME, SIZE), np.float64), seed=0)
            params = CELL.init(KEY, xs[:, 0])
            along = random_like(params, seed=2)

            def loss(params):
                ys = jlstm.unroll(CELL, params, xs, implementation=implementation)[0]
                return jnp.sin(ys).sum()

            def slope(params):
                return jax.jvp(loss, (params,), (along,))[1]

            def all_of_them(params):
                return slope(params), jax.grad(slope)(params)

            return jax.jit(all_of_them)(params)

    close(derivatives("chunkwise"), derivatives("scan"), rtol=1e-9)


def test_the_default_is_chunkwise_where_that_can_be():
    assert jlstm.explain(CELL).implementation == "chunkwise"
    policy = jlstm.Policy(compute=jnp.bfloat16, carry=jnp.float32)
    assert jlstm.explain(jlstm.Precision(CELL, policy)).implementation == "chunkwise"


@pytest.mark.parametrize(
    ("cell", "options", "reason"),
    [
        (jlstm.SLSTM(4), {}, r"runs only an MLSTM, got SLSTM\(4\)"),
        (CELL, {"checkpoint_every": 2}, "so it cannot honour checkpoint_every"),
    ],
)
def test_what_cannot_be_is_refused_by_name(cell, options, reason):
    xs = jnp.ones((BATCH, TIME, SIZE))
    params = cell.init(KEY, xs[:, 0])
    with pytest.raises(NotImplementedError, match=f"^parallel: .*{reason}; use "):
        jlstm.unroll(cell, params, xs, implementation="parallel", **options)


def test_a_policy_and_an_embedding_are_seen_through():
    policy = jlstm.Policy(compute=jnp.bfloat16, carry=jnp.float32)
    layer = jlstm.RNN(CELL, policy=policy)
    xs = random_like(jnp.zeros((BATCH, TIME, SIZE)), seed=0)
    params = layer.init(KEY, xs)
    found = layer.apply(params, xs)
    expected = jlstm.with_implementation(layer, "scan").apply(params, xs)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)
    chex.assert_trees_all_close(found[0], expected[0], atol=0.02)

    ids = jnp.arange(BATCH * TIME).reshape(BATCH, TIME) % 5
    stack = jlstm.stack(jlstm.Embed(5, 4), jlstm.RNN(CELL))
    params = stack.init(KEY, ids)
    expected = jlstm.with_implementation(stack, "scan").apply(params, ids)
    found = stack.apply(params, ids)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [pytest.param(AxisType.Auto, marks=SLOW), AxisType.Explicit]
)
def test_meshes_change_nothing(kind):
    xs = random_like(jnp.zeros((4, 19, SIZE)), seed=0)
    lengths, resets = jnp.array([19, 0, 7, 12]), jnp.arange(76).reshape(4, 19) % 8 == 5
    params = CELL.init(KEY, xs[:, 0])

    @jax.jit
    def run(params, xs, lengths, resets):
        def loss(params, xs):
            options: dict[str, Any] = {"lengths": lengths, "resets": resets}
            ys, carry = jlstm.unroll(
                CELL, params, xs, implementation="chunkwise", **options
            )
            return jnp.square(ys).sum() + sum(map(jnp.sum, jax.tree.leaves(carry)))

        return jax.value_and_grad(loss, argnums=(0, 1))(params, xs)

    expected = run(params, xs, lengths, resets)
    mesh = jax.make_mesh((2,), ("data",), (kind,))
    place = partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        whole = jax.device_put(params, NamedSharding(mesh, P()))
        found = run(whole, *map(place, (xs, lengths, resets)))
    chex.assert_trees_all_close(
        jax.device_get(found), jax.device_get(expected), rtol=1e-4, atol=1e-5
    )


# Configs.


@pytest.mark.parametrize("cell", [jlstm.SLSTM, jlstm.MLSTM])
def test_heads_that_do_not_divide_are_refused(cell):
    name = cell.__name__
    message = f"^{name}.num_heads: must divide hidden_size=8, got 3$"
    with pytest.raises(ValueError, match=message):
        cell(8, num_heads=3)
    with pytest.raises(ValueError, match=f"^{name}.num_heads: must be a positive int"):
        dataclasses.replace(cell(8), num_heads=0)


def test_sizes_of_keys_are_refused():
    message = "^MLSTM.key_size: must be a positive int, got 0$"
    with pytest.raises(ValueError, match=message):
        jlstm.MLSTM(8, key_size=0)


def test_heads_are_apart():
    cell = jlstm.SLSTM(4, num_heads=2)
    params = cell.init(KEY, jnp.zeros((1, 3)))
    assert params.w_hh.shape == (2, 2, 8)
    h = jnp.asarray([[0.0, 0.0, 1.0, 2.0]])
    carry = cell.init_carry(params, (1,))._replace(h=h)
    zh = cell.mix(params, carry, jnp.zeros((1, 16)))
    gates = np.asarray(zh).reshape(4, 2, 2)  # gate, head, unit
    assert (gates[:, 0] == 0).all()
    np.testing.assert_allclose(gates[:, 1].ravel(), (h[:, 2:] @ params.w_hh[1])[0])


def test_shapes_of_an_mlstm():
    params = CELL.init(KEY, jnp.zeros((1, 5)))
    assert params.w_ih.shape == (5, 24)
    assert params.b.tolist() == [0.0] * 22 + [1.0] * 2
    carry = CELL.init_carry(params, (7,))
    assert carry == MLSTMCarry(*carry)
    assert [leaf.shape for leaf in carry] == [(7, 2, 3, 2), (7, 2, 3), (7, 2)]
