"""The associative loop equals the step form, and refuses by name what is not linear."""

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
from jlstm.cells import MinLSTMParams
from jlstm.cells.lru import lru_eigenvalues
from jlstm.kernels import associative, blocks, scan
from jlstm.testing import check_cell, random_like
from tests.oracles import errors, linear

BATCH, TIME, SIZE = 2, 11, 3
KEY = jax.random.key(0)
CELLS = [
    jlstm.MinLSTM(2, learned_carry=True),
    jlstm.MinGRU(2),
    jlstm.LRU(3, state_size=2),
]
cells = pytest.mark.parametrize("cell", CELLS, ids=repr)
close = partial(chex.assert_trees_all_close, rtol=1e-10, atol=1e-12)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Any update, of a carry of leaves ``a``, ``b`` and ``c``; no recurrent product."""

    rule: Any
    zh: tuple = ()
    dtype: str = "float64"

    def init(self, key, x):
        return {"w": jax.random.normal(key, (x.shape[-1], 4), x.dtype)}

    def init_carry(self, params, batch_shape):
        zeros = {"a": jnp.zeros((*batch_shape, 4)), "b": jnp.zeros((*batch_shape, 4))}
        zeros["c"] = jnp.zeros((*batch_shape, 2, 2))
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), zeros)

    def project(self, params, x):
        return (x @ params["w"]).astype(self.dtype)

    def mix(self, params, carry, zx):
        return self.zh

    def update(self, params, carry, zx, zh):
        return self.rule(params, carry, zx)

    def step(self, params, carry, x):
        zx = self.project(params, x)
        return self.update(params, carry, zx, self.mix(params, carry, zx))


def chain(params, carry, zx):
    """Leaves that read each other, one of another shape, and any output."""
    f, g = jlstm.gates(jnp.concatenate([zx, zx + 1.0], axis=-1), "st")
    a = f * carry["a"] - jnp.where(g > 0, carry["b"], zx) / 2.0
    b = g + carry["b"] * 0.5
    c = carry["c"] * f.reshape(*f.shape[:-1], 2, 2) + 1.0
    return {"a": a, "b": b, "c": c}, jnp.tanh(a @ params["w"].T) * b[..., :1]


def jitted(params, carry, zx):
    return jax.jit(chain)(params, carry, zx)


def turned(params, carry, zx):
    """A carry of complex numbers."""
    turn = jnp.exp(zx.real.astype(zx.dtype) * 1j)
    a = carry["a"] * turn + zx
    return {**carry, "a": a}, jnp.abs(a)


@pytest.fixture
def one_batch(monkeypatch):
    """The steps of a block as one batch, as on one device; the suite has two."""
    monkeypatch.setattr(associative, "may_be_sharded", lambda: False)


def results(kernel, cell, *, time=TIME, grad=True, **options):
    """Values and gradients of a kernel, with holes, resets and both carries."""
    with jax.enable_x64(True):
        xs = random_like(jnp.zeros((BATCH, time, SIZE), np.float64), seed=0)
        one = jnp.zeros((BATCH, SIZE), np.float64)
        params = random_like(jax.eval_shape(cell.init, KEY, one), seed=1)
        carry = random_like(cell.init_carry(params, (BATCH,)), seed=2)
        draws = np.random.default_rng(3).random((2, BATCH, time))
        mask, resets = jnp.asarray(draws[0] < 0.7), jnp.asarray(draws[1] < 0.2)
        xs = jlstm.zero_rows(mask, xs)

        def run(params, xs, carry):
            fresh = jax.tree.map(lambda leaf: leaf + 1, carry)
            given, steps = jlstm.prepare(cell, params, xs)
            out = kernel.unroll(
                cell, given, steps, carry, fresh, mask=mask, resets=resets, **options
            )
            leaves = jax.tree.leaves(out)
            weights = random_like(leaves, seed=4)
            pairs = zip(leaves, weights, strict=True)
            return sum((a * b).real.sum() for a, b in pairs), out

        if grad:
            run = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
        return jax.jit(run)(params, xs, carry)


@pytest.mark.parametrize("implementation", ["associative"])
@pytest.mark.parametrize("case", linear.CASES, ids=str)
def test_cell_equals_its_formula(case, implementation):
    found = errors(case, implementation)
    assert found["value"] <= 1e-10
    assert found["gradient"] <= 1e-8


@pytest.mark.parametrize("cell", [CELLS[0], CELLS[2]], ids=repr)
def test_cell_obeys_the_laws_of_sequences(cell):
    check_cell(cell, implementations=("associative",), smooth=False)


@pytest.mark.parametrize("reverse", [False, True])
def test_blocks_join_without_a_seam(reverse, one_batch, monkeypatch):
    monkeypatch.setattr(associative, "BYTES", {"cpu": 1})
    assert len(blocks.segments(19, 16)) == 2
    options = {"time": 19, "reverse": reverse, "return_carries": True}
    found = results(associative, Linear(chain), **options)
    close(found, results(scan, Linear(chain), **options))


@pytest.mark.parametrize("rule", [jitted, turned])
def test_carries_of_any_leaves(rule):
    cell = Linear(rule, dtype="complex128" if rule is turned else "float64")
    close(results(associative, cell), results(scan, cell))


@cells
def test_steps_taken_as_one_batch_change_nothing(cell, one_batch):
    close(results(associative, cell), results(scan, cell))


@pytest.mark.parametrize(
    "every",
    [
        pytest.param(1, marks=pytest.mark.slow),
        4,
        pytest.param(100, marks=pytest.mark.slow),
    ],
)
def test_checkpoints_change_nothing(every):
    options = {"return_carries": True}
    found = results(associative, CELLS[2], checkpoint_every=every, **options)
    close(found, results(associative, CELLS[2], **options))


def test_checkpoints_save_memory():
    cell, xs = jlstm.MinGRU(16), jnp.ones((2, 400, 4))
    params = cell.init(KEY, xs[:, 0])

    def temporary(every):
        def loss(params):
            options = {"checkpoint_every": every, "implementation": "associative"}
            return jlstm.unroll(cell, params, xs, **options)[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    assert temporary("sqrt") < 0.5 * temporary(None)


@pytest.mark.parametrize("time", [0, 1])
@cells
def test_sizes_of_one_and_zero(cell, time):
    options = {"time": time, "grad": time > 0}
    close(results(associative, cell, **options), results(scan, cell, **options))


def loss_of(implementation):
    cell = CELLS[2]
    with jax.enable_x64(True):
        xs = random_like(jnp.zeros((BATCH, TIME, SIZE), np.float64), seed=0)
        params = random_like(cell.init(KEY, xs[:, 0]), seed=1, scale=0.5)

    def loss(params):
        ys, _ = jlstm.unroll(cell, params, xs, implementation=implementation)
        return jnp.sin(ys).sum()

    return loss, params, random_like(params, seed=2)


@pytest.mark.parametrize("order", ["jvp", "jvp of grad", "grad of jvp", "jvp of jvp"])
def test_differentiation_in_every_mode(order):
    def derivative(implementation):
        with jax.enable_x64(True):
            loss, params, along = loss_of(implementation)

            def slope(params):
                return jax.jvp(loss, (params,), (along,))[1]

            functions = {
                "jvp": slope,
                "jvp of grad": lambda p: jax.jvp(jax.grad(loss), (p,), (along,))[1],
                "grad of jvp": jax.grad(slope),
                "jvp of jvp": lambda p: jax.jvp(slope, (p,), (along,))[1],
            }
            return jax.jit(functions[order])(params)

    close(derivative("associative"), derivative("scan"), rtol=1e-9)


@pytest.mark.parametrize("implementation", ["scan", "fused", "associative"])
def test_a_min_lstm_is_finite_and_right_at_large_pre_activations(implementation):
    cell = jlstm.MinLSTM(3)
    signs = np.random.default_rng(0).choice([-100.0, 100.0], (2, 6, 9))
    xs = jnp.asarray(signs, jnp.float32)
    params = MinLSTMParams(jnp.eye(9), jnp.zeros(9))

    def run(params, xs):
        return jlstm.unroll(cell, params, xs, implementation=implementation)

    carry = cell.init_carry(params, (2,))
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, carry, xs))
    expected = linear.min_lstm()(*wide)
    chex.assert_trees_all_close(run(params, xs), expected, rtol=1e-6, atol=1e-6)

    def loss(params, xs):
        return jnp.square(run(params, xs)[0]).sum()

    chex.assert_tree_all_finite(jax.grad(loss, argnums=(0, 1))(params, xs))


@pytest.mark.parametrize("option", [{"r_max": 1.5}, {"r_min": -0.1}, {"r_min": 1.0}])
def test_a_ring_that_is_none_is_refused(option):
    message = "^LRU.r_min, r_max: must be 0 <= r_min < r_max <= 1, got "
    with pytest.raises(ValueError, match=message):
        jlstm.LRU(4, **option)
    with pytest.raises(ValueError, match=r"^LRU.max_phase: must be > 0, got 0$"):
        jlstm.LRU(4, max_phase=0)
    with pytest.raises(ValueError, match=r"^LRU.state_size: must be a positive int"):
        jlstm.LRU(4, state_size=0)


def test_eigenvalues_begin_in_the_ring():
    cell = jlstm.LRU(2, state_size=500, r_min=0.5, r_max=0.9, max_phase=1.0)
    params = cell.init(KEY, jnp.zeros((1, 3)))
    re, im = lru_eigenvalues(params)
    modulus, phase = jnp.hypot(re, im), jnp.arctan2(im, re)
    assert 0.499 < modulus.min() < 0.55 < 0.85 < modulus.max() < 0.901
    assert 0 < phase.min() < 0.05 < 0.95 < phase.max() < 1.001
    close(jnp.exp(2 * params.gamma_log), 1 - modulus**2, rtol=1e-3)


# What is linear, and what is not.


def twice(params, carry, zx):
    return {**carry, "a": carry["a"] * carry["b"]}, zx


def bent(params, carry, zx):
    return {**carry, "b": jlstm.tanh(carry["b"])}, zx


def mixed(params, carry, zx):
    return {**carry, "a": carry["a"] @ params["w"].T @ params["w"]}, zx


def moved(params, carry, zx):
    return {**carry, "c": jnp.swapaxes(carry["c"], -1, -2)}, zx


def chosen(params, carry, zx):
    return {**carry, "a": jnp.where(carry["a"] > 0, zx, carry["a"])}, zx


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        (Linear(twice), "update must be affine and .* in the carry, but applies mul"),
        (Linear(bent), "update must be affine and .* in the carry, but applies tanh"),
        (
            Linear(mixed),
            "update must be affine and .* in the carry, but applies dot_gen",
        ),
        (
            Linear(moved),
            "update must be affine and .* in the carry, but applies transpose",
        ),
        (Linear(chosen), "update must be affine and .* in the carry, but applies gt"),
        (Linear(chain, zh=(1.0,)), "mix returns a recurrent product, but must"),
        (jlstm.GRU(2), "mix returns a recurrent product, but must"),
        (Linear(chain, dtype="int32"), "the carry has arrays that are not floating"),
    ],
    ids=lambda value: value.rule.__name__ if isinstance(value, Linear) else None,
)
def test_what_is_not_linear_is_refused_by_name(cell, reason):
    message = f"^associative: {reason}.*; use implementation='scan'"
    with jax.enable_x64(True):
        xs = jnp.ones((BATCH, TIME, SIZE), np.float64)
        params = cell.init(KEY, xs[:, 0])
        with pytest.raises(NotImplementedError, match=message):
            jlstm.unroll(cell, params, xs, implementation="associative")
        others = dict(jlstm.explain(cell, xs).others)
    assert others["associative"].startswith("cannot: ")


@dataclasses.dataclass(frozen=True)
class OfTwo(Linear):
    """Takes a pair, of which no example is known before there are inputs."""

    def init(self, key, x):
        return super().init(key, x["left"] + x["right"])

    def project(self, params, x):
        return super().project(params, x["left"] * x["right"])


def test_what_depends_on_inputs_is_decided_by_them():
    for cell, can in ((OfTwo(chain), True), (OfTwo(bent), False)):
        layer = jlstm.RNN(cell, implementation="associative")
        with jax.enable_x64(True):
            half = jnp.ones((BATCH, TIME, SIZE), np.float64)
            xs = {"left": half, "right": half * 2}
            params = cell.init(KEY, jax.tree.map(lambda leaf: leaf[:, 0], xs))
            found = dict(jlstm.explain(cell, xs).others)["associative"]
            assert found.startswith("can: " if can else "cannot: ")
            if can:
                expected = jlstm.unroll(cell, params, xs, implementation="scan")
                close(layer.apply(params, xs), expected)
            else:
                with pytest.raises(NotImplementedError, match="elementwise"):
                    layer.apply(params, xs)


def test_the_loop_itself_refuses_too():
    xs = jnp.ones((BATCH, TIME, SIZE))
    cell = jlstm.LSTM(2)
    params = cell.init(KEY, xs[:, 0])
    carry = cell.init_carry(params, (BATCH,))
    with pytest.raises(NotImplementedError, match=r"^associative: mix returns"):
        associative.unroll(cell, params, xs, carry, carry)


def test_a_policy_and_an_embedding_are_seen_through():
    policy = jlstm.Policy(compute=jnp.bfloat16, carry=jnp.float32)
    layer = jlstm.RNN(jlstm.LRU(4), implementation="associative", policy=policy)
    xs = random_like(jnp.zeros((BATCH, TIME, SIZE)), seed=0)
    params = layer.init(KEY, xs)
    ys, carry = layer.apply(params, xs)
    assert (ys.dtype, carry.re.dtype) == (jnp.bfloat16, jnp.float32)
    exact, _ = jlstm.RNN(jlstm.LRU(4)).apply(params, xs)
    chex.assert_trees_all_close(ys.astype(jnp.float32), exact, atol=0.1)

    ids = jnp.arange(BATCH * TIME).reshape(BATCH, TIME) % 5
    stack = jlstm.stack(jlstm.Embed(5, 4), jlstm.RNN(jlstm.MinGRU(4)))
    params = stack.init(KEY, ids)
    named = jlstm.with_implementation(stack, "associative")
    found, expected = named.apply(params, ids), stack.apply(params, ids)
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("cell", "kind"),
    [
        pytest.param(
            cell,
            kind,
            marks=[]
            if (cell, kind) == (CELLS[2], AxisType.Explicit)
            else pytest.mark.slow,
        )
        for cell in CELLS
        for kind in (AxisType.Auto, AxisType.Explicit)
    ],
)
def test_meshes_change_nothing(cell, kind):
    xs = random_like(jnp.zeros((4, 19, SIZE)), seed=0)
    lengths, resets = jnp.array([19, 0, 7, 12]), jnp.arange(76).reshape(4, 19) % 8 == 5
    params = cell.init(KEY, xs[:, 0])

    @jax.jit
    def run(params, xs, lengths, resets):
        def loss(params, xs):
            options = {"lengths": lengths, "resets": resets}
            ys, carry = jlstm.unroll(
                cell, params, xs, implementation="associative", **options
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
