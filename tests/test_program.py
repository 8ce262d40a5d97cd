"""Steps as programs in C++ equal NumPy, and the loop of them equals the reference."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_native
from cases import TOLERANCE
from scipy import special

import jlstm
from jlstm import door
from jlstm.bench.cases import MGU
from jlstm.kernels import Request, fused, library, product, program, scan
from jlstm.kernels.graph import Unsuited
from jlstm.kernels.loops import Span, Steps

pytestmark = pytest.mark.skipif(
    library.why_not() is not None, reason=str(library.why_not())
)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """As on one device: the suite has two."""
    monkeypatch.setattr(product, "may_be_sharded", lambda: False)
    monkeypatch.setattr(fused, "may_be_sharded", lambda: False)


def draw(*shape, seed=0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def count(fun, *args):
    """How many loops and products of a function run in C++."""
    text = jax.jit(fun).lower(*args).as_text()
    return text.count("@jlstm_program"), text.count("@jlstm_product")


def turn(tree):
    return jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), tree)


def run(step, fixed, state, inputs, *, reverse=False):
    """Runs a step ``(fixed, state, input) -> (state, out)`` over ``[T, B, ...]``."""

    def whole(fixed, state, sums, inputs, kept, stored):
        state, out = step(fixed, state, inputs)
        return state, sums, out, (), ()

    first = jax.tree.map(lambda leaf: leaf[0], inputs)
    loop = program.bind(whole, fixed, Steps(state, inputs=first))
    span = Span(jax.tree.leaves(inputs)[0].shape[0], reverse)
    steps = Steps(state, inputs=turn(inputs))
    state, _, outs, *_ = jax.jit(lambda steps: loop(steps, ((), ()), span))(steps)
    return state, turn(outs)


# Operations, over all that may come.

VALUES = np.array(
    [0.0, -0.0, 0.3, -0.7, 1.0, -1.5, 3.0, -9.0, 40.0, -80.0, np.inf, -np.inf, np.nan],
    np.float32,
)
OPERATIONS = {
    "neg": (jnp.negative, np.negative),
    "abs": (jnp.abs, np.abs),
    "sign": (jnp.sign, np.sign),
    "sqrt": (jnp.sqrt, np.sqrt),
    "rsqrt": (jax.lax.rsqrt, lambda x: 1 / np.sqrt(x)),
    "square": (jnp.square, np.square),
    "power": (lambda x: x**-3, lambda x: x**-3.0),
    "exp": (jnp.exp, np.exp),
    "tanh": (jnp.tanh, np.tanh),
    "sigmoid": (jax.nn.sigmoid, special.expit),
    "log": (jnp.log, np.log),
    "log1p": (jnp.log1p, np.log1p),
    "expm1": (jnp.expm1, np.expm1),
    "erf": (jax.lax.erf, special.erf),
    "softplus": (jax.nn.softplus, lambda x: np.logaddexp(x, 0)),
    "relu": (jax.nn.relu, lambda x: np.maximum(x, 0)),
    "clip": (lambda x: jnp.clip(x, -1, 2), lambda x: np.clip(x, -1, 2)),
    "where": (
        lambda x: jnp.where((x > 0.2) & ~(x >= 3) | (x < -1), x, 7),
        lambda x: np.where((x > 0.2) & ~(x >= 3) | (x < -1), x, 7),
    ),
    "equal": (
        lambda x: sum(
            n * jnp.float32(y) for n, y in enumerate((x == 1, x != 3, x <= 0))
        ),
        lambda x: 1.0 * (x != 3) + 2.0 * (x <= 0),
    ),
}
PAIRS = {
    "add": (jnp.add, np.add),
    "subtract": (jnp.subtract, np.subtract),
    "multiply": (jnp.multiply, np.multiply),
    "divide": (jnp.divide, np.divide),
    "maximum": (jnp.maximum, np.maximum),
    "minimum": (jnp.minimum, np.minimum),
    "a b + c": (lambda a, b: a * b + a, lambda a, b: a * b + a),
    "a b - c": (lambda a, b: a * b - a, lambda a, b: a * b - a),
    "c - a b": (lambda a, b: b - a * b, lambda a, b: b - a * b),
}


def same(found, expected):
    found = np.asarray(found, np.float64)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    # Beyond the range of float32.
    expected = np.where(np.abs(expected) > 3.4e38, np.sign(expected) * np.inf, expected)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)


def check_operations(names=None):
    grid = [np.repeat(VALUES, VALUES.size), np.tile(VALUES, VALUES.size)]
    a, b = (x.reshape(1, 13, 13) for x in grid)
    for name, (fun, oracle) in (OPERATIONS | PAIRS).items():
        if names is not None and name not in names:
            continue
        pair = name in PAIRS

        def step(_, state, inputs, fun=fun, pair=pair):
            return state, fun(*inputs) if pair else fun(inputs[0])

        outs = run(step, (), jnp.zeros((13, 13)), (a, b))[1][0]
        with np.errstate(all="ignore"):
            args = (a[0].astype(np.float64), b[0].astype(np.float64))
            same(outs, oracle(*args) if pair else oracle(args[0]))


@pytest.mark.core
@pytest.mark.parametrize("name", [*OPERATIONS, *PAIRS])
def test_operation_equals_numpy(name):
    check_operations([name])


@pytest.mark.parametrize("name", ["log", "log1p", "expm1", "exp", "tanh"])
def test_operation_has_the_digits_of_float32(name):
    sizes = 10.0 ** np.linspace(-36, 38, 1500)
    near = np.linspace(-1, 1, 1501)
    both = np.concatenate([sizes, -sizes, near, 1 + near / 1e3, near * 80])
    x = both.astype(np.float32)
    with np.errstate(all="ignore"):
        expected = OPERATIONS[name][1](x.astype(np.float64))
    kept = np.isfinite(expected) & (np.abs(expected) < 3e38)
    kept &= (np.abs(expected) > 1e-37) | (expected == 0)
    x, expected = x[kept][None, :, None], expected[kept]

    def step(_, state, x):
        return state, OPERATIONS[name][0](x)

    found = run(step, (), jnp.zeros((x.size, 1)), x)[1].reshape(-1)
    np.testing.assert_allclose(found, expected, rtol=6e-7)


def test_zero_of_either_sign_stays():
    def step(_, state, x):
        return state, (jnp.where(x > 0, 0.0, -0.0), jnp.where(x > 0, -0.0, 0.0))

    a, b = run(step, (), jnp.zeros((2, 3)), np.ones((1, 2, 3), np.float32))[1]
    assert not np.signbit(a).any()
    assert np.signbit(b).all()


# What a step may do with columns, rows and constants.


def columns(fixed, state, inputs):
    """Cuts, joins and pads of unequal widths, and all kinds of constants."""
    a, flag, b = inputs
    left, right = jnp.split(a, [4], axis=-1)
    z = jnp.concatenate([right, left * fixed["vector"][None], jnp.ones_like(left)], -1)
    z = z + fixed["row"][None] - fixed["rows"] * fixed["number"]
    z = z + jnp.pad(state @ fixed["w"], ((0, 0), (2, 4)), constant_values=0.5)
    z = jnp.where(flag[:, None], z, b[:, None])
    z = z - z.mean(-1, keepdims=True)
    z = z / jnp.sqrt(jnp.square(z).mean(-1, keepdims=True) + 1)
    new = state * (z[:, 2:8] @ fixed["u"]) + np.array([[1, 1, 2, 2, 3, 4]], np.float32)
    return jnp.tanh(new), (z, b * 2, flag)


@pytest.mark.core
@pytest.mark.parametrize("reverse", [False, True])
def test_columns_rows_and_constants(reverse):
    steps, rows = 5, 7
    fixed = {
        "vector": draw(4), "row": draw(16), "rows": draw(rows, 16), "number": draw(),
        "w": draw(6, 10), "u": draw(6, 1),
    }  # fmt: skip
    inputs = draw(steps, rows, 12), draw(steps, rows) > 0, draw(steps, rows, seed=1)
    state = draw(rows, 6)
    found = run(columns, fixed, state, inputs, reverse=reverse)
    scanned = partial(jax.lax.scan, partial(columns, fixed), reverse=reverse)
    expected = scanned(state, inputs)
    assert found[1][2].dtype == bool
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
        found,
        expected,
    )


def test_products_of_products_and_results_of_earlier_phases():
    def step(w, state, x):
        a = jnp.exp(-jnp.square(state)) * x
        b = jnp.tanh(a @ w)
        c = (b * a) @ w.T
        return (c * a + b).clip(-2, 2), state @ w

    w, xs, state = draw(20, 20), draw(4, 9, 20), draw(9, 20, seed=1)
    found = run(step, w, state, xs)
    expected = jax.lax.scan(partial(step, w), state, xs)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        found,
        expected,
    )


def test_states_change_places():
    def step(_, state, x):
        a, b, c = state
        return (b, c + x, a), (a, b)

    state, xs = tuple(draw(40, 3, seed=i) for i in range(3)), draw(5, 40, 3)
    found, expected = run(step, (), state, xs), jax.lax.scan(
        lambda state, x: step((), state, x), state, xs
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found, expected)


UNSUITED = {
    "uses the operation sin": lambda w, h, x: (jnp.sin(h), x),
    "uses the operation cumsum": lambda w, h, x: (jnp.cumsum(h, -1), x),
    "slices the batch": lambda w, h, x: (h, h[:2] @ w),
    "pads the batch": lambda w, h, x: (h, jnp.pad(h, ((1, 0), (0, 0)))),
    "concatenates along the batch": lambda w, h, x: (h, jnp.concatenate([h, h])),
    "by a matrix that differs": lambda w, h, x: (h, contract(h, x)),
    "a product other than of rows": lambda w, h, x: (h, h @ w.reshape(2, 4, 2)),
    "an array .* by transpose": lambda w, h, x: (h, w @ h.T),
    "the step computes in int32": lambda w, h, x: (h, x.astype(jnp.int32)),
    "the step computes in bfloat16": lambda w, h, x: (h.astype(jnp.bfloat16) * 1.0, x),
    "to a sum over the rows": lambda w, h, x: (h - h.sum(0)[None], x),
    "an array .* by reshape": lambda w, h, x: (h, h.reshape(3, 2, 2)),
    "the step computes in int": lambda w, h, x: (h, h * halved(x)),
    "width 6, which is not a multiple of 4": lambda w, h, x: (h, jnp.ones((3, 6))),
    "width 3, which is not a multiple of 4": lambda w, h, x: (
        h,
        jnp.broadcast_to(w[0, :3], (3, 3)),
    ),
    "takes 1[0-9]+ instructions": lambda w, h, x: (wide(h), x),
    "needs [0-9]+ vectors": lambda w, h, x: (tangled(h), x),
}


def halved(x):
    numbers = jnp.where(x > 0, jnp.int32(3), jnp.int32(2))
    return jax.lax.div(numbers, jnp.full_like(numbers, 2)).astype(x.dtype)


def contract(a, b):
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))


def wide(h):
    for _ in range(600):
        h = jnp.tanh(h) * h
    return h


def tangled(h):
    parts = [jnp.tanh(h + i) for i in range(100)]
    return sum(a * b for a, b in zip(parts, parts[::-1], strict=True)) + sum(parts)


@pytest.mark.parametrize("reason", UNSUITED)
def test_what_is_no_program_is_refused(reason):
    with pytest.raises(Unsuited, match=reason):
        run(UNSUITED[reason], draw(4, 4), draw(3, 4), draw(2, 3, 4))


# Cells.


@jlstm.config
class Gated:
    """A vector made in update, a number for each row, relu, a carry of two widths."""

    hidden_size: int

    def init(self, key, x):
        size, draws = self.hidden_size, iter(jax.random.split(key, 4))
        normal = jax.nn.initializers.normal(0.5)
        return {
            "w": normal(next(draws), (x.shape[-1], size), x.dtype),
            "u": normal(next(draws), (2 * size, size), x.dtype),
            "scalar": normal(next(draws), (2 * size, 1), x.dtype),
            "vector": normal(next(draws), (size,), x.dtype),
        }

    def init_carry(self, params, batch_shape):
        size, dtype = self.hidden_size, params["w"].dtype
        return {
            "long": jnp.zeros((*batch_shape, 2 * size), dtype),
            "short": jnp.zeros((*batch_shape, size), dtype),
        }

    def project(self, params, x):
        return x @ params["w"]

    def mix(self, params, carry, zx):
        long = carry["long"]
        return jnp.tanh(long) @ params["u"] + zx, long @ params["scalar"]

    def update(self, params, carry, zx, zh):
        wide, narrow = zh
        gate = jax.nn.sigmoid(narrow)
        vector = jnp.tanh(params["vector"]) - jnp.exp(-params["vector"]) / 3
        new = gate * jax.nn.relu(wide + vector[None]) + carry["short"] / 2
        old, _ = jnp.split(carry["long"], 2, axis=-1)
        return {"long": jnp.concatenate([new, old], -1), "short": jnp.sin(0) + new}, new

    def step(self, params, carry, x):
        zx = self.project(params, x)
        return self.update(params, carry, zx, self.mix(params, carry, zx))


@jlstm.config
class Narrow(Gated):
    """Two numbers of each row in the carry, which every column reads."""

    def init_carry(self, params, batch_shape):
        h = jnp.zeros((*batch_shape, self.hidden_size), params["w"].dtype)
        return {"h": h, "a": jnp.ones_like(h[:, :1]), "b": jnp.ones_like(h[:, :1])}

    def mix(self, params, carry, zx):
        return carry["h"] @ params["u"][: self.hidden_size] + zx

    def update(self, params, carry, zx, zh):
        del zx
        new = jnp.tanh(zh) * carry["a"] + carry["b"] * params["vector"][None]
        return {"h": new, "a": 0.9 * carry["b"], "b": carry["a"] + 0.1}, new


@jlstm.config
class Flagged:
    """Booleans in the carry, and nothing of the inputs but their number."""

    hidden_size: int

    def init(self, key, x):
        return MGU(self.hidden_size).init(key, x)

    def init_carry(self, params, batch_shape):
        h = MGU(self.hidden_size).init_carry(params, batch_shape)
        return {"h": h, "seen": jnp.zeros(h.shape, bool)}

    def project(self, params, x):
        return ()

    def mix(self, params, carry, zx):
        return MGU(self.hidden_size).mix(params, carry["h"], carry["h"])

    def update(self, params, carry, zx, zh):
        new = jnp.tanh(zh[:, : self.hidden_size]) + 0.1
        seen = carry["seen"] | (new > 0.2)
        return {"h": new, "seen": seen}, jnp.where(seen, new, 2 * new)

    def step(self, params, carry, x):
        return self.update(params, carry, (), self.mix(params, carry, ()))


CASES = [
    # cell, rows, steps, features, how steps are masked, reverse, checkpoint_every
    (MGU(5), 3, 40, 2, "", False, None),
    (MGU(33), 7, 6, 5, "mask", True, None),
    (Gated(6), 35, 7, 3, "mask", False, None),
    (Gated(3), 5, 7, 3, "resets", True, 3),
    (Gated(128), 3, 4, 3, "mask", False, None),  # numbers of rows by whole chunks
    (Narrow(48), 3, 5, 3, "resets", False, None),  # rows that end inside chunks
    (Narrow(160), 5, 5, 3, "mask", True, 2),
    (jlstm.LSTM(37, double_bias=True), 13, 6, 5, "lengths", False, None),
    (jlstm.LSTM(16), 21, 40, 4, "resets", True, None),  # several blocks of steps
    (jlstm.LSTM(128), 2, 3, 2, "", True, 2),  # whole chunks of one row
    (jlstm.LSTM(6), 40, 5, 4, "lengths", True, 2),  # steps project their inputs
    (jlstm.LSTM(1), 1, 2, 1, "", False, None),
    (jlstm.GRU(20, learned_carry=True), 9, 12, 3, "resets", False, 5),
    (jlstm.GRU(8, reset_after=False), 4, 5, 3, "mask", False, None),
    (jlstm.Elman(70), 2, 3, 3, "", True, None),
    (jlstm.Elman(4, activation=jax.nn.softplus), 3, 4, 2, "lengths", False, None),
    (jlstm.Elman(4, activation=jax.nn.relu), 3, 4, 2, "none", False, None),
]


def check_cell(cell, batch, time, size, kind, reverse, every):
    args, cotangents = test_native.arguments(cell, batch, time, size)
    options = {"kind": kind, "reverse": reverse}
    expected = test_native.results(scan, cell, args, cotangents, double=True, **options)
    found = test_native.results(fused, cell, args, cotangents, every=every, **options)
    test_native.check(found[0], expected[0], TOLERANCE["float32"])
    test_native.check(found[1], expected[1], test_native.GRADIENT_TOLERANCE)


@pytest.mark.core
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_loop_equals_the_reference(case, monkeypatch):
    bound, bind = [], program.bind
    monkeypatch.setattr(
        program, "bind", lambda *args: bound.append(bind(*args)) or bound[-1]
    )
    check_cell(*case)
    assert len(bound) >= 2  # forward and backward, both in C++


def gradient(cell, params, xs, **options):
    carry = cell.init_carry(params, xs.shape[:1])

    def score(params, xs):
        ys, carry_, carries = fused.unroll(cell, params, xs, carry, carry, **options)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves((ys, carry_, carries)))

    return jax.grad(score, (0, 1))(params, xs)


def setting(cell, *shape):
    xs = draw(*shape)
    return cell.init(jax.random.key(0), xs[:, 0]), xs


def test_loops_of_both_directions_run_in_cpp():
    cell = jlstm.LSTM(4)
    assert count(partial(gradient, cell), *setting(cell, 3, 1, 2)) == (0, 0)  # one step
    args = setting(cell, 3, 5, 2)
    assert count(partial(gradient, cell), *args) == (2, 0)
    every = partial(gradient, cell, checkpoint_every=2)
    assert count(every, *args) == (6, 0)  # two segments, and the steps run again


def test_gradient_of_a_gradient_equals_that_of_xla(monkeypatch):
    cell = MGU(3)
    params, xs = setting(cell, 3, 4, 2)

    def penalty(params, xs):
        grads = gradient(cell, params, xs, return_carries=True)
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(grads))

    found = jax.jit(jax.grad(penalty, (0, 1)))(params, xs)
    monkeypatch.setattr(product, "why_not", lambda request: "left out")
    expected = jax.jit(jax.grad(penalty, (0, 1)))(params, xs)
    test_native.check(found, expected, test_native.GRADIENT_TOLERANCE)


@pytest.mark.parametrize(
    "over", ["rows", "params", pytest.param("both", marks=pytest.mark.slow)]
)
def test_map_equals_a_loop(over):
    cell = MGU(3)
    params, xs = setting(cell, 4, 5, 2)
    axes = (None if over == "rows" else 0, None if over == "params" else 0)
    stack = partial(jax.tree.map, lambda leaf: np.stack([leaf, 2 * leaf]))
    args = [
        tree if axis is None else stack(tree)
        for tree, axis in zip((params, xs), axes, strict=True)
    ]
    mapped = jax.jit(jax.vmap(partial(gradient, cell), axes))(*args)
    one = jax.jit(partial(gradient, cell))
    for i in range(2):
        alone = [
            tree if axis is None else jax.tree.map(lambda leaf, i=i: leaf[i], tree)
            for tree, axis in zip(args, axes, strict=True)
        ]
        found = jax.tree.map(lambda leaf, i=i: leaf[i], mapped)
        test_native.check(found, one(*alone), 1e-5)


def test_gradients_do_not_depend_on_what_else_runs():
    loop = jax.jit(partial(gradient, MGU(64)))
    args = setting(MGU(64), 64, 40, 64)
    jax.tree.map(np.testing.assert_array_equal, loop(*args), loop(*args))


def test_padding_of_nan_is_inert():
    cell, lengths = MGU(4), np.array([3, 0, 5])
    params, xs = setting(cell, 3, 5, 2)
    mask: Any = np.arange(5) < lengths[:, None]
    spoiled = np.where(mask[..., None], xs, np.nan)
    carry = draw(3, 4, seed=2)

    def out(params, xs):
        xs = jlstm.zero_rows(mask, xs)
        return fused.unroll(cell, params, xs, carry, carry, mask=mask)[:2]

    found, expected = jax.jit(out)(params, spoiled), jax.jit(out)(params, xs)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    np.testing.assert_array_equal(found[1][1], carry[1])


@dataclasses.dataclass(frozen=True)
class Normed:
    """A gated cell whose arithmetic crosses columns."""

    hidden_size: int

    init, init_carry = MGU.init, MGU.init_carry
    project, mix, step = MGU.project, MGU.mix, MGU.step

    def update(self, params, carry, zx, zh):
        z = jnp.tanh(zx + zh)[:, : self.hidden_size] + carry
        new = jnp.cumsum(z, axis=-1)
        return new, new


@jlstm.config
class OnlyForward(MGU):
    """A gated cell whose derivative is no program, though its step is."""

    def update(self, params, carry, zx, zh):
        new = square(jnp.tanh((zx + zh)[:, : self.hidden_size]))
        return new, new


@jax.custom_jvp
def square(x):
    return x * x


@square.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    return x * x, jnp.cos(jnp.arccos(x)) * 2 * dx


def test_booleans_stay_booleans(monkeypatch):
    monkeypatch.setattr(fused, "BYTES", 1)
    cell, mask = Flagged(5), np.arange(20) < np.array([20, 0, 13])[:, None]
    params, xs = setting(cell, 3, 20, 2)
    carry = {"h": draw(3, 5, seed=1), "seen": draw(3, 5, seed=2) > 1}

    def results(kernel):
        def score(params, h):
            before = {**carry, "h": h}
            ys, after, _ = kernel.unroll(cell, params, xs, before, before, mask=mask)
            return (ys**2).sum() + after["h"].sum(), (ys, after)

        scores = jax.value_and_grad(score, (0, 1), has_aux=True)
        return jax.jit(scores)(params, carry["h"])

    (_, (ys, after)), grads = results(fused)
    (_, (ys_, after_)), grads_ = results(scan)
    test_native.check((ys, after["h"], grads), (ys_, after_["h"], grads_), 1e-5)
    np.testing.assert_array_equal(after["seen"], after_["seen"])
    assert after["seen"].dtype == bool


def test_explanation_says_where_steps_run(monkeypatch):
    cell = jlstm.Elman(3)
    monkeypatch.setattr(door, "may_be_sharded", lambda: False)
    assert str(jlstm.explain(cell)).startswith("fused runs, its steps in C++\n")
    assert jlstm.explain(jlstm.LSTM(3)).note == ""
    assert jlstm.explain(cell, jnp.ones((2, 1, 4))).note == "one step, in XLA"
    assert jlstm.explain(Normed(3)).note == (
        "its products in C++, the rest of its steps in XLA: the step "
        "uses the operation cumsum, which C++ does not have"
    )
    assert jlstm.explain(cell, jnp.ones((2, 3, 4), int)).note != "its steps in C++"
    assert jlstm.explain(OnlyForward(3)).note.endswith(
        "operation acos, which C++ does not have"
    )
    note = jlstm.explain(cell, jnp.ones((2, 3, 4), jnp.bfloat16)).note
    assert (
        note == "its steps in XLA: the C++ loops compute only in float32, got bfloat16"
    )
    mixed = jlstm.Precision(cell, jlstm.Policy(compute=jnp.bfloat16))
    assert (
        jlstm.explain(mixed).note
        == "its steps in XLA: the step computes in bfloat16, and C++ only in float32"
    )
    monkeypatch.setattr(library, "why_not", lambda: "is turned off by JLSTM_NATIVE=0")
    note = jlstm.explain(cell).note
    assert note == "its steps in XLA: the C++ library is turned off by JLSTM_NATIVE=0"
    assert "on a gpu" in str(product.why_not(Request(platform="gpu")))
    assert "call it inside jax.shard_map" in str(product.why_not(Request(sharded=True)))
