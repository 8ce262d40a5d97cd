"""Products in C++ equal NumPy's, and the fused loop with them equals the reference."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_native
import test_program
from cases import TOLERANCE

import jlstm
from jlstm.bench.cases import MGU
from jlstm.kernels import fused, library, product, program, scan
from jlstm.kernels.graph import Unsuited

pytestmark = pytest.mark.skipif(
    library.why_not() is not None, reason=str(library.why_not())
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on one device: the suite has two."""
    monkeypatch.setattr(product, "may_be_sharded", lambda: False)
    monkeypatch.setattr(fused, "may_be_sharded", lambda: False)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def count(fun, *args):
    """How many products of a function run in C++."""
    return jax.jit(fun).lower(*args).as_text().count("@jlstm_product")


def check_product(rows, inner, columns):
    x, w = draw(rows, inner), draw(inner, columns, seed=1)
    expected = x.astype(np.float64) @ w.astype(np.float64)

    def transposed(weight, x):
        return jax.lax.dot_general(x, weight, (((1,), (1,)), ((), ())))

    for fun, weight in ((lambda w, x: x @ w, w), (transposed, w.T.copy())):
        found = jax.jit(product.with_weights(fun, weight, x))(x)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error <= TOLERANCE["float32"], (rows, inner, columns, error)


SHAPES = [
    # rows, inner size, columns
    (2, 1, 1),
    (2, 3, 16),
    (3, 5, 17),
    (7, 64, 130),  # spans of unequal size
    (9, 33, 200),
    (40, 512, 16),  # one span: rows are shared among threads
    (64, 256, 64),
    (31, 130, 515),  # many spans: these are shared
]


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_equals_numpy(shape):
    check_product(*shape)


def test_products_one_after_another_do_not_disturb_each_other():
    x, w = draw(64, 256), draw(256, 256, seed=1) / 16
    multiply = product.with_weights(lambda w, x: jnp.sin(x @ w), w, x)

    def repeat(multiply):
        def body(x, _):
            return multiply(x), None

        return jax.jit(lambda x: jax.lax.scan(body, x, length=200)[0])(x)

    found, expected = repeat(multiply), repeat(lambda x: jnp.sin(x @ w))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def mix(params, x, other):
    """A product of each kind: those with a weight of two axes are found."""
    a = x @ params["w"]
    b = jnp.einsum("bk,kn->bn", x, params["w"])
    c = jnp.dot(jnp.tanh(x), params["square"]) @ params["w"]
    return a, b, c, other @ other.T, x @ params["w"][:, :2], x @ params["vector"]


def test_only_products_with_a_weight_are_found():
    params = {"w": draw(5, 4), "square": draw(5, 5), "vector": draw(5)}
    args = draw(3, 5, seed=1), draw(3, 3, seed=2)
    bound = product.with_weights(mix, params, *args)
    assert count(bound, *args) == 4
    for found, expected in zip(bound(*args), mix(params, *args), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "x"),
    [
        (draw(5, 4), draw(1, 5)),  # one row
        (draw(5, 4), draw(0, 5)),
        (draw(0, 4), draw(3, 0)),
        (draw(5, 4).astype(jnp.bfloat16), draw(3, 5).astype(jnp.bfloat16)),
        (draw(2, 5, 4), draw(2, 3, 5)),
    ],
    ids=["one row", "no rows", "no features", "bfloat16", "batch of matrices"],
)
def test_other_products_are_left_to_xla(weight, x):
    bound = product.with_weights(lambda w, x: x @ w, weight, x)
    assert count(bound, x) == 0
    np.testing.assert_array_equal(bound(x), x @ weight)


# The loop whose steps are no programs, with their products in C++.


CASES = [
    (MGU(5), 3, 40, 2, "", False),
    (MGU(33), 7, 6, 5, "mask", True),
    (jlstm.LSTM(16), 21, 40, 4, "resets", True),  # several blocks of steps
    (jlstm.GRU(8, reset_after=False), 4, 5, 3, "mask", False),
]


@pytest.fixture
def no_programs(monkeypatch):
    def bind(*_):
        raise Unsuited("left out")

    monkeypatch.setattr(program, "bind", bind)


@pytest.mark.core
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_fused_loop_equals_the_reference(case, no_programs):
    cell, batch, time, size, kind, reverse = case
    args, cotangents = test_native.arguments(cell, batch, time, size)
    options = {"kind": kind, "reverse": reverse}
    expected = test_native.results(scan, cell, args, cotangents, double=True, **options)
    found = test_native.results(fused, cell, args, cotangents, **options)
    test_native.check(found[0], expected[0], TOLERANCE["float32"])
    test_native.check(found[1], expected[1], test_native.GRADIENT_TOLERANCE)


def test_products_of_both_directions_run_in_the_loop(no_programs):
    cell = jlstm.LSTM(4)
    args = test_program.setting(cell, 3, 5, 2)
    gradient = partial(test_program.gradient, cell)
    assert count(gradient, *args) == 2
    every = partial(gradient, checkpoint_every=2)
    assert count(every, *args) >= 4
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5),
        jax.jit(every)(*args),
        jax.jit(gradient)(*args),
    )


@pytest.mark.slow
def test_gradient_of_a_gradient_equals_that_of_xla(monkeypatch, no_programs):
    cell = MGU(3)
    params, xs = test_program.setting(cell, 3, 4, 2)

    def penalty(params, xs):
        grads = test_program.gradient(cell, params, xs, return_carries=True)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))

    found = jax.jit(jax.grad(penalty, (0, 1)))(params, xs)
    monkeypatch.setattr(product, "why_not", lambda request: "left out")
    expected = jax.jit(jax.grad(penalty, (0, 1)))(params, xs)
    test_native.check(found, expected, test_native.GRADIENT_TOLERANCE)


@pytest.mark.slow
def test_map_equals_a_loop(no_programs):
    cell = MGU(3)
    params, xs = test_program.setting(cell, 4, 5, 2)
    gradient = partial(test_program.gradient, cell)
    stacked = np.stack([xs, 2 * xs])
    mapped = jax.jit(jax.vmap(gradient, (None, 0)))(params, stacked)
    for i in range(2):
        found = jax.tree.map(lambda leaf, i=i: leaf[i], mapped)
        test_native.check(found, jax.jit(gradient)(params, stacked[i]), 1e-5)
