"""Diagnostics against closed forms: pinned, linear and chaotic recurrences."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlstm
from jlstm import diagnostics
from jlstm.cells.gates import naming
from jlstm.diagnostics.elementwise import diagonal, is_elementwise
from jlstm.diagnostics.text import background
from jlstm.layers import run_layer
from jlstm.testing import random_like

B, T, D, H = 2, 6, 3, 4
KEY = jax.random.key(0)
dx: Any = diagnostics  # takes NumPy arrays and lists too
LENGTHS = np.array([T, 4])
RESETS = np.zeros((B, T), bool)
RESETS[0, 3] = True


@pytest.fixture(autouse=True)
def _double(request):
    # What is read from a checkpoint is read by threads, which know nothing of it.
    with jax.enable_x64("interruption" not in request.node.name):
        yield


def close(got, expected, tolerance=1e-12):
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def made(layer: Any, xs: Any) -> Any:
    """Random params; an initialiser takes longer to compile than all the rest."""
    first = jax.tree.map(lambda leaf: jnp.asarray(leaf[:, 0]), xs)
    example = jax.tree.map(jnp.asarray, xs) if hasattr(layer, "apply") else first
    shapes = jax.eval_shape(layer.init, KEY, example)
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.5, s.shape)), shapes)


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def linear(matrix: np.ndarray) -> tuple[Any, Any]:
    """A cell of which a step is ``h @ matrix + x``."""
    cell = jlstm.Elman(len(matrix), activation=jax.nn.identity)
    params = made(cell, np.zeros((1, 1, len(matrix))))
    eye, zeros = np.eye(len(matrix)), np.zeros(len(matrix))
    return cell, params.replace(w_ih=eye, w_hh=matrix, b=zeros)


def pinned(i: float, f: float, g: float, o: float) -> tuple[Any, Any]:
    """An LSTM whose gates are the same at all steps: weights 0, these biases."""
    cell = jlstm.LSTM(H)
    params = jax.tree.map(jnp.zeros_like, made(cell, np.zeros((1, 1, D))))
    return cell, params.replace(b=np.repeat([i, f, g, o], H).astype(float))


@dataclasses.dataclass(frozen=True)
class Logistic:
    """The map x' = 4 x (1 - x), whose Lyapunov exponent is log 2."""

    def init(self, key, x):
        return ()

    def init_carry(self, params, batch_shape):
        return jnp.full((*batch_shape, 1), 0.3)

    def step(self, params, carry, x):
        new = 4 * carry * (1 - carry) + 0 * x
        return new, new


@dataclasses.dataclass(frozen=True)
class Mine:
    """A user's cell, which names no gates and compiles its own step."""

    hidden_size: int = H

    def init(self, key, x):
        return jax.random.normal(key, (x.shape[-1] + self.hidden_size, 2 * H))

    def init_carry(self, params, batch_shape):
        return jnp.zeros((*batch_shape, self.hidden_size))

    def step(self, params, carry, x):
        return _step(params, carry, x)


@jax.jit
def _step(params, h, x):
    f, n = jlstm.gates(jnp.concatenate([x, h], -1) @ params, "st")
    h = f * h + (1 - f) * n
    return h, h


@dataclasses.dataclass(frozen=True)
class Twice:
    """A user's layer that unrolls a cell by itself, twice."""

    cell: Any

    def init(self, key, xs):
        return jlstm.RNN(self.cell).init(key, xs)

    def init_carry(self, params, batch_shape):
        return ()

    def apply(self, params, xs, carry=None, *, key=None, **masking):
        ys, _ = jlstm.unroll(self.cell, params, xs, **masking)
        zs, _ = jlstm.unroll(self.cell, params, xs, reverse=True, **masking)
        return ys + zs, ()


# Traces.


@pytest.mark.parametrize("reverse", [False, True])
def test_trace_of_a_gru_equals_its_formula(reverse):
    cell, xs, start = jlstm.GRU(H), draw(B, T, D), draw(B, H, seed=1)
    params = made(cell, xs)
    masking: Any = {"lengths": LENGTHS, "resets": RESETS}
    carry = jlstm.cells.GRUCarry(jnp.asarray(start))
    found = dx.trace(cell, params, xs, carry, reverse=reverse, **masking)
    p = jax.tree.map(np.asarray, params)
    w_r, w_z, w_n = np.split(p.w_hh, 3, axis=1)
    x_r, x_z, x_n = np.split(xs @ p.w_ih + p.b, 3, axis=-1)
    for row in range(B):
        h = start[row]
        steps = range(LENGTHS[row])
        for t in reversed(steps) if reverse else steps:
            begins = t + 1 < T and RESETS[row, t + 1] if reverse else RESETS[row, t]
            h = np.zeros(H) if begins else h
            r = sigmoid(x_r[row, t] + h @ w_r)
            z = sigmoid(x_z[row, t] + h @ w_z)
            n = np.tanh(x_n[row, t] + r * (h @ w_n + p.b_hh))
            close(found.before.h[row, t], h)
            h = (1 - z) * n + z * h
            for name, value in {"r": r, "z": z, "n": n}.items():
                close(found.gates[name][row, t], value)
            close(found.retention["h"][row, t], z)
            close(found.memory["h"][row, t], h)
            close(found.outputs[row, t], h)
            assert found.begins[row, t] == begins
    assert found.valid.sum(1).tolist() == LENGTHS.tolist()
    assert found.ranges == {"r": (0, 1), "z": (0, 1), "n": (-1, 1)}


def test_traces_of_a_model_are_found_by_path_and_change_nothing():
    tokens = np.array([[1, 2, 3, 4], [1, 1, 0, 0]])
    body = jlstm.stack(
        jlstm.Embed(7, D),
        jlstm.bidirectional(jlstm.Zoneout(jlstm.CIFG(D), 0.1, 0.2), merge="sum"),
        jlstm.Residual(
            jlstm.RNN(jlstm.Elman(D), policy=jlstm.Policy(carry=jnp.float64))
        ),
        Twice(jlstm.Elman(D)),
    )
    model = jlstm.Classifier(body, num_classes=2, pooling="mean")
    params, lengths = made(model, tokens), [4, 2]
    found = dx.trace(model, params, tokens, lengths=lengths)
    expected, _ = model.apply(params, tokens, lengths=jnp.array(lengths))
    close(found.outputs, expected)
    assert list(found) == [
        "encoder.stack[1].forward",
        "encoder.stack[1].backward",
        "encoder.stack[2].Residual",
        "encoder.stack[3]",
        "encoder.stack[3] (2)",
    ]
    forward = found["encoder.stack[1].forward"]
    assert list(forward.gates) == ["f", "g", "o"]
    close(forward.retention["c"], 0.2 + 0.8 * forward.gates["f"])  # the expectation
    assert found["encoder.stack[1].backward"].reverse
    assert found["encoder.stack[2].Residual"].cell.cell == jlstm.Elman(D)
    assert "2 rows of 4 steps, in reverse, 6 valid" in repr(found)
    with pytest.raises(KeyError, match=r"there are 'encoder\.stack"):
        found["stack"]


def test_gates_without_names_are_numbered_and_found_inside_a_users_jit():
    cell, xs = Mine(), draw(B, T, D)
    params = made(cell, xs)
    cell.step(params, jnp.zeros((B, H)), xs[:, 0])  # compiled before
    found = dx.trace(cell, params, xs)
    assert list(found.gates) == ["s0", "t1"]
    # Of a step alone, the diagonal of its Jacobian.
    whole = jax.jacobian(lambda h: cell.step(params, h, xs[0, 2])[0])
    expected = np.diagonal(jax.jit(whole)(found.before[0, 2]))
    close(found.retention["carry"][0, 2], expected)


def test_names_change_no_program():
    cell, x = jlstm.LSTM(H), jnp.zeros((B, D))
    params = made(cell, np.zeros((B, 1, D)))

    def program():
        return str(jax.make_jaxpr(cell.step)(params, cell.init_carry(params, (B,)), x))

    expected = program()
    with naming() as values:
        assert program() == expected
    assert [each.name for each in values] == ["i", "f", "g", "o"]
    assert program() == expected


def test_retention_of_what_update_mixes_is_a_diagonal():
    w = draw(H, H)
    own = {
        "gate": lambda c: [jlstm.gates(jnp.concatenate([c, 2 * c], -1), "st")[1] * c],
        "other": lambda c: [jnp.full_like(c, 2.0)],
    }
    mixed = {
        "product": lambda c: [c + jnp.tanh(c) @ w],
        "roll": lambda c: [jnp.roll(c, 1, axis=-1)],
        "split": lambda c: [jnp.concatenate(jnp.split(c, 2, -1)[::-1], -1)],
        "sum": lambda c: [c - c.mean(-1, keepdims=True)],
        "turn": lambda c: [jnp.flip(c, -1)],
        "running": lambda c: [jnp.cumsum(c, -1)],
    }
    c = jnp.asarray(draw(B, H, seed=3))
    for name, function in (own | mixed).items():
        assert is_elementwise(function, c) == (name in own), name
        if name in ("gate", "product", "roll"):
            got = jax.jit(diagonal, static_argnums=0)(function, c)[0]
            row = jax.jacobian(lambda r, f=function: f(r[None])[0][0])
            close(got[0], np.diagonal(jax.jit(row)(c[0])))
    cell, xs = jlstm.GRU(H, reset_after=False), draw(B, T, D)
    found = dx.trace(cell, made(cell, xs), xs)
    assert (abs(found.retention["h"] - found.gates["z"]) > 1e-3).any()


# Memory.


def test_memory_of_pinned_gates_is_exact():
    cell, params = pinned(0.5, 2.0, -0.3, 1.0)
    xs = draw(B, T, D)
    start = jlstm.cells.LSTMCarry(jnp.zeros((B, H)), jnp.full((B, H), 3.0))
    found = dx.trace(cell, params, xs, start)
    f, write = sigmoid(2.0), sigmoid(0.5) * np.tanh(-0.3)
    close(found.retention["c"], np.full((B, T, H), f))
    close(found.retention["h"], np.zeros((B, T, H)))
    steps = dx.time_constants(found).steps
    close(steps["c"], np.full(H, -1 / np.log(f)))
    assert (steps["h"] == 0).all()
    written = dx.writes(found)
    powers = f ** np.arange(T - 1, -1, -1)
    close(written.by_step["c"][0, :, 0], write * powers)
    close(written.by_initial["c"], np.full((B, H), 3 * f**T))
    assert (written.largest["c"] == -1).all()
    ends = dx.saturation(found)
    assert ends.low["i"].tolist() == ends.high["f"].tolist() == [0.0] * H
    assert "f: 0.0% of steps in the lowest" in repr(ends)
    open_, _ = pinned(0, 0, 0, 0)
    ends = dx.saturation(dx.trace(open_, pinned(3.0, -3.0, -2.0, 0)[1], xs))
    assert [ends.high["i"][0], ends.low["f"][0], ends.low["g"][0]] == [1, 1, 1]
    assert dx.dead_units(found).sizes == {"h": H, "c": H}


@pytest.mark.parametrize("reverse", [False, True])
def test_writes_sum_to_the_carry_and_a_reset_cuts_them(reverse):
    cell, xs = jlstm.LSTM(H), draw(B, T, D)
    mask = np.ones((B, T), bool)
    mask[0, 1] = mask[1, 4:] = False
    params = made(cell, xs)
    start = random_like(cell.init_carry(params, (B,)), seed=3)
    options: Any = {"mask": mask, "resets": RESETS, "reverse": reverse}
    found = dx.trace(cell, params, xs, start, **options)
    written = dx.writes(found)
    last = 0 if reverse else T - 1
    for name, steps in written.by_step.items():
        total = steps.sum(1) + written.by_initial[name]
        close(total, found.memory[name][:, last])
        assert (steps[~mask] == 0).all()
        cut = steps[0, 3:] if reverse else steps[0, :3]
        assert (cut == 0).all()
        assert (written.by_initial[name][0] == 0).all()
    assert (written.by_initial["c"][1] != 0).all()
    assert re.match(r"h: most was written at steps \d \(\d+%\), ", repr(written))


def test_memory_of_an_lru_is_complex():
    cell, xs = jlstm.LRU(H), draw(B, T, D)
    params = made(cell, xs)
    found = dx.trace(cell, params, xs)
    modulus = np.exp(-np.exp(np.asarray(params.nu_log)))
    close(abs(found.retention["s"]), np.broadcast_to(modulus, (B, T, H)))
    close(dx.time_constants(found).steps["s"], -1 / np.log(modulus))
    written = dx.writes(found).by_step["s"]
    re, im = (np.asarray(leaf)[:, -1] for leaf in found.carries)
    close(written.sum(1), re + 1j * im)


def test_dead_units_are_those_that_do_not_move():
    cell, xs = jlstm.Elman(H), draw(B, T, D)
    params = made(cell, xs)
    still = np.array([[1.0, 0.0, 1.0, 0.0]])
    params = params.replace(w_ih=params.w_ih * still, w_hh=params.w_hh * still)
    found = dx.dead_units(dx.trace(cell, params, xs))
    assert found.units["h"].tolist() == [1, 3]
    assert repr(found) == "h: 2 of 4 dead: 1, 3"


# Gradients.


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_gradient_flow_equals_differentiating_the_rest(reverse):
    cell, xs, weights = jlstm.LSTM(H), draw(B, T, D), draw(B, T, H, seed=5)
    params = made(cell, xs)
    masking: Any = {"lengths": LENGTHS, "resets": RESETS, "reverse": reverse}

    def loss(ys):
        return (weights * jnp.sin(ys)).sum()

    flow = dx.gradient_flow(cell, params, xs, loss, **masking)["RNN"]
    ys, _, carries = jlstm.unroll(cell, params, xs, return_carries=True, **masking)

    def rest(carry, t):
        # The steps after t, from its carry; and its own output, which is its h.
        part = slice(0, t) if reverse else slice(t + 1, T)
        here = jnp.where(flow.valid[:, t, None], carry.h, 0.0)
        value = (weights[:, t] * jnp.sin(here)).sum()
        if part.start == part.stop:
            return value
        options = dict(masking, resets=RESETS[:, part])
        options["mask"] = flow.valid[:, part]
        del options["lengths"]
        if reverse:  # a boundary after the steps left is one before them
            start = jax.tree.map(lambda c: jnp.where(RESETS[:, t, None], 0.0, c), carry)
        else:
            start = carry
        zs, _ = jlstm.unroll(cell, params, xs[:, part], start, **options)
        return value + (weights[:, part] * jnp.sin(zs)).sum()

    for t in (3,) if reverse else (1, 3):
        carry = jax.tree.map(lambda leaf, t=t: leaf[:, t], carries)
        expected = jax.jit(jax.grad(rest), static_argnums=1)(carry, t)
        seen = flow.valid[:, t]
        for name in ("h", "c"):
            norm = np.linalg.norm(getattr(expected, name), axis=-1)
            close(flow.carries[name][seen, t], norm[seen])
    above = np.linalg.norm(weights * np.cos(ys) * flow.valid[..., None], axis=-1)
    close(flow.outputs, above)
    assert (flow.norm[~flow.valid] == 0).all()


def test_gradient_flow_goes_through_a_model_and_stops_at_resets():
    layer = jlstm.stack(jlstm.bidirectional(jlstm.MinGRU(H)), jlstm.RNN(jlstm.Elman(H)))
    xs, resets = draw(B, T, D), np.zeros((B, T), bool)
    resets[:, 3] = True
    params = made(layer, xs)

    def loss(ys):
        return (ys[:, -1] ** 2).sum()

    flow = dx.gradient_flow(layer, params, xs, loss, resets=resets)
    ys, _ = layer.apply(params, xs, resets=jnp.asarray(resets))
    close(flow.loss, loss(ys))
    assert list(flow) == ["stack[0].forward", "stack[0].backward", "stack[1]"]
    top = flow["stack[1]"]
    close(top.outputs[:, -1], 2 * np.linalg.norm(ys[:, -1], axis=-1))
    for each in flow.values():
        assert (each.norm[:, :3] == 0).all()
        assert (each.norm[:, 3:] > 0).all()
    assert repr(flow).startswith("loss ")


def test_jacobians_of_a_linear_recurrence_are_powers():
    q, _ = np.linalg.qr(draw(3, 3))
    eigenvalues = np.array([0.9, -0.6, 0.3])
    cell, params = linear(q @ np.diag(eigenvalues) @ q.T)
    xs = draw(B, 120, 3)
    norms = dx.jacobian_norms(cell, params, xs)
    close(norms.norms, np.broadcast_to(0.9**norms.lags, norms.norms.shape))
    close(norms.halving, np.log(2) / -np.log(0.9), 1e-9)
    assert norms.half_life == 7
    close(norms.memory_length, (1 - 0.9**120) / 0.1)
    first = dx.jacobian_norms(cell, params, xs, part="h", anchor="first")
    close(first.log_norms, norms.log_norms)
    found = dx.spectrum(cell, params, xs[:, :2])
    close(found.eigenvalues[0, 1], eigenvalues, 1e-9)
    close(found.singular_values[1, 0], abs(eigenvalues), 1e-9)
    exponents = dx.lyapunov_exponents(cell, params, xs, skip=80).exponents
    close(exponents, np.broadcast_to(np.log(abs(eigenvalues)), (B, 3)), 1e-9)


def test_jacobian_norms_do_not_underflow_and_equal_a_product():
    cell, params = linear(1e-6 * np.eye(2))
    norms = dx.jacobian_norms(cell, params, np.zeros((1, 100, 2)))
    close(norms.log_norms[0], norms.lags * np.log(1e-6), 1e-9)
    cell, xs = jlstm.LSTM(H), draw(1, T, D)
    params = made(cell, xs)
    found = dx.trace(cell, params, xs)
    product = np.eye(H)
    jacobian = jax.jit(jax.jacobian(lambda c, x: cell.step(params, c, x)[0]))
    for t in range(T):
        carry = jax.tree.map(lambda leaf, t=t: leaf[0, t], found.before)
        step = jacobian(carry, xs[0, t])
        whole = np.block([[step.h.h, step.h.c], [step.c.h, step.c.c]])
        product = whole if t == 0 else whole @ product
    for anchor in ("first", "last"):
        norms = dx.jacobian_norms(cell, params, xs, part="h", anchor=anchor)
        close(norms.norms[0, -1], np.linalg.norm(product[:H, :H], 2), 1e-9)


def test_lyapunov_exponent_of_the_logistic_map_is_log_2():
    found = dx.lyapunov_exponents(Logistic(), (), np.zeros((1, 20_000, 1)))
    close(found.exponents, [[np.log(2)]], 2e-3)
    assert "expands" in repr(found)


def test_verdict_measures_and_compares():
    cell, xs = jlstm.LSTM(H, forget_bias=0.0), np.zeros((1, 80, D))
    params = jax.tree.map(jnp.zeros_like, made(cell, xs))
    found = dx.verdict(cell, params, xs, part="c")
    assert (found.word, found.steps) == ("vanish", pytest.approx(1.0))
    other = found.others["forget_bias=1.0"].halving
    close(other, np.log(2) / -np.log(sigmoid(1.0)), 1e-9)
    assert "they halve every 1 step (norm 0.5 after 1 step," in repr(found)
    assert repr(found).endswith(
        "with forget_bias=1.0 they would halve every 2.21 steps"
    )
    hold = dx.verdict(*linear(np.eye(2)), np.zeros((1, 9, 2)))
    assert repr(hold).startswith("gradients hold: they change by less than a factor 2")
    grow = dx.verdict(*linear(1.1 * np.eye(2)), np.zeros((1, 20, 2)))
    assert grow.word == "explode"
    assert grow.steps == pytest.approx(np.log(2) / np.log(1.1))


# Attribution.


@pytest.mark.parametrize("method", ["integrated", "gradient_times_input", "gradient"])
def test_attribution_of_a_linear_recurrence_is_exact(method):
    matrix, xs = 0.5 * draw(H, H), draw(B, T, H)
    cell, params = linear(matrix)
    options: Any = {"method": method, "lengths": LENGTHS, "points": 1}

    def target(ys):
        return ys.sum((1, 2)) if method == "gradient" else ys[:, 3, 0]

    found = dx.attribute(cell, params, xs, target, **options)
    if method == "gradient":
        assert (found.steps[1, 4:] == 0).all()
        assert (found.steps[:, :4] > 0).all()
        return
    powers = [np.linalg.matrix_power(matrix, 3 - t) for t in range(4)]
    expected = np.einsum("btd,tdh->bth", xs[:, :4], powers)[..., 0]
    close(found.steps[:, :4], expected)
    close(found.steps.sum(1), found.values)
    without = dx.occlude(cell, params, xs, target, baseline=0.0, lengths=LENGTHS)
    close(without.steps, found.steps)
    assert repr(found).startswith("row 0, of ")


def test_occlusion_masks_tokens():
    model = jlstm.Classifier(jlstm.stack(jlstm.Embed(7, D), jlstm.RNN(jlstm.GRU(H))), 2)
    tokens, lengths = np.array([[1, 2, 3], [4, 0, 0]]), np.array([3, 1])
    params = made(model, tokens)
    found = dx.occlude(model, params, tokens, lambda y: y[:, 1], lengths=lengths)
    for t in (1,):
        mask: Any = np.arange(3) < lengths[:, None]
        whole, _ = model.apply(params, tokens, mask=mask)
        less, _ = model.apply(params, tokens, mask=mask & (np.arange(3) != t))
        close(found.steps[:, t], (whole - less)[:, 1])
    assert (found.steps[1, 1:] == 0).all()


def test_coloured_text_is_escaped_and_readable():
    text = dx.colour_text("<b>&\n", [1.0, -1.0, 0.1, np.nan, 0.5])
    assert "<b>" not in text.html
    assert "&lt;" in text.html
    assert "&amp;" in text.html
    assert 'title="-1"' in text.html
    assert text.text == "<b>&↵\n#=  +"

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [
            p / 12.92 if p <= 0.04 else ((p + 0.055) / 1.055) ** 2.4 for p in parts
        ]
        return np.dot(parts, [0.2126, 0.7152, 0.0722]) + 0.05

    for part in np.linspace(-1, 1, 21):
        assert luminance(background(part)) / luminance("#111111") > 7


# A hook, and pictures.


def a_watch(**options: Any) -> tuple[Any, Any]:
    layer, xs = jlstm.stack(jlstm.RNN(jlstm.LSTM(H)), jlstm.Dense(1)), draw(B, T, D)
    watch = dx.watch(layer, xs, lambda ys: (ys[:, -1] ** 2).sum(), **options)
    return watch, made(layer, xs)


def test_watch_measures_at_its_steps_and_remembers():
    watch, params = a_watch(every=100)
    state = jlstm.train.create_state(params, jlstm.train.adamw(1e-3))
    reports = [
        jlstm.train.Report(step, 250, state, {}, {}, 0.0, 50)
        for step in (50, 100, 150, 200, 250)
    ]
    for report in reports[:2]:
        watch(report)
    assert all(len(report.metrics) == 5 for report in reports[:2])
    saved = watch.get_state()
    saved["records"] = json.loads(json.dumps(saved["records"]))
    other, _ = a_watch(every=100)
    other.set_state(saved, reports[1])
    for report in reports[2:]:
        other(report)
    assert [record["step"] for record in other.records] == [50, 100, 200, 250]
    assert reports[2].metrics == {}
    assert [len(curves) for curves in other.curves.values()] == [4]
    metrics = reports[4].metrics
    found = dx.trace(watch._layer, params, watch._xs)
    expected = np.median(dx.time_constants(found).steps["c"])
    close(metrics["diagnostics/stack[0]/time_constant"], expected)
    assert metrics["diagnostics/stack[0]/gradient_reach"] > 0
    assert sorted(other.figures()) == ["diagnostics", "gradient_flow"]


@pytest.mark.slow
def test_watch_survives_an_interruption(tmp_path):
    watch, params = a_watch(every=10)

    def loss_fn(params, batch, *, key, carry):
        ys, _ = watch._layer.apply(params, batch)
        return (ys**2).mean(), jlstm.train.Aux({})

    def fit(name, num_steps):
        watch, _ = a_watch(every=10, plots=tmp_path / name)
        tx = jlstm.train.adamw(1e-2)
        state = jlstm.train.create_state(jax.tree.map(jnp.copy, params), tx)
        jlstm.train.fit(
            state,
            jlstm.train.make_train_step(loss_fn, tx),
            [jnp.asarray(draw(B, T, D, seed=s)) for s in range(40)],
            num_steps=num_steps,
            log_every=5,
            hooks=[watch, jlstm.train.write_jsonl(tmp_path / name / "metrics.jsonl")],
            checkpoints=jlstm.train.Checkpoints(
                tmp_path / name / "checkpoints", every=5
            ),
        )
        return jlstm.train.read_jsonl(tmp_path / name / "metrics.jsonl"), watch

    whole, _ = fit("whole", 40)
    assert (tmp_path / "whole" / "gradient_flow.png").exists()
    fit("cut", 15)
    again, watch = fit("cut", 40)
    steps = [r["step"] for r in again if "diagnostics/stack[0]/dead" in r]
    assert steps == [5, 10, 15, 20, 30, 40]
    assert [record["step"] for record in watch.records] == steps
    for a, b in zip(whole, again, strict=True):
        shared = {n: v for n, v in a.items() if n != "seconds" and n in b}
        assert shared == {n: b[n] for n in shared}


def pictures() -> dict[str, Any]:
    cell, xs = jlstm.LSTM(8), draw(B, 12, D)
    params = made(cell, xs)
    found = dx.trace(cell, params, xs, lengths=[12, 9])
    flow = dx.gradient_flow(cell, params, xs, lambda ys: ys[:, -1].sum())
    norms = dx.jacobian_norms(cell, params, xs)
    attribution = dx.Attribution(draw(B, 12), None, draw(B))
    labels = ["$a", "b c", "\n", *"defghijkl"]
    return {
        "gates": lambda: dx.plot_gates(found, row=1, labels=labels),
        "units": lambda: dx.plot_gates(found, units=[0, 7]),
        "memory": lambda: dx.plot_memory(found),
        "time constants": lambda: dx.plot_time_constants(dx.time_constants(found)),
        "flow": lambda: dx.plot_gradient_flow(flow),
        "flow of c": lambda: dx.plot_gradient_flow(flow["RNN"], of="c", row=0),
        "norms": lambda: dx.plot_jacobian_norms({"LSTM": norms}, log_lags=True),
        "spectrum": lambda: dx.plot_spectrum(dx.spectrum(cell, params, xs)),
        "attribution": lambda: dx.plot_attribution(attribution, labels=labels),
        "text": lambda: dx.plot_text("a $b$\n{", draw(7)),
        "attention": lambda: dx.plot_attention(abs(draw(3, 12)), inputs=labels),
        "training": lambda: dx.plot_training(
            [{"step": 1, "diagnostics/RNN/dead": 0.0}]
        ),
        "history": lambda: dx.plot_gradient_history([1], {"RNN": [np.ones(12)]}),
    }


def test_pictures_are_figures_and_take_axes():
    import matplotlib
    from matplotlib.figure import Figure

    before = dict(matplotlib.rcParams)
    for name, draw_it in pictures().items():
        figure = draw_it()
        assert isinstance(figure, Figure), name
        assert figure.axes, name
    assert dict(matplotlib.rcParams) == before
    axes = Figure().subplots()
    assert dx.plot_attention(np.ones((2, 2)), axes=axes) is axes.figure


@pytest.mark.slow
def test_pictures_can_be_drawn(tmp_path):
    for name, draw_it in pictures().items():
        draw_it().savefig(tmp_path / f"{name}.png")


# Every cell, and mistakes.

TIMES: dict[str, Any] = {"x": draw(B, T, D), "elapsed": abs(draw(B, T))}
CELLS = {
    **{
        repr(cell): (cell, draw(B, T, D))
        for cell in [
            jlstm.CIFG(H),
            jlstm.MinLSTM(H),
            jlstm.Elman(H),
            # With the slow tests:
            jlstm.PeepholeLSTM(H),
            jlstm.SLSTM(H, num_heads=2),
            jlstm.MLSTM(H, num_heads=2),
            jlstm.LSTM(H, activation=jax.nn.relu, learned_carry=True),
            jlstm.GRU(H),
            jlstm.LSTMP(H, proj_size=2),
            jlstm.LayerNormLSTM(H),
            jlstm.LayerNormGRU(H),
            jlstm.MultiHeadLSTM(H, num_heads=2),
            jlstm.MultiHeadGRU(H, num_heads=2),
            jlstm.MGU(H),
            jlstm.MGU(H, reset_after=True),
            jlstm.IndRNN(H),
            jlstm.MinGRU(H),
            jlstm.LRU(H),
            jlstm.Zoneout(jlstm.LayerNormLSTM(H), 0.2, 0.1),
            jlstm.VariationalDropout(jlstm.GRU(H), 0.5, 0.5),
            jlstm.WeightNorm(jlstm.LSTM(H)),
            jlstm.ClipCarry(jlstm.LSTM(H), 0.1),
            jlstm.ResidualCell(jlstm.GRU(D)),
            jlstm.Precision(jlstm.GRU(H), jlstm.Policy(compute=jnp.float32)),
            Mine(),
        ]
    },
    "ConvLSTM": (
        jlstm.ConvLSTM(H, kernel_size=3, spatial_shape=(5,)),
        draw(B, T, 5, D),
    ),
    "TimeLSTM": (jlstm.TimeLSTM(H), jlstm.TimeLSTMInput(**TIMES)),
    "GRUD": (
        jlstm.GRUD(H),
        jlstm.GRUDInput(TIMES["x"], TIMES["x"] > 0, abs(TIMES["x"])),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        name if i < 3 else pytest.param(name, marks=pytest.mark.slow)
        for i, name in enumerate(CELLS)
    ],
)
def test_trace_takes_every_cell(name):
    cell, xs = CELLS[name]
    params = made(cell, xs)
    masking: Any = {"lengths": LENGTHS, "resets": RESETS}
    found = dx.trace(cell, params, xs, **masking)
    ys, _ = jlstm.unroll(cell, params, xs, **masking)
    half = "float32" in name
    jax.tree.map(lambda a, b: close(a, b, 1e-5 if half else 1e-12), found.outputs, ys)
    gateless = ("Elman", "IndRNN", "LRU")
    assert bool(found.gates) != name.startswith(gateless), found.gates
    for value in found.gates.values():
        assert value.shape[:2] == (B, T)
        assert np.isfinite(value).all()
    written = dx.writes(found)
    for part, steps in written.by_step.items():
        assert steps.shape == found.memory[part].shape == found.retention[part].shape
        total = steps.sum(1) + written.by_initial[part]
        close(total, found.memory[part][:, -1], 1e-5 if half else 1e-9)
    for measure in (dx.saturation, dx.time_constants, dx.dead_units):
        assert repr(measure(found))
    flow = dx.gradient_flow(cell, params, xs, lambda ys: ys.sum(), **masking)["RNN"]
    assert np.isfinite(flow.norm).all()
    assert (flow.outputs[flow.valid] > 0).all()


def mistakes() -> dict[str, tuple[Any, Any, str]]:
    cell, xs = jlstm.LSTM(H), draw(B, T, D)
    layer = jlstm.RNN(cell)
    params = made(cell, xs)
    both = jlstm.bidirectional(cell)
    of_both = made(both, xs)
    two = dx.trace(both, of_both, xs)
    one = dx.trace(cell, params, xs)
    elman = jlstm.Elman(H)
    bare = dx.trace(elman, made(elman, xs), xs)

    def last(ys):
        return ys[:, -1, 0]

    return {
        "no layer": (lambda: dx.trace(3, params, xs), TypeError, "trace: must be a la"),
        "class": (lambda: dx.trace(jlstm.RNN, params, xs), TypeError, "the class RNN"),
        "reverse": (
            lambda: dx.trace(layer, params, xs, reverse=True),
            ValueError,
            "trace: reverse is only for cells; a layer has its own",
        ),
        "no recurrence": (
            lambda: dx.trace(jlstm.Dropout(0.5), (), xs),
            ValueError,
            "trace: finds no recurrence in Dropout(0.5); a recurrence inside a",
        ),
        "lengths": (
            lambda: dx.trace(layer, params, xs, lengths=[9, 1]),
            ValueError,
            "trace: lengths must lie in 0..T=6, got values from 1 to 9",
        ),
        "two": (
            lambda: dx.saturation(two),
            ValueError,
            "needs the trace of one recurrence, got 2: 'forward', 'backward'",
        ),
        "tolerance": (lambda: dx.dead_units(one, tolerance=2), ValueError, "got 2"),
        "loss": (
            lambda: dx.gradient_flow(layer, params, xs, last),
            ValueError,
            "gradient_flow: loss must return one number, got (2,); take its mean",
        ),
        "part": (
            lambda: dx.jacobian_norms(cell, params, xs, part="z"),
            ValueError,
            "jacobian_norms: part must be one of 'h', 'c', got 'z'",
        ),
        "anchor": (
            lambda: dx.jacobian_norms(cell, params, xs, anchor="end"),
            ValueError,
            "anchor must be 'last' or 'first', got 'end'",
        ),
        "layer": (
            lambda: dx.spectrum(layer, params, xs),
            TypeError,
            "spectrum: must be a cell, got the layer RNN(LSTM(4))",
        ),
        "steps": (
            lambda: dx.verdict(cell, params, xs[:, :0]),
            ValueError,
            "xs must have at least one step, got none",
        ),
        "count": (
            lambda: dx.lyapunov_exponents(cell, params, xs, count=9),
            ValueError,
            "lyapunov_exponents: count must be an int from 1 to 8, got 9",
        ),
        "target": (
            lambda: dx.attribute(cell, params, xs, lambda ys: ys.sum()),
            ValueError,
            "attribute: target must return a number for each row, [2], got ()",
        ),
        "tokens": (
            lambda: dx.attribute(layer, params, np.ones((B, T), int), last),
            ValueError,
            "attribute: xs must be one floating array, got [2, 6] int64",
        ),
        "method": (
            lambda: dx.attribute(cell, params, xs, last, method="x"),
            ValueError,
            "method must be one of 'gradient', ",
        ),
        "symbols": (
            lambda: dx.colour_text("abc", [1.0]),
            ValueError,
            "colour_text: values must be [3], one for each symbol, got [1]",
        ),
        "row": (
            lambda: dx.plot_gates(one, row=2),
            ValueError,
            "row must be from 0 to 1",
        ),
        "unit": (lambda: dx.plot_gates(one, units=[4]), ValueError, "from 0 to 3, got"),
        "gates": (lambda: dx.plot_gates(bare), ValueError, "Elman(4) names no gates"),
        "memory": (
            lambda: dx.plot_memory(one, "x"),
            ValueError,
            "one of 'h', 'c', got",
        ),
        "constants": (
            lambda: dx.plot_time_constants(dx.time_constants(bare)),
            ValueError,
            "no time constant is positive and finite",
        ),
        "weights": (
            lambda: dx.plot_attention(np.ones((1, 2, 3))),
            ValueError,
            "plot_attention: weights must be [T_out, T_in], of one row, got [1, 2, 3]",
        ),
        "records": (
            lambda: dx.plot_training([]),
            ValueError,
            "list the hook watch",
        ),
        "every": (
            lambda: dx.watch(layer, xs, every=0),
            ValueError,
            "watch: every must",
        ),
        "names": (
            lambda: jlstm.gates(jnp.zeros((2, 4)), "st", "ifg"),
            ValueError,
            "gates: names must have 2 entries, one for each gate of 'st', got 'ifg'",
        ),
    }


def test_mistakes_are_told_in_one_line():
    for name, (call, kind, message) in mistakes().items():
        with pytest.raises(kind) as caught:
            call()
        assert message in str(caught.value), f"{name}: {caught.value}"
        assert "\n" not in str(caught.value)


def test_layers_of_users_are_traced_unless_they_compile_their_parts():
    @dataclasses.dataclass(frozen=True)
    class Named:
        inner: Any
        compiled: bool = False

        def init(self, key, xs):
            return self.inner.init(key, xs)

        def init_carry(self, params, batch_shape):
            return self.inner.init_carry(params, batch_shape)

        def apply(self, params, xs, carry=None, **masking):
            def run(params, xs):
                return run_layer("inner", self.inner, params, xs, carry, **masking)

            return (jax.jit(run) if self.compiled else run)(params, xs)

    layer, xs = Named(jlstm.RNN(jlstm.Elman(H))), draw(B, T, D)
    params = made(layer, xs)
    assert list(dx.trace(layer, params, xs)) == ["inner"]
    for call in (dx.trace, lambda *args: dx.gradient_flow(*args, jnp.sum)):
        with pytest.raises(ValueError, match=r"finds no recurrence in .*; give"):
            call(dataclasses.replace(layer, compiled=True), params, xs)
